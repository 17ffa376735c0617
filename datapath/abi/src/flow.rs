//! Keys and states of the connections that are remembered: those that the pod opened and those that the node
//! made.
//!
//! Addresses and ports are in network byte order; "local" is the pod's side, so one key serves both
//! directions. Keys are aligned to eight bytes so that the programs write them by whole words.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// An IPv4 connection of an endpoint.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Flow4 {
    /// The pod's address.
    pub local: [u8; 4],
    /// The other side's address.
    pub remote: [u8; 4],
    /// The pod's port.
    pub local_port: [u8; 2],
    /// The other side's port.
    pub remote_port: [u8; 2],
    /// Endpoint id.
    pub endpoint: u16,
    /// Explicit padding, zero.
    pub pad: u16,
}

/// An IPv6 connection of an endpoint.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Flow6 {
    /// The pod's address.
    pub local: [u8; 16],
    /// The other side's address.
    pub remote: [u8; 16],
    /// The pod's port.
    pub local_port: [u8; 2],
    /// The other side's port.
    pub remote_port: [u8; 2],
    /// Endpoint id.
    pub endpoint: u16,
    /// Explicit padding, zero.
    pub pad: u16,
}

/// What is remembered of a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FlowState {
    /// `FlowState::*` bits.
    pub flags: u32,
    /// Explicit padding, zero.
    pub pad: u32,
    /// `bpf_ktime_get_ns` of the last change of `flags` (not of the last packet).
    pub changed_ns: u64,
}

impl FlowState {
    /// The other side has answered the SYN.
    pub const ANSWERED: u32 = 1;
    /// The pod has sent FIN.
    pub const LOCAL_FIN: u32 = 2;
    /// The other side has sent FIN.
    pub const REMOTE_FIN: u32 = 4;
    /// Either side has sent RST.
    pub const RESET: u32 = 8;
    /// In the table of the node's connections: made by the pod itself, through its own Service.
    pub const SELF: u32 = 16;
}

const _: () = assert!(size_of::<Flow4>() == 16 && size_of::<Flow6>() == 40 && size_of::<FlowState>() == 16);
