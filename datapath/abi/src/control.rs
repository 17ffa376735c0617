//! The one word that a program reads first: which bank of tables is live, and how verdicts are carried out.
//!
//! Invariant: user space writes only the bank that is not live, waits until no program can still read it
//! (the grace period), and makes it live by one 64-bit store. A packet reads this word once, so it sees the
//! old tables or the new ones and never a mix.
//!
//! ```text
//! bit 63..52 unused   51..48 sampling   47..40 flags   39..33 unused   32 bank   31..0 generation (0: none yet)
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
const SAMPLING: u32 = 48;

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
    /// Report TCP connections for the flow log: that they begin, and that they are answered; one of two to the
    /// `sampling`.
    pub const FLOW_LOG: u64 = 1 << 46;
    /// The largest `sampling`.
    pub const MAX_SAMPLING: u8 = 15;

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

    /// The flags that make the flow log take one of two to the `sampling` connections; more than `MAX_SAMPLING` is
    /// that.
    #[must_use]
    pub const fn flow_log(sampling: u8) -> u64 {
        let sampling = if sampling > Self::MAX_SAMPLING {
            Self::MAX_SAMPLING
        } else {
            sampling
        };
        Self::FLOW_LOG | (sampling as u64) << SAMPLING
    }

    /// Whether the flow log takes the connection whose SYN has this sequence number: nobody can foretell those, and
    /// both ends of a connection take the same.
    #[must_use]
    #[inline(always)]
    pub const fn logs(self, sequence: u32) -> bool {
        let sampling = (self.0 >> SAMPLING) as u32 & Self::MAX_SAMPLING as u32;
        self.has(Self::FLOW_LOG) && sequence & ((1 << sampling) - 1) == 0
    }

    /// Whether a new TCP connection with this sequence number is reported.
    #[must_use]
    #[inline(always)]
    pub const fn reports(self, sequence: u32) -> bool {
        self.has(Self::REPORT_NEW) || self.logs(sequence)
    }

    /// Whether all bits of `flag` are set.
    #[must_use]
    #[inline(always)]
    pub const fn has(self, flag: u64) -> bool {
        self.0 & flag == flag
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_so_many_connections_is_logged() {
        let logged = |sampling, numbers: u32| {
            let control = Control::new(7, 1, Control::flow_log(sampling));
            (0..numbers).filter(|number| control.logs(*number)).count()
        };
        assert_eq!((logged(0, 64), logged(4, 64), logged(15, 1 << 16)), (64, 4, 2));
        assert_eq!(logged(16, 1 << 16), 2, "the largest there is");
        assert!(!Control::new(7, 1, Control::REPORT_NEW).logs(0));
        assert!(Control::new(7, 1, Control::REPORT_NEW).reports(1));
        let control = Control::new(7, 1, Control::flow_log(15));
        assert_eq!((control.generation(), control.bank()), (7, 1));
    }
}
