//! The lab's network: nodes, pods behind veths, the fabric that joins nodes, and the world outside.
//!
//! ```text
//!  pod ─ eth0 ═ veth1 ┐                     ┌ up1 ═ up0 ─ node 2 …
//!  pod ─ eth0 ═ veth2 ┴ node 1 ─ up0 ═ up0 ─┤
//! fabric (a router: 10.200.0.254, fd00:200::fe) ─ out0 ═ eth0 ─ outside 203.0.113.7
//! ```
//!
//! Invariant: each of these is a network namespace of the lab; nothing is added to the machine's own.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::model::{Model, NodeAddresses, OUTSIDE4, OUTSIDE6, Pod};
use super::netns::{self, Netns, ToolError};
use super::scenario::Topology;

/// Longest name of a namespace that the lab makes; a longer one is cut and numbered.
const MAX_NAME: usize = 200;
/// Duplicate address detection would hold addresses back for a second.
const NO_DAD: &[(&str, &str)] = &[
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_ra", "0"),
];
/// What a node has set: routing, strict source checks, bridged packets seen by nftables (as kube-proxy needs
/// it).
const NODE: &[(&str, &str)] = &[
    ("ipv4/ip_forward", "1"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv4/conf/all/rp_filter", "1"),
    ("ipv4/conf/default/rp_filter", "1"),
];
/// A bridge's answers to a Service come back without its address unless nftables sees them.
const BRIDGE: &[(&str, &str)] = &[
    ("bridge/bridge-nf-call-iptables", "1"),
    ("bridge/bridge-nf-call-ip6tables", "1"),
];
const FABRIC: &[(&str, &str)] = &[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")];

/// The fabric's addresses towards every node.
const UPLINK_GATEWAYS: [&str; 2] = ["10.200.0.254/32", "fd00:200::fe/128"];
/// How long a bridge may take to notice its first port; the kernel batches such events by the second.
const CARRIER_WAIT: Duration = Duration::from_secs(3);

/// The namespaces of a lab.
#[derive(Debug)]
pub(crate) struct Network {
    prefix: String,
    topology: Topology,
    pub(crate) nodes: Vec<Netns>,
    pub(crate) outside: Netns,
    guests: BTreeMap<String, Guest>,
    next_veth: usize,
}

/// A pod's namespace and its veth.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) netns: Netns,
    pub(crate) node: usize,
    /// The host end.
    pub(crate) interface: String,
    /// Of the pod's end.
    pub(crate) mac: String,
    addresses: Vec<IpAddr>,
}

impl Network {
    /// Builds everything; `prefix` begins the name of each namespace.
    pub(crate) fn build(prefix: &str, topology: Topology, model: &Model) -> Result<Self, ToolError> {
        let nodes: Vec<String> = (0..model.nodes.len())
            .map(|node| format!("{prefix}n{node}"))
            .collect();
        let (fabric, outside) = (format!("{prefix}fabric"), format!("{prefix}outside"));
        let mut names = nodes.clone();
        names.extend([fabric.clone(), outside.clone()]);
        netns::add(&names)?;
        let fabric = Netns::open(&fabric)?;
        let mut network = Self {
            prefix: prefix.to_owned(),
            topology,
            nodes: nodes
                .iter()
                .map(|name| Netns::open(name))
                .collect::<Result<_, _>>()?,
            outside: Netns::open(&outside)?,
            guests: BTreeMap::new(),
            next_veth: 1,
        };
        network.build_uplink(&fabric)?;
        for (index, node) in network.nodes.iter().enumerate() {
            network.build_node(index, node)?;
        }
        let pods: Vec<&Pod> = model.pods.values().filter(|pod| !pod.host_network).collect();
        network.add_pods(&pods)?;
        Ok(network)
    }

    fn build_uplink(&self, fabric: &Netns) -> Result<(), ToolError> {
        fabric.sysctls(NO_DAD)?;
        fabric.sysctls(FABRIC)?;
        self.outside.sysctls(NO_DAD)?;
        // An interface takes the default at birth, and the nodes' uplinks are born here.
        for node in &self.nodes {
            node.sysctls(NO_DAD)?;
        }
        let mut batch = String::from("link set lo up\n");
        add_line(
            &mut batch,
            format_args!(
                "link add out0 type veth peer name eth0 netns {}",
                self.outside.name()
            ),
        );
        batch.push_str(
            "addr add 203.0.113.1/24 dev out0\naddr add 2001:db8::1/64 dev out0 nodad\nlink set out0 up\n",
        );
        for (index, node) in self.nodes.iter().enumerate() {
            // A bridge would say "no carrier" for its first second.
            add_line(
                &mut batch,
                format_args!("link add up{index} type veth peer name up0 netns {}", node.name()),
            );
            for gateway in UPLINK_GATEWAYS {
                add_line(
                    &mut batch,
                    format_args!("addr add {gateway} dev up{index}{}", nodad_text(gateway)),
                );
            }
            add_line(&mut batch, format_args!("link set up{index} up"));
            let addresses = NodeAddresses::of(index);
            for ((range, length), own) in addresses.ranges.iter().zip(addresses.own) {
                add_line(
                    &mut batch,
                    format_args!("route add {own}/{} dev up{index}", length_of(own)),
                );
                add_line(
                    &mut batch,
                    format_args!("route add {range}/{length} via {own} dev up{index}"),
                );
            }
        }
        // Whoever announces Service addresses to the world does it from the first node.
        let [own4, own6] = NodeAddresses::of(0).own;
        add_line(
            &mut batch,
            format_args!("route add 10.96.0.0/16 via {own4} dev up0"),
        );
        add_line(
            &mut batch,
            format_args!("route add fd00:10:96::/112 via {own6} dev up0"),
        );
        fabric.ip(&batch)?;
        self.outside.ip(&format!(
            "link set lo up\naddr add {OUTSIDE4}/24 dev eth0\naddr add {OUTSIDE6}/64 dev eth0 nodad\n\
             link set eth0 up\nroute add default via 203.0.113.1\nroute add ::/0 via 2001:db8::1\n"
        ))
    }

    fn build_node(&self, index: usize, node: &Netns) -> Result<(), ToolError> {
        node.sysctls(NODE)?;
        let own = NodeAddresses::of(index);
        let mut batch = format!(
            "link set lo up\naddr add {}/32 dev up0\naddr add {}/128 dev up0 nodad\nlink set up0 up\n\
             route add 10.200.0.254 dev up0 scope link\nroute add default via 10.200.0.254\n\
             route add fd00:200::fe/128 dev up0\nroute add ::/0 via fd00:200::fe\n",
            own.own[0], own.own[1]
        );
        if self.topology == Topology::Bridge {
            batch.push_str("link add cni0 type bridge mcast_snooping 0\n");
            for (gateway, (_, length)) in own.gateways.iter().zip(own.ranges) {
                add_line(
                    &mut batch,
                    format_args!("addr add {gateway}/{length} dev cni0{}", nodad(*gateway)),
                );
            }
            batch.push_str("link set cni0 up\n");
            node.sysctls(BRIDGE)?;
        }
        node.ip(&batch)
    }

    /// Joins pods to their nodes; all batches of a kind in one go.
    pub(crate) fn add_pods(&mut self, pods: &[&Pod]) -> Result<(), ToolError> {
        let mut guests = Vec::new();
        for pod in pods {
            let number = self.next_veth;
            self.next_veth += 1;
            guests.push((*pod, self.namespace_name(&pod.key(), number), number));
        }
        let names: Vec<String> = guests.iter().map(|(_, name, _)| name.clone()).collect();
        netns::add(&names)?;
        let mut batches = vec![String::new(); self.nodes.len()];
        let mut added = Vec::new();
        for (pod, name, number) in guests {
            let guest = Guest {
                netns: Netns::open(&name)?,
                node: pod.node,
                interface: format!("veth{number}"),
                mac: format!("0a:58:0a:f4:{:02x}:{:02x}", number / 256, number % 256),
                addresses: pod.addresses.clone(),
            };
            guest.netns.sysctls(NO_DAD)?;
            self.join(&mut batches[pod.node], &guest);
            added.push((pod.key(), guest));
        }
        for (node, batch) in self
            .nodes
            .iter()
            .zip(&batches)
            .filter(|(_, batch)| !batch.is_empty())
        {
            node.ip(batch)?;
        }
        for (key, guest) in added {
            guest.netns.ip(&self.inner(&guest))?;
            if self.topology == Topology::Bridge {
                wait_for_carrier(&self.nodes[guest.node], "cni0")?;
            }
            self.guests.insert(key, guest);
        }
        Ok(())
    }

    /// Takes a pod off its node; its veth goes with its namespace.
    pub(crate) fn remove_pod(&mut self, key: &str) -> Result<(), ToolError> {
        let Some(guest) = self.guests.remove(key) else {
            return Ok(());
        };
        self.nodes[guest.node].ip(&format!("link del {}\n", guest.interface))?;
        netns::delete(guest.netns.name())
    }

    pub(crate) fn guest(&self, key: &str) -> Option<&Guest> {
        self.guests.get(key)
    }

    fn namespace_name(&self, key: &str, number: usize) -> String {
        let name = format!("{}{}", self.prefix, key.replace('/', "."));
        if name.len() <= MAX_NAME {
            name
        } else {
            format!("{}p{number}", self.prefix)
        }
    }

    /// The node's half.
    fn join(&self, batch: &mut String, guest: &Guest) {
        let Guest {
            netns,
            interface,
            mac,
            ..
        } = guest;
        add_line(
            batch,
            format_args!(
                "link add {interface} type veth peer name eth0 address {mac} netns {}",
                netns.name()
            ),
        );
        if self.topology == Topology::Bridge {
            add_line(batch, format_args!("link set {interface} master cni0 up"));
            add_line(
                batch,
                format_args!("link set {interface} type bridge_slave hairpin on"),
            );
        } else {
            for gateway in NodeAddresses::of(guest.node).gateways {
                let length = length_of(gateway);
                add_line(
                    batch,
                    format_args!("addr add {gateway}/{length} dev {interface}{}", nodad(gateway)),
                );
            }
            add_line(batch, format_args!("link set {interface} up"));
        }
        let device = if self.topology == Topology::Bridge {
            "cni0"
        } else {
            interface.as_str()
        };
        for address in &guest.addresses {
            if self.topology == Topology::Ptp || !in_range(guest.node, *address) {
                add_line(
                    batch,
                    format_args!("route replace {address}/{} dev {device}", length_of(*address)),
                );
            }
        }
    }

    /// The pod's half: everything goes by the gateway.
    fn inner(&self, guest: &Guest) -> String {
        let mut batch = String::from("link set lo up\n");
        for address in &guest.addresses {
            let length = if self.topology == Topology::Bridge && in_range(guest.node, *address) {
                if address.is_ipv4() { 24 } else { 64 }
            } else {
                length_of(*address)
            };
            add_line(
                &mut batch,
                format_args!("addr add {address}/{length} dev eth0{}", nodad(*address)),
            );
        }
        batch.push_str("link set eth0 up\n");
        for gateway in NodeAddresses::of(guest.node).gateways {
            if guest
                .addresses
                .iter()
                .all(|address| address.is_ipv4() != gateway.is_ipv4())
            {
                continue;
            }
            let any = if gateway.is_ipv4() { "default" } else { "::/0" };
            add_line(
                &mut batch,
                format_args!("route replace {gateway}/{} dev eth0", length_of(gateway)),
            );
            add_line(&mut batch, format_args!("route add {any} via {gateway} dev eth0"));
        }
        batch
    }
}

fn add_line(batch: &mut String, line: std::fmt::Arguments<'_>) {
    if writeln!(batch, "{line}").is_err() {
        unreachable!("writing to a string can't fail");
    }
}

fn length_of(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn nodad(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "" } else { " nodad" }
}

fn nodad_text(address: &str) -> &'static str {
    if address.contains(':') { " nodad" } else { "" }
}

/// Until then a bridge's IPv6 address doesn't answer.
fn wait_for_carrier(node: &Netns, bridge: &str) -> Result<(), ToolError> {
    let deadline = Instant::now() + CARRIER_WAIT;
    loop {
        // The kernel gives a device its link-local address when it sees a carrier.
        let ready = node
            .inside(|| std::fs::read_to_string("/proc/thread-self/net/if_inet6"))
            .is_ok_and(|list| {
                list.lines()
                    .any(|line| line.starts_with("fe80") && line.ends_with(bridge))
            });
        if ready {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(ToolError::Failed {
                tool: format!("link set {bridge} up in {}", node.name()),
                text: "the bridge has no carrier".to_owned(),
            });
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// In the node's own pod range, so that a bridge reaches it without a route.
fn in_range(node: usize, address: IpAddr) -> bool {
    NodeAddresses::of(node)
        .ranges
        .iter()
        .any(|(range, length)| ipnet::IpNet::new(*range, *length).is_ok_and(|net| net.contains(&address)))
}
