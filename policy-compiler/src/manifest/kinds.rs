//! From `apiVersion` and `kind` to the reader of that kind; what can't change a verdict is set aside.
//!
//! Invariant: an object is read, listed as ignored, or an error: never dropped. A kind of security.istio.io
//! that is not known is an error, since it might be a policy.

use serde_json::Value as Json;

use super::error::Location;
use super::fields;
use super::metadata::{self, Scope};
use super::node::{Node, Value};
use super::object::{self, Body, Ignored, Metadata, Object};
use super::places::Places;
use super::reader::{Reader, Rigour};
use super::shape::{Field, Shape, check, closest};
use super::{authentication, authorization, mesh, pod, service};
use crate::finding::Code;

/// A kind that Thyra reads.
struct Kind {
    name: &'static str,
    group: &'static str,
    versions: &'static [&'static str],
    scope: Scope,
    /// Fields beside `apiVersion`, `kind` and `metadata`; none where the kind's reader checks them itself.
    fields: Option<&'static [Field]>,
    read: Read,
}

#[derive(Clone, Copy)]
enum Read {
    Namespace,
    ServiceAccount,
    Node,
    Pod,
    /// Path of the pod template.
    Template(&'static [&'static str]),
    Service,
    WorkloadEntry,
    AuthorizationPolicy,
    PeerAuthentication,
    RequestAuthentication,
}

const TEMPLATE: &[&str] = &["spec", "template"];
const CRON_TEMPLATE: &[&str] = &["spec", "jobTemplate", "spec", "template"];
const SECURITY_GROUP: &str = "security.istio.io";
const SECURITY_VERSIONS: &[&str] = &["v1", "v1beta1"];

const fn kind(
    name: &'static str,
    group: &'static str,
    versions: &'static [&'static str],
    fields: &'static [Field],
    read: Read,
) -> Kind {
    Kind {
        name,
        group,
        versions,
        scope: Scope::Namespaced,
        fields: Some(fields),
        read,
    }
}

const fn security(name: &'static str, read: Read) -> Kind {
    let (group, versions) = (SECURITY_GROUP, SECURITY_VERSIONS);
    Kind {
        name,
        group,
        versions,
        scope: Scope::Namespaced,
        fields: None,
        read,
    }
}

const KINDS: [Kind; 14] = [
    Kind {
        scope: Scope::Cluster,
        ..kind("Namespace", "", &["v1"], fields::NAMESPACE, Read::Namespace)
    },
    Kind {
        scope: Scope::Cluster,
        ..kind("Node", "", &["v1"], fields::NODE, Read::Node)
    },
    kind(
        "ServiceAccount",
        "",
        &["v1"],
        fields::SERVICE_ACCOUNT,
        Read::ServiceAccount,
    ),
    kind("Pod", "", &["v1"], fields::POD, Read::Pod),
    kind("Service", "", &["v1"], fields::SERVICE, Read::Service),
    kind(
        "Deployment",
        "apps",
        &["v1"],
        fields::DEPLOYMENT,
        Read::Template(TEMPLATE),
    ),
    kind(
        "ReplicaSet",
        "apps",
        &["v1"],
        fields::REPLICA_SET,
        Read::Template(TEMPLATE),
    ),
    kind(
        "StatefulSet",
        "apps",
        &["v1"],
        fields::STATEFUL_SET,
        Read::Template(TEMPLATE),
    ),
    kind(
        "DaemonSet",
        "apps",
        &["v1"],
        fields::DAEMON_SET,
        Read::Template(TEMPLATE),
    ),
    kind("Job", "batch", &["v1"], fields::JOB, Read::Template(TEMPLATE)),
    kind(
        "CronJob",
        "batch",
        &["v1"],
        fields::CRON_JOB,
        Read::Template(CRON_TEMPLATE),
    ),
    security("AuthorizationPolicy", Read::AuthorizationPolicy),
    security("PeerAuthentication", Read::PeerAuthentication),
    security("RequestAuthentication", Read::RequestAuthentication),
];

const WORKLOAD_ENTRY: Kind = kind(
    "WorkloadEntry",
    "networking.istio.io",
    &["v1", "v1beta1", "v1alpha3"],
    fields::WORKLOAD_ENTRY,
    Read::WorkloadEntry,
);

/// Kubernetes' own kinds whose names are near to one that is read, so that they don't count as misspelt.
const NEIGHBOURS: [&str; 4] = ["PodTemplate", "Secret", "Event", "Lease"];

fn kinds() -> impl Iterator<Item = &'static Kind> {
    KINDS.iter().chain(std::iter::once(&WORKLOAD_ENTRY))
}

/// What an object is for Thyra.
pub(super) enum Sorted {
    Object(Box<Object>),
    Ignored(Ignored),
    /// A list: its items are to be sorted.
    Items(Vec<Node>),
    /// Reported.
    Bad,
}

/// Sorts `node`; `lines` are the file's.
pub(super) fn sort(node: &Node, lines: &[&str], reader: &mut Reader<'_>) -> Sorted {
    if !matches!(node.value, Value::Map(_)) {
        let text = format!(
            "an object must be a mapping with `apiVersion` and `kind`, not {}",
            node.kind()
        );
        reader.error(node.at, text);
        return Sorted::Bad;
    }
    let (Some(version), Some(name)) = (header(node, "apiVersion", reader), header(node, "kind", reader))
    else {
        return Sorted::Bad;
    };
    if name.ends_with("List")
        && node
            .get("items")
            .is_some_and(|n| matches!(n.value, Value::List(_)))
    {
        return Sorted::Items(node.get("items").map(|n| n.items().to_vec()).unwrap_or_default());
    }
    let (group, bare_version) = version.split_once('/').unwrap_or(("", version));
    if is_mesh_config(node, version, name) {
        return mesh_config(node, lines, reader);
    }
    match kinds().find(|kind| kind.name == name && kind.group == group) {
        Some(kind) if kind.versions.contains(&bare_version) => read(kind, node, version, reader),
        Some(kind) => {
            let at = node.get("apiVersion").map_or(node.at, |n| n.at);
            reader.mistake(
                at,
                Code::UnknownKind,
                format!(
                    "{name} has no version `{bare_version}`; write `apiVersion: {}`",
                    full(kind)
                ),
            );
            Sorted::Bad
        }
        None => other(node, version, group, name, reader),
    }
}

fn full(kind: &Kind) -> String {
    let version = kind.versions.first().copied().unwrap_or("v1");
    if kind.group.is_empty() {
        version.to_owned()
    } else {
        format!("{}/{version}", kind.group)
    }
}

fn header<'n>(node: &'n Node, key: &str, reader: &mut Reader<'_>) -> Option<&'n str> {
    match node.get(key).map(|n| (n, n.text())) {
        Some((_, Some(text))) if !text.is_empty() => Some(text),
        Some((field, _)) => {
            reader.error(
                field.at,
                format!("`{key}` must be a string, not {}", field.kind()),
            );
            None
        }
        None => {
            reader.error(
                node.at,
                format!("`{key}` is missing; every object has `apiVersion` and `kind`"),
            );
            None
        }
    }
}

/// A kind that isn't read: set aside, unless it looks like a slip of the pen or might be a policy.
fn other(node: &Node, version: &str, group: &str, name: &str, reader: &mut Reader<'_>) -> Sorted {
    let at = node.get("kind").map_or(node.at, |n| n.at);
    if let Some(kind) = kinds().find(|kind| kind.name == name && !known_elsewhere(group, name)) {
        let at = node.get("apiVersion").map_or(node.at, |n| n.at);
        reader.mistake(
            at,
            Code::UnknownKind,
            format!(
                "`{version}` has no kind `{name}`; write `apiVersion: {}`",
                full(kind)
            ),
        );
        return Sorted::Bad;
    }
    let of_group = kinds().filter(|kind| kind.group == group).map(|kind| kind.name);
    let near = closest(name, of_group).filter(|_| !NEIGHBOURS.contains(&name));
    if group == SECURITY_GROUP || near.is_some() {
        let mend = near.map_or_else(
            || "remove it".to_owned(),
            |near| format!("did you mean `{near}`?"),
        );
        reader.mistake(
            at,
            Code::UnknownKind,
            format!("unknown kind `{name}` in `{version}`; {mend}"),
        );
        return Sorted::Bad;
    }
    let metadata = node.get("metadata");
    let text = |key| metadata.and_then(|m| m.text_of(key)).unwrap_or_default();
    let name_of = match (text("namespace"), text("name")) {
        ("", name) => name.to_owned(),
        (namespace, name) => format!("{namespace}/{name}"),
    };
    Sorted::Ignored(Ignored {
        api_version: version.to_owned(),
        kind: name.to_owned(),
        name: name_of,
        at: Location::new(reader.file, node.at),
    })
}

/// Other groups have kinds of these names too (Knative's Service, say): any group that is not Kubernetes' or
/// Istio's.
fn known_elsewhere(group: &str, name: &str) -> bool {
    let ours =
        group.is_empty() || !group.contains('.') || group.ends_with(".k8s.io") || group.ends_with("istio.io");
    !ours || (group == "metrics.k8s.io" && matches!(name, "Pod" | "Node"))
}

fn is_mesh_config(node: &Node, version: &str, name: &str) -> bool {
    let metadata = |key| node.at_path(&["metadata", key]).and_then(Node::text);
    let place = (metadata("namespace"), metadata("name"));
    version == "v1" && name == "ConfigMap" && place == (Some("istio-system"), Some("istio"))
}

fn mesh_config(node: &Node, lines: &[&str], reader: &mut Reader<'_>) -> Sorted {
    let before = reader.errors.len();
    check_fields(fields::CONFIG_MAP, node, reader);
    let Some(metadata) = metadata::read(node, Scope::Namespaced, reader) else {
        return Sorted::Bad;
    };
    let body = Body::MeshConfig(mesh::read(node, &metadata, lines, reader));
    finish(node, ("v1", "ConfigMap"), metadata, body, before, reader)
}

fn check_fields(known: &'static [Field], node: &Node, reader: &mut Reader<'_>) {
    for entry in node.entries() {
        match &*entry.key {
            "apiVersion" | "kind" | "metadata" => {}
            key => match known.iter().find(|(name, _)| *name == key) {
                Some((name, shape)) => check(*shape, &entry.node, name, reader),
                None => {
                    let mut names = vec!["metadata"];
                    names.extend(super::shape::names(known));
                    let text = super::shape::unknown_field(key, "", names.into_iter());
                    reader.mistake(entry.at, Code::UnknownField, text);
                }
            },
        }
    }
}

fn read(kind: &Kind, node: &Node, version: &str, reader: &mut Reader<'_>) -> Sorted {
    const SECURITY_FIELDS: &[Field] = &[("spec", Shape::Any), ("status", Shape::Any)];
    let before = reader.errors.len();
    if reader.rigour == Rigour::Strict {
        check_fields(kind.fields.unwrap_or(SECURITY_FIELDS), node, reader);
    }
    let Some(metadata) = metadata::read(node, kind.scope, reader) else {
        return Sorted::Bad;
    };
    match body(kind, node, &metadata, reader) {
        Some(body) => finish(node, (version, kind.name), metadata, body, before, reader),
        None => Sorted::Bad,
    }
}

fn body(kind: &Kind, node: &Node, metadata: &Metadata, reader: &mut Reader<'_>) -> Option<Body> {
    Some(match kind.read {
        Read::Namespace => {
            let mut labels = metadata.labels.clone();
            labels.insert("kubernetes.io/metadata.name".into(), metadata.name.clone());
            Body::Namespace(object::Namespace { labels })
        }
        Read::ServiceAccount => Body::ServiceAccount,
        Read::Node => Body::Node(node_object(node, metadata, reader)),
        Read::Pod => Body::Pod(Some(pod::read(node, metadata, reader)?)),
        Read::Template(path) => Body::Pod(pod::from_template(node, path, metadata, reader)),
        Read::Service => Body::Service(service::read(node, metadata, reader)?),
        Read::WorkloadEntry => Body::WorkloadEntry(service::read_workload_entry(node, metadata, reader)?),
        Read::AuthorizationPolicy => Body::AuthorizationPolicy(authorization::read(node, metadata, reader)),
        Read::PeerAuthentication => {
            Body::PeerAuthentication(authentication::read_peer(node, metadata, reader))
        }
        Read::RequestAuthentication => {
            Body::RequestAuthentication(authentication::read_request(node, metadata, reader))
        }
    })
}

fn node_object(node: &Node, metadata: &Metadata, reader: &mut Reader<'_>) -> object::Node {
    let addresses = node
        .at_path(&["status", "addresses"])
        .map_or(&[][..], Node::items);
    let texts = addresses.iter().filter_map(|a| a.text_of("address"));
    let ranges = node
        .at_path(&["spec", "podCIDRs"])
        .map_or(&[][..], Node::items)
        .iter();
    let ranges = ranges.chain(node.at_path(&["spec", "podCIDR"]));
    let mut pod_ranges = Vec::new();
    for range in ranges {
        match range.text().map(crate::parse::ip_block) {
            Some(Ok(block)) if !pod_ranges.contains(&block) => pod_ranges.push(block),
            Some(Err(error)) => reader.error(range.at, error.to_string()),
            Some(Ok(_)) | None => {}
        }
    }
    object::Node {
        labels: metadata.labels.clone(),
        addresses: texts
            .filter_map(|t| t.parse().ok())
            .map(|a: std::net::IpAddr| a.to_canonical())
            .collect(),
        pod_ranges,
    }
}

/// The object, unless reading it made an error.
fn finish(
    node: &Node,
    (version, kind): (&str, &str),
    metadata: Metadata,
    body: Body,
    errors_before: usize,
    reader: &mut Reader<'_>,
) -> Sorted {
    if reader.errors.len() > errors_before {
        return Sorted::Bad;
    }
    let mut raw = node.to_json();
    if !metadata.namespace.is_empty()
        && let Some(Json::Object(fields)) = raw.get_mut("metadata")
    {
        fields.insert("namespace".into(), metadata.namespace.clone().into());
    }
    Sorted::Object(Box::new(Object {
        api_version: version.to_owned(),
        kind: kind.to_owned(),
        namespace: metadata.namespace,
        name: metadata.name,
        at: Location::new(reader.file, node.at),
        raw,
        places: Places::of(node, &body),
        body,
    }))
}
