//! The kernel's maps as the engine's `Flows`: the pods' own connections in arrays, the node's in LRU hashes.
//!
//! Invariant: words that several CPUs write are changed by single atomic instructions alone.
#![expect(
    clippy::as_conversions,
    reason = "indices are widened to the width of an address, after they were masked"
)]

use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};

use aya_ebpf::maps::LruHashMap;
use thyra_datapath_abi::datagram::{DATAGRAM4_WORDS, DATAGRAM6_WORDS};
use thyra_datapath_abi::limits::MAX_ENDPOINTS;
use thyra_datapath_abi::{Flow4, Flow6, FlowState, State};
use thyra_datapath_engine::datagram_table::{self, DatagramMemory, Touch};
use thyra_datapath_engine::flow_table::{self, Bucket, FlowMemory, Key};
use thyra_datapath_engine::flows::{Datagrams, FlowTable, Flows};

use zerocopy::transmute;

use crate::events::coarse_now;
use crate::maps;
use crate::node::{Node, seed};

const ORDERED: AtomicOrdering = AtomicOrdering::SeqCst;

/// The words of a bucket that the kernel gave out.
#[derive(Clone, Copy)]
struct Words(*mut u64);

impl Bucket for Words {
    #[inline(always)]
    fn load(self, word: usize) -> u64 {
        // SAFETY: the engine stays inside a bucket, and the verifier sees that it does; so for the others.
        unsafe { core::ptr::read_volatile(self.0.add(word)) }
    }
    #[inline(always)]
    fn store(self, word: usize, value: u64) {
        // SAFETY: as above.
        unsafe { core::ptr::write_volatile(self.0.add(word), value) }
    }
    #[inline(always)]
    fn exchange(self, word: usize, old: u64, new: u64) -> bool {
        // SAFETY: as above.
        unsafe { atomic_cxchg::<u64, ORDERED, ORDERED>(self.0.add(word), old, new).1 }
    }
}

/// One family's table of the pods' own connections.
struct Outbound<const VERSION: u8>(*mut State);

impl<const VERSION: u8> Outbound<VERSION> {
    #[inline(always)]
    fn counts(&self) -> *mut [u64; MAX_ENDPOINTS] {
        // SAFETY: a field of the element that the kernel gave out.
        unsafe { &raw mut (*self.0).outbound }
    }
}

impl<const VERSION: u8> FlowMemory for Outbound<VERSION> {
    type Bucket = Words;

    #[inline(always)]
    fn bucket(&self, index: u32) -> Option<Words> {
        match VERSION {
            4 => maps::OUTBOUND4
                .get_ptr_mut(index)
                .map(|bucket| Words(bucket.cast())),
            _ => maps::OUTBOUND6
                .get_ptr_mut(index)
                .map(|bucket| Words(bucket.cast())),
        }
    }
    #[inline(always)]
    fn tick(&self) -> u64 {
        tick()
    }
    #[inline(always)]
    fn take(&self, endpoint: u16) -> bool {
        // SAFETY: a word of the element that the kernel gave out.
        let budget = unsafe { core::ptr::read_volatile(&raw const (*self.0).outbound_budget) };
        if count(self.counts(), endpoint, 1) < budget {
            return true;
        }
        self.give_back(endpoint);
        false
    }
    #[inline(always)]
    fn give_back(&self, endpoint: u16) {
        let _before = count(self.counts(), endpoint, u64::MAX);
    }
}

/// Adds to the number of an endpoint's connections (`u64::MAX`: takes one off); what it was. `counts`: a field of the
/// state that the kernel gave out.
#[inline(always)]
pub(crate) fn count(counts: *mut [u64; MAX_ENDPOINTS], endpoint: u16, change: u64) -> u64 {
    // SAFETY: masked to the table; the programs and user space change it by such instructions alone.
    unsafe {
        let count = counts.cast::<u64>().add(endpoint as usize & (MAX_ENDPOINTS - 1));
        atomic_xadd::<u64, u64, ORDERED>(count, change)
    }
}

/// One family's table of datagrams.
struct Remembered<const VERSION: u8>;

impl<const VERSION: u8> DatagramMemory for Remembered<VERSION> {
    type Bucket = Words;

    #[inline(always)]
    fn bucket(&self, index: u32) -> Option<Words> {
        match VERSION {
            4 => maps::DATAGRAMS4
                .get_ptr_mut(index)
                .map(|bucket| Words(bucket.cast())),
            _ => maps::DATAGRAMS6
                .get_ptr_mut(index)
                .map(|bucket| Words(bucket.cast())),
        }
    }
    #[inline(always)]
    fn tick(&self) -> u64 {
        tick()
    }
}

#[inline(always)]
pub fn tick() -> u64 {
    FlowState::tick(coarse_now())
}

/// Adds flags to an entry of a hash; what it was. An entry is marked by one packet of one connection: what two CPUs
/// mark at once is lost, and marked by the next packet.
#[inline(always)]
pub fn mark(entry: *mut FlowState, flags: u32) -> FlowState {
    let state = Words(entry.cast());
    let before = FlowState(state.load(0));
    if !before.has(flags) {
        let _lost = state.exchange(0, before.0, before.marked(flags, tick()).0);
    }
    before
}

/// `Flows::find4` of the node's connections.
#[inline(always)]
fn find_host<K>(host: &LruHashMap<K, FlowState>, key: &K, flags: u32) -> Option<u32> {
    Some(mark(host.get_ptr_mut(key)?, flags).flags())
}

#[inline(always)]
fn open_host<K>(host: &LruHashMap<K, FlowState>, key: &K, flags: u32) -> bool {
    host.insert(key, FlowState::live(flags, 0, tick()), 0).is_ok()
}

/// Looked for first: a removal takes the bucket's lock, and mostly there is nothing to remove.
#[inline(always)]
fn forget_host<K>(host: &LruHashMap<K, FlowState>, key: &K) {
    if host.get_ptr(key).is_some() {
        // Whoever removed it since has done what is asked.
        let _absent = host.remove(key);
    }
}

/// The last word of a connection's key holds a protocol, which is 0 for TCP; in its place the functions below, which
/// have no register left, take the flags.
const PROTOCOL: u32 = 48;

/// `flow_table::find` and `open`, as global functions (`steps`): a walk through a table is a good part of what the
/// verifier has to read.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_outbound4(first: u64, last_flags: u64) -> u32 {
    let (words, flags) = ([first, key_of(last_flags)], flags_of(last_flags));
    match maps::STATE.get_ptr_mut(0) {
        Some(state) => find_here4(state, &transmute!(words), flags).unwrap_or(NONE),
        None => NONE,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_outbound6(a: u64, b: u64, c: u64, d: u64, last_flags: u64) -> u32 {
    let (words, flags) = ([a, b, c, d, key_of(last_flags)], flags_of(last_flags));
    match maps::STATE.get_ptr_mut(0) {
        Some(state) => find_here6(state, &transmute!(words), flags).unwrap_or(NONE),
        None => NONE,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn open_outbound4(first: u64, last_flags: u64) -> bool {
    let (flow, flags): (Flow4, u32) = (transmute!([first, key_of(last_flags)]), flags_of(last_flags));
    maps::STATE
        .get_ptr_mut(0)
        .is_some_and(|state| flow_table::open(&Outbound::<4>(state), &Key::v4(&flow, seed(state)), flags))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn open_outbound6(a: u64, b: u64, c: u64, d: u64, last_flags: u64) -> bool {
    let (flow, flags): (Flow6, u32) = (transmute!([a, b, c, d, key_of(last_flags)]), flags_of(last_flags));
    maps::STATE
        .get_ptr_mut(0)
        .is_some_and(|state| flow_table::open(&Outbound::<6>(state), &Key::v6(&flow, seed(state)), flags))
}

#[inline(always)]
fn with_flags(last: u64, flags: u32) -> u64 {
    last | u64::from(flags) << PROTOCOL
}

#[inline(always)]
fn key_of(last_flags: u64) -> u64 {
    last_flags & ((1 << PROTOCOL) - 1)
}

#[inline(always)]
fn flags_of(last_flags: u64) -> u32 {
    (last_flags >> PROTOCOL) as u32
}

#[inline(always)]
fn find_here4(state: *mut State, key: &Flow4, mark: u32) -> Option<u32> {
    flow_table::find(&Outbound::<4>(state), &Key::v4(key, seed(state)), mark)
}

#[inline(always)]
fn find_here6(state: *mut State, key: &Flow6, mark: u32) -> Option<u32> {
    flow_table::find(&Outbound::<6>(state), &Key::v6(key, seed(state)), mark)
}

impl<const SHORT: bool> Flows for Node<SHORT> {
    #[inline(always)]
    fn find4(&self, table: FlowTable, key: &Flow4, mark: u32) -> Option<u32> {
        match table {
            FlowTable::Outbound if SHORT => find_here4(self.state, key, mark),
            FlowTable::Outbound => {
                let [first, last]: [u64; 2] = transmute!(*key);
                found(find_outbound4(first, with_flags(last, mark)))
            }
            FlowTable::Host => find_host(&maps::HOST_FLOWS4, key, mark),
        }
    }
    #[inline(always)]
    fn find6(&self, table: FlowTable, key: &Flow6, mark: u32) -> Option<u32> {
        match table {
            FlowTable::Outbound if SHORT => find_here6(self.state, key, mark),
            FlowTable::Outbound => {
                let [a, b, c, d, last]: [u64; 5] = transmute!(*key);
                found(find_outbound6(a, b, c, d, with_flags(last, mark)))
            }
            FlowTable::Host => find_host(&maps::HOST_FLOWS6, key, mark),
        }
    }
    #[inline(always)]
    fn open4(&self, table: FlowTable, key: &Flow4, flags: u32) -> bool {
        match table {
            FlowTable::Outbound => {
                let [first, last]: [u64; 2] = transmute!(*key);
                open_outbound4(first, with_flags(last, flags))
            }
            FlowTable::Host => open_host(&maps::HOST_FLOWS4, key, flags),
        }
    }
    #[inline(always)]
    fn open6(&self, table: FlowTable, key: &Flow6, flags: u32) -> bool {
        match table {
            FlowTable::Outbound => {
                let [a, b, c, d, last]: [u64; 5] = transmute!(*key);
                open_outbound6(a, b, c, d, with_flags(last, flags))
            }
            FlowTable::Host => open_host(&maps::HOST_FLOWS6, key, flags),
        }
    }
    #[inline(always)]
    fn forget4(&self, key: &Flow4) {
        forget_host(&maps::HOST_FLOWS4, key);
    }
    #[inline(always)]
    fn forget6(&self, key: &Flow6) {
        forget_host(&maps::HOST_FLOWS6, key);
    }
}

/// What `recall` and `note` are asked, beside the key and the seed, in one register.
#[derive(Clone, Copy)]
struct Question(u64);

impl Question {
    #[inline(always)]
    fn new(endpoint: u16, flags: u32, touch: Touch) -> Self {
        let touch = match touch {
            Touch::Nothing => 0,
            Touch::Received => 1,
            Touch::Sent { needed: false } => 2,
            Touch::Sent { needed: true } => 3,
        };
        Self(u64::from(flags) | u64::from(endpoint) << 32 | touch << 48)
    }
    #[inline(always)]
    fn flags(self) -> u32 {
        self.0 as u32
    }
    #[inline(always)]
    fn endpoint(self) -> u16 {
        (self.0 >> 32) as u16
    }
    #[inline(always)]
    fn touch(self) -> Touch {
        match self.0 >> 48 {
            0 => Touch::Nothing,
            1 => Touch::Received,
            touch => Touch::Sent { needed: touch == 3 },
        }
    }
}

/// No entry, where a number is returned.
const NONE: u32 = u32::MAX;

#[inline(always)]
fn found(flags: u32) -> Option<u32> {
    if flags == NONE { None } else { Some(flags) }
}

/// Functions of their own, with everything in registers: the keys and the walk through a bucket would take room on
/// the stack of whoever asks. Known by name, so that the verifier reads each once and not at every call (global
/// functions, Linux 5.6).
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn recall4(seed: u64, key: u64, question: u64) -> u32 {
    let question = Question(question);
    let key = datagram_table::Key::new([key], question.endpoint(), seed);
    datagram_table::recall(&Remembered::<4>, &key, question.flags(), question.touch()).unwrap_or(NONE)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn recall6(seed: u64, first: u64, second: u64, third: u64, question: u64) -> u32 {
    let question = Question(question);
    let key = datagram_table::Key::new([first, second, third], question.endpoint(), seed);
    datagram_table::recall(&Remembered::<6>, &key, question.flags(), question.touch()).unwrap_or(NONE)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn note4(seed: u64, key: u64, question: u64) -> bool {
    let question = Question(question);
    let key = datagram_table::Key::new([key], question.endpoint(), seed);
    datagram_table::note(&Remembered::<4>, &key, question.flags())
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn note6(seed: u64, first: u64, second: u64, third: u64, question: u64) -> bool {
    let question = Question(question);
    let key = datagram_table::Key::new([first, second, third], question.endpoint(), seed);
    datagram_table::note(&Remembered::<6>, &key, question.flags())
}

impl<const SHORT: bool> Datagrams for Node<SHORT> {
    #[inline(always)]
    fn recall4(&self, endpoint: u16, [key]: [u64; DATAGRAM4_WORDS], kind: u32, touch: Touch) -> Option<u32> {
        let question = Question::new(endpoint, kind, touch);
        found(recall4(seed(self.state), key, question.0))
    }
    #[inline(always)]
    fn recall6(&self, endpoint: u16, key: [u64; DATAGRAM6_WORDS], kind: u32, touch: Touch) -> Option<u32> {
        let [first, second, third] = key;
        let question = Question::new(endpoint, kind, touch);
        found(recall6(seed(self.state), first, second, third, question.0))
    }
    #[inline(always)]
    fn note4(&self, endpoint: u16, [key]: [u64; DATAGRAM4_WORDS], flags: u32) -> bool {
        let question = Question::new(endpoint, flags, Touch::Nothing);
        note4(seed(self.state), key, question.0)
    }
    #[inline(always)]
    fn note6(&self, endpoint: u16, key: [u64; DATAGRAM6_WORDS], flags: u32) -> bool {
        let [first, second, third] = key;
        let question = Question::new(endpoint, flags, Touch::Nothing);
        note6(seed(self.state), first, second, third, question.0)
    }
}
