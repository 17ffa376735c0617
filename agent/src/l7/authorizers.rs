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

use crate::reach::Reach;

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
    let address = address.to_canonical();
    Reach::Others.holds(address) && (host_network || !world.node.node_addresses.contains(&address))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use thyra_datapath_abi::tables::PolicyRef;
    use thyra_datapath_abi::{Action, Reason};
    use thyra_policy_compiler::authorizer::{self, CHECK_TIMEOUT, Check, Provider, STATUS_ON_ERROR};
    use thyra_policy_compiler::residual::{Ask, Decides, Rules};
    use thyra_policy_compiler::world::{AppProtocol, ServicePort, Workload, WorkloadKind};

    use super::*;

    const KEY: &str = "auth/ext.auth.svc.cluster.local";

    fn port() -> ServicePort {
        ServicePort {
            port: 9000,
            target_port: 9191,
            protocol: AppProtocol::Http,
        }
    }

    fn service(world: &mut World, namespace: &str) {
        let service = Service {
            name: "ext".to_owned(),
            namespace: namespace.to_owned(),
            hostname: "ext.auth.svc.cluster.local".to_owned(),
            addresses: Vec::new(),
            ports: vec![port()],
        };
        let key = format!("{namespace}/{}", service.hostname);
        world.services.insert(key.into(), Arc::new(service));
    }

    fn workload(world: &mut World, name: &str, addresses: &[&str], change: fn(&mut Workload)) {
        let mut workload = Workload {
            uid: name.into(),
            kind: WorkloadKind::Pod,
            name: name.to_owned(),
            namespace: "auth".to_owned(),
            addresses: addresses
                .iter()
                .map(|text| text.parse().expect("an address"))
                .collect(),
            network: String::new(),
            trust_domain: "cluster.local".to_owned(),
            service_account: "default".to_owned(),
            node: String::new(),
            host_network: false,
            healthy: true,
            hbone: false,
            services: [(KEY.into(), vec![port()])].into(),
            authorization_policies: Vec::new(),
        };
        change(&mut workload);
        world.workloads.insert(name.into(), Arc::new(workload));
    }

    fn asking(text: &str, port: u32) -> Residual<RuleRef> {
        let authorizer = authorizer::target(text, port).map(|target| Authorizer {
            target,
            check: Check::Grpc,
            timeout: CHECK_TIMEOUT,
            fail_open: true,
            status_on_error: STATUS_ON_ERROR,
            body: None,
        });
        let rule = RuleRef {
            policy: PolicyRef {
                namespace: "shop".into(),
                name: "ask".into(),
            },
            rule: Some(0),
        };
        Residual {
            http: Answer::Rules(Arc::new(Rules {
                custom: vec![Ask {
                    rule,
                    conditions: Arc::default(),
                    provider: Arc::new(Provider::new("ext", authorizer)),
                }],
                deny: Vec::new(),
                allow: Vec::new(),
                default_deny: false,
                decides: Decides::EachRequest,
            })),
            other: Answer::Constant(Action::Deny, Reason::NotHttp, None),
        }
    }

    fn found(world: &World, service: &str, port: u32) -> (Option<Vec<String>>, Vec<String>) {
        let residual = asking(service, port);
        let (places, missing) = places(world, [&residual].into_iter());
        let places: BTreeMap<_, _> = places;
        let addresses = places.into_values().next();
        let words = |list: Vec<SocketAddr>| list.iter().map(ToString::to_string).collect();
        (addresses.map(words), missing)
    }

    #[test]
    fn the_ready_pods_of_this_network_are_asked_one_address_each() {
        let mut world = World::default();
        service(&mut world, "auth");
        workload(&mut world, "a", &["10.0.0.1", "fd00::1"], |_| {});
        workload(&mut world, "b", &["10.0.0.2"], |workload| {
            workload.healthy = false
        });
        workload(&mut world, "c", &["10.0.0.3"], |workload| {
            workload.network = "other".to_owned()
        });
        workload(&mut world, "d", &["10.0.0.4"], |workload| {
            workload.services.clear()
        });
        workload(&mut world, "e", &["fd00::5"], |_| {});
        let wanted = vec!["10.0.0.1:9191".to_owned(), "[fd00::5]:9191".to_owned()];
        for text in ["ext.auth.svc.cluster.local", KEY] {
            assert_eq!(
                found(&world, text, 9000),
                (Some(wanted.clone()), Vec::new()),
                "{text}"
            );
        }
    }

    #[test]
    fn an_authorizer_is_never_at_an_address_of_the_node_itself() {
        let mut world = World::default();
        service(&mut world, "auth");
        world
            .node
            .node_addresses
            .insert("192.0.2.10".parse().expect("an address"));
        let local = [
            "127.0.0.1",
            "169.254.169.254",
            "0.0.0.0",
            "192.0.2.10",
            "::1",
            "fe80::1",
            "224.0.0.1",
        ];
        for address in local {
            workload(&mut world, "a", &[address], |workload| {
                workload.kind = WorkloadKind::Other
            });
            let (addresses, missing) = found(&world, KEY, 9000);
            assert_eq!(addresses, Some(Vec::new()), "{address}");
            assert!(missing[0].contains("no ready pod"), "{missing:?}");
        }
    }

    #[test]
    fn a_service_that_is_not_there_or_there_twice_is_no_place_and_named() {
        let mut world = World::default();
        workload(&mut world, "a", &["10.0.0.1"], |_| {});
        let why = |world: &World, text: &str, port: u32| {
            let (addresses, missing) = found(world, text, port);
            assert_eq!(addresses, None);
            missing.concat()
        };
        assert!(why(&world, KEY, 9000).contains("no such service"));
        service(&mut world, "auth");
        assert!(why(&world, KEY, 9001).contains("no such port"));
        assert!(why(&world, "other/ext.auth.svc.cluster.local", 9000).contains("no such service"));
        service(&mut world, "evil");
        assert!(why(&world, "ext.auth.svc.cluster.local", 9000).contains("several namespaces"));
        assert!(found(&world, KEY, 9000).0.is_some());
    }
}
