//! RequestAuthentications: how they are read, whom they are for, and which verdicts wait for them. Every verdict is
//! asked of the tables and of the oracle.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use thyra_datapath_abi::tables::{PolicyRef, Verdict};
use thyra_datapath_abi::{Action, Mode, Reason};
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::manifest::{self, Body};
use thyra_policy_compiler::oracle::{Connection, judge};
use thyra_policy_compiler::policy::{Labels, RequestAuthentication, Unknown};
use thyra_policy_compiler::tokens::{JwtRule, Keys};
use thyra_policy_compiler::world::{AppProtocol, Endpoint, ServicePort, Workload, WorkloadKind, World};

const TARGET: &str = "10.244.0.2";
const OUTSIDER: &str = "203.0.113.7";
const KEYS: &str = r#"{"keys":[{"kty":"oct","k":"AAAA"}]}"#;

fn reference(namespace: &str, name: &str) -> PolicyRef {
    PolicyRef {
        namespace: namespace.into(),
        name: name.into(),
    }
}

/// `shop/target` with an HTTP port 80, a port 9000 that is none, and others that nobody declares.
fn shop(containers: &[&str]) -> World {
    let mut world = World {
        synced: true,
        ..World::default()
    };
    world.node.default_mode = Mode::Enforce;
    let declared = |port, protocol| ServicePort {
        port,
        target_port: port,
        protocol,
    };
    let ports = vec![
        declared(80, AppProtocol::Http),
        declared(9000, AppProtocol::NotHttp),
    ];
    let uid: Arc<str> = "Kubernetes//Pod/shop/target".into();
    let workload = Workload {
        uid: Arc::clone(&uid),
        kind: WorkloadKind::Pod,
        name: "target".into(),
        namespace: "shop".into(),
        addresses: vec![TARGET.parse().unwrap()],
        network: String::new(),
        trust_domain: "cluster.local".into(),
        service_account: "target".into(),
        node: "n1".into(),
        host_network: false,
        healthy: true,
        hbone: false,
        services: BTreeMap::from([("shop/target".into(), ports)]),
        authorization_policies: Vec::new(),
    };
    world.workloads.insert(uid, Arc::new(workload));
    let endpoint = Endpoint {
        id: 1,
        uid: "1".into(),
        namespace: "shop".into(),
        name: "target".into(),
        service_account: "target".into(),
        addresses: vec![TARGET.parse().unwrap()],
        labels: Labels::from([("app".to_owned(), "target".to_owned())]),
        annotations: Labels::new(),
        containers: containers.iter().map(|name| (*name).to_owned()).collect(),
    };
    world.endpoints.insert(1, Arc::new(endpoint));
    world
}

fn tokens(namespace: &str) -> RequestAuthentication {
    RequestAuthentication {
        reference: reference(namespace, "tokens"),
        version: String::new(),
        selector: None,
        has_target_refs: false,
        rules: vec![JwtRule {
            issuer: "i".to_owned(),
            keys: Keys::Inline(KEYS.into()),
            ..JwtRule::default()
        }],
        unknown: Vec::new(),
    }
}

fn put(world: &mut World, request: RequestAuthentication) {
    world
        .request_authentication
        .insert(request.reference.clone(), Arc::new(request));
}

fn verdict(world: &World, port: u16) -> Verdict {
    let connection = Connection {
        source: OUTSIDER.parse().unwrap(),
        destination_endpoint: 1,
        destination: TARGET.parse().unwrap(),
        port,
    };
    let tables = Compiler::new().compile(world).unwrap();
    let class = tables.class_of(connection.source);
    let found = tables
        .verdict(tables.endpoints[0].set4, port, class)
        .unwrap()
        .clone();
    let by_oracle = judge(world, &connection).verdict;
    assert_eq!(
        Verdict {
            residual: None,
            ..found.clone()
        },
        by_oracle
    );
    found
}

fn waits(verdict: &Verdict) -> Vec<String> {
    let because = verdict.because.iter();
    because.map(|(rule, field)| format!("{rule} {field}")).collect()
}

#[test]
fn what_http_may_be_allowed_waits_for_tokens_and_nothing_else_does() {
    let mut world = shop(&["app"]);
    put(&mut world, tokens("shop"));
    for port in [80, 8080] {
        let verdict = verdict(&world, port);
        assert_eq!(
            (verdict.action, verdict.reason),
            (Action::Deny, Reason::NeedsL7),
            "{port}"
        );
        assert_eq!(waits(&verdict), ["shop/tokens jwtRules"], "{port}");
    }
    let tcp = verdict(&world, 9000);
    assert_eq!((tcp.action, tcp.reason), (Action::Allow, Reason::NoPolicy));
    // What is refused without a byte is refused in the kernel.
    world
        .unreadable
        .insert(reference("shop", "broken"), "truncated".into());
    assert_eq!(verdict(&world, 80).reason, Reason::NotExpressible);
}

#[test]
fn a_proxy_of_the_pods_own_checks_its_tokens_itself() {
    let mut world = shop(&["app", "istio-proxy"]);
    put(&mut world, tokens("shop"));
    let verdict = verdict(&world, 80);
    assert_eq!(
        (verdict.action, verdict.reason),
        (Action::Allow, Reason::NoPolicy)
    );
}

#[test]
fn all_objects_that_select_the_pod_are_for_it_and_no_others() {
    let selecting = |app: &str| Some(Labels::from([("app".to_owned(), app.to_owned())]));
    let root = |request: RequestAuthentication| RequestAuthentication {
        reference: reference("istio-system", "all"),
        ..request
    };
    let unreadable = RequestAuthentication {
        rules: Vec::new(),
        unknown: vec![Unknown("spec field 99".into())],
        ..tokens("shop")
    };
    let cases = [
        (
            "its namespace's",
            vec![tokens("shop")],
            vec!["shop/tokens jwtRules"],
        ),
        (
            "the root namespace's",
            vec![root(tokens("x"))],
            vec!["istio-system/all jwtRules"],
        ),
        (
            "both, the root namespace's first",
            vec![tokens("shop"), root(tokens("x"))],
            vec!["istio-system/all jwtRules", "shop/tokens jwtRules"],
        ),
        (
            "one with its labels",
            vec![RequestAuthentication {
                selector: selecting("target"),
                ..tokens("shop")
            }],
            vec!["shop/tokens jwtRules"],
        ),
        (
            "one that can't be read",
            vec![unreadable],
            vec!["shop/tokens jwtRules"],
        ),
        ("another namespace's", vec![tokens("other")], vec![]),
        (
            "one with other labels",
            vec![RequestAuthentication {
                selector: selecting("x"),
                ..tokens("shop")
            }],
            vec![],
        ),
        (
            "a waypoint's",
            vec![RequestAuthentication {
                has_target_refs: true,
                ..tokens("shop")
            }],
            vec![],
        ),
        (
            "one without rules",
            vec![RequestAuthentication {
                rules: Vec::new(),
                ..tokens("shop")
            }],
            vec![],
        ),
    ];
    for (what, objects, wanted) in cases {
        let mut world = shop(&["app"]);
        for object in objects {
            put(&mut world, object);
        }
        assert_eq!(waits(&verdict(&world, 80)), wanted, "{what}");
    }
}

fn text(rule: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: tokens, namespace: shop}}\n\
         spec:\n  jwtRules:\n  - {rule}\n"
    )
}

#[test]
fn a_rule_is_read_whole() {
    let rule = format!(
        "{{issuer: i, audiences: [a], jwks: '{KEYS}', fromHeaders: [{{name: x-token, prefix: 'T '}}], fromParams: [p], \
         fromCookies: [c], outputPayloadToHeader: x-payload, outputClaimToHeaders: [{{header: x-sub, claim: sub}}], \
         forwardOriginalToken: true, timeout: 2s, spaceDelimitedClaims: [groups]}}"
    );
    let read = manifest::read_str("t.yaml", &text(&rule)).unwrap();
    let Body::RequestAuthentication(request) = &read.objects[0].body else {
        panic!("{read:?}");
    };
    let [rule] = &request.rules[..] else {
        panic!("{request:?}");
    };
    assert_eq!(rule.issuer, "i");
    assert_eq!(rule.audiences, ["a"]);
    assert_eq!(rule.keys, Keys::Inline(KEYS.into()));
    assert_eq!(
        (&*rule.from_headers[0].name, &*rule.from_headers[0].prefix),
        ("x-token", "T ")
    );
    assert_eq!(
        (&rule.from_params[..], &rule.from_cookies[..]),
        (&["p".to_owned()][..], &["c".to_owned()][..])
    );
    assert_eq!(rule.payload_header, "x-payload");
    assert_eq!(
        (&*rule.claim_headers[0].header, &*rule.claim_headers[0].claim),
        ("x-sub", "sub")
    );
    assert!(rule.forward && rule.lists.contains("groups"));
    assert_eq!(rule.timeout, Duration::from_secs(2));
}

#[test]
fn keys_come_from_the_rule_then_its_uri_then_its_issuer() {
    let https = "https://keys.example/jwks";
    for (rule, keys) in [
        (
            format!("{{issuer: i, jwksUri: '{https}'}}"),
            Some(Keys::Uri(https.into())),
        ),
        (
            format!("{{issuer: i, jwks_uri: '{https}'}}"),
            Some(Keys::Uri(https.into())),
        ),
        (
            "{issuer: 'https://i.example'}".to_owned(),
            Some(Keys::Discovery("https://i.example".into())),
        ),
        // istiod takes it, and has no keys for it either.
        ("{issuer: i}".to_owned(), None),
    ] {
        let read = manifest::read_str("t.yaml", &text(&rule)).unwrap();
        let Body::RequestAuthentication(request) = &read.objects[0].body else {
            panic!("{read:?}");
        };
        match keys {
            Some(keys) => assert_eq!(request.rules[0].keys, keys, "{rule}"),
            None => assert!(matches!(request.rules[0].keys, Keys::None(_)), "{rule}"),
        }
    }
}

#[test]
fn a_users_mistake_is_refused_and_one_in_force_takes_no_token() {
    for (rule, why) in [
        ("{issuer: i, jwks: secret}", "the key set is no JSON"),
        ("{issuer: i, jwks: '{\"keys\":[]}'}", "the key set is empty"),
        (
            "{issuer: i, jwksUri: 'ftp://keys.example'}",
            "neither http nor https",
        ),
        (
            "{issuer: i, jwksUri: 'https://k.example', fromHeaders: [{name: 'x y'}]}",
            "`x y` is no header's name",
        ),
        (
            "{issuer: i, jwksUri: 'https://k.example', audiences: ['']}",
            "has no name",
        ),
        (
            "{issuer: i, jwksUri: 'https://k.example', timeout: soon}",
            "can't be carried out",
        ),
    ] {
        let text = text(rule);
        let errors = manifest::read_str("t.yaml", &text).expect_err(rule);
        let told: Vec<String> = errors.iter().map(ToString::to_string).collect();
        assert!(told.iter().any(|error| error.contains(why)), "{rule}: {told:?}");
    }
    let in_force = json!({
        "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
        "metadata": {"name": "tokens", "namespace": "shop", "resourceVersion": "7"},
        "spec": {"jwtRules": [
            {"issuer": "i", "jwks": KEYS, "laterField": 1},
            {"issuer": "j", "jwks": KEYS},
        ]},
    });
    let object = manifest::object_from_json("tokens", &in_force).unwrap().unwrap();
    let Body::RequestAuthentication(request) = object.body else {
        panic!("{object:?}");
    };
    assert!(
        matches!(&request.rules[0].keys, Keys::None(why) if why.contains("laterField")),
        "{request:?}"
    );
    assert_eq!(request.rules[1].keys, Keys::Inline(KEYS.into()));
    assert_eq!(request.unknown, []);
}
