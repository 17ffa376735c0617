//! What is remembered of datagrams and pings: who began to talk, by endpoint (`--non-tcp=enforce`).
//!
//! ```text
//! DATAGRAMS4, DATAGRAMS6   endpoint 0: 128 buckets │ endpoint 1: 128 buckets │ …
//! bucket                   state × 8 │ key × 8
//! ```
//!
//! Each endpoint has buckets of its own, so that no pod can push out what another has remembered; what the endpoint
//! and the local address are need not be in a key then. An entry is fresh for two minutes after the pod has sent
//! (RFC 4787, REQ-5 and REQ-6); the state is a `FlowState` with the flags of this module.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::FlowState;

/// UDP.
pub const UDP: u32 = 1;
/// UDP-Lite.
pub const UDP_LITE: u32 = 2;
/// SCTP.
pub const SCTP: u32 = 3;
/// DCCP.
pub const DCCP: u32 = 4;
/// ICMP echo requests of the pod; the identifier stands for the local port.
pub const ECHO: u32 = 5;
/// The first fragment of a datagram that passed; its identification stands for the ports.
pub const FRAGMENT: u32 = 6;
/// The bits that tell these apart.
pub const KIND: u32 = 7;
/// The other side began.
pub const INBOUND: u32 = 8;
/// The pod began, and policy lets in no answer by itself: never pushed out by an entry that is not needed.
pub const NEEDED: u32 = 16;

/// Ticks of `FlowState` for which an entry is fresh: two minutes.
pub const FRESH_TICKS: u64 = 120_000_000_000 / FlowState::TICK_NS;

/// What a bucket holds: the states fill a cache line.
pub const DATAGRAM_SLOTS: usize = 8;
/// The word of a bucket where its keys begin.
pub const DATAGRAM_KEYS: usize = DATAGRAM_SLOTS;

/// The other end, and the pod's port.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Datagram4 {
    /// The other side's address.
    pub remote: [u8; 4],
    /// The pod's port.
    pub local_port: [u8; 2],
    /// The other side's port.
    pub remote_port: [u8; 2],
}

/// The same for IPv6.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Datagram6 {
    /// The other side's address.
    pub remote: [u8; 16],
    /// The pod's port.
    pub local_port: [u8; 2],
    /// The other side's port.
    pub remote_port: [u8; 2],
    /// Zero but for fragments.
    pub detail: [u8; 4],
}

/// Words of an IPv4 key.
pub const DATAGRAM4_WORDS: usize = size_of::<Datagram4>() / size_of::<u64>();
/// Words of an IPv6 key.
pub const DATAGRAM6_WORDS: usize = size_of::<Datagram6>() / size_of::<u64>();

/// A bucket of `maps::DATAGRAMS4`.
#[repr(C, align(8))]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DatagramBucket4(pub [u64; 16]);

/// A bucket of `maps::DATAGRAMS6`.
#[repr(C, align(8))]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DatagramBucket6(pub [u64; 32]);

const _: () = assert!(DATAGRAM_SLOTS * size_of::<u64>() == 64, "a cache line");
const _: () = assert!(DATAGRAM_KEYS + DATAGRAM_SLOTS * DATAGRAM4_WORDS == 16);
const _: () = assert!(DATAGRAM_KEYS + DATAGRAM_SLOTS * DATAGRAM6_WORDS == 32);
const _: () = assert!(size_of::<Datagram4>() == 8 && size_of::<Datagram6>() == 24);
