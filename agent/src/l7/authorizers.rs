//! Where the authorizers are that CUSTOM rules ask: the Services that providers name, by the workloads behind them.
//!
//! Invariant: an address here is one that istiod gives to a workload of this network, and never the node's own or one
//! beside it: who can write a Service or a WorkloadEntry can't make Envoy, which runs in the node's network, ask there.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use thyra_datapath_abi::tables::RuleRef;
use thyra_node_proxy_bridge::lower::Places;
use thyra_policy_compiler::authorizer::{Authorizer, Target};
use thyra_policy_compiler::residual::{Answer, Residual};
use thyra_policy_compiler::world::{Service, World};

/// The services that residuals ask, and what is missing, in words.
#[must_use]
pub(super) fn places<'a>(
    world: &World,
    residuals: impl Iterator<Item = &'a Residual<RuleRef>>,
) -> (Places, Vec<String>) {
    let mut asked = BTreeSet::new();
    for residual in residuals {
        targets(&residual.http, &mut asked);
        targets(&residual.other, &mut asked);
    }
    let (mut places, mut missing) = (Places::new(), Vec::new());
    for (target, fail_open) in asked {
        match addresses(world, target) {
            Ok(addresses) => {
                if addresses.is_empty() {
                    let passes = if fail_open {
                        "passes (`failOpen`)"
                    } else {
                        "is refused"
                    };
                    missing.push(format!(
                        "authorizer {target} has no ready pod: what it is asked about {passes}"
                    ));
                }
                places.insert(target.clone(), addresses);
            }
            Err(why) => missing.push(format!(
                "authorizer {target}: {why}: what it is asked about is refused"
            )),
        }
    }
    (places, missing)
}

fn targets<'a>(answer: &'a Answer<RuleRef>, into: &mut BTreeSet<(&'a Target, bool)>) {
    match answer {
        Answer::Constant(..) => {}
        Answer::Rules(rules) => {
            let asked = rules
                .custom
                .iter()
                .filter_map(|ask| ask.provider.authorizer.as_ref().ok());
            into.extend(asked.map(|authorizer: &Arc<Authorizer>| (&authorizer.target, authorizer.fail_open)));
        }
        Answer::Stricter(a, b) => {
            targets(a, into);
            targets(b, into);
        }
        Answer::Authenticated(_, then) => targets(then, into),
    }
}

/// The ready workloads behind a service's port.
///
/// # Errors
/// There is no such service or port, or several of that name (`pilot/pkg/extensionproviders`).
fn addresses(world: &World, target: &Target) -> Result<Vec<SocketAddr>, String> {
    let key = service(world, target)?;
    let mut found = BTreeSet::new();
    for workload in world.workloads.values().filter(|workload| workload.healthy) {
        if workload.network != world.node.network {
            continue;
        }
        let ports = workload.services.get(key).into_iter().flatten();
        let ports = ports.filter(|port| port.port == target.port && port.target_port != 0);
        for port in ports {
            // One address of each: a pod's two are one server.
            let usable = workload
                .addresses
                .iter()
                .find(|address| is_elsewhere(world, **address, workload.host_network));
            found.extend(usable.map(|address| SocketAddr::new(*address, port.target_port)));
        }
    }
    Ok(found.into_iter().collect())
}

fn service<'a>(world: &'a World, target: &Target) -> Result<&'a Arc<str>, String> {
    let named = |service: &Service| {
        let namespace = target.namespace.as_ref();
        service.hostname == target.host && namespace.is_none_or(|namespace| *namespace == service.namespace)
    };
    let mut all = world.services.iter().filter(|(_, service)| named(service));
    let (key, service) = all.next().ok_or("istiod knows no such service")?;
    if all.next().is_some() {
        return Err(
            "several namespaces have such a service; write `<namespace>/<host>` as the provider's service"
                .into(),
        );
    }
    if !service.ports.iter().any(|port| port.port == target.port) {
        return Err("the service has no such port".to_owned());
    }
    Ok(key)
}

/// A pod of the host's network may be asked where it is the node's own address too: istiod says that it is a pod's.
fn is_elsewhere(world: &World, address: IpAddr, host_network: bool) -> bool {
    let local = match address {
        IpAddr::V4(v4) => {
            v4.is_loopback()
                || v4.is_link_local()
                || v4.is_unspecified()
                || v4.is_multicast()
                || v4.is_broadcast()
        }
        IpAddr::V6(v6) => {
            v6.is_loopback() || v6.is_unicast_link_local() || v6.is_unspecified() || v6.is_multicast()
        }
    };
    !local && (host_network || !world.node.node_addresses.contains(&address))
}
