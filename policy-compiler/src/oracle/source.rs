//! Who is behind a source address, looked up by reading the whole world each time.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::world::{Workload, WorkloadKind, World};

/// What the world says of an address.
pub(super) enum Origin<'a> {
    /// A workload's identity.
    Is(&'a Workload),
    /// No identity, and none is expected.
    Nobody,
    /// No identity yet.
    Awaited,
}

/// Who a connection is judged as.
#[derive(Clone, Copy)]
pub(super) enum Who<'a> {
    Is(&'a Workload),
    Nobody,
    /// Whoever fares best: every ALLOW knows it, no DENY does.
    Kindest,
    /// Whoever fares worst.
    Harshest,
}

impl Who<'_> {
    /// May it turn out to have no identity?
    pub(super) fn may_be_nobody(self) -> bool {
        matches!(self, Self::Nobody | Self::Harshest)
    }
}

pub(super) fn origin(world: &World, address: IpAddr) -> Origin<'_> {
    let node = &world.node;
    let is_vip = world
        .services
        .values()
        .any(|service| service.addresses.contains(&address));
    if is_vip || node.node_addresses.contains(&address) {
        return Origin::Nobody;
    }
    let owners: Vec<_> = world
        .endpoints
        .values()
        .filter(|endpoint| endpoint.addresses.contains(&address))
        .collect();
    if owners.len() > 1 {
        return Origin::Nobody;
    }
    let here: Vec<&Workload> = world
        .workloads
        .values()
        .map(|workload| &**workload)
        .filter(|workload| workload.addresses.contains(&address))
        .collect();
    let may_lend: Vec<&Workload> = here
        .iter()
        .copied()
        .filter(|workload| !workload.host_network && workload.network == node.network)
        .collect();
    let pods: Vec<&Workload> = may_lend
        .iter()
        .copied()
        .filter(|workload| workload.kind == WorkloadKind::Pod)
        .collect();
    match (pods.as_slice(), owners.first()) {
        ([_, _, ..], _) => return Origin::Nobody,
        ([pod], None) => return Origin::Is(pod),
        ([pod], Some(owner)) if pod.namespace == owner.namespace && pod.name == owner.name => {
            return Origin::Is(pod);
        }
        // A local pod's address is its own: whatever else is said of it is stale or false.
        (_, Some(_)) => return Origin::Awaited,
        ([], None) => {}
    }
    let entries: Vec<&Workload> = may_lend
        .into_iter()
        .filter(|workload| node.trust_workload_entries.contains(&workload.namespace))
        .collect();
    let identities: BTreeSet<_> = entries
        .iter()
        .map(|w| (&w.trust_domain, &w.namespace, &w.service_account))
        .collect();
    if let (1, Some(entry)) = (identities.len(), entries.first()) {
        return Origin::Is(entry);
    }
    let awaited = identities.is_empty()
        && !here.iter().any(|workload| workload.host_network)
        && node.pod_ranges.iter().any(|range| range.contains(&address));
    if awaited { Origin::Awaited } else { Origin::Nobody }
}
