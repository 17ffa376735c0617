//! Services as nftables rules, shaped as kube-proxy's nftables mode has them.
//!
//! Invariant: one transaction replaces both tables; a connection meets the old rules or the new ones.

use std::fmt::Write as _;
use std::net::IpAddr;

use super::model::{Backend, Model, NodeAddresses, Pod, Service, ServicePort};

/// Of every pod of the cluster, as kube-proxy's `clusterCIDR`.
pub(crate) const POD_RANGE4: &str = "10.244.0.0/16";
/// Of every pod of the cluster, as kube-proxy's `clusterCIDR`.
pub(crate) const POD_RANGE6: &str = "fd00:10:244::/56";
/// kube-proxy's masquerade bit.
const MASQUERADE: &str = "0x4000";

/// One family's table while it is written.
struct Table<'a> {
    model: &'a Model,
    node: usize,
    v4: bool,
    /// Chains of Services and of backends.
    chains: String,
    /// From address and port to a chain.
    dispatch: String,
    /// Services nobody answers for.
    reject: String,
    next: usize,
}

/// Where a packet to a Service was sent to.
struct Entrance {
    /// `ip daddr 10.96.0.1 tcp dport 80`.
    matches: String,
    kind: EntranceKind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum EntranceKind {
    Cluster,
    External,
}

/// The whole ruleset of one node.
pub(crate) fn ruleset(model: &Model, node: usize) -> String {
    let mut text = String::new();
    for v4 in [true, false] {
        let mut table = Table {
            model,
            node,
            v4,
            chains: String::new(),
            dispatch: String::new(),
            reject: String::new(),
            next: 0,
        };
        for service in model.services.values() {
            for port in &service.ports {
                table.add(service, port);
            }
        }
        text.push_str(&table.finish());
    }
    text
}

impl Table<'_> {
    fn ip(&self) -> &'static str {
        if self.v4 { "ip" } else { "ip6" }
    }

    fn add(&mut self, service: &Service, port: &ServicePort) {
        let pods = self.model.backends(service);
        let backends = Service::backends(port, pods, self.v4);
        let local: Vec<Backend> = backends
            .iter()
            .filter(|backend| backend.node == self.node)
            .copied()
            .collect();
        for entrance in self.entrances(service, port) {
            let (backends, mark) = match entrance.kind {
                EntranceKind::Cluster if service.internal_local => (&local, Mark::OutOfRange),
                EntranceKind::Cluster => (&backends, Mark::OutOfRange),
                EntranceKind::External if service.external_local => (&local, Mark::Never),
                EntranceKind::External => (&backends, Mark::Always),
            };
            if backends.is_empty() {
                let verdict = if service.external_local && entrance.kind == EntranceKind::External {
                    "drop"
                } else {
                    "reject"
                };
                line(
                    &mut self.reject,
                    format_args!("{} ct state new {verdict}", entrance.matches),
                );
                continue;
            }
            let chain = self.service_chain(port, backends, mark);
            line(
                &mut self.dispatch,
                format_args!("{} goto {chain}", entrance.matches),
            );
        }
    }

    /// Addresses and ports by which the Service is reached on this node.
    fn entrances(&self, service: &Service, port: &ServicePort) -> Vec<Entrance> {
        let (ip, protocol) = (self.ip(), if port.udp { "udp" } else { "tcp" });
        let of = |addresses: &[IpAddr], number: u16, kind| {
            let family = addresses.iter().filter(|address| address.is_ipv4() == self.v4);
            let entrances = family.map(|address| Entrance {
                matches: format!("{ip} daddr {address} {protocol} dport {number}"),
                kind,
            });
            entrances.collect::<Vec<_>>()
        };
        let mut all = of(&service.vips, port.port, EntranceKind::Cluster);
        all.extend(of(&service.external, port.port, EntranceKind::External));
        if let Some(node_port) = port.node_port {
            all.extend(of(
                &NodeAddresses::of(self.node).own,
                node_port,
                EntranceKind::External,
            ));
        }
        all
    }

    fn service_chain(&mut self, port: &ServicePort, backends: &[Backend], mark: Mark) -> String {
        let (ip, protocol) = (self.ip(), if port.udp { "udp" } else { "tcp" });
        let name = format!("service-{}", self.next);
        self.next += 1;
        let mut body = String::new();
        let range = if self.v4 { POD_RANGE4 } else { POD_RANGE6 };
        match mark {
            Mark::Always => body.push_str("  jump mark-for-masquerade\n"),
            Mark::OutOfRange => line(
                &mut body,
                format_args!("  {ip} saddr != {range} jump mark-for-masquerade"),
            ),
            Mark::Never => {}
        }
        let count = backends.len();
        let choices: Vec<String> = (0..count)
            .map(|index| format!("{index} : goto {name}-backend-{index}"))
            .collect();
        line(
            &mut body,
            format_args!("  numgen random mod {count} vmap {{ {} }}", choices.join(", ")),
        );
        for (index, Backend { address, port, .. }) in backends.iter().enumerate() {
            let target = if self.v4 {
                format!("{address}:{port}")
            } else {
                format!("[{address}]:{port}")
            };
            // A pod that reaches itself must see another source than its own.
            line(
                &mut self.chains,
                format_args!(
                    " chain {name}-backend-{index} {{\n  {ip} saddr {address} jump mark-for-masquerade\n  \
                     meta l4proto {protocol} dnat to {target}\n }}"
                ),
            );
        }
        line(&mut self.chains, format_args!(" chain {name} {{\n{body} }}"));
        name
    }

    fn finish(self) -> String {
        let ip = self.ip();
        let Self {
            chains,
            dispatch,
            reject,
            ..
        } = self;
        format!(
            "table {ip} thyra-lab\ndelete table {ip} thyra-lab\ntable {ip} thyra-lab {{\n \
             chain mark-for-masquerade {{ meta mark set meta mark or {MASQUERADE}; }}\n{chains} \
             chain services {{\n{dispatch} }}\n \
             chain no-backend {{\n{reject} }}\n \
             chain prerouting {{ type nat hook prerouting priority -100; jump services; }}\n \
             chain output {{ type nat hook output priority -100; jump services; }}\n \
             chain postrouting {{ type nat hook postrouting priority 100; \
             meta mark & {MASQUERADE} == 0 return; meta mark set meta mark xor {MASQUERADE}; \
             masquerade fully-random; }}\n \
             chain input-filter {{ type filter hook input priority -110; jump no-backend; }}\n \
             chain forward-filter {{ type filter hook forward priority -110; ct state invalid drop; \
             jump no-backend; }}\n \
             chain output-filter {{ type filter hook output priority -110; jump no-backend; }}\n}}\n"
        )
    }
}

/// Which clients are given the node's address.
#[derive(Clone, Copy)]
enum Mark {
    Always,
    /// Those from outside of the pod range.
    OutOfRange,
    Never,
}

/// Where a probe dials for a Service: its ClusterIP, a node port, or for a headless one a pod.
pub(crate) fn entrance(model: &Model, service: &Service, port: u16, v4: bool) -> Option<(IpAddr, u16)> {
    let own = NodeAddresses::of(0).own;
    if let Some(declared) = service.ports.iter().find(|declared| declared.port == port) {
        let vip = service.vips.iter().find(|vip| vip.is_ipv4() == v4);
        return match vip {
            Some(vip) => Some((*vip, port)),
            None if service.external_name || !service.vips.is_empty() => None,
            None => Service::backends(declared, model.backends(service), v4)
                .first()
                .map(|backend| (backend.address, backend.port)),
        };
    }
    let by_node = service
        .ports
        .iter()
        .any(|declared| declared.node_port == Some(port));
    let node = own.into_iter().find(|address| address.is_ipv4() == v4)?;
    if by_node {
        return Some((node, port));
    }
    // A port that the Service doesn't have: the packet goes to its address all the same.
    service
        .vips
        .iter()
        .find(|vip| vip.is_ipv4() == v4)
        .map(|vip| (*vip, port))
}

/// Every pod address and port that a connection to the Service may end at.
pub(crate) fn ends(model: &Model, service: &Service, port: u16, v4: bool) -> Vec<(IpAddr, u16)> {
    let matching = service
        .ports
        .iter()
        .filter(|declared| declared.port == port || declared.node_port == Some(port));
    let pods: Vec<&Pod> = model.backends(service).collect();
    matching
        .flat_map(|declared| Service::backends(declared, pods.iter().copied(), v4))
        .map(|backend| (backend.address, backend.port))
        .collect()
}

fn line(text: &mut String, line: std::fmt::Arguments<'_>) {
    if writeln!(text, "  {line}").is_err() {
        unreachable!("writing to a string can't fail");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{ends, entrance, ruleset};
    use crate::lab::model::Model;
    use crate::lab::object::Object;

    fn shop(spec: serde_json::Value) -> Model {
        let objects = [
            Object::from_json(&json!({
                "kind": "Pod", "metadata": {"name": "cart", "namespace": "shop", "labels": {"app": "cart"}},
                "spec": {"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]}
            })),
            Object::from_json(&json!({
                "kind": "Service", "metadata": {"name": "cart", "namespace": "shop"}, "spec": spec
            })),
        ];
        let mut model = Model::new(1, &objects).expect("one node");
        model.add(&objects).expect("room");
        model
    }

    #[test]
    fn a_named_target_port_is_the_pods_own() {
        let model = shop(json!({
            "selector": {"app": "cart"}, "clusterIP": "10.96.0.10",
            "ports": [{"port": 80, "targetPort": "http"}]
        }));
        let rules = ruleset(&model, 0);
        assert!(
            rules.contains("ip daddr 10.96.0.10 tcp dport 80 goto service-0"),
            "{rules}"
        );
        assert!(rules.contains("dnat to 10.244.0.2:8080"), "{rules}");
        assert!(rules.contains("dnat to [fd00:10:244::2]:8080"), "{rules}");
        let service = &model.services["shop/cart"];
        assert_eq!(
            entrance(&model, service, 80, true).map(|to| to.0.to_string()),
            Some("10.96.0.10".into())
        );
        assert_eq!(ends(&model, service, 80, true)[0].1, 8080);
    }

    #[test]
    fn a_service_without_backends_is_rejected_and_a_local_one_dropped() {
        let spec = json!({
            "type": "NodePort", "externalTrafficPolicy": "Local", "selector": {"app": "nobody"},
            "ports": [{"port": 80, "nodePort": 30080}]
        });
        let rules = ruleset(&shop(spec), 0);
        assert!(rules.contains("tcp dport 80 ct state new reject"), "{rules}");
        assert!(
            rules.contains("ip daddr 10.200.0.1 tcp dport 30080 ct state new drop"),
            "{rules}"
        );
    }

    #[test]
    fn a_local_node_port_keeps_the_clients_address() {
        let spec = |policy: &str| {
            json!({
                "type": "NodePort", "externalTrafficPolicy": policy, "selector": {"app": "cart"},
                "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30080}]
            })
        };
        let marks = |rules: &str| {
            rules
                .lines()
                .filter(|line| line.trim() == "jump mark-for-masquerade")
                .count()
        };
        assert_eq!(marks(&ruleset(&shop(spec("Cluster")), 0)), 2);
        assert_eq!(marks(&ruleset(&shop(spec("Local")), 0)), 0);
    }

    #[test]
    fn a_headless_service_is_dialled_at_a_pod() {
        let model = shop(json!({
            "selector": {"app": "cart"}, "clusterIP": "None", "ports": [{"port": 8080}]
        }));
        let to = entrance(&model, &model.services["shop/cart"], 8080, true);
        assert_eq!(
            to.map(|(address, port)| format!("{address}:{port}")),
            Some("10.244.0.2:8080".into())
        );
    }
}
