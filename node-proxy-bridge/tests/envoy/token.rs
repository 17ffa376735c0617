//! Signed tokens with any claims: HS256 (RFC 7518, 3.2) by a key that the test's Envoy knows.

use std::collections::BTreeSet;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};
use thyra_datapath_abi::tables::RuleRef;
use thyra_policy_compiler::residual::Answer;
use thyra_policy_compiler::tokens::{JwtRule, Keys, Tokens};

const KEY: &[u8; 32] = b"a key that only these tests know";
/// Block of SHA-256.
const BLOCK: usize = 64;

pub(crate) fn jwks() -> String {
    json!({"keys": [{"kty": "oct", "alg": "HS256", "k": URL_SAFE_NO_PAD.encode(KEY)}]}).to_string()
}

/// Tokens of any issuer, signed with the test's key; `lists` are claims with spaces between their values.
pub(crate) fn taken(lists: BTreeSet<String>) -> Arc<Tokens> {
    let rule = JwtRule {
        keys: Keys::Inline(jwks().into()),
        lists,
        ..JwtRule::default()
    };
    Arc::new(Tokens {
        policies: Vec::new(),
        rules: vec![rule.checked()],
    })
}

/// The same answer, behind a check of the test's tokens instead of its own.
pub(crate) fn checked(answer: &Answer<RuleRef>) -> Answer<RuleRef> {
    let own = answer.tokens().into_iter().flat_map(|tokens| &tokens.rules);
    let lists = own.flat_map(|rule| rule.lists.iter().cloned()).collect();
    Answer::Authenticated(taken(lists), Arc::new(unchecked(answer)))
}

/// The same answer for whom tokens don't matter.
pub(crate) fn unchecked(answer: &Answer<RuleRef>) -> Answer<RuleRef> {
    match answer {
        Answer::Authenticated(_, then) => unchecked(then),
        Answer::Stricter(a, b) => Answer::Stricter(Arc::new(unchecked(a)), Arc::new(unchecked(b))),
        Answer::Constant(..) | Answer::Rules(_) => answer.clone(),
    }
}

pub(crate) fn signed(claims: &Map<String, Value>) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let head = part(&json!({"alg": "HS256"}));
    let signed = format!("{head}.{}", part(&Value::Object(claims.clone())));
    let signature = URL_SAFE_NO_PAD.encode(hmac(signed.as_bytes()));
    format!("{signed}.{signature}")
}

/// RFC 2104.
fn hmac(text: &[u8]) -> [u8; 32] {
    let mut key = [0; BLOCK];
    key[..KEY.len()].copy_from_slice(KEY);
    let padded = |pad: u8| key.map(|byte| byte ^ pad);
    let inner = Sha256::new()
        .chain_update(padded(0x36))
        .chain_update(text)
        .finalize();
    Sha256::new()
        .chain_update(padded(0x5c))
        .chain_update(inner)
        .finalize()
        .into()
}
