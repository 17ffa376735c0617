//! Connections that go straight from one pod of the node into another (`--local-redirect`).
//!
//! ```text
//! client's from_pod, SYN    server's record and verdict, no such connection there → entry with `DIRECT`, straight
//! client's from_pod, later  its own entry has `DIRECT`                            → server's verdict, straight
//! server's from_pod         the client's entry has `DIRECT`                       → client's verdict, straight
//! server's to_pod, SYN      the client's entry has `DIRECT` and is open           → tuple clash
//! ```
//!
//! The client's entry names the addresses that both pods use themselves. A connection through a Service has another
//! one there, the Service's, so neither its packets nor its answers are ever taken from the stack that translates them.
//!
//! Invariant: a connection goes straight both ways or not at all; a packet that goes straight was judged by `to_pod`
//! of the pod that it goes to, as if it had arrived there by the sender's interface.

use thyra_datapath_abi::{Action, Control, EndpointRecord, EventKind, FlowState, Mode, Reason};

use super::{Act, Arrival, Outcome};
use crate::flows::{FlowTable, Flows};
use crate::packet::Packet;
use crate::tables::{Tables, endpoint_at};
use crate::{Family, lookup};

/// Where a packet at `from_pod` is when it goes straight to the pod with record `to`.
#[must_use]
#[inline(always)]
pub fn arrival(sender: &Arrival, to: &EndpointRecord) -> Arrival {
    Arrival {
        ifindex: to.ifindex,
        ingress_ifindex: sender.ifindex,
        has_socket: false,
        at_pod: false,
    }
}

/// Where the packet, whose sender's own `from_pod` lets it go on, goes straight to: an endpoint, or 0 for the stack.
#[must_use]
#[inline(always)]
pub fn onward<F: Family, N: Tables + Flows + ?Sized>(node: &N, sender: &Arrival, packet: &Packet<F>) -> u16 {
    // A frame with a tag belongs to another link than the pods'.
    if packet.l3 != ETHERNET {
        return 0;
    }
    let Some((endpoint, _)) = endpoint_at(node, sender.ifindex) else {
        return 0;
    };
    let to = F::source(node, packet.destination).local;
    let goes = if packet.is_syn() {
        // The answers find their way by the tables: they must know the client by this address.
        F::source(node, packet.source).local == endpoint && are_joined(node, endpoint, to)
    } else {
        is_direct(node, endpoint, to, packet)
    };
    if goes { to } else { 0 }
}

/// What is known of the connection that a SYN opens.
#[must_use]
#[inline(always)]
pub fn before<F: Family, N: Tables + Flows + ?Sized>(
    node: &N,
    sender: &Arrival,
    packet: &Packet<F>,
) -> Option<u32> {
    let (endpoint, _) = endpoint_at(node, sender.ifindex)?;
    F::find(node, FlowTable::Outbound, &packet.flow_from_pod(endpoint), 0)
}

/// Bytes of a link header without a tag.
const ETHERNET: u32 = 14;

/// Whether packets between the two pods may go straight at all.
#[inline(always)]
fn are_joined<N: Tables + ?Sized>(node: &N, endpoint: u16, to: u16) -> bool {
    let both = node.record(endpoint).flags & node.record(to).flags;
    to != 0 && to != endpoint && both & EndpointRecord::DIRECT != 0
}

/// Whether the packet, no SYN, belongs to a connection that goes straight.
#[must_use]
#[inline(always)]
pub fn is_direct<F: Family, N: Tables + Flows + ?Sized>(
    node: &N,
    endpoint: u16,
    to: u16,
    packet: &Packet<F>,
) -> bool {
    are_joined(node, endpoint, to)
        && (has_bit::<F, N>(node, &packet.flow_from_pod(endpoint))
            || has_bit::<F, N>(node, &packet.flow_to_pod(to)))
}

#[inline(always)]
fn has_bit<F: Family, N: Flows + ?Sized>(node: &N, key: &F::Flow) -> bool {
    let flags = F::find(node, FlowTable::Outbound, key, 0);
    flags.is_some_and(|flags| flags & FlowState::DIRECT != 0)
}

/// Nothing but stragglers can come.
#[inline(always)]
fn is_closed(flags: u32) -> bool {
    let both = FlowState::LOCAL_FIN | FlowState::REMOTE_FIN;
    flags & FlowState::RESET != 0 || flags & both == both
}

/// A SYN went straight and nothing has come of it yet: it goes there again.
#[must_use]
#[inline(always)]
pub fn went_straight(before: u32) -> bool {
    before == FlowState::DIRECT
}

/// A SYN went through the stack and nothing has come of it yet: it goes there again.
#[must_use]
#[inline(always)]
pub fn went_through_the_stack(before: u32) -> bool {
    before == 0
}

/// Whether policy of the pod with endpoint `to` lets the SYN in as it is, by its cell alone: what needs L7 goes through
/// the stack, and so does what is refused.
#[must_use]
#[inline(always)]
pub fn may_enter<F: Family, N: Tables + ?Sized>(node: &N, to: u16, packet: &Packet<F>) -> bool {
    let sets = node.sets(to);
    if !sets.is_placed() {
        return false;
    }
    if sets.mode() == Mode::Off {
        return true;
    }
    let class = F::source(node, packet.source).class;
    lookup::cell(node, F::set(sets), class, packet.destination_port).action() == Action::Allow
}

/// Whether a SYN with this outcome at the far pod goes straight: policy lets it in. All others are judged once more
/// where they always are, and refused there.
#[must_use]
#[inline(always)]
pub fn lets_in(outcome: &Outcome) -> bool {
    outcome.act == Act::Pass && !matches!(outcome.event, Some(EventKind::Audit))
}

/// Notes in the entry that a SYN has made whether its connection goes straight; false when there is none.
#[must_use]
#[inline(always)]
pub fn note<F: Family, N: Tables + Flows + ?Sized>(
    node: &N,
    sender: &Arrival,
    packet: &Packet<F>,
    straight: bool,
) -> bool {
    let Some((endpoint, _)) = endpoint_at(node, sender.ifindex) else {
        return false;
    };
    let key = packet.flow_from_pod(endpoint);
    if straight {
        F::find(node, FlowTable::Outbound, &key, FlowState::DIRECT).is_some()
    } else {
        F::open(node, FlowTable::Outbound, &key, 0)
    }
}

/// Whether a SYN that came to `to_pod` through the stack has the addresses and ports of a connection that goes
/// straight: the answers to both would go straight. A connection that is closed gives them up.
#[must_use]
#[inline(always)]
pub fn is_occupied<F: Family, N: Tables + Flows + ?Sized>(
    node: &N,
    arrival: &Arrival,
    packet: &Packet<F>,
) -> bool {
    let Some((endpoint, _)) = endpoint_at(node, arrival.ifindex) else {
        return false;
    };
    let client = F::source(node, packet.source).local;
    if client == 0 || client == endpoint {
        return false;
    }
    let key = packet.flow_from_pod(client);
    match F::find(node, FlowTable::Outbound, &key, 0) {
        Some(flags) if flags & FlowState::DIRECT == 0 => false,
        Some(flags) if is_closed(flags) => {
            // Known already, so there is room for it.
            let _ = F::open(node, FlowTable::Outbound, &key, flags & !FlowState::DIRECT);
            false
        }
        found => found.is_some(),
    }
}

/// What becomes of a SYN that `is_occupied`: refused, unless policy does so.
#[inline(always)]
pub fn clash(outcome: &Outcome, control: Control) -> Option<Outcome> {
    let act = match outcome.act {
        Act::Drop | Act::Refuse | Act::Revoke => return None,
        Act::Pass | Act::Ask | Act::Hold | Act::Divert if control.has(Control::DENY_DROP) => Act::Drop,
        Act::Pass | Act::Ask | Act::Hold | Act::Divert => Act::Refuse,
    };
    let clash = Outcome::new(act, outcome.endpoint).because(Reason::TupleClash);
    Some(clash.event(EventKind::Deny))
}
