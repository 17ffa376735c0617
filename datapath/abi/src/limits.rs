//! The sizes of every table, in one place; what does not fit is refused by name, never cut.
//!
//! The policy tables exist twice: see `control`. The sum of all maps is asserted below.

use crate::datagram::{DATAGRAM_SLOTS, DatagramBucket4, DatagramBucket6};
use crate::flow::{FLOW_SLOTS, FlowBucket4, FlowBucket6};
use crate::{
    Bank, CpuCounters, Flow4, Flow6, FlowState, HeldFlow, HeldKey4, HeldKey6, HeldOpening, HeldVerdict,
    ListenerKey, State,
};

/// Endpoint ids are 1 to 255; 0 means "no endpoint".
pub const MAX_ENDPOINTS: usize = 256;
/// Slots of the table from interface index to endpoint id; indices that fall into one slot are refused at
/// attach.
pub const IFINDEX_SLOTS: usize = 65_536;
/// Source classes, class 0 (the outsider that no policy's CIDR holds) included.
pub const MAX_CLASSES: usize = 16_384;
/// Columns of a row: classes that no live row tells apart share one. One is reserved for "never written".
pub const MAX_COLUMNS: usize = 1_024;
/// Distinct rows of cells; one is reserved for "never written".
pub const MAX_ROWS: usize = 4_096;
/// Distinct policy sets (an endpoint has one per address family).
pub const MAX_SETS: usize = 512;
/// Port classes, class 0 (ports that no policy names) included.
pub const MAX_PORT_CLASSES: usize = 1_024;
/// Verdict ids; 0 means "no verdict". A cell has 13 bits for it.
pub const MAX_VERDICTS: usize = 8_192;
/// Exact source addresses of both families together.
pub const MAX_ADDRESSES: usize = 65_536;
/// CIDR blocks of one family.
pub const MAX_BLOCKS: usize = 16_384;
/// Buckets of each exact-address table; two choices of four (IPv4) or two (IPv6) slots each.
pub const BUCKETS: usize = 32_768;
/// Slots in an IPv4 bucket: 4 × 8 = 32 bytes.
pub const SLOTS4: usize = 4;
/// Slots in an IPv6 bucket: 4 × 24 = 96 bytes.
pub const SLOTS6: usize = 4;
/// Buckets of the connections that pods opened, per family.
pub const FLOW_BUCKETS: usize = 16_384;
/// Connections that pods opened, per family, all endpoints together.
pub const MAX_OUTBOUND: usize = FLOW_BUCKETS * FLOW_SLOTS;
/// Connections that one endpoint may have opened, both families together.
pub const OUTBOUND_BUDGET: u64 = 32_768;
/// Buckets of the datagrams that one endpoint has to do with, per family; eight entries each.
pub const DATAGRAM_BUCKETS: usize = 128;
/// Entries of it, per family, all endpoints together.
pub const MAX_DATAGRAMS: usize = MAX_ENDPOINTS * DATAGRAM_BUCKETS * DATAGRAM_SLOTS;
/// Connections that the node made, per family.
pub const MAX_HOST_FLOWS: usize = 16_384;
/// Connections to Envoy's listeners in pods, per family, all endpoints together.
pub const MAX_L7_FLOWS: usize = 32_768;
/// Those of one endpoint, both families together, where nobody says otherwise.
pub const L7_BUDGET: u64 = 4_096;
/// The same before their client has answered; the oldest ones make room.
pub const MAX_L7_OPENING: usize = 8_192;
/// Connections that are held or were, per family, all endpoints together; `L7_BUDGET` counts them too.
pub const MAX_HELD_FLOWS: usize = 8_192;
/// The same before their client has answered, and verdicts on them; the oldest ones make room.
pub const MAX_HELD_OPENING: usize = 2_048;
/// Listening sockets of Envoy in all pods, both families.
pub const MAX_LISTENERS: usize = 16_384;
/// The first port on which Envoy listens inside a pod; 15000 to 15090 are Istio's own.
pub const L7_FIRST_PORT: u16 = 21_001;
/// So many ports from there on: residuals of a node. A pod whose verdicts need L7 can't be reached on them.
pub const L7_PORTS: u16 = 1_024;
/// Bytes of the event ring.
pub const EVENT_RING_BYTES: usize = 1 << 20;
/// Nanoseconds between two reported refusals of one CPU when it refuses without pause: 50,000 a second.
pub const EVENT_COST_NS: u64 = 20_000;
/// Refusals that a CPU may report in one burst.
pub const EVENT_BURST: u64 = 4_096;

/// Bytes of one bank of the policy tables.
pub const BANK_BYTES: usize = size_of::<Bank>();

/// An upper estimate of a hash entry's own cost in the kernel (element header and bucket), bytes.
const HASH_ENTRY_BYTES: usize = 64;

const HOST_FLOW_BYTES: usize = MAX_HOST_FLOWS
    * (size_of::<Flow4>() + size_of::<Flow6>() + 2 * size_of::<FlowState>() + 2 * HASH_ENTRY_BYTES);
const L7_BYTES: usize = (MAX_L7_FLOWS + MAX_L7_OPENING)
    * (size_of::<Flow4>() + size_of::<Flow6>() + 2 * size_of::<FlowState>() + 2 * HASH_ENTRY_BYTES)
    + MAX_LISTENERS * (size_of::<ListenerKey>() + HASH_ENTRY_BYTES);
const HELD_BYTES: usize = MAX_HELD_FLOWS
    * (size_of::<Flow4>() + size_of::<Flow6>() + 2 * size_of::<HeldFlow>() + 2 * HASH_ENTRY_BYTES)
    + MAX_HELD_OPENING
        * (size_of::<Flow4>() + size_of::<Flow6>() + 2 * size_of::<HeldOpening>() + 2 * HASH_ENTRY_BYTES)
    + MAX_HELD_OPENING
        * (size_of::<HeldKey4>()
            + size_of::<HeldKey6>()
            + 2 * size_of::<HeldVerdict>()
            + 2 * HASH_ENTRY_BYTES);
const OUTBOUND_BYTES: usize = FLOW_BUCKETS * (size_of::<FlowBucket4>() + size_of::<FlowBucket6>());
const DATAGRAM_BYTES: usize =
    MAX_ENDPOINTS * DATAGRAM_BUCKETS * (size_of::<DatagramBucket4>() + size_of::<DatagramBucket6>());
const FLOW_BYTES: usize = HOST_FLOW_BYTES + OUTBOUND_BYTES + DATAGRAM_BYTES + L7_BYTES + HELD_BYTES;

/// Bytes of all maps on a machine with `cpus` CPUs, the LPM tables (allocated as they fill) left out.
#[must_use]
pub const fn map_bytes(cpus: usize) -> usize {
    2 * BANK_BYTES + FLOW_BYTES + EVENT_RING_BYTES + size_of::<State>() + cpus * size_of::<CpuCounters>()
}

const _: () = assert!(
    map_bytes(2) <= 64 << 20,
    "all maps together stay under 64 MiB on 2 CPUs"
);
const _: () = assert!(MAX_VERDICTS == 1 << 13, "a cell holds a verdict id of 13 bits");
const _: () = assert!(
    MAX_ADDRESSES * 2 <= BUCKETS * SLOTS4,
    "two-choice buckets need half of their slots free"
);
