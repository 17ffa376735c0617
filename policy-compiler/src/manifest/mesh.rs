//! The ConfigMap `istio` of `istio-system`: MeshConfig as YAML inside YAML.
//!
//! Invariant: what verdicts read of it (root namespace, trust domains, names of providers) is read whole or
//! an error in the file's own lines.

use super::error::Position;
use super::metadata::is_dns_label;
use super::node::{Node, Value};
use super::object::Metadata;
use super::providers;
use super::reader::Reader;
use super::shape::{self, TEXTS, unknown_field};
use super::yaml;
use crate::world::Mesh;

/// The fields of Istio 1.31's MeshConfig, as JSON names them.
const FIELDS: [&str; 50] = [
    "proxyListenPort",
    "proxyInboundListenPort",
    "proxyHttpPort",
    "connectTimeout",
    "hboneIdleTimeout",
    "protocolDetectionTimeout",
    "tcpKeepalive",
    "ingressClass",
    "ingressService",
    "ingressControllerMode",
    "ingressSelector",
    "enableTracing",
    "accessLogFile",
    "accessLogFormat",
    "accessLogEncoding",
    "enableEnvoyAccessLogService",
    "disableEnvoyListenerLog",
    "defaultConfig",
    "outboundTrafficPolicy",
    "inboundTrafficPolicy",
    "configSources",
    "enableAutoMtls",
    "trustDomain",
    "trustDomainAliases",
    "caCertificates",
    "defaultServiceExportTo",
    "defaultVirtualServiceExportTo",
    "defaultDestinationRuleExportTo",
    "rootNamespace",
    "localityLbSetting",
    "zoneAwareLbSetting",
    "dnsRefreshRate",
    "h2UpgradePolicy",
    "inboundClusterStatName",
    "outboundClusterStatName",
    "certificates",
    "serviceSettings",
    "serviceScopeConfigs",
    "enablePrometheusMerge",
    "verifyCertificateAtClient",
    "ca",
    "extensionProviders",
    "defaultProviders",
    "discoverySelectors",
    "pathNormalization",
    "defaultHttpRetryPolicy",
    "meshMTLS",
    "tlsDefaults",
    "defaultTrafficPolicy",
    "serviceEntryVisibility",
];

/// The mesh settings in a ConfigMap; `lines` are the file's, to give places inside the `mesh` text.
pub(super) fn read(object: &Node, metadata: &Metadata, lines: &[&str], reader: &mut Reader<'_>) -> Mesh {
    let mut mesh = Mesh {
        version: metadata.version.clone(),
        ..Mesh::default()
    };
    let Some(node) = object.at_path(&["data", "mesh"]) else {
        return mesh;
    };
    let Some(text) = node.text() else { return mesh };
    let place = |inner: Position| inside(node.at, inner, lines);
    let document = match yaml::documents(text) {
        Ok(documents) if documents.len() > 1 => {
            reader.error(
                node.at,
                "`data.mesh` has more than one document; MeshConfig is one",
            );
            return mesh;
        }
        Ok(mut documents) => documents.pop(),
        Err(fault) => {
            reader.error(place(fault.at), format!("`data.mesh`: {}", fault.text));
            return mesh;
        }
    };
    let Some(document) = document else { return mesh };
    let mut inner = Reader::new(reader.file, reader.rigour);
    settings(&document, &mut mesh, &mut inner);
    for error in inner.errors {
        reader.error(place(error.at.position), format!("`data.mesh`: {}", error.text));
    }
    mesh
}

/// The place in the file of a place in the text that begins at `outer`.
fn inside(outer: Position, inner: Position, lines: &[&str]) -> Position {
    if outer.line == 0 {
        return outer;
    }
    let line = outer.line.saturating_add(inner.line).saturating_sub(1);
    let text = usize::try_from(line.saturating_sub(1))
        .ok()
        .and_then(|index| lines.get(index));
    let indent = text.map_or(0, |t| t.chars().take_while(|c| *c == ' ').count());
    Position {
        line,
        column: inner.column.saturating_add(u32::try_from(indent).unwrap_or(0)),
    }
}

fn settings(document: &Node, mesh: &mut Mesh, reader: &mut Reader<'_>) {
    if !matches!(document.value, Value::Map(_)) {
        reader.error(
            document.at,
            format!("MeshConfig must be a mapping, not {}", document.kind()),
        );
        return;
    }
    for entry in document.entries() {
        let name = camel(&entry.key);
        if !FIELDS.contains(&name.as_str()) {
            reader.error(entry.at, unknown_field(&entry.key, "", FIELDS.into_iter()));
            continue;
        }
        let node = &entry.node;
        match name.as_str() {
            "trustDomain" => set_text(node, &name, &mut mesh.trust_domain, reader),
            "rootNamespace" => {
                set_text(node, &name, &mut mesh.root_namespace, reader);
                if !is_dns_label(&mesh.root_namespace) {
                    reader.error(node.at, format!("`{}` is not a namespace", mesh.root_namespace));
                }
            }
            "trustDomainAliases" => {
                shape::check(TEXTS, node, &name, reader);
                mesh.trust_domain_aliases = node
                    .items()
                    .iter()
                    .filter_map(Node::text)
                    .map(str::to_owned)
                    .collect();
            }
            "extensionProviders" => providers::read(node, &mut mesh.extension_providers, reader),
            "pathNormalization" => normalization(node, mesh, reader),
            _ => {}
        }
    }
}

fn set_text(node: &Node, name: &str, into: &mut String, reader: &mut Reader<'_>) {
    shape::check(shape::Shape::Text, node, name, reader);
    if let Some(text) = node.text().filter(|text| !text.is_empty()) {
        text.clone_into(into);
    }
}

fn normalization(node: &Node, mesh: &mut Mesh, reader: &mut Reader<'_>) {
    let Some(text) = node.text_of("normalization") else {
        return;
    };
    match crate::parse::path_normalization(text) {
        Ok(how) => mesh.path_normalization = how,
        Err(error) => reader.error(node.at, format!("`pathNormalization.normalization`: {error}")),
    }
}

/// `trust_domain` as `trustDomain`: protobuf's JSON takes both.
pub(super) fn camel(key: &str) -> String {
    let mut parts = key.split('_');
    let mut name = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let mut letters = part.chars();
        name.extend(letters.next().map(|c| c.to_ascii_uppercase()));
        name.push_str(letters.as_str());
    }
    name
}
