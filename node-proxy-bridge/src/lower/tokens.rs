//! What RequestAuthentications ask, as Envoy's filter for tokens.
//!
//! Invariant: every rule is a provider, and one without keys takes no token; a request without any token passes, as
//! nobody. How Istio builds the same: `pilot/pkg/security/authn/policy_applier.go` (`convertToEnvoyJwtConfig`), istio
//! at 86c9f01.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::core::v3::{DataSource, data_source};
use envoy_types::pb::envoy::config::route::v3::{RouteMatch, route_match};
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::jwt_provider::{
    JwksSourceSpecifier, NormalizePayload,
};
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::jwt_requirement::RequiresType;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::requirement_rule::RequirementType;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::{
    JwtAuthentication, JwtClaimToHeader, JwtHeader, JwtProvider, JwtRequirement, JwtRequirementAndList,
    JwtRequirementOrList, RequirementRule,
};
use serde_json::{Value, json};
use thyra_policy_compiler::tokens::{JwtRule, Keys, LISTS, Tokens};

use super::claim::PAYLOAD;

/// Key sets by where they were fetched from.
pub type KeySets = BTreeMap<Keys, Arc<str>>;

/// What the abscissa of `nobodys_key` is the SHA-256 of.
const NOBODY: &str = "thyra: a key that nobody has 1";

/// The filter; `fetched` has the key sets that are not inline. One that is missing there checks no token.
#[must_use]
pub fn tokens(tokens: &Tokens, fetched: &KeySets) -> JwtAuthentication {
    let named = |(index, rule): (usize, &JwtRule)| (format!("rule-{index}"), provider(rule, fetched));
    JwtAuthentication {
        providers: tokens.rules.iter().enumerate().map(named).collect(),
        rules: vec![RequirementRule {
            r#match: Some(RouteMatch {
                path_specifier: Some(route_match::PathSpecifier::Prefix("/".to_owned())),
                ..RouteMatch::default()
            }),
            requirement_type: Some(RequirementType::Requires(required(tokens.rules.len()))),
        }],
        // A browser sends none with it.
        bypass_cors_preflight: true,
        ..JwtAuthentication::default()
    }
}

/// One of the rules takes the token; or each rule takes what it finds in its own places, or finds nothing there.
fn required(rules: usize) -> JwtRequirement {
    let by = |index: usize| requirement(RequiresType::ProviderName(format!("rule-{index}")));
    let or_missing = |index: usize| {
        let missing = requirement(RequiresType::AllowMissing(Default::default()));
        any(vec![by(index), missing])
    };
    if rules == 1 {
        return or_missing(0);
    }
    let each = JwtRequirementAndList {
        requirements: (0..rules).map(or_missing).collect(),
    };
    let each = requirement(RequiresType::RequiresAll(each));
    any((0..rules).map(by).chain([each]).collect())
}

/// Two at least (`JwtRequirementOrList`).
fn any(requirements: Vec<JwtRequirement>) -> JwtRequirement {
    requirement(RequiresType::RequiresAny(JwtRequirementOrList { requirements }))
}

fn requirement(requires_type: RequiresType) -> JwtRequirement {
    JwtRequirement {
        requires_type: Some(requires_type),
    }
}

/// The rule as Envoy gets it. What one without keys was refused for must not reach Envoy, which may refuse all of the
/// filter over it.
fn readable(rule: &JwtRule) -> Cow<'_, JwtRule> {
    if !matches!(rule.keys, Keys::None(_)) {
        return Cow::Borrowed(rule);
    }
    Cow::Owned(JwtRule {
        issuer: rule.issuer.clone(),
        keys: rule.keys.clone(),
        forward: rule.forward,
        lists: rule.lists.clone(),
        ..JwtRule::default()
    })
}

fn provider(rule: &JwtRule, fetched: &KeySets) -> JwtProvider {
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
    } = &*readable(rule);
    let text = match keys {
        Keys::Inline(text) => Some(text),
        Keys::Uri(_) | Keys::Discovery(_) => fetched.get(keys),
        Keys::None(_) => None,
    };
    let headers = from_headers.iter().map(|header| JwtHeader {
        name: header.name.clone(),
        value_prefix: header.prefix.clone(),
    });
    let claims = claim_headers.iter().map(|claim| JwtClaimToHeader {
        header_name: claim.header.clone(),
        claim_name: claim.claim.clone(),
        ..JwtClaimToHeader::default()
    });
    let mut spaced: Vec<String> = LISTS.map(str::to_owned).into();
    spaced.extend(
        lists
            .iter()
            .filter(|name| !LISTS.contains(&name.as_str()))
            .cloned(),
    );
    JwtProvider {
        issuer: issuer.clone(),
        audiences: audiences.clone(),
        forward: *forward,
        forward_payload_header: payload_header.clone(),
        from_headers: headers.collect(),
        from_params: from_params.clone(),
        from_cookies: from_cookies.clone(),
        claim_to_headers: claims.collect(),
        payload_in_metadata: PAYLOAD.to_owned(),
        normalize_payload_in_metadata: Some(NormalizePayload {
            space_delimited_claims: spaced,
        }),
        jwks_source_specifier: Some(JwksSourceSpecifier::LocalJwks(DataSource {
            specifier: Some(data_source::Specifier::InlineString(key_set(text))),
            ..DataSource::default()
        })),
        ..JwtProvider::default()
    }
}

/// The key set with nobody's key in it: Envoy refuses a filter with a set that has no key it can read, for all pods
/// and issuers that it is for, and passes over the others of a set.
fn key_set(text: Option<&Arc<str>>) -> String {
    let read: Option<Value> = text.and_then(|text| serde_json::from_str(text).ok());
    let own = read.and_then(|mut set| set.get_mut("keys").map(Value::take));
    let mut keys = match own {
        Some(Value::Array(keys)) => keys,
        _ => Vec::new(),
    };
    keys.push(nobodys_key());
    json!({ "keys": keys }).to_string()
}

/// A point of P-256 whose logarithm nobody knows: its abscissa is a hash, the first one with the text's number from 0
/// on that is a point's. No signature is valid under it.
fn nobodys_key() -> Value {
    json!({
        "kty": "EC",
        "crv": "P-256",
        "kid": NOBODY,
        "x": "7NX2e_bLQqTr79eJjAVpkqeR2zrBFmVH3QWuImvu4BA",
        "y": "T6SqDnyyNrKRYHVFZl7VRODCdFSdN45nqE5ijb3wYXA",
    })
}

#[cfg(test)]
mod tests {
    use sha2::{Digest as _, Sha256};

    use super::*;

    #[test]
    fn nobodys_key_is_a_hash() {
        // RFC 4648, 5, without padding.
        const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
        let key = nobodys_key();
        let digits = key["x"].as_str().expect("a text").bytes();
        let bits: String = digits
            .map(|digit| DIGITS.iter().position(|known| *known == digit).expect("a digit"))
            .map(|value| format!("{value:06b}"))
            .collect();
        let hash = Sha256::digest(NOBODY);
        let wanted: String = hash.iter().map(|byte| format!("{byte:08b}")).collect();
        assert_eq!(bits[..256], wanted);
    }

    #[test]
    fn a_set_keeps_its_keys_and_is_never_empty() {
        let keys = |text: Option<&str>| -> usize {
            let set: Value = serde_json::from_str(&key_set(text.map(Arc::from).as_ref())).expect("JSON");
            set["keys"].as_array().expect("a list").len()
        };
        assert_eq!(keys(None), 1);
        assert_eq!(keys(Some("no JSON")), 1);
        assert_eq!(keys(Some(r#"{"keys":[]}"#)), 1);
        assert_eq!(keys(Some(r#"{"keys":[{"kty":"RSA"},{"kty":"EC"}]}"#)), 3);
    }
}
