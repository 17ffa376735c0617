//! AuthorizationPolicy: a YAML or JSON object to the model, refusing what istiod refuses.
//!
//! Invariant: read strictly, a policy is either whole or an error; read leniently, what can't be read is an
//! unknown term of its level, so a constraint is never lost.

use super::error::Position;
use super::level::Level;
use super::node::{Node, Value};
use super::object::Metadata;
use super::reader::{Reader, Rigour};
use crate::finding::Code;
use crate::parse::{self, ConditionError, L7_VERDICT, MAX_SERVICE_ACCOUNTS};
use crate::policy::{
    AuthorizationPolicy, Condition, L7Verdict, Operation, PolicyAction, Rule, Source, StringMatch, Unknown,
};
use thyra_datapath_abi::tables::PolicyRef;

const SPEC: [&str; 6] = [
    "selector",
    "targetRef",
    "targetRefs",
    "action",
    "provider",
    "rules",
];
const SOURCE: [&str; 14] = [
    "principals",
    "notPrincipals",
    "requestPrincipals",
    "notRequestPrincipals",
    "namespaces",
    "notNamespaces",
    "serviceAccounts",
    "notServiceAccounts",
    "trustDomains",
    "notTrustDomains",
    "ipBlocks",
    "notIpBlocks",
    "remoteIpBlocks",
    "notRemoteIpBlocks",
];
const OPERATION: [&str; 8] = [
    "hosts",
    "notHosts",
    "ports",
    "notPorts",
    "methods",
    "notMethods",
    "paths",
    "notPaths",
];
const DRY_RUN: &str = "istio.io/dry-run";
/// Group and kind of what `targetRefs` may name, as Istio's reference lists them.
const TARGETS: [(&str, &str); 5] = [
    ("gateway.networking.k8s.io", "Gateway"),
    ("gateway.networking.k8s.io", "GatewayClass"),
    ("", "Service"),
    ("core", "Service"),
    ("networking.istio.io", "ServiceEntry"),
];

/// The policy in `object`.
pub(super) fn read(object: &Node, metadata: &Metadata, reader: &mut Reader<'_>) -> AuthorizationPolicy {
    let mut policy = AuthorizationPolicy {
        reference: PolicyRef {
            namespace: metadata.namespace.as_str().into(),
            name: metadata.name.as_str().into(),
        },
        version: metadata.version.clone(),
        action: PolicyAction::Allow,
        provider: None,
        selector: None,
        has_target_refs: false,
        dry_run: dry_run(object, metadata, reader),
        l7_verdict: l7_verdict(object, metadata, reader),
        rules: Vec::new(),
        unknown: Vec::new(),
    };
    let Some(spec) = object.get("spec") else {
        return policy;
    };
    let Some(level) = Level::open(spec, "spec".into(), &SPEC, reader) else {
        policy.unknown = reader.take_unknown();
        return policy;
    };
    policy.action = action(&level, reader);
    policy.selector = level.selector(reader);
    policy.has_target_refs = target_refs(&level, &metadata.namespace, reader);
    policy.provider = provider(&level, policy.action, reader);
    let rules = level.list("rules", reader);
    policy.unknown = reader.take_unknown();
    for (index, node) in rules.iter().enumerate() {
        let path = format!("spec.rules[{index}]");
        policy.rules.push(rule(node, path, &policy, reader));
    }
    warn_if_idle(&level, &policy, reader);
    policy
}

fn dry_run(object: &Node, metadata: &Metadata, reader: &mut Reader<'_>) -> bool {
    match parse::dry_run(metadata.annotations.get(DRY_RUN).map(String::as_str)) {
        Ok(value) => value,
        Err(error) => {
            let at = object
                .at_path(&["metadata", "annotations", DRY_RUN])
                .map_or(object.at, |n| n.at);
            // istiod enforces such a policy; strictly read it is the user's mistake.
            if reader.rigour == Rigour::Strict {
                reader.error(at, format!("annotation `{DRY_RUN}`: {error}"));
            }
            false
        }
    }
}

/// Another word is the user's mistake, but one that leaves the policy as strict as without it.
fn l7_verdict(object: &Node, metadata: &Metadata, reader: &mut Reader<'_>) -> L7Verdict {
    let verdict = parse::l7_verdict(metadata.annotations.get(L7_VERDICT).map(String::as_str));
    if let L7Verdict::Unread(word) = &verdict {
        let at = object
            .at_path(&["metadata", "annotations", L7_VERDICT])
            .map_or(object.at, |n| n.at);
        reader.warning(at, Code::UnknownL7Verdict, parse::unread(word));
    }
    verdict
}

fn action(level: &Level<'_>, reader: &mut Reader<'_>) -> PolicyAction {
    let text = level.text("action", reader).unwrap_or_default();
    parse::action(text).unwrap_or_else(|error| {
        reader.unreadable(
            level.at("action"),
            &level.field("action"),
            format!("`spec.action`: {error}"),
        );
        PolicyAction::Deny
    })
}

/// `true` if there are any; they exclude a selector.
pub(super) fn target_refs(level: &Level<'_>, namespace: &str, reader: &mut Reader<'_>) -> bool {
    let one = level.node.get("targetRef");
    let many = level.list("targetRefs", reader);
    let refs = one.map(|node| (node, level.field("targetRef"))).into_iter();
    let refs = refs.chain(
        many.iter()
            .enumerate()
            .map(|(i, n)| (n, format!("{}[{i}]", level.field("targetRefs")))),
    );
    for (node, path) in refs {
        target_ref(node, path, namespace, reader);
    }
    let kinds = [
        level.node.get("selector").is_some(),
        one.is_some(),
        !many.is_empty(),
    ];
    if kinds.iter().filter(|set| **set).count() > 1 {
        let text = "only one of `selector`, `targetRef` and `targetRefs` may be set; remove the others";
        reader.unreadable(level.node.at, &level.path, text);
    }
    one.is_some() || !many.is_empty()
}

fn target_ref(node: &Node, path: String, namespace: &str, reader: &mut Reader<'_>) {
    const REFERENCE: [&str; 4] = ["group", "kind", "name", "namespace"];
    let Some(reference) = Level::open(node, path.clone(), &REFERENCE, reader) else {
        return;
    };
    let [group, kind, name, other] = REFERENCE.map(|key| reference.text(key, reader).unwrap_or_default());
    for (key, value) in [("kind", kind), ("name", name)] {
        if value.is_empty() {
            reader.unreadable(node.at, &path, format!("`{path}` needs `{key}`"));
        }
    }
    if !kind.is_empty() && !TARGETS.contains(&(group, kind)) {
        let text = format!(
            "`{path}`: kind `{kind}` of group `{group}` is no target; name a Gateway or GatewayClass \
             (gateway.networking.k8s.io), a Service (group empty) or a ServiceEntry (networking.istio.io)"
        );
        reader.unreadable(node.at, &path, text);
    }
    if !other.is_empty() && other != namespace {
        let text =
            format!("`{path}`: a target is in the policy's own namespace, `{namespace}`, not in `{other}`");
        reader.unreadable(node.at, &path, text);
    }
}

fn provider(level: &Level<'_>, action: PolicyAction, reader: &mut Reader<'_>) -> Option<String> {
    let path = level.field("provider");
    let name = level.node.get("provider").and_then(|node| {
        let provider = Level::open(node, path.clone(), &["name"], reader)?;
        provider
            .text("name", reader)
            .filter(|name| !name.is_empty())
            .map(str::to_owned)
    });
    let rules = !level.node.get("rules").is_none_or(|n| n.items().is_empty());
    if action == PolicyAction::Custom {
        if name.is_none() && rules {
            let text = "action CUSTOM needs `provider.name`, one of MeshConfig's `extensionProviders`";
            reader.unreadable(level.at("action"), &path, text);
        }
    } else if level.has("provider") {
        let text = "`spec.provider` belongs to action CUSTOM only; remove it or set `action: CUSTOM`";
        reader.unreadable(level.at("provider"), &path, text);
    }
    name
}

fn warn_if_idle(level: &Level<'_>, policy: &AuthorizationPolicy, reader: &mut Reader<'_>) {
    if policy.rules.is_empty() && policy.action != PolicyAction::Allow {
        let text =
            "a policy without `rules` that is not ALLOW has no effect; `rules: [{}]` matches everything";
        reader.warning(level.node.at, Code::NoEffect, text);
    }
}

fn rule(node: &Node, path: String, policy: &AuthorizationPolicy, reader: &mut Reader<'_>) -> Rule {
    let mut rule = Rule::default();
    let Some(level) = Level::open(node, path, &["from", "to", "when"], reader) else {
        rule.unknown = reader.take_unknown();
        return rule;
    };
    let from = level.list_with_items("from", reader);
    let to = level.list_with_items("to", reader);
    let when = level.list("when", reader);
    rule.unknown = reader.take_unknown();
    for (index, node) in from.iter().enumerate() {
        let path = format!("{}[{index}]", level.field("from"));
        rule.from.push(source(node, path, policy, reader));
    }
    for (index, node) in to.iter().enumerate() {
        let path = format!("{}[{index}]", level.field("to"));
        rule.to.push(operation(node, path, reader));
    }
    for (index, node) in when.iter().enumerate() {
        let path = format!("{}[{index}]", level.field("when"));
        let namespace = &policy.reference.namespace;
        match condition(node, &path, namespace, reader) {
            Some(Ok(condition)) => rule.when.push(condition),
            Some(Err(unknown)) => rule.unknown.push(unknown),
            None => {}
        }
        rule.unknown.extend(reader.take_unknown());
    }
    rule
}

/// The only field of `node`, a mapping that must not be empty.
fn only<'n>(
    node: &'n Node,
    path: String,
    key: &'static str,
    known: &[&str],
    reader: &mut Reader<'_>,
) -> Option<Level<'n>> {
    let outer = Level::open(node, path, &[key], reader)?;
    let inner_path = outer.field(key);
    let inner = outer.node.get(key).filter(|n| n.value != Value::Map(Vec::new()));
    let Some(inner) = inner else {
        let text = format!("`{inner_path}` must not be empty; leave the entry out to have no constraint");
        reader.unreadable(node.at, &inner_path, text);
        return None;
    };
    Level::open(inner, inner_path, known, reader)
}

fn source(node: &Node, path: String, policy: &AuthorizationPolicy, reader: &mut Reader<'_>) -> Source {
    let mut source = Source::default();
    if let Some(level) = only(node, path, "source", &SOURCE, reader) {
        let namespace = &*policy.reference.namespace;
        let strict = reader.rigour == Rigour::Strict;
        let principal = |value: &str| principal(value, strict);
        let account = |value: &str| parse::service_account(value, namespace);
        source.principals = level.pair_as(
            Code::BadPrincipal,
            ("principals", "notPrincipals"),
            principal,
            reader,
        );
        source.namespaces = level.pair(("namespaces", "notNamespaces"), parse::namespace, reader);
        source.service_accounts = level.pair(("serviceAccounts", "notServiceAccounts"), account, reader);
        source.trust_domains = level.pair(("trustDomains", "notTrustDomains"), parse::trust_domain, reader);
        source.ip_blocks = level.pair(("ipBlocks", "notIpBlocks"), parse::ip_block, reader);
        source.remote_ip_blocks =
            level.pair(("remoteIpBlocks", "notRemoteIpBlocks"), parse::ip_block, reader);
        source.request_principals = level.pair(
            ("requestPrincipals", "notRequestPrincipals"),
            parse::string_match,
            reader,
        );
        check_source(&level, &source, reader);
    }
    source.unknown = reader.take_unknown();
    source
}

/// What istiod refuses of a source as a whole, and what can never match.
fn check_source(level: &Level<'_>, source: &Source, reader: &mut Reader<'_>) {
    require_some(level, reader);
    let accounts = &source.service_accounts;
    if accounts.values.len().max(accounts.not_values.len()) > MAX_SERVICE_ACCOUNTS {
        let text = format!(
            "`{}` has more than {MAX_SERVICE_ACCOUNTS} service accounts; split the rule",
            level.path
        );
        reader.unreadable(level.node.at, &level.path, text);
    }
    let by_name = !source.principals.is_empty() || !source.namespaces.is_empty();
    if !accounts.is_empty() && by_name {
        let text = format!(
            "`{}`: `serviceAccounts` can't stand beside `principals` or `namespaces`; use one of them",
            level.path
        );
        reader.unreadable(level.node.at, &level.path, text);
    }
    for value in source
        .principals
        .values
        .iter()
        .chain(&source.principals.not_values)
    {
        warn_if_odd(value, level.node.at, reader);
    }
}

fn warn_if_odd(principal: &StringMatch, at: Position, reader: &mut Reader<'_>) {
    if let StringMatch::Exact(value) = principal
        && !is_spiffe_shaped(value)
    {
        let text = format!(
            "principal `{value}` matches no identity; one looks like `cluster.local/ns/shop/sa/front`, and `*` \
             is a wildcard only at either end"
        );
        reader.warning(at, Code::OddPrincipal, text);
    }
}

/// What is amiss in the values of `source.principal`, of which istiod says nothing.
fn check_principals(list: &[(Position, String)], path: &str, reader: &mut Reader<'_>) {
    for (index, (at, value)) in list.iter().enumerate() {
        let path = format!("{path}[{index}]");
        match principal(value, reader.rigour == Rigour::Strict) {
            Ok(read) => warn_if_odd(&read, *at, reader),
            Err(error) => reader.unreadable_as(Code::BadPrincipal, *at, &path, format!("`{path}`: {error}")),
        }
    }
}

/// Every field that is there is an empty list: no constraint at all, which istiod refuses.
fn require_some(level: &Level<'_>, reader: &mut Reader<'_>) {
    let empty = |n: &Node| matches!(n.value, Value::Null) || n.value == Value::List(Vec::new());
    if level.node.entries().iter().all(|e| empty(&e.node)) {
        let text = format!(
            "`{}` must not be empty; leave the entry out to have no constraint",
            level.path
        );
        reader.unreadable(level.node.at, &level.path, text);
    }
}

/// `<trust domain>/ns/<namespace>/sa/<service account>`, without a wildcard.
fn is_spiffe_shaped(value: &str) -> bool {
    let Some((domain, namespace, account)) = parse::principal_parts(value) else {
        return false;
    };
    ![domain, namespace, account]
        .iter()
        .any(|part| part.is_empty() || part.contains('*'))
}

/// A principal; strictly read also what istiod takes though no identity can ever match it.
fn principal(value: &str, strict: bool) -> Result<StringMatch, String> {
    let read = parse::principal(value).map_err(|e| e.to_string())?;
    if !strict {
        return Ok(read);
    }
    if let Some(rest) = value.strip_prefix("spiffe://") {
        return Err(format!(
            "principal `{value}` never matches; write it without `spiffe://`: `{rest}`"
        ));
    }
    let looks_like = "write it like `cluster.local/ns/shop/sa/front`";
    if value.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(format!("principal `{value}` has white space in it; {looks_like}"));
    }
    if value.contains('/') && !value.contains('*') && !is_spiffe_shaped(value) {
        return Err(format!("`{value}` is not a principal; {looks_like}"));
    }
    Ok(read)
}

fn operation(node: &Node, path: String, reader: &mut Reader<'_>) -> Operation {
    let mut operation = Operation::default();
    if let Some(level) = only(node, path, "operation", &OPERATION, reader) {
        operation.ports = level.pair(("ports", "notPorts"), parse::port, reader);
        operation.hosts = level.pair(("hosts", "notHosts"), parse::string_match, reader);
        operation.methods = level.pair(("methods", "notMethods"), parse::string_match, reader);
        operation.paths = level.pair(("paths", "notPaths"), parse::path, reader);
        require_some(&level, reader);
    }
    operation.unknown = reader.take_unknown();
    operation
}

/// `Err` is a key that istiod knows and Thyra can't express.
fn condition(
    node: &Node,
    path: &str,
    namespace: &str,
    reader: &mut Reader<'_>,
) -> Option<Result<Condition, Unknown>> {
    let level = Level::open(node, path.to_owned(), &["key", "values", "notValues"], reader)?;
    let key = level.text("key", reader).unwrap_or_default();
    let values = level.texts("values", reader);
    let not_values = level.texts("notValues", reader);
    let plain = |list: &[(_, String)]| list.iter().map(|(_, text)| text.clone()).collect::<Vec<_>>();
    match parse::condition(key, &plain(&values), &plain(&not_values), namespace) {
        Ok(condition) => {
            if matches!(condition, Condition::SourcePrincipal(_)) {
                check_principals(&values, &level.field("values"), reader);
                check_principals(&not_values, &level.field("notValues"), reader);
            }
            Some(Ok(condition))
        }
        Err(ConditionError::Inexpressible(key)) => {
            let text =
                format!("condition key `{key}` can't be expressed: matched in DENY, not matched in ALLOW");
            reader.warning(level.at("key"), Code::Inexpressible, text);
            Some(Err(Unknown(format!("{path} key `{key}`").into())))
        }
        Err(error) => {
            let at = match &error {
                ConditionError::Value { negated, index, .. } => {
                    let list = if *negated { &not_values } else { &values };
                    list.get(*index).map_or(node.at, |(at, _)| *at)
                }
                ConditionError::UnknownKey { .. } => level.node.get("key").map_or(node.at, |n| n.at),
                ConditionError::NoValues(_) | ConditionError::Inexpressible(_) => node.at,
            };
            reader.unreadable(at, path, format!("`{path}`: {error}"));
            None
        }
    }
}
