//! Addresses that pods had a moment ago: nodes that have not heard of a move yet take the next owner for the last.
//!
//! Invariant: an address that was free for as long as the grace lasts holds nobody back.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use thyra_policy_compiler::world::{Workload, WorkloadKind};

use super::Held;
use crate::registration::Registration;

/// The pods that lost an address, and when.
#[derive(Clone, Debug, Default)]
pub(super) struct Moved {
    left: BTreeMap<IpAddr, (String, Instant)>,
}

impl Moved {
    /// Notes the addresses that a workload no longer has.
    pub(super) fn note(&mut self, before: &Workload, after: Option<&Workload>) {
        if before.kind != WorkloadKind::Pod {
            return;
        }
        let kept = |address: &IpAddr| after.is_some_and(|after| after.addresses.contains(address));
        for address in before.addresses.iter().filter(|address| !kept(address)) {
            self.left.insert(*address, (pod(before), Instant::now()));
        }
    }
}

impl Held {
    /// Whose address a pod has, by the word of istiod, now or less than the grace ago; none when it is nobody else's.
    #[must_use]
    pub fn earlier_owner(&self, registration: &Registration) -> Option<String> {
        let grace = self.basis.identity_grace;
        if grace.is_zero() {
            return None;
        }
        let own = registration.pod();
        let has = |w: &Workload| w.addresses.iter().any(|a| registration.addresses.contains(a));
        let pods = self
            .world
            .workloads
            .values()
            .filter(|w| w.kind == WorkloadKind::Pod && !w.host_network);
        let now = pods
            .filter(|w| has(w))
            .map(|w| pod(w))
            .find(|owner| *owner != own);
        now.or_else(|| {
            let left = registration
                .addresses
                .iter()
                .filter_map(|address| self.moved.left.get(address));
            let recent = left.filter(|(owner, when)| *owner != own && when.elapsed() < grace);
            recent.map(|(owner, _)| owner.clone()).next()
        })
    }

    /// Forgets what is longer ago than the grace.
    pub fn forget_moved(&mut self) {
        let grace: Duration = self.basis.identity_grace;
        self.moved.left.retain(|_, (_, when)| when.elapsed() < grace);
    }
}

fn pod(workload: &Workload) -> String {
    format!("{}/{}", workload.namespace, workload.name)
}
