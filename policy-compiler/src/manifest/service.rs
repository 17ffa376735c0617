//! Services and WorkloadEntries.
//!
//! Invariant: ports and addresses are valid; what is not declared has Kubernetes' default.

use std::net::IpAddr;

use super::metadata::labels;
use super::node::Node;
use super::object::{Metadata, Service, ServiceKind, ServicePort, Target, WorkloadEntry};
use super::pod::{address, port_number, transport};
use super::reader::Reader;
use crate::parse;

/// The Service in `object`.
pub(super) fn read(object: &Node, metadata: &Metadata, reader: &mut Reader<'_>) -> Option<Box<Service>> {
    let Some(spec) = object.get("spec") else {
        reader.error(object.at, "`spec` is missing; a Service needs `spec.ports`");
        return None;
    };
    let says = |key: &str, value: &str| spec.text_of(key) == Some(value);
    let headless = says("clusterIP", "None");
    Some(Box::new(Service {
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
        kind: kind(spec, headless, reader),
        cluster_addresses: cluster_addresses(spec, reader),
        families: families(spec, reader),
        ports: ports(spec, reader),
        selector: spec.get("selector").map(|node| labels(Some(node))),
        external_addresses: external_addresses(spec, reader),
        external_local: says("externalTrafficPolicy", "Local"),
        internal_local: says("internalTrafficPolicy", "Local"),
        client_ip_affinity: says("sessionAffinity", "ClientIP"),
    }))
}

fn kind(spec: &Node, headless: bool, reader: &mut Reader<'_>) -> ServiceKind {
    match spec.text_of("type") {
        None | Some("ClusterIP") if headless => ServiceKind::Headless,
        None | Some("ClusterIP") => ServiceKind::ClusterIp,
        Some("NodePort") => ServiceKind::NodePort,
        Some("LoadBalancer") => ServiceKind::LoadBalancer,
        Some("ExternalName") => ServiceKind::ExternalName,
        Some(other) => {
            let at = spec.get("type").map_or(spec.at, |n| n.at);
            let text = format!(
                "`spec.type`: `{other}` is not a kind of Service; write `ClusterIP`, `NodePort`, \
                `LoadBalancer` or \
                 `ExternalName`"
            );
            reader.error(at, text);
            ServiceKind::ClusterIp
        }
    }
}

fn cluster_addresses(spec: &Node, reader: &mut Reader<'_>) -> Vec<IpAddr> {
    let one = spec.get("clusterIP").into_iter();
    let many = spec.get("clusterIPs").map_or(&[][..], Node::items);
    let mut addresses = Vec::new();
    for node in one
        .chain(many)
        .filter(|n| !matches!(n.text(), Some("None" | "") | None))
    {
        if let Some(address) = address(node, reader)
            && !addresses.contains(&address)
        {
            addresses.push(address);
        }
    }
    addresses
}

fn external_addresses(spec: &Node, reader: &mut Reader<'_>) -> Vec<IpAddr> {
    let many = spec.get("externalIPs").map_or(&[][..], Node::items);
    let one = spec.get("loadBalancerIP").into_iter();
    many.iter()
        .chain(one)
        .filter(|n| n.text() != Some(""))
        .filter_map(|n| address(n, reader))
        .collect()
}

/// May have IPv4, may have IPv6.
fn families(spec: &Node, reader: &mut Reader<'_>) -> (bool, bool) {
    let (mut v4, mut v6) = (false, false);
    for node in spec.get("ipFamilies").map_or(&[][..], Node::items) {
        match node.text() {
            Some("IPv4") => v4 = true,
            Some("IPv6") => v6 = true,
            _ => reader.error(
                node.at,
                format!("an IP family is `IPv4` or `IPv6`, not {}", node.kind()),
            ),
        }
    }
    match (spec.text_of("ipFamilyPolicy"), v4, v6) {
        (Some("SingleStack"), _, false) => (true, false),
        (_, false, false) | (Some("PreferDualStack" | "RequireDualStack"), _, _) => (true, true),
        _ => (v4, v6),
    }
}

fn ports(spec: &Node, reader: &mut Reader<'_>) -> Vec<ServicePort> {
    let mut ports = Vec::new();
    for (index, node) in spec.get("ports").map_or(&[][..], Node::items).iter().enumerate() {
        let path = format!("spec.ports[{index}]");
        let Some(port) = port_number(node, "port", &path, reader) else {
            continue;
        };
        let Some(transport) = transport(node, &path, reader) else {
            continue;
        };
        let Some(target) = target(node, port, &path, reader) else {
            continue;
        };
        let node_port = node.get("nodePort").filter(|n| n.whole() != Some(0));
        let node_port = node_port.and_then(|_| port_number(node, "nodePort", &path, reader));
        let name = node.text_of("name").unwrap_or_default();
        let app_protocol = node.text_of("appProtocol");
        ports.push(ServicePort {
            name: name.to_owned(),
            port,
            target,
            node_port,
            transport,
            protocol: parse::app_protocol(app_protocol, name, port),
            app_protocol: app_protocol.map(str::to_owned),
        });
    }
    ports
}

/// `targetPort`: absent or 0 is the Service's own port.
fn target(node: &Node, port: u16, path: &str, reader: &mut Reader<'_>) -> Option<Target> {
    match node.get("targetPort") {
        None => Some(Target::Port(port)),
        Some(field) if field.whole() == Some(0) => Some(Target::Port(port)),
        Some(field) => match field.text() {
            Some(name) => Some(Target::Name(name.to_owned())),
            None => port_number(node, "targetPort", path, reader).map(Target::Port),
        },
    }
}

/// The WorkloadEntry in `object`.
pub(super) fn read_workload_entry(
    object: &Node,
    metadata: &Metadata,
    reader: &mut Reader<'_>,
) -> Option<WorkloadEntry> {
    let Some(spec) = object.get("spec") else {
        reader.error(
            object.at,
            "`spec` is missing; a WorkloadEntry needs `spec.address`",
        );
        return None;
    };
    let account = spec
        .text_of("serviceAccount")
        .filter(|name| !name.is_empty())
        .unwrap_or("default");
    let text = spec.text_of("address").unwrap_or_default();
    let network = spec.text_of("network").unwrap_or_default();
    if text.is_empty() && network.is_empty() {
        reader.error(
            spec.at,
            "`spec.address` is missing; give an IP address or host name",
        );
    }
    let mut all = metadata.labels.clone();
    all.extend(labels(spec.get("labels")));
    let mut ports = std::collections::BTreeMap::new();
    if let Some(node) = spec.get("ports") {
        for entry in node.entries() {
            if let Some(port) = port_number(node, &entry.key, "spec.ports", reader) {
                ports.insert(entry.key.to_string(), port);
            }
        }
    }
    Some(WorkloadEntry {
        address: text.parse::<IpAddr>().ok().map(|a| a.to_canonical()),
        labels: all,
        service_account: account.to_owned(),
        network: network.to_owned(),
        ports,
    })
}
