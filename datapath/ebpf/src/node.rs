//! The kernel's maps as the engine's `Tables` and `Counters`; `flows` has the connections.
//!
//! Invariant: every index is masked to its table, whose size is a power of two (`abi::bank`), so that each access
//! stays inside its element; a look-up that misses gives zero or none, which the engine never takes for
//! permission.
#![expect(
    clippy::as_conversions,
    reason = "indices are widened to the width of an address, after they were masked; classes fit 16 bits"
)]

use aya_ebpf::helpers::bpf_get_smp_processor_id;
use aya_ebpf::maps::lpm_trie::Key;
use thyra_datapath_abi::count::{CpuCounters, EndpointCounter, REASONS, ReasonCounter, VerdictCounter};
use thyra_datapath_abi::limits::{
    BUCKETS, IFINDEX_SLOTS, MAX_CLASSES, MAX_COLUMNS, MAX_ENDPOINTS, MAX_PORT_CLASSES, MAX_ROWS, MAX_SETS,
    MAX_VERDICTS, SLOTS4, SLOTS6,
};
use thyra_datapath_abi::{
    Bank, Cell, Control, EndpointRecord, EndpointSets, Event, EventKind, Reason, Slot4, Slot6, State,
};
use thyra_datapath_engine::Tables;
use thyra_datapath_engine::account::{Counters, Direction, reason_number};
use thyra_datapath_engine::family::Address6;
use thyra_datapath_engine::program::Maps;

use crate::{events, maps};

/// The maps of this node, not yet looked at. `SHORT`: for the short way of the usual packet, which calls no function
/// where the others do.
#[derive(Clone, Copy)]
pub struct ThisNode<const SHORT: bool>;

/// The elements that a packet needs, found once.
#[derive(Clone, Copy)]
pub struct Node<const SHORT: bool> {
    pub(crate) state: *mut State,
    bank: *const Bank,
    counters: *mut CpuCounters,
    control: Control,
}

impl<const SHORT: bool> Maps for ThisNode<SHORT> {
    type Node = Node<SHORT>;

    #[inline(always)]
    fn open(self) -> Option<Node<SHORT>> {
        let state = maps::STATE.get_ptr_mut(0)?;
        // SAFETY: the kernel gave out the element, whose words user space stores whole.
        let control = unsafe { core::ptr::read_volatile(&raw const (*state).control) };
        let bank = maps::BANKS.get_ptr(control.bank())?;
        Some(Node {
            state,
            bank,
            counters: counters()?,
            control,
        })
    }
}

/// What is mixed into the hash of a connection.
#[inline(always)]
pub fn seed(state: *const State) -> u64 {
    // SAFETY: a word of the element that the kernel gave out.
    unsafe { core::ptr::read_volatile(&raw const (*state).flow_seed) }
}

/// This CPU's own counters.
#[inline(always)]
pub fn counters() -> Option<*mut CpuCounters> {
    // SAFETY: a helper without arguments.
    maps::COUNTERS.get_ptr_mut(unsafe { bpf_get_smp_processor_id() })
}

/// A function of its own: the key would take room on every packet's stack. A global one (`steps`), as is the next.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn block4(bank: u32, address: u32) -> u32 {
    let address = address.to_be_bytes();
    let key = Key::new(u32::BITS + 32, maps::Banked { bank, address });
    maps::BLOCKS4.get(key).copied().unwrap_or(0)
}

/// As `block4`; the address in registers.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn block6(bank: u32, high: u64, low: u64) -> u32 {
    let address = Address6 { high, low }.to_bytes();
    let key = Key::new(u32::BITS + 128, maps::Banked { bank, address });
    maps::BLOCKS6.get(key).copied().unwrap_or(0)
}

/// The number, with a mask that the compiler can't take away: it knows that a swapped 16-bit number has no upper bits,
/// the verifier of Linux 6.1 does not.
#[inline(always)]
fn bounded(number: u16) -> u32 {
    let mut bounded = u32::from(number);
    // SAFETY: one instruction on a register.
    unsafe { core::arch::asm!("{0} &= 0xffff", inout(reg) bounded, options(pure, nomem, nostack)) };
    bounded
}

/// An entry of a table that begins at `table`; `LENGTH` is a power of two.
///
/// # Safety
/// `table` has `LENGTH` entries.
#[inline(always)]
unsafe fn at<T: Copy, const LENGTH: usize>(table: *const T, index: u32) -> T {
    // SAFETY: the mask keeps the index below the length; entries are aligned words that user space stores whole.
    unsafe { core::ptr::read_volatile(table.add(index as usize & (LENGTH - 1))) }
}

impl<const SHORT: bool> Tables for Node<SHORT> {
    #[inline(always)]
    fn control(&self) -> Control {
        self.control
    }
    #[inline(always)]
    fn endpoint_in(&self, slot: u32) -> u16 {
        // SAFETY: the element that the kernel gave out; so are the others below.
        unsafe { at::<u16, IFINDEX_SLOTS>((&raw const (*self.state).ifindex).cast(), slot) }
    }
    #[inline(always)]
    fn record(&self, endpoint: u16) -> &EndpointRecord {
        // SAFETY: masked to the table.
        unsafe {
            let records: *const EndpointRecord = (&raw const (*self.state).endpoints).cast();
            &*records.add(endpoint as usize & (MAX_ENDPOINTS - 1))
        }
    }
    #[inline(always)]
    fn sets(&self, endpoint: u16) -> EndpointSets {
        // SAFETY: the table's own length.
        unsafe {
            let sets: *const EndpointSets = (&raw const (*self.bank).endpoint_sets).cast();
            at::<EndpointSets, MAX_ENDPOINTS>(sets, u32::from(endpoint))
        }
    }
    #[inline(always)]
    fn bucket4(&self, index: u32) -> &[Slot4; SLOTS4] {
        // SAFETY: masked to the table.
        unsafe {
            let buckets: *const [Slot4; SLOTS4] = (&raw const (*self.bank).sources4).cast();
            &*buckets.add(index as usize & (BUCKETS - 1))
        }
    }
    #[inline(always)]
    fn bucket6(&self, index: u32) -> &[Slot6; SLOTS6] {
        // SAFETY: masked to the table.
        unsafe {
            let buckets: *const [Slot6; SLOTS6] = (&raw const (*self.bank).sources6).cast();
            &*buckets.add(index as usize & (BUCKETS - 1))
        }
    }
    #[inline(always)]
    fn block4(&self, address: u32) -> u16 {
        block4(self.control.bank(), address) as u16
    }
    #[inline(always)]
    fn block6(&self, address: Address6) -> u16 {
        block6(self.control.bank(), address.high, address.low) as u16
    }
    #[inline(always)]
    fn column(&self, class: u16) -> u16 {
        // SAFETY: the table's own length.
        unsafe {
            let columns = (&raw const (*self.bank).class_column).cast();
            at::<u16, MAX_CLASSES>(columns, u32::from(class))
        }
    }
    #[inline(always)]
    fn port_class(&self, port: u16) -> u16 {
        // SAFETY: the table's own length.
        unsafe {
            let classes = (&raw const (*self.bank).port_class).cast();
            at::<u16, 65_536>(classes, bounded(port))
        }
    }
    #[inline(always)]
    fn row(&self, set: u16, port_class: u16) -> u16 {
        let index = u32::from(set) * MAX_PORT_CLASSES as u32 + u32::from(port_class);
        // SAFETY: the table's own length.
        unsafe {
            let rows = (&raw const (*self.bank).sets).cast();
            at::<u16, { MAX_SETS * MAX_PORT_CLASSES }>(rows, index)
        }
    }
    #[inline(always)]
    fn cell(&self, row: u16, column: u16) -> Cell {
        let index = u32::from(row) * MAX_COLUMNS as u32 + u32::from(column);
        // SAFETY: the table's own length.
        unsafe {
            let cells = (&raw const (*self.bank).rows).cast();
            at::<Cell, { MAX_ROWS * MAX_COLUMNS }>(cells, index)
        }
    }
}

impl<const SHORT: bool> Counters for Node<SHORT> {
    #[inline(always)]
    fn verdict(&self, verdict: u16, bytes: u32, connection: bool) {
        // SAFETY: this CPU's own element, masked to the table; the program is not preempted by another of its
        // kind.
        unsafe {
            let counter = (&raw mut (*self.counters).verdicts)
                .cast::<VerdictCounter>()
                .add(verdict as usize & (MAX_VERDICTS - 1));
            (*counter).packets += 1;
            (*counter).bytes += u64::from(bytes);
            (*counter).connections += u64::from(connection);
        }
    }
    #[inline(always)]
    fn reason(&self, reason: Reason, bytes: u32) {
        // SAFETY: as above.
        unsafe {
            let counter = (&raw mut (*self.counters).reasons)
                .cast::<ReasonCounter>()
                .add(reason_number(Some(reason)) as usize & (REASONS - 1));
            (*counter).packets += 1;
            (*counter).bytes += u64::from(bytes);
        }
    }
    #[inline(always)]
    fn endpoint(&self, endpoint: u16, direction: Direction, passed: bool) {
        // SAFETY: as above.
        unsafe {
            let counter = (&raw mut (*self.counters).endpoints)
                .cast::<EndpointCounter>()
                .add(endpoint as usize & (MAX_ENDPOINTS - 1));
            match (direction, passed) {
                (Direction::ToPod, true) => (*counter).to_pod_packets += 1,
                (Direction::ToPod, false) => (*counter).to_pod_dropped += 1,
                (Direction::FromPod, true) => (*counter).from_pod_packets += 1,
                (Direction::FromPod, false) => (*counter).from_pod_dropped += 1,
            }
        }
    }
    #[inline(always)]
    fn report(&self, kind: EventKind, event: Event) {
        events::report(kind, &event);
    }
}
