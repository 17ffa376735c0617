//! The kernel's maps as the engine's `Tables`, `Flows` and `Counters`.
//!
//! Invariant: a look-up that misses gives zero or none, which the engine never takes for permission.

use core::intrinsics::{AtomicOrdering, atomic_or};

use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, lpm_trie::Key};
use thyra_datapath_abi::limits::{SLOTS4, SLOTS6};
use thyra_datapath_abi::source::{Block4, Block6};
use thyra_datapath_abi::{
    Control, EndpointRecord, Event, EventKind, Flow4, Flow6, FlowState, Reason, Slot4, Slot6,
};
use thyra_datapath_engine::account::{Counters, Direction, reason_number};
use thyra_datapath_engine::flows::{FlowTable, Flows};
use thyra_datapath_engine::{Table, Tables};

use crate::{events, maps};

/// The maps of this node.
#[derive(Clone, Copy)]
pub struct Node;

#[inline(always)]
fn read<T: Copy + Default>(map: &Array<T>, index: u32) -> T {
    match map.get_ptr(index) {
        // SAFETY: the kernel gave out the element, which user space writes by whole aligned words.
        Some(element) => unsafe { core::ptr::read_volatile(element) },
        None => T::default(),
    }
}

impl Tables for Node {
    #[inline(always)]
    fn control(&self) -> Control {
        Control(read(&maps::CONTROL, 0))
    }
    #[inline(always)]
    fn record(&self, endpoint: u16) -> Option<&EndpointRecord> {
        maps::ENDPOINTS.get(u32::from(endpoint))
    }
    #[inline(always)]
    fn word(&self, table: Table, index: u32) -> u64 {
        match table {
            Table::Ifindex => read(&maps::IFINDEX, index),
            Table::EndpointSets => read(&maps::ENDPOINT_SETS, index),
            Table::ClassColumn => read(&maps::CLASS_COLUMN, index),
            Table::PortClass => read(&maps::PORT_CLASS, index),
            Table::Sets => read(&maps::SETS, index),
            Table::Rows => read(&maps::ROWS, index),
            Table::Sources4 | Table::Sources6 => 0,
        }
    }
    #[inline(always)]
    fn bucket4(&self, index: u32) -> Option<&[Slot4; SLOTS4]> {
        maps::SOURCES4.get(index)
    }
    #[inline(always)]
    fn bucket6(&self, index: u32) -> Option<&[Slot6; SLOTS6]> {
        maps::SOURCES6.get(index)
    }
    #[inline(always)]
    fn block4(&self, key: &Block4) -> Option<u32> {
        let data = maps::Banked {
            bank: key.bank,
            address: key.address,
        };
        maps::BLOCKS4.get(Key::new(key.prefix_len, data)).copied()
    }
    #[inline(always)]
    fn block6(&self, key: &Block6) -> Option<u32> {
        let data = maps::Banked {
            bank: key.bank,
            address: key.address,
        };
        maps::BLOCKS6.get(Key::new(key.prefix_len, data)).copied()
    }
}

/// Adds `mark` to a state and gives what it was.
#[inline(always)]
fn mark_state(state: *mut FlowState, mark: u32) -> u32 {
    // SAFETY: the kernel gave out the element, and keeps its memory until the program ends. Another CPU may
    // write it too: the flags are read and written by single 32-bit operations, the time is a hint.
    unsafe {
        let before = core::ptr::read_volatile(&raw const (*state).flags);
        if before & mark != mark {
            atomic_or::<u32, u32, { AtomicOrdering::Relaxed }>(&raw mut (*state).flags, mark);
            (*state).changed_ns = bpf_ktime_get_ns();
        }
        before
    }
}

#[inline(always)]
fn find<K>(
    own: &HashMap<K, FlowState>,
    host: &LruHashMap<K, FlowState>,
    table: FlowTable,
    key: &K,
    mark: u32,
) -> Option<u32> {
    let state = match table {
        FlowTable::Outbound => own.get_ptr_mut(key),
        FlowTable::Host => host.get_ptr_mut(key),
    };
    state.map(|state| mark_state(state, mark))
}

#[inline(always)]
fn open<K>(
    own: &HashMap<K, FlowState>,
    host: &LruHashMap<K, FlowState>,
    table: FlowTable,
    key: &K,
    flags: u32,
) -> bool {
    // SAFETY: a helper without arguments.
    let state = FlowState {
        flags,
        pad: 0,
        changed_ns: unsafe { bpf_ktime_get_ns() },
    };
    match table {
        FlowTable::Outbound => own.insert(key, state, 0),
        FlowTable::Host => host.insert(key, state, 0),
    }
    .is_ok()
}

#[inline(always)]
fn forget<K>(own: &HashMap<K, FlowState>, host: &LruHashMap<K, FlowState>, table: FlowTable, key: &K) {
    // An entry that is not there is as good as removed.
    let _absent = match table {
        FlowTable::Outbound => own.remove(key),
        FlowTable::Host => host.remove(key),
    };
}

impl Flows for Node {
    #[inline(always)]
    fn find4(&self, table: FlowTable, key: &Flow4, mark: u32) -> Option<u32> {
        find(&maps::OUTBOUND4, &maps::HOST_FLOWS4, table, key, mark)
    }
    #[inline(always)]
    fn find6(&self, table: FlowTable, key: &Flow6, mark: u32) -> Option<u32> {
        find(&maps::OUTBOUND6, &maps::HOST_FLOWS6, table, key, mark)
    }
    #[inline(always)]
    fn open4(&self, table: FlowTable, key: &Flow4, flags: u32) -> bool {
        open(&maps::OUTBOUND4, &maps::HOST_FLOWS4, table, key, flags)
    }
    #[inline(always)]
    fn open6(&self, table: FlowTable, key: &Flow6, flags: u32) -> bool {
        open(&maps::OUTBOUND6, &maps::HOST_FLOWS6, table, key, flags)
    }
    #[inline(always)]
    fn forget4(&self, table: FlowTable, key: &Flow4) {
        forget(&maps::OUTBOUND4, &maps::HOST_FLOWS4, table, key);
    }
    #[inline(always)]
    fn forget6(&self, table: FlowTable, key: &Flow6) {
        forget(&maps::OUTBOUND6, &maps::HOST_FLOWS6, table, key);
    }
}

impl Counters for Node {
    #[inline(always)]
    fn verdict(&self, verdict: u16, bytes: u32, connection: bool) {
        if let Some(counter) = maps::VERDICT_COUNTERS.get_ptr_mut(u32::from(verdict)) {
            // SAFETY: this CPU's own element; the program is not preempted by another of its kind.
            unsafe {
                (*counter).packets += 1;
                (*counter).bytes += u64::from(bytes);
                (*counter).connections += u64::from(connection);
            }
        }
    }
    #[inline(always)]
    fn reason(&self, reason: Reason, bytes: u32) {
        if let Some(counter) = maps::REASON_COUNTERS.get_ptr_mut(u32::from(reason_number(Some(reason)))) {
            // SAFETY: as above.
            unsafe {
                (*counter).packets += 1;
                (*counter).bytes += u64::from(bytes);
            }
        }
    }
    #[inline(always)]
    fn endpoint(&self, endpoint: u16, direction: Direction, passed: bool) {
        if let Some(counter) = maps::ENDPOINT_COUNTERS.get_ptr_mut(u32::from(endpoint)) {
            // SAFETY: as above.
            unsafe {
                match (direction, passed) {
                    (Direction::ToPod, true) => (*counter).to_pod_packets += 1,
                    (Direction::ToPod, false) => (*counter).to_pod_dropped += 1,
                    (Direction::FromPod, true) => (*counter).from_pod_packets += 1,
                    (Direction::FromPod, false) => (*counter).from_pod_dropped += 1,
                }
            }
        }
    }
    #[inline(always)]
    fn report(&self, kind: EventKind, event: Event) {
        events::report(kind, &event);
    }
}
