//! What the programs have counted, summed over the CPUs.
//!
//! Invariant: a counter only grows while its verdict id keeps its meaning; it is set to zero before the id
//! gets another one.

use std::collections::BTreeMap;
use std::mem::offset_of;

use thyra_datapath_abi::count::{EndpointCounter, ReasonCounter, VerdictCounter};
use thyra_datapath_abi::{CpuCounters, Reason, maps};

use crate::mapping::Mapping;
use crate::object::possible_cpus;
use crate::open::{OpenError, Source};

/// All counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// By verdict id; ids that have a name or are in the live tables.
    pub verdicts: BTreeMap<u16, VerdictCounter>,
    /// By reason; those that ever happened.
    pub reasons: BTreeMap<Reason, ReasonCounter>,
    /// By endpoint id; those that are attached.
    pub endpoints: BTreeMap<u16, EndpointCounter>,
    /// Events that were not written: the ring was full, or the budget of refusals spent.
    pub lost_events: u64,
}

const WORD: usize = size_of::<u64>();
const CPU_WORDS: usize = size_of::<CpuCounters>() / WORD;
const VERDICTS: usize = offset_of!(CpuCounters, verdicts) / WORD;
const REASONS: usize = offset_of!(CpuCounters, reasons) / WORD;
const ENDPOINTS: usize = offset_of!(CpuCounters, endpoints) / WORD;
const LOST: usize = offset_of!(CpuCounters, lost) / WORD;

/// The programs' counters, in this process's memory.
pub(crate) struct CounterMemory {
    words: Mapping,
}

impl CounterMemory {
    pub(crate) fn open(source: &Source<'_>) -> Result<Self, OpenError> {
        let words = source.memory(maps::COUNTERS, possible_cpus() * CPU_WORDS)?;
        Ok(Self { words })
    }

    pub(crate) fn read(
        &self,
        verdicts: impl Iterator<Item = u16>,
        endpoints: impl Iterator<Item = u16>,
    ) -> Counters {
        let mut counters = Counters::default();
        for id in verdicts {
            let [packets, bytes, connections] = self.sum(VERDICTS, id);
            let counter = VerdictCounter {
                packets,
                bytes,
                connections,
            };
            counters.verdicts.insert(id, counter);
        }
        for reason in Reason::ALL {
            let [packets, bytes] = self.sum(REASONS, u16::from(reason_number(*reason)));
            if packets != 0 {
                counters.reasons.insert(*reason, ReasonCounter { packets, bytes });
            }
        }
        for id in endpoints {
            let [to_pod_packets, from_pod_packets, to_pod_dropped, from_pod_dropped] =
                self.sum(ENDPOINTS, id);
            let counter = EndpointCounter {
                to_pod_packets,
                from_pod_packets,
                to_pod_dropped,
                from_pod_dropped,
            };
            counters.endpoints.insert(id, counter);
        }
        counters.lost_events = self.lost();
        counters
    }

    /// Events that were not written.
    pub(crate) fn lost(&self) -> u64 {
        let [lost] = self.sum(LOST, 0);
        lost
    }

    /// Sets a verdict's counter to zero. No program may still count under the id.
    pub(crate) fn reset_verdict(&self, id: u16) {
        self.reset::<3>(VERDICTS, id);
    }

    /// Sets an endpoint's counter to zero. No program may still run for it.
    pub(crate) fn reset_endpoint(&self, id: u16) {
        self.reset::<4>(ENDPOINTS, id);
    }

    /// The sum over the CPUs of entry `index` of the table that begins at word `table`; entries are `N` words.
    fn sum<const N: usize>(&self, table: usize, index: u16) -> [u64; N] {
        let mut sum = [0_u64; N];
        for first in self.places::<N>(table, index) {
            for (i, sum) in sum.iter_mut().enumerate() {
                *sum = sum.wrapping_add(self.words.load(first + i));
            }
        }
        sum
    }

    fn reset<const N: usize>(&self, table: usize, index: u16) {
        for first in self.places::<N>(table, index) {
            for i in 0..N {
                self.words.store(first + i, 0);
            }
        }
    }

    /// Where an entry begins, for each CPU.
    fn places<const N: usize>(&self, table: usize, index: u16) -> impl Iterator<Item = usize> {
        let cpus = (0..self.words.words().len()).step_by(CPU_WORDS);
        cpus.map(move |cpu| cpu + table + usize::from(index) * N)
    }
}

#[expect(
    clippy::as_conversions,
    reason = "a fieldless enum with `repr(u8)` has no other way to its number"
)]
pub(crate) const fn reason_number(reason: Reason) -> u8 {
    reason as u8
}
