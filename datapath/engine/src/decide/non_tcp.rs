//! Packets of other protocols than TCP, where they are judged (`--non-tcp=enforce`).
//!
//! ```text
//! to_pod    endpoint → link control → made by the node → own interface → spoofed → cell → the pod's own
//! from_pod  endpoint → source → link control → self → who began → reverse cell → node's
//! ```
//!
//! There is no SYN: who sent first within two minutes began (`abi::datagram`). What the other side began is judged
//! both ways, what the pod began is answered whatever policy says. A ping is a datagram to port 0, which no rule
//! names: rules without ports decide. Refusals are silent.
//!
//! Invariant: nothing but an `Allow` cell, an exemption by origin, what a link needs, or an answer to what the pod
//! itself began lets a packet of an enforced endpoint in.

use thyra_datapath_abi::datagram::{ECHO, INBOUND, NEEDED};
use thyra_datapath_abi::{
    Action, Cell, Control, EndpointRecord, EndpointSets, Event, EventKind, FlowState, Mode, Reason,
};

use super::from_pod::speaks_as;
use super::to_pod::{is_own_interface, is_spoofed};
use super::tuple::{NO_PORT, Tuple};
use super::{Act, Arrival, Outcome, unjudged};
use crate::datagram_table::Touch;
use crate::flows::{Datagrams, FlowTable, Flows};
use crate::packet::TCP;
use crate::parse::non_tcp::{About, NonTcp, Shape, kind_of};
use crate::tables::{Tables, endpoint_at};
use crate::{Family, lookup};

/// Decides about a packet on its way to the pod behind `arrival.ifindex`; not about an ICMP error.
#[inline(always)]
pub fn to_pod<F: Family, N: Tables + Flows + Datagrams + ?Sized>(
    node: &N,
    arrival: &Arrival,
    other: &NonTcp<F>,
) -> Outcome {
    let (here, class) = match admitted(node, arrival, other) {
        Ok(judged) => judged,
        Err(outcome) => return outcome,
    };
    let tuple = Tuple::to_pod(here.endpoint, other);
    if here.sets.mode() == Mode::Off {
        tuple.received(node);
        return Outcome::pass(here.endpoint).because(Reason::NotEnforced);
    }
    match other.shape {
        Shape::Ports | Shape::EchoRequest | Shape::EchoReply => arrived(node, &here, class, &tuple),
        Shape::Later if tuple.is_piece_of_passed(node) => {
            Outcome::pass(here.endpoint).because(Reason::OwnReply)
        }
        Shape::Later => unjudged(here.endpoint, here.sets, Reason::Fragment),
        _ => refused(here.sets, Outcome::drop(here.endpoint, Reason::UnknownL4)),
    }
}

/// Decides about an ICMP error on its way to the pod: it passes if its sender may know of what it is about.
#[inline(always)]
pub fn error_to_pod<F: Family, N: Tables + Flows + Datagrams + ?Sized>(
    node: &N,
    arrival: &Arrival,
    error: &NonTcp<F>,
    is_related: bool,
) -> Outcome {
    let here = match admitted(node, arrival, error) {
        Ok((here, _)) => here,
        Err(outcome) => return outcome,
    };
    if here.sets.mode() == Mode::Off {
        Outcome::pass(here.endpoint).because(Reason::NotEnforced)
    } else if is_related {
        Outcome::pass(here.endpoint).because(Reason::OwnReply)
    } else {
        refused(here.sets, Outcome::drop(here.endpoint, Reason::IcmpUnrelated))
    }
}

/// Where a packet is.
#[derive(Clone, Copy)]
struct Here<'a> {
    endpoint: u16,
    record: &'a EndpointRecord,
    sets: EndpointSets,
}

/// What needs no policy ends here; of the rest the class of its source, which is what it says.
#[inline(always)]
fn admitted<'a, F: Family, N: Tables + Flows + ?Sized>(
    node: &'a N,
    arrival: &Arrival,
    other: &NonTcp<F>,
) -> Result<(Here<'a>, u16), Outcome> {
    let Some((endpoint, record)) = endpoint_at(node, arrival.ifindex) else {
        return Err(Outcome::drop(0, Reason::EndpointUnknown).event(EventKind::Deny));
    };
    let sets = node.sets(endpoint);
    match other.shape {
        Shape::Link => return Err(Outcome::pass(endpoint).because(Reason::LinkControl)),
        Shape::Cut => return Err(unjudged(endpoint, sets, Reason::InvalidPacket)),
        _ if sets.is_placed() => {}
        _ => return Err(Outcome::drop(endpoint, Reason::EndpointUnknown).event(EventKind::Deny)),
    }
    let packet = &other.parsed.packet;
    let is_self = !arrival.is_from_node() && is_own_interface(arrival, record, packet);
    if !arrival.at_pod && matches!(other.shape, Shape::Ports | Shape::EchoRequest) {
        note_origin::<F, N>(node, arrival, is_self, &Tuple::to_pod(endpoint, other).flow());
    }
    if arrival.is_from_node() && !node.control().has(Control::ENFORCE_HOST) {
        return Err(Outcome::pass(endpoint)
            .because(Reason::HostTraffic)
            .flags(Event::HOST));
    }
    if is_self {
        return Err(Outcome::pass(endpoint)
            .because(Reason::SelfTraffic)
            .flags(Event::SELF));
    }
    let source = F::source(node, packet.source);
    if is_spoofed::<F, N>(node, arrival, packet.source, &source) {
        return Err(Outcome::drop(endpoint, Reason::InvalidSourceIp).event(EventKind::Spoof));
    }
    Ok((
        Here {
            endpoint,
            record,
            sets,
        },
        source.class,
    ))
}

/// The pod's answers to the node, or to itself through its own Service, pass; those to anything that was forwarded on
/// the same tuple are judged.
#[inline(always)]
pub(super) fn note_origin<F: Family, N: Flows + ?Sized>(
    node: &N,
    arrival: &Arrival,
    is_self: bool,
    flow: &F::Flow,
) {
    if arrival.is_from_node() || is_self {
        let flags = if is_self { FlowState::SELF } else { 0 };
        // Written each time, which keeps it: nothing else tells that it goes on.
        let _ = F::open(node, FlowTable::Host, flow, flags);
    } else {
        F::forget(node, flow);
    }
}

/// The end of a datagram or a ping to the pod, or of an answer.
#[inline(always)]
fn arrived<F: Family, N: Tables + Flows + Datagrams + ?Sized>(
    node: &N,
    here: &Here<'_>,
    class: u16,
    tuple: &Tuple<'_, F>,
) -> Outcome {
    let (endpoint, sets) = (here.endpoint, here.sets);
    let cell = lookup::cell(node, F::set(sets), class, tuple.judged());
    let allowed = cell.action() == Action::Allow;
    let began = if tuple.other.shape == Shape::EchoRequest {
        None
    } else {
        let touch = if allowed { Touch::Received } else { Touch::Nothing };
        tuple.began(node, touch)
    };
    let is_answer = began.is_some_and(|flags| flags & INBOUND == 0);
    let outcome = if allowed {
        Outcome::pass(endpoint).by(cell.verdict())
    } else if is_answer {
        Outcome::pass(endpoint).because(Reason::OwnReply)
    } else {
        refused(sets, by_cell(endpoint, cell))
    };
    if outcome.act != Act::Pass {
        return outcome;
    }
    tuple.note_piece(node);
    let fresh = began.is_none() && tuple.note_inbound(node);
    outcome.event_if(
        allowed && fresh && node.control().has(Control::REPORT_NEW),
        EventKind::New,
    )
}

/// Decides about a packet that the pod behind `arrival.ifindex` sends.
#[inline(always)]
pub fn from_pod<F: Family, N: Tables + Flows + Datagrams + ?Sized>(
    node: &N,
    arrival: &Arrival,
    other: &NonTcp<F>,
) -> Outcome {
    let outcome = match endpoint_at(node, arrival.ifindex) {
        None => Outcome::drop(0, Reason::EndpointUnknown).event(EventKind::Deny),
        Some((endpoint, record)) => sent(node, endpoint, record, other),
    };
    outcome.flags(Event::FROM_POD)
}

#[inline(always)]
fn sent<F: Family, N: Tables + Flows + Datagrams + ?Sized>(
    node: &N,
    endpoint: u16,
    record: &EndpointRecord,
    other: &NonTcp<F>,
) -> Outcome {
    let packet = &other.parsed.packet;
    let Some(is_own_address) = speaks_as(record, &other.parsed) else {
        return Outcome::drop(endpoint, Reason::InvalidSourceIp).event(EventKind::Spoof);
    };
    let sets = node.sets(endpoint);
    match other.shape {
        // Whatever `may_send` lets out beside it opens nothing: no answer comes to such an address.
        _ if !is_own_address => return Outcome::pass(endpoint).because(Reason::LinkControl),
        Shape::Link => return Outcome::pass(endpoint).because(Reason::LinkControl),
        Shape::Cut => return Outcome::drop(endpoint, Reason::InvalidPacket).event(EventKind::Malformed),
        // Nothing that comes back is let in by them.
        Shape::Error | Shape::Unknown => return Outcome::pass(endpoint).because(Reason::OwnConnection),
        _ if packet.destination == F::own(record) => {
            return Outcome::pass(endpoint)
                .because(Reason::SelfTraffic)
                .flags(Event::SELF);
        }
        _ => {}
    }
    let tuple = Tuple::from_pod(endpoint, other);
    if other.shape == Shape::Later {
        return if sets.mode() == Mode::Off && sets.is_placed() {
            Outcome::pass(endpoint).because(Reason::NotEnforced)
        } else if tuple.is_piece_of_passed(node) {
            Outcome::pass(endpoint).because(Reason::OwnConnection)
        } else {
            unjudged(endpoint, sets, Reason::Fragment)
        };
    }
    let here = Here {
        endpoint,
        record,
        sets,
    };
    let outcome = answered(node, &here, &tuple);
    if outcome.act == Act::Pass {
        tuple.note_piece(node);
    }
    outcome
}

/// A datagram or a ping of the pod, or its answer.
#[inline(always)]
fn answered<F: Family, N: Tables + Flows + Datagrams + ?Sized>(
    node: &N,
    here: &Here<'_>,
    tuple: &Tuple<'_, F>,
) -> Outcome {
    let Here {
        endpoint,
        record,
        sets,
    } = *here;
    let control = node.control();
    let cell = if sets.is_placed() && sets.mode() != Mode::Off {
        let peer = F::source(node, tuple.remote());
        lookup::cell(node, F::set(sets), peer.class, tuple.judged())
    } else {
        Cell::default()
    };
    let allowed = cell.action() == Action::Allow;
    let began = if tuple.other.shape == Shape::EchoReply {
        Some(INBOUND)
    } else {
        tuple.began(node, Touch::Sent { needed: !allowed })
    };
    match began {
        Some(flags) if flags & INBOUND == 0 => {
            return Outcome::pass(endpoint).because(Reason::OwnConnection);
        }
        _ if sets.is_placed() && sets.mode() == Mode::Off && began.is_some() => {
            return Outcome::pass(endpoint).because(Reason::NotEnforced);
        }
        // Counted as a packet of the endpoint; the verdict's counters are those of the packets it let in.
        Some(_) if allowed => return Outcome::pass(endpoint),
        _ => {}
    }
    if let Some(flags) = tuple.of_node(node) {
        if flags & FlowState::SELF != 0 {
            return Outcome::pass(endpoint)
                .because(Reason::SelfTraffic)
                .flags(Event::SELF);
        }
        if !control.has(Control::ENFORCE_HOST) {
            return Outcome::pass(endpoint)
                .because(Reason::HostTraffic)
                .flags(Event::HOST);
        }
    }
    if began.is_some() && !sets.is_placed() {
        return Outcome::drop(endpoint, Reason::EndpointUnknown);
    }
    if began.is_some() {
        return revoked(sets, by_cell(endpoint, cell));
    }
    if record.flags & EndpointRecord::HELD_BACK != 0 {
        return Outcome::drop(endpoint, Reason::IdentityPending).event(EventKind::Deny);
    }
    tuple.note_own(node, if allowed { 0 } else { NEEDED });
    let outcome = Outcome::pass(endpoint).because(Reason::OwnConnection);
    outcome.event_if(control.has(Control::REPORT_NEW), EventKind::Outbound)
}

/// Why a packet is dropped that its cell doesn't allow.
#[inline(always)]
fn by_cell(endpoint: u16, cell: Cell) -> Outcome {
    if cell.action() == Action::Missing {
        Outcome::drop(endpoint, Reason::TableMissing)
    } else {
        Outcome::new(Act::Drop, endpoint).by(cell.verdict())
    }
}

/// Dropped with an event, or audited.
#[inline(always)]
fn refused(sets: EndpointSets, outcome: Outcome) -> Outcome {
    if sets.mode() == Mode::Audit {
        return Outcome {
            act: Act::Pass,
            ..outcome
        }
        .event(EventKind::Audit);
    }
    outcome.event(EventKind::Deny)
}

/// The pod's answer to whom policy refuses now.
#[inline(always)]
fn revoked(sets: EndpointSets, outcome: Outcome) -> Outcome {
    if sets.mode() == Mode::Audit {
        return Outcome {
            act: Act::Pass,
            ..outcome
        };
    }
    outcome.event(EventKind::Revoke)
}

/// Whether an ICMP error to the pod at this interface is about what the pod began, or about an answer to whom policy
/// lets in.
#[inline(always)]
pub fn is_related<F: Family, N: Tables + Flows + Datagrams + ?Sized>(
    node: &N,
    ifindex: u32,
    about: &About<F>,
) -> bool {
    let Some((endpoint, record)) = endpoint_at(node, ifindex) else {
        return false;
    };
    let sets = node.sets(endpoint);
    if about.protocol == 0 || about.source != F::own(record) {
        return false;
    }
    let kind = kind_of(about.protocol);
    let is_icmp = kind == 0 && about.protocol != TCP;
    let port = if is_icmp { NO_PORT } else { about.source_port };
    let peer = F::source(node, about.destination);
    if lookup::cell(node, F::set(sets), peer.class, port).action() == Action::Allow {
        return true;
    }
    let flow = F::flow(
        endpoint,
        about.source,
        about.destination,
        about.source_port,
        about.destination_port,
    );
    let own = if about.protocol == TCP {
        F::find(node, FlowTable::Outbound, &flow, 0).is_some()
    } else if is_icmp && !about.is_ping {
        false
    } else {
        let key = F::datagram(about.destination, about.source_port, about.destination_port);
        let kind = if is_icmp { ECHO } else { kind };
        F::recall(node, endpoint, key, kind, Touch::Nothing).is_some_and(|flags| flags & INBOUND == 0)
    };
    if own {
        return true;
    }
    let protocol = if about.protocol == TCP { 0 } else { about.protocol };
    let of_node = F::find(node, FlowTable::Host, &F::with_protocol(flow, protocol), 0);
    of_node.is_some_and(|flags| flags & FlowState::SELF != 0 || !node.control().has(Control::ENFORCE_HOST))
}
