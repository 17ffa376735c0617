//! Keys and states of the connections that are remembered: those that the pod opened and those that the node
//! made.
//!
//! Addresses and ports are in network byte order; "local" is the pod's side, so one key serves both
//! directions. Keys are aligned to eight bytes so that the programs write them by whole words.

use core::net::{SocketAddrV4, SocketAddrV6};

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
    /// IP protocol number; 0 stands for TCP.
    pub protocol: u16,
}

impl Flow4 {
    /// The connection between the pod's end and the other one.
    #[must_use]
    pub fn between(local: SocketAddrV4, remote: SocketAddrV4, endpoint: u16) -> Self {
        Self {
            local: local.ip().octets(),
            remote: remote.ip().octets(),
            local_port: local.port().to_be_bytes(),
            remote_port: remote.port().to_be_bytes(),
            endpoint,
            protocol: 0,
        }
    }

    /// The pod's end, and the other one.
    #[must_use]
    pub fn ends(&self) -> (SocketAddrV4, SocketAddrV4) {
        let end = |address: [u8; 4], port| SocketAddrV4::new(address.into(), u16::from_be_bytes(port));
        (
            end(self.local, self.local_port),
            end(self.remote, self.remote_port),
        )
    }
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
    /// IP protocol number; 0 stands for TCP.
    pub protocol: u16,
}

impl Flow6 {
    /// The connection between the pod's end and the other one.
    #[must_use]
    pub fn between(local: SocketAddrV6, remote: SocketAddrV6, endpoint: u16) -> Self {
        Self {
            local: local.ip().octets(),
            remote: remote.ip().octets(),
            local_port: local.port().to_be_bytes(),
            remote_port: remote.port().to_be_bytes(),
            endpoint,
            protocol: 0,
        }
    }

    /// The pod's end, and the other one.
    #[must_use]
    pub fn ends(&self) -> (SocketAddrV6, SocketAddrV6) {
        let end = |address: [u8; 16], port| SocketAddrV6::new(address.into(), u16::from_be_bytes(port), 0, 0);
        (
            end(self.local, self.local_port),
            end(self.remote, self.remote_port),
        )
    }
}

/// What is remembered of a connection, in one word that is changed whole.
///
/// ```text
/// bits  0..8   `FlowState::*` flags     bits 16..32  tag: part of the key's hash
/// bits  8..10  phase                    bits 32..64  tick of the last change of the flags
/// ```
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FlowState(pub u64);

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
    /// In the table of the pods' own connections: goes straight from pod to pod, both ways.
    pub const DIRECT: u32 = 32;

    /// A slot that nobody uses.
    pub const FREE: Self = Self(0);
    /// Phase and tag.
    pub const IDENTITY: u64 = 0xffff_0300;
    const FLAGS: u64 = 0xff;
    const CLAIMED: u64 = 0x100;
    const LIVE: u64 = 0x200;
    /// Nanoseconds in a tick: about 17 ms.
    pub const TICK_NS: u64 = 1 << 24;

    /// The tick of a moment on the programs' clock.
    #[must_use]
    #[inline(always)]
    pub const fn tick(now_ns: u64) -> u64 {
        now_ns / Self::TICK_NS
    }

    /// A connection with these flags, changed at `tick`.
    #[must_use]
    #[inline(always)]
    pub const fn live(flags: u32, tag: u64, tick: u64) -> Self {
        Self(tick << 32 | (tag & 0xffff) << 16 | Self::LIVE | widen(flags))
    }

    /// A slot whose key is being written.
    #[must_use]
    #[inline(always)]
    pub const fn claimed(tag: u64) -> Self {
        Self((tag & 0xffff) << 16 | Self::CLAIMED)
    }

    /// The same connection with `mark` added at `tick`.
    #[must_use]
    #[inline(always)]
    pub const fn marked(self, mark: u32, tick: u64) -> Self {
        Self((self.0 & 0xffff_ffff) | tick << 32 | widen(mark))
    }

    /// The same connection, changed when it was, without `mark`.
    #[must_use]
    pub const fn without(self, mark: u32) -> Self {
        Self(self.0 & !widen(mark))
    }

    /// Its flags.
    #[must_use]
    #[inline(always)]
    pub const fn flags(self) -> u32 {
        let [low, ..] = self.0.to_le_bytes();
        u32::from_le_bytes([low, 0, 0, 0])
    }

    /// What the key's hash, or in `L7_FLOWS` the listener's port, left in it.
    #[must_use]
    #[inline(always)]
    pub const fn tag(self) -> u16 {
        let [_, _, low, high, ..] = self.0.to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    /// Whether all of `mark` is among the flags.
    #[must_use]
    #[inline(always)]
    pub const fn has(self, mark: u32) -> bool {
        self.0 & widen(mark) == widen(mark)
    }

    /// Whether a connection is remembered here.
    #[must_use]
    #[inline(always)]
    pub const fn is_live(self) -> bool {
        self.0 & Self::LIVE != 0
    }

    /// Whether a connection is remembered here whose hash has this tag.
    #[must_use]
    #[inline(always)]
    pub const fn may_be(self, tag: u64) -> bool {
        self.0 & Self::IDENTITY == (tag & 0xffff) << 16 | Self::LIVE
    }

    /// Ticks since the last change, modulo 2^32.
    #[must_use]
    #[inline(always)]
    pub const fn age(self, tick: u64) -> u64 {
        tick.wrapping_sub(self.0 >> 32) & 0xffff_ffff
    }

    /// Nanoseconds since the last change, to a tick; 0 when the clock is behind it.
    #[must_use]
    pub const fn age_ns(self, now_ns: u64) -> u64 {
        let ticks = Self::tick(now_ns).wrapping_sub(self.0 >> 32) & 0xffff_ffff;
        if ticks < 1 << 31 { ticks * Self::TICK_NS } else { 0 }
    }
}

const _: () = assert!(FlowState::FLAGS & FlowState::IDENTITY == 0);

/// The lower eight bits as a word.
#[inline(always)]
const fn widen(flags: u32) -> u64 {
    let [low, ..] = flags.to_le_bytes();
    u64::from_le_bytes([low, 0, 0, 0, 0, 0, 0, 0])
}

/// Words of an IPv4 key.
pub const FLOW4_WORDS: usize = size_of::<Flow4>() / size_of::<u64>();
/// Words of an IPv6 key.
pub const FLOW6_WORDS: usize = size_of::<Flow6>() / size_of::<u64>();
/// Connections that a bucket holds: with the word before them, their states fill a cache line.
pub const FLOW_SLOTS: usize = 7;
/// The word of a bucket that says whether connections which belong here went elsewhere.
pub const FLOW_SPILLED: usize = 0;
/// The word of a bucket with the state of its first slot.
pub const FLOW_STATES: usize = 1;
/// The word of a bucket where its keys begin.
pub const FLOW_KEYS: usize = FLOW_STATES + FLOW_SLOTS;

/// A bucket of `maps::OUTBOUND4`: one line of states, two of keys.
#[repr(C, align(8))]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FlowBucket4(pub [u64; 24]);

/// A bucket of `maps::OUTBOUND6`: one line of states, five of keys.
#[repr(C, align(8))]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct FlowBucket6(pub [u64; 48]);

const _: () = assert!(FLOW_KEYS * size_of::<u64>() == 64, "a cache line");
const _: () =
    assert!(FLOW_KEYS + FLOW_SLOTS * FLOW4_WORDS <= 24 && FLOW_KEYS + FLOW_SLOTS * FLOW6_WORDS <= 48);
const _: () = assert!(size_of::<Flow4>() == 16 && size_of::<Flow6>() == 40 && size_of::<FlowState>() == 8);
