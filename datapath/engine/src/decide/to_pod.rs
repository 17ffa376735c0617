//! A packet on its way to the pod.

use thyra_datapath_abi::{Action, Cell, Control, EndpointRecord, Event, EventKind, FlowState, Mode, Reason};

use super::l7;
use super::{Act, Arrival, Outcome, Side, is_own, revocation, track, unjudged};
use crate::Family;
use crate::flows::{FlowTable, Flows};
use crate::lookup::{self, Source};
use crate::packet::{ACK, Kind, Packet, Parsed, RST};
use crate::steered::Steered;
use crate::tables::{Tables, endpoint_at};

/// Decides about a packet on its way to the pod behind `arrival.ifindex`.
#[inline(always)]
pub fn to_pod<F: Family, N: Tables + Flows + Steered + ?Sized>(
    node: &N,
    arrival: &Arrival,
    parsed: &Parsed<F>,
) -> Outcome {
    let Some((endpoint, record)) = endpoint_at(node, arrival.ifindex) else {
        return Outcome::drop(0, Reason::EndpointUnknown).event(EventKind::Deny);
    };
    let control = node.control();
    let sets = node.sets(endpoint);
    let packet = match parsed.kind {
        Kind::Tcp => &parsed.packet,
        Kind::Other => return Outcome::pass(endpoint).because(Reason::NonTcp),
        Kind::Fragment | Kind::Invalid | Kind::Unsupported => {
            return unjudged(endpoint, sets, parsed.reason());
        }
    };
    if !sets.is_placed() {
        return Outcome::drop(endpoint, Reason::EndpointUnknown).event_if(packet.is_syn(), EventKind::Deny);
    }
    if arrival.is_from_node() {
        note(node, packet, endpoint, 0);
        if !control.has(Control::ENFORCE_HOST) {
            return Outcome::pass(endpoint)
                .because(Reason::HostTraffic)
                .flags(Event::HOST);
        }
    } else if is_own_interface(arrival, record, packet) {
        note(node, packet, endpoint, FlowState::SELF);
        return Outcome::pass(endpoint)
            .because(Reason::SelfTraffic)
            .flags(Event::SELF);
    }
    let source = F::source(node, packet.source);
    if is_spoofed::<F, N>(node, arrival, packet.source, &source) {
        return Outcome::drop(endpoint, Reason::InvalidSourceIp).event(EventKind::Spoof);
    }
    if packet.is_syn() && !arrival.is_from_node() && !arrival.at_pod {
        // The tuple is no longer the node's: what the pod answers is judged.
        F::forget(node, &packet.flow_to_pod(endpoint));
    }
    if sets.mode() == Mode::Off {
        track(node, packet, &packet.flow_to_pod(endpoint), Side::Remote);
        let report = packet.is_syn() && control.logs(packet.sequence);
        return Outcome::pass(endpoint)
            .because(Reason::NotEnforced)
            .event_if(report, EventKind::New);
    }
    let cell = lookup::cell(node, F::set(sets), source.class, packet.destination_port);
    if cell.action() == Action::Allow {
        track(node, packet, &packet.flow_to_pod(endpoint), Side::Remote);
        let report = packet.is_syn() && control.reports(packet.sequence);
        return Outcome::pass(endpoint)
            .by(cell.verdict())
            .event_if(report, EventKind::New);
    }
    refused(node, control, (endpoint, sets.mode()), packet, cell)
}

/// No `Allow` cell: a reply to the pod's own connection passes, the rest meets its verdict.
#[inline(always)]
fn refused<F: Family, N: Flows + Steered + ?Sized>(
    node: &N,
    control: Control,
    (endpoint, mode): (u16, Mode),
    packet: &Packet<F>,
    cell: Cell,
) -> Outcome {
    let syn = packet.is_syn();
    if !syn && is_own::<F, N>(node, &packet.flow_to_pod(endpoint), packet.flags, Side::Remote) {
        return Outcome::pass(endpoint).because(Reason::OwnReply);
    }
    let missing = cell.action() == Action::Missing;
    let outcome = if missing {
        Outcome::drop(endpoint, Reason::TableMissing)
    } else {
        Outcome::new(Act::Drop, endpoint).by(cell.verdict())
    };
    if mode == Mode::Audit {
        return Outcome {
            act: Act::Pass,
            ..outcome
        }
        .event_if(syn, EventKind::Audit);
    }
    if let Some(act) = l7::judge(node, endpoint, cell) {
        return Outcome { act, ..outcome };
    }
    if syn {
        let silent = missing || cell.action() == Action::Hold || control.has(Control::DENY_DROP);
        let act = if silent { Act::Drop } else { Act::Refuse };
        return Outcome { act, ..outcome }.event(EventKind::Deny);
    }
    // A reset carries nothing and is never answered (RFC 9293 3.5.2).
    if packet.flags & RST != 0 {
        return outcome;
    }
    if missing || cell.action() == Action::Hold {
        return outcome.event(EventKind::Deny);
    }
    Outcome {
        act: revocation(control, packet.flags & ACK != 0),
        ..outcome
    }
    .event(EventKind::Revoke)
}

/// Remembers a connection that the node, or the pod through its own Service, opened to the pod, so that the
/// pod's answers pass; and what the packet says of a connection that the pod opened.
#[inline(always)]
pub(super) fn note<F: Family, N: Flows + ?Sized>(node: &N, packet: &Packet<F>, endpoint: u16, flags: u32) {
    let key = packet.flow_to_pod(endpoint);
    track(node, packet, &key, Side::Remote);
    if packet.is_syn() || F::find(node, FlowTable::Host, &key, 0).is_none() {
        // The table forgets the least used entry by itself and is never full.
        let _ = F::open(node, FlowTable::Host, &key, flags);
    }
}

/// Whether the packet came out of this very pod. Behind a bridge the packet shows the bridge's index, and
/// then only the pod's own address tells (which `from_pod` lets nobody else use).
#[inline(always)]
pub(super) fn is_own_interface<F: Family>(
    arrival: &Arrival,
    record: &EndpointRecord,
    packet: &Packet<F>,
) -> bool {
    let ingress = arrival.ingress_ifindex;
    ingress == record.ifindex
        || (ingress != 0 && ingress == record.bridge_ifindex && packet.source == F::own(record))
}

/// Whether the packet's source address is another's: a local pod's that it doesn't come from, or one that nobody has.
#[inline(always)]
pub(super) fn is_spoofed<F: Family, N: Tables + ?Sized>(
    node: &N,
    arrival: &Arrival,
    address: F::Address,
    source: &Source,
) -> bool {
    if source.exact {
        // `origin` and the sender's own `from_pod` have asked.
        source.local != 0 && !arrival.at_pod && !came_from(node, arrival, source.local)
    } else {
        F::is_never_source(address)
    }
}

/// Whether the packet came in by the interface of the endpoint that owns its source address.
#[inline(always)]
fn came_from<N: Tables + ?Sized>(node: &N, arrival: &Arrival, owner: u16) -> bool {
    let ingress = arrival.ingress_ifindex;
    let record = node.record(owner);
    ingress != 0 && (ingress == record.ifindex || ingress == record.bridge_ifindex)
}
