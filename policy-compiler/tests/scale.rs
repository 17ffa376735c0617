//! Size: what does not fit is refused by name, sharing works, and a change costs little.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use thyra_datapath_abi::Mode;
use thyra_datapath_abi::limits;
use thyra_datapath_abi::tables::PolicyRef;
use thyra_policy_compiler::compile::{CompileError, Compiler};
use thyra_policy_compiler::policy::{
    AuthorizationPolicy, Field, L7Verdict, Labels, Operation, PolicyAction, Rule, Source, StringMatch,
};
use thyra_policy_compiler::world::{Endpoint, Workload, WorkloadKind, World};

/// Far above what an unoptimised build needs on a busy machine: this is for runaway growth.
const ROOM: Duration = Duration::from_secs(60);

fn workload(number: u32) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/ns-{}/w{number}", number % 20).into(),
        kind: WorkloadKind::Pod,
        name: format!("w{number}"),
        namespace: format!("ns-{}", number % 20),
        addresses: vec![IpAddr::V4(Ipv4Addr::from(0x0a80_0000 + number))],
        network: String::new(),
        trust_domain: "cluster.local".into(),
        service_account: format!("sa-{number}"),
        node: String::new(),
        host_network: false,
        healthy: true,
        hbone: false,
        services: BTreeMap::new(),
        authorization_policies: Vec::new(),
    }
}

/// Rules with principals, namespaces and ports, all different from number to number.
fn policy(number: u32) -> AuthorizationPolicy {
    let principals = (0..5).map(|i| {
        let identity = number * 7 + i;
        StringMatch::Exact(format!("cluster.local/ns/ns-{}/sa/sa-{identity}", identity % 20))
    });
    let source = Source {
        principals: Field {
            values: principals.collect(),
            not_values: Vec::new(),
        },
        ..Source::default()
    };
    let operation = Operation {
        ports: Field {
            values: vec![u16::try_from(8000 + number % 10).unwrap()],
            not_values: Vec::new(),
        },
        ..Operation::default()
    };
    AuthorizationPolicy {
        reference: PolicyRef {
            namespace: "ns-0".into(),
            name: format!("p{number}").into(),
        },
        version: String::new(),
        action: if number.is_multiple_of(4) {
            PolicyAction::Deny
        } else {
            PolicyAction::Allow
        },
        provider: None,
        selector: None,
        has_target_refs: false,
        dry_run: false,
        l7_verdict: L7Verdict::Request,
        rules: vec![Rule {
            from: vec![source],
            to: vec![operation],
            ..Rule::default()
        }],
        unknown: Vec::new(),
    }
}

fn endpoint(id: u16) -> Endpoint {
    let address = Ipv4Addr::from(0x0af4_0000 + u32::from(id));
    Endpoint {
        id,
        uid: format!("{id}"),
        namespace: "ns-0".into(),
        name: format!("pod-{id}"),
        service_account: "default".into(),
        addresses: vec![IpAddr::V4(address)],
        labels: Labels::from([("app".to_owned(), format!("a{id}"))]),
        annotations: Labels::new(),
        containers: Vec::new(),
    }
}

fn put(world: &mut World, policy: AuthorizationPolicy) {
    world
        .authorization
        .insert(policy.reference.clone(), Arc::new(policy));
}

fn world(endpoints: u16, identities: u32, policies: u32) -> World {
    let mut world = World {
        synced: true,
        ..World::default()
    };
    world.node.default_mode = Mode::Enforce;
    world.node.pod_ranges = vec!["10.244.0.0/16".parse().unwrap()];
    for number in 0..identities {
        let workload = workload(number);
        world
            .workloads
            .insert(Arc::clone(&workload.uid), Arc::new(workload));
    }
    for number in 0..policies {
        put(&mut world, policy(number));
    }
    for id in 1..=endpoints {
        world.endpoints.insert(id, Arc::new(endpoint(id)));
    }
    world
}

fn timed<T>(what: &str, run: impl FnOnce() -> T) -> T {
    let start = Instant::now();
    let result = run();
    let took = start.elapsed();
    println!("{what}: {took:?}");
    assert!(took < ROOM, "{what} took {took:?}");
    result
}

#[test]
fn replicas_share_one_policy_set_and_identities_share_columns() {
    let world = world(50, 1000, 100);
    let tables = Compiler::new().compile(&world).unwrap();
    assert_eq!(tables.sets.len(), 1);
    assert_eq!(tables.port_classes, 11);
    assert!(tables.classes.len() > 1000);
    assert!(usize::from(tables.columns) < 600, "{}", tables.columns);
}

#[test]
fn a_change_costs_little() {
    for (endpoints, identities) in [(50, 1_000), (250, 10_000)] {
        let mut world = world(endpoints, identities, 100);
        let mut compiler = Compiler::new();
        println!("{endpoints} endpoints, {identities} identities, 100 policies");
        timed("  full", || compiler.compile(&world)).unwrap();
        timed("  nothing changed", || compiler.compile(&world)).unwrap();
        put(
            &mut world,
            AuthorizationPolicy {
                action: PolicyAction::Deny,
                ..policy(3)
            },
        );
        timed("  one policy", || compiler.compile(&world)).unwrap();
        let added = workload(identities + 1);
        world.workloads.insert(Arc::clone(&added.uid), Arc::new(added));
        timed("  one workload", || compiler.compile(&world)).unwrap();
        let selected = AuthorizationPolicy {
            selector: Some(Labels::from([("app".to_owned(), "a7".to_owned())])),
            ..policy(500)
        };
        put(&mut world, selected);
        timed("  a policy that parts the endpoints", || compiler.compile(&world)).unwrap();
    }
}

#[test]
fn too_many_identities_are_refused_by_name() {
    let world = world(1, u32::try_from(limits::MAX_CLASSES).unwrap() + 1, 1);
    let error = Compiler::new().compile(&world).unwrap_err();
    let CompileError::TooMany { what, limit, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!((*what, *limit), ("source classes", limits::MAX_CLASSES));
}

#[test]
fn too_many_ports_are_refused_by_name() {
    let mut world = world(1, 1, 0);
    for port in 0..u16::try_from(limits::MAX_PORT_CLASSES).unwrap() {
        let mut own = policy(u32::from(port));
        own.action = PolicyAction::Allow;
        own.rules[0].from = Vec::new();
        own.rules[0].to[0].ports.values = vec![port + 1];
        put(&mut world, own);
    }
    let error = Compiler::new().compile(&world).unwrap_err().to_string();
    assert!(
        error.contains("port classes don't fit, the limit is 1024 at port"),
        "{error}"
    );
}

#[test]
fn too_many_columns_are_refused_by_name() {
    let count = u32::try_from(limits::MAX_COLUMNS).unwrap() + 1;
    let mut world = world(1, count, 0);
    for number in 0..count {
        let mut own = policy(number);
        own.action = PolicyAction::Allow;
        own.rules[0].to = Vec::new();
        let account = format!("cluster.local/ns/ns-{}/sa/sa-{number}", number % 20);
        own.rules[0].from[0].principals.values = vec![StringMatch::Exact(account)];
        put(&mut world, own);
    }
    let error = Compiler::new().compile(&world).unwrap_err().to_string();
    assert!(error.contains("columns don't fit, the limit is 1023"), "{error}");
}

#[test]
fn a_refused_world_leaves_the_compiler_fit_for_the_next() {
    let good = world(2, 10, 3);
    let mut compiler = Compiler::new();
    let before = compiler.compile(&good).unwrap();
    let report = compiler.report().clone();
    let too_big = world(1, u32::try_from(limits::MAX_CLASSES).unwrap() + 1, 1);
    assert!(compiler.compile(&too_big).is_err());
    assert_eq!(*compiler.report(), report);
    let after = compiler.compile(&good).unwrap();
    assert_eq!(before.endpoints, after.endpoints);
    assert_eq!(before.rows.len(), after.rows.len());
}
