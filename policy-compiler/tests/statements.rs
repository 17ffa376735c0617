//! The numbered statements of docs/semantics.md that need no live packet, each by its number; every answer is
//! asked of the tables and of the oracle.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use thyra_datapath_abi::tables::{PolicyRef, RuleRef, Tables, Verdict};
use thyra_datapath_abi::{Action, Mode, Reason};
use thyra_policy_compiler::authorizer::{
    self, Authorizer, CHECK_TIMEOUT, Check, HttpCheck, Provider, STATUS_ON_ERROR,
};
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::oracle::{Connection, judge, judge_traffic};
use thyra_policy_compiler::parse;
use thyra_policy_compiler::policy::{
    AuthorizationPolicy, Condition, Field, L7Verdict, Labels, MtlsMode, Operation, PeerAuthentication,
    PolicyAction, Rule, ServiceAccountRef, Source, StringMatch, Unknown,
};
use thyra_policy_compiler::residual::{self, Context, Inline, Way};
use thyra_policy_compiler::traffic::{Request, Traffic};
use thyra_policy_compiler::world::{
    AppProtocol, Endpoint, Service, ServicePort, Workload, WorkloadKind, World,
};

const TARGET: &str = "10.244.0.2";
const FRONT: &str = "10.244.0.3";
const CART: &str = "10.244.0.4";
const OUTSIDER: &str = "203.0.113.7";

/// `shop/target` on this node, `shop/front` and `team-a/cart` somewhere.
fn shop() -> World {
    let mut world = World {
        synced: true,
        ..World::default()
    };
    world.node.default_mode = Mode::Enforce;
    pod(&mut world, "shop/target", "target", TARGET);
    pod(&mut world, "shop/front", "front", FRONT);
    pod(&mut world, "team-a/cart", "cart", CART);
    world.endpoints.insert(
        1,
        Arc::new(Endpoint {
            id: 1,
            uid: "1".into(),
            namespace: "shop".into(),
            name: "target".into(),
            service_account: "target".into(),
            addresses: vec![TARGET.parse().unwrap()],
            labels: labels(&[("app", "target")]),
            annotations: Labels::new(),
            containers: vec!["app".into()],
        }),
    );
    world
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs
        .iter()
        .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
        .collect()
}

fn reference(name: &str) -> PolicyRef {
    let (namespace, name) = name.split_once('/').unwrap();
    PolicyRef {
        namespace: namespace.into(),
        name: name.into(),
    }
}

fn pod(world: &mut World, name: &str, account: &str, address: &str) {
    let uid: Arc<str> = format!("Kubernetes//Pod/{name}").into();
    let PolicyRef { namespace, name } = reference(name);
    let workload = Workload {
        uid: Arc::clone(&uid),
        kind: WorkloadKind::Pod,
        name: name.to_string(),
        namespace: namespace.to_string(),
        addresses: vec![address.parse().unwrap()],
        network: String::new(),
        trust_domain: "cluster.local".into(),
        service_account: account.into(),
        node: "n1".into(),
        host_network: false,
        healthy: true,
        hbone: false,
        services: BTreeMap::new(),
        authorization_policies: Vec::new(),
    };
    world.workloads.insert(uid, Arc::new(workload));
}

fn change(world: &mut World, pod: &str, edit: impl FnOnce(&mut Workload)) {
    let workload = world
        .workloads
        .get_mut(format!("Kubernetes//Pod/{pod}").as_str())
        .unwrap();
    let mut changed = Workload::clone(workload);
    edit(&mut changed);
    *workload = Arc::new(changed);
}

fn change_endpoint(world: &mut World, edit: impl FnOnce(&mut Endpoint)) {
    let endpoint = world.endpoints.get_mut(&1).unwrap();
    let mut changed = Endpoint::clone(endpoint);
    edit(&mut changed);
    *endpoint = Arc::new(changed);
}

/// Declares pod port `port` as `protocol` by a Service in front of the target.
fn declare(world: &mut World, service: &str, port: u16, protocol: AppProtocol) {
    change(world, "shop/target", |workload| {
        workload.services.insert(
            service.into(),
            vec![ServicePort {
                port: 80,
                target_port: port,
                protocol,
            }],
        );
    });
}

fn policy(name: &str, action: PolicyAction, rules: Vec<Rule>) -> AuthorizationPolicy {
    AuthorizationPolicy {
        reference: reference(name),
        version: String::new(),
        action,
        provider: None,
        selector: None,
        has_target_refs: false,
        dry_run: false,
        l7_verdict: L7Verdict::Request,
        rules,
        unknown: Vec::new(),
    }
}

fn allow(name: &str, rules: Vec<Rule>) -> AuthorizationPolicy {
    policy(name, PolicyAction::Allow, rules)
}

fn deny(name: &str, rules: Vec<Rule>) -> AuthorizationPolicy {
    policy(name, PolicyAction::Deny, rules)
}

fn put(world: &mut World, policy: AuthorizationPolicy) {
    world
        .authorization
        .insert(policy.reference.clone(), Arc::new(policy));
}

fn any() -> Rule {
    Rule::default()
}

fn from(source: Source) -> Rule {
    Rule {
        from: vec![source],
        ..Rule::default()
    }
}

fn to(operation: Operation) -> Rule {
    Rule {
        to: vec![operation],
        ..Rule::default()
    }
}

fn values<T>(values: impl IntoIterator<Item = T>) -> Field<T> {
    Field {
        values: values.into_iter().collect(),
        not_values: Vec::new(),
    }
}

fn none_of<T>(not_values: impl IntoIterator<Item = T>) -> Field<T> {
    Field {
        values: Vec::new(),
        not_values: not_values.into_iter().collect(),
    }
}

fn principal(text: &str) -> Source {
    Source {
        principals: values([parse::principal(text).unwrap()]),
        ..Source::default()
    }
}

fn block(text: &str) -> Source {
    Source {
        ip_blocks: values([parse::ip_block(text).unwrap()]),
        ..Source::default()
    }
}

fn ports(ports: &[u16]) -> Operation {
    Operation {
        ports: values(ports.iter().copied()),
        ..Operation::default()
    }
}

fn get() -> Operation {
    Operation {
        methods: values([StringMatch::Exact("GET".into())]),
        ..Operation::default()
    }
}

const FRONT_ID: &str = "cluster.local/ns/shop/sa/front";
const CART_ID: &str = "cluster.local/ns/team-a/sa/cart";

fn lookup(tables: &Tables, source: &str, port: u16) -> Verdict {
    let source: IpAddr = source.parse().unwrap();
    let endpoint = tables.endpoints[0];
    let set = if source.to_canonical().is_ipv4() {
        endpoint.set4
    } else {
        endpoint.set6
    };
    tables
        .verdict(set, port, tables.class_of(source))
        .unwrap()
        .clone()
}

fn connection(source: &str, port: u16) -> Connection {
    Connection {
        source: source.parse().unwrap(),
        destination_endpoint: 1,
        destination: TARGET.parse().unwrap(),
        port,
    }
}

/// The verdict on `source` at `port` of the target; tables and oracle must agree.
fn verdict(world: &World, source: &str, port: u16) -> Verdict {
    let tables = Compiler::new().compile(world).unwrap();
    let found = lookup(&tables, source, port);
    let judged = judge(world, &connection(source, port)).verdict;
    // The oracle makes no residuals.
    let compared = Verdict {
        residual: None,
        ..found.clone()
    };
    assert_eq!(compared, judged, "tables and oracle on {source}:{port}");
    found
}

fn allowed(world: &World, source: &str, port: u16) -> bool {
    verdict(world, source, port).action == Action::Allow
}

fn reason(world: &World, source: &str, port: u16) -> Reason {
    verdict(world, source, port).reason
}

fn rule(name: &str, rule: u32) -> Option<RuleRef> {
    Some(RuleRef {
        policy: reference(name),
        rule: Some(rule),
    })
}

#[test]
fn s01_deny_wins_over_allow_whatever_scope_and_name() {
    for (of_allow, of_deny) in [
        ("shop/a", "shop/b"),
        ("shop/b", "shop/a"),
        ("istio-system/a", "shop/b"),
        ("shop/a", "istio-system/b"),
    ] {
        let mut world = shop();
        put(&mut world, allow(of_allow, vec![any()]));
        assert!(allowed(&world, FRONT, 80));
        put(&mut world, deny(of_deny, vec![from(principal(FRONT_ID))]));
        let found = verdict(&world, FRONT, 80);
        assert_eq!((found.action, found.reason), (Action::Deny, Reason::PolicyDeny));
        assert_eq!(found.rule, rule(of_deny, 0));
        assert!(allowed(&world, CART, 80));
    }
}

#[test]
fn s01_of_several_that_match_root_comes_first_then_name_then_index() {
    let mut world = shop();
    let nobody = from(principal("cluster.local/ns/x/sa/x"));
    put(&mut world, deny("shop/a", vec![any()]));
    put(&mut world, deny("shop/b", vec![any()]));
    assert_eq!(verdict(&world, FRONT, 80).rule, rule("shop/a", 0));
    put(&mut world, deny("istio-system/z", vec![nobody, any(), any()]));
    assert_eq!(verdict(&world, FRONT, 80).rule, rule("istio-system/z", 1));
    world.mesh.root_namespace = "zz-root".into();
    put(&mut world, deny("zz-root/z", vec![any()]));
    assert_eq!(verdict(&world, FRONT, 80).rule, rule("zz-root/z", 0));
}

#[test]
fn s02_an_allow_that_matches_nothing_denies_everything_until_it_goes() {
    let mut world = shop();
    assert_eq!(reason(&world, FRONT, 80), Reason::NoPolicy);
    put(&mut world, allow("shop/nothing", vec![]));
    for source in [FRONT, CART, OUTSIDER] {
        let found = verdict(&world, source, 80);
        assert_eq!(
            (found.action, found.reason, found.rule),
            (Action::Deny, Reason::Policy, None)
        );
    }
    world.authorization.clear();
    assert!(allowed(&world, FRONT, 80));
}

#[test]
fn s02_a_deny_without_rules_does_nothing() {
    let mut world = shop();
    put(&mut world, deny("shop/nothing", vec![]));
    assert_eq!(reason(&world, FRONT, 80), Reason::NoPolicy);
}

#[test]
fn s03_a_dry_run_allow_does_not_arm_default_deny_and_says_what_it_would_do() {
    let mut world = shop();
    put(
        &mut world,
        AuthorizationPolicy {
            dry_run: true,
            ..allow("shop/try", vec![from(principal(FRONT_ID))])
        },
    );
    assert_eq!(verdict(&world, FRONT, 80).would, None);
    let cart = verdict(&world, CART, 80);
    assert_eq!(cart.action, Action::Allow);
    let would = cart.would.unwrap();
    assert_eq!(
        (would.action, would.reason, would.rule),
        (Action::Deny, Reason::Policy, None)
    );
}

#[test]
fn s03_a_dry_run_deny_only_counts() {
    let mut world = shop();
    let tried = deny("shop/try", vec![from(principal(FRONT_ID))]);
    put(
        &mut world,
        AuthorizationPolicy {
            dry_run: true,
            ..tried
        },
    );
    let front = verdict(&world, FRONT, 80);
    assert_eq!(front.action, Action::Allow);
    let would = front.would.unwrap();
    assert_eq!((would.action, would.rule), (Action::Deny, rule("shop/try", 0)));
    assert_eq!(verdict(&world, CART, 80).would, None);
}

#[test]
fn s04_an_unknown_source_fails_present_and_passes_negations() {
    let mut world = shop();
    put(&mut world, allow("shop/known", vec![from(principal("*"))]));
    assert!(allowed(&world, FRONT, 80));
    assert!(!allowed(&world, OUTSIDER, 80));

    for source in [
        Source {
            principals: none_of([StringMatch::Exact(FRONT_ID.into())]),
            ..Source::default()
        },
        Source {
            namespaces: none_of([StringMatch::Exact("shop".into())]),
            ..Source::default()
        },
    ] {
        let mut world = shop();
        put(&mut world, allow("shop/others", vec![from(source)]));
        assert!(allowed(&world, OUTSIDER, 80));
        assert!(allowed(&world, CART, 80));
        assert!(!allowed(&world, FRONT, 80));
    }
}

fn peer(name: &str, selector: bool, mode: MtlsMode, ports: &[(u16, MtlsMode)]) -> Arc<PeerAuthentication> {
    Arc::new(PeerAuthentication {
        reference: reference(name),
        version: String::new(),
        created: 1,
        selector: selector.then(|| labels(&[("app", "target")])),
        mode,
        ports: ports.iter().copied().collect(),
        unknown: Vec::new(),
    })
}

fn put_peer(world: &mut World, peer: Arc<PeerAuthentication>) {
    world.peer_authentication.insert(peer.reference.clone(), peer);
}

#[test]
fn s05_strict_with_a_permissive_port_and_the_reverse() {
    use MtlsMode::{Permissive, Strict};
    for (whole, of_port) in [(Strict, Permissive), (Permissive, Strict)] {
        let mut world = shop();
        put_peer(&mut world, peer("shop/own", true, whole, &[(9090, of_port)]));
        assert_eq!(allowed(&world, OUTSIDER, 9090), of_port == Permissive);
        assert_eq!(allowed(&world, OUTSIDER, 80), whole == Permissive);
        assert!(allowed(&world, FRONT, 80) && allowed(&world, FRONT, 9090));
        let refused = if whole == Strict { 80 } else { 9090 };
        let found = verdict(&world, OUTSIDER, refused);
        let policy = Some(RuleRef {
            policy: reference("shop/own"),
            rule: None,
        });
        assert_eq!((found.reason, found.rule), (Reason::StrictMtls, policy));
    }
}

#[test]
fn s05_the_nearest_level_that_says_something_decides_and_the_oldest_on_it() {
    use MtlsMode::{Permissive, Strict, Unset};
    let mut world = shop();
    put_peer(&mut world, peer("istio-system/mesh", false, Strict, &[]));
    assert!(!allowed(&world, OUTSIDER, 80));
    put_peer(&mut world, peer("shop/namespace", false, Permissive, &[]));
    assert!(allowed(&world, OUTSIDER, 80));
    put_peer(&mut world, peer("shop/own", true, Unset, &[(80, Strict)]));
    assert!(!allowed(&world, OUTSIDER, 80) && allowed(&world, OUTSIDER, 81));
    let older = PeerAuthentication {
        created: 0,
        ..PeerAuthentication::clone(&peer("shop/zz", true, Permissive, &[]))
    };
    put_peer(&mut world, Arc::new(older));
    assert!(allowed(&world, OUTSIDER, 80));
    // A selector in the root namespace has no effect, nor has another namespace's object.
    world.peer_authentication.clear();
    put_peer(&mut world, peer("istio-system/selected", true, Strict, &[]));
    put_peer(&mut world, peer("team-a/other", false, Strict, &[]));
    assert!(allowed(&world, OUTSIDER, 80));
}

#[test]
fn s06_blocks_are_masked_mapped_addresses_are_v4_and_families_never_mix() {
    let mut world = shop();
    put(&mut world, allow("shop/block", vec![from(block("1.2.3.4/8"))]));
    assert!(allowed(&world, "1.200.0.1", 80));
    assert!(!allowed(&world, "2.0.0.1", 80));
    assert!(allowed(&world, "::ffff:1.2.3.4", 80));
    put(
        &mut world,
        allow("shop/block", vec![from(block("::ffff:1.2.3.4"))]),
    );
    assert!(allowed(&world, "1.2.3.4", 80));
    put(&mut world, allow("shop/block", vec![from(block("0.0.0.0/0"))]));
    assert!(allowed(&world, OUTSIDER, 80));
    assert!(!allowed(&world, "2001:db8::7", 80));
}

#[test]
fn s07_ports_are_the_pods_own_not_the_services() {
    let mut world = shop();
    declare(&mut world, "shop/target", 9080, AppProtocol::Unknown);
    put(&mut world, allow("shop/port", vec![to(ports(&[9080]))]));
    assert!(allowed(&world, FRONT, 9080));
    assert!(!allowed(&world, FRONT, 80));
}

#[test]
fn s08_a_same_named_policy_that_changes_its_scope_stops_its_old_effect_at_once() {
    let mut world = shop();
    let mut compiler = Compiler::new();
    put(&mut world, deny("shop/lock", vec![any()]));
    let before = compiler.compile(&world).unwrap();
    assert_eq!(lookup(&before, FRONT, 80).action, Action::Deny);
    put(
        &mut world,
        AuthorizationPolicy {
            selector: Some(labels(&[("app", "other")])),
            ..deny("shop/lock", vec![any()])
        },
    );
    let after = compiler.compile(&world).unwrap();
    assert_eq!(lookup(&after, FRONT, 80).action, Action::Allow);
}

#[test]
fn s09_an_l4_deny_on_one_principal_drops_it_and_only_it() {
    let mut world = shop();
    put(&mut world, deny("shop/lock", vec![from(principal(FRONT_ID))]));
    assert!(!allowed(&world, FRONT, 80));
    for source in [CART, OUTSIDER, "10.9.9.9"] {
        assert!(allowed(&world, source, 80));
    }
}

#[test]
fn s12_another_pod_of_an_allowed_identity_changes_its_address_only() {
    let mut world = shop();
    put(&mut world, allow("shop/front", vec![from(principal(FRONT_ID))]));
    let mut compiler = Compiler::new();
    let before = compiler.compile(&world).unwrap();
    pod(&mut world, "shop/front-2", "front", "10.244.7.7");
    let after = compiler.compile(&world).unwrap();
    assert_eq!(lookup(&after, "10.244.7.7", 80).action, Action::Allow);
    assert_eq!(after.addresses.len(), before.addresses.len() + 1);
    let rest = |tables: &Tables| Tables {
        addresses: Arc::default(),
        ..tables.clone()
    };
    assert_eq!(rest(&before), rest(&after));
}

#[test]
fn s13_a_label_change_acts_like_a_policy_change() {
    let mut world = shop();
    put(
        &mut world,
        AuthorizationPolicy {
            selector: Some(labels(&[("tier", "back")])),
            ..deny("shop/lock", vec![any()])
        },
    );
    let mut compiler = Compiler::new();
    assert_eq!(
        lookup(&compiler.compile(&world).unwrap(), FRONT, 80).action,
        Action::Allow
    );
    change_endpoint(&mut world, |endpoint| {
        endpoint.labels.insert("tier".into(), "back".into());
    });
    assert_eq!(
        lookup(&compiler.compile(&world).unwrap(), FRONT, 80).action,
        Action::Deny
    );
    assert_eq!(
        compiler.report().endpoints[&1].policies[..],
        [reference("shop/lock")]
    );
}

/// A policy with an unknown field 99 at each of the four places.
fn unknown_forms(action: PolicyAction) -> Vec<AuthorizationPolicy> {
    let field = || vec![Unknown("field 99".into())];
    let source = Source {
        unknown: field(),
        ..principal(FRONT_ID)
    };
    let operation = Operation {
        unknown: field(),
        ..ports(&[80])
    };
    let of_rule = Rule {
        unknown: field(),
        ..from(principal(FRONT_ID))
    };
    let of_spec = AuthorizationPolicy {
        unknown: field(),
        ..policy("shop/odd", action, vec![from(principal(FRONT_ID))])
    };
    let mut forms: Vec<AuthorizationPolicy> = [from(source), to(operation), of_rule]
        .into_iter()
        .map(|rule| policy("shop/odd", action, vec![rule]))
        .collect();
    forms.push(of_spec);
    forms
}

#[test]
fn s14_an_unknown_term_matches_in_deny_and_is_named() {
    for form in unknown_forms(PolicyAction::Deny) {
        let mut world = shop();
        put(&mut world, form);
        let found = verdict(&world, FRONT, 80);
        assert_eq!(
            (found.action, found.reason),
            (Action::Deny, Reason::NotExpressible)
        );
        assert_eq!(found.rule, rule("shop/odd", 0));
    }
}

#[test]
fn s14_an_unknown_term_does_not_match_in_allow_and_is_named() {
    for form in unknown_forms(PolicyAction::Allow) {
        let mut world = shop();
        put(&mut world, form);
        let found = verdict(&world, FRONT, 80);
        assert_eq!(
            (found.action, found.reason),
            (Action::Deny, Reason::NotExpressible)
        );
        assert_eq!(found.rule, rule("shop/odd", 0));
        put(&mut world, allow("shop/plain", vec![from(principal(FRONT_ID))]));
        assert!(allowed(&world, FRONT, 80));
    }
}

#[test]
fn s14_a_known_term_beside_an_unknown_one_still_decides() {
    let mut world = shop();
    let source = Source {
        unknown: vec![Unknown("field 99".into())],
        ..principal(FRONT_ID)
    };
    put(&mut world, deny("shop/odd", vec![from(source)]));
    assert!(allowed(&world, CART, 80));
}

#[test]
fn s14_a_policy_that_could_not_be_read_denies_in_its_scope() {
    for (name, reaches) in [("shop/x", true), ("istio-system/x", true), ("team-a/x", false)] {
        let mut world = shop();
        world.unreadable.insert(reference(name), "truncated".into());
        let found = verdict(&world, FRONT, 80);
        assert_eq!(found.action == Action::Deny, reaches, "{name}");
        assert_eq!(found.reason == Reason::NotExpressible, reaches, "{name}");
    }
}

#[test]
fn s16_an_address_that_moves_to_a_local_pod_loses_the_old_identity_at_once() {
    let mut world = shop();
    put(&mut world, allow("shop/front", vec![from(principal(FRONT_ID))]));
    let mut compiler = Compiler::new();
    assert_eq!(
        lookup(&compiler.compile(&world).unwrap(), FRONT, 80).action,
        Action::Allow
    );
    let newcomer = Endpoint {
        id: 2,
        name: "newcomer".into(),
        addresses: vec![FRONT.parse().unwrap()],
        ..Endpoint::clone(&world.endpoints[&1])
    };
    world.endpoints.insert(2, Arc::new(newcomer));
    // Its own identity has not come, the old one is gone: held back, not refused.
    let tables = compiler.compile(&world).unwrap();
    assert_eq!(lookup(&tables, FRONT, 80).action, Action::Hold);
    assert_eq!(reason(&world, FRONT, 80), Reason::IdentityPending);
    let address = tables
        .addresses
        .iter()
        .find(|a| a.address == FRONT.parse::<IpAddr>().unwrap());
    assert_eq!(address.unwrap().local, 2);
}

#[test]
fn s16_a_source_that_waits_for_its_identity_is_refused_where_no_identity_could_pass() {
    let mut world = shop();
    world.node.pod_ranges = vec!["10.244.0.0/16".parse().unwrap()];
    let newcomer = "10.244.9.9";
    assert_eq!(reason(&world, newcomer, 80), Reason::NoPolicy);
    put(&mut world, allow("shop/a", vec![from(principal(FRONT_ID))]));
    assert_eq!(verdict(&world, newcomer, 80).action, Action::Hold);
    assert_eq!(reason(&world, OUTSIDER, 80), Reason::Policy);
    put(&mut world, deny("shop/b", vec![any()]));
    assert_eq!(reason(&world, newcomer, 80), Reason::PolicyDeny);
}

#[test]
fn s16_what_is_held_back_never_gets_as_far_as_its_bytes() {
    let mut world = shop();
    world.node.pod_ranges = vec!["10.244.0.0/16".parse().unwrap()];
    // A sidecar judges HTTP itself; one of two Services says that the port is another protocol's.
    change_endpoint(&mut world, |endpoint| {
        endpoint.containers.push("istio-proxy".into())
    });
    declare(&mut world, "shop/target", 5432, AppProtocol::Http);
    declare(&mut world, "shop/second", 5432, AppProtocol::NotHttp);
    put(&mut world, allow("shop/get", vec![to(get())]));
    put(&mut world, allow("shop/front", vec![from(principal(FRONT_ID))]));
    assert_eq!(reason(&world, "10.244.9.9", 5432), Reason::IdentityPending);
    let ending = judge_traffic(
        &world,
        &connection("10.244.9.9", 5432),
        &Traffic::default(),
        &mut Vec::new(),
    );
    assert_eq!(
        (ending.action, ending.reason),
        (Action::Hold, Reason::IdentityPending)
    );
}

#[test]
fn s16_what_one_service_holds_back_the_other_does_not_let_speak() {
    let mut world = shop();
    world.node.pod_ranges = vec!["10.244.0.0/16".parse().unwrap()];
    declare(&mut world, "shop/target", 5432, AppProtocol::Http);
    declare(&mut world, "shop/second", 5432, AppProtocol::NotHttp);
    // By HTTP the identity decides, by TCP the server name does.
    let named = Condition::Sni(values([StringMatch::Exact("a.example".into())]));
    let sni = Rule {
        when: vec![named],
        ..any()
    };
    let every_method = Operation {
        methods: values([StringMatch::Present]),
        ..Operation::default()
    };
    let front = Rule {
        from: vec![principal(FRONT_ID)],
        to: vec![every_method],
        ..any()
    };
    put(&mut world, allow("shop/sni", vec![sni]));
    put(&mut world, allow("shop/front", vec![front]));
    let newcomer = connection("10.244.9.9", 5432);
    let traffic = Traffic {
        sni: Some("a.example".into()),
        ..Traffic::default()
    };
    let wanted = judge_traffic(&world, &newcomer, &traffic, &mut Vec::new());
    let mut compiler = Compiler::new();
    let tables = compiler.compile(&world).unwrap();
    let cell = lookup(&tables, "10.244.9.9", 5432);
    let context = Context {
        traffic: &traffic,
        source: newcomer.source,
        paths: world.mesh.path_normalization,
    };
    let found = residual::end(&world, &cell, compiler.residuals(), true, &context).unwrap();
    assert_eq!(wanted.action, Action::Hold);
    assert_eq!(found, wanted);
}

#[test]
fn s17_the_same_account_name_in_two_namespaces_is_two_identities() {
    let mut world = shop();
    pod(&mut world, "team-a/front", "front", "10.244.3.3");
    put(&mut world, allow("shop/front", vec![from(principal(FRONT_ID))]));
    assert!(allowed(&world, FRONT, 80));
    assert!(!allowed(&world, "10.244.3.3", 80));
    let accounts = Source {
        service_accounts: values([parse::service_account("front", "shop").unwrap()]),
        ..Source::default()
    };
    put(&mut world, allow("shop/front", vec![from(accounts)]));
    assert!(allowed(&world, FRONT, 80));
    assert!(!allowed(&world, "10.244.3.3", 80));
}

#[test]
fn s17_not_service_accounts_refuses_the_account_of_its_namespace_alone() {
    let mut world = shop();
    pod(&mut world, "team-a/front", "front", "10.244.0.9");
    let account = |namespace: &str, name: &str| ServiceAccountRef {
        namespace: namespace.into(),
        name: name.into(),
    };
    let source = Source {
        service_accounts: none_of([account("shop", "front")]),
        ..Source::default()
    };
    put(&mut world, allow("shop/p", vec![from(source)]));
    assert!(!allowed(&world, FRONT, 80));
    assert!(allowed(&world, "10.244.0.9", 80), "the same name elsewhere");
    assert!(allowed(&world, CART, 80));
    assert!(allowed(&world, OUTSIDER, 80), "nobody is not shop/front either");
}

#[test]
fn s18_a_namespace_wildcard_follows_namespaces_that_appear_later() {
    let mut world = shop();
    let teams = Source {
        namespaces: values([parse::namespace("team-*").unwrap()]),
        ..Source::default()
    };
    put(&mut world, allow("shop/teams", vec![from(teams)]));
    let mut compiler = Compiler::new();
    let tables = compiler.compile(&world).unwrap();
    assert_eq!(lookup(&tables, CART, 80).action, Action::Allow);
    assert_eq!(lookup(&tables, FRONT, 80).action, Action::Deny);
    pod(&mut world, "team-new/x", "x", "10.244.5.5");
    let tables = compiler.compile(&world).unwrap();
    assert_eq!(lookup(&tables, "10.244.5.5", 80).action, Action::Allow);
}

#[test]
fn s19_only_the_source_whose_rule_needs_l7_needs_l7() {
    let mut world = shop();
    let front_gets = Rule {
        from: vec![principal(FRONT_ID)],
        to: vec![get()],
        ..Rule::default()
    };
    put(
        &mut world,
        allow("shop/mixed", vec![front_gets, from(principal(CART_ID))]),
    );
    assert_eq!(verdict(&world, CART, 80).rule, rule("shop/mixed", 1));
    assert!(allowed(&world, CART, 80));
    let front = verdict(&world, FRONT, 80);
    assert_eq!((front.action, front.reason), (Action::Deny, Reason::NeedsL7));
    assert_eq!(
        front.because,
        [(rule("shop/mixed", 0).unwrap(), "methods".into())]
    );
    assert_eq!(reason(&world, OUTSIDER, 80), Reason::Policy);
}

#[test]
fn s20_a_deny_by_path_needs_l7_on_http_and_denies_all_where_the_port_is_tcp() {
    let mut world = shop();
    let admin = Operation {
        paths: values(["/admin".to_owned()]),
        ..Operation::default()
    };
    put(&mut world, deny("shop/admin", vec![to(admin)]));
    for (port, protocol) in [(8080, AppProtocol::Http), (8081, AppProtocol::Unknown)] {
        declare(&mut world, "shop/target", port, protocol);
        for source in [FRONT, OUTSIDER] {
            assert_eq!(reason(&world, source, port), Reason::NeedsL7);
        }
    }
    for protocol in [AppProtocol::NotHttp, AppProtocol::Tls] {
        declare(&mut world, "shop/target", 5432, protocol);
        for source in [FRONT, OUTSIDER] {
            assert_eq!(reason(&world, source, 5432), Reason::PolicyDeny);
        }
    }
    // Two Services disagree: the stricter answer.
    declare(&mut world, "shop/second", 5432, AppProtocol::Http);
    assert_eq!(reason(&world, FRONT, 5432), Reason::PolicyDeny);
}

#[test]
fn s20_an_allow_by_method_never_matches_where_the_port_is_tcp() {
    let mut world = shop();
    declare(&mut world, "shop/target", 5432, AppProtocol::NotHttp);
    put(&mut world, allow("shop/get", vec![to(get())]));
    assert_eq!(reason(&world, FRONT, 5432), Reason::Policy);
    assert_eq!(reason(&world, FRONT, 80), Reason::NeedsL7);
    declare(&mut world, "shop/second", 5432, AppProtocol::Unknown);
    assert_eq!(reason(&world, FRONT, 5432), Reason::Policy);
}

#[test]
fn s20_a_protocol_that_only_the_service_itself_declares_holds_for_its_pods() {
    let mut world = shop();
    declare(&mut world, "shop/target", 5432, AppProtocol::Unknown);
    put(&mut world, allow("shop/get", vec![to(get())]));
    assert_eq!(reason(&world, FRONT, 5432), Reason::NeedsL7);
    let port = |port, protocol| ServicePort {
        port,
        target_port: 5432,
        protocol,
    };
    let service = Service {
        name: "target".into(),
        namespace: "shop".into(),
        hostname: "target".into(),
        addresses: Vec::new(),
        ports: vec![port(81, AppProtocol::Http), port(80, AppProtocol::NotHttp)],
    };
    world.services.insert("shop/target".into(), Arc::new(service));
    assert_eq!(reason(&world, FRONT, 5432), Reason::Policy);
}

#[test]
fn s20_sni_needs_l7_even_where_the_port_is_not_http() {
    let mut world = shop();
    declare(&mut world, "shop/target", 443, AppProtocol::Tls);
    let sni = Rule {
        when: vec![Condition::Sni(values([StringMatch::Exact("a.example".into())]))],
        ..Rule::default()
    };
    put(&mut world, allow("shop/sni", vec![sni]));
    assert_eq!(reason(&world, FRONT, 443), Reason::NeedsL7);
}

#[test]
fn s22_an_entry_another_network_or_two_pods_on_an_address_lend_no_identity() {
    let mut world = shop();
    put(&mut world, allow("shop/front", vec![from(principal(FRONT_ID))]));
    assert!(allowed(&world, FRONT, 80));

    let mut entry = world.clone();
    change(&mut entry, "shop/front", |workload| {
        workload.kind = WorkloadKind::Other
    });
    assert!(!allowed(&entry, FRONT, 80));
    entry.node.trust_workload_entries.insert("shop".into());
    assert!(allowed(&entry, FRONT, 80));
    // A Pod beats it.
    pod(&mut entry, "team-a/late", "late", FRONT);
    assert!(!allowed(&entry, FRONT, 80));

    let mut other_network = world.clone();
    change(&mut other_network, "shop/front", |workload| {
        workload.network = "far".into()
    });
    assert!(!allowed(&other_network, FRONT, 80));

    let mut two = world.clone();
    pod(&mut two, "shop/front-2", "front", FRONT);
    assert!(!allowed(&two, FRONT, 80));
    let mut compiler = Compiler::new();
    compiler.compile(&two).unwrap();
    assert!(compiler.report().problems[0].contains("several live pods (shop/front, shop/front-2)"));

    let mut host = world.clone();
    change(&mut host, "shop/front", |workload| workload.host_network = true);
    assert!(!allowed(&host, FRONT, 80));

    let mut of_node = world;
    of_node.node.node_addresses.insert(FRONT.parse().unwrap());
    assert!(!allowed(&of_node, FRONT, 80));
}

#[test]
fn trust_domain_aliases_are_those_of_sidecars() {
    let mut world = shop();
    world.mesh.trust_domain = "td1".into();
    world.mesh.trust_domain_aliases = vec!["td2".into()];
    for (name, domain, address) in [
        ("one", "td1", "10.1.0.1"),
        ("two", "td2", "10.1.0.2"),
        ("far", "far", "10.1.0.3"),
    ] {
        pod(&mut world, &format!("shop/{name}"), "front", address);
        change(&mut world, &format!("shop/{name}"), |workload| {
            workload.trust_domain = domain.into()
        });
    }
    for (value, wanted) in [
        ("td1/ns/shop/sa/front", [true, true, false]),
        ("td2/ns/shop/sa/front", [true, true, false]),
        ("cluster.local/ns/shop/sa/front", [true, true, false]),
        ("far/ns/shop/sa/front", [false, false, true]),
        ("*/ns/shop/sa/front", [true, true, true]),
        ("td1/ns/shop/*", [true, false, false]),
        ("td1/ns/shop/sa/*", [true, true, false]),
    ] {
        put(&mut world, allow("shop/a", vec![from(principal(value))]));
        let found = ["10.1.0.1", "10.1.0.2", "10.1.0.3"].map(|source| allowed(&world, source, 80));
        assert_eq!(found, wanted, "{value}");
    }
}

#[test]
fn a_selector_in_the_root_namespace_reaches_every_namespace_and_an_empty_one_selects_all() {
    let mut world = shop();
    let lock = |selector| AuthorizationPolicy {
        selector: Some(selector),
        ..deny("istio-system/lock", vec![any()])
    };
    put(&mut world, lock(labels(&[("app", "target")])));
    assert!(!allowed(&world, FRONT, 80));
    put(&mut world, lock(labels(&[("app", "other")])));
    assert!(allowed(&world, FRONT, 80));
    put(&mut world, lock(Labels::new()));
    assert!(!allowed(&world, FRONT, 80));
}

#[test]
fn a_policy_with_target_refs_is_a_waypoints_and_noted() {
    let mut world = shop();
    put(
        &mut world,
        AuthorizationPolicy {
            has_target_refs: true,
            ..deny("shop/waypoint", vec![any()])
        },
    );
    assert!(allowed(&world, FRONT, 80));
    let mut compiler = Compiler::new();
    compiler.compile(&world).unwrap();
    assert!(compiler.report().endpoints[&1].notes[0].contains("not enforced here: targetRefs"));
}

#[test]
fn custom_fails_closed_where_its_answer_would_count() {
    let mut world = shop();
    let custom = AuthorizationPolicy {
        provider: Some("ext".into()),
        ..policy("shop/ask", PolicyAction::Custom, vec![from(principal(FRONT_ID))])
    };
    put(&mut world, custom);
    // Not in the mesh config.
    assert_eq!(reason(&world, FRONT, 80), Reason::NoAuthorizer);
    assert_eq!(reason(&world, CART, 80), Reason::NoPolicy);
    put(&mut world, deny("shop/lock", vec![to(ports(&[81]))]));
    assert_eq!(reason(&world, FRONT, 81), Reason::PolicyDeny);
    provide(&mut world, Provider::of_kind("ext", "zipkin"));
    assert_eq!(reason(&world, FRONT, 80), Reason::NoAuthorizer);
    provide(&mut world, asked_by(Check::Grpc));
    assert_eq!(reason(&world, FRONT, 80), Reason::NeedsCustom);
    assert_eq!(reason(&world, FRONT, 81), Reason::PolicyDeny);
}

/// In the place of all others.
fn provide(world: &mut World, provider: Provider) {
    world.mesh.extension_providers.clear();
    authorizer::insert(&mut world.mesh.extension_providers, provider);
}

fn asked_by(check: Check) -> Provider {
    let authorizer = Authorizer {
        target: authorizer::target("ext.shop.svc.cluster.local", 9000).unwrap(),
        check,
        timeout: CHECK_TIMEOUT,
        fail_open: true,
        status_on_error: STATUS_ON_ERROR,
        body: None,
    };
    Provider::new("ext", Ok(authorizer))
}

#[test]
fn an_authorizer_that_speaks_http_is_asked_of_nothing_else() {
    let mut world = shop();
    let custom = AuthorizationPolicy {
        provider: Some("ext".into()),
        ..policy("shop/ask", PolicyAction::Custom, vec![any()])
    };
    put(&mut world, custom);
    provide(&mut world, asked_by(Check::Http(HttpCheck::default())));
    assert_eq!(reason(&world, FRONT, 80), Reason::NeedsCustom);
    let http = |path: &str| Traffic {
        http: Some(Request {
            target: path.into(),
            ..Request::default()
        }),
        ..Traffic::default()
    };
    let word = |traffic: &Traffic| {
        let ending = judge_traffic(&world, &connection(FRONT, 80), traffic, &mut Vec::new());
        (ending.action, ending.reason)
    };
    assert_eq!(word(&http("/")), (Action::Proxy, Reason::NeedsCustom));
    assert_eq!(word(&Traffic::default()), (Action::Deny, Reason::NoAuthorizer));
    for (answer, wanted) in [
        (true, (Action::Allow, Reason::NoPolicy)),
        (false, (Action::Deny, Reason::Unauthorized)),
    ] {
        let answers = [("ext".to_owned(), answer)].into();
        assert_eq!(word(&Traffic { answers, ..http("/") }), wanted);
    }
}

#[test]
fn modes_follow_labels_and_a_pod_can_only_be_stricter() {
    let mode = |namespace: Option<&str>, pod: Option<&str>, over: bool, of: &str| {
        let mut world = shop();
        world.node.default_mode = Mode::Audit;
        world.node.pod_mode_override = over;
        if let Some(mode) = namespace {
            world
                .namespaces
                .insert(of.into(), labels(&[("thyra.io/mode", mode)]));
        }
        change_endpoint(&mut world, |endpoint| {
            endpoint.namespace = of.into();
            if let Some(mode) = pod {
                endpoint.labels.insert("thyra.io/mode".into(), mode.into());
            }
        });
        Compiler::new().compile(&world).unwrap().endpoints[0].mode
    };
    assert_eq!(mode(None, None, false, "shop"), Mode::Audit);
    assert_eq!(mode(Some("enforce"), None, false, "shop"), Mode::Enforce);
    assert_eq!(mode(Some("enforce"), Some("off"), false, "shop"), Mode::Enforce);
    assert_eq!(mode(Some("enforce"), Some("off"), true, "shop"), Mode::Off);
    assert_eq!(mode(Some("off"), Some("enforce"), false, "shop"), Mode::Enforce);
    assert_eq!(mode(None, None, false, "kube-system"), Mode::Off);
    assert_eq!(mode(Some("audit"), None, false, "istio-system"), Mode::Audit);
    assert_eq!(mode(Some("enforced"), None, false, "shop"), Mode::Enforce);
}

#[test]
fn pods_with_a_sidecar_keep_istios_exempt_ports_and_judge_l7_themselves() {
    let mut world = shop();
    put(&mut world, deny("shop/lock", vec![to(ports(&[80, 15020, 9999]))]));
    assert!(!allowed(&world, FRONT, 15020));
    change_endpoint(&mut world, |endpoint| {
        endpoint.containers.push("istio-proxy".into());
        let key = "traffic.sidecar.istio.io/excludeInboundPorts";
        endpoint.annotations.insert(key.into(), "9999".into());
    });
    assert_eq!(reason(&world, FRONT, 15020), Reason::ExemptPort);
    assert_eq!(reason(&world, FRONT, 9999), Reason::ExemptPort);
    assert!(!allowed(&world, FRONT, 80));
    put(&mut world, allow("shop/get", vec![to(get())]));
    assert_eq!(reason(&world, FRONT, 8080), Reason::NotEnforced);
}

#[test]
fn ambient_pods_and_waypoints_are_off_with_the_reason_named() {
    let mut ambient = shop();
    change_endpoint(&mut ambient, |endpoint| {
        endpoint.annotations = labels(&[("ambient.istio.io/redirection", "enabled")]);
    });
    let mut hbone = shop();
    change(&mut hbone, "shop/target", |workload| workload.hbone = true);
    let mut waypoint = shop();
    change_endpoint(&mut waypoint, |endpoint| {
        endpoint.labels = labels(&[("gateway.istio.io/managed", "istio.io-mesh-controller")]);
    });
    for (world, wanted) in [
        (ambient, "ambient pod"),
        (hbone, "ambient pod"),
        (waypoint, "waypoint"),
    ] {
        let mut compiler = Compiler::new();
        let tables = compiler.compile(&world).unwrap();
        assert_eq!(tables.endpoints[0].mode, Mode::Off);
        assert_eq!(compiler.report().endpoints[&1].mode_reason, wanted);
        assert_eq!(reason(&world, FRONT, 80), Reason::NotEnforced);
    }
}

#[test]
fn before_the_first_sync_bootstrap_decides() {
    use thyra_policy_compiler::world::Bootstrap;
    let mut world = shop();
    world.synced = false;
    assert_eq!(reason(&world, FRONT, 80), Reason::Bootstrap);
    world.node.bootstrap = Bootstrap::Allow;
    assert_eq!(reason(&world, FRONT, 80), Reason::BootstrapAllow);
}

#[test]
fn destination_ip_is_judged_by_family() {
    let mut world = shop();
    change_endpoint(&mut world, |endpoint| {
        endpoint.addresses.push("fd00::2".parse().unwrap())
    });
    let rule = Rule {
        when: vec![Condition::DestinationIp(values([
            parse::ip_block("10.0.0.0/8").unwrap()
        ]))],
        ..Rule::default()
    };
    put(&mut world, deny("shop/v4", vec![rule]));
    let tables = Compiler::new().compile(&world).unwrap();
    let endpoint = tables.endpoints[0];
    assert_ne!(endpoint.set4, endpoint.set6);
    assert!(!allowed(&world, OUTSIDER, 80));
    assert_eq!(
        tables.verdict(endpoint.set6, 80, 0).unwrap().action,
        Action::Allow
    );
}

#[test]
fn what_istiod_lists_for_a_pod_and_labels_do_not_select_is_noted() {
    let mut world = shop();
    put(&mut world, deny("shop/lock", vec![]));
    change(&mut world, "shop/target", |workload| {
        let listed = [
            "shop/lock",
            "shop/gone",
            "istio-system/istio_converted_static_strict",
        ];
        workload.authorization_policies = listed.map(str::to_owned).into();
    });
    let mut compiler = Compiler::new();
    compiler.compile(&world).unwrap();
    let notes = &compiler.report().endpoints[&1].notes;
    assert_eq!(notes.len(), 1);
    assert!(notes[0].starts_with("shop/gone: istiod lists it"));
}

/// The way of the connections of `source` at port 8080, which declares HTTP.
fn way(world: &World, source: &str) -> Way {
    let verdict = verdict(world, source, 8080);
    let mut compiler = Compiler::new();
    compiler.compile(world).unwrap();
    compiler.residuals()[&verdict.residual.expect("it needs L7")].way()
}

fn by_connection(policy: AuthorizationPolicy) -> AuthorizationPolicy {
    AuthorizationPolicy {
        l7_verdict: parse::l7_verdict(Some("connection")),
        ..policy
    }
}

#[test]
fn the_first_request_decides_only_where_every_policy_that_has_a_say_wants_it() {
    let gets = |who: &str| Rule {
        from: vec![principal(who)],
        to: vec![get()],
        ..Rule::default()
    };
    let mut world = shop();
    declare(&mut world, "shop/target", 8080, AppProtocol::Http);
    put(
        &mut world,
        by_connection(allow("shop/both", vec![gets(FRONT_ID), gets(CART_ID)])),
    );
    assert_eq!(way(&world, FRONT), Way::HoldHttp);
    let post = Operation {
        methods: values([StringMatch::Exact("POST".into())]),
        ..Operation::default()
    };
    let posts = Rule {
        from: vec![principal(CART_ID)],
        to: vec![post],
        ..Rule::default()
    };
    for other in [
        allow("shop/other", vec![posts.clone()]),
        deny("shop/other", vec![posts]),
    ] {
        put(&mut world, other.clone());
        assert_eq!(way(&world, CART), Way::Inline(Inline::NotAllAlike));
        assert_eq!(way(&world, FRONT), Way::HoldHttp, "it has no say there");
        put(&mut world, by_connection(other));
        assert_eq!(way(&world, CART), Way::HoldHttp);
        world.authorization.remove(&reference("shop/other"));
    }
    // Also where the same is said twice.
    put(&mut world, allow("shop/zzz", vec![gets(CART_ID)]));
    assert_eq!(way(&world, CART), Way::Inline(Inline::NotAllAlike));
}

#[test]
fn an_annotation_that_comes_or_goes_is_another_residual() {
    let mut world = shop();
    declare(&mut world, "shop/target", 8080, AppProtocol::Http);
    let mut compiler = Compiler::new();
    let mut residual = |policy| {
        put(&mut world, policy);
        let tables = compiler.compile(&world).unwrap();
        lookup(&tables, FRONT, 8080).residual
    };
    let policy = allow("shop/get", vec![to(get())]);
    let by_request = residual(policy.clone());
    assert_ne!(residual(by_connection(policy.clone())), by_request);
    assert_eq!(residual(policy.clone()), by_request);
    let unread = AuthorizationPolicy {
        l7_verdict: parse::l7_verdict(Some("Connection")),
        ..policy
    };
    assert_eq!(residual(unread), by_request, "a word that isn't one is none");
}
