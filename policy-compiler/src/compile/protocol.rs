//! Which reading each port of a pod has, by what the Services in front of it declare.
//!
//! Invariant: a port that no Service declares is read as HTTP, since its first bytes may be.

use std::collections::BTreeMap;

use super::rule::Reading;
use crate::world::{AppProtocol, Endpoint, ServicePort, Workload, World};

/// Readings of one port: usually one; both where two Services disagree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Readings {
    One(Reading),
    Disagree,
}

/// Readings of the pod ports that are not simply HTTP.
pub(crate) type Protocols = BTreeMap<u16, Readings>;

pub(crate) fn protocols(
    world: &World,
    endpoint: &Endpoint,
    workload: Option<&Workload>,
    problems: &mut Vec<String>,
) -> Protocols {
    let mut declared: BTreeMap<u16, Readings> = BTreeMap::new();
    let ports = workload
        .into_iter()
        .flat_map(|workload| &workload.services)
        .flat_map(|(service, ports)| ports.iter().map(move |port| (&**service, port)));
    for (service, port) in ports.filter(|(_, port)| port.target_port != 0) {
        let reading = Readings::One(match declaration(world, service, port) {
            AppProtocol::NotHttp | AppProtocol::Tls => Reading::Tcp,
            AppProtocol::Http | AppProtocol::Unknown => Reading::Http,
        });
        declared
            .entry(port.target_port)
            .and_modify(|known| {
                if *known != reading {
                    *known = Readings::Disagree;
                }
            })
            .or_insert(reading);
    }
    for (port, readings) in &declared {
        if *readings == Readings::Disagree {
            problems.push(format!(
                "pod `{}/{}`: Services disagree about the protocol of pod port {port}; \
                 the stricter answer holds",
                endpoint.namespace, endpoint.name
            ));
        }
    }
    declared.retain(|_, readings| *readings != Readings::One(Reading::Http));
    declared
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
