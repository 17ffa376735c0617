//! What a manifest holds, typed as far as a verdict or the lab needs it.
//!
//! Invariant: `raw` is the object as written, so that it can be applied to an API server unchanged; the typed
//! part never holds a value that could not be read.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::error::Location;
use super::places::Places;
use crate::policy::{AuthorizationPolicy, Labels, PeerAuthentication, RequestAuthentication};
use crate::world::{AppProtocol, Mesh};

/// An object of a kind that Thyra reads.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// `apiVersion`.
    pub api_version: String,
    /// `kind`.
    pub kind: String,
    /// Namespace; empty for Namespace and Node.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Where it begins.
    pub at: Location,
    /// The whole object as JSON, values unchanged, `metadata.namespace` filled in.
    pub raw: serde_json::Value,
    /// Where the parts of a policy stand; of other kinds only where they begin.
    pub places: Places,
    /// The typed part.
    pub body: Body,
}

/// Group (without version), kind, namespace and name: two objects with one key are the same object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectKey {
    /// API group, empty for the core group.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
}

impl Object {
    /// Its key.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        let group = self.api_version.split_once('/').map_or("", |(group, _)| group);
        ObjectKey {
            group: group.to_owned(),
            kind: self.kind.clone(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
        }
    }
}

/// The kinds that Thyra reads.
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// Namespace.
    Namespace(Namespace),
    /// ServiceAccount.
    ServiceAccount,
    /// Node.
    Node(Node),
    /// Pod, or the one pod of a Deployment, ReplicaSet, StatefulSet, DaemonSet, Job or CronJob; none when it
    /// asks for no pod (`replicas: 0`, `suspend: true`).
    Pod(Option<Box<Pod>>),
    /// Service.
    Service(Box<Service>),
    /// WorkloadEntry.
    WorkloadEntry(WorkloadEntry),
    /// AuthorizationPolicy.
    AuthorizationPolicy(AuthorizationPolicy),
    /// PeerAuthentication.
    PeerAuthentication(PeerAuthentication),
    /// RequestAuthentication.
    RequestAuthentication(RequestAuthentication),
    /// The ConfigMap `istio` of `istio-system`.
    MeshConfig(Mesh),
}

/// What `metadata` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Name.
    pub name: String,
    /// Namespace; empty for cluster-scoped kinds.
    pub namespace: String,
    /// Labels.
    pub labels: Labels,
    /// Annotations.
    pub annotations: Labels,
    /// `resourceVersion`, empty where there is none.
    pub version: String,
    /// `creationTimestamp`, seconds since the epoch; 0 where there is none.
    pub created: i64,
}

/// A Namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Labels, `kubernetes.io/metadata.name` included.
    pub labels: Labels,
}

/// A Node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Labels.
    pub labels: Labels,
    /// `status.addresses` that are IP addresses.
    pub addresses: Vec<IpAddr>,
    /// `spec.podCIDRs`.
    pub pod_ranges: Vec<IpNet>,
}

/// A pod.
#[derive(Clone, Debug, PartialEq)]
pub struct Pod {
    /// Namespace.
    pub namespace: String,
    /// Name; of a controller's pod the controller's.
    pub name: String,
    /// Labels.
    pub labels: Labels,
    /// Annotations.
    pub annotations: Labels,
    /// `default` where the pod says nothing.
    pub service_account: String,
    /// `spec.nodeName`.
    pub node_name: Option<String>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// Containers, then init containers.
    pub containers: Vec<Container>,
    /// `status.podIPs` (or `podIP`), canonical.
    pub addresses: Vec<IpAddr>,
    /// The pod as an object of its own, as a controller would make it (`kind: Pod`).
    pub manifest: serde_json::Value,
}

/// A container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Name.
    pub name: String,
    /// One of `initContainers`.
    pub init: bool,
    /// Ports it declares.
    pub ports: Vec<ContainerPort>,
}

/// Transport of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

/// A port that a container declares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerPort {
    /// Name, or empty.
    pub name: String,
    /// 1 to 65535.
    pub port: u16,
    /// Transport.
    pub transport: Transport,
}

/// How a Service is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceKind {
    /// By its VIPs.
    ClusterIp,
    /// Also by a port of each node.
    NodePort,
    /// Also by a load balancer.
    LoadBalancer,
    /// `clusterIP: None`: by its pods' addresses.
    Headless,
    /// A name elsewhere: no address here.
    ExternalName,
}

/// A Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// How it is reached.
    pub kind: ServiceKind,
    /// `clusterIP` and `clusterIPs` as written, without `None`.
    pub cluster_addresses: Vec<IpAddr>,
    /// It may have an IPv4, an IPv6 address (`ipFamilies`, `ipFamilyPolicy`; both unless they say otherwise).
    pub families: (bool, bool),
    /// Ports.
    pub ports: Vec<ServicePort>,
    /// None: its backends are not pods of a selector.
    pub selector: Option<Labels>,
    /// `externalIPs` and `loadBalancerIP`.
    pub external_addresses: Vec<IpAddr>,
    /// `externalTrafficPolicy: Local`.
    pub external_local: bool,
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `sessionAffinity: ClientIP`.
    pub client_ip_affinity: bool,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// Name, or empty.
    pub name: String,
    /// On the Service.
    pub port: u16,
    /// On the pod.
    pub target: Target,
    /// On the node, where declared.
    pub node_port: Option<u16>,
    /// Transport.
    pub transport: Transport,
    /// What its `appProtocol` or name declares.
    pub protocol: AppProtocol,
    /// `appProtocol` as written.
    pub app_protocol: Option<String>,
}

/// `targetPort`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A number.
    Port(u16),
    /// The name of a container's port.
    Name(String),
}

impl Target {
    /// The port on `pod`; none where no container declares the name with this transport.
    #[must_use]
    pub fn port_of(&self, pod: &Pod, transport: Transport) -> Option<u16> {
        match self {
            Target::Port(port) => Some(*port),
            Target::Name(name) => {
                let ports = pod.containers.iter().flat_map(|c| &c.ports);
                ports
                    .into_iter()
                    .find(|p| p.name == *name && p.transport == transport)
                    .map(|p| p.port)
            }
        }
    }
}

impl Service {
    /// The Service's pods are those of its namespace with all its selector's labels.
    #[must_use]
    pub fn selects(&self, pod: &Pod) -> bool {
        let matches = |selector: &Labels| selector.iter().all(|(k, v)| pod.labels.get(k) == Some(v));
        self.namespace == pod.namespace
            && self
                .selector
                .as_ref()
                .is_some_and(|s| !s.is_empty() && matches(s))
    }
}

/// A WorkloadEntry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadEntry {
    /// `spec.address` where it is an IP address.
    pub address: Option<IpAddr>,
    /// Labels of the spec and of the object.
    pub labels: Labels,
    /// `default` where it says nothing.
    pub service_account: String,
    /// `spec.network`.
    pub network: String,
    /// `spec.ports`.
    pub ports: BTreeMap<String, u16>,
}

/// An object that can't change a verdict.
#[derive(Clone, Debug, PartialEq)]
pub struct Ignored {
    /// `apiVersion`.
    pub api_version: String,
    /// `kind`.
    pub kind: String,
    /// `namespace/name`, or the name.
    pub name: String,
    /// Where.
    pub at: Location,
}
