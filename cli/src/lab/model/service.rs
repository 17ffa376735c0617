//! A Service as kube-proxy sees it.
//!
//! Invariant: a backend's port is the pod's own: a named target port is looked up in each pod.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::Value;

use super::{Pod, labels};
use crate::lab::object::{Object, text};

/// A Service with its virtual addresses.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Service {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// ClusterIPs; none if headless.
    pub(crate) vips: Vec<IpAddr>,
    /// `externalIPs` and the load balancer's.
    pub(crate) external: Vec<IpAddr>,
    pub(crate) ports: Vec<ServicePort>,
    /// Empty: none is selected.
    pub(crate) selector: BTreeMap<String, String>,
    /// `externalTrafficPolicy: Local`.
    pub(crate) external_local: bool,
    /// `internalTrafficPolicy: Local`.
    pub(crate) internal_local: bool,
    /// Told by the CNAME alone; nothing here to dial.
    pub(crate) external_name: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServicePort {
    pub(crate) name: String,
    pub(crate) port: u16,
    pub(crate) target: TargetPort,
    pub(crate) node_port: Option<u16>,
    pub(crate) udp: bool,
    /// `appProtocol`.
    pub(crate) app_protocol: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TargetPort {
    Number(u16),
    Name(String),
}

/// Where a connection to a Service may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Backend {
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) node: usize,
}

impl Service {
    pub(super) fn new(object: &Object, vips: Vec<IpAddr>) -> Self {
        let list = |pointer: &str| {
            object
                .json
                .pointer(pointer)
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
        };
        let external = list("/spec/externalIPs")
            .filter_map(Value::as_str)
            .chain(list("/status/loadBalancer/ingress").filter_map(|ingress| ingress.get("ip")?.as_str()))
            .filter_map(|address| address.parse().ok());
        Self {
            namespace: object.namespace.clone(),
            name: object.name.clone(),
            vips,
            external: external.collect(),
            ports: list("/spec/ports").filter_map(ServicePort::new).collect(),
            selector: labels(&object.json, "/spec/selector"),
            external_local: text(&object.json, "/spec/externalTrafficPolicy") == "Local",
            internal_local: text(&object.json, "/spec/internalTrafficPolicy") == "Local",
            external_name: text(&object.json, "/spec/type") == "ExternalName",
        }
    }

    /// `name.namespace.svc.cluster.local`.
    pub(crate) fn hostname(&self) -> String {
        format!("{}.{}.svc.cluster.local", self.name, self.namespace)
    }

    pub(crate) fn selects(&self, pod: &Pod) -> bool {
        !self.selector.is_empty()
            && pod.namespace == self.namespace
            && self
                .selector
                .iter()
                .all(|(key, value)| pod.labels.get(key) == Some(value))
    }

    /// The pod's port behind `port`; none if it has no port of that name.
    pub(crate) fn target(port: &ServicePort, pod: &Pod) -> Option<u16> {
        match &port.target {
            TargetPort::Number(number) => Some(*number),
            TargetPort::Name(name) => pod
                .ports
                .iter()
                .find(|own| own.name == *name && own.udp == port.udp)
                .map(|own| own.number),
        }
    }

    /// Backends of one port in one family.
    pub(crate) fn backends<'a>(
        port: &ServicePort,
        pods: impl Iterator<Item = &'a Pod>,
        v4: bool,
    ) -> Vec<Backend> {
        let mut backends: Vec<Backend> = pods
            .filter_map(|pod| {
                let address = pod.addresses.iter().find(|address| address.is_ipv4() == v4)?;
                Some(Backend {
                    address: *address,
                    port: Self::target(port, pod)?,
                    node: pod.node,
                })
            })
            .collect();
        backends.sort_unstable();
        backends.dedup();
        backends
    }
}

impl ServicePort {
    fn new(value: &Value) -> Option<Self> {
        let number = |key: &str| {
            value
                .get(key)
                .and_then(Value::as_u64)
                .and_then(|n| u16::try_from(n).ok())
        };
        let port = number("port")?;
        let target = match value.get("targetPort") {
            Some(Value::String(name)) => match name.parse() {
                Ok(number) => TargetPort::Number(number),
                Err(_) => TargetPort::Name(name.clone()),
            },
            _ => TargetPort::Number(number("targetPort").filter(|number| *number != 0).unwrap_or(port)),
        };
        Some(Self {
            name: text(value, "/name"),
            port,
            target,
            node_port: number("nodePort").filter(|number| *number != 0),
            udp: text(value, "/protocol") == "UDP",
            app_protocol: text(value, "/appProtocol"),
        })
    }
}
