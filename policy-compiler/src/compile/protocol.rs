//! How each port of a pod is read, by what the Services in front of it declare.
//!
//! Invariant: a port that no Service declares is read by its first bytes.

use std::collections::BTreeMap;

use crate::world::{AppProtocol, Endpoint, ServicePort, Workload, World};

/// What the Services in front of a pod say of one of its ports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Declared {
    /// Some Service says HTTP: other bytes are refused.
    pub http: bool,
    /// Some Service says that it isn't HTTP.
    pub tcp: bool,
    /// Some Service says nothing, or there is none.
    pub unknown: bool,
}

impl Declared {
    /// No Service says anything.
    pub const NOTHING: Self = Self {
        http: false,
        tcp: false,
        unknown: true,
    };

    /// Two Services contradict each other; the stricter answer holds.
    #[must_use]
    pub fn disagree(self) -> bool {
        self.tcp && (self.http || self.unknown)
    }
}

/// What is declared of the pod ports of which a Service says something.
pub type Protocols = BTreeMap<u16, Declared>;

pub(crate) fn protocols(
    world: &World,
    endpoint: &Endpoint,
    workload: Option<&Workload>,
    problems: &mut Vec<String>,
) -> Protocols {
    let declared = declared(world, workload);
    for (port, _) in declared.iter().filter(|(_, declared)| declared.disagree()) {
        problems.push(format!(
            "pod `{}/{}`: Services disagree about the protocol of pod port {port}; \
             the stricter answer holds",
            endpoint.namespace, endpoint.name
        ));
    }
    declared
}

fn declared(world: &World, workload: Option<&Workload>) -> Protocols {
    let mut all = Protocols::new();
    let ports = workload
        .into_iter()
        .flat_map(|workload| &workload.services)
        .flat_map(|(service, ports)| ports.iter().map(move |port| (&**service, port)));
    for (service, port) in ports.filter(|(_, port)| port.target_port != 0) {
        let declared = all.entry(port.target_port).or_default();
        match declaration(world, service, port) {
            AppProtocol::NotHttp | AppProtocol::Tls => declared.tcp = true,
            AppProtocol::Http => declared.http = true,
            AppProtocol::Unknown => declared.unknown = true,
        }
    }
    all.retain(|_, declared| *declared != Declared::NOTHING);
    all
}

/// What a Service declares of a port that it has on a pod. istiod tells it with the Service, not with the
/// pod.
fn declaration(world: &World, service: &str, port: &ServicePort) -> AppProtocol {
    if port.protocol != AppProtocol::Unknown {
        return port.protocol;
    }
    let ports = world
        .services
        .get(service)
        .into_iter()
        .flat_map(|service| &service.ports);
    let mut same = ports.filter(|own| own.port == port.port).map(|own| own.protocol);
    same.find(|protocol| *protocol != AppProtocol::Unknown)
        .unwrap_or(AppProtocol::Unknown)
}
