//! Random L7 fields and the requests that meet them: both from the same small pools.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};
use thyra_policy_compiler::policy::{Condition, StringMatch};
use thyra_policy_compiler::traffic::{PathNormalization, Request, Traffic};

use super::entropy::Entropy;
use super::world::field;

const METHODS: [&str; 3] = ["GET", "POST", "PUT"];
const HOSTS: [&str; 4] = ["shop.example", "Shop.Example", "api.shop.example:8080", "x"];
const TARGETS: [&str; 16] = [
    "/",
    "/admin",
    "/admin/",
    "/a/b",
    "/a/b/c?x=/admin",
    "/a/../admin",
    "/A%2fb",
    "//admin",
    "/%61dmin",
    "/a//c",
    "http://h/admin",
    "*",
    "/a/..;x/admin",
    "/a%5c..\\admin",
    "/a|b?a",
    "http://u@Shop.Example/a/b",
];
const PATHS: [&str; 12] = [
    "/admin", "/a*", "*/b", "*", "/a/{*}", "/a/{**}", "/{*}/b", "/{**}/c", "/", "/a/b", "/{*}", "*admin",
];
const NAMES: [&str; 4] = ["one.example", "two.example", "", "One.Example"];
const KEYS: [&str; 13] = [
    "request.headers[x-a]",
    "request.headers[X-B]",
    "request.headers[:path]",
    "request.headers[:authority]",
    "request.headers[accept]",
    "request.headers[connection]",
    "request.headers[x-forwarded-proto]",
    "request.auth.principal",
    "request.auth.audiences",
    "request.auth.presenter",
    "request.auth.claims[groups]",
    "request.auth.claims[scope]",
    "request.auth.claims[n][m]",
];
const VALUES: [&str; 9] = ["a", "ab", "b", "i/s", "i/t", "x/i/s", "a,b", "http", "/a/b"];

fn matched(e: &mut Entropy<'_>, pool: &[&str]) -> StringMatch {
    let text = e.pick(pool);
    let half = text.len() / 2;
    match e.below(6) {
        0..=2 => StringMatch::Exact(text.to_owned()),
        3 if half > 0 => StringMatch::Prefix(text[..half].to_owned()),
        4 if half > 0 => StringMatch::Suffix(text[half..].to_owned()),
        _ => StringMatch::Present,
    }
}

pub(crate) fn method(e: &mut Entropy<'_>) -> StringMatch {
    matched(e, &METHODS)
}

pub(crate) fn host(e: &mut Entropy<'_>) -> StringMatch {
    matched(e, &HOSTS)
}

pub(crate) fn path(e: &mut Entropy<'_>) -> String {
    e.pick(&PATHS).to_owned()
}

pub(crate) fn value(e: &mut Entropy<'_>) -> StringMatch {
    matched(e, &VALUES)
}

pub(crate) fn sni(e: &mut Entropy<'_>) -> StringMatch {
    matched(e, &NAMES[..2])
}

pub(crate) fn condition(e: &mut Entropy<'_>) -> Condition {
    Condition::Request {
        key: e.pick(&KEYS).to_owned(),
        values: field(e, value),
    }
}

pub(crate) fn normalization(e: &mut Entropy<'_>) -> PathNormalization {
    e.pick(&[
        PathNormalization::Base,
        PathNormalization::Base,
        PathNormalization::None,
        PathNormalization::MergeSlashes,
        PathNormalization::DecodeAndMergeSlashes,
    ])
}

pub(crate) fn traffic(e: &mut Entropy<'_>) -> Traffic {
    Traffic {
        sni: e.chance(30).then(|| e.pick(&NAMES).to_owned()),
        http: e.chance(75).then(|| request(e)),
        answers: answers(e),
    }
}

/// Of authorizers; of one that is left out nothing is known.
fn answers(e: &mut Entropy<'_>) -> BTreeMap<String, bool> {
    let mut answers = BTreeMap::new();
    for name in ["ext", "web"] {
        if e.chance(35) {
            answers.insert(name.to_owned(), e.chance(50));
        }
    }
    answers
}

fn request(e: &mut Entropy<'_>) -> Request {
    let mut headers = e.some(3, |e| {
        (
            e.pick(&["x-a", "x-b", "accept"]).to_owned(),
            e.pick(&["", "a", "ab", "b"]).to_owned(),
        )
    });
    if e.chance(20) {
        let client = e.pick(&[
            "10.244.0.3",
            "203.0.113.7, 192.0.2.1",
            "no address",
            "2001:db8::7",
        ]);
        headers.push(("x-forwarded-for".into(), client.into()));
    }
    Request {
        method: e.pick(&METHODS).to_owned(),
        target: e.pick(&TARGETS).to_owned(),
        authority: e.pick(&HOSTS).to_owned(),
        headers,
        claims: e.chance(40).then(|| claims(e)),
    }
}

fn claims(e: &mut Entropy<'_>) -> Map<String, Value> {
    let mut claims = Map::new();
    claims.insert("iss".into(), e.pick(&["i", "i", "x/i"]).into());
    for (name, values) in [
        ("sub", vec![json!("s"), json!("t")]),
        ("aud", vec![json!("a"), json!(["b", "ab"])]),
        ("azp", vec![json!("a"), json!(7)]),
        ("groups", vec![json!(["a", "b"]), json!("ab")]),
        ("scope", vec![json!("a b"), json!("ab")]),
        ("n", vec![json!({"m": "a"}), json!({"m": ["b"]}), json!("a")]),
    ] {
        if e.chance(35) {
            claims.insert(name.into(), e.pick(&values));
        }
    }
    claims
}
