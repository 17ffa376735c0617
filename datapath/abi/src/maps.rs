//! The names and shapes of the maps; a bank-wise map holds bank 0 first, then bank 1.
//!
//! The elements of an array map are whole 64-bit words, because the kernel rounds each up to eight bytes: a
//! u16 table packs four entries into one, entry `i` in word `i / 4` at bit `16 × (i % 4)`. A bucket is one
//! element.
//!
//! | map | kind | index → value |
//! | --- | --- | --- |
//! | `CONTROL` | mmap array | 0 → `Control` |
//! | `IFINDEX` | mmap array u16 | ifindex mod `IFINDEX_SLOTS` → endpoint id |
//! | `ENDPOINTS` | mmap array | endpoint id → `EndpointRecord` |
//! | `ENDPOINT_SETS` | mmap array, banks | endpoint id → `EndpointSets` |
//! | `SOURCES4` | mmap array, banks | bucket → `[Slot4; SLOTS4]` |
//! | `SOURCES6` | mmap array, banks | bucket → `[Slot6; SLOTS6]` |
//! | `BLOCKS4`, `BLOCKS6` | LPM trie | `Block4`, `Block6` → class (u32) |
//! | `CLASS_COLUMN` | mmap array u16, banks | class → column |
//! | `PORT_CLASS` | mmap array u16, banks | destination port → port class |
//! | `SETS` | mmap array u16, banks | set × `MAX_PORT_CLASSES` + port class → row |
//! | `ROWS` | mmap array u16, banks | row × `MAX_COLUMNS` + column → `Cell`; row 0 and column 0 are never written |
//! | `OUTBOUND4`, `OUTBOUND6` | hash | `Flow4`, `Flow6` → `FlowState` |
//! | `HOST_FLOWS4`, `HOST_FLOWS6` | LRU hash | `Flow4`, `Flow6` → `FlowState` |
//! | `VERDICT_COUNTERS` | per-CPU array | verdict id → `VerdictCounter` |
//! | `REASON_COUNTERS` | per-CPU array | reason → `ReasonCounter` |
//! | `ENDPOINT_COUNTERS` | per-CPU array | endpoint id → `EndpointCounter` |
//! | `EVENTS` | ring buffer | `Event` |
//! | `LOST` | per-CPU array u64 | 0 → events that found the ring full or the budget spent |
//! | `EVENT_BUDGET` | per-CPU array | 0 → `EventBudget` |

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! names {
    ($($name:ident)*) => {
        $(#[doc = concat!("Name of the map `", stringify!($name), "`.")] pub const $name: &str = stringify!($name);)*
        /// All maps.
        pub const ALL: &[&str] = &[$($name),*];
    };
}

names! {
    CONTROL IFINDEX ENDPOINTS ENDPOINT_SETS SOURCES4 SOURCES6 BLOCKS4 BLOCKS6 CLASS_COLUMN PORT_CLASS SETS ROWS
    OUTBOUND4 OUTBOUND6 HOST_FLOWS4 HOST_FLOWS6 VERDICT_COUNTERS REASON_COUNTERS ENDPOINT_COUNTERS
    EVENTS LOST EVENT_BUDGET
}

/// Program at the host veth's egress.
pub const TO_POD: &str = "to_pod";
/// Program at the host veth's ingress.
pub const FROM_POD: &str = "from_pod";

/// Per verdict id and CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VerdictCounter {
    /// Packets judged so.
    pub packets: u64,
    /// Their bytes, link header included.
    pub bytes: u64,
    /// SYNs among them.
    pub connections: u64,
}

/// Per reason and CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ReasonCounter {
    /// Packets.
    pub packets: u64,
    /// Bytes, link header included.
    pub bytes: u64,
}

/// Per endpoint and CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EndpointCounter {
    /// Packets that went on to the pod.
    pub to_pod_packets: u64,
    /// Packets that came from the pod and went on.
    pub from_pod_packets: u64,
    /// Packets to the pod that did not go on.
    pub to_pod_dropped: u64,
    /// Packets from the pod that did not go on.
    pub from_pod_dropped: u64,
}

/// How many refusals a CPU may still report: a flood of them must not push everything else out of the ring.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EventBudget {
    /// Events left, times the nanoseconds that one costs.
    pub credit_ns: u64,
    /// `bpf_ktime_get_ns` of the last refill.
    pub filled_ns: u64,
}

/// Flag of a map that user space may mmap (`BPF_F_MMAPABLE`).
pub const MMAPABLE: u32 = 1 << 10;

/// Mark of a packet that the programs made themselves ("THYR"). The kernel keeps a mark across a redirect and
/// zeroes it on whatever leaves a pod's namespace, so a pod can't set it.
pub const OWN_MARK: u32 = 0x5448_5952;
