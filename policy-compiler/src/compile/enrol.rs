//! Whether and how an endpoint's verdicts are carried out, and which of its ports Istio itself exempts.
//!
//! Invariant: a pod's own label only ever makes its mode stricter, unless `pod_mode_override` says otherwise;
//! a label that can't be read enforces.

use std::collections::BTreeSet;

use thyra_datapath_abi::Mode;

use crate::policy::Labels;
use crate::world::{Endpoint, Workload, World};

const MODE_LABEL: &str = "thyra.io/mode";
const SYSTEM_NAMESPACE: &str = "kube-system";
const AMBIENT_ANNOTATION: (&str, &str) = ("ambient.istio.io/redirection", "enabled");
/// Labels that istiod puts on the waypoints it deploys.
const WAYPOINT_LABELS: [(&str, &str); 2] = [
    ("gateway.istio.io/managed", "istio.io-mesh-controller"),
    ("gateway.networking.k8s.io/gateway-class-name", "istio-waypoint"),
];
/// Label that istiod puts on the gateways it deploys.
const GATEWAY_LABEL: &str = "gateway.networking.k8s.io/gateway-name";
/// Container of a sidecar, and of a gateway.
const PROXY_CONTAINER: &str = "istio-proxy";
/// Merged telemetry, health and Envoy's own telemetry: never captured by Istio.
const PROXY_PORTS: [u16; 3] = [15020, 15021, 15090];
const EXCLUDE_INBOUND_ANNOTATION: &str = "traffic.sidecar.istio.io/excludeInboundPorts";

/// How an endpoint takes part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Enrolment {
    pub(crate) mode: Mode,
    pub(crate) reason: &'static str,
    /// A sidecar or gateway judges L7 itself.
    pub(crate) own_proxy: bool,
    /// Ports that are always allowed.
    pub(crate) exempt: BTreeSet<u16>,
    pub(crate) problems: Vec<String>,
}

pub(crate) fn enrol(world: &World, endpoint: &Endpoint, workload: Option<&Workload>) -> Enrolment {
    let mut problems = Vec::new();
    let own_proxy = has_own_proxy(endpoint);
    let exempt = if own_proxy {
        exempt_ports(endpoint, &mut problems)
    } else {
        BTreeSet::new()
    };
    let (mode, reason) = if is_ambient(endpoint, workload) {
        (Mode::Off, "ambient pod")
    } else if is_waypoint(endpoint) {
        (Mode::Off, "waypoint")
    } else {
        labelled_mode(world, endpoint, &mut problems)
    };
    Enrolment {
        mode,
        reason,
        own_proxy,
        exempt,
        problems,
    }
}

fn labelled_mode(world: &World, endpoint: &Endpoint, problems: &mut Vec<String>) -> (Mode, &'static str) {
    let namespace = &endpoint.namespace;
    let of_namespace = world
        .namespaces
        .get(namespace)
        .and_then(|labels| label(labels, &format!("namespace `{namespace}`"), problems));
    let base = match of_namespace {
        Some(mode) => (mode, "namespace label"),
        None if namespace == SYSTEM_NAMESPACE || *namespace == world.mesh.root_namespace => {
            (Mode::Off, "system namespace without label")
        }
        // Its label may still say anything.
        None if world.awaits_namespace(namespace) => (Mode::Enforce, "namespace not known yet"),
        None => (world.node.default_mode, "default mode"),
    };
    let pod = format!("pod `{namespace}/{}`", endpoint.name);
    match label(&endpoint.labels, &pod, problems) {
        Some(mode) if mode > base.0 || (world.node.pod_mode_override && mode != base.0) => {
            (mode, "pod label")
        }
        Some(mode) if mode < base.0 => {
            problems.push(format!(
                "{pod}: label `{MODE_LABEL}` is looser than its namespace's mode and is ignored \
                 without `--pod-mode-override`"
            ));
            base
        }
        _ => base,
    }
}

fn label(labels: &Labels, of: &str, problems: &mut Vec<String>) -> Option<Mode> {
    Some(match labels.get(MODE_LABEL)?.as_str() {
        "enforce" => Mode::Enforce,
        "audit" => Mode::Audit,
        "off" => Mode::Off,
        other => {
            problems.push(format!(
                "{of}: label `{MODE_LABEL}` is `{other}`, not `enforce`, `audit` or `off`; it enforces"
            ));
            Mode::Enforce
        }
    })
}

fn is_ambient(endpoint: &Endpoint, workload: Option<&Workload>) -> bool {
    let (key, value) = AMBIENT_ANNOTATION;
    endpoint.annotations.get(key).is_some_and(|v| v == value) || workload.is_some_and(|w| w.hbone)
}

fn is_waypoint(endpoint: &Endpoint) -> bool {
    WAYPOINT_LABELS
        .iter()
        .any(|(key, value)| endpoint.labels.get(*key).is_some_and(|v| v == value))
}

fn has_own_proxy(endpoint: &Endpoint) -> bool {
    endpoint.containers.iter().any(|name| name == PROXY_CONTAINER)
        || endpoint.labels.contains_key(GATEWAY_LABEL)
}

fn exempt_ports(endpoint: &Endpoint, problems: &mut Vec<String>) -> BTreeSet<u16> {
    let mut ports = BTreeSet::from(PROXY_PORTS);
    let listed = endpoint
        .annotations
        .get(EXCLUDE_INBOUND_ANNOTATION)
        .map_or("", String::as_str);
    for text in listed.split(',').map(str::trim).filter(|text| !text.is_empty()) {
        match text.parse() {
            Ok(port) => {
                ports.insert(port);
            }
            Err(_) => problems.push(format!(
                "pod `{}/{}`: annotation `{EXCLUDE_INBOUND_ANNOTATION}` holds `{text}`, which is not a port; \
                 it is not exempt",
                endpoint.namespace, endpoint.name
            )),
        }
    }
    ports
}
