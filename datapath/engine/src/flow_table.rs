//! The connections that pods opened: buckets of seven slots, visited by double hashing.
//!
//! ```text
//! word 0        1 .. 7      8 ..
//! spilled?  state × 7   key × 7
//! ```
//!
//! A connection lives in the first bucket of its way that had room when it was opened; the full ones before it say
//! for good that they sent somebody on. So a look-up reads one cache line when nothing is there, two when
//! something is, and more only where a bucket once was full. The same code runs in the programs, in user space
//! and on the host.
//!
//! Invariant: all words are shared; a slot belongs to whoever takes its state from free to claimed, and a
//! connection is there once its state is live, which is stored after its key. Nothing is ever moved.

use thyra_datapath_abi::flow::{FLOW_KEYS, FLOW_SLOTS, FLOW_SPILLED, FLOW_STATES};
use thyra_datapath_abi::limits::FLOW_BUCKETS;
use thyra_datapath_abi::{Flow4, Flow6, FlowState};
use zerocopy::transmute;

use crate::tables::number;

const MASK: u32 = number(FLOW_BUCKETS) - 1;
const _: () = assert!(FLOW_BUCKETS.is_power_of_two() && FLOW_BUCKETS <= 1 << 16);
/// Buckets on the way of a connection: eight full ones are met first when about 70 % of all slots are in use.
const STEPS: u32 = 8;
/// Others that may change a state between reading and marking it; each of the few flags is set once.
const TRIES: usize = 4;

/// The words of one bucket.
pub trait Bucket: Copy {
    /// Reads a word.
    fn load(self, word: usize) -> u64;
    /// Writes a word.
    fn store(self, word: usize, value: u64);
    /// Replaces a word if it is `old`; whether it was. Nothing is reordered across it.
    fn exchange(self, word: usize, old: u64, new: u64) -> bool;
}

/// The table of one family.
pub trait FlowMemory {
    /// A bucket.
    type Bucket: Bucket;

    /// The bucket with this number, below `FLOW_BUCKETS`.
    fn bucket(&self, index: u32) -> Option<Self::Bucket>;
    /// What `FlowState::tick` says now.
    fn tick(&self) -> u64;
    /// Counts one more connection of the endpoint; false when it has spent its budget.
    fn take(&self, endpoint: u16) -> bool;
    /// Counts one less.
    fn give_back(&self, endpoint: u16);
}

/// A connection's key, as the words that the table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key<const W: usize> {
    words: [u64; W],
    first: u32,
    stride: u32,
    tag: u64,
    endpoint: u16,
}

impl Key<2> {
    /// Of an IPv4 connection, in a table with this seed.
    #[must_use]
    #[inline(always)]
    pub fn v4(flow: &Flow4, seed: u64) -> Self {
        Self::new(transmute!(*flow), flow.endpoint, seed)
    }
}

impl Key<5> {
    /// Of an IPv6 connection, in a table with this seed.
    #[must_use]
    #[inline(always)]
    pub fn v6(flow: &Flow6, seed: u64) -> Self {
        Self::new(transmute!(*flow), flow.endpoint, seed)
    }
}

/// A tuple's words in a table with this seed.
#[inline(always)]
pub(crate) fn hash<const W: usize>(words: [u64; W], seed: u64) -> u64 {
    let mut hash = seed;
    for word in words {
        hash = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 32;
    }
    // Tuples often differ in a port alone, which one round does not spread over all bits.
    hash = hash.wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash ^ hash >> 32
}

impl<const W: usize> Key<W> {
    #[inline(always)]
    fn new(words: [u64; W], endpoint: u16, seed: u64) -> Self {
        let [a, b, c, d, e, f, ..] = hash(words, seed).to_le_bytes();
        Self {
            words,
            first: u32::from_le_bytes([a, b, 0, 0]),
            // Odd: the way comes to every bucket once.
            stride: u32::from_le_bytes([c, d, 0, 0]) | 1,
            tag: u64::from_le_bytes([e, f, 0, 0, 0, 0, 0, 0]),
            endpoint,
        }
    }

    /// The bucket that the connection comes to after so many others.
    #[inline(always)]
    fn bucket(&self, step: u32) -> u32 {
        self.first.wrapping_add(step.wrapping_mul(self.stride)) & MASK
    }
}

/// The flags of a connection before `mark` was added to them; none when it is not there.
#[inline(always)]
pub fn find<M: FlowMemory, const W: usize>(memory: &M, key: &Key<W>, mark: u32) -> Option<u32> {
    let mut step = 0;
    while step < STEPS {
        let bucket = memory.bucket(key.bucket(step))?;
        if let Some(found) = locate(bucket, key) {
            return note(memory, bucket, found, mark);
        }
        if bucket.load(FLOW_SPILLED) == 0 {
            return None;
        }
        step += 1;
    }
    None
}

/// Remembers a connection anew, whatever was known of it; false when there is no room or no budget for it.
#[inline(always)]
pub fn open<M: FlowMemory, const W: usize>(memory: &M, key: &Key<W>, flags: u32) -> bool {
    let state = FlowState::live(flags, key.tag, memory.tick());
    if reopen(memory, key, state) {
        return true;
    }
    if !memory.take(key.endpoint) {
        return false;
    }
    let inserted = insert(memory, key, state);
    if !inserted {
        memory.give_back(key.endpoint);
    }
    inserted
}

/// Begins a connection again whose key is still there.
#[inline(always)]
fn reopen<M: FlowMemory, const W: usize>(memory: &M, key: &Key<W>, state: FlowState) -> bool {
    let mut step = 0;
    while step < STEPS {
        let Some(bucket) = memory.bucket(key.bucket(step)) else {
            return false;
        };
        // Asked for now, the line that the key will be written to comes along with that of the states.
        let _key = bucket.load(FLOW_KEYS);
        if let Some((slot, before)) = locate(bucket, key) {
            // It may be removed at this very moment: then it is as if it had not been there.
            return bucket.exchange(FLOW_STATES + slot, before.0, state.0);
        }
        if bucket.load(FLOW_SPILLED) == 0 {
            return false;
        }
        step += 1;
    }
    false
}

/// Puts a connection into the first free slot of its way.
#[inline(always)]
fn insert<M: FlowMemory, const W: usize>(memory: &M, key: &Key<W>, state: FlowState) -> bool {
    let mut step = 0;
    while step < STEPS {
        let Some(bucket) = memory.bucket(key.bucket(step)) else {
            return false;
        };
        if occupy(bucket, key, state) {
            return true;
        }
        // Whoever said so before has said it for good.
        let _already = bucket.exchange(FLOW_SPILLED, 0, 1);
        step += 1;
    }
    false
}

/// The slot that holds the key, with its state.
#[inline(always)]
fn locate<B: Bucket, const W: usize>(bucket: B, key: &Key<W>) -> Option<(usize, FlowState)> {
    let mut slot = 0;
    while slot < FLOW_SLOTS {
        let state = FlowState(bucket.load(FLOW_STATES + slot));
        if state.may_be(key.tag) && holds(bucket, FLOW_KEYS + slot * W, &key.words) {
            return Some((slot, state));
        }
        slot += 1;
    }
    None
}

/// Whether a bucket has these words from `first` on.
#[inline(always)]
pub(crate) fn holds<B: Bucket, const W: usize>(bucket: B, first: usize, words: &[u64; W]) -> bool {
    let mut at = 0;
    while at < W {
        if bucket.load(first + at) != words[at] {
            return false;
        }
        at += 1;
    }
    true
}

/// Writes these words from `first` on.
#[inline(always)]
pub(crate) fn write<B: Bucket, const W: usize>(bucket: B, first: usize, words: &[u64; W]) {
    let mut at = 0;
    while at < W {
        bucket.store(first + at, words[at]);
        at += 1;
    }
}

/// Adds `mark` to a state. None when the slot went to another connection since it was read.
#[inline(always)]
fn note<M: FlowMemory>(
    memory: &M,
    bucket: M::Bucket,
    (slot, found): (usize, FlowState),
    mark: u32,
) -> Option<u32> {
    let word = FLOW_STATES + slot;
    let mut state = FlowState(bucket.load(word));
    let mut tries = 0;
    while tries < TRIES {
        if (state.0 ^ found.0) & FlowState::IDENTITY != 0 {
            return None;
        }
        if state.has(mark) || bucket.exchange(word, state.0, state.marked(mark, memory.tick()).0) {
            return Some(found.flags());
        }
        state = FlowState(bucket.load(word));
        tries += 1;
    }
    Some(found.flags())
}

/// Puts a connection into a free slot of the bucket.
#[inline(always)]
fn occupy<B: Bucket, const W: usize>(bucket: B, key: &Key<W>, state: FlowState) -> bool {
    let claimed = FlowState::claimed(key.tag).0;
    let mut slot = 0;
    while slot < FLOW_SLOTS {
        let word = FLOW_STATES + slot;
        if bucket.load(word) == FlowState::FREE.0 && bucket.exchange(word, FlowState::FREE.0, claimed) {
            write(bucket, FLOW_KEYS + slot * W, &key.words);
            return bucket.exchange(word, claimed, state.0);
        }
        slot += 1;
    }
    false
}
