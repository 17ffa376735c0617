//! What is counted by pair of identities, of requests and of flows: which pairs are told apart, and how long things
//! took.
//!
//! Invariant: no more pairs than `MAX_PAIRS`, however many identities there are; the others are counted together.

use std::collections::BTreeMap;
use std::time::Duration;

/// Pairs that are told apart.
pub const MAX_PAIRS: usize = 1024;
/// What stands for the pairs beyond.
pub const OTHERS: &str = "others";
/// A source or destination without identity.
pub const UNKNOWN: &str = "unknown";

/// The pair that something is counted under: its own while there is room, else that of the others.
pub fn told_apart<K: Ord, V>(pairs: &BTreeMap<K, V>, own: K, others: impl FnOnce() -> K) -> K {
    if pairs.contains_key(&own) || pairs.len() < MAX_PAIRS {
        own
    } else {
        others()
    }
}

/// Durations by how long they were: one bucket more than there are bounds, for the rest.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram<const BUCKETS: usize> {
    /// How many ended in each, not cumulative.
    pub buckets: [u64; BUCKETS],
    /// All together.
    pub took: Duration,
}

impl<const BUCKETS: usize> Default for Histogram<BUCKETS> {
    fn default() -> Self {
        Self {
            buckets: [0; BUCKETS],
            took: Duration::ZERO,
        }
    }
}

impl<const BUCKETS: usize> Histogram<BUCKETS> {
    /// One more; `bounds`: the inclusive upper ends of all buckets but the last, seconds.
    pub fn add(&mut self, bounds: &[f64], took: Duration) {
        let seconds = took.as_secs_f64();
        self.buckets[bounds.partition_point(|bound| *bound < seconds)] += 1;
        self.took += took;
    }

    /// All of them.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.buckets.iter().sum()
    }
}
