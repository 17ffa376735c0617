//! What a pod that comes or goes changes when the compiler moves addresses only, and where it must not.

use std::sync::Arc;

use thyra_datapath_abi::tables::Tables;
use thyra_datapath_abi::{Action, Mode, Reason};
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::manifest;
use thyra_policy_compiler::world::{AppProtocol, NodeOptions, World};

const CART: &str = "
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, labels: {app: cart}}
spec: {serviceAccountName: cart, containers: [{name: app}]}
status: {podIPs: [{ip: 10.0.0.1}]}
";
const ONLY_OPS: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: only-ops, namespace: shop}
spec: {rules: [{from: [{source: {namespaces: [ops]}}]}]}
";
const NO_GET: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: no-get, namespace: shop}
spec: {action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]}
";

const SERVICE: &str = "
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {selector: {app: cart}, clusterIP: 10.96.0.1, ports: [{name: main, port: 80, targetPort: 80}]}
";

fn pod(namespace: &str, name: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{serviceAccountName: {name}, nodeName: elsewhere, containers: [{{name: app}}]}}\n\
         status: {{podIPs: [{{ip: {address}}}]}}\n"
    )
}

/// The world of these files; what is as it was in `before` is the same object.
fn world(parts: &[&str], before: Option<&World>) -> World {
    let options = NodeOptions {
        default_mode: Mode::Enforce,
        ..NodeOptions::default()
    };
    let manifests = manifest::read_str("world.yaml", &parts.join("---\n")).unwrap();
    let mut world = manifest::world(&manifests, options).unwrap();
    // Only `cart` is of this node.
    world.endpoints.retain(|_, endpoint| endpoint.name == "cart");
    let Some(before) = before else { return world };
    let mut workloads = before.workloads.clone();
    workloads.retain(|uid, _| world.workloads.contains_key(uid));
    for (uid, workload) in world.workloads.iter() {
        if workloads.get(uid) != Some(workload) {
            workloads.insert(uid.clone(), workload.clone());
        }
    }
    World {
        workloads,
        services: world.services,
        ..before.clone()
    }
}

fn action(tables: &Tables, source: &str) -> (Action, Reason) {
    let class = tables.class_of(source.parse().unwrap());
    let verdict = tables.verdict(tables.endpoints[0].set4, 80, class).unwrap();
    (verdict.action, verdict.reason)
}

fn moved_only(before: &Tables, after: &Tables) -> bool {
    Arc::ptr_eq(&before.rows, &after.rows)
}

#[test]
fn a_pod_of_a_known_kind_moves_addresses_only() {
    let (one, two) = (pod("ops", "one", "10.0.1.1"), pod("ops", "two", "10.0.1.2"));
    let before = world(&[CART, ONLY_OPS, &one], None);
    let after = world(&[CART, ONLY_OPS, &one, &two], Some(&before));
    let mut compiler = Compiler::new();
    let tables = compiler.compile(&before).unwrap();
    assert_eq!(action(&tables, "10.0.1.2").0, Action::Deny);
    let more = compiler.compile(&after).unwrap();
    assert!(moved_only(&tables, &more));
    assert_eq!(action(&more, "10.0.1.2").0, Action::Allow);
    let again = compiler.compile(&before).unwrap();
    assert!(moved_only(&tables, &again));
    assert_eq!(action(&again, "10.0.1.2").0, Action::Deny);
    assert_eq!(action(&again, "10.0.1.1").0, Action::Allow);
}

#[test]
fn a_pod_unlike_all_others_is_judged_by_all_policies() {
    let (other, ops) = (pod("lab", "other", "10.0.1.1"), pod("ops", "one", "10.0.1.2"));
    let before = world(&[CART, ONLY_OPS, &other], None);
    let after = world(&[CART, ONLY_OPS, &other, &ops], Some(&before));
    let mut compiler = Compiler::new();
    let tables = compiler.compile(&before).unwrap();
    let more = compiler.compile(&after).unwrap();
    assert!(!moved_only(&tables, &more));
    assert_eq!(action(&more, "10.0.1.2").0, Action::Allow);
}

#[test]
fn a_pod_that_takes_the_class_of_one_that_went_is_judged_as_itself() {
    let (one, two) = (pod("ops", "one", "10.0.1.1"), pod("ops", "two", "10.0.1.2"));
    let other = pod("lab", "other", "10.0.1.3");
    let first = world(&[CART, ONLY_OPS, &one, &other], None);
    let second = world(&[CART, ONLY_OPS, &one], Some(&first));
    let third = world(&[CART, ONLY_OPS, &one, &two], Some(&second));
    let mut compiler = Compiler::new();
    let tables = compiler.compile(&first).unwrap();
    let gone = tables.class_of("10.0.1.3".parse().unwrap());
    compiler.compile(&second).unwrap();
    let last = compiler.compile(&third).unwrap();
    assert_eq!(
        last.class_of("10.0.1.2".parse().unwrap()),
        gone,
        "the number is used again"
    );
    assert_eq!(action(&last, "10.0.1.2").0, Action::Allow);
}

#[test]
fn a_policy_that_changes_alone_leaves_the_classes_and_judges_them_anew() {
    let (one, other) = (pod("ops", "one", "10.0.1.1"), pod("lab", "other", "10.0.1.2"));
    let before = world(&[CART, ONLY_OPS, &one, &other], None);
    let only_lab = ONLY_OPS.replace("[ops]", "[lab]");
    let after = World {
        authorization: world(&[CART, &only_lab], None).authorization,
        ..before.clone()
    };
    let mut compiler = Compiler::new();
    let tables = compiler.compile(&before).unwrap();
    assert_eq!(action(&tables, "10.0.1.1").0, Action::Allow);
    let changed = compiler.compile(&after).unwrap();
    assert!(
        Arc::ptr_eq(&tables.addresses, &changed.addresses),
        "the same classes"
    );
    assert_eq!(action(&changed, "10.0.1.1").0, Action::Deny);
    assert_eq!(action(&changed, "10.0.1.2").0, Action::Allow);
}

#[test]
fn a_policy_and_a_pod_that_come_together_are_both_seen() {
    let (one, two) = (pod("ops", "one", "10.0.1.1"), pod("ops", "two", "10.0.1.2"));
    let before = world(&[CART, &one], None);
    let after = World {
        authorization: world(&[CART, ONLY_OPS], None).authorization,
        ..world(&[CART, &one, &two], Some(&before))
    };
    let mut compiler = Compiler::new();
    compiler.compile(&before).unwrap();
    let both = compiler.compile(&after).unwrap();
    assert_eq!(action(&both, "10.0.1.2").0, Action::Allow);
    assert_eq!(action(&both, "10.0.1.3").0, Action::Deny);
}

/// As istiod tells it: the protocol stands with the Service, not with the pod's workload.
fn declare(world: &mut World, protocol: AppProtocol) {
    for service in world.services.values_mut() {
        for port in &mut Arc::make_mut(service).ports {
            port.protocol = protocol;
        }
    }
}

#[test]
fn a_service_that_declares_another_protocol_changes_verdicts() {
    let mut first = world(&[CART, NO_GET, SERVICE], None);
    let mut workload = (**first.workloads.values().next().unwrap()).clone();
    for port in workload.services.values_mut().flatten() {
        port.protocol = AppProtocol::Unknown;
    }
    first.workloads.insert(workload.uid.clone(), Arc::new(workload));
    let mut second = first.clone();
    declare(&mut first, AppProtocol::NotHttp);
    declare(&mut second, AppProtocol::Http);
    let mut compiler = Compiler::new();
    let reason = |tables: &Tables| action(tables, "10.9.9.9").1;
    // A DENY rule is read without its HTTP fields where there is no request (statement 20).
    assert_eq!(reason(&compiler.compile(&first).unwrap()), Reason::PolicyDeny);
    assert_eq!(reason(&compiler.compile(&second).unwrap()), Reason::NeedsL7);
}
