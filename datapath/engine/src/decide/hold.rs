//! A packet of a connection that is judged once, by its first bytes (`Act::Hold`): it passes, or goes to the agent,
//! which asks an Envoy (`thyra_datapath_abi::held` has the states).
//!
//! A step of its own, as `l7` is, and with the same care: the tables may have been switched in between.
//!
//! Invariant: until a connection is allowed no byte of the client's reaches the pod and none of the pod's the client;
//! bytes before the verdict's end reach the pod only as the agent gives them back.

use thyra_datapath_abi::held::is_held;
use thyra_datapath_abi::{Action, Control, Event, EventKind, HeldFlow, HeldOpening, HeldVerdict, Isns};

use super::l7::{closed, full, gone};
use super::{Act, Arrival, Outcome, Side, progress};
use crate::held::{Held, awaiting};
use crate::packet::{ACK, FIN, Packet, RST, SYN, URG};
use crate::steered::Steered;
use crate::tables::{Tables, endpoint_at};
use crate::{Family, lookup};

/// What becomes of the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// On.
    Through,
    /// To the agent.
    Agent,
    /// Gone; it comes again.
    Gone,
    /// Gone, for want of room.
    Full,
    /// As without an Envoy.
    Closed,
}

/// Decides about a packet on its way to the pod.
#[inline(always)]
pub fn to_pod<F: Family, N: Tables + Steered + Held + ?Sized>(
    node: &N,
    arrival: &Arrival,
    packet: &Packet<F>,
) -> Outcome {
    let Some((endpoint, record)) = endpoint_at(node, arrival.ifindex) else {
        return Outcome::drop(0, thyra_datapath_abi::Reason::EndpointUnknown);
    };
    let class = F::source(node, packet.source).class;
    let cell = lookup::cell(node, F::set(node.sets(endpoint)), class, packet.destination_port);
    if cell.action() != Action::Proxy {
        return gone(endpoint, cell);
    }
    let residual = node.listener(cell.verdict());
    let key = packet.flow_to_pod(endpoint);
    // The agent's way back knows the pod by its own address alone.
    let way = if !is_held(residual) || packet.destination != F::own(record) {
        Way::Closed
    } else if packet.is_syn() {
        begins::<F, N>(node, endpoint, &key, packet, residual)
    } else {
        goes_in::<F, N>(node, &key, packet, residual)
    };
    let control = node.control();
    match way {
        Way::Through => Outcome::pass(endpoint).by(cell.verdict()).event_if(
            packet.is_syn() && control.reports(packet.sequence),
            EventKind::New,
        ),
        Way::Agent => Outcome::new(Act::Divert, endpoint).by(cell.verdict()),
        Way::Gone => Outcome::new(Act::Drop, endpoint).by(cell.verdict()),
        Way::Full => full(control, endpoint, packet),
        Way::Closed => closed(control, endpoint, packet, cell),
    }
}

/// Decides about a packet that the pod sends.
#[inline(always)]
pub fn from_pod<F: Family, N: Tables + Steered + Held + ?Sized>(
    node: &N,
    arrival: &Arrival,
    packet: &Packet<F>,
) -> Outcome {
    let Some((endpoint, _)) = endpoint_at(node, arrival.ifindex) else {
        return Outcome::drop(0, thyra_datapath_abi::Reason::EndpointUnknown).flags(Event::FROM_POD);
    };
    let class = F::source(node, packet.destination).class;
    let cell = lookup::cell(node, F::set(node.sets(endpoint)), class, packet.source_port);
    if cell.action() != Action::Proxy {
        return gone(endpoint, cell).flags(Event::FROM_POD);
    }
    let residual = node.listener(cell.verdict());
    let key = packet.flow_from_pod(endpoint);
    let way = if packet.flags & RST != 0 && packet.payload == 0 {
        // Ends the connection, and says nothing else.
        let _marked = F::held(node, &key, progress(packet.flags, Side::Pod));
        Way::Through
    } else if !is_held(residual) {
        Way::Closed
    } else {
        comes_out::<F, N>(node, &key, packet, residual)
    };
    let outcome = match way {
        Way::Through => Outcome::pass(endpoint),
        Way::Gone | Way::Agent | Way::Full => Outcome::new(Act::Drop, endpoint).by(cell.verdict()),
        Way::Closed => closed(node.control(), endpoint, packet, cell),
    };
    outcome.flags(Event::FROM_POD)
}

/// A SYN. One that carries data is dropped: its sender comes again without (RFC 7413 4.2).
#[inline(always)]
fn begins<F: Family, N: Steered + Held + ?Sized>(
    node: &N,
    endpoint: u16,
    key: &F::Flow,
    packet: &Packet<F>,
    residual: u16,
) -> Way {
    if packet.payload != 0 || packet.flags & (FIN | RST | URG) != 0 {
        return Way::Gone;
    }
    if !node.has_room(endpoint) {
        return Way::Full;
    }
    if let Some(known) = F::held_opening(node, key)
        && known.isns.client == packet.sequence
        && known.residual == residual
    {
        // Sent again: what the pod has answered stays known.
        return Way::Through;
    }
    let opening = HeldOpening {
        isns: Isns {
            client: packet.sequence,
            pod: 0,
        },
        residual,
        flags: 0,
        pad: 0,
    };
    if F::begin_held(node, key, opening) {
        Way::Through
    } else {
        Way::Full
    }
}

/// The client's packet, not a SYN.
#[inline(always)]
fn goes_in<F: Family, N: Held + ?Sized>(node: &N, key: &F::Flow, packet: &Packet<F>, residual: u16) -> Way {
    let mark = progress(packet.flags, Side::Remote);
    if let Some(flow) = F::held(node, key, mark) {
        return if flow.state.tag() != residual {
            Way::Closed
        } else if flow.is_open() {
            Way::Through
        } else {
            awaits::<F, N>(node, key, packet, flow.isns)
        };
    }
    let Some(opening) = F::held_opening(node, key) else {
        return Way::Closed;
    };
    // Who acknowledges the pod's number has seen it: no address is forged.
    let acknowledges = opening.flags & HeldOpening::ANSWERED != 0
        && packet.flags & (ACK | RST | SYN) == ACK
        && packet.acknowledgment == opening.isns.pod.wrapping_add(1);
    if opening.residual != residual || !acknowledges {
        Way::Closed
    } else if F::hold(node, key, awaiting(node, opening, mark)) {
        awaits::<F, N>(node, key, packet, opening.isns)
    } else {
        Way::Full
    }
}

/// A packet of the client's before the connection is open.
#[inline(always)]
fn awaits<F: Family, N: Held + ?Sized>(node: &N, key: &F::Flow, packet: &Packet<F>, isns: Isns) -> Way {
    let carries = packet.payload != 0 || packet.flags & FIN != 0;
    // At bytes to come: the pod's reader skips the one that is meant (tcp(7)), and so reads others than were judged.
    let points = packet.flags & URG != 0 && packet.payload == 0;
    if packet.flags & RST != 0 {
        return if packet.payload == 0 {
            Way::Through
        } else {
            Way::Gone
        };
    }
    match F::judged(node, key, isns) {
        None if points => Way::Gone,
        None if !carries => Way::Through,
        None if packet.payload == 0 && packet.sequence == isns.client.wrapping_add(1) => Way::Through,
        None => Way::Agent,
        Some(HeldVerdict {
            action: HeldVerdict::ALLOW,
            end,
            ..
        }) => {
            if !is_before(packet.sequence, end) {
                Way::Through
            } else if points {
                Way::Gone
            } else if carries {
                Way::Agent
            } else {
                Way::Through
            }
        }
        Some(_) => Way::Closed,
    }
}

/// The pod's packet.
#[inline(always)]
fn comes_out<F: Family, N: Held + ?Sized>(node: &N, key: &F::Flow, packet: &Packet<F>, residual: u16) -> Way {
    // A value in any case: what is none has none, and the compiler would carry it about.
    let known = F::held(node, key, progress(packet.flags, Side::Pod)).unwrap_or(HeldFlow::NONE);
    if packet.is_answer() {
        return answers::<F, N>(node, key, packet, known, residual);
    }
    // One that isn't known has no residual.
    if known.state.tag() != residual {
        return Way::Closed;
    }
    if known.is_open() {
        return Way::Through;
    }
    match F::judged(node, key, known.isns) {
        // What the pod says first waits for the verdict, too.
        None if packet.payload != 0 => Way::Gone,
        None => Way::Through,
        Some(HeldVerdict {
            action: HeldVerdict::ALLOW,
            end,
            ..
        }) => {
            if packet.flags & ACK != 0 && !is_before(packet.acknowledgment, end) {
                F::open_held(node, key, known.isns);
            }
            Way::Through
        }
        Some(_) => Way::Closed,
    }
}

/// The pod's answer to a SYN: whatever was known of an earlier connection with these ends is over.
#[inline(always)]
fn answers<F: Family, N: Held + ?Sized>(
    node: &N,
    key: &F::Flow,
    packet: &Packet<F>,
    known: HeldFlow,
    residual: u16,
) -> Way {
    if packet.payload != 0 {
        return Way::Gone;
    }
    let isns = Isns {
        client: packet.answered(),
        pod: packet.sequence,
    };
    if known.isns == isns && known.state.tag() == residual {
        // Sent again.
        return Way::Through;
    }
    let Some(opening) = F::held_opening(node, key) else {
        return Way::Closed;
    };
    if opening.residual != residual || opening.isns.client != isns.client {
        return Way::Closed;
    }
    if known.state.is_live() {
        F::let_go(node, key);
    }
    let answered = HeldOpening {
        isns,
        flags: opening.flags | HeldOpening::ANSWERED,
        ..opening
    };
    if F::begin_held(node, key, answered) {
        Way::Through
    } else {
        Way::Full
    }
}

/// Whether sequence number `a` comes before `b` (RFC 9293 3.4).
#[inline(always)]
fn is_before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b) >= 1 << 31
}

/// Where a packet goes that the agent gives back; none where it has no business.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Back {
    /// To the pod behind this interface.
    ToPod(u32),
    /// To the client, as if the pod behind this interface had sent it.
    ToClient(u32),
}

/// Decides about a packet that the agent gives back: bytes of an allowed connection to the pod, a bare reset to either
/// side, after which the connection is over, or a bare acknowledgment to the client.
#[inline(always)]
pub fn from_agent<F: Family, N: Tables + Steered + Held + ?Sized>(
    node: &N,
    packet: &Packet<F>,
) -> Option<Back> {
    let is_reset = packet.flags & RST != 0;
    if packet.flags & SYN != 0 || (is_reset && packet.payload != 0) {
        return None;
    }
    let pod = F::source(node, packet.destination);
    if pod.exact && pod.local != 0 {
        let key = packet.flow_to_pod(pod.local);
        if let Some(flow) = F::held(node, &key, progress(packet.flags, Side::Remote)) {
            let to = Back::ToPod(node.record(pod.local).ifindex);
            let may = is_reset || may_go_back::<F, N>(node, pod.local, packet, flow);
            return may.then_some(to);
        }
    }
    let pod = F::source(node, packet.source);
    // An acknowledgment lets the client go on with what it has to say.
    let says_nothing = packet.payload == 0 && packet.flags & FIN == 0;
    let is_untold = is_reset && node.control().has(Control::DENY_DROP);
    if !says_nothing || is_untold || !pod.exact || pod.local == 0 {
        return None;
    }
    let key = packet.flow_from_pod(pod.local);
    let _flow = F::held(node, &key, progress(packet.flags, Side::Pod))?;
    Some(Back::ToClient(node.record(pod.local).ifindex))
}

/// Whether the connection is allowed by the residual that the tables still name for it: user space forgets verdicts
/// only after a switch.
#[inline(always)]
fn may_go_back<F: Family, N: Tables + Steered + Held + ?Sized>(
    node: &N,
    endpoint: u16,
    packet: &Packet<F>,
    flow: HeldFlow,
) -> bool {
    let class = F::source(node, packet.source).class;
    let cell = lookup::cell(node, F::set(node.sets(endpoint)), class, packet.destination_port);
    if cell.action() != Action::Proxy || node.listener(cell.verdict()) != flow.state.tag() {
        return false;
    }
    let key = packet.flow_to_pod(endpoint);
    let allowed = |verdict: HeldVerdict| verdict.action == HeldVerdict::ALLOW;
    F::judged(node, &key, flow.isns).is_some_and(allowed)
}
