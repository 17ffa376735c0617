//! Policies as JSON, in the words of Istio's API, from the model that decides.
//!
//! Invariant: it shows what is enforced, not what was written: masked blocks, completed service accounts,
//! unknown terms.

use ipnet::IpNet;
use serde_json::{Map, Value, json};
use thyra_datapath_abi::tables::PolicyRef;
use thyra_policy_compiler::parse::L7_VERDICT;
use thyra_policy_compiler::policy::{
    AuthorizationPolicy, Condition, Field, L7Verdict, Labels, MtlsMode, Operation, PeerAuthentication,
    RequestAuthentication, Rule, ServiceAccountRef, Source, StringMatch, Unknown,
};
use thyra_policy_compiler::tokens::{JwtRule, Keys};

/// An AuthorizationPolicy.
#[must_use]
pub(super) fn authorization(policy: &AuthorizationPolicy) -> Value {
    let mut spec = Map::new();
    spec.insert("action".into(), super::policies::action(policy.action).into());
    selector(&mut spec, policy.selector.as_ref());
    if let Some(provider) = &policy.provider {
        spec.insert("provider".into(), json!({ "name": provider }));
    }
    if policy.has_target_refs {
        spec.insert("hasTargetRefs".into(), true.into());
    }
    spec.insert("rules".into(), policy.rules.iter().map(rule).collect());
    unknown(&mut spec, &policy.unknown);
    let mut object = object("AuthorizationPolicy", &policy.reference, &policy.version, spec);
    let l7_verdict = match &policy.l7_verdict {
        L7Verdict::Request => None,
        L7Verdict::Connection => Some("connection"),
        L7Verdict::Unread(word) => Some(&**word),
    };
    let annotations = [
        ("istio.io/dry-run", policy.dry_run.then_some("true")),
        (L7_VERDICT, l7_verdict),
    ];
    for (name, value) in annotations {
        if let Some(value) = value {
            object["metadata"]["annotations"][name] = value.into();
        }
    }
    object
}

/// A PeerAuthentication.
#[must_use]
pub(super) fn peer(policy: &PeerAuthentication) -> Value {
    let mut spec = Map::new();
    selector(&mut spec, policy.selector.as_ref());
    spec.insert("mtls".into(), json!({ "mode": mode(policy.mode) }));
    if !policy.ports.is_empty() {
        let ports: Map<String, Value> = policy
            .ports
            .iter()
            .map(|(port, m)| (port.to_string(), json!({ "mode": mode(*m) })))
            .collect();
        spec.insert("portLevelMtls".into(), ports.into());
    }
    unknown(&mut spec, &policy.unknown);
    object("PeerAuthentication", &policy.reference, &policy.version, spec)
}

/// A RequestAuthentication.
#[must_use]
pub(super) fn request(policy: &RequestAuthentication) -> Value {
    let mut spec = Map::new();
    selector(&mut spec, policy.selector.as_ref());
    if !policy.rules.is_empty() {
        spec.insert("jwtRules".into(), policy.rules.iter().map(jwt_rule).collect());
    }
    unknown(&mut spec, &policy.unknown);
    object("RequestAuthentication", &policy.reference, &policy.version, spec)
}

/// Its keys, or why it has none; what is left out is as Istio has it by default.
fn jwt_rule(rule: &JwtRule) -> Value {
    let JwtRule {
        issuer,
        audiences,
        keys,
        from_headers,
        from_params,
        from_cookies,
        payload_header,
        claim_headers,
        forward,
        timeout: _,
        lists,
    } = rule;
    let mut all = Map::new();
    all.insert("issuer".into(), issuer.as_str().into());
    match keys {
        Keys::Inline(text) => all.insert("jwks".into(), (**text).into()),
        Keys::Uri(uri) => all.insert("jwksUri".into(), (**uri).into()),
        Keys::Discovery(_) => None,
        Keys::None(why) => all.insert("unknown".into(), (**why).into()),
    };
    let headers = from_headers.iter();
    let headers = headers.map(|header| json!({ "name": header.name, "prefix": header.prefix }));
    let claims = claim_headers.iter();
    let claims = claims.map(|claim| json!({ "header": claim.header, "claim": claim.claim }));
    let lists: Vec<&String> = lists.iter().collect();
    for (name, value) in [
        ("audiences", json!(audiences)),
        ("fromHeaders", headers.collect()),
        ("fromParams", json!(from_params)),
        ("fromCookies", json!(from_cookies)),
        ("outputClaimToHeaders", claims.collect()),
        ("spaceDelimitedClaims", json!(lists)),
    ] {
        if value.as_array().is_some_and(|list| !list.is_empty()) {
            all.insert(name.into(), value);
        }
    }
    if !payload_header.is_empty() {
        all.insert("outputPayloadToHeader".into(), payload_header.as_str().into());
    }
    if *forward {
        all.insert("forwardOriginalToken".into(), true.into());
    }
    all.into()
}

/// As in `mtls.mode`.
#[must_use]
pub(super) fn mode(mode: MtlsMode) -> &'static str {
    match mode {
        MtlsMode::Unset => "UNSET",
        MtlsMode::Disable => "DISABLE",
        MtlsMode::Permissive => "PERMISSIVE",
        MtlsMode::Strict => "STRICT",
    }
}

fn object(kind: &str, reference: &PolicyRef, version: &str, spec: Map<String, Value>) -> Value {
    json!({
        "apiVersion": "security.istio.io/v1",
        "kind": kind,
        "metadata": {
            "namespace": &*reference.namespace,
            "name": &*reference.name,
            "resourceVersion": version,
        },
        "spec": spec,
    })
}

fn selector(spec: &mut Map<String, Value>, labels: Option<&Labels>) {
    if let Some(labels) = labels {
        spec.insert("selector".into(), json!({ "matchLabels": labels }));
    }
}

fn unknown(into: &mut Map<String, Value>, terms: &[Unknown]) {
    if !terms.is_empty() {
        into.insert(
            "unknown".into(),
            terms.iter().map(|u| Value::from(&*u.0)).collect(),
        );
    }
}

fn rule(rule: &Rule) -> Value {
    let mut all = Map::new();
    if !rule.from.is_empty() {
        all.insert(
            "from".into(),
            rule.from.iter().map(|s| json!({ "source": source(s) })).collect(),
        );
    }
    if !rule.to.is_empty() {
        all.insert(
            "to".into(),
            rule.to
                .iter()
                .map(|o| json!({ "operation": operation(o) }))
                .collect(),
        );
    }
    if !rule.when.is_empty() {
        all.insert("when".into(), rule.when.iter().map(condition).collect());
    }
    unknown(&mut all, &rule.unknown);
    all.into()
}

fn source(source: &Source) -> Value {
    let mut all = Map::new();
    put(&mut all, "principals", &source.principals, pattern);
    put(&mut all, "namespaces", &source.namespaces, pattern);
    put(&mut all, "serviceAccounts", &source.service_accounts, account);
    put(&mut all, "trustDomains", &source.trust_domains, pattern);
    put(&mut all, "ipBlocks", &source.ip_blocks, IpNet::to_string);
    put(
        &mut all,
        "remoteIpBlocks",
        &source.remote_ip_blocks,
        IpNet::to_string,
    );
    put(&mut all, "requestPrincipals", &source.request_principals, pattern);
    unknown(&mut all, &source.unknown);
    all.into()
}

fn operation(operation: &Operation) -> Value {
    let mut all = Map::new();
    put(&mut all, "ports", &operation.ports, u16::to_string);
    put(&mut all, "hosts", &operation.hosts, pattern);
    put(&mut all, "methods", &operation.methods, pattern);
    put(&mut all, "paths", &operation.paths, String::clone);
    unknown(&mut all, &operation.unknown);
    all.into()
}

fn put<T>(all: &mut Map<String, Value>, name: &str, field: &Field<T>, text: impl Fn(&T) -> String) {
    if !field.values.is_empty() {
        all.insert(name.to_owned(), field.values.iter().map(&text).collect());
    }
    if !field.not_values.is_empty() {
        let mut letters = name.chars();
        let first = letters.next().map(|c| c.to_ascii_uppercase());
        let negated: String = "not".chars().chain(first).chain(letters).collect();
        all.insert(negated, field.not_values.iter().map(&text).collect());
    }
}

fn condition(condition: &Condition) -> Value {
    match condition {
        Condition::SourceIp(f) => when("source.ip", f, IpNet::to_string),
        Condition::RemoteIp(f) => when("remote.ip", f, IpNet::to_string),
        Condition::SourceNamespace(f) => when("source.namespace", f, pattern),
        Condition::SourcePrincipal(f) => when("source.principal", f, pattern),
        Condition::SourceServiceAccount(f) => when("source.serviceAccount", f, account),
        Condition::SourceTrustDomain(f) => when("source.trustDomain", f, pattern),
        Condition::DestinationIp(f) => when("destination.ip", f, IpNet::to_string),
        Condition::DestinationPort(f) => when("destination.port", f, u16::to_string),
        Condition::Sni(f) => when("connection.sni", f, pattern),
        Condition::Request { key, values } => when(key, values, pattern),
    }
}

fn when<T>(key: &str, field: &Field<T>, text: impl Fn(&T) -> String) -> Value {
    let mut all = Map::new();
    all.insert("key".into(), key.into());
    put(&mut all, "values", field, text);
    all.into()
}

fn pattern(pattern: &StringMatch) -> String {
    match pattern {
        StringMatch::Exact(s) | StringMatch::Glob(s) => s.clone(),
        StringMatch::Prefix(s) => format!("{s}*"),
        StringMatch::Suffix(s) => format!("*{s}"),
        StringMatch::Present => "*".into(),
    }
}

fn account(account: &ServiceAccountRef) -> String {
    format!("{}/{}", account.namespace, account.name)
}
