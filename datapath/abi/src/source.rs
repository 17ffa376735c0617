//! The exact-address tables: two-choice buckets from a source address to its class.
//!
//! Invariant: an all-zero slot is empty (no source is 0.0.0.0 or ::). A slot also says which local endpoint
//! owns the address, so that one look-up serves the verdict and the spoof check.
#![expect(
    clippy::as_conversions,
    reason = "widening and masked numbers in const functions, which have no `From`"
)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// An IPv4 slot: `address (as a big-endian number) | class << 32 | local endpoint id << 48`.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Slot4(pub u64);

impl Slot4 {
    /// A slot; `local` is the endpoint id that owns the address, 0 for none.
    #[must_use]
    pub const fn new(address: u32, class: u16, local: u16) -> Self {
        Self(address as u64 | (class as u64) << 32 | (local as u64) << 48)
    }

    /// The address, as the number whose big-endian bytes are on the wire.
    #[must_use]
    #[inline(always)]
    pub const fn address(self) -> u32 {
        (self.0 & 0xffff_ffff) as u32
    }

    /// The source class.
    #[must_use]
    #[inline(always)]
    pub const fn class(self) -> u16 {
        ((self.0 >> 32) & 0xffff) as u16
    }

    /// The local endpoint that owns the address, or 0.
    #[must_use]
    #[inline(always)]
    pub const fn local(self) -> u16 {
        (self.0 >> 48) as u16
    }
}

/// An IPv6 slot; the address as two numbers whose big-endian bytes are on the wire, then `class | local <<
/// 16`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Slot6 {
    /// Upper 64 bits of the address.
    pub high: u64,
    /// Lower 64 bits of the address.
    pub low: u64,
    /// `class | local endpoint id << 16`.
    pub value: u64,
}

const _: () = assert!(size_of::<Slot6>() == 24);

impl Slot6 {
    /// The source class.
    #[must_use]
    #[inline(always)]
    pub const fn class(self) -> u16 {
        (self.value & 0xffff) as u16
    }

    /// The local endpoint that owns the address, or 0.
    #[must_use]
    #[inline(always)]
    pub const fn local(self) -> u16 {
        ((self.value >> 16) & 0xffff) as u16
    }
}

/// Key of the IPv4 CIDR table (`maps::BLOCKS4`, an LPM trie): prefix length counts the 32 bits of `bank` too.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Block4 {
    /// 32 + the block's own length.
    pub prefix_len: u32,
    /// 0 or 1.
    pub bank: u32,
    /// Network byte order.
    pub address: [u8; 4],
}

/// Key of the IPv6 CIDR table (`maps::BLOCKS6`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Block6 {
    /// 32 + the block's own length.
    pub prefix_len: u32,
    /// 0 or 1.
    pub bank: u32,
    /// Network byte order.
    pub address: [u8; 16],
}
