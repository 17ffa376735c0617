//! What the programs know about a pod's interface.
//!
//! `EndpointRecord` is written when the endpoint is attached and belongs to no bank; `EndpointSets` is the
//! policy side of it and is switched with the bank.
#![expect(
    clippy::as_conversions,
    reason = "widening and masked numbers in const functions, which have no `From`"
)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// How an endpoint's verdicts are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Mode {
    /// No verdict at all; only the source checks run.
    Off = 0,
    /// Verdicts are counted and reported, nothing is refused.
    Audit = 1,
    /// Verdicts are carried out.
    Enforce = 2,
}

/// The interface side of an endpoint. Addresses are in network byte order; zero means "has none".
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EndpointRecord {
    /// Index of the host end of the veth; 0 marks an unused record.
    pub ifindex: u32,
    /// Index of the bridge that the host end is a port of, or 0.
    pub bridge_ifindex: u32,
    /// The pod's IPv4 address (CNI's word), network byte order.
    pub address4: [u8; 4],
    /// `EndpointRecord::*` flag bits.
    pub flags: u32,
    /// The pod's IPv6 address.
    pub address6: [u8; 16],
    /// The pod's MAC, for the checks on bridged links; zero when unknown.
    pub mac: [u8; 6],
    /// The node's id of the pod's network namespace; means something only with `DIRECT`.
    pub netns: u16,
}

const _: () = assert!(size_of::<EndpointRecord>() == 40);

impl EndpointRecord {
    /// The pod may open no connection yet: other nodes may still take its address for another pod's.
    pub const HELD_BACK: u32 = 1;
    /// Packets of connections with other such pods may be put straight into the pod (`--local-redirect`).
    pub const DIRECT: u32 = 2;
    /// What comes to the pod is judged inside its network namespace (`--hook=pod`).
    pub const AT_POD: u32 = 4;
}

/// The policy side of an endpoint, one 64-bit word: `set4 | set6 << 16 | mode << 32`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct EndpointSets(pub u64);

const ENROLLED: u64 = 1 << 63;

impl EndpointSets {
    /// The word for an endpoint that a commit has placed. A zero word (never placed) denies everything.
    #[must_use]
    pub const fn new(set4: u16, set6: u16, mode: Mode) -> Self {
        Self(set4 as u64 | (set6 as u64) << 16 | (mode as u64) << 32 | ENROLLED)
    }

    /// Whether a commit has placed this endpoint.
    #[must_use]
    #[inline(always)]
    pub const fn is_placed(self) -> bool {
        self.0 & ENROLLED != 0
    }

    /// Policy set for IPv4 packets.
    #[must_use]
    #[inline(always)]
    pub const fn set4(self) -> u16 {
        (self.0 & 0xffff) as u16
    }

    /// Policy set for IPv6 packets.
    #[must_use]
    #[inline(always)]
    pub const fn set6(self) -> u16 {
        ((self.0 >> 16) & 0xffff) as u16
    }

    /// How verdicts are carried out; an unknown number enforces.
    #[must_use]
    #[inline(always)]
    pub const fn mode(self) -> Mode {
        match (self.0 >> 32) & 0xff {
            0 => Mode::Off,
            1 => Mode::Audit,
            _ => Mode::Enforce,
        }
    }
}
