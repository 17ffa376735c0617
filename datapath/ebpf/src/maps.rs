//! The maps, in the shapes that `thyra_datapath_abi::maps` names.
//!
//! Invariant: every array that user space writes is mmap-able; sizes come from `limits` alone.
#![expect(
    clippy::as_conversions,
    reason = "constants of `limits`, checked there, in a const context"
)]

use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LpmTrie, LruHashMap, ProgramArray, RingBuf, SockHash};
use thyra_datapath_abi::datagram::{DatagramBucket4, DatagramBucket6};
use thyra_datapath_abi::flow::{FlowBucket4, FlowBucket6};
use thyra_datapath_abi::limits::{
    DATAGRAM_BUCKETS, EVENT_RING_BYTES, FLOW_BUCKETS, MAX_BLOCKS, MAX_ENDPOINTS, MAX_HELD_FLOWS,
    MAX_HELD_OPENING, MAX_HOST_FLOWS, MAX_L7_FLOWS, MAX_L7_OPENING, MAX_LISTENERS,
};
use thyra_datapath_abi::maps::MMAPABLE;
use thyra_datapath_abi::source::{Block4, Block6};
use thyra_datapath_abi::{
    Bank, CpuCounters, Flow4, Flow6, FlowState, HeldFlow, HeldKey4, HeldKey6, HeldOpening, HeldVerdict,
    ListenerKey, Opening, State,
};

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

const ALL_DATAGRAM_BUCKETS: u32 = (MAX_ENDPOINTS * DATAGRAM_BUCKETS) as u32;

#[map]
pub static STATE: Array<State> = Array::with_max_entries(1, MMAPABLE);
#[map]
pub static BANKS: Array<Bank> = Array::with_max_entries(2, MMAPABLE);
#[map]
pub static BLOCKS4: LpmTrie<Banked<4>, u32> = LpmTrie::with_max_entries(MAX_BLOCKS as u32 * 2, 0);
#[map]
pub static BLOCKS6: LpmTrie<Banked<16>, u32> = LpmTrie::with_max_entries(MAX_BLOCKS as u32 * 2, 0);
#[map]
pub static OUTBOUND4: Array<FlowBucket4> = Array::with_max_entries(FLOW_BUCKETS as u32, MMAPABLE);
#[map]
pub static OUTBOUND6: Array<FlowBucket6> = Array::with_max_entries(FLOW_BUCKETS as u32, MMAPABLE);
#[map]
pub static DATAGRAMS4: Array<DatagramBucket4> = Array::with_max_entries(ALL_DATAGRAM_BUCKETS, MMAPABLE);
#[map]
pub static DATAGRAMS6: Array<DatagramBucket6> = Array::with_max_entries(ALL_DATAGRAM_BUCKETS, MMAPABLE);
#[map]
pub static HOST_FLOWS4: LruHashMap<Flow4, FlowState> = LruHashMap::with_max_entries(MAX_HOST_FLOWS as u32, 0);
#[map]
pub static HOST_FLOWS6: LruHashMap<Flow6, FlowState> = LruHashMap::with_max_entries(MAX_HOST_FLOWS as u32, 0);
#[map]
pub static L7_FLOWS4: HashMap<Flow4, FlowState> = HashMap::with_max_entries(MAX_L7_FLOWS as u32, 0);
#[map]
pub static L7_FLOWS6: HashMap<Flow6, FlowState> = HashMap::with_max_entries(MAX_L7_FLOWS as u32, 0);
#[map]
pub static L7_OPENING4: LruHashMap<Flow4, Opening> = LruHashMap::with_max_entries(MAX_L7_OPENING as u32, 0);
#[map]
pub static L7_OPENING6: LruHashMap<Flow6, Opening> = LruHashMap::with_max_entries(MAX_L7_OPENING as u32, 0);
#[map]
pub static L7_LISTENERS: SockHash<ListenerKey> = SockHash::with_max_entries(MAX_LISTENERS as u32, 0);
#[map]
pub static HELD_OPENING4: LruHashMap<Flow4, HeldOpening> =
    LruHashMap::with_max_entries(MAX_HELD_OPENING as u32, 0);
#[map]
pub static HELD_OPENING6: LruHashMap<Flow6, HeldOpening> =
    LruHashMap::with_max_entries(MAX_HELD_OPENING as u32, 0);
#[map]
pub static HELD_FLOWS4: HashMap<Flow4, HeldFlow> = HashMap::with_max_entries(MAX_HELD_FLOWS as u32, 0);
#[map]
pub static HELD_FLOWS6: HashMap<Flow6, HeldFlow> = HashMap::with_max_entries(MAX_HELD_FLOWS as u32, 0);
#[map]
pub static HELD_VERDICTS4: LruHashMap<HeldKey4, HeldVerdict> =
    LruHashMap::with_max_entries(MAX_HELD_OPENING as u32, 0);
#[map]
pub static HELD_VERDICTS6: LruHashMap<HeldKey6, HeldVerdict> =
    LruHashMap::with_max_entries(MAX_HELD_OPENING as u32, 0);
/// One element for each possible CPU: user space says how many when it loads the object.
#[map]
pub static COUNTERS: Array<CpuCounters> = Array::with_max_entries(1, MMAPABLE);
/// What `to_pod_entry` goes on to.
#[map]
pub static INSIDE: ProgramArray = ProgramArray::with_max_entries(1, 0);
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(EVENT_RING_BYTES as u32, 0);
