//! A table of datagrams as memory that this process shares with the programs, or has for itself.
//!
//! Invariant: only the buckets of an endpoint that has no program are written from here.

use std::sync::atomic::{AtomicU64, Ordering};

use thyra_datapath_abi::FlowState;
use thyra_datapath_abi::datagram::{DATAGRAM_KEYS, DATAGRAM_SLOTS};
use thyra_datapath_abi::limits::{DATAGRAM_BUCKETS, MAX_ENDPOINTS};

use crate::datagram_table::DatagramMemory;
use crate::flow_words::Words;

/// The table of one family.
#[derive(Clone, Copy, Debug)]
pub struct DatagramWords<'a> {
    /// All buckets, one after the other.
    pub buckets: &'a [AtomicU64],
    /// Nanoseconds on the programs' clock.
    pub now_ns: u64,
}

impl<'a> DatagramWords<'a> {
    /// Words of a bucket.
    fn each(&self) -> usize {
        self.buckets.len() / (MAX_ENDPOINTS * DATAGRAM_BUCKETS)
    }

    /// The words of an endpoint.
    fn of(&self, endpoint: u16) -> &'a [AtomicU64] {
        let words = self.each() * DATAGRAM_BUCKETS;
        let first = usize::from(endpoint) % MAX_ENDPOINTS * words;
        &self.buckets[first..first + words]
    }

    /// What is remembered of an endpoint, fresh or not, with keys of `W` words.
    pub fn entries<const W: usize>(&self, endpoint: u16) -> impl Iterator<Item = ([u64; W], FlowState)> {
        let load = |word: &AtomicU64| word.load(Ordering::Acquire);
        let read = move |bucket: &[AtomicU64], slot: usize| {
            let key = std::array::from_fn(|at| load(&bucket[DATAGRAM_KEYS + slot * W + at]));
            (key, FlowState(load(&bucket[slot])))
        };
        let buckets = self.of(endpoint).chunks_exact(self.each());
        buckets
            .flat_map(move |bucket| (0..DATAGRAM_SLOTS).map(move |slot| read(bucket, slot)))
            .filter(|(_, state)| state.is_live())
    }

    /// Places in use, all endpoints together.
    #[must_use]
    pub fn count(&self) -> usize {
        let buckets = self.buckets.chunks_exact(self.each());
        let used = |word: &&AtomicU64| word.load(Ordering::Relaxed) != FlowState::FREE.0;
        buckets
            .map(|bucket| bucket[..DATAGRAM_SLOTS].iter().filter(used).count())
            .sum()
    }

    /// Forgets all of an endpoint.
    pub fn clear(&self, endpoint: u16) {
        for bucket in self.of(endpoint).chunks_exact(self.each()) {
            for state in &bucket[..DATAGRAM_SLOTS] {
                state.store(FlowState::FREE.0, Ordering::Relaxed);
            }
        }
    }

    /// Gives what is remembered of one endpoint to another. What changes meanwhile may be missed.
    pub fn copy(&self, from: u16, to: u16) {
        let pairs = self.of(from).chunks_exact(self.each());
        for (from, to) in pairs.zip(self.of(to).chunks_exact(self.each())) {
            let (states, keys) = from.split_at(DATAGRAM_SLOTS);
            let (new_states, new_keys) = to.split_at(DATAGRAM_SLOTS);
            let words = keys.len() / DATAGRAM_SLOTS;
            for slot in 0..DATAGRAM_SLOTS {
                let before = FlowState(states[slot].load(Ordering::Acquire));
                for at in slot * words..(slot + 1) * words {
                    new_keys[at].store(keys[at].load(Ordering::Acquire), Ordering::Relaxed);
                }
                let after = states[slot].load(Ordering::Acquire);
                let whole = before.is_live() && (before.0 ^ after) & FlowState::IDENTITY == 0;
                let state = if whole { before } else { FlowState::FREE };
                new_states[slot].store(state.0, Ordering::Release);
            }
        }
    }
}

impl<'a> DatagramMemory for DatagramWords<'a> {
    type Bucket = Words<'a>;

    fn bucket(&self, index: u32) -> Option<Words<'a>> {
        let start = usize::try_from(index).ok()? * self.each();
        self.buckets.get(start..start + self.each()).map(Words::new)
    }
    fn tick(&self) -> u64 {
        FlowState::tick(self.now_ns)
    }
}
