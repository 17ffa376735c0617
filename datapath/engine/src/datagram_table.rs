//! What is remembered of datagrams: for each endpoint some buckets of eight entries (`abi::datagram`).
//!
//! A tuple has one bucket. A new entry takes a free place there, else that of one that is no longer fresh, else that of
//! the least used one that is not needed; only an entry that is needed itself takes the place of another such. So what
//! others send never pushes out what the pod waits for, and nobody has to collect anything.
//!
//! Invariant: all words are shared; a place belongs to whoever takes its state to claimed, and an entry is there once
//! its state is live, which is stored after its key.

use thyra_datapath_abi::FlowState;
use thyra_datapath_abi::datagram::{DATAGRAM_KEYS, DATAGRAM_SLOTS, FRESH_TICKS, INBOUND, KIND, NEEDED};
use thyra_datapath_abi::limits::DATAGRAM_BUCKETS;

use crate::flow_table::{Bucket, hash, holds, write};
use crate::tables::number;

const EACH: u32 = number(DATAGRAM_BUCKETS);
const MASK: usize = DATAGRAM_SLOTS - 1;
const _: () = assert!(DATAGRAM_BUCKETS.is_power_of_two() && DATAGRAM_SLOTS.is_power_of_two());
/// The tick of another CPU may be a little ahead.
const SLACK_TICKS: u64 = 16;
/// What a free place, one that is no longer fresh, and one that is not needed are worth, before their age.
const FREE: u64 = 3 << 40;
const STALE: u64 = 2 << 40;
const SPARE: u64 = 1 << 40;

/// How many slots there are, unknown to the compiler: unrolled, a walk takes more stack than a program has left.
#[inline(always)]
fn slots() -> usize {
    core::hint::black_box(DATAGRAM_SLOTS)
}

/// What a look-up changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// Nothing.
    Nothing,
    /// The other side has sent what policy allows: keeps fresh what it began.
    Received,
    /// The pod has sent: keeps everything fresh. `needed`: policy would not let an answer in.
    Sent {
        /// Becomes `NEEDED` if the pod began.
        needed: bool,
    },
}

/// The table of one family.
pub trait DatagramMemory {
    /// A bucket.
    type Bucket: Bucket;

    /// The bucket with this number, below `MAX_ENDPOINTS * DATAGRAM_BUCKETS`.
    fn bucket(&self, index: u32) -> Option<Self::Bucket>;
    /// What `FlowState::tick` says now.
    fn tick(&self) -> u64;
}

/// An entry's key, as the words that the table holds, and where it belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key<const W: usize> {
    words: [u64; W],
    bucket: u32,
    tag: u64,
}

impl<const W: usize> Key<W> {
    /// The words are those of a `Datagram4` or `Datagram6`. Hashed as connections are (`flow_table`), but that the
    /// endpoint chooses the buckets and is no part of the hash.
    #[must_use]
    #[inline(always)]
    pub fn new(words: [u64; W], endpoint: u16, seed: u64) -> Self {
        let [a, b, c, d, ..] = hash(words, seed).to_le_bytes();
        let [endpoint, _] = endpoint.to_le_bytes();
        Self {
            words,
            bucket: u32::from(endpoint) * EACH + (u32::from_le_bytes([a, b, 0, 0]) & (EACH - 1)),
            tag: u64::from_le_bytes([c, d, 0, 0, 0, 0, 0, 0]),
        }
    }
}

/// The flags that a fresh entry had; none when there is none of this kind.
#[inline(always)]
pub fn recall<M: DatagramMemory, const W: usize>(
    memory: &M,
    key: &Key<W>,
    kind: u32,
    touch: Touch,
) -> Option<u32> {
    let bucket = memory.bucket(key.bucket)?;
    let now = memory.tick();
    let mut slot = 0;
    while slot < slots() {
        // The mask is for the verifier.
        let at = slot & MASK;
        let state = FlowState(bucket.load(at));
        if is_of(state, key.tag, kind)
            && is_fresh(state, now)
            && holds(bucket, DATAGRAM_KEYS + at * W, &key.words)
        {
            // Its place may have gone to another since.
            let state = FlowState(bucket.load(at));
            if !is_of(state, key.tag, kind) {
                return None;
            }
            keep(bucket, at, state, now, touch);
            return Some(state.flags());
        }
        slot += 1;
    }
    None
}

/// Keeps an entry fresh that was found.
#[inline(always)]
fn keep<B: Bucket>(bucket: B, slot: usize, state: FlowState, now: u64, touch: Touch) {
    let inbound = state.flags() & INBOUND != 0;
    let (kept, mark) = match touch {
        Touch::Nothing => (false, 0),
        Touch::Received => (inbound, 0),
        Touch::Sent { needed } => (true, if needed && !inbound { NEEDED } else { 0 }),
    };
    // At most once a tick; whoever changed it meanwhile has kept it as well.
    if kept && (state.age(now) != 0 || !state.has(mark)) {
        let _lost = bucket.exchange(slot, state.0, state.marked(mark, now).0);
    }
}

/// Writes a new entry; false when everything in its bucket counts for more, or another took the place.
#[inline(always)]
pub fn note<M: DatagramMemory, const W: usize>(memory: &M, key: &Key<W>, flags: u32) -> bool {
    let Some(bucket) = memory.bucket(key.bucket) else {
        return false;
    };
    let now = memory.tick();
    let (mut best, mut slot) = (0, 0);
    while slot < slots() {
        let worth = worth(FlowState(bucket.load(slot & MASK)), now, flags);
        if worth > best {
            best = worth;
        }
        slot += 1;
    }
    slot = 0;
    while slot < slots() {
        let before = FlowState(bucket.load(slot & MASK));
        // One that was used meanwhile stays.
        if best != 0 && worth(before, now, flags) == best {
            return replace(
                bucket,
                slot & MASK,
                before,
                key,
                FlowState::live(flags, key.tag, now),
            );
        }
        slot += 1;
    }
    false
}

/// Puts an entry into the place of what was there before; false when another took it.
#[inline(always)]
fn replace<B: Bucket, const W: usize>(
    bucket: B,
    slot: usize,
    before: FlowState,
    key: &Key<W>,
    state: FlowState,
) -> bool {
    let claimed = FlowState::claimed(key.tag).0;
    if !bucket.exchange(slot, before.0, claimed) {
        return false;
    }
    write(bucket, DATAGRAM_KEYS + slot * W, &key.words);
    bucket.exchange(slot, claimed, state.0)
}

/// How well a new entry with these flags takes the place of this one; 0: not at all.
#[inline(always)]
fn worth(state: FlowState, now: u64, flags: u32) -> u64 {
    if state.0 == FlowState::FREE.0 {
        return FREE;
    }
    if !state.is_live() {
        // Being written.
        return 0;
    }
    let age = state.age(now).wrapping_add(SLACK_TICKS) & 0xffff_ffff;
    if age >= FRESH_TICKS + SLACK_TICKS {
        STALE + age
    } else if state.flags() & NEEDED == 0 {
        SPARE + age
    } else if flags & NEEDED != 0 {
        1 + age
    } else {
        0
    }
}

#[inline(always)]
fn is_of(state: FlowState, tag: u64, kind: u32) -> bool {
    state.may_be(tag) && state.flags() & KIND == kind
}

#[inline(always)]
fn is_fresh(state: FlowState, now: u64) -> bool {
    let age = state.age(now).wrapping_add(SLACK_TICKS) & 0xffff_ffff;
    age < FRESH_TICKS + SLACK_TICKS
}
