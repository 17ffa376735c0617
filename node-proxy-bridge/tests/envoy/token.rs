//! Signed tokens with any claims: HS256 (RFC 7518, 3.2) by a key that the test's Envoy knows.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

const KEY: &[u8; 32] = b"a key that only these tests know";
/// Block of SHA-256.
const BLOCK: usize = 64;

pub(crate) fn jwks() -> String {
    json!({"keys": [{"kty": "oct", "alg": "HS256", "k": URL_SAFE_NO_PAD.encode(KEY)}]}).to_string()
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
