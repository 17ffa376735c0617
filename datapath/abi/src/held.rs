//! Connections whose first bytes are held back until an Envoy has judged them, once for the whole connection.
//!
//! ```text
//!  SYN ─► HELD_OPENING ─ the client acknowledges the pod's number ─► HELD_FLOWS
//!                                                                      │
//!        AWAIT: what carries bytes goes to the agent ◄─────────────────┘
//!          │ allowed up to `end`                      │ refused, time out, conflict
//!        GUARD: bytes before `end` go to the agent    DENY: reset
//!          │ the pod acknowledges `end`
//!        OPEN: everything passes
//! ```
//!
//! AWAIT, GUARD and DENY differ by what is in `HELD_VERDICTS` for the connection; OPEN is in the entry itself.
//!
//! Invariant: only the programs write a `HeldFlow`, only user space a `HeldVerdict`, and both name the sequence numbers
//! with which the connection began: what was said of one connection never counts for a later one with the same ends.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::limits::L7_FIRST_PORT;
use crate::{Flow4, Flow6, FlowState};

/// Whether what a verdict's entry in `State::listeners` says is the number of a residual whose connections are
/// held, and no port of a listener.
#[must_use]
#[inline(always)]
pub const fn is_held(listener: u16) -> bool {
    listener != 0 && listener < L7_FIRST_PORT
}

/// The sequence numbers of the SYN and of the SYN-ACK.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Isns {
    /// The client's.
    pub client: u32,
    /// The pod's.
    pub pod: u32,
}

/// A connection whose client has not yet shown that it can receive what the pod sends.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct HeldOpening {
    /// The pod's counts once it has answered.
    pub isns: Isns,
    /// Number of the residual that judges it.
    pub residual: u16,
    /// `HeldOpening::*` bits.
    pub flags: u16,
    /// Zero.
    pub pad: u32,
}

impl HeldOpening {
    /// The pod has answered.
    pub const ANSWERED: u16 = 1;
}

/// A connection that is held or was.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct HeldFlow {
    /// Tagged with the residual's number.
    pub state: FlowState,
    /// How it began.
    pub isns: Isns,
    /// Equal to `isns` once it is open: an entry that was given to another connection meanwhile is not opened by who
    /// meant the earlier one.
    pub opened: Isns,
}

impl HeldFlow {
    /// No connection.
    pub const NONE: Self = Self {
        state: FlowState::FREE,
        isns: Isns { client: 0, pod: 0 },
        opened: Isns {
            client: u32::MAX,
            pod: u32::MAX,
        },
    };

    /// A connection that awaits its verdict.
    #[must_use]
    #[inline(always)]
    pub const fn awaiting(state: FlowState, isns: Isns) -> Self {
        // Never equal, whatever the numbers are.
        let opened = Isns {
            client: !isns.client,
            pod: !isns.pod,
        };
        Self { state, isns, opened }
    }

    /// Whether everything passes.
    #[must_use]
    #[inline(always)]
    pub const fn is_open(&self) -> bool {
        self.opened.client == self.isns.client && self.opened.pod == self.isns.pod
    }
}

/// Key of a verdict on an IPv4 connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct HeldKey4 {
    /// The connection.
    pub flow: Flow4,
    /// How it began.
    pub isns: Isns,
}

/// The same for IPv6.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct HeldKey6 {
    /// The connection.
    pub flow: Flow6,
    /// How it began.
    pub isns: Isns,
}

/// What an Envoy has said of a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct HeldVerdict {
    /// As in the key, so that an element that is given to another connection while it is read is not taken for this
    /// one's. Written first, read last.
    pub isns: Isns,
    /// `HeldVerdict::ALLOW`; anything else refuses.
    pub action: u32,
    /// Sequence number behind the last byte that was judged.
    pub end: u32,
}

impl HeldVerdict {
    /// It may go on.
    pub const ALLOW: u32 = 1;
    /// It may not.
    pub const DENY: u32 = 2;
}

const _: () = assert!(size_of::<HeldOpening>() == 16 && size_of::<HeldFlow>() == 24);
const _: () =
    assert!(size_of::<HeldKey4>() == 24 && size_of::<HeldKey6>() == 48 && size_of::<HeldVerdict>() == 16);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_numbers_make_a_new_entry_an_open_one() {
        for isns in [(0, 0), (u32::MAX, u32::MAX), (0, u32::MAX), (7, 9)] {
            let (client, pod) = isns;
            let flow = HeldFlow::awaiting(FlowState::FREE, Isns { client, pod });
            assert!(!flow.is_open(), "{isns:?}");
            assert!(
                HeldFlow {
                    opened: flow.isns,
                    ..flow
                }
                .is_open()
            );
        }
    }

    #[test]
    fn a_listeners_port_is_no_number_of_a_residual() {
        assert!(!is_held(0) && is_held(1) && is_held(L7_FIRST_PORT - 1) && !is_held(L7_FIRST_PORT));
    }
}
