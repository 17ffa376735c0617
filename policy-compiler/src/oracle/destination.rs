//! What is asked of the destination: its mode, the policies that apply to it, its mTLS mode, its ports'
//! protocols.

use thyra_datapath_abi::Mode;
use thyra_datapath_abi::tables::PolicyRef;

use crate::policy::{AuthorizationPolicy, Labels, MtlsMode, PeerAuthentication, RequestAuthentication};
use crate::world::{AppProtocol, Endpoint, Workload, WorkloadKind, World};

/// The pod's own workload as istiod tells it.
fn workload<'a>(world: &'a World, endpoint: &Endpoint) -> Option<&'a Workload> {
    world.workloads.values().map(|w| &**w).find(|w| {
        w.kind == WorkloadKind::Pod
            && w.network == world.node.network
            && (&w.namespace, &w.name) == (&endpoint.namespace, &endpoint.name)
            && w.addresses.iter().any(|a| endpoint.addresses.contains(a))
    })
}

pub(super) fn mode(world: &World, endpoint: &Endpoint) -> Mode {
    let label = |name: &str, value: &str| endpoint.labels.get(name).is_some_and(|v| v == value);
    let ambient = endpoint
        .annotations
        .get("ambient.istio.io/redirection")
        .is_some_and(|v| v == "enabled")
        || workload(world, endpoint).is_some_and(|w| w.hbone);
    let waypoint = label("gateway.istio.io/managed", "istio.io-mesh-controller")
        || label("gateway.networking.k8s.io/gateway-class-name", "istio-waypoint");
    if ambient || waypoint {
        return Mode::Off;
    }
    let namespace = world.namespaces.get(&endpoint.namespace).and_then(labelled);
    let system = endpoint.namespace == "kube-system" || endpoint.namespace == world.mesh.root_namespace;
    let told = world.namespaces.contains_key(&endpoint.namespace);
    let all_told = world.synced && !world.node.namespaces_are_told;
    let of_namespace = namespace.unwrap_or(if system {
        Mode::Off
    } else if !told && !all_told {
        Mode::Enforce
    } else {
        world.node.default_mode
    });
    match labelled(&endpoint.labels) {
        None => of_namespace,
        Some(own) if world.node.pod_mode_override => own,
        Some(own) => own.max(of_namespace),
    }
}

fn labelled(labels: &Labels) -> Option<Mode> {
    match labels.get("thyra.io/mode").map(String::as_str) {
        None => None,
        Some("off") => Some(Mode::Off),
        Some("audit") => Some(Mode::Audit),
        // A label that can't be read enforces.
        Some(_) => Some(Mode::Enforce),
    }
}

/// A sidecar or a gateway: its own Envoy answers what needs L7.
pub(super) fn is_own_proxy(endpoint: &Endpoint) -> bool {
    endpoint.containers.iter().any(|c| c == "istio-proxy")
        || endpoint
            .labels
            .contains_key("gateway.networking.k8s.io/gateway-name")
}

/// A port that Istio doesn't capture on such a pod.
pub(super) fn exempt(endpoint: &Endpoint, port: u16) -> bool {
    let excluded = endpoint
        .annotations
        .get("traffic.sidecar.istio.io/excludeInboundPorts");
    let listed = excluded.is_some_and(|list| list.split(',').any(|p| p.trim().parse() == Ok(port)));
    listed || [15020, 15021, 15090].contains(&port)
}

pub(super) fn in_scope(world: &World, endpoint: &Endpoint, namespace: &str) -> bool {
    namespace == world.mesh.root_namespace || namespace == endpoint.namespace
}

pub(super) fn applies(world: &World, endpoint: &Endpoint, policy: &AuthorizationPolicy) -> bool {
    !policy.has_target_refs
        && in_scope(world, endpoint, &policy.reference.namespace)
        && policy
            .selector
            .as_ref()
            .is_none_or(|wanted| has_labels(endpoint, wanted))
}

/// The RequestAuthentications that ask something of the pod's requests, root namespace first.
pub(super) fn request_authentications<'a>(
    world: &'a World,
    endpoint: &Endpoint,
) -> Vec<&'a RequestAuthentication> {
    let mut all: Vec<&RequestAuthentication> = world
        .request_authentication
        .values()
        .map(|ra| &**ra)
        .filter(|ra| !ra.has_target_refs)
        .filter(|ra| !ra.rules.is_empty() || !ra.unknown.is_empty())
        .filter(|ra| in_scope(world, endpoint, &ra.reference.namespace))
        .filter(|ra| {
            ra.selector
                .as_ref()
                .is_none_or(|wanted| has_labels(endpoint, wanted))
        })
        .collect();
    let root = &*world.mesh.root_namespace;
    all.sort_by_key(|ra| (&*ra.reference.namespace != root, &ra.reference));
    all
}

fn has_labels(endpoint: &Endpoint, wanted: &Labels) -> bool {
    wanted
        .iter()
        .all(|(key, value)| endpoint.labels.get(key) == Some(value))
}

/// A PeerAuthentication that refuses sources without identity.
pub(super) struct Demand {
    pub(super) policy: PolicyRef,
    /// It says STRICT itself; otherwise something in it could not be read.
    pub(super) readable: bool,
}

/// Mesh, then namespace, then workload; each level by its oldest object; UNSET inherits.
pub(super) fn demand(world: &World, endpoint: &Endpoint, port: u16) -> Option<Demand> {
    let root = &*world.mesh.root_namespace;
    let everywhere = |pa: &PeerAuthentication| pa.selector.as_ref().is_none_or(Labels::is_empty);
    let own = |pa: &PeerAuthentication| {
        *pa.reference.namespace == *endpoint.namespace && *pa.reference.namespace != *root
    };
    let mesh = oldest(world, |pa| *pa.reference.namespace == *root && everywhere(pa));
    let namespace = oldest(world, |pa| own(pa) && everywhere(pa));
    let workload = oldest(world, |pa| {
        own(pa) && !everywhere(pa) && pa.selector.as_ref().is_some_and(|s| has_labels(endpoint, s))
    });
    if let Some(pa) = workload {
        let unread = !pa.unknown.is_empty();
        match pa.ports.get(&port) {
            None | Some(MtlsMode::Unset) => {}
            Some(MtlsMode::Strict) => return Some(said(pa, true)),
            Some(MtlsMode::Permissive | MtlsMode::Disable) => return unread.then(|| said(pa, false)),
        }
    }
    for pa in [workload, namespace, mesh].into_iter().flatten() {
        let unread = !pa.unknown.is_empty();
        match pa.mode {
            MtlsMode::Strict => return Some(said(pa, true)),
            MtlsMode::Unset if !unread => {}
            // An object with something in it that can't be read is STRICT.
            _ => return unread.then(|| said(pa, false)),
        }
    }
    None
}

fn said(pa: &PeerAuthentication, readable: bool) -> Demand {
    Demand {
        policy: pa.reference.clone(),
        readable,
    }
}

fn oldest(world: &World, on_level: impl Fn(&PeerAuthentication) -> bool) -> Option<&PeerAuthentication> {
    let mut level: Vec<&PeerAuthentication> = world
        .peer_authentication
        .values()
        .map(|pa| &**pa)
        .filter(|pa| on_level(pa))
        .collect();
    level.sort_by_key(|pa| (pa.created, &pa.reference.name));
    level.first().copied()
}

/// How a port is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// The first bytes decide.
    Undeclared,
    /// HTTP, and nothing else.
    Http,
    /// Never HTTP.
    Tcp,
}

/// What the Services in front of the pod make of the port, HTTP first; two where they disagree.
pub(super) fn protocols(world: &World, endpoint: &Endpoint, port: u16) -> Vec<Protocol> {
    let (mut http, mut tcp, mut unknown) = (false, false, false);
    if let Some(workload) = workload(world, endpoint) {
        for (service, pod_ports) in &workload.services {
            for pod_port in pod_ports {
                if pod_port.target_port != port || port == 0 {
                    continue;
                }
                // istiod declares protocols in the Service's own list of ports.
                let mut protocol = pod_port.protocol;
                if let Some(service) = world.services.get(service) {
                    for own in &service.ports {
                        if own.port == pod_port.port && protocol == AppProtocol::Unknown {
                            protocol = own.protocol;
                        }
                    }
                }
                match protocol {
                    AppProtocol::Tls | AppProtocol::NotHttp => tcp = true,
                    AppProtocol::Http => http = true,
                    AppProtocol::Unknown => unknown = true,
                }
            }
        }
    }
    let mut all = Vec::new();
    if http {
        all.push(Protocol::Http);
    } else if unknown || !tcp {
        all.push(Protocol::Undeclared);
    }
    if tcp {
        all.push(Protocol::Tcp);
    }
    all
}
