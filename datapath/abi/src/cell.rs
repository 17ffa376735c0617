//! A cell of the policy tables: what happens, and the id of the verdict that says why.
//!
//! Invariant: an all-zero cell is no verdict and drops the packet; memory that nobody wrote never allows.
//!
//! ```text
//! bit 15..13 action   12..0 verdict id (index into the counters and the verdict names)
//! ```
#![expect(
    clippy::as_conversions,
    reason = "widening and masked numbers in const functions, which have no `From`"
)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What happens to a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[must_use]
pub enum Action {
    /// Nobody wrote this cell: the packet is dropped.
    Missing = 0,
    /// Pass to the next program.
    Allow = 1,
    /// Refuse: reset or silent drop as the node is configured.
    Deny = 2,
    /// Drop silently so that the sender tries again (the source's identity is not known yet).
    Hold = 3,
    /// The verdict needs L7: reserved for the node's proxy; refused like `Deny` until it exists.
    Proxy = 4,
}

/// A cell; see the module's drawing.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Cell(pub u16);

impl Cell {
    /// A cell; `None` when the verdict id needs more than 13 bits.
    #[must_use]
    pub const fn new(action: Action, verdict: u16) -> Option<Self> {
        if verdict >> 13 != 0 {
            return None;
        }
        Some(Self(((action as u16) << 13) | verdict))
    }

    /// What happens; an unknown number is `Missing`.
    #[inline(always)]
    pub const fn action(self) -> Action {
        match self.0 >> 13 {
            1 => Action::Allow,
            2 => Action::Deny,
            3 => Action::Hold,
            4 => Action::Proxy,
            _ => Action::Missing,
        }
    }

    /// The verdict id.
    #[must_use]
    #[inline(always)]
    pub const fn verdict(self) -> u16 {
        self.0 & 0x1fff
    }
}
