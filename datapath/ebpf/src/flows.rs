//! The kernel's maps as the engine's `Flows`: the pods' own connections in arrays, the node's in LRU hashes.
//!
//! Invariant: words that several CPUs write are changed by single atomic instructions alone.
#![expect(
    clippy::as_conversions,
    reason = "indices are widened to the width of an address, after they were masked"
)]

use core::intrinsics::{AtomicOrdering, atomic_cxchg, atomic_xadd};

use aya_ebpf::maps::LruHashMap;
use thyra_datapath_abi::limits::MAX_ENDPOINTS;
use thyra_datapath_abi::{Flow4, Flow6, FlowState};
use thyra_datapath_engine::flow_table::{self, Bucket, FlowMemory, Key};
use thyra_datapath_engine::flows::{FlowTable, Flows};

use crate::events::coarse_now;
use crate::maps;
use crate::node::Node;

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
struct Outbound<'a, const VERSION: u8>(&'a Node);

impl<const VERSION: u8> FlowMemory for Outbound<'_, VERSION> {
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
        let budget = unsafe { core::ptr::read_volatile(&raw const (*self.0.state).outbound_budget) };
        if count(self.0, endpoint, 1) < budget {
            return true;
        }
        self.give_back(endpoint);
        false
    }
    #[inline(always)]
    fn give_back(&self, endpoint: u16) {
        let _before = count(self.0, endpoint, u64::MAX);
    }
}

/// Adds to the number of an endpoint's connections (`u64::MAX`: takes one off); what it was.
#[inline(always)]
fn count(node: &Node, endpoint: u16, change: u64) -> u64 {
    // SAFETY: the element that the kernel gave out, masked to the table.
    unsafe {
        let counts: *mut u64 = (&raw mut (*node.state).outbound).cast();
        atomic_xadd::<u64, u64, ORDERED>(counts.add(endpoint as usize & (MAX_ENDPOINTS - 1)), change)
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

impl Flows for Node {
    #[inline(always)]
    fn find4(&self, table: FlowTable, key: &Flow4, mark: u32) -> Option<u32> {
        match table {
            FlowTable::Outbound => flow_table::find(&Outbound::<4>(self), &Key::v4(key, self.seed()), mark),
            FlowTable::Host => find_host(&maps::HOST_FLOWS4, key, mark),
        }
    }
    #[inline(always)]
    fn find6(&self, table: FlowTable, key: &Flow6, mark: u32) -> Option<u32> {
        match table {
            FlowTable::Outbound => flow_table::find(&Outbound::<6>(self), &Key::v6(key, self.seed()), mark),
            FlowTable::Host => find_host(&maps::HOST_FLOWS6, key, mark),
        }
    }
    #[inline(always)]
    fn open4(&self, table: FlowTable, key: &Flow4, flags: u32) -> bool {
        match table {
            FlowTable::Outbound => flow_table::open(&Outbound::<4>(self), &Key::v4(key, self.seed()), flags),
            FlowTable::Host => open_host(&maps::HOST_FLOWS4, key, flags),
        }
    }
    #[inline(always)]
    fn open6(&self, table: FlowTable, key: &Flow6, flags: u32) -> bool {
        match table {
            FlowTable::Outbound => flow_table::open(&Outbound::<6>(self), &Key::v6(key, self.seed()), flags),
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
