//! A packet that the pod sends.

use thyra_datapath_abi::{
    Action, Control, EndpointRecord, EndpointSets, Event, EventKind, FlowState, Mode, Reason,
};

use super::l7;
use super::{Act, Arrival, Outcome, Side, is_own, revocation, track, unjudged};
use crate::Family;
use crate::flows::{FlowTable, Flows};
use crate::lookup;
use crate::packet::{ACK, Kind, Packet, Parsed, RST};
use crate::steered::Steered;
use crate::tables::{Tables, endpoint_at};

/// Decides about a packet that the pod behind `arrival.ifindex` sends.
#[inline(always)]
pub fn from_pod<F: Family, N: Tables + Flows + Steered + ?Sized>(
    node: &N,
    arrival: &Arrival,
    parsed: &Parsed<F>,
) -> Outcome {
    let outcome = match endpoint_at(node, arrival.ifindex) {
        None => Outcome::drop(0, Reason::EndpointUnknown).event(EventKind::Deny),
        Some((endpoint, record)) => known(node, endpoint, record, parsed),
    };
    outcome.flags(Event::FROM_POD)
}

/// Whether the pod sends from its own address, or from another one that it may send this from; none where it may not.
#[inline(always)]
pub(super) fn speaks_as<F: Family>(record: &EndpointRecord, parsed: &Parsed<F>) -> Option<bool> {
    let source = parsed.packet.source;
    // An endpoint without an address of this family has the zero address, which `may_send` alone admits.
    let own = F::own(record);
    let is_own_address = source == own && own != F::Address::default();
    if !is_own_address && !F::may_send(source, parsed.protocol, parsed.ports()) {
        return None;
    }
    Some(is_own_address)
}

#[inline(always)]
fn known<F: Family, N: Tables + Flows + Steered + ?Sized>(
    node: &N,
    endpoint: u16,
    record: &EndpointRecord,
    parsed: &Parsed<F>,
) -> Outcome {
    if matches!(parsed.kind, Kind::Invalid | Kind::Unsupported) {
        return Outcome::drop(endpoint, parsed.reason()).event(EventKind::Malformed);
    }
    if speaks_as(record, parsed).is_none() {
        return Outcome::drop(endpoint, Reason::InvalidSourceIp).event(EventKind::Spoof);
    }
    let control = node.control();
    let sets = node.sets(endpoint);
    let packet = match parsed.kind {
        Kind::Tcp => &parsed.packet,
        Kind::Fragment => return unjudged(endpoint, sets, Reason::Fragment),
        _ => return Outcome::pass(endpoint).because(Reason::NonTcp),
    };
    if packet.is_syn() {
        if record.flags & EndpointRecord::HELD_BACK != 0 {
            // Without an answer: the pod's own retransmission comes when it may.
            return Outcome::drop(endpoint, Reason::IdentityPending).event(EventKind::Deny);
        }
        return opened(node, control, endpoint, packet);
    }
    if !sets.is_placed() {
        return Outcome::drop(endpoint, Reason::EndpointUnknown);
    }
    let key = packet.flow_from_pod(endpoint);
    if packet.destination == F::own(record) {
        track(node, packet, &key, Side::Pod);
        return Outcome::pass(endpoint)
            .because(Reason::SelfTraffic)
            .flags(Event::SELF);
    }
    if sets.mode() == Mode::Off {
        track(node, packet, &key, Side::Pod);
        return Outcome::pass(endpoint).because(Reason::NotEnforced);
    }
    answered(node, control, (endpoint, sets), packet)
}

/// The pod opens a connection: remembered for every endpoint, whatever its mode.
#[inline(always)]
fn opened<F: Family, N: Flows + ?Sized>(
    node: &N,
    control: Control,
    endpoint: u16,
    packet: &Packet<F>,
) -> Outcome {
    if F::open(node, FlowTable::Outbound, &packet.flow_from_pod(endpoint), 0) {
        let outcome = Outcome::pass(endpoint).because(Reason::OwnConnection);
        return outcome.event_if(control.reports(packet.sequence), EventKind::Outbound);
    }
    let act = if control.has(Control::DENY_DROP) {
        Act::Drop
    } else {
        Act::Refuse
    };
    Outcome::new(act, endpoint)
        .because(Reason::OutboundFull)
        .event(EventKind::Deny)
}

/// The pod goes on with a connection: judged as the answer on an inbound one, unless the pod opened it.
#[inline(always)]
fn answered<F: Family, N: Tables + Flows + Steered + ?Sized>(
    node: &N,
    control: Control,
    (endpoint, sets): (u16, EndpointSets),
    packet: &Packet<F>,
) -> Outcome {
    let key = packet.flow_from_pod(endpoint);
    let peer = F::source(node, packet.destination);
    let cell = lookup::cell(node, F::set(sets), peer.class, packet.source_port);
    if cell.action() == Action::Allow {
        track(node, packet, &key, Side::Pod);
        // Counted as a packet of the endpoint; the verdict's counters are those of the packets it let in.
        return Outcome::pass(endpoint);
    }
    if is_own::<F, N>(node, &key, packet.flags, Side::Pod) {
        return Outcome::pass(endpoint).because(Reason::OwnConnection);
    }
    if let Some(flags) = F::find(node, FlowTable::Host, &key, 0) {
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
    if sets.mode() == Mode::Audit {
        return Outcome::pass(endpoint).by(cell.verdict());
    }
    let judge = l7::judge(node, endpoint, cell);
    // A bare reset tells the other side that the connection is over, and nothing else; of one that is held that is
    // noted.
    if judge != Some(Act::Hold) && packet.flags & RST != 0 && packet.payload == 0 {
        return Outcome::pass(endpoint);
    }
    if let Some(act) = judge {
        return Outcome::new(act, endpoint).by(cell.verdict());
    }
    match cell.action() {
        Action::Missing => Outcome::drop(endpoint, Reason::TableMissing).event(EventKind::Deny),
        Action::Hold => Outcome::new(Act::Drop, endpoint)
            .by(cell.verdict())
            .event(EventKind::Deny),
        _ if packet.flags & RST != 0 => Outcome::new(Act::Drop, endpoint).by(cell.verdict()),
        _ => Outcome::new(revocation(control, packet.flags & ACK != 0), endpoint)
            .by(cell.verdict())
            .event(EventKind::Revoke),
    }
}
