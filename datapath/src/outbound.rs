//! The tables of the connections that pods opened, in memory shared with the programs.
//!
//! Invariant: a connection that may still carry a packet stays; one that changed while it was looked at is left
//! alone. The count of an endpoint is that of its connections, also after a process died between the two.

use std::sync::atomic::Ordering;

use thyra_datapath_abi::flow::{FLOW4_WORDS, FLOW6_WORDS, FlowBucket4, FlowBucket6};
use thyra_datapath_abi::limits::{FLOW_BUCKETS, MAX_ENDPOINTS};
use thyra_datapath_abi::{Flow4, Flow6, FlowState, maps};
use thyra_datapath_engine::flow_table::{self, Key};
use thyra_datapath_engine::flow_words::FlowWords;

use crate::flow_maps::{Swept, is_finished};
use crate::mapping::Mapping;
use crate::memory::Memory;
use crate::open::{OpenError, Source};

const WORDS4: usize = FLOW_BUCKETS * size_of::<FlowBucket4>() / size_of::<u64>();
const WORDS6: usize = FLOW_BUCKETS * size_of::<FlowBucket6>() / size_of::<u64>();
/// Walks after which a count that never stands still is left as it is.
const RECOUNTS: usize = 8;

/// Both tables.
#[derive(Debug)]
pub(crate) struct Outbound {
    v4: Mapping,
    v6: Mapping,
    entries: [usize; 2],
}

impl Outbound {
    pub(crate) fn open(source: &Source<'_>, memory: &Memory) -> Result<Self, OpenError> {
        let outbound = Self {
            v4: source.memory(maps::OUTBOUND4, WORDS4)?,
            v6: source.memory(maps::OUTBOUND6, WORDS6)?,
            entries: [0; 2],
        };
        outbound.recount(memory);
        Ok(outbound)
    }

    /// Connections of each family at the end of the last sweep.
    pub(crate) fn entries(&self) -> [usize; 2] {
        self.entries
    }

    /// Removes finished connections.
    pub(crate) fn sweep(&mut self, memory: &Memory, now_ns: u64) -> Swept {
        let is_finished = |state, _| is_finished(state, now_ns);
        let swept4 = self.remove4(memory, is_finished);
        let swept6 = self.remove6(memory, is_finished);
        self.entries = [swept4, swept6].map(|swept| swept.looked_at - swept.removed);
        swept4 + swept6
    }

    /// Forgets all connections of an endpoint.
    pub(crate) fn forget(&self, memory: &Memory, endpoint: u16) {
        let is_its = |_, other| other == endpoint;
        let _removed = self.remove4(memory, is_its) + self.remove6(memory, is_its);
    }

    /// Writes all connections of endpoint `from` once more under the id `to`. Returns whether all had room.
    pub(crate) fn copy(&self, memory: &Memory, from: u16, to: u16) -> bool {
        let (words4, words6) = (words(memory, &self.v4), words(memory, &self.v6));
        let mut all = true;
        for entry in words4.entries::<FLOW4_WORDS>() {
            let flow: Flow4 = zerocopy::transmute!(entry.key);
            if flow.endpoint == from {
                let key = Key::v4(&Flow4 { endpoint: to, ..flow }, memory.flow_seed());
                all &= flow_table::open(&words4, &key, entry.state.flags());
            }
        }
        for entry in words6.entries::<FLOW6_WORDS>() {
            let flow: Flow6 = zerocopy::transmute!(entry.key);
            if flow.endpoint == from {
                let key = Key::v6(&Flow6 { endpoint: to, ..flow }, memory.flow_seed());
                all &= flow_table::open(&words6, &key, entry.state.flags());
            }
        }
        all
    }

    fn remove4(&self, memory: &Memory, unwanted: impl Fn(FlowState, u16) -> bool) -> Swept {
        let words = words(memory, &self.v4);
        let mut swept = Swept::default();
        for entry in words.entries::<FLOW4_WORDS>() {
            let flow: Flow4 = zerocopy::transmute!(entry.key);
            swept.looked_at += 1;
            if unwanted(entry.state, flow.endpoint) && words.remove(&entry, flow.endpoint) {
                swept.removed += 1;
            }
        }
        swept
    }

    fn remove6(&self, memory: &Memory, unwanted: impl Fn(FlowState, u16) -> bool) -> Swept {
        let words = words(memory, &self.v6);
        let mut swept = Swept::default();
        for entry in words.entries::<FLOW6_WORDS>() {
            let flow: Flow6 = zerocopy::transmute!(entry.key);
            swept.looked_at += 1;
            if unwanted(entry.state, flow.endpoint) && words.remove(&entry, flow.endpoint) {
                swept.removed += 1;
            }
        }
        swept
    }

    /// Makes the counts true again. Programs may open connections meanwhile: a count that changed during a walk is
    /// looked at once more.
    fn recount(&self, memory: &Memory) {
        let counts = memory.outbound();
        for _ in 0..RECOUNTS {
            let before: Vec<u64> = counts.iter().map(|count| count.load(Ordering::SeqCst)).collect();
            let mut found = vec![0_u64; MAX_ENDPOINTS];
            for entry in words(memory, &self.v4).entries::<FLOW4_WORDS>() {
                let flow: Flow4 = zerocopy::transmute!(entry.key);
                found[usize::from(flow.endpoint) % MAX_ENDPOINTS] += 1;
            }
            for entry in words(memory, &self.v6).entries::<FLOW6_WORDS>() {
                let flow: Flow6 = zerocopy::transmute!(entry.key);
                found[usize::from(flow.endpoint) % MAX_ENDPOINTS] += 1;
            }
            let mut stood_still = true;
            for (count, (before, found)) in counts.iter().zip(before.into_iter().zip(found)) {
                let set = count.compare_exchange(before, found, Ordering::SeqCst, Ordering::SeqCst);
                stood_still &= set.is_ok();
            }
            if stood_still {
                return;
            }
        }
    }
}

fn words<'a>(memory: &'a Memory, table: &'a Mapping) -> FlowWords<'a> {
    FlowWords {
        buckets: table.words(),
        counts: memory.outbound(),
        budget: memory.outbound_budget(),
        now_ns: crate::Datapath::now_ns(),
    }
}
