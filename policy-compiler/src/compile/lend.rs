//! Which identity an address has: who may lend one to it, and which addresses wait for theirs.
//!
//! Invariant: an address has an identity only if exactly one owner may lend it. Node addresses, Service VIPs
//! and host-network workloads never lend one; an address of a local pod takes it from that very pod alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::identity::Identities;
use crate::world::{Endpoint, NodeOptions, Service, Workload, WorkloadKind, World};

/// What is known of the identity behind an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Lent {
    /// None, and none is expected.
    Unknown,
    /// None yet.
    Pending,
    /// By its number.
    Known(usize),
}

/// An address that the tables may have to name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lender {
    pub(crate) lent: Lent,
    /// Endpoint id of the local pod that owns the address, or 0.
    pub(crate) local: u16,
}

/// The addresses, kept from one compile to the next; only what changed is looked at again.
#[derive(Debug, Default)]
pub(crate) struct Lending {
    workloads: BTreeMap<Arc<str>, Arc<Workload>>,
    services: BTreeMap<Arc<str>, Arc<Service>>,
    endpoints: BTreeMap<u16, Arc<Endpoint>>,
    node: NodeOptions,
    holders: HashMap<IpAddr, Vec<Arc<Workload>>>,
    vips: HashMap<IpAddr, usize>,
    owners: HashMap<IpAddr, BTreeSet<u16>>,
    lenders: BTreeMap<IpAddr, Lender>,
    problems: BTreeMap<IpAddr, String>,
}

impl Lending {
    /// Brings the addresses up to date; `true` when any of them changed.
    pub(crate) fn update(&mut self, world: &World, identities: &mut Identities) -> bool {
        // In order, so that identities are numbered alike in every run.
        let mut touched: BTreeSet<IpAddr> = BTreeSet::new();
        self.update_workloads(world, &mut touched);
        self.update_services(world, &mut touched);
        self.update_endpoints(world, &mut touched);
        if self.node != world.node {
            self.node = world.node.clone();
            touched.extend(self.holders.keys());
            touched.extend(self.vips.keys());
            touched.extend(self.owners.keys());
            touched.extend(self.lenders.keys());
            touched.extend(&self.node.node_addresses);
        }
        let mut changed = false;
        for address in touched {
            changed |= self.settle(address, identities);
        }
        changed
    }

    /// All addresses that have an owner here, a VIP or a workload, in order.
    pub(crate) fn lenders(&self) -> &BTreeMap<IpAddr, Lender> {
        &self.lenders
    }

    /// The workload that istiod tells of for a local pod, by name and address.
    pub(crate) fn workload_of(&self, endpoint: &Endpoint) -> Option<&Workload> {
        endpoint
            .addresses
            .iter()
            .flat_map(|address| self.holders.get(address).into_iter().flatten())
            .filter(|w| {
                w.kind == WorkloadKind::Pod
                    && w.network == self.node.network
                    && w.namespace == endpoint.namespace
                    && w.name == endpoint.name
            })
            .min_by_key(|w| &w.uid)
            .map(|w| &**w)
    }

    /// Addresses whose owners contradict each other, in words.
    pub(crate) fn problems(&self) -> impl Iterator<Item = &String> {
        self.problems.values()
    }

    fn update_workloads(&mut self, world: &World, touched: &mut BTreeSet<IpAddr>) {
        let (gone, come) = differences(&self.workloads, &world.workloads);
        if gone.is_empty() && come.is_empty() {
            return;
        }
        for workload in gone {
            for address in &workload.addresses {
                touched.insert(*address);
                if let Some(holders) = self.holders.get_mut(address) {
                    holders.retain(|holder| !Arc::ptr_eq(holder, &workload));
                    if holders.is_empty() {
                        self.holders.remove(address);
                    }
                }
            }
        }
        for workload in come {
            let addresses: BTreeSet<IpAddr> = workload.addresses.iter().copied().collect();
            for address in addresses {
                touched.insert(address);
                self.holders
                    .entry(address)
                    .or_default()
                    .push(Arc::clone(&workload));
            }
        }
        self.workloads = world.workloads.clone();
    }

    fn update_services(&mut self, world: &World, touched: &mut BTreeSet<IpAddr>) {
        let (gone, come) = differences(&self.services, &world.services);
        if gone.is_empty() && come.is_empty() {
            return;
        }
        for address in gone.iter().flat_map(|service| &service.addresses) {
            touched.insert(*address);
            if let Some(count) = self.vips.get_mut(address) {
                *count -= 1;
                if *count == 0 {
                    self.vips.remove(address);
                }
            }
        }
        for address in come.iter().flat_map(|service| &service.addresses) {
            touched.insert(*address);
            *self.vips.entry(*address).or_default() += 1;
        }
        self.services = world.services.clone();
    }

    fn update_endpoints(&mut self, world: &World, touched: &mut BTreeSet<IpAddr>) {
        let (gone, come) = differences(&self.endpoints, &world.endpoints);
        if gone.is_empty() && come.is_empty() {
            return;
        }
        for endpoint in gone {
            for address in &endpoint.addresses {
                touched.insert(*address);
                if let Some(owners) = self.owners.get_mut(address) {
                    owners.remove(&endpoint.id);
                    if owners.is_empty() {
                        self.owners.remove(address);
                    }
                }
            }
        }
        for endpoint in come {
            for address in &endpoint.addresses {
                touched.insert(*address);
                self.owners.entry(*address).or_default().insert(endpoint.id);
            }
        }
        self.endpoints = world.endpoints.clone();
    }

    /// Decides one address again; `true` when that changed it.
    fn settle(&mut self, address: IpAddr, identities: &mut Identities) -> bool {
        let decided = self.decide(address, identities);
        let problem_before = self.problems.remove(&address);
        let before = match &decided {
            Some((lender, problem)) => {
                if let Some(problem) = problem {
                    self.problems.insert(address, problem.clone());
                }
                self.lenders.insert(address, *lender)
            }
            None => self.lenders.remove(&address),
        };
        before != decided.map(|(lender, _)| lender) || problem_before.as_ref() != self.problems.get(&address)
    }

    fn decide(&self, address: IpAddr, identities: &mut Identities) -> Option<(Lender, Option<String>)> {
        let owners = self.owners.get(&address);
        let holders = self.holders.get(&address).map_or(&[][..], Vec::as_slice);
        let reserved = self.node.node_addresses.contains(&address) || self.vips.contains_key(&address);
        if owners.is_none() && holders.is_empty() && !reserved {
            return None;
        }
        let local = owners.and_then(|ids| ids.first().copied()).unwrap_or(0);
        let unknown = Lender {
            lent: Lent::Unknown,
            local,
        };
        if reserved {
            return Some((unknown, None));
        }
        if owners.is_some_and(|ids| ids.len() > 1) {
            let ids: Vec<String> = owners.into_iter().flatten().map(ToString::to_string).collect();
            let problem = format!(
                "address `{address}` is registered by endpoints {}; it has no identity",
                ids.join(", ")
            );
            return Some((unknown, Some(problem)));
        }
        match self.lent(address, local, holders, identities) {
            Ok(lent) => Some((Lender { lent, local }, None)),
            Err(problem) => Some((unknown, Some(problem))),
        }
    }

    fn lent(
        &self,
        address: IpAddr,
        local: u16,
        holders: &[Arc<Workload>],
        identities: &mut Identities,
    ) -> Result<Lent, String> {
        let mine =
            |workload: &&Arc<Workload>| !workload.host_network && workload.network == self.node.network;
        let pods: Vec<&Arc<Workload>> = holders
            .iter()
            .filter(mine)
            .filter(|w| w.kind == WorkloadKind::Pod)
            .collect();
        if pods.len() > 1 {
            let mut names: Vec<String> = pods
                .iter()
                .map(|w| format!("{}/{}", w.namespace, w.name))
                .collect();
            names.sort();
            return Err(format!(
                "address `{address}` is on several live pods ({}); it has no identity",
                names.join(", ")
            ));
        }
        if let Some(endpoint) = self.endpoints.get(&local) {
            // A stale claim of another pod must not outlive the address's move to this one.
            let own = pods
                .iter()
                .find(|w| w.namespace == endpoint.namespace && w.name == endpoint.name);
            return Ok(own.map_or(Lent::Pending, |w| Lent::Known(identities.intern(w))));
        }
        if let Some(pod) = pods.first() {
            return Ok(Lent::Known(identities.intern(pod)));
        }
        let trusted: BTreeSet<usize> = holders
            .iter()
            .filter(mine)
            .filter(|w| self.node.trust_workload_entries.contains(&w.namespace))
            .map(|w| identities.intern(w))
            .collect();
        match (trusted.first(), trusted.len()) {
            (Some(identity), 1) => Ok(Lent::Known(*identity)),
            (Some(_), _) => Err(format!(
                "address `{address}` is claimed by workload entries of several identities; it has none"
            )),
            (None, _) => Ok(self.without(address, holders)),
        }
    }

    fn without(&self, address: IpAddr, holders: &[Arc<Workload>]) -> Lent {
        let host = holders.iter().any(|w| w.host_network);
        if !host && self.node.pod_ranges.iter().any(|range| range.contains(&address)) {
            Lent::Pending
        } else {
            Lent::Unknown
        }
    }
}

/// What `after` no longer holds and what it holds anew, by pointer: an `Arc` is replaced when its content
/// changes.
fn differences<K: Ord, T>(
    before: &BTreeMap<K, Arc<T>>,
    after: &BTreeMap<K, Arc<T>>,
) -> (Vec<Arc<T>>, Vec<Arc<T>>) {
    let (mut gone, mut come) = (Vec::new(), Vec::new());
    let (mut left, mut right) = (before.iter().peekable(), after.iter().peekable());
    loop {
        let order = match (left.peek(), right.peek()) {
            (None, None) => return (gone, come),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            // One object has one key: no need to read it.
            (Some((_, old)), Some((_, new))) if Arc::ptr_eq(old, new) => std::cmp::Ordering::Equal,
            (Some((a, _)), Some((b, _))) => a.cmp(b),
        };
        let old = order.is_le().then(|| left.next()).flatten();
        let new = order.is_ge().then(|| right.next()).flatten();
        match (old, new) {
            (Some((_, old)), Some((_, new))) if Arc::ptr_eq(old, new) => {}
            (old, new) => {
                gone.extend(old.map(|(_, value)| Arc::clone(value)));
                come.extend(new.map(|(_, value)| Arc::clone(value)));
            }
        }
    }
}
