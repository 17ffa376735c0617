//! The one word that a program reads first: which bank of tables is live, and how verdicts are carried out.
//!
//! Invariant: user space writes only the bank that is not live, waits until no program can still read it
//! (the grace period), and makes it live by one 64-bit store. A packet reads this word once, so it sees the
//! old tables or the new ones and never a mix.
//!
//! ```text
//! bit 63..40 flags   39..33 unused   32 bank   31..0 generation (0: nothing was ever committed)
//! ```
#![expect(
    clippy::as_conversions,
    reason = "widening and masked numbers in const functions, which have no `From`"
)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The live control word; see the module's drawing.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Control(pub u64);

const BANK: u64 = 1 << 32;

impl Control {
    /// Deny silently instead of answering with a reset.
    pub const DENY_DROP: u64 = 1 << 40;
    /// Connections made by the node itself are judged by policy like any other.
    pub const ENFORCE_HOST: u64 = 1 << 41;
    /// Some IPv4 CIDR block exists in the live bank: a source that is not in the exact table is looked up
    /// there.
    pub const BLOCKS4: u64 = 1 << 42;
    /// The same for IPv6.
    pub const BLOCKS6: u64 = 1 << 43;
    /// Report new allowed connections as events.
    pub const REPORT_NEW: u64 = 1 << 44;
    /// UDP, SCTP, ICMP and the rest are judged too; else they pass.
    pub const ENFORCE_NON_TCP: u64 = 1 << 45;

    /// A control word for `generation` in `bank` (0 or 1) with `flags` (the constants above).
    #[must_use]
    pub const fn new(generation: u32, bank: u32, flags: u64) -> Self {
        let generation = generation as u64;
        Self(generation | if bank == 0 { 0 } else { BANK } | (flags & !(BANK | 0xffff_ffff)))
    }

    /// The live bank: 0 or 1.
    #[must_use]
    #[inline(always)]
    pub const fn bank(self) -> u32 {
        ((self.0 >> 32) & 1) as u32
    }

    /// The number of the committed table state; 0 before the first commit.
    #[must_use]
    #[inline(always)]
    pub const fn generation(self) -> u32 {
        (self.0 & 0xffff_ffff) as u32
    }

    /// Whether all bits of `flag` are set.
    #[must_use]
    #[inline(always)]
    pub const fn has(self, flag: u64) -> bool {
        self.0 & flag == flag
    }
}
