//! Pods, and the one pod of each controller.
//!
//! Invariant: a pod's addresses and ports are valid; what a controller's pod is called is its controller's
//! name.

use std::net::IpAddr;

use super::metadata::labels;
use super::node::Node;
use super::object::{Container, ContainerPort, Metadata, Pod, Transport};
use super::reader::Reader;

/// The pod in a Pod object.
pub(super) fn read(object: &Node, metadata: &Metadata, reader: &mut Reader<'_>) -> Option<Box<Pod>> {
    let Some(spec) = object.get("spec") else {
        reader.error(object.at, "`spec` is missing; a Pod needs `spec.containers`");
        return None;
    };
    let mut pod = pod(spec, "spec", metadata, reader);
    pod.labels.clone_from(&metadata.labels);
    pod.annotations.clone_from(&metadata.annotations);
    pod.addresses = addresses(object, reader);
    pod.manifest = object.to_json();
    name(&mut pod.manifest, metadata);
    Some(Box::new(pod))
}

/// The pod of a controller whose template is at `path`; `None` when it asks for no pod.
pub(super) fn from_template(
    object: &Node,
    path: &[&str],
    metadata: &Metadata,
    reader: &mut Reader<'_>,
) -> Option<Box<Pod>> {
    let at = path.join(".");
    let Some((template, spec)) = object.at_path(path).and_then(|t| Some((t, t.get("spec")?))) else {
        reader.error(
            object.at,
            format!("`{at}.spec` is missing; give the pod's containers there"),
        );
        return None;
    };
    let spec_of_controller = object.get("spec")?;
    let none = spec_of_controller.get("replicas").and_then(Node::whole) == Some(0)
        || spec_of_controller.get("suspend").and_then(Node::boolean) == Some(true);
    let mut pod = pod(spec, &format!("{at}.spec"), metadata, reader);
    let meta = template.get("metadata");
    pod.labels = labels(meta.and_then(|m| m.get("labels")));
    pod.annotations = labels(meta.and_then(|m| m.get("annotations")));
    let mut manifest = template.to_json();
    manifest["apiVersion"] = "v1".into();
    manifest["kind"] = "Pod".into();
    name(&mut manifest, metadata);
    pod.manifest = manifest;
    (!none).then(|| Box::new(pod))
}

fn name(manifest: &mut serde_json::Value, metadata: &Metadata) {
    if !manifest["metadata"].is_object() {
        manifest["metadata"] = serde_json::json!({});
    }
    manifest["metadata"]["name"] = metadata.name.clone().into();
    manifest["metadata"]["namespace"] = metadata.namespace.clone().into();
}

fn pod(spec: &Node, path: &str, metadata: &Metadata, reader: &mut Reader<'_>) -> Pod {
    let account = spec
        .text_of("serviceAccountName")
        .or_else(|| spec.text_of("serviceAccount"));
    let account = account.filter(|name| !name.is_empty()).unwrap_or("default");
    let mut containers = Vec::new();
    for (field, init) in [("containers", false), ("initContainers", true)] {
        let items = spec.get(field).map_or(&[][..], Node::items);
        for (index, node) in items.iter().enumerate() {
            containers.push(container(node, &format!("{path}.{field}[{index}]"), init, reader));
        }
    }
    if !containers.iter().any(|c| !c.init) {
        reader.error(
            spec.at,
            format!("`{path}.containers` is empty; a pod needs a container"),
        );
    }
    Pod {
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
        labels: Default::default(),
        annotations: Default::default(),
        service_account: account.to_owned(),
        node_name: spec
            .text_of("nodeName")
            .filter(|name| !name.is_empty())
            .map(str::to_owned),
        host_network: spec.get("hostNetwork").and_then(Node::boolean).unwrap_or(false),
        containers,
        addresses: Vec::new(),
        manifest: serde_json::Value::Null,
    }
}

fn container(node: &Node, path: &str, init: bool, reader: &mut Reader<'_>) -> Container {
    let mut ports = Vec::new();
    for (index, port) in node.get("ports").map_or(&[][..], Node::items).iter().enumerate() {
        let path = format!("{path}.ports[{index}]");
        let Some(number) = port_number(port, "containerPort", &path, reader) else {
            continue;
        };
        let Some(transport) = transport(port, &path, reader) else {
            continue;
        };
        let name = port.text_of("name").unwrap_or_default().to_owned();
        ports.push(ContainerPort {
            name,
            port: number,
            transport,
        });
    }
    let name = node.text_of("name").unwrap_or_default().to_owned();
    if name.is_empty() {
        reader.error(
            node.at,
            format!("`{path}.name` is missing; every container has a name"),
        );
    }
    Container { name, init, ports }
}

/// A required port from 1 to 65535.
pub(super) fn port_number(node: &Node, key: &str, path: &str, reader: &mut Reader<'_>) -> Option<u16> {
    let Some(field) = node.get(key) else {
        reader.error(
            node.at,
            format!("`{path}.{key}` is missing; give a port from 1 to 65535"),
        );
        return None;
    };
    let number = field.whole()?;
    let port = u16::try_from(number).ok().filter(|port| *port > 0);
    if port.is_none() {
        reader.error(
            field.at,
            format!("`{path}.{key}`: {number} is not a port; write a number from 1 to 65535"),
        );
    }
    port
}

/// `protocol`, TCP where nothing is said.
pub(super) fn transport(node: &Node, path: &str, reader: &mut Reader<'_>) -> Option<Transport> {
    let Some(field) = node.get("protocol") else {
        return Some(Transport::Tcp);
    };
    match field.text()? {
        "TCP" => Some(Transport::Tcp),
        "UDP" => Some(Transport::Udp),
        "SCTP" => Some(Transport::Sctp),
        other => {
            let text =
                format!("`{path}.protocol`: `{other}` is not a protocol; write `TCP`, `UDP` or `SCTP`");
            reader.error(field.at, text);
            None
        }
    }
}

/// `status.podIPs`, or `status.podIP`.
fn addresses(object: &Node, reader: &mut Reader<'_>) -> Vec<IpAddr> {
    let Some(status) = object.get("status") else {
        return Vec::new();
    };
    let many = status
        .get("podIPs")
        .map_or(&[][..], Node::items)
        .iter()
        .filter_map(|item| item.get("ip"));
    let mut nodes: Vec<&Node> = many.collect();
    nodes.extend(status.get("podIP").filter(|_| nodes.is_empty()));
    let mut addresses: Vec<IpAddr> = nodes.into_iter().filter_map(|n| address(n, reader)).collect();
    addresses.dedup();
    addresses
}

/// An IP address, canonical.
pub(super) fn address(node: &Node, reader: &mut Reader<'_>) -> Option<IpAddr> {
    let text = node.text()?;
    let address = text.parse::<IpAddr>().ok();
    if address.is_none() {
        reader.error(node.at, format!("`{text}` is not an IP address"));
    }
    address.map(|a| a.to_canonical())
}
