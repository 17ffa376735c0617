//! Manifests to a `World`: what istiod would tell of these objects, for dry runs and the files source.
//!
//! Invariant: nothing is added that the manifests don't say but addresses (`addresses`) and Istio's defaults.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::address::{Plan, PlanError, addresses, hostname};
use super::object::{Body, Object, Pod, Service, Transport, WorkloadEntry};
use super::{ManifestError, Manifests};
use crate::world::{
    Endpoint, Mesh, NodeOptions, Service as WorldService, ServicePort, Workload, WorkloadKind, World,
};
use thyra_datapath_abi::limits::MAX_ENDPOINTS;
use thyra_datapath_abi::tables::PolicyRef;

/// The address ranges of a plan's pods.
const POD_RANGES: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];

/// Why there is no world.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WorldError {
    /// Addresses can't be given.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// More pods than a node may enforce.
    #[error("{0} pods on one node are more than {most}", most = MAX_ENDPOINTS - 1)]
    TooManyEndpoints(usize),
    /// A second MeshConfig.
    #[error("{0}")]
    Manifest(ManifestError),
}

/// The world of `manifests` as node `node.name` sees it; with an empty name every pod is an endpoint. Pod
/// ranges and node addresses are those of the plan unless `node` names its own.
///
/// # Errors
/// See [`WorldError`].
pub fn world(manifests: &Manifests, mut node: NodeOptions) -> Result<World, WorldError> {
    let plan = addresses(manifests, 1)?;
    let mesh = mesh(manifests);
    if node.pod_ranges.is_empty() {
        node.pod_ranges = POD_RANGES.iter().filter_map(|range| range.parse().ok()).collect();
    }
    if node.node_addresses.is_empty() {
        node.node_addresses = plan.nodes.iter().flat_map(|n| n.addresses).collect();
    }
    let mut world = World {
        mesh,
        node,
        synced: true,
        ..World::default()
    };
    for object in &manifests.objects {
        add(object, &plan, manifests, &mut world);
    }
    world.endpoints = endpoints(manifests, &plan, &world.node.name)?;
    Ok(world)
}

/// The mesh settings: the ConfigMap's, or Istio's defaults.
#[must_use]
pub fn mesh(manifests: &Manifests) -> Mesh {
    let found = manifests.objects.iter().find_map(|object| match &object.body {
        Body::MeshConfig(mesh) => Some(mesh.clone()),
        _ => None,
    });
    found.unwrap_or_default()
}

fn add(object: &Object, plan: &Plan, manifests: &Manifests, world: &mut World) {
    let reference = || PolicyRef {
        namespace: object.namespace.as_str().into(),
        name: object.name.as_str().into(),
    };
    match &object.body {
        Body::Namespace(namespace) => {
            world
                .namespaces
                .insert(object.name.clone(), namespace.labels.clone());
        }
        Body::Pod(Some(pod)) => {
            let workload = pod_workload(pod, plan, manifests, &world.mesh, &world.node.network);
            world.workloads.insert(workload.uid.clone(), Arc::new(workload));
        }
        Body::Service(service) => {
            let service = world_service(service, plan);
            world.services.insert(
                service_key(&service.namespace, &service.hostname),
                Arc::new(service),
            );
        }
        Body::WorkloadEntry(entry) => {
            let workload = entry_workload(object, entry, &world.mesh, &world.node.network);
            world.workloads.insert(workload.uid.clone(), Arc::new(workload));
        }
        Body::AuthorizationPolicy(policy) => {
            world.authorization.insert(reference(), Arc::new(policy.clone()));
        }
        Body::PeerAuthentication(policy) => {
            world
                .peer_authentication
                .insert(reference(), Arc::new(policy.clone()));
        }
        Body::RequestAuthentication(policy) => {
            world
                .request_authentication
                .insert(reference(), Arc::new(policy.clone()));
        }
        Body::ServiceAccount | Body::Node(_) | Body::Pod(None) | Body::MeshConfig(_) => {}
    }
}

fn service_key(namespace: &str, hostname: &str) -> Arc<str> {
    format!("{namespace}/{hostname}").into()
}

fn pod_workload(pod: &Pod, plan: &Plan, manifests: &Manifests, mesh: &Mesh, network: &str) -> Workload {
    let place = plan.pods.get(&format!("{}/{}", pod.namespace, pod.name));
    let node = place.and_then(|p| plan.nodes.get(p.node));
    let mut services = BTreeMap::new();
    for service in manifests.services().filter(|service| service.selects(pod)) {
        services.insert(
            service_key(&service.namespace, &hostname(service)),
            pod_ports(service, pod),
        );
    }
    Workload {
        uid: format!("Kubernetes//Pod/{}/{}", pod.namespace, pod.name).into(),
        kind: WorkloadKind::Pod,
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        addresses: place.map(|p| p.addresses.clone()).unwrap_or_default(),
        network: network.to_owned(),
        trust_domain: mesh.trust_domain.clone(),
        service_account: pod.service_account.clone(),
        node: node.map(|n| n.name.clone()).unwrap_or_default(),
        host_network: pod.host_network,
        healthy: true,
        hbone: pod
            .annotations
            .get("ambient.istio.io/redirection")
            .is_some_and(|v| v == "enabled"),
        services,
        authorization_policies: Vec::new(),
    }
}

/// The TCP ports of a Service on one of its pods; 0 where the pod declares no port of the target's name.
fn pod_ports(service: &Service, pod: &Pod) -> Vec<ServicePort> {
    let tcp = service
        .ports
        .iter()
        .filter(|port| port.transport == Transport::Tcp);
    tcp.map(|port| ServicePort {
        port: port.port,
        target_port: port.target.port_of(pod, port.transport).unwrap_or(0),
        protocol: port.protocol,
    })
    .collect()
}

fn world_service(service: &Service, plan: &Plan) -> WorldService {
    let name = format!("{}/{}", service.namespace, service.name);
    let tcp = service
        .ports
        .iter()
        .filter(|port| port.transport == Transport::Tcp);
    let ports = tcp.map(|port| ServicePort {
        port: port.port,
        target_port: match port.target {
            super::object::Target::Port(number) => number,
            super::object::Target::Name(_) => 0,
        },
        protocol: port.protocol,
    });
    let mut addresses: Vec<IpAddr> = plan.services.get(&name).cloned().unwrap_or_default();
    addresses.extend(&service.external_addresses);
    WorldService {
        name: service.name.clone(),
        namespace: service.namespace.clone(),
        hostname: hostname(service).to_string(),
        addresses,
        ports: ports.collect(),
    }
}

fn entry_workload(object: &Object, entry: &WorkloadEntry, mesh: &Mesh, network: &str) -> Workload {
    let (namespace, name) = (&object.namespace, &object.name);
    Workload {
        uid: format!("Kubernetes/networking.istio.io/WorkloadEntry/{namespace}/{name}").into(),
        kind: WorkloadKind::Other,
        name: name.clone(),
        namespace: namespace.clone(),
        addresses: entry.address.into_iter().collect(),
        network: if entry.network.is_empty() {
            network.to_owned()
        } else {
            entry.network.clone()
        },
        trust_domain: mesh.trust_domain.clone(),
        service_account: entry.service_account.clone(),
        node: String::new(),
        host_network: false,
        healthy: true,
        hbone: false,
        services: BTreeMap::new(),
        authorization_policies: Vec::new(),
    }
}

/// Pods of node `name` (of all, when it is empty) with a network of their own, numbered from 1 in order.
fn endpoints(
    manifests: &Manifests,
    plan: &Plan,
    name: &str,
) -> Result<BTreeMap<u16, Arc<Endpoint>>, WorldError> {
    let of_node = |pod: &&Pod| {
        let place = plan.pods.get(&format!("{}/{}", pod.namespace, pod.name));
        let node = place
            .and_then(|p| plan.nodes.get(p.node))
            .map(|n| n.name.as_str());
        !pod.host_network && (name.is_empty() || node == Some(name))
    };
    let pods: Vec<&Pod> = manifests.pods().filter(of_node).collect();
    if pods.len() >= MAX_ENDPOINTS {
        return Err(WorldError::TooManyEndpoints(pods.len()));
    }
    let numbered = (1u16..).zip(pods);
    Ok(numbered
        .map(|(id, pod)| (id, Arc::new(endpoint(id, pod, plan))))
        .collect())
}

fn endpoint(id: u16, pod: &Pod, plan: &Plan) -> Endpoint {
    let key = format!("{}/{}", pod.namespace, pod.name);
    let place = plan.pods.get(&key);
    Endpoint {
        id,
        uid: key,
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        service_account: pod.service_account.clone(),
        addresses: place.map(|p| p.addresses.clone()).unwrap_or_default(),
        labels: pod.labels.clone(),
        annotations: pod.annotations.clone(),
        containers: pod.containers.iter().map(|c| c.name.clone()).collect(),
    }
}
