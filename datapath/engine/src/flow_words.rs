//! A table of connections as memory that this process shares with the programs, or has for itself.
//!
//! Invariant: a walk sees each connection that is there all the time once; one that comes or goes meanwhile it may
//! see or not.

use std::sync::atomic::{AtomicU64, Ordering};

use thyra_datapath_abi::FlowState;
use thyra_datapath_abi::flow::{FLOW_KEYS, FLOW_SLOTS, FLOW_STATES};
use thyra_datapath_abi::limits::{FLOW_BUCKETS, MAX_ENDPOINTS};

use crate::flow_table::{Bucket, FlowMemory};

/// The words of one bucket.
#[derive(Clone, Copy, Debug)]
pub struct Words<'a>(&'a [AtomicU64]);

impl<'a> Words<'a> {
    /// A bucket's words.
    #[must_use]
    pub fn new(words: &'a [AtomicU64]) -> Self {
        Self(words)
    }
}

impl Bucket for Words<'_> {
    fn load(self, word: usize) -> u64 {
        self.0[word].load(Ordering::Acquire)
    }
    fn store(self, word: usize, value: u64) {
        self.0[word].store(value, Ordering::Relaxed);
    }
    fn exchange(self, word: usize, old: u64, new: u64) -> bool {
        self.0[word]
            .compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }
}

/// The table of one family.
#[derive(Clone, Copy, Debug)]
pub struct FlowWords<'a> {
    /// All buckets, one after the other.
    pub buckets: &'a [AtomicU64],
    /// Connections by endpoint id (`State::outbound`).
    pub counts: &'a [AtomicU64],
    /// `State::outbound_budget`.
    pub budget: u64,
    /// Nanoseconds on the programs' clock.
    pub now_ns: u64,
}

/// A connection in the table.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a, const W: usize> {
    bucket: Words<'a>,
    slot: usize,
    /// Its state when it was read.
    pub state: FlowState,
    /// Its key.
    pub key: [u64; W],
}

impl<'a> FlowWords<'a> {
    fn each(&self) -> usize {
        self.buckets.len() / FLOW_BUCKETS
    }

    /// All connections, whose keys have `W` words.
    pub fn entries<const W: usize>(self) -> impl Iterator<Item = Entry<'a, W>> {
        let buckets = self.buckets.chunks_exact(self.each()).map(Words);
        buckets.flat_map(|bucket| (0..FLOW_SLOTS).filter_map(move |slot| Entry::read(bucket, slot)))
    }

    /// Takes a connection out unless it has changed since it was read; `endpoint` is the one in its key.
    #[must_use]
    pub fn remove<const W: usize>(&self, entry: &Entry<'_, W>, endpoint: u16) -> bool {
        let removed = entry
            .bucket
            .exchange(FLOW_STATES + entry.slot, entry.state.0, FlowState::FREE.0);
        if removed {
            self.give_back(endpoint);
        }
        removed
    }
}

impl<'a, const W: usize> Entry<'a, W> {
    /// Takes `mark` off its flags, however often they change meanwhile.
    pub fn unmark(&self, mark: u32) {
        let word = FLOW_STATES + self.slot;
        let mut state = self.state;
        while state.is_live() && state.flags() & mark != 0 {
            let _changed = self.bucket.exchange(word, state.0, state.without(mark).0);
            state = FlowState(self.bucket.load(word));
        }
    }

    fn read(bucket: Words<'a>, slot: usize) -> Option<Self> {
        let state = FlowState(bucket.load(FLOW_STATES + slot));
        let key = std::array::from_fn(|at| bucket.load(FLOW_KEYS + slot * W + at));
        state.is_live().then_some(Self {
            bucket,
            slot,
            state,
            key,
        })
    }
}

impl<'a> FlowMemory for FlowWords<'a> {
    type Bucket = Words<'a>;

    fn bucket(&self, index: u32) -> Option<Words<'a>> {
        let start = usize::try_from(index).ok()? * self.each();
        self.buckets.get(start..start + self.each()).map(Words)
    }
    fn tick(&self) -> u64 {
        FlowState::tick(self.now_ns)
    }
    fn take(&self, endpoint: u16) -> bool {
        let count = &self.counts[usize::from(endpoint) % MAX_ENDPOINTS];
        if count.fetch_add(1, Ordering::SeqCst) < self.budget {
            return true;
        }
        self.give_back(endpoint);
        false
    }
    fn give_back(&self, endpoint: u16) {
        self.counts[usize::from(endpoint) % MAX_ENDPOINTS].fetch_sub(1, Ordering::SeqCst);
    }
}
