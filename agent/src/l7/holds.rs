//! Which residuals are judged once for a connection, under which numbers the kernel knows them, and where their oracles
//! are.
//!
//! Invariant: a number stands for one residual as long as the kernel's tables or an open connection may name it; a
//! listener of Envoy's never goes from one residual to another, so that who asks it gets the answer of the one it
//! meant.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use thyra_datapath_abi::limits::L7_FIRST_PORT;
use thyra_datapath_abi::tables::RuleRef;
use thyra_node_proxy_bridge::ads::AdsServer;
use thyra_node_proxy_bridge::bridge::{self, Bridge, BridgeConfig, Question, Standing, Wanted};
use thyra_node_proxy_bridge::hold::Oracles;
use thyra_node_proxy_bridge::inline::{Cell, Refusal};
use thyra_node_proxy_bridge::listener::{HttpOptions, Reading};
use thyra_node_proxy_bridge::lower;
use thyra_policy_compiler::residual::{Residual, Way};
use tokio::sync::watch;

/// See the module.
pub(super) struct Holds {
    /// Whether anything is held at all.
    is_on: bool,
    bridge: Bridge,
    numbers: BTreeMap<Arc<str>, u16>,
    /// Wanted no more, but the tables may still name them.
    former: BTreeMap<Arc<str>, u16>,
    /// Given out next: one that was freed is taken again as late as can be.
    next: u16,
    oracles: watch::Sender<Arc<Oracles>>,
}

impl Holds {
    pub(super) fn new(server: Arc<AdsServer>, folder: &Path) -> Self {
        let config = BridgeConfig {
            xds_socket: folder.to_owned(),
            oracles: folder.to_owned(),
            owner: None,
            http: HttpOptions::default(),
        };
        Self {
            is_on: false,
            bridge: Bridge::beside(server, config),
            numbers: BTreeMap::new(),
            former: BTreeMap::new(),
            next: 1,
            oracles: watch::Sender::default(),
        }
    }

    pub(super) fn start(&mut self, known: BTreeMap<Arc<str>, u16>) -> watch::Receiver<Arc<Oracles>> {
        self.is_on = true;
        self.next = known.values().max().map_or(1, |last| after(*last));
        self.former = known;
        self.oracles.subscribe()
    }

    /// Whether connections of this residual are held.
    pub(super) fn has(&self, residual: &Arc<str>) -> bool {
        self.numbers.contains_key(residual)
    }

    /// What is wanted from now on, of what can be held.
    pub(super) fn apply(&mut self, cells: &[Cell]) {
        let cells: BTreeMap<&Arc<str>, &Arc<Residual<RuleRef>>> = cells
            .iter()
            .filter(|cell| self.is_on && can_be_held(&cell.residual))
            .map(|cell| (&cell.address, &cell.residual))
            .collect();
        let mut before = std::mem::take(&mut self.numbers);
        before.append(&mut self.former);
        let mut taken: BTreeSet<u16> = before.values().copied().collect();
        let mut wanted = Vec::with_capacity(cells.len());
        for (address, residual) in cells {
            let number = before.remove(address).or_else(|| self.fresh(&taken));
            let Some(number) = number else {
                continue;
            };
            taken.insert(number);
            self.numbers.insert(Arc::clone(address), number);
            wanted.push(Wanted {
                // Another residual is another cell, and gets another listener.
                cell: Arc::clone(address),
                reading: Reading::Stream,
                residual: Arc::clone(residual),
            });
        }
        self.former = before;
        if self.is_on {
            self.bridge.apply(&wanted);
            self.tell();
        }
    }

    /// The tables name nothing else any more.
    pub(super) fn retire(&mut self) {
        self.former.clear();
    }

    /// All that tables may name.
    pub(super) fn numbers(&self) -> BTreeMap<Arc<str>, u16> {
        let all = self.former.iter().chain(&self.numbers);
        all.map(|(residual, number)| (Arc::clone(residual), *number))
            .collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bridge.is_empty()
    }

    pub(super) fn is_settled(&self) -> bool {
        self.bridge.is_settled()
    }

    /// Residuals that no oracle judges, with the reason.
    pub(super) fn refused(&self) -> BTreeMap<Arc<str>, Refusal> {
        let refused = self.numbers.keys().filter_map(|residual| {
            let why = match self.bridge.standing(&question(residual)) {
                Standing::Refused(bridge::Refusal::NotExpressible(why)) => why.into(),
                Standing::Refused(bridge::Refusal::TooMany) => Refusal::TooMany,
                Standing::Rejected(words) => Refusal::Rejected(words),
                Standing::Unknown | Standing::Awaited | Standing::Active(_) => return None,
            };
            Some((Arc::clone(residual), why))
        });
        refused.collect()
    }

    /// Where the oracles are that Envoy has.
    pub(super) fn tell(&self) {
        let active = self.numbers.iter().filter_map(|(residual, number)| {
            match self.bridge.standing(&question(residual)) {
                Standing::Active(socket) => Some((*number, socket)),
                _ => None,
            }
        });
        let active: Oracles = active.collect();
        self.oracles.send_if_modified(|known| {
            let changed = **known != active;
            if changed {
                *known = Arc::new(active);
            }
            changed
        });
    }

    fn fresh(&mut self, taken: &BTreeSet<u16>) -> Option<u16> {
        for _ in 1..L7_FIRST_PORT {
            let number = self.next;
            self.next = after(number);
            if !taken.contains(&number) {
                return Some(number);
            }
        }
        None
    }
}

fn question(residual: &Arc<str>) -> Question {
    (Reading::Stream, Arc::clone(residual))
}

/// What Envoy can't be given is named where all else that it can't be given is.
fn can_be_held(residual: &Residual<RuleRef>) -> bool {
    residual.way() == Way::Hold && lower::stream(residual).is_ok()
}

const fn after(number: u16) -> u16 {
    if number + 1 < L7_FIRST_PORT { number + 1 } else { 1 }
}
