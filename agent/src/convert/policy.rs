//! `security.istio.io` AuthorizationPolicy and RequestAuthentication messages to the model.
//!
//! Invariant: what the model can't say becomes an unknown term of the rule that holds it, never nothing.

use std::sync::Arc;
use std::time::Duration;

use thyra_policy_compiler::parse::{self, ConditionError, L7_VERDICT};
use thyra_policy_compiler::policy::{
    AuthorizationPolicy, Condition, Field, Operation, PolicyAction, RequestAuthentication, Rule, Source,
    Unknown,
};
use thyra_policy_compiler::tokens::{ClaimHeader, FETCH_TIMEOUT, JwtRule, Keys, MAX_TIMEOUT, TokenHeader};
use thyra_proto::istio::mcp::v1alpha1::Metadata;
use thyra_proto::istio::security::v1beta1 as wire;

use super::{ConvertError, Meta, field, labels, meta, unknown_below};

/// Annotation of a dry-run policy.
const DRY_RUN: &str = "istio.io/dry-run";

/// An AuthorizationPolicy; `unknown` are the paths of fields that its protobuf type doesn't know.
///
/// # Errors
/// Names the field whose value can't be read.
pub fn authorization(
    metadata: Metadata,
    spec: wire::AuthorizationPolicy,
    unknown: &[String],
) -> Result<AuthorizationPolicy, ConvertError> {
    let Meta {
        reference,
        version,
        created: _,
        annotations,
    } = meta(metadata)?;
    let wire::AuthorizationPolicy {
        selector,
        rules,
        action: number,
        target_ref,
        target_refs,
        action_detail,
    } = spec;
    let said = |name| annotations.get(name).map(String::as_str);
    let rules = rules
        .into_iter()
        .enumerate()
        .map(|(i, r)| rule(&format!("spec.rules[{i}]"), r, &reference.namespace, unknown))
        .collect::<Result<Vec<_>, _>>()?;
    let in_a_rule = |path: &str| (0..rules.len()).any(|i| path.starts_with(&format!("spec.rules[{i}]")));
    let own = unknown
        .iter()
        .filter(|u| !in_a_rule(u))
        .map(|u| Unknown(Arc::from(u.as_str())))
        .collect();
    Ok(AuthorizationPolicy {
        action: action(number)?,
        provider: action_detail.map(|wire::authorization_policy::ActionDetail::Provider(p)| p.name),
        selector: labels(selector),
        has_target_refs: target_ref.is_some() || !target_refs.is_empty(),
        // As istiod: an annotation that can't be read leaves the policy enforced.
        dry_run: parse::dry_run(said(DRY_RUN)).unwrap_or(false),
        l7_verdict: parse::l7_verdict(said(L7_VERDICT)),
        unknown: own,
        reference,
        version,
        rules,
    })
}

/// A RequestAuthentication; of a rule with an unknown field no token is taken.
///
/// # Errors
/// Its name can't be read.
pub fn request(
    metadata: Metadata,
    spec: wire::RequestAuthentication,
    unknown: &[String],
) -> Result<RequestAuthentication, ConvertError> {
    let Meta {
        reference,
        version,
        created: _,
        annotations: _,
    } = meta(metadata)?;
    let wire::RequestAuthentication {
        selector,
        jwt_rules,
        target_ref,
        target_refs,
    } = spec;
    let paths: Vec<String> = (0..jwt_rules.len())
        .map(|i| format!("spec.jwtRules[{i}]"))
        .collect();
    let in_a_rule = |path: &str| paths.iter().any(|rule| path.starts_with(rule.as_str()));
    let own = unknown.iter().filter(|path| !in_a_rule(path));
    Ok(RequestAuthentication {
        reference,
        version,
        selector: labels(selector),
        has_target_refs: target_ref.is_some() || !target_refs.is_empty(),
        unknown: own.map(|path| Unknown(path.as_str().into())).collect(),
        rules: jwt_rules
            .into_iter()
            .zip(&paths)
            .map(|(rule, path)| jwt_rule(rule, &unknown_below(unknown, path)))
            .collect(),
    })
}

fn jwt_rule(message: wire::JwtRule, unknown: &[Unknown]) -> JwtRule {
    let wire::JwtRule {
        issuer,
        audiences,
        jwks_uri,
        from_headers,
        from_params,
        output_payload_to_header,
        forward_original_token,
        jwks,
        output_claim_to_headers,
        from_cookies,
        timeout,
        space_delimited_claims,
    } = message;
    let keys = match unknown.first() {
        Some(term) => Keys::None(format!("`{}` can't be carried out", term.0).into()),
        None => Keys::of(&jwks, &jwks_uri, &issuer),
    };
    let headers = from_headers.into_iter();
    let claims = output_claim_to_headers.into_iter();
    let timeout = timeout.and_then(|given| Duration::try_from(given).ok());
    JwtRule {
        issuer,
        audiences,
        keys,
        from_headers: headers
            .map(|wire::JwtHeader { name, prefix }| TokenHeader { name, prefix })
            .collect(),
        from_params,
        from_cookies,
        payload_header: output_payload_to_header,
        claim_headers: claims
            .map(|wire::ClaimToHeader { header, claim }| ClaimHeader { header, claim })
            .collect(),
        forward: forward_original_token,
        timeout: timeout.map_or(FETCH_TIMEOUT, |given| given.min(MAX_TIMEOUT)),
        lists: space_delimited_claims.into_iter().collect(),
    }
    .checked()
}

fn action(number: i32) -> Result<PolicyAction, ConvertError> {
    use wire::authorization_policy::Action;
    Ok(match Action::try_from(number) {
        Ok(Action::Allow) => PolicyAction::Allow,
        Ok(Action::Deny) => PolicyAction::Deny,
        Ok(Action::Audit) => PolicyAction::Audit,
        Ok(Action::Custom) => PolicyAction::Custom,
        Err(_) => {
            return Err(ConvertError::Number {
                field: "spec.action".into(),
                value: i64::from(number),
            });
        }
    })
}

fn rule(at: &str, message: wire::Rule, namespace: &str, unknown: &[String]) -> Result<Rule, ConvertError> {
    let wire::Rule { from, to, when } = message;
    let inside =
        |list: &str, n: usize| -> Vec<String> { (0..n).map(|i| format!("{at}.{list}[{i}]")).collect() };
    let (sources, operations) = (inside("from", from.len()), inside("to", to.len()));
    let mut own = unknown_below(unknown, at);
    own.retain(|u| {
        !sources
            .iter()
            .chain(&operations)
            .any(|p| u.0.starts_with(p.as_str()))
    });
    let from = from
        .into_iter()
        .zip(&sources)
        .map(|(wire::rule::From { source: s }, at)| source(at, s.unwrap_or_default(), namespace, unknown))
        .collect::<Result<_, _>>()?;
    let to = to
        .into_iter()
        .zip(&operations)
        .map(|(wire::rule::To { operation: o }, at)| operation(at, o.unwrap_or_default(), unknown))
        .collect::<Result<_, _>>()?;
    let mut conditions = Vec::new();
    for (i, c) in when.into_iter().enumerate() {
        match condition(&format!("{at}.when[{i}]"), c, namespace)? {
            Ok(known) => conditions.push(known),
            Err(term) => own.push(term),
        }
    }
    Ok(Rule {
        from,
        to,
        when: conditions,
        unknown: own,
    })
}

// long: every field of the message is named once, so that a new one breaks the build
fn source(
    at: &str,
    message: wire::Source,
    namespace: &str,
    unknown: &[String],
) -> Result<Source, ConvertError> {
    let wire::Source {
        principals,
        request_principals,
        namespaces,
        ip_blocks,
        not_principals,
        not_request_principals,
        not_namespaces,
        not_ip_blocks,
        remote_ip_blocks,
        not_remote_ip_blocks,
        service_accounts,
        not_service_accounts,
        trust_domains,
        not_trust_domains,
    } = message;
    let source = format!("{at}.source");
    let account = |v: &str| parse::service_account(v, namespace);
    Ok(Source {
        principals: field(
            &source,
            "principals",
            &principals,
            &not_principals,
            parse::principal,
        )?,
        namespaces: field(
            &source,
            "namespaces",
            &namespaces,
            &not_namespaces,
            parse::namespace,
        )?,
        service_accounts: field(
            &source,
            "serviceAccounts",
            &service_accounts,
            &not_service_accounts,
            account,
        )?,
        trust_domains: field(
            &source,
            "trustDomains",
            &trust_domains,
            &not_trust_domains,
            parse::trust_domain,
        )?,
        ip_blocks: field(&source, "ipBlocks", &ip_blocks, &not_ip_blocks, parse::ip_block)?,
        remote_ip_blocks: field(
            &source,
            "remoteIpBlocks",
            &remote_ip_blocks,
            &not_remote_ip_blocks,
            parse::ip_block,
        )?,
        request_principals: field(
            &source,
            "requestPrincipals",
            &request_principals,
            &not_request_principals,
            parse::string_match,
        )?,
        unknown: unknown_below(unknown, at),
    })
}

fn operation(at: &str, message: wire::Operation, unknown: &[String]) -> Result<Operation, ConvertError> {
    let wire::Operation {
        hosts,
        ports,
        methods,
        paths,
        not_hosts,
        not_ports,
        not_methods,
        not_paths,
    } = message;
    let operation = format!("{at}.operation");
    Ok(Operation {
        ports: field(&operation, "ports", &ports, &not_ports, parse::port)?,
        hosts: field(&operation, "hosts", &hosts, &not_hosts, parse::string_match)?,
        methods: field(&operation, "methods", &methods, &not_methods, parse::string_match)?,
        paths: field(&operation, "paths", &paths, &not_paths, parse::path)?,
        unknown: unknown_below(unknown, at),
    })
}

/// A condition, or the unknown term that stands for it.
fn condition(
    at: &str,
    message: wire::Condition,
    namespace: &str,
) -> Result<Result<Condition, Unknown>, ConvertError> {
    let wire::Condition {
        key,
        values,
        not_values,
    } = message;
    match parse::condition(&key, &values, &not_values, namespace) {
        Ok(condition) => Ok(Ok(condition)),
        Err(
            ConditionError::Inexpressible(_)
            | ConditionError::UnknownKey { .. }
            | ConditionError::NoValues(_),
        ) => Ok(Err(Unknown(Arc::from(format!("{at} key `{key}`"))))),
        Err(error @ ConditionError::Value { .. }) => Err(ConvertError::Condition {
            field: at.into(),
            error,
        }),
    }
}

/// Whether any rule of a policy has an HTTP field; shown in status.
#[must_use]
pub fn reads_http(policy: &AuthorizationPolicy) -> bool {
    let operation = |o: &Operation| !(o.hosts.is_empty() && o.methods.is_empty() && o.paths.is_empty());
    let source = |s: &Source| !Field::is_empty(&s.request_principals);
    let condition = |c: &Condition| matches!(c, Condition::Request { .. });
    policy
        .rules
        .iter()
        .any(|r| r.to.iter().any(operation) || r.from.iter().any(source) || r.when.iter().any(condition))
}
