//! What the compiler keeps from one compile to the next, and what it drops.

use thyra_datapath_abi::Mode;

use super::*;
use crate::manifest;
use crate::world::{NodeOptions, Workload};

const CART: &str = "
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, labels: {app: cart}}
spec: {serviceAccountName: cart, containers: [{name: app}]}
status: {podIPs: [{ip: 10.0.0.1}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {selector: {app: cart}, clusterIP: 10.96.0.1, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: stays, namespace: shop}
spec: {rules: [{from: [{source: {namespaces: [ops]}}]}]}
";

fn shop() -> World {
    let options = NodeOptions {
        default_mode: Mode::Enforce,
        ..NodeOptions::default()
    };
    let manifests = manifest::read_str("world.yaml", CART).unwrap();
    manifest::world(&manifests, options).unwrap()
}

/// A policy like the one that stays, under another name.
fn put(world: &mut World, name: &str) -> PolicyRef {
    let stays = world.authorization.values().next().unwrap();
    let mut policy = AuthorizationPolicy::clone(stays);
    policy.reference.name = name.into();
    let reference = policy.reference.clone();
    world.authorization.insert(reference.clone(), Arc::new(policy));
    reference
}

#[test]
fn a_policy_that_is_deleted_leaves_nothing_behind() {
    let (mut world, mut compiler) = (shop(), Compiler::new());
    for at in 0..100 {
        let churned = put(&mut world, &format!("churned-{at}"));
        compiler.compile(&world).unwrap();
        assert_eq!(2, compiler.prepared.len());
        world.authorization.remove(&churned);
    }
    compiler.compile(&world).unwrap();
    assert_eq!(1, compiler.prepared.len());
}

#[test]
fn a_policy_that_stays_is_made_ready_once() {
    let (mut world, mut compiler) = (shop(), Compiler::new());
    compiler.compile(&world).unwrap();
    let stays = world.authorization.keys().next().unwrap().clone();
    let before = Arc::clone(&compiler.prepared[&stays].1);
    put(&mut world, "another");
    compiler.compile(&world).unwrap();
    assert!(Arc::ptr_eq(&before, &compiler.prepared[&stays].1));
}

#[test]
fn protocols_are_those_of_the_last_compile_even_when_the_rest_is_forgotten() {
    let (mut world, mut compiler) = (shop(), Compiler::new());
    let cart = world.workloads.values().next().unwrap().clone();
    // More identities than are worth keeping once their pods are gone.
    for at in 0_u8..=255 {
        for beside in 0_u8..5 {
            let mut workload = Workload::clone(&cart);
            workload.uid = format!("pod-{beside}-{at}").into();
            workload.name = workload.uid.to_string();
            workload.service_account = workload.name.clone();
            workload.addresses = vec![IpAddr::from([10, 1, beside, at])];
            world.workloads.insert(workload.uid.clone(), Arc::new(workload));
        }
    }
    compiler.compile(&world).unwrap();
    let before = Arc::clone(compiler.protocols());
    let declared = before[&1].get(&8080).copied();
    assert!(declared.is_some_and(|declared| declared.http));
    world.workloads.retain(|uid, _| *uid == cart.uid);
    compiler.compile(&world).unwrap();
    assert!(compiler.kept.is_none(), "the compiler was to start afresh");
    assert_eq!(&before, compiler.protocols());
}
