//! The tables of the connections that pods opened, in memory shared with the programs.
//!
//! Invariant: a connection that may still carry a packet stays; one that changed while it was looked at is left
//! alone. The count of an endpoint is that of its connections, also after a process died between the two.

use std::net::SocketAddr;
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
use crate::sockets::{Connection, Phase};

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
        let swept = self.remove(memory, &|state, _| is_finished(state, now_ns));
        self.entries = swept.map(|swept| swept.looked_at - swept.removed);
        swept[0] + swept[1]
    }

    /// Forgets all connections of an endpoint.
    pub(crate) fn forget(&self, memory: &Memory, endpoint: u16) {
        let _counted = self.remove(memory, &|_, other| other == endpoint);
    }

    /// Remembers connections that endpoint `id` opened; one that is known already stays as it is. Returns whether all
    /// had room.
    pub(crate) fn seed(&self, memory: &Memory, id: u16, opened: &[Connection]) -> bool {
        let seed = memory.flow_seed();
        let (four, six) = (words(memory, &self.v4), words(memory, &self.v6));
        let remember = |connection: &Connection| {
            let flags = flags(connection.phase);
            match (connection.local, connection.remote) {
                (SocketAddr::V4(local), SocketAddr::V4(remote)) => {
                    known_or_new(&four, &Key::v4(&Flow4::between(local, remote, id), seed), flags)
                }
                (SocketAddr::V6(local), SocketAddr::V6(remote)) => {
                    known_or_new(&six, &Key::v6(&Flow6::between(local, remote, id), seed), flags)
                }
                // No packet is of two families.
                _ => true,
            }
        };
        opened.iter().map(remember).fold(true, |all, one| all & one)
    }

    /// Writes all connections of endpoint `from` once more under the id `to`. Returns whether all had room.
    pub(crate) fn copy(&self, memory: &Memory, from: u16, to: u16) -> bool {
        let seed = memory.flow_seed();
        let four = words(memory, &self.v4);
        let six = words(memory, &self.v6);
        let copied4 = four.entries().all(|entry| {
            let flow = Flow4 {
                endpoint: to,
                ..v4(entry.key)
            };
            v4(entry.key).endpoint != from
                || flow_table::open(&four, &Key::v4(&flow, seed), entry.state.flags())
        });
        let copied6 = six.entries().all(|entry| {
            let flow = Flow6 {
                endpoint: to,
                ..v6(entry.key)
            };
            v6(entry.key).endpoint != from
                || flow_table::open(&six, &Key::v6(&flow, seed), entry.state.flags())
        });
        copied4 && copied6
    }

    /// Takes `FlowState::DIRECT` off all connections.
    pub(crate) fn through_the_stack(&self, memory: &Memory) {
        let (four, six) = (words(memory, &self.v4), words(memory, &self.v6));
        four.entries::<FLOW4_WORDS>()
            .for_each(|entry| entry.unmark(FlowState::DIRECT));
        six.entries::<FLOW6_WORDS>()
            .for_each(|entry| entry.unmark(FlowState::DIRECT));
    }

    /// Takes out what is `unwanted`, by family.
    fn remove(&self, memory: &Memory, unwanted: &dyn Fn(FlowState, u16) -> bool) -> [Swept; 2] {
        [
            remove(words(memory, &self.v4), |key| v4(key).endpoint, unwanted),
            remove(words(memory, &self.v6), |key| v6(key).endpoint, unwanted),
        ]
    }

    /// Makes the counts true again. Programs may open connections meanwhile: a count that changed during a walk is
    /// looked at once more.
    fn recount(&self, memory: &Memory) {
        let counts = memory.outbound();
        for _ in 0..RECOUNTS {
            let before: Vec<u64> = counts.iter().map(|count| count.load(Ordering::SeqCst)).collect();
            let mut found = vec![0_u64; MAX_ENDPOINTS];
            let four = words(memory, &self.v4)
                .entries()
                .map(|entry| v4(entry.key).endpoint);
            let six = words(memory, &self.v6)
                .entries()
                .map(|entry| v6(entry.key).endpoint);
            for endpoint in four.chain(six) {
                found[usize::from(endpoint) % MAX_ENDPOINTS] += 1;
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

fn v4(key: [u64; FLOW4_WORDS]) -> Flow4 {
    zerocopy::transmute!(key)
}

fn v6(key: [u64; FLOW6_WORDS]) -> Flow6 {
    zerocopy::transmute!(key)
}

fn known_or_new<const W: usize>(words: &FlowWords<'_>, key: &Key<W>, flags: u32) -> bool {
    flow_table::find(words, key, 0).is_some() || flow_table::open(words, key, flags)
}

fn flags(phase: Phase) -> u32 {
    match phase {
        Phase::Opening => 0,
        Phase::Open => FlowState::ANSWERED,
        Phase::LocalClosed => FlowState::ANSWERED | FlowState::LOCAL_FIN,
        Phase::RemoteClosed => FlowState::ANSWERED | FlowState::REMOTE_FIN,
        Phase::Closed => FlowState::ANSWERED | FlowState::LOCAL_FIN | FlowState::REMOTE_FIN,
    }
}

/// Takes out what is `unwanted` of one table.
fn remove<const W: usize>(
    words: FlowWords<'_>,
    endpoint: fn([u64; W]) -> u16,
    unwanted: &dyn Fn(FlowState, u16) -> bool,
) -> Swept {
    let mut swept = Swept::default();
    for entry in words.entries::<W>() {
        let endpoint = endpoint(entry.key);
        swept.looked_at += 1;
        swept.removed += usize::from(unwanted(entry.state, endpoint) && words.remove(&entry, endpoint));
    }
    swept
}

fn words<'a>(memory: &'a Memory, table: &'a Mapping) -> FlowWords<'a> {
    FlowWords {
        buckets: table.words(),
        counts: memory.outbound(),
        budget: memory.outbound_budget(),
        now_ns: crate::Datapath::now_ns(),
    }
}
