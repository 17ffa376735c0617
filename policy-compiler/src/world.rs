//! Everything that a verdict depends on, as last heard: policies, workloads, services, namespaces, this
//! node's endpoints.
//!
//! Invariant: plain data. Sources write it, the compiler and the oracle read it; neither ever asks the
//! network.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use thyra_datapath_abi::Mode;
use thyra_datapath_abi::tables::PolicyRef;

use crate::authorizer::{Provider, Providers};
use crate::policy::{AuthorizationPolicy, Labels, PeerAuthentication, RequestAuthentication};
use crate::shared_map::SharedMap;
use crate::traffic::PathNormalization;

/// The whole.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// Mesh-wide settings.
    pub mesh: Mesh,
    /// This node's own settings.
    pub node: NodeOptions,
    /// By uid (opaque).
    pub workloads: SharedMap<Arc<str>, Arc<Workload>>,
    /// By `namespace/hostname`.
    pub services: BTreeMap<Arc<str>, Arc<Service>>,
    /// Labels of namespaces, where a source tells them.
    pub namespaces: BTreeMap<String, Labels>,
    /// Pods of this node, by endpoint id.
    pub endpoints: BTreeMap<u16, Arc<Endpoint>>,
    /// AuthorizationPolicies.
    pub authorization: BTreeMap<PolicyRef, Arc<AuthorizationPolicy>>,
    /// PeerAuthentications.
    pub peer_authentication: BTreeMap<PolicyRef, Arc<PeerAuthentication>>,
    /// RequestAuthentications.
    pub request_authentication: BTreeMap<PolicyRef, Arc<RequestAuthentication>>,
    /// Policies that could not be read at all (refused by name): in their scope they count as unknown DENY.
    pub unreadable: BTreeMap<PolicyRef, Arc<str>>,
    /// Identity numbers handed out so far, by principal; the agent persists it so that numbers are stable.
    pub identities: SharedMap<Arc<str>, u32>,
    /// The first full sync has happened: every source has told its first whole state.
    pub synced: bool,
}

impl World {
    /// Whether a namespace's labels are still to come.
    pub(crate) fn awaits_namespace(&self, name: &str) -> bool {
        !self.namespaces.contains_key(name) && (self.node.namespaces_are_told || !self.synced)
    }
}

/// MeshConfig, as far as verdicts read it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mesh {
    /// Where mesh-wide policies live; Istio's default is `istio-system`.
    pub root_namespace: String,
    /// Istio's default is `cluster.local`.
    pub trust_domain: String,
    /// `trustDomainAliases`.
    pub trust_domain_aliases: Vec<String>,
    /// `extensionProviders`.
    pub extension_providers: Providers,
    /// `pathNormalization`.
    pub path_normalization: PathNormalization,
    /// `metadata.resourceVersion` of the ConfigMap, where known.
    pub version: String,
}

impl Mesh {
    /// The provider of this name, or one that says that there is none.
    #[must_use]
    pub fn provider(&self, name: &str) -> Arc<Provider> {
        let known = self.extension_providers.get(name);
        known.map_or_else(|| Arc::new(Provider::absent(name)), Arc::clone)
    }
}

impl Default for Mesh {
    fn default() -> Self {
        Self {
            root_namespace: "istio-system".into(),
            trust_domain: "cluster.local".into(),
            trust_domain_aliases: Vec::new(),
            extension_providers: Providers::new(),
            path_normalization: PathNormalization::default(),
            version: String::new(),
        }
    }
}

/// What `--bootstrap` says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Bootstrap {
    /// Enrolled endpoints deny everything but the node's own traffic until the first full sync.
    #[default]
    Deny,
    /// They allow everything until then.
    Allow,
}

/// What this node was told on its command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeOptions {
    /// Node name.
    pub name: String,
    /// `--network`: workloads of other networks lend no identity.
    pub network: String,
    /// Mode of pods that nothing labels.
    pub default_mode: Mode,
    /// A pod's own label may loosen its namespace's mode (`--pod-mode-override`).
    pub pod_mode_override: bool,
    /// Namespaces whose WorkloadEntries and ServiceEntries may lend an identity.
    pub trust_workload_entries: BTreeSet<String>,
    /// Pod ranges of the cluster: a source in them without identity is pending, not an outsider.
    pub pod_ranges: Vec<IpNet>,
    /// Addresses of nodes: never an identity.
    pub node_addresses: BTreeSet<IpAddr>,
    /// The API server tells of every namespace: one that isn't known was made a moment ago, and its label may say
    /// anything yet.
    pub namespaces_are_told: bool,
    /// Before the first full sync.
    pub bootstrap: Bootstrap,
}

impl Default for NodeOptions {
    fn default() -> Self {
        Self {
            name: String::new(),
            network: String::new(),
            default_mode: Mode::Off,
            pod_mode_override: false,
            trust_workload_entries: BTreeSet::new(),
            pod_ranges: Vec::new(),
            node_addresses: BTreeSet::new(),
            namespaces_are_told: false,
            bootstrap: Bootstrap::Deny,
        }
    }
}

/// What kind of object istiod made the workload from, read from its uid (`cluster/group/kind/ns/name`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkloadKind {
    /// A Pod.
    Pod,
    /// A WorkloadEntry, a ServiceEntry's inline endpoint, or a form of uid that is not known.
    Other,
}

/// A workload as istiod tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Opaque.
    pub uid: Arc<str>,
    /// Pod or not.
    pub kind: WorkloadKind,
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Never v4-mapped.
    pub addresses: Vec<IpAddr>,
    /// Network.
    pub network: String,
    /// `cluster.local` where istiod says "".
    pub trust_domain: String,
    /// `default` where istiod says "".
    pub service_account: String,
    /// Node name.
    pub node: String,
    /// Shares the node's addresses: lends no identity.
    pub host_network: bool,
    /// istiod says that it takes connections: a pod that is ready.
    pub healthy: bool,
    /// Carries traffic by HBONE (ambient).
    pub hbone: bool,
    /// Ports of each service it backs, by `namespace/hostname`.
    pub services: BTreeMap<Arc<str>, Vec<ServicePort>>,
    /// Policy keys istiod selected for it; a cross-check only.
    pub authorization_policies: Vec<String>,
}

impl Workload {
    /// `<trust domain>/ns/<namespace>/sa/<service account>`.
    #[must_use]
    pub fn principal(&self) -> String {
        let Self {
            trust_domain,
            namespace,
            service_account,
            ..
        } = self;
        format!("{trust_domain}/ns/{namespace}/sa/{service_account}")
    }
}

/// What a Service port declares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AppProtocol {
    /// Nothing declared: the first bytes decide.
    Unknown,
    /// http, http2, grpc …
    Http,
    /// tcp, tls, mysql, …: never HTTP.
    NotHttp,
    /// tls: SNI may be asked for.
    Tls,
}

/// A port of a Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    /// On the Service.
    pub port: u16,
    /// On the pod; 0 where it isn't known here.
    pub target_port: u16,
    /// Declared protocol.
    pub protocol: AppProtocol,
}

/// A Service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Host name.
    pub hostname: String,
    /// VIPs of this network; never an identity.
    pub addresses: Vec<IpAddr>,
    /// Ports.
    pub ports: Vec<ServicePort>,
}

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Endpoint id, 1 to 255.
    pub id: u16,
    /// Pod uid.
    pub uid: String,
    /// Namespace.
    pub namespace: String,
    /// Pod name.
    pub name: String,
    /// `default` where the pod says nothing.
    pub service_account: String,
    /// The CNI's word; never v4-mapped.
    pub addresses: Vec<IpAddr>,
    /// Pod labels.
    pub labels: Labels,
    /// Pod annotations.
    pub annotations: Labels,
    /// Names of its containers (a sidecar is `istio-proxy`).
    pub containers: Vec<String>,
}
