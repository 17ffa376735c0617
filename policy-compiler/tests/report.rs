//! What the report says of policies that do nothing here, or less than they seem to.

use std::collections::BTreeSet;
use std::sync::Arc;

use thyra_datapath_abi::Mode;
use thyra_datapath_abi::tables::PolicyRef;
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::policy::{
    AuthorizationPolicy, L7Verdict, Labels, PolicyAction, RequestAuthentication, Rule, Unknown,
};
use thyra_policy_compiler::report::{PolicyKind, Report};
use thyra_policy_compiler::tokens::{JwtRule, Keys};
use thyra_policy_compiler::world::{Endpoint, World};

fn reference(namespace: &str, name: &str) -> PolicyRef {
    PolicyRef {
        namespace: namespace.into(),
        name: name.into(),
    }
}

fn policy(namespace: &str, name: &str, action: PolicyAction) -> AuthorizationPolicy {
    AuthorizationPolicy {
        reference: reference(namespace, name),
        version: String::new(),
        action,
        provider: None,
        selector: None,
        has_target_refs: false,
        dry_run: false,
        l7_verdict: L7Verdict::Request,
        rules: vec![Rule::default()],
        unknown: Vec::new(),
    }
}

fn tokens_of(issuer: &str) -> JwtRule {
    JwtRule {
        issuer: issuer.into(),
        keys: Keys::Uri("https://keys.example/jwks".into()),
        ..JwtRule::default()
    }
}

fn report(policies: impl IntoIterator<Item = AuthorizationPolicy>) -> Report {
    let mut world = World {
        synced: true,
        ..World::default()
    };
    world.node.default_mode = Mode::Enforce;
    for policy in policies {
        world
            .authorization
            .insert(policy.reference.clone(), Arc::new(policy));
    }
    let request = RequestAuthentication {
        reference: reference("shop", "tokens"),
        version: String::new(),
        selector: None,
        has_target_refs: false,
        rules: vec![JwtRule::refusing("no keys"), tokens_of("i"), tokens_of("i")],
        unknown: Vec::new(),
    };
    world
        .request_authentication
        .insert(request.reference.clone(), Arc::new(request));
    world
        .unreadable
        .insert(reference("shop", "broken"), "truncated".into());
    let endpoint = Endpoint {
        id: 1,
        uid: "1".into(),
        namespace: "shop".into(),
        name: "target".into(),
        service_account: "default".into(),
        addresses: vec!["10.0.0.1".parse().unwrap()],
        labels: Labels::new(),
        annotations: Labels::new(),
        containers: Vec::new(),
    };
    world.endpoints.insert(1, Arc::new(endpoint));
    let mut compiler = Compiler::new();
    compiler.compile(&world).unwrap();
    (**compiler.report()).clone()
}

// long: one world and what is said of each of its policies
#[test]
fn every_policy_has_a_status_that_says_what_it_does_here() {
    let odd = AuthorizationPolicy {
        unknown: vec![Unknown("spec field 99".into())],
        ..policy("shop", "odd", PolicyAction::Allow)
    };
    let tried = AuthorizationPolicy {
        dry_run: true,
        ..policy("shop", "try", PolicyAction::Deny)
    };
    let waypoint = AuthorizationPolicy {
        has_target_refs: true,
        ..policy("shop", "waypoint", PolicyAction::Deny)
    };
    let report = report([
        policy("shop", "lock", PolicyAction::Deny),
        policy("away", "lock", PolicyAction::Deny),
        policy("shop", "audit", PolicyAction::Audit),
        policy("shop", "ask", PolicyAction::Custom),
        odd,
        tried,
        waypoint,
    ]);
    for (namespace, name, wanted, endpoints) in [
        ("shop", "lock", "enforced", &[1][..]),
        ("away", "lock", "no enrolled pod of this node", &[]),
        (
            "shop",
            "audit",
            "not enforced here: AUDIT never changes a verdict",
            &[],
        ),
        (
            "shop",
            "ask",
            "enforced; provider `` can't be asked, what it matches is denied: not in the mesh config",
            &[1],
        ),
        ("shop", "odd", "enforced; not expressible: spec field 99", &[1]),
        ("shop", "try", "dry-run", &[1]),
        (
            "shop",
            "waypoint",
            "not enforced here: targetRefs (a waypoint's or gateway's)",
            &[],
        ),
        (
            "shop",
            "broken",
            "could not be read and counts as a DENY of everything in its scope: truncated",
            &[1],
        ),
    ] {
        let found = &report.policies[&(PolicyKind::Authorization, reference(namespace, name))];
        assert_eq!(
            (found.status.as_str(), &found.endpoints[..]),
            (wanted, endpoints),
            "{namespace}/{name}"
        );
    }
    let tokens = &report.policies[&(PolicyKind::RequestAuthentication, reference("shop", "tokens"))];
    assert_eq!(
        (tokens.status.as_str(), &tokens.endpoints[..]),
        (
            "enforced; spec.jwtRules[0]: no keys: tokens of issuer `` are refused",
            &[1][..]
        )
    );
    let notes: BTreeSet<&str> = report.endpoints[&1].notes.iter().map(String::as_str).collect();
    assert_eq!(
        notes,
        BTreeSet::from([
            "shop/audit: not enforced here: AUDIT never changes a verdict",
            "issuer `i` has several jwtRules here: a token is taken if one of them takes it",
            "shop/waypoint: not enforced here: targetRefs (a waypoint's or gateway's)",
        ])
    );
    assert_eq!(report.problems.len(), 3, "{:?}", report.problems);
}

#[test]
fn a_word_that_a_verdict_cant_be_for_is_named_and_changes_nothing() {
    let said = |word: &str| {
        let policy = AuthorizationPolicy {
            l7_verdict: thyra_policy_compiler::parse::l7_verdict(Some(word)),
            ..policy("shop", "get", PolicyAction::Allow)
        };
        let report = report([policy]);
        let key = (PolicyKind::Authorization, reference("shop", "get"));
        (report.policies[&key].status.clone(), report.problems)
    };
    let (status, problems) = said("conection");
    assert!(
        status.contains("not `conection`; each request is judged"),
        "{status}"
    );
    assert!(
        problems
            .iter()
            .any(|p| p.starts_with("policy shop/get: annotation `thyra.io/l7-verdict`"))
    );
    let (status, problems) = said("connection");
    assert!(status.contains("the first request decides"), "{status}");
    assert!(!problems.iter().any(|p| p.contains("shop/get")), "{problems:?}");
}
