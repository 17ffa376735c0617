//! PeerAuthentication and RequestAuthentication: an object to the model, refusing what istiod refuses.
//!
//! Invariant: a port or mode that can't be read is an error or, leniently read, an unknown that counts as
//! STRICT.

use std::collections::BTreeMap;
use std::time::Duration;

use super::authorization::target_refs;
use super::fields::{JWT_RULE, JWT_RULES};
use super::level::Level;
use super::node::{Node, Value};
use super::object::Metadata;
use super::reader::{Reader, Rigour};
use super::shape;
use crate::parse;
use crate::policy::{MtlsMode, PeerAuthentication, RequestAuthentication};
use crate::tokens::{self, ClaimHeader, FETCH_TIMEOUT, JwtRule, Keys, TokenHeader};
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
        has_target_refs: false,
        rules: Vec::new(),
        unknown: Vec::new(),
    };
    let Some(spec) = object.get("spec") else {
        return request;
    };
    let known = ["selector", "targetRef", "targetRefs", "jwtRules"];
    if let Some(level) = Level::open(spec, "spec".into(), &known, reader) {
        request.selector = level.selector(reader);
        request.has_target_refs = target_refs(&level, &metadata.namespace, reader);
        request.rules = jwt_rules(&level, reader);
    }
    request.unknown = reader.take_unknown();
    request
}

fn jwt_rules(level: &Level<'_>, reader: &mut Reader<'_>) -> Vec<JwtRule> {
    let Some(node) = level.node.get("jwtRules") else {
        return Vec::new();
    };
    if reader.rigour == Rigour::Strict {
        shape::check(JWT_RULES, node, "spec.jwtRules", reader);
        key_sources(node, reader);
    }
    let mut rules = Vec::new();
    for (index, node) in level.list("jwtRules", reader).iter().enumerate() {
        let path = format!("spec.jwtRules[{index}]");
        // The shape of all of them has been checked; what is left is a term of this rule alone.
        let mut own = Reader::new(reader.file, Rigour::Lenient);
        let rule = jwt_rule(node, path.clone(), &mut own);
        let names_keys = ["jwks", "jwksUri", "jwks_uri"]
            .iter()
            .any(|key| node.get(key).is_some());
        match &rule.keys {
            Keys::None(why) if reader.rigour == Rigour::Strict && names_keys => {
                reader.error(node.at, format!("`{path}`: {why}"));
            }
            _ => {}
        }
        rules.push(rule);
    }
    rules
}

fn key_sources(rules: &Node, reader: &mut Reader<'_>) {
    for (index, rule) in rules.items().iter().enumerate() {
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

/// A rule; without keys where something in it can't be read.
fn jwt_rule(node: &Node, path: String, reader: &mut Reader<'_>) -> JwtRule {
    let known: Vec<&str> = JWT_RULE.iter().map(|(name, _)| *name).collect();
    let mut rule = JwtRule::default();
    if let Some(level) = Level::open(node, path, &known, reader) {
        let text =
            |key: &str, reader: &mut Reader<'_>| level.text(key, reader).unwrap_or_default().to_owned();
        let texts = |key: &str, reader: &mut Reader<'_>| -> Vec<String> {
            let texts = level.texts(key, reader).into_iter();
            texts.map(|(_, text)| text).collect()
        };
        rule.issuer = text("issuer", reader);
        rule.audiences = texts("audiences", reader);
        rule.from_params = texts("fromParams", reader);
        rule.from_cookies = texts("fromCookies", reader);
        rule.lists = texts("spaceDelimitedClaims", reader).into_iter().collect();
        rule.payload_header = text("outputPayloadToHeader", reader);
        rule.forward = forwards(&level, reader);
        let headers = pairs(&level, "fromHeaders", ["name", "prefix"], reader).into_iter();
        rule.from_headers = headers
            .map(|[name, prefix]| TokenHeader { name, prefix })
            .collect();
        let claims = pairs(&level, "outputClaimToHeaders", ["header", "claim"], reader).into_iter();
        rule.claim_headers = claims
            .map(|[header, claim]| ClaimHeader { header, claim })
            .collect();
        let uri = [text("jwksUri", reader), text("jwks_uri", reader)].concat();
        rule.keys = Keys::of(&text("jwks", reader), &uri, &rule.issuer);
        rule.timeout = timeout(&level, reader);
    }
    match reader.take_unknown().first() {
        Some(term) => JwtRule {
            keys: Keys::None(format!("`{}` can't be carried out", term.0).into()),
            ..rule
        },
        None => rule.checked(),
    }
}

fn forwards(level: &Level<'_>, reader: &mut Reader<'_>) -> bool {
    let Some(node) = level.node.get("forwardOriginalToken") else {
        return false;
    };
    match node.value {
        Value::Bool(forwards, ..) => forwards,
        _ => {
            let path = level.field("forwardOriginalToken");
            reader.unreadable(
                node.at,
                &path,
                format!("`{path}` must be true or false, not {}", node.kind()),
            );
            false
        }
    }
}

/// Mappings of two texts; an absent one is empty.
fn pairs(level: &Level<'_>, key: &str, names: [&str; 2], reader: &mut Reader<'_>) -> Vec<[String; 2]> {
    let mut pairs = Vec::new();
    for (index, item) in level.list(key, reader).iter().enumerate() {
        let path = format!("{}[{index}]", level.field(key));
        if let Some(level) = Level::open(item, path, &names, reader) {
            pairs.push(names.map(|name| level.text(name, reader).unwrap_or_default().to_owned()));
        }
    }
    pairs
}

fn timeout(level: &Level<'_>, reader: &mut Reader<'_>) -> Duration {
    let Some(text) = level.text("timeout", reader) else {
        return FETCH_TIMEOUT;
    };
    tokens::duration(text).unwrap_or_else(|error| {
        let path = level.field("timeout");
        reader.unreadable(level.at("timeout"), &path, format!("`{path}`: {error}"));
        FETCH_TIMEOUT
    })
}
