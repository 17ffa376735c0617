//! Does a rule match? Clause by clause, value by value, with words for the first clause that doesn't.

use std::fmt::Debug;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::request;
use super::source::Who;
use crate::policy::{
    Condition, Field, Operation, PolicyAction, Rule, ServiceAccountRef, Source, StringMatch,
};
use crate::traffic::{Request, Traffic};
use crate::world::{Mesh, Workload};

/// How the stream is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    Tcp,
    Http,
}

/// What is known of the connection.
pub(super) struct Facts<'a> {
    pub(super) who: Who<'a>,
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    pub(super) port: u16,
    pub(super) mesh: &'a Mesh,
    pub(super) reading: Reading,
    /// The first bytes, where they are known.
    pub(super) traffic: Option<&'a Traffic>,
}

impl Facts<'_> {
    fn request(&self) -> Option<&Request> {
        self.traffic.and_then(|traffic| traffic.http.as_ref())
    }
}

/// Whether something matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Truth {
    /// With the first clause that didn't.
    No(String),
    /// Only these fields, which need L7, can tell.
    Ask(Vec<Arc<str>>),
    Yes,
}

fn is(holds: bool, otherwise: impl FnOnce() -> String) -> Truth {
    if holds { Truth::Yes } else { Truth::No(otherwise()) }
}

/// All must match.
fn all(clauses: Vec<Truth>) -> Truth {
    let mut asked = Vec::new();
    for clause in clauses {
        match clause {
            Truth::No(why) => return Truth::No(why),
            Truth::Ask(fields) => asked.extend(fields),
            Truth::Yes => {}
        }
    }
    if asked.is_empty() {
        Truth::Yes
    } else {
        Truth::Ask(asked)
    }
}

/// One must match; none at all is no constraint.
fn one_of(choices: Vec<Truth>) -> Truth {
    if choices.is_empty() || choices.contains(&Truth::Yes) {
        return Truth::Yes;
    }
    let (mut asked, mut failed) = (Vec::new(), Vec::new());
    for choice in choices {
        match choice {
            Truth::Ask(fields) => asked.extend(fields),
            Truth::No(why) => failed.push(why),
            Truth::Yes => {}
        }
    }
    if asked.is_empty() {
        Truth::No(failed.join(" and "))
    } else {
        Truth::Ask(asked)
    }
}

/// An ALLOW rule with an HTTP field never matches a stream that isn't HTTP.
pub(super) fn never_in_tcp(rule: &Rule, action: PolicyAction, reading: Reading) -> Option<Truth> {
    let from = rule
        .from
        .iter()
        .any(|source| !source.request_principals.is_empty());
    let to = rule.to.iter().any(|op| {
        let Operation {
            ports: _,
            hosts,
            methods,
            paths,
            unknown: _,
        } = op;
        !hosts.is_empty() || !methods.is_empty() || !paths.is_empty()
    });
    let when = rule
        .when
        .iter()
        .any(|c| matches!(c, Condition::Request { values, .. } if !values.is_empty()));
    let never = action == PolicyAction::Allow && reading == Reading::Tcp && (from || to || when);
    never.then(|| Truth::No("an HTTP field where the stream isn't HTTP".to_owned()))
}

/// (One of `from`) and (one of `to`) and all of `when`; terms that can't be expressed count as `unknown`.
pub(super) fn matches(rule: &Rule, action: PolicyAction, facts: &Facts<'_>, unknown: bool) -> Truth {
    let from = rule
        .from
        .iter()
        .map(|source| source_matches(source, action, facts, unknown))
        .collect();
    let to = rule
        .to
        .iter()
        .map(|operation| operation_matches(operation, facts, unknown))
        .collect();
    let when = rule
        .when
        .iter()
        .map(|condition| condition_matches(condition, action, facts))
        .collect();
    all(vec![
        is(rule.unknown.is_empty() || unknown, || {
            "not expressible".to_owned()
        }),
        one_of(from),
        one_of(to),
        all(when),
    ])
}

fn source_matches(source: &Source, action: PolicyAction, facts: &Facts<'_>, unknown: bool) -> Truth {
    let Source {
        principals,
        namespaces,
        service_accounts,
        trust_domains,
        ip_blocks,
        remote_ip_blocks,
        request_principals,
        unknown: terms,
    } = source;
    all(vec![
        is(terms.is_empty() || unknown, || "not expressible".to_owned()),
        identity("from.principals", principals, action, facts, |v, w| {
            principal_is(v, w, facts.mesh)
        }),
        identity("from.namespaces", namespaces, action, facts, |v, w| {
            text_is(v, &w.namespace)
        }),
        identity(
            "from.serviceAccounts",
            service_accounts,
            action,
            facts,
            account_is,
        ),
        identity("from.trustDomains", trust_domains, action, facts, |v, w| {
            trust_domain_is(v, w, facts.mesh)
        }),
        address("from.ipBlocks", ip_blocks, facts.source),
        match facts.reading {
            Reading::Tcp => address("from.remoteIpBlocks", remote_ip_blocks, facts.source),
            Reading::Http => match facts.request() {
                Some(request) => request::remote("from.remoteIpBlocks", remote_ip_blocks, request, facts),
                None => asks(remote_ip_blocks, "remoteIpBlocks", "notRemoteIpBlocks"),
            },
        },
        only_http(facts, || match facts.request() {
            Some(request) => request::request_principals(request_principals, request),
            None => asks(request_principals, "requestPrincipals", "notRequestPrincipals"),
        }),
    ])
}

fn operation_matches(operation: &Operation, facts: &Facts<'_>, unknown: bool) -> Truth {
    let Operation {
        ports,
        hosts,
        methods,
        paths,
        unknown: terms,
    } = operation;
    all(vec![
        is(terms.is_empty() || unknown, || "not expressible".to_owned()),
        field("to.ports", ports, &facts.port, |value| *value == facts.port),
        only_http(facts, || match facts.request() {
            Some(request) => request::hosts(hosts, request),
            None => always_there(hosts, "hosts", "notHosts", |v| *v == StringMatch::Present),
        }),
        only_http(facts, || match facts.request() {
            Some(request) => request::methods(methods, request),
            None => always_there(methods, "methods", "notMethods", |v| *v == StringMatch::Present),
        }),
        only_http(facts, || match facts.request() {
            Some(request) => request::paths(paths, request, facts),
            None => always_there(paths, "paths", "notPaths", |v| v == "*"),
        }),
    ])
}

fn condition_matches(condition: &Condition, action: PolicyAction, facts: &Facts<'_>) -> Truth {
    match condition {
        Condition::SourceIp(values) => address("when source.ip", values, facts.source),
        Condition::RemoteIp(values) => match facts.reading {
            Reading::Tcp => address("when remote.ip", values, facts.source),
            Reading::Http => match facts.request() {
                Some(request) => request::remote("when remote.ip", values, request, facts),
                None => asks_by(values, "remote.ip"),
            },
        },
        Condition::SourceNamespace(values) => {
            identity("when source.namespace", values, action, facts, |v, w| {
                text_is(v, &w.namespace)
            })
        }
        Condition::SourcePrincipal(values) => {
            identity("when source.principal", values, action, facts, |v, w| {
                principal_is(v, w, facts.mesh)
            })
        }
        Condition::SourceServiceAccount(values) => {
            identity("when source.serviceAccount", values, action, facts, account_is)
        }
        Condition::SourceTrustDomain(values) => {
            identity("when source.trustDomain", values, action, facts, |v, w| {
                trust_domain_is(v, w, facts.mesh)
            })
        }
        Condition::DestinationIp(values) => address("when destination.ip", values, facts.destination),
        Condition::DestinationPort(values) => {
            field("when destination.port", values, &facts.port, |v| *v == facts.port)
        }
        Condition::Sni(values) => match facts.traffic {
            Some(traffic) => request::sni(values, traffic),
            None => asks_by(values, "connection.sni"),
        },
        Condition::Request { key, values } => only_http(facts, || match facts.request() {
            Some(request) => request::key(key, values, request, facts),
            None => asks_by(values, key),
        }),
    }
}

/// HTTP fields are ignored where the stream isn't HTTP (ALLOW was answered before).
fn only_http(facts: &Facts<'_>, truth: impl FnOnce() -> Truth) -> Truth {
    match facts.reading {
        Reading::Tcp => Truth::Yes,
        Reading::Http => truth(),
    }
}

/// A condition that only L7 can answer, under its key.
fn asks_by<T>(values: &Field<T>, key: &str) -> Truth {
    if values.is_empty() {
        Truth::Yes
    } else {
        Truth::Ask(vec![key.into()])
    }
}

/// A field of what every request has: values that hold always ask nothing, not-values that do never hold.
fn always_there<T: Clone>(
    values: &Field<T>,
    positive: &str,
    negative: &str,
    is_any: impl Fn(&T) -> bool,
) -> Truth {
    if values.not_values.iter().any(&is_any) {
        return Truth::No(format!("to.{negative} excludes every request"));
    }
    let mut open = values.clone();
    if open.values.iter().any(is_any) {
        open.values.clear();
    }
    asks(&open, positive, negative)
}

fn asks<T>(values: &Field<T>, positive: &str, negative: &str) -> Truth {
    let mut asked: Vec<Arc<str>> = Vec::new();
    if !values.values.is_empty() {
        asked.push(positive.into());
    }
    if !values.not_values.is_empty() {
        asked.push(negative.into());
    }
    if asked.is_empty() {
        Truth::Yes
    } else {
        Truth::Ask(asked)
    }
}

/// One of the values, and none of the not-values.
pub(super) fn field<T: Debug>(
    name: &str,
    field: &Field<T>,
    found: &dyn Debug,
    holds: impl Fn(&T) -> bool,
) -> Truth {
    if !field.values.is_empty() && !field.values.iter().any(&holds) {
        return Truth::No(format!("{name} wants {:?}, is {found:?}", field.values));
    }
    match field.not_values.iter().find(|value| holds(value)) {
        Some(value) => Truth::No(format!("{name} excludes {value:?}, is {found:?}")),
        None => Truth::Yes,
    }
}

pub(super) fn address(name: &str, blocks: &Field<IpNet>, address: IpAddr) -> Truth {
    field(name, blocks, &address, |block| match (block, address) {
        (IpNet::V4(block), IpAddr::V4(address)) => block.contains(&address),
        (IpNet::V6(block), IpAddr::V6(address)) => block.contains(&address),
        _ => false,
    })
}

fn identity<T: Debug>(
    name: &str,
    values: &Field<T>,
    action: PolicyAction,
    facts: &Facts<'_>,
    holds: impl Fn(&T, &Workload) -> bool,
) -> Truth {
    if values.is_empty() {
        return Truth::Yes;
    }
    let opens = action == PolicyAction::Allow;
    match facts.who {
        Who::Is(workload) => field(name, values, &principal(workload), |value| holds(value, workload)),
        Who::Nobody => field(name, values, &"no identity", |_| false),
        Who::Kindest => is(opens, || format!("{name}: identity not known yet")),
        Who::Harshest => is(!opens, || format!("{name}: identity not known yet")),
    }
}

fn principal(workload: &Workload) -> String {
    in_trust_domain(workload, &workload.trust_domain)
}

fn in_trust_domain(workload: &Workload, trust_domain: &str) -> String {
    let Workload {
        namespace,
        service_account,
        ..
    } = workload;
    format!("{trust_domain}/ns/{namespace}/sa/{service_account}")
}

fn account_is(value: &ServiceAccountRef, workload: &Workload) -> bool {
    value.namespace == workload.namespace && value.name == workload.service_account
}

/// The trust domain and its aliases.
fn own_trust_domains(mesh: &Mesh) -> Vec<&str> {
    let mut domains = vec![mesh.trust_domain.as_str()];
    domains.extend(mesh.trust_domain_aliases.iter().map(String::as_str));
    domains
}

/// A trust domain as a policy names it: what it says of the mesh's own domains it says of all of them alike.
fn names_own_domain(asked: &StringMatch, mesh: &Mesh) -> bool {
    *asked == StringMatch::Exact("cluster.local".into())
        || own_trust_domains(mesh)
            .iter()
            .any(|domain| text_is(asked, domain))
}

fn trust_domain_is(value: &StringMatch, workload: &Workload, mesh: &Mesh) -> bool {
    let has = workload.trust_domain.as_str();
    if *value == StringMatch::Present || !names_own_domain(value, mesh) {
        return text_is(value, has);
    }
    let own = own_trust_domains(mesh);
    own.contains(&has) || (own.iter().any(|domain| text_is(value, domain)) && text_is(value, has))
}

fn principal_is(value: &StringMatch, workload: &Workload, mesh: &Mesh) -> bool {
    let has = principal(workload);
    let written = match value {
        StringMatch::Exact(text) => text.clone(),
        StringMatch::Prefix(text) => format!("{text}*"),
        StringMatch::Suffix(text) => format!("*{text}"),
        StringMatch::Present | StringMatch::Glob(_) => return text_is(value, &has),
    };
    let parts: Vec<&str> = written.split('/').collect();
    if parts.len() != 5 || parts[0] == "*" {
        return text_is(value, &has);
    }
    let asked = match parts[0].strip_prefix('*') {
        Some(end) => StringMatch::Suffix(end.to_owned()),
        None => StringMatch::Exact(parts[0].to_owned()),
    };
    if !names_own_domain(&asked, mesh) {
        return text_is(value, &has);
    }
    let own = own_trust_domains(mesh);
    // Written out for each own domain; as it stands it counts only if it is one of them itself.
    let kept = own.iter().any(|domain| text_is(&asked, domain)) && text_is(value, &has);
    let rest = parts[1..].join("/");
    let rewritten = own.iter().any(|domain| {
        let text = format!("{domain}/{rest}");
        match text.strip_suffix('*') {
            Some(start) => has.starts_with(start),
            None => has == text,
        }
    });
    kept || rewritten
}

fn text_is(value: &StringMatch, text: &str) -> bool {
    match value {
        StringMatch::Exact(wanted) => wanted == text,
        StringMatch::Prefix(start) => text.starts_with(start.as_str()),
        StringMatch::Suffix(end) => text.ends_with(end.as_str()),
        StringMatch::Present => true,
        StringMatch::Glob(pattern) => glob_is(
            &pattern.chars().collect::<Vec<_>>(),
            &text.chars().collect::<Vec<_>>(),
        ),
    }
}

/// `*` is any run of characters, tried in every length.
fn glob_is(pattern: &[char], text: &[char]) -> bool {
    match pattern.split_first() {
        None => text.is_empty(),
        Some(('*', rest)) => (0..=text.len()).any(|skip| glob_is(rest, &text[skip..])),
        Some((wanted, rest)) => text
            .split_first()
            .is_some_and(|(found, after)| found == wanted && glob_is(rest, after)),
    }
}
