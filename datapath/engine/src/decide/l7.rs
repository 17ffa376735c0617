//! A packet whose verdict needs L7 (`Act::Ask`): it passes when its connection is with a listener of Envoy that judges
//! this very verdict's residual.
//!
//! A step of its own, after `to_pod` or `from_pod`, so that the others don't carry its stack. The tables may have been
//! switched in between: what is no longer to be asked is dropped, and judged when it comes again.
//!
//! Invariant: a SYN may go in, since `steer` gives it to that listener or ends it; nothing else passes of a connection
//! that `steer` has not given there.

use thyra_datapath_abi::held::is_held;
use thyra_datapath_abi::{Action, Cell, Control, Event, EventKind, FlowState, Opening, Reason};

use super::{Act, Arrival, Outcome, Side, progress, revocation};
use crate::flows::Flows;
use crate::packet::{ACK, Packet, RST, SYN};
use crate::steered::Steered;
use crate::tables::{Tables, endpoint_at};
use crate::{Family, lookup};

/// What becomes of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// On.
    Through,
    /// Gone, for want of room.
    Full,
    /// As without an Envoy.
    Closed,
}

/// Who says what becomes of a packet of the endpoint's under this cell; none where no Envoy can be asked.
#[inline(always)]
pub(super) fn judge<N: Steered + ?Sized>(node: &N, endpoint: u16, cell: Cell) -> Option<Act> {
    if cell.action() != Action::Proxy {
        None
    } else if is_held(node.listener(cell.verdict())) {
        Some(Act::Hold)
    } else if node.is_steered(endpoint) {
        Some(Act::Ask)
    } else {
        None
    }
}

/// Decides about a packet on its way to the pod.
#[inline(always)]
pub fn to_pod<F: Family, N: Tables + Flows + Steered + ?Sized>(
    node: &N,
    arrival: &Arrival,
    packet: &Packet<F>,
) -> Outcome {
    let Some((endpoint, record)) = endpoint_at(node, arrival.ifindex) else {
        return Outcome::drop(0, Reason::EndpointUnknown);
    };
    let class = F::source(node, packet.source).class;
    let cell = lookup::cell(node, F::set(node.sets(endpoint)), class, packet.destination_port);
    if cell.action() != Action::Proxy {
        return gone(endpoint, cell);
    }
    let port = node.listener(cell.verdict());
    // `steer` knows the pod by its own address alone.
    let way = if port == 0 || is_held(port) || packet.destination != F::own(record) {
        Way::Closed
    } else if packet.is_syn() && packet.payload == 0 && !node.has_room(endpoint) {
        Way::Full
    } else if packet.is_syn() {
        through_if(packet.payload == 0)
    } else {
        goes_in::<F, N>(node, &packet.flow_to_pod(endpoint), packet, port)
    };
    let control = node.control();
    match way {
        Way::Through => Outcome::pass(endpoint).by(cell.verdict()).event_if(
            packet.is_syn() && control.reports(packet.sequence),
            EventKind::New,
        ),
        Way::Full => full(control, endpoint, packet),
        Way::Closed => closed(control, endpoint, packet, cell),
    }
}

/// Decides about a packet that the pod sends.
#[inline(always)]
pub fn from_pod<F: Family, N: Tables + Flows + Steered + ?Sized>(
    node: &N,
    arrival: &Arrival,
    packet: &Packet<F>,
) -> Outcome {
    let Some((endpoint, _)) = endpoint_at(node, arrival.ifindex) else {
        return Outcome::drop(0, Reason::EndpointUnknown).flags(Event::FROM_POD);
    };
    let class = F::source(node, packet.destination).class;
    let cell = lookup::cell(node, F::set(node.sets(endpoint)), class, packet.source_port);
    let outcome = if cell.action() != Action::Proxy {
        gone(endpoint, cell)
    } else if comes_out::<F, N>(
        node,
        &packet.flow_from_pod(endpoint),
        packet,
        node.listener(cell.verdict()),
    ) {
        Outcome::pass(endpoint)
    } else {
        closed(node.control(), endpoint, packet, cell)
    };
    outcome.flags(Event::FROM_POD)
}

/// Whether the client's packet, not a SYN, belongs to a connection that the listener on `port` has.
#[inline(always)]
fn goes_in<F: Family, N: Steered + ?Sized>(node: &N, key: &F::Flow, packet: &Packet<F>, port: u16) -> Way {
    let mark = progress(packet.flags, Side::Remote);
    if let Some(held) = F::accepted(node, key, mark) {
        return through_if(held == port);
    }
    let Some(opening) = F::opening(node, key) else {
        return Way::Closed;
    };
    // Who acknowledges the pod's number has seen it: no address is forged.
    let acknowledges = opening.flags & Opening::ANSWERED != 0
        && packet.flags & (ACK | RST | SYN) == ACK
        && packet.acknowledgment == opening.isn.wrapping_add(1);
    if opening.port != port || !acknowledges {
        Way::Closed
    } else if F::accept(node, key, port, mark | FlowState::ANSWERED) {
        Way::Through
    } else {
        Way::Full
    }
}

/// Whether the pod's packet belongs to such a connection; the answer to a SYN is noted.
#[inline(always)]
fn comes_out<F: Family, N: Steered + ?Sized>(node: &N, key: &F::Flow, packet: &Packet<F>, port: u16) -> bool {
    if port == 0 || is_held(port) {
        return false;
    }
    if let Some(held) = F::accepted(node, key, progress(packet.flags, Side::Pod)) {
        return held == port;
    }
    let Some(opening) = F::opening(node, key) else {
        return false;
    };
    if opening.port != port || packet.flags & (SYN | ACK | RST) != SYN | ACK {
        return false;
    }
    let answered = Opening {
        isn: packet.sequence,
        flags: opening.flags | Opening::ANSWERED,
        ..opening
    };
    F::begin(node, key, answered)
}

#[inline(always)]
const fn through_if(condition: bool) -> Way {
    if condition { Way::Through } else { Way::Closed }
}

/// There is room for no more. Who asks first is told; whose SYN was still in time sends again.
#[inline(always)]
pub(super) fn full<F: Family>(control: Control, endpoint: u16, packet: &Packet<F>) -> Outcome {
    let outcome = Outcome::drop(endpoint, Reason::L7Full);
    let act = if packet.is_syn() {
        refusal(control)
    } else {
        Act::Drop
    };
    Outcome { act, ..outcome }.event(EventKind::Deny)
}

/// How a SYN is refused.
#[inline(always)]
fn refusal(control: Control) -> Act {
    if control.has(Control::DENY_DROP) {
        Act::Drop
    } else {
        Act::Refuse
    }
}

/// The tables say something else by now.
#[inline(always)]
pub(super) fn gone(endpoint: u16, cell: Cell) -> Outcome {
    if cell.action() == Action::Missing {
        Outcome::drop(endpoint, Reason::TableMissing)
    } else {
        Outcome::new(Act::Drop, endpoint).by(cell.verdict())
    }
}

/// As the verdict is carried out where no Envoy can be asked.
#[inline(always)]
pub(super) fn closed<F: Family>(control: Control, endpoint: u16, packet: &Packet<F>, cell: Cell) -> Outcome {
    let outcome = Outcome::new(Act::Drop, endpoint).by(cell.verdict());
    if packet.is_syn() {
        let act = refusal(control);
        return Outcome { act, ..outcome }.event(EventKind::Deny);
    }
    // A reset carries nothing and is never answered (RFC 9293 3.5.2).
    if packet.flags & RST != 0 {
        return outcome;
    }
    Outcome {
        act: revocation(control, packet.flags & ACK != 0),
        ..outcome
    }
    .event(EventKind::Revoke)
}
