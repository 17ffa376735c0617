//! One piece of news from a source.
//!
//! Invariant: news replaces what was held under the same key; what a source no longer has, it says.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use thyra_datapath_abi::tables::PolicyRef;
use thyra_policy_compiler::policy::{AuthorizationPolicy, Labels, PeerAuthentication, RequestAuthentication};
use thyra_policy_compiler::report::PolicyKind;
use thyra_policy_compiler::world::{Mesh, Service, Workload};

/// What must have been told once before the world counts as whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Topic {
    /// Workloads and services.
    Workloads,
    /// AuthorizationPolicies.
    Authorization,
    /// PeerAuthentications.
    Peer,
    /// RequestAuthentications.
    Request,
    /// MeshConfig.
    Mesh,
    /// This node's pods.
    Pods,
    /// Namespaces.
    Namespaces,
    /// Nodes.
    Nodes,
}

impl Topic {
    /// As status shows it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Workloads => "workloads",
            Self::Authorization => "AuthorizationPolicy",
            Self::Peer => "PeerAuthentication",
            Self::Request => "RequestAuthentication",
            Self::Mesh => "MeshConfig",
            Self::Pods => "pods",
            Self::Namespaces => "namespaces",
            Self::Nodes => "nodes",
        }
    }
}

/// What the API server says of a pod of this node; wins over its registration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Uid.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// `metadata.resourceVersion`.
    pub version: String,
    /// Labels.
    pub labels: Labels,
    /// Annotations.
    pub annotations: Labels,
    /// `spec.serviceAccountName`; `default` where it says nothing.
    pub service_account: String,
    /// Names of all containers, init containers included (a native sidecar is one).
    pub containers: Vec<String>,
}

/// What the API server says of a namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// `metadata.resourceVersion`.
    pub version: String,
    /// Labels.
    pub labels: Labels,
}

/// What the API server says of a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Its own addresses.
    pub addresses: BTreeSet<IpAddr>,
    /// Its pod ranges.
    pub ranges: Vec<IpNet>,
}

/// News.
#[derive(Clone, Debug)]
pub enum Change {
    /// A workload.
    Workload(Arc<Workload>),
    /// A service.
    Service(Arc<Service>),
    /// The workload with this uid or the service `namespace/hostname` is gone.
    AddressGone(Arc<str>),
    /// Of workloads and services only these are left.
    OnlyAddresses(BTreeSet<Arc<str>>),
    /// An AuthorizationPolicy.
    Authorization(Arc<AuthorizationPolicy>),
    /// A PeerAuthentication.
    Peer(Arc<PeerAuthentication>),
    /// A RequestAuthentication.
    Request(Arc<RequestAuthentication>),
    /// A policy that can't be read; it replaces what was held of it and counts as an unknown DENY.
    Unreadable(PolicyKind, PolicyRef, Arc<str>),
    /// A policy is gone.
    PolicyGone(PolicyKind, PolicyRef),
    /// Of a kind of policy only these are left.
    OnlyPolicies(PolicyKind, BTreeSet<PolicyRef>),
    /// Mesh-wide settings.
    Mesh(Mesh),
    /// A pod of this node.
    Pod(Arc<Pod>),
    /// The pod `namespace`, `name` is gone.
    PodGone(String, String),
    /// Of this node's pods only these are left.
    OnlyPods(BTreeSet<(String, String)>),
    /// A namespace.
    Namespace(String, Namespace),
    /// A namespace is gone.
    NamespaceGone(String),
    /// Of the namespaces only these are left.
    OnlyNamespaces(BTreeSet<String>),
    /// A node.
    Node(String, Node),
    /// A node is gone.
    NodeGone(String),
    /// Of the nodes only these are left.
    OnlyNodes(BTreeSet<String>),
    /// A topic has been told whole.
    Ready(Topic),
}
