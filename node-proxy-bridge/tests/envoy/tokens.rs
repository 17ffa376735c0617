//! Tokens as issuers sign them, with keys made here: what each rule takes, and that nothing else passes.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use serde_json::{Value, json};
use thyra_datapath_abi::tables::RuleRef;
use thyra_datapath_abi::{Action, Reason};
use thyra_node_proxy_bridge::listener::Reading;
use thyra_policy_compiler::policy::StringMatch;
use thyra_policy_compiler::residual::{Answer, Residual, Test};
use thyra_policy_compiler::tokens::{ClaimHeader, JwtRule, Keys, TokenHeader, Tokens};
use thyra_policy_compiler::traffic::PathNormalization;

use super::client;
use super::named::{allowing, values};
use super::node::{Node, binary, wanted};
use super::token::unchecked;

const ISSUER: &str = "https://issuer.example";
/// A key set and a token of it, signed with RS256 by a key that nobody has any more.
const RS256: &str = include_str!("../../../testdata/lab/tokens/manifests/tokens.yaml");
const PROBES: &str = include_str!("../../../testdata/lab/tokens/probes.yaml");

/// An issuer's key.
struct Signer {
    pair: EcdsaKeyPair,
    random: SystemRandom,
}

impl Signer {
    fn new() -> Self {
        let random = SystemRandom::new();
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).unwrap();
        let pair =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref(), &random).unwrap();
        Self { pair, random }
    }

    /// RFC 7518, 6.2.1: the point's coordinates, behind a byte that says that it isn't compressed.
    fn jwks(&self) -> Keys {
        let (x, y) = self.pair.public_key().as_ref()[1..].split_at(32);
        let [x, y] = [x, y].map(|part| URL_SAFE_NO_PAD.encode(part));
        let set = json!({"keys": [{"kty": "EC", "crv": "P-256", "alg": "ES256", "x": x, "y": y}]});
        Keys::Inline(set.to_string().into())
    }

    fn token(&self, claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let text = format!("{}.{}", part(&json!({"alg": "ES256"})), part(claims));
        let signature = self.pair.sign(&self.random, text.as_bytes()).unwrap();
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature.as_ref()))
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn good() -> Value {
    json!({
        "iss": ISSUER, "sub": "alice", "aud": ["shop", "bank"], "azp": "app", "exp": now() + 600,
        "groups": ["staff", "group1"], "nested": {"level": {"role": "admin", "rings": ["1", "2"]}},
        "scope": "read write", "roles": "one two",
    })
}

/// `good` with another value.
fn but(name: &str, value: Value) -> Value {
    let mut claims = good();
    claims[name] = value;
    claims
}

fn without(name: &str) -> Value {
    let mut claims = good();
    claims.as_object_mut().unwrap().remove(name);
    claims
}

fn rule(keys: Keys) -> JwtRule {
    JwtRule {
        issuer: ISSUER.to_owned(),
        keys,
        ..JwtRule::default()
    }
    .checked()
}

/// Allows what meets `when` behind the rules.
fn residual(rules: Vec<JwtRule>, when: Test) -> Arc<Residual<RuleRef>> {
    let inner = allowing("tokens", vec![when]);
    Arc::new(Residual {
        http: checked(rules, unchecked(&inner.http)),
        other: inner.other.clone(),
    })
}

fn checked(rules: Vec<JwtRule>, then: Answer<RuleRef>) -> Answer<RuleRef> {
    let tokens = Tokens::of(Vec::new(), rules).expect("rules");
    Answer::Authenticated(Arc::new(tokens), Arc::new(then))
}

fn any_token() -> Test {
    Test::RequestPrincipal(values(vec![StringMatch::Present]))
}

fn claim(key: &str, value: &str) -> Test {
    let exact = StringMatch::Exact(value.to_owned());
    Test::Key(key.into(), values(vec![exact]))
}

/// Statuses that requests with these lines get, each on a connection of its own.
async fn statuses(
    node: &mut Node,
    residual: &Arc<Residual<RuleRef>>,
    requests: &[(&str, String)],
) -> Vec<u16> {
    node.bridge.apply(&[wanted("tokens", Reading::Http, residual)]);
    let oracle = node.oracle(&(Reading::Http, residual.address())).await;
    let mut statuses = Vec::new();
    for (target, lines) in requests {
        let mut stream = client::connect(&oracle, "10.244.0.3".parse().unwrap()).await;
        let text = format!("GET {target} HTTP/1.1\r\nHost: shop.example\r\n{lines}\r\n");
        statuses.push(client::ask(&mut stream, text.as_bytes()).await.status);
    }
    statuses
}

fn bearer(token: &str) -> (&'static str, String) {
    ("/", format!("authorization: Bearer {token}\r\n"))
}

const NONE: (&str, String) = ("/", String::new());

async fn start() -> Option<Node> {
    let binary = binary().await?;
    Some(Node::start(&binary, PathNormalization::Base, true).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_passes_only_if_its_issuer_signed_it_and_it_holds_now() {
    let Some(mut node) = start().await else { return };
    let (signer, stranger) = (Signer::new(), Signer::new());
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let unsigned = format!("{}.{}.", part(&json!({"alg": "none"})), part(&good()));
    let of_shop = JwtRule {
        audiences: vec!["shop".to_owned(), "other".to_owned()],
        ..rule(signer.jwks())
    };
    let requests = [
        ("a valid one", 200, bearer(&signer.token(&good()))),
        ("none", 403, NONE),
        ("signed by somebody else", 401, bearer(&stranger.token(&good()))),
        ("not signed", 401, bearer(&unsigned)),
        ("no token at all", 401, bearer("nonsense")),
        (
            "of another issuer",
            401,
            bearer(&signer.token(&but("iss", json!("https://evil.example")))),
        ),
        (
            // 403 says that it is good elsewhere (`jwt_authn/filter.cc`).
            "for somebody else",
            403,
            bearer(&signer.token(&but("aud", json!("bank")))),
        ),
        ("for nobody", 403, bearer(&signer.token(&but("aud", json!([]))))),
        (
            "expired",
            401,
            bearer(&signer.token(&but("exp", json!(now() - 600)))),
        ),
        (
            "of the future",
            401,
            bearer(&signer.token(&but("nbf", json!(now() + 600)))),
        ),
        ("without a subject", 403, bearer(&signer.token(&without("sub")))),
        ("an invalid one beside a valid one", 401, {
            let (target, lines) = bearer(&signer.token(&good()));
            (target, format!("authorization: Bearer nonsense\r\n{lines}"))
        }),
    ];
    let asked: Vec<_> = requests.iter().map(|(_, _, request)| request.clone()).collect();
    let found = statuses(&mut node, &residual(vec![of_shop], any_token()), &asked).await;
    for ((what, status, _), found) in requests.iter().zip(found) {
        assert_eq!(found, *status, "{what}");
    }
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_are_met_as_policies_name_them() {
    let Some(mut node) = start().await else { return };
    let signer = Signer::new();
    let lists = JwtRule {
        lists: ["roles".to_owned()].into(),
        ..rule(signer.jwks())
    };
    for (key, value, status) in [
        ("request.auth.principal", "https://issuer.example/alice", 200),
        ("request.auth.principal", "https://issuer.example/bob", 403),
        ("request.auth.audiences", "bank", 200),
        ("request.auth.audiences", "mint", 403),
        ("request.auth.presenter", "app", 200),
        ("request.auth.presenter", "shop", 403),
        ("request.auth.claims[groups]", "group1", 200),
        ("request.auth.claims[groups]", "group2", 403),
        ("request.auth.claims[nested][level][role]", "admin", 200),
        ("request.auth.claims[nested][level][role]", "guest", 403),
        ("request.auth.claims[nested][level][rings]", "2", 200),
        ("request.auth.claims[nested][role]", "admin", 403),
        ("request.auth.claims[scope]", "write", 200),
        ("request.auth.claims[scope]", "read write", 403),
        ("request.auth.claims[roles]", "two", 200),
        ("request.auth.claims[roles]", "one two", 403),
    ] {
        let residual = residual(vec![lists.clone()], claim(key, value));
        let request = bearer(&signer.token(&good()));
        let found = statuses(&mut node, &residual, &[request, NONE]).await;
        assert_eq!(found, [status, 403], "{key} {value}");
    }
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_looked_for_where_the_rule_says_and_nowhere_else() {
    let Some(mut node) = start().await else { return };
    let signer = Signer::new();
    let (token, broken) = (signer.token(&good()), Signer::new().token(&good()));
    let placed = JwtRule {
        from_headers: vec![TokenHeader {
            name: "x-token".to_owned(),
            prefix: "Token ".to_owned(),
        }],
        from_params: vec!["t".to_owned()],
        from_cookies: vec!["c".to_owned()],
        payload_header: "x-payload".to_owned(),
        claim_headers: vec![ClaimHeader {
            header: "x-sub".to_owned(),
            claim: "sub".to_owned(),
        }],
        ..rule(signer.jwks())
    };
    let param = |token: &str| format!("/?t={token}");
    let (good_param, bad_param) = (param(&token), param(&broken));
    let requests = [
        (200, ("/", format!("x-token: Token {token}\r\n"))),
        (401, ("/", format!("x-token: Token {broken}\r\n"))),
        (200, (good_param.as_str(), String::new())),
        (401, (bad_param.as_str(), String::new())),
        (200, ("/", format!("cookie: c={token}\r\n"))),
        (401, ("/", format!("cookie: c={broken}\r\n"))),
        // Not a place of this rule: nobody's token.
        (403, bearer(&token)),
    ];
    let asked: Vec<_> = requests.iter().map(|(_, request)| request.clone()).collect();
    let found = statuses(&mut node, &residual(vec![placed], any_token()), &asked).await;
    let wanted: Vec<u16> = requests.iter().map(|(status, _)| *status).collect();
    assert_eq!(found, wanted);
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_several_rules_takes_a_token_and_each_refuses_a_strangers() {
    let Some(mut node) = start().await else { return };
    let (one, twin, other, stranger) = (Signer::new(), Signer::new(), Signer::new(), Signer::new());
    let of_other = |claims: Value| {
        let mut claims = claims;
        claims["iss"] = json!("other");
        claims
    };
    // Two rules of one issuer stand beside each other, as istiod leaves them.
    let rules = vec![
        rule(one.jwks()),
        rule(twin.jwks()),
        JwtRule {
            issuer: "other".to_owned(),
            ..rule(other.jwks())
        },
    ];
    let asked = [
        bearer(&one.token(&good())),
        bearer(&twin.token(&good())),
        bearer(&other.token(&of_other(good()))),
        bearer(&other.token(&good())),
        bearer(&one.token(&of_other(good()))),
        bearer(&stranger.token(&good())),
        NONE,
    ];
    let found = statuses(&mut node, &residual(rules, any_token()), &asked).await;
    assert_eq!(found, [200, 200, 200, 401, 401, 401, 403]);
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_keys_no_token_of_an_issuer_passes_and_others_do() {
    let Some(mut node) = start().await else { return };
    let signer = Signer::new();
    let unreadable = json!({"keys": [{"kty": "EC", "crv": "P-256", "x": "!", "y": "!"}]});
    let keyless = [
        Keys::Uri("https://keys.example/never-fetched".into()),
        Keys::Discovery("https://issuer.example".into()),
        Keys::None("broken".into()),
        Keys::Inline("{".into()),
        Keys::Inline(r#"{"keys":[]}"#.into()),
        Keys::Inline(unreadable.to_string().into()),
    ];
    let none_needed = Answer::Constant(Action::Allow, Reason::NoPolicy, None);
    for keys in keyless {
        let residual = Arc::new(Residual {
            http: checked(vec![rule(keys.clone())], none_needed.clone()),
            other: none_needed.clone(),
        });
        let asked = [bearer(&signer.token(&good())), NONE];
        let found = statuses(&mut node, &residual, &asked).await;
        assert_eq!(found, [401, 200], "{keys:?}");
        let beside = JwtRule {
            issuer: "other".to_owned(),
            ..rule(signer.jwks())
        };
        let residual = Arc::new(Residual {
            http: checked(vec![rule(keys.clone()), beside], none_needed.clone()),
            other: none_needed.clone(),
        });
        let of_other = signer.token(&but("iss", json!("other")));
        let asked = [bearer(&signer.token(&good())), bearer(&of_other), NONE];
        let found = statuses(&mut node, &residual, &asked).await;
        assert_eq!(found, [401, 200, 200], "{keys:?} beside another");
    }
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rs256_is_checked_with_the_key_of_the_lab() {
    let Some(mut node) = start().await else { return };
    let jwks = RS256
        .lines()
        .find_map(|line| line.trim().strip_prefix("jwks: '")?.strip_suffix('\''))
        .expect("the scenario's key set");
    let token = PROBES
        .split(['"', ' ', ','])
        .find(|word| word.starts_with("eyJ"))
        .expect("the scenario's first token is valid");
    let mut forged = token.to_owned();
    forged.replace_range(
        token.len() - 10..token.len() - 9,
        if token.as_bytes()[token.len() - 10] == b'A' {
            "B"
        } else {
            "A"
        },
    );
    let rule = JwtRule {
        issuer: "testing@issuer.example".to_owned(),
        ..rule(Keys::Inline(jwks.into()))
    };
    let asked = [bearer(token), bearer(&forged), NONE];
    let found = statuses(&mut node, &residual(vec![rule], any_token()), &asked).await;
    assert_eq!(found, [200, 401, 403]);
    node.supervisor.stop().await;
}
