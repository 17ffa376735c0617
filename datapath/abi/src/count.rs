//! What the programs count.
//!
//! Each CPU has an element of its own in `maps::COUNTERS`, which user space maps and sums up.
//!
//! Invariant: only the element's own CPU adds to it; a counter is set to zero before its index gets another
//! meaning.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::limits::{MAX_ENDPOINTS, MAX_VERDICTS};

/// Per verdict id.
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

/// Per reason.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ReasonCounter {
    /// Packets.
    pub packets: u64,
    /// Bytes, link header included.
    pub bytes: u64,
}

/// Per endpoint.
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

/// Reasons are numbers of eight bits.
pub const REASONS: usize = 256;

/// Everything that one CPU counts.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct CpuCounters {
    /// By verdict id.
    pub verdicts: [VerdictCounter; MAX_VERDICTS],
    /// By reason.
    pub reasons: [ReasonCounter; REASONS],
    /// By endpoint id.
    pub endpoints: [EndpointCounter; MAX_ENDPOINTS],
    /// Events that found the ring full or the budget spent.
    pub lost: u64,
    /// What this CPU may still report.
    pub budget: EventBudget,
    /// Explicit padding, zero: CPUs don't share a cache line.
    pub pad: [u64; 5],
}

const _: () = assert!(size_of::<CpuCounters>().is_multiple_of(64));
