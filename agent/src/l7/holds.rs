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
use thyra_node_proxy_bridge::hold::oracle::Oracle;
use thyra_node_proxy_bridge::inline::{Cell, Refusal};
use thyra_node_proxy_bridge::listener::{HttpOptions, Reading, Redact};
use thyra_node_proxy_bridge::lower;
use thyra_policy_compiler::residual::{Residual, Way};
use thyra_policy_compiler::traffic::PathNormalization;
use tokio::sync::watch;

/// See the module.
pub(super) struct Holds {
    /// Whether anything is held at all.
    is_on: bool,
    /// And HTTP, where its policies want it.
    with_http: bool,
    /// What is not told of them.
    redact: Redact,
    bridge: Bridge,
    numbers: BTreeMap<Arc<str>, u16>,
    /// How each of them is read.
    readings: BTreeMap<Arc<str>, Reading>,
    /// Wanted no more, but the tables may still name them.
    former: BTreeMap<Arc<str>, u16>,
    /// Given out next: one that was freed is taken again as late as can be.
    next: u16,
    oracles: watch::Sender<Arc<Oracles>>,
}

impl Holds {
    pub(super) fn new(server: Arc<AdsServer>, folder: &Path, redact: Redact) -> Self {
        let config = BridgeConfig {
            xds_socket: folder.to_owned(),
            oracles: folder.to_owned(),
            owner: None,
            http: options(PathNormalization::default(), redact),
        };
        Self {
            is_on: false,
            with_http: false,
            redact,
            bridge: Bridge::beside(server, config),
            numbers: BTreeMap::new(),
            readings: BTreeMap::new(),
            former: BTreeMap::new(),
            next: 1,
            oracles: watch::Sender::default(),
        }
    }

    pub(super) fn start(
        &mut self,
        with_http: bool,
        known: BTreeMap<Arc<str>, u16>,
    ) -> watch::Receiver<Arc<Oracles>> {
        (self.is_on, self.with_http) = (true, with_http);
        self.next = known.values().max().map_or(1, |last| after(*last));
        self.former = known;
        self.oracles.subscribe()
    }

    /// Whether connections of this residual are held.
    pub(super) fn has(&self, residual: &Arc<str>) -> bool {
        self.numbers.contains_key(residual)
    }

    /// What is wanted from now on, of what can be held; `paths` are read so.
    pub(super) fn apply(&mut self, cells: &[Cell], paths: PathNormalization) {
        let cells: BTreeMap<&Arc<str>, (&Arc<Residual<RuleRef>>, Reading)> = cells
            .iter()
            .filter_map(|cell| Some((&cell.address, (&cell.residual, self.reading(&cell.residual)?))))
            .collect();
        self.readings.clear();
        let mut before = std::mem::take(&mut self.numbers);
        before.append(&mut self.former);
        let mut taken: BTreeSet<u16> = before.values().copied().collect();
        let mut wanted = Vec::with_capacity(cells.len());
        for (address, (residual, reading)) in cells {
            let number = before.remove(address).or_else(|| self.fresh(&taken));
            let Some(number) = number else {
                continue;
            };
            taken.insert(number);
            self.numbers.insert(Arc::clone(address), number);
            self.readings.insert(Arc::clone(address), reading);
            wanted.push(Wanted {
                // Another residual is another cell, and gets another listener.
                cell: Arc::clone(address),
                reading,
                residual: Arc::clone(residual),
            });
        }
        self.former = before;
        if self.is_on {
            self.bridge.set_http(options(paths, self.redact));
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
        let refused = self.readings.iter().filter_map(|(residual, reading)| {
            let why = match self.bridge.standing(&question(residual, *reading)) {
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
            let reading = *self.readings.get(residual)?;
            match self.bridge.standing(&question(residual, reading)) {
                Standing::Active(socket) => Some((*number, Oracle { socket, reading })),
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

    /// How its first bytes are read, where it is held. What Envoy can't be given is named where all else that it can't
    /// be given is.
    fn reading(&self, residual: &Residual<RuleRef>) -> Option<Reading> {
        let (reading, chain) = match residual.way() {
            Way::HoldTls if self.is_on => (Reading::Stream, lower::stream(residual)),
            Way::HoldHttp if self.is_on && self.with_http => (Reading::Http, lower::http(residual)),
            Way::HoldTls | Way::HoldHttp | Way::Inline(_) => return None,
        };
        chain.is_ok().then_some(reading)
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

fn question(residual: &Arc<str>, reading: Reading) -> Question {
    (reading, Arc::clone(residual))
}

/// The pod gets what is held as it came.
fn options(paths: PathNormalization, redact: Redact) -> HttpOptions {
    HttpOptions {
        paths,
        redact,
        as_it_is: true,
        ..HttpOptions::default()
    }
}

const fn after(number: u16) -> u16 {
    if number + 1 < L7_FIRST_PORT { number + 1 } else { 1 }
}
