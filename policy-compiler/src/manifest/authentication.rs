//! PeerAuthentication and RequestAuthentication: an object to the model, refusing what istiod refuses.
//!
//! Invariant: a port or mode that can't be read is an error or, leniently read, an unknown that counts as
//! STRICT.

use std::collections::BTreeMap;

use super::authorization::target_refs;
use super::fields::JWT_RULES;
use super::level::Level;
use super::node::{Node, Value};
use super::object::Metadata;
use super::reader::{Reader, Rigour};
use super::shape;
use crate::parse;
use crate::policy::{MtlsMode, PeerAuthentication, RequestAuthentication, Unknown};
use thyra_datapath_abi::tables::PolicyRef;

fn reference(metadata: &Metadata) -> PolicyRef {
    PolicyRef {
        namespace: metadata.namespace.as_str().into(),
        name: metadata.name.as_str().into(),
    }
}

/// The PeerAuthentication in `object`.
pub(super) fn read_peer(object: &Node, metadata: &Metadata, reader: &mut Reader<'_>) -> PeerAuthentication {
    let mut peer = PeerAuthentication {
        reference: reference(metadata),
        version: metadata.version.clone(),
        created: metadata.created,
        selector: None,
        mode: MtlsMode::Unset,
        ports: BTreeMap::new(),
        unknown: Vec::new(),
    };
    let spec = object.get("spec");
    let level = spec.and_then(|spec| {
        Level::open(
            spec,
            "spec".into(),
            &["selector", "mtls", "portLevelMtls"],
            reader,
        )
    });
    if let Some(level) = level {
        peer.selector = level.selector(reader);
        peer.mode = level
            .node
            .get("mtls")
            .map_or(MtlsMode::Unset, |node| mode(node, "spec.mtls".into(), reader));
        peer.ports = ports(&level, &peer, reader);
    }
    peer.unknown = reader.take_unknown();
    peer
}

fn mode(node: &Node, path: String, reader: &mut Reader<'_>) -> MtlsMode {
    let Some(level) = Level::open(node, path, &["mode"], reader) else {
        return MtlsMode::Strict;
    };
    let text = level.text("mode", reader).unwrap_or_default();
    parse::mtls_mode(text).unwrap_or_else(|error| {
        let path = level.field("mode");
        reader.unreadable(level.at("mode"), &path, format!("`{path}`: {error}"));
        MtlsMode::Strict
    })
}

fn ports(level: &Level<'_>, peer: &PeerAuthentication, reader: &mut Reader<'_>) -> BTreeMap<u16, MtlsMode> {
    let mut ports = BTreeMap::new();
    let Some(node) = level.node.get("portLevelMtls") else {
        return ports;
    };
    let path = level.field("portLevelMtls");
    if !matches!(node.value, Value::Map(_)) {
        reader.unreadable(
            node.at,
            &path,
            format!("`{path}` must be a mapping from ports, not {}", node.kind()),
        );
        return ports;
    }
    if node.entries().is_empty() {
        reader.unreadable(
            node.at,
            &path,
            format!("`{path}` is empty; leave it out or name a port"),
        );
    }
    if peer.selector.as_ref().is_none_or(BTreeMap::is_empty) {
        let text =
            format!("`{path}` needs a `selector` with labels; a mesh's or namespace's mode has no ports");
        reader.unreadable(level.at("portLevelMtls"), &path, text);
    }
    for entry in node.entries() {
        let place = format!("{path}.{}", entry.key);
        match parse::port(&entry.key) {
            Ok(port) if port > 0 => {
                ports.insert(port, mode(&entry.node, place, reader));
            }
            Ok(_) | Err(_) => {
                let text = format!("`{place}` is not a port; write a number from 1 to 65535");
                reader.unreadable(entry.at, &place, text);
            }
        }
    }
    ports
}

/// The RequestAuthentication in `object`.
pub(super) fn read_request(
    object: &Node,
    metadata: &Metadata,
    reader: &mut Reader<'_>,
) -> RequestAuthentication {
    let mut request = RequestAuthentication {
        reference: reference(metadata),
        version: metadata.version.clone(),
        selector: None,
    };
    let Some(spec) = object.get("spec") else {
        return request;
    };
    let known = ["selector", "targetRef", "targetRefs", "jwtRules"];
    if let Some(level) = Level::open(spec, "spec".into(), &known, reader) {
        request.selector = level.selector(reader);
        target_refs(&level, &metadata.namespace, reader);
        if reader.rigour == Rigour::Strict {
            jwt_rules(&level, reader);
        }
    }
    // It decides nothing before HTTP is read; what can't be read in it is not a term of a verdict.
    let _: Vec<Unknown> = reader.take_unknown();
    request
}

fn jwt_rules(level: &Level<'_>, reader: &mut Reader<'_>) {
    let Some(node) = level.node.get("jwtRules") else {
        return;
    };
    shape::check(JWT_RULES, node, "spec.jwtRules", reader);
    for (index, rule) in node.items().iter().enumerate() {
        let path = format!("spec.jwtRules[{index}]");
        let has = |key: &str| rule.get(key).is_some();
        let key_sources = [has("jwks"), has("jwksUri"), has("jwks_uri")];
        if key_sources.iter().filter(|set| **set).count() > 1 {
            reader.error(
                rule.at,
                format!("`{path}`: only one of `jwks` and `jwksUri` may be set"),
            );
        }
        if !has("issuer") && !has("jwksUri") && !has("jwks_uri") {
            reader.error(rule.at, format!("`{path}` needs `issuer` or `jwksUri`"));
        }
    }
}
