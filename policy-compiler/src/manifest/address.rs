//! Addresses of nodes, pods and Services where nothing gives real ones: what the lab builds and a dry run
//! assumes.
//!
//! Invariant: deterministic for the same manifests; declared addresses are honoured, and no address is given
//! twice.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::object::{Body, Pod, Service, ServiceKind};
use super::{Location, ManifestError, Manifests};
use crate::finding::Code;

/// Most nodes of a plan.
const MAX_NODES: usize = 16;
/// First and last host number of a node's pods; .1 is the gateway.
const FIRST_POD: u16 = 2;
const LAST_POD: u16 = 254;
/// First host number of a Service; 10.96.0.1 is the API server's own.
const FIRST_SERVICE: u16 = 10;

/// Who has which address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Nodes, by index.
    pub nodes: Vec<NodePlan>,
    /// Pods, by `namespace/name`.
    pub pods: BTreeMap<String, PodPlan>,
    /// VIPs of Services, by `namespace/name`; none for headless ones and external names.
    pub services: BTreeMap<String, Vec<IpAddr>>,
}

/// A node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePlan {
    /// Name: a Node object's, a pod's `nodeName`, or `node-<index>`.
    pub name: String,
    /// 10.200.0.(index + 1) and fd00:200::(index + 1).
    pub addresses: [IpAddr; 2],
}

/// A pod's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodPlan {
    /// Index of its node.
    pub node: usize,
    /// Its addresses; of a host-network pod the node's.
    pub addresses: Vec<IpAddr>,
}

impl PodPlan {
    /// Its IPv4 address.
    #[must_use]
    pub fn v4(&self) -> Option<Ipv4Addr> {
        self.addresses
            .iter()
            .find_map(|a| if let IpAddr::V4(a) = a { Some(*a) } else { None })
    }

    /// Its IPv6 address.
    #[must_use]
    pub fn v6(&self) -> Option<Ipv6Addr> {
        self.addresses
            .iter()
            .find_map(|a| if let IpAddr::V6(a) = a { Some(*a) } else { None })
    }
}

/// What can't be laid out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Two objects make a pod of one name.
    #[error("{0}")]
    Manifest(ManifestError),
    /// Too many pods on a node.
    #[error("node `{0}` has no address left; a node has at most 253 pods")]
    NodeFull(String),
    /// Too many nodes.
    #[error("{0} nodes are more than {MAX_NODES}")]
    TooManyNodes(usize),
    /// Too many Services.
    #[error("more Services than addresses in 10.96.0.0/16")]
    ServicesFull,
}

/// The address block of a node's pods: 10.244.N.0/24 and fd00:10:244:N::/64; `host` is the last number.
fn pod_addresses(node: u8, host: u16) -> Option<[IpAddr; 2]> {
    let last = u8::try_from(host).ok()?;
    Some([
        Ipv4Addr::new(10, 244, node, last).into(),
        Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, host).into(),
    ])
}

fn node_addresses(index: u8) -> [IpAddr; 2] {
    let host = index.saturating_add(1);
    [
        Ipv4Addr::new(10, 200, 0, host).into(),
        Ipv6Addr::new(0xfd00, 0x200, 0, 0, 0, 0, 0, host.into()).into(),
    ]
}

fn service_addresses(host: u16) -> [IpAddr; 2] {
    let [high, low] = host.to_be_bytes();
    [
        Ipv4Addr::new(10, 96, high, low).into(),
        Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, host).into(),
    ]
}

/// Lays `manifests` out on at least `nodes` nodes.
///
/// # Errors
/// Two pods of one name, or more of anything than there are addresses.
pub fn addresses(manifests: &Manifests, nodes: usize) -> Result<Plan, PlanError> {
    let mut plan = Plan {
        nodes: node_plans(manifests, nodes)?,
        ..Plan::default()
    };
    let places = pod_places(manifests, &plan)?;
    let mut taken: BTreeSet<IpAddr> = places
        .iter()
        .flat_map(|(_, _, pod)| pod.addresses.iter().copied())
        .collect();
    let mut next = vec![FIRST_POD; plan.nodes.len()];
    for (name, node, pod) in places {
        let addresses = if pod.host_network {
            plan.nodes
                .get(node)
                .map(|n| n.addresses.to_vec())
                .unwrap_or_default()
        } else if pod.addresses.is_empty() {
            let full =
                || PlanError::NodeFull(plan.nodes.get(node).map(|n| n.name.clone()).unwrap_or_default());
            let host = next.get_mut(node).ok_or_else(full)?;
            free_pod(node, host, &mut taken).ok_or_else(full)?
        } else {
            pod.addresses.clone()
        };
        plan.pods.insert(name, PodPlan { node, addresses });
    }
    plan.services = service_plans(manifests)?;
    Ok(plan)
}

fn free_pod(node: usize, host: &mut u16, taken: &mut BTreeSet<IpAddr>) -> Option<Vec<IpAddr>> {
    let node = u8::try_from(node).ok()?;
    while *host <= LAST_POD {
        let pair = pod_addresses(node, *host)?;
        *host += 1;
        if !pair.iter().any(|a| taken.contains(a)) {
            taken.extend(pair);
            return Some(pair.to_vec());
        }
    }
    None
}

fn node_plans(manifests: &Manifests, least: usize) -> Result<Vec<NodePlan>, PlanError> {
    let mut names: Vec<String> = Vec::new();
    let declared = manifests
        .objects
        .iter()
        .filter(|o| matches!(o.body, Body::Node(_)))
        .map(|o| o.name.clone());
    let named = manifests.pods().filter_map(|pod| pod.node_name.clone());
    for name in declared.chain(named) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    for index in names.len()..least.max(1) {
        names.push(format!("node-{index}"));
    }
    if names.len() > MAX_NODES {
        return Err(PlanError::TooManyNodes(names.len()));
    }
    let plans = names.into_iter().zip(0u8..);
    Ok(plans
        .map(|(name, index)| NodePlan {
            name,
            addresses: node_addresses(index),
        })
        .collect())
}

/// A pod, its name and the index of its node.
type Place<'m> = (String, usize, &'m Pod);

/// Each pod with its place; a pod that names no node is on the first.
fn pod_places<'m>(manifests: &'m Manifests, plan: &Plan) -> Result<Vec<Place<'m>>, PlanError> {
    let mut places = Vec::new();
    let mut first: BTreeMap<String, &Location> = BTreeMap::new();
    for object in &manifests.objects {
        let Body::Pod(Some(pod)) = &object.body else {
            continue;
        };
        let name = format!("{}/{}", pod.namespace, pod.name);
        if let Some(other) = first.insert(name.clone(), &object.at) {
            let text = format!(
                "{} makes a second pod `{name}`, first at {other}; rename one",
                object.kind
            );
            return Err(PlanError::Manifest(ManifestError {
                at: object.at.clone(),
                code: Code::NoPlan,
                text,
            }));
        }
        let node = pod
            .node_name
            .as_ref()
            .and_then(|name| plan.nodes.iter().position(|n| n.name == *name));
        places.push((name, node.unwrap_or(0), &**pod));
    }
    Ok(places)
}

fn service_plans(manifests: &Manifests) -> Result<BTreeMap<String, Vec<IpAddr>>, PlanError> {
    let mut taken: BTreeSet<IpAddr> = manifests
        .services()
        .flat_map(|service| service.cluster_addresses.iter().copied())
        .collect();
    let mut host = FIRST_SERVICE;
    let mut plans = BTreeMap::new();
    for service in manifests.services() {
        let mut addresses = Vec::new();
        if !matches!(service.kind, ServiceKind::Headless | ServiceKind::ExternalName) {
            addresses.clone_from(&service.cluster_addresses);
            let missing = missing_families(service);
            if missing != (false, false) {
                let [v4, v6] = free_service(&mut host, &mut taken)?;
                addresses.extend(missing.0.then_some(v4));
                addresses.extend(missing.1.then_some(v6));
            }
        }
        plans.insert(format!("{}/{}", service.namespace, service.name), addresses);
    }
    Ok(plans)
}

/// The families that it may have and declares no address of.
fn missing_families(service: &Service) -> (bool, bool) {
    let has = |v4: bool| service.cluster_addresses.iter().any(|a| a.is_ipv4() == v4);
    (
        service.families.0 && !has(true),
        service.families.1 && !has(false),
    )
}

fn free_service(host: &mut u16, taken: &mut BTreeSet<IpAddr>) -> Result<[IpAddr; 2], PlanError> {
    loop {
        let pair = service_addresses(*host);
        *host = host.checked_add(1).ok_or(PlanError::ServicesFull)?;
        if !pair.iter().any(|a| taken.contains(a)) {
            taken.extend(pair);
            return Ok(pair);
        }
    }
}

/// The name that istiod gives a Service.
pub(super) fn hostname(service: &Service) -> Arc<str> {
    format!("{}.{}.svc.cluster.local", service.name, service.namespace).into()
}
