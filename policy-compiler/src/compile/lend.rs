//! Which identity an address has: who may lend one to it, and which addresses wait for theirs.
//!
//! Invariant: an address has an identity only if exactly one owner may lend it. Node addresses, Service VIPs
//! and host-network workloads never lend one; an address of a local pod takes it from that very pod alone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use super::identity::Identities;
use crate::shared_map::{SharedMap, differences};
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

/// What an update changed.
#[derive(Debug, Default)]
pub(crate) struct Moved {
    /// Addresses with another owner than before, or none.
    pub(crate) addresses: Vec<IpAddr>,
    /// More than that: the node's settings, a Service, an endpoint, or a local pod's own workload.
    pub(crate) beyond: bool,
    /// Other problems than before.
    pub(crate) problems: bool,
}

/// The addresses, kept from one compile to the next; only what changed is looked at again.
#[derive(Debug, Default)]
pub(crate) struct Lending {
    workloads: SharedMap<Arc<str>, Arc<Workload>>,
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
    /// Brings the addresses up to date.
    pub(crate) fn update(&mut self, world: &World, identities: &mut Identities) -> Moved {
        let mut touched: Vec<IpAddr> = Vec::new();
        let mut moved = Moved {
            beyond: self.update_endpoints(world, &mut touched),
            ..Moved::default()
        };
        moved.beyond |= self.update_services(world, &mut touched);
        moved.beyond |= self.update_workloads(world, &mut touched);
        if self.node != world.node {
            self.node = world.node.clone();
            moved.beyond = true;
            touched.extend(self.holders.keys());
            touched.extend(self.vips.keys());
            touched.extend(self.owners.keys());
            touched.extend(self.lenders.keys());
            touched.extend(&self.node.node_addresses);
        }
        // In order, so that identities are numbered alike in every run.
        touched.sort_unstable();
        touched.dedup();
        for address in touched {
            let (lender, problem) = self.settle(address, identities);
            moved.addresses.extend(lender.then_some(address));
            moved.problems |= problem;
        }
        moved
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

    /// `true` when a local pod's own workload changed: one that shares an address with it.
    fn update_workloads(&mut self, world: &World, touched: &mut Vec<IpAddr>) -> bool {
        // By pointer: an `Arc` is replaced when its content changes.
        let (gone, come) = self.workloads.differences(&world.workloads, Arc::ptr_eq);
        let changed = gone.iter().chain(&come).flat_map(|(_, w)| &w.addresses);
        let local = changed.into_iter().any(|a| self.owners.contains_key(a));
        for (_, workload) in gone {
            for address in &workload.addresses {
                touched.push(*address);
                if let Some(holders) = self.holders.get_mut(address) {
                    holders.retain(|holder| !Arc::ptr_eq(holder, &workload));
                    if holders.is_empty() {
                        self.holders.remove(address);
                    }
                }
            }
        }
        for (_, workload) in come {
            for address in &workload.addresses {
                touched.push(*address);
                let holders = self.holders.entry(*address).or_default();
                // Named twice, it still holds the address once.
                if !holders.iter().any(|holder| Arc::ptr_eq(holder, &workload)) {
                    holders.push(Arc::clone(&workload));
                }
            }
        }
        self.workloads = world.workloads.clone();
        local
    }

    fn update_services(&mut self, world: &World, touched: &mut Vec<IpAddr>) -> bool {
        let (gone, come) = differences(self.services.iter(), world.services.iter(), Arc::ptr_eq);
        if gone.is_empty() && come.is_empty() {
            return false;
        }
        for address in gone.iter().flat_map(|(_, service)| &service.addresses) {
            touched.push(*address);
            if let Some(count) = self.vips.get_mut(address) {
                *count -= 1;
                if *count == 0 {
                    self.vips.remove(address);
                }
            }
        }
        for address in come.iter().flat_map(|(_, service)| &service.addresses) {
            touched.push(*address);
            *self.vips.entry(*address).or_default() += 1;
        }
        self.services = world.services.clone();
        true
    }

    fn update_endpoints(&mut self, world: &World, touched: &mut Vec<IpAddr>) -> bool {
        let (gone, come) = differences(self.endpoints.iter(), world.endpoints.iter(), Arc::ptr_eq);
        if gone.is_empty() && come.is_empty() {
            return false;
        }
        for (_, endpoint) in gone {
            for address in &endpoint.addresses {
                touched.push(*address);
                if let Some(owners) = self.owners.get_mut(address) {
                    owners.remove(&endpoint.id);
                    if owners.is_empty() {
                        self.owners.remove(address);
                    }
                }
            }
        }
        for (_, endpoint) in come {
            for address in &endpoint.addresses {
                touched.push(*address);
                self.owners.entry(*address).or_default().insert(endpoint.id);
            }
        }
        self.endpoints = world.endpoints.clone();
        true
    }

    /// Decides one address again; whether its owner, and whether its problem, is another than before.
    fn settle(&mut self, address: IpAddr, identities: &mut Identities) -> (bool, bool) {
        let (lender, problem) = self.decide(address, identities).unzip();
        let problem = problem.flatten();
        let lender_before = match lender {
            Some(lender) => self.lenders.insert(address, lender),
            None => self.lenders.remove(&address),
        };
        let problem_before = match &problem {
            Some(problem) => self.problems.insert(address, problem.clone()),
            None => self.problems.remove(&address),
        };
        (lender_before != lender, problem_before != problem)
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
        let pods = || {
            holders
                .iter()
                .filter(mine)
                .filter(|w| w.kind == WorkloadKind::Pod)
        };
        if pods().nth(1).is_some() {
            let mut names: Vec<String> = pods().map(|w| format!("{}/{}", w.namespace, w.name)).collect();
            names.sort();
            return Err(format!(
                "address `{address}` is on several live pods ({}); it has no identity",
                names.join(", ")
            ));
        }
        if let Some(endpoint) = self.endpoints.get(&local) {
            // A stale claim of another pod must not outlive the address's move to this one.
            let own = pods().find(|w| w.namespace == endpoint.namespace && w.name == endpoint.name);
            return Ok(own.map_or(Lent::Pending, |w| Lent::Known(identities.intern(w))));
        }
        if let Some(pod) = pods().next() {
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
