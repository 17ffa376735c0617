//! Everything the agent has been told, and the `World` that follows from it.
//!
//! Invariant: the same news in any order gives the same world; the world is whole (`synced`) only when every
//! awaited topic was told once.

mod endpoints;
mod moved;
mod policies;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use thyra_datapath_abi::tables::PolicyRef;
use thyra_policy_compiler::report::PolicyKind;
use thyra_policy_compiler::world::{Mesh, NodeOptions, Workload, World};

use crate::change::{Change, Namespace, Node, Pod, Topic};
use crate::registration::Registration;

/// Identity numbers start here, as Cilium's do: lower ones are reserved there.
const FIRST_IDENTITY: u32 = 256;

/// What a `Held` starts from.
#[derive(Clone, Debug, Default)]
pub struct Basis {
    /// As configured.
    pub node: NodeOptions,
    /// Wins over MeshConfig.
    pub root_namespace: Option<String>,
    /// Wins over MeshConfig.
    pub trust_domain: Option<String>,
    /// The world isn't whole before all of these were told.
    pub awaited: BTreeSet<Topic>,
    /// Policies name their workloads instead of selecting labels (istiod's L4 `Authorization`).
    pub listed_policies: bool,
    /// As stored by an earlier run.
    pub identities: BTreeMap<Arc<str>, u32>,
    /// `--identity-grace`.
    pub identity_grace: Duration,
}

/// See the module.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// What the compiler reads.
    pub world: World,
    /// Pods of this node, by the CNI's word, by endpoint id.
    pub registrations: BTreeMap<u16, Registration>,
    /// Pods of this node, by the API server's word.
    pub pods: BTreeMap<(String, String), Arc<Pod>>,
    /// Namespaces by the API server's word.
    pub namespaces: BTreeMap<String, Namespace>,
    /// Topics not told yet.
    pub awaited: BTreeSet<Topic>,
    /// Policies that can't be read.
    pub unreadable: BTreeMap<(PolicyKind, PolicyRef), Arc<str>>,
    nodes: BTreeMap<String, Node>,
    moved: moved::Moved,
    basis: Basis,
    next_identity: u32,
}

impl Held {
    /// Nothing told yet.
    #[must_use]
    pub fn new(basis: Basis) -> Self {
        let next_identity = basis
            .identities
            .values()
            .max()
            .map_or(FIRST_IDENTITY, |n| n.saturating_add(1));
        let mut held = Self {
            world: World {
                node: basis.node.clone(),
                identities: basis.identities.clone().into_iter().collect(),
                ..World::default()
            },
            awaited: basis.awaited.clone(),
            next_identity,
            basis,
            ..Self::default()
        };
        held.set_mesh(Mesh::default());
        held.world.synced = held.awaited.is_empty();
        held
    }

    /// Takes news; `true` when it changed anything.
    pub fn apply(&mut self, change: Change) -> bool {
        match change {
            Change::Workload(w) => self.set_workload(w),
            Change::Service(s) => {
                let key: Arc<str> = Arc::from(format!("{}/{}", s.namespace, s.hostname));
                put(&mut self.world.services, key, s)
            }
            Change::AddressGone(name) => self.address_gone(&name),
            Change::OnlyAddresses(left) => {
                let gone = self.world.workloads.keys().filter(|uid| !left.contains(*uid));
                let gone: Vec<Arc<str>> = gone.cloned().collect();
                let removed = gone.iter().filter(|uid| self.workload_gone(uid)).count();
                keep(&mut self.world.services, &left) | (removed != 0)
            }
            Change::Authorization(p) => self.set_authorization(p),
            Change::Peer(p) => self.set_peer(p),
            Change::Request(p) => self.set_request(p),
            Change::Unreadable(kind, reference, why) => self.set_unreadable(kind, reference, why),
            Change::PolicyGone(kind, reference) => self.policy_gone(kind, &reference),
            Change::OnlyPolicies(kind, left) => self.only_policies(kind, &left),
            Change::Mesh(mesh) => self.set_mesh(mesh),
            Change::Pod(pod) => put(&mut self.pods, (pod.namespace.clone(), pod.name.clone()), pod),
            Change::PodGone(namespace, name) => self.pods.remove(&(namespace, name)).is_some(),
            Change::OnlyPods(left) => keep(&mut self.pods, &left),
            Change::Namespace(name, namespace) => put(&mut self.namespaces, name, namespace),
            Change::NamespaceGone(name) => self.namespaces.remove(&name).is_some(),
            Change::OnlyNamespaces(left) => keep(&mut self.namespaces, &left),
            Change::Node(name, node) => put(&mut self.nodes, name, node),
            Change::NodeGone(name) => self.nodes.remove(&name).is_some(),
            Change::OnlyNodes(left) => keep(&mut self.nodes, &left),
            Change::Ready(topic) => self.ready(topic),
        }
    }

    /// Brings everything derived up to date; call before compiling.
    pub fn derive(&mut self) {
        self.derive_namespaces();
        self.derive_endpoints();
        self.derive_nodes();
    }

    fn ready(&mut self, topic: Topic) -> bool {
        self.awaited.remove(&topic);
        let synced = self.awaited.is_empty();
        std::mem::replace(&mut self.world.synced, synced) != synced
    }

    fn set_workload(&mut self, workload: Arc<Workload>) -> bool {
        if !workload.addresses.is_empty() {
            self.number(&workload);
        }
        let workloads = &mut self.world.workloads;
        if workloads.get(&workload.uid) == Some(&workload) {
            return false;
        }
        if let Some(before) = workloads.insert(workload.uid.clone(), workload.clone()) {
            self.moved.note(&before, Some(&workload));
        }
        true
    }

    fn workload_gone(&mut self, uid: &str) -> bool {
        let gone = self.world.workloads.remove(uid);
        if let Some(before) = &gone {
            self.moved.note(before, None);
        }
        gone.is_some()
    }

    fn address_gone(&mut self, name: &str) -> bool {
        let workload = self.workload_gone(name);
        self.world.services.remove(name).is_some() | workload
    }

    /// Gives the workload's principal a number that it keeps.
    fn number(&mut self, workload: &Workload) {
        let principal = workload.principal();
        if !self.world.identities.contains_key(principal.as_str()) {
            self.world
                .identities
                .insert(Arc::from(principal), self.next_identity);
            self.next_identity = self.next_identity.saturating_add(1);
        }
    }

    fn set_mesh(&mut self, mut mesh: Mesh) -> bool {
        if let Some(root) = &self.basis.root_namespace {
            mesh.root_namespace.clone_from(root);
        }
        if let Some(domain) = &self.basis.trust_domain {
            mesh.trust_domain.clone_from(domain);
        }
        let changed = self.world.mesh != mesh;
        self.world.mesh = mesh;
        changed
    }

    fn derive_nodes(&mut self) {
        let options = &mut self.world.node;
        options.node_addresses.clone_from(&self.basis.node.node_addresses);
        options.pod_ranges.clone_from(&self.basis.node.pod_ranges);
        for node in self.nodes.values() {
            options.node_addresses.extend(&node.addresses);
            let new = node
                .ranges
                .iter()
                .filter(|r| !options.pod_ranges.contains(r))
                .copied()
                .collect::<Vec<_>>();
            options.pod_ranges.extend(new);
        }
    }
}

/// Puts a value; `true` when it differs from what was there. An equal value keeps its old allocation, by
/// which the compiler's caches know it.
fn put<K: Ord, V: PartialEq>(map: &mut BTreeMap<K, V>, key: K, value: V) -> bool {
    if map.get(&key) == Some(&value) {
        return false;
    }
    map.insert(key, value);
    true
}

fn keep<K: Ord, V>(map: &mut BTreeMap<K, V>, left: &BTreeSet<K>) -> bool {
    let before = map.len();
    map.retain(|key, _| left.contains(key));
    map.len() != before
}
