//! Security objects from JSON to the protobuf that istiod sends.
//!
//! Invariant: every field of these kinds is carried over; the manifest reader let no unknown one through.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use prost_types::{Any, Timestamp};
use serde_json::Value;
use thyra_proto::istio::mcp::v1alpha1::{Metadata, Resource};
use thyra_proto::istio::security::v1beta1 as wire;
use thyra_proto::istio::r#type::v1beta1::{PolicyTargetReference, WorkloadSelector};

use super::Held;
use super::snapshot::any;
use crate::lab::model::labels;
use crate::lab::object::{Object, text};

/// The envelope that raw objects come in.
pub(super) fn resource(
    Held {
        object,
        version,
        created,
    }: &Held,
) -> anyhow::Result<Any> {
    let spec = object.json.get("spec").cloned().unwrap_or_default();
    let body = match object.kind.as_str() {
        "AuthorizationPolicy" => any(
            "istio.security.v1beta1.AuthorizationPolicy",
            &authorization(&spec)?,
        ),
        "PeerAuthentication" => any("istio.security.v1beta1.PeerAuthentication", &peer(&spec)?),
        "RequestAuthentication" => any("istio.security.v1beta1.RequestAuthentication", &request(&spec)?),
        other => bail!("kind `{other}` is no security object"),
    };
    let metadata = Metadata {
        name: object.key(),
        create_time: created_at(object, *created),
        version: version.to_string(),
        labels: labels(&object.json, "/metadata/labels"),
        annotations: labels(&object.json, "/metadata/annotations"),
    };
    Ok(any(
        "istio.mcp.v1alpha1.Resource",
        &Resource {
            metadata: Some(metadata),
            body: Some(body),
        },
    ))
}

/// As given, else by order of arrival: PeerAuthentications of a level are ranked by age.
fn created_at(object: &Object, step: i64) -> Option<Timestamp> {
    let given: Option<Timestamp> = text(&object.json, "/metadata/creationTimestamp").parse().ok();
    given.or(Some(Timestamp {
        seconds: step,
        nanos: 0,
    }))
}

fn authorization(spec: &Value) -> anyhow::Result<wire::AuthorizationPolicy> {
    use wire::authorization_policy::{Action, ActionDetail, ExtensionProvider};
    let action = match text(spec, "/action") {
        empty if empty.is_empty() => Action::Allow,
        name => Action::from_str_name(&name).with_context(|| format!("action `{name}` is unknown"))?,
    };
    let provider = spec.pointer("/provider/name").and_then(Value::as_str);
    Ok(wire::AuthorizationPolicy {
        selector: selector(spec),
        rules: list(spec, "/rules").map(rule).collect(),
        action: action.into(),
        target_ref: spec
            .get("targetRef")
            .filter(|value| value.is_object())
            .map(target),
        target_refs: list(spec, "/targetRefs").map(target).collect(),
        action_detail: provider.map(|name| {
            ActionDetail::Provider(ExtensionProvider {
                name: name.to_owned(),
            })
        }),
    })
}

fn rule(value: &Value) -> wire::Rule {
    use wire::rule::{From, To};
    wire::Rule {
        from: list(value, "/from")
            .map(|from| From {
                source: from.get("source").map(source),
            })
            .collect(),
        to: list(value, "/to")
            .map(|to| To {
                operation: to.get("operation").map(operation),
            })
            .collect(),
        when: list(value, "/when").map(condition).collect(),
    }
}

fn source(value: &Value) -> wire::Source {
    wire::Source {
        principals: strings(value, "principals"),
        request_principals: strings(value, "requestPrincipals"),
        namespaces: strings(value, "namespaces"),
        ip_blocks: strings(value, "ipBlocks"),
        not_principals: strings(value, "notPrincipals"),
        not_request_principals: strings(value, "notRequestPrincipals"),
        not_namespaces: strings(value, "notNamespaces"),
        not_ip_blocks: strings(value, "notIpBlocks"),
        remote_ip_blocks: strings(value, "remoteIpBlocks"),
        not_remote_ip_blocks: strings(value, "notRemoteIpBlocks"),
        service_accounts: strings(value, "serviceAccounts"),
        not_service_accounts: strings(value, "notServiceAccounts"),
        trust_domains: strings(value, "trustDomains"),
        not_trust_domains: strings(value, "notTrustDomains"),
    }
}

fn operation(value: &Value) -> wire::Operation {
    wire::Operation {
        hosts: strings(value, "hosts"),
        ports: strings(value, "ports"),
        methods: strings(value, "methods"),
        paths: strings(value, "paths"),
        not_hosts: strings(value, "notHosts"),
        not_ports: strings(value, "notPorts"),
        not_methods: strings(value, "notMethods"),
        not_paths: strings(value, "notPaths"),
    }
}

fn condition(value: &Value) -> wire::Condition {
    wire::Condition {
        key: text(value, "/key"),
        values: strings(value, "values"),
        not_values: strings(value, "notValues"),
    }
}

fn peer(spec: &Value) -> anyhow::Result<wire::PeerAuthentication> {
    use wire::peer_authentication::{MutualTls, mutual_tls::Mode};
    let mode = |value: &Value| -> anyhow::Result<MutualTls> {
        let mode = match text(value, "/mode") {
            empty if empty.is_empty() => Mode::Unset,
            name => Mode::from_str_name(&name).with_context(|| format!("mode `{name}` is unknown"))?,
        };
        Ok(MutualTls { mode: mode.into() })
    };
    let mut ports = BTreeMap::new();
    for (port, value) in spec
        .get("portLevelMtls")
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
    {
        let number = port
            .parse()
            .with_context(|| format!("port `{port}` is no number"))?;
        ports.insert(number, mode(value)?);
    }
    Ok(wire::PeerAuthentication {
        selector: selector(spec),
        mtls: spec
            .get("mtls")
            .filter(|value| value.is_object())
            .map(mode)
            .transpose()?,
        port_level_mtls: ports,
    })
}

fn request(spec: &Value) -> anyhow::Result<wire::RequestAuthentication> {
    Ok(wire::RequestAuthentication {
        selector: selector(spec),
        jwt_rules: list(spec, "/jwtRules").map(jwt_rule).collect::<Result<_, _>>()?,
        target_ref: spec
            .get("targetRef")
            .filter(|value| value.is_object())
            .map(target),
        target_refs: list(spec, "/targetRefs").map(target).collect(),
    })
}

fn jwt_rule(value: &Value) -> anyhow::Result<wire::JwtRule> {
    let header = |value: &Value| wire::JwtHeader {
        name: text(value, "/name"),
        prefix: text(value, "/prefix"),
    };
    let claim = |value: &Value| wire::ClaimToHeader {
        header: text(value, "/header"),
        claim: text(value, "/claim"),
    };
    let timeout = match text(value, "/timeout") {
        empty if empty.is_empty() => None,
        given => Some(
            given
                .parse()
                .with_context(|| format!("timeout `{given}` is no duration"))?,
        ),
    };
    Ok(wire::JwtRule {
        issuer: text(value, "/issuer"),
        audiences: strings(value, "audiences"),
        jwks_uri: text(value, "/jwksUri"),
        from_headers: list(value, "/fromHeaders").map(header).collect(),
        from_params: strings(value, "fromParams"),
        output_payload_to_header: text(value, "/outputPayloadToHeader"),
        forward_original_token: value
            .get("forwardOriginalToken")
            .and_then(Value::as_bool)
            .unwrap_or(false),
        jwks: text(value, "/jwks"),
        output_claim_to_headers: list(value, "/outputClaimToHeaders").map(claim).collect(),
        from_cookies: strings(value, "fromCookies"),
        timeout,
        space_delimited_claims: strings(value, "spaceDelimitedClaims"),
    })
}

fn selector(spec: &Value) -> Option<WorkloadSelector> {
    let selector = spec.get("selector").filter(|value| value.is_object())?;
    Some(WorkloadSelector {
        match_labels: labels(selector, "/matchLabels"),
    })
}

fn target(value: &Value) -> PolicyTargetReference {
    PolicyTargetReference {
        group: text(value, "/group"),
        kind: text(value, "/kind"),
        name: text(value, "/name"),
        namespace: text(value, "/namespace"),
    }
}

fn list<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

fn strings(value: &Value, key: &str) -> Vec<String> {
    let items = value.get(key).and_then(Value::as_array).into_iter().flatten();
    items.filter_map(Value::as_str).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{authorization, peer, wire};

    #[test]
    fn a_policy_keeps_its_rules_and_its_empty_selector() {
        let policy = authorization(&json!({
            "selector": {}, "action": "DENY",
            "rules": [{"from": [{"source": {"principals": ["a"], "notIpBlocks": ["10.0.0.0/8"]}}],
                "to": [{"operation": {"ports": ["80"]}}],
                "when": [{"key": "source.ip", "values": ["::1"]}]}, {}]
        }))
        .expect("a policy");
        assert_eq!(policy.action(), wire::authorization_policy::Action::Deny);
        assert!(
            policy
                .selector
                .is_some_and(|selector| selector.match_labels.is_empty())
        );
        assert_eq!(policy.rules.len(), 2);
        assert_eq!(policy.rules[0].when[0].key, "source.ip");
    }

    #[test]
    fn port_modes_are_kept_by_number() {
        let peer = peer(&json!({
            "mtls": {"mode": "STRICT"}, "portLevelMtls": {"9090": {"mode": "PERMISSIVE"}}
        }))
        .expect("a policy");
        assert!(peer.port_level_mtls.contains_key(&9090));
    }
}
