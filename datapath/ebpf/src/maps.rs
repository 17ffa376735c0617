//! The maps, in the shapes that `thyra_datapath_abi::maps` names.
//!
//! Invariant: every array that user space writes is mmap-able and made of whole 64-bit words; sizes come from
//! `limits` alone.
#![expect(
    clippy::as_conversions,
    reason = "constants of `limits`, checked there, in a const context"
)]

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf};
use thyra_datapath_abi::limits::{
    BUCKETS, EVENT_RING_BYTES, MAX_BLOCKS, MAX_ENDPOINTS, MAX_HOST_FLOWS, MAX_OUTBOUND, MAX_VERDICTS, SLOTS4,
    SLOTS6,
};
use thyra_datapath_abi::maps::{EndpointCounter, EventBudget, MMAPABLE, ReasonCounter, VerdictCounter};
use thyra_datapath_abi::source::{Block4, Block6};
use thyra_datapath_abi::{EndpointRecord, Flow4, Flow6, FlowState, Slot4, Slot6};
use thyra_datapath_engine::Table;

/// 64-bit words of both banks.
const fn banks(table: Table) -> u32 {
    (table.words() * 2) as u32
}

type Words = Array<u64>;

/// What follows the prefix length in a key of the CIDR tables (`Block4`, `Block6`).
#[repr(C)]
pub struct Banked<const N: usize> {
    /// 0 or 1.
    pub bank: u32,
    /// Network byte order.
    pub address: [u8; N],
}

const _: () = assert!(4 + size_of::<Banked<4>>() == size_of::<Block4>());
const _: () = assert!(4 + size_of::<Banked<16>>() == size_of::<Block6>());

#[map]
pub static CONTROL: Words = Array::with_max_entries(1, MMAPABLE);
#[map]
pub static IFINDEX: Words = Array::with_max_entries(Table::Ifindex.words() as u32, MMAPABLE);
#[map]
pub static ENDPOINTS: Array<EndpointRecord> = Array::with_max_entries(MAX_ENDPOINTS as u32, MMAPABLE);
#[map]
pub static ENDPOINT_SETS: Words = Array::with_max_entries(banks(Table::EndpointSets), MMAPABLE);
#[map]
pub static SOURCES4: Array<[Slot4; SLOTS4]> = Array::with_max_entries(BUCKETS as u32 * 2, MMAPABLE);
#[map]
pub static SOURCES6: Array<[Slot6; SLOTS6]> = Array::with_max_entries(BUCKETS as u32 * 2, MMAPABLE);
#[map]
pub static BLOCKS4: LpmTrie<Banked<4>, u32> = LpmTrie::with_max_entries(MAX_BLOCKS as u32 * 2, 0);
#[map]
pub static BLOCKS6: LpmTrie<Banked<16>, u32> = LpmTrie::with_max_entries(MAX_BLOCKS as u32 * 2, 0);
#[map]
pub static CLASS_COLUMN: Words = Array::with_max_entries(banks(Table::ClassColumn), MMAPABLE);
#[map]
pub static PORT_CLASS: Words = Array::with_max_entries(banks(Table::PortClass), MMAPABLE);
#[map]
pub static SETS: Words = Array::with_max_entries(banks(Table::Sets), MMAPABLE);
#[map]
pub static ROWS: Words = Array::with_max_entries(banks(Table::Rows), MMAPABLE);
#[map]
pub static OUTBOUND4: HashMap<Flow4, FlowState> = HashMap::with_max_entries(MAX_OUTBOUND as u32, 0);
#[map]
pub static OUTBOUND6: HashMap<Flow6, FlowState> = HashMap::with_max_entries(MAX_OUTBOUND as u32, 0);
#[map]
pub static HOST_FLOWS4: LruHashMap<Flow4, FlowState> = LruHashMap::with_max_entries(MAX_HOST_FLOWS as u32, 0);
#[map]
pub static HOST_FLOWS6: LruHashMap<Flow6, FlowState> = LruHashMap::with_max_entries(MAX_HOST_FLOWS as u32, 0);
#[map]
pub static VERDICT_COUNTERS: PerCpuArray<VerdictCounter> =
    PerCpuArray::with_max_entries(MAX_VERDICTS as u32, 0);
#[map]
pub static REASON_COUNTERS: PerCpuArray<ReasonCounter> = PerCpuArray::with_max_entries(256, 0);
#[map]
pub static ENDPOINT_COUNTERS: PerCpuArray<EndpointCounter> =
    PerCpuArray::with_max_entries(MAX_ENDPOINTS as u32, 0);
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(EVENT_RING_BYTES as u32, 0);
#[map]
pub static LOST: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static EVENT_BUDGET: PerCpuArray<EventBudget> = PerCpuArray::with_max_entries(1, 0);
