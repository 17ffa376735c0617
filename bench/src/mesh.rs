//! The mesh that is measured: many identities, many policies that all select the pods, the last one decides.
//!
//! Invariant: every endpoint is under default-deny, and exactly the last policy lets pod 0 reach the others.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use thyra_datapath_abi::Mode;
use thyra_datapath_abi::tables::PolicyRef;
use thyra_policy_compiler::policy::{
    AuthorizationPolicy, Field, L7Verdict, Operation, PolicyAction, Rule, Source, StringMatch,
};
use thyra_policy_compiler::world::{Endpoint, NodeOptions, Workload, WorkloadKind, World};

use crate::netns::Node;

/// Namespace of everything.
pub(crate) const NAMESPACE: &str = "bench";

/// How large the mesh is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Size {
    /// Pods of this node; pod `i` has endpoint id `i + 1`.
    pub(crate) endpoints: u16,
    /// Workloads with an identity of their own each, the endpoints' included.
    pub(crate) identities: u32,
    /// ALLOW policies, all of which select every endpoint.
    pub(crate) policies: u32,
}

/// A world of this size.
#[must_use]
pub(crate) fn world(size: Size, ports: &[u16]) -> World {
    let mut world = World {
        synced: true,
        ..World::default()
    };
    world.node = NodeOptions {
        name: "bench".into(),
        default_mode: Mode::Enforce,
        ..NodeOptions::default()
    };
    for i in 0..size.identities {
        let workload = workload(i, address(i, size.endpoints));
        world.workloads.insert(workload.uid.clone(), Arc::new(workload));
    }
    for i in 0..size.endpoints {
        world.endpoints.insert(i + 1, Arc::new(endpoint(i)));
    }
    for i in 0..size.policies {
        let policy = policy(i, size, ports);
        world
            .authorization
            .insert(policy.reference.clone(), Arc::new(policy));
    }
    world
}

/// Adds pods of the identities that are there, until there are so many addresses.
pub(crate) fn add_replicas(world: &mut World, size: Size, addresses: u32) {
    for i in size.identities..addresses {
        let mut replica = workload(i, address(i, size.endpoints));
        replica.service_account = format!("sa-{}", i % size.identities);
        world.workloads.insert(replica.uid.clone(), Arc::new(replica));
    }
}

/// Spreads so many CIDR blocks over the policies.
pub(crate) fn add_blocks(world: &mut World, blocks: u32) {
    let policies = u32::try_from(world.authorization.len())
        .unwrap_or(u32::MAX)
        .max(1);
    for (at, policy) in (0..policies).zip(world.authorization.values_mut()) {
        let values = (at..blocks)
            .step_by(usize::try_from(policies).unwrap_or(1))
            .filter_map(|i| {
                let network = Ipv4Addr::from(0xac10_0000 + i * 16);
                Ipv4Net::new(network, 28).ok().map(IpNet::V4)
            });
        let source = Source {
            ip_blocks: Field {
                values: values.collect(),
                not_values: Vec::new(),
            },
            ..Source::default()
        };
        if source.ip_blocks.is_empty() {
            continue;
        }
        for rule in &mut Arc::make_mut(policy).rules {
            rule.from.push(source.clone());
        }
    }
}

/// Address of workload `i`: the node's pods first, the rest of the mesh elsewhere.
#[must_use]
pub(crate) fn address(i: u32, endpoints: u16) -> Ipv4Addr {
    if i < u32::from(endpoints) {
        return Node::address(usize::try_from(i).unwrap_or(usize::MAX));
    }
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 32, 0, 0)) + i)
}

/// Principal of workload `i`.
#[must_use]
pub(crate) fn principal(i: u32) -> String {
    format!("cluster.local/ns/{NAMESPACE}/sa/sa-{i}")
}

fn workload(i: u32, address: Ipv4Addr) -> Workload {
    Workload {
        uid: format!("Kubernetes//Pod/{NAMESPACE}/w-{i}").into(),
        kind: WorkloadKind::Pod,
        name: format!("w-{i}"),
        namespace: NAMESPACE.into(),
        addresses: vec![IpAddr::V4(address)],
        network: String::new(),
        trust_domain: "cluster.local".into(),
        service_account: format!("sa-{i}"),
        node: "bench".into(),
        host_network: false,
        healthy: true,
        hbone: false,
        services: BTreeMap::new(),
        authorization_policies: Vec::new(),
    }
}

fn endpoint(i: u16) -> Endpoint {
    Endpoint {
        id: i + 1,
        uid: format!("uid-{i}"),
        namespace: NAMESPACE.into(),
        name: format!("w-{i}"),
        service_account: format!("sa-{i}"),
        addresses: vec![IpAddr::V4(address(u32::from(i), u16::MAX))],
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        containers: Vec::new(),
    }
}

/// Policy `i` allows its share of the identities; workload 0 is in the last one's share alone, and its last value.
#[must_use]
pub(crate) fn policy(i: u32, size: Size, ports: &[u16]) -> AuthorizationPolicy {
    let last = i + 1 == size.policies;
    let share = (1..size.identities).filter(|w| w % size.policies == i);
    let values = share
        .chain(last.then_some(0))
        .map(|w| StringMatch::Exact(principal(w)))
        .collect();
    AuthorizationPolicy {
        reference: PolicyRef {
            namespace: NAMESPACE.into(),
            name: format!("allow-{i:04}").into(),
        },
        version: "1".into(),
        action: PolicyAction::Allow,
        provider: None,
        selector: None,
        has_target_refs: false,
        dry_run: false,
        l7_verdict: L7Verdict::Request,
        rules: vec![Rule {
            from: vec![Source {
                principals: Field {
                    values,
                    not_values: Vec::new(),
                },
                ..Source::default()
            }],
            to: vec![Operation {
                ports: Field {
                    values: ports.to_vec(),
                    not_values: Vec::new(),
                },
                ..Operation::default()
            }],
            ..Rule::default()
        }],
        unknown: Vec::new(),
    }
}
