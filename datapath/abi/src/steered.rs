//! Connections that the programs steer to a listener of the node's Envoy inside the pod, because their verdict needs
//! L7.
//!
//! ```text
//! SYN ─ sk_lookup finds the listener ─► Opening ─ the client acknowledges the pod's number ─► L7_FLOWS
//! ```
//!
//! Invariant: only the program that assigned the listener writes an `Opening`, and only an `Opening` becomes an
//! entry of `L7_FLOWS`: a connection that went to the pod's own listener is never in either.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A connection whose client has not yet shown that it can receive what the pod sends.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Opening {
    /// The pod's initial sequence number, once it has answered.
    pub isn: u32,
    /// Port of the listener that has the connection.
    pub port: u16,
    /// `Opening::*` bits.
    pub flags: u16,
}

impl Opening {
    /// The pod's side has answered: `isn` is its number.
    pub const ANSWERED: u16 = 1;
}

/// Where a socket listens, the key of `L7_LISTENERS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ListenerKey {
    /// Cookie of its network namespace (`SO_NETNS_COOKIE`).
    pub netns: u64,
    /// Port, host byte order.
    pub port: u32,
    /// `AF_INET` or `AF_INET6`.
    pub family: u32,
}

const _: () = assert!(size_of::<Opening>() == 8 && size_of::<ListenerKey>() == 16);
