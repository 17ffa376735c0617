//! The short way of the usual packet, on a connection which policy allows or which the pod opened: any but a SYN, and
//! but an answer to one that the flow log takes.
//!
//! Invariant: what passes here passes `to_pod` and `from_pod` too, and is counted as they would count it; a packet
//! that is not that usual is left to them, with nothing written. (A test runs every packet both ways.)

use thyra_datapath_abi::{Action, EndpointRecord, EndpointSets, Mode, Reason};

use super::to_pod::{is_own_interface, is_spoofed};
use super::{Arrival, Side, is_own};
use crate::account::{Counters, Direction};
use crate::flows::Flows;
use crate::packet::Packet;
use crate::tables::{Tables, endpoint_at};
use crate::{Family, lookup};

/// Whether the packet may go on to the pod without another look; it is counted then.
#[inline(always)]
pub fn to_pod<F: Family, N: Tables + Flows + Counters + ?Sized>(
    node: &N,
    arrival: &Arrival,
    packet: &Packet<F>,
    bytes: u32,
) -> bool {
    // What the node itself made has no interface that it came in by.
    if is_opening(node, packet) || (arrival.ingress_ifindex == 0 && !arrival.at_pod) {
        return false;
    }
    let Some((endpoint, record, sets)) = judged(node, arrival) else {
        return false;
    };
    if is_own_interface(arrival, record, packet) {
        return false;
    }
    let source = F::source(node, packet.source);
    if is_spoofed::<F, N>(node, arrival, packet.source, &source) {
        return false;
    }
    let cell = lookup::cell(node, F::set(sets), source.class, packet.destination_port);
    let allowed = cell.action() == Action::Allow;
    let own = (!allowed || packet.changes_state())
        && is_own::<F, N>(node, &packet.flow_to_pod(endpoint), packet.flags, Side::Remote);
    if !allowed && !own {
        return false;
    }
    node.endpoint(endpoint, Direction::ToPod, true);
    if allowed {
        node.verdict(cell.verdict(), bytes, false);
    } else {
        node.reason(Reason::OwnReply, bytes);
    }
    true
}

/// Whether the packet that the pod sends may go on without another look; it is counted then.
#[inline(always)]
pub fn from_pod<F: Family, N: Tables + Flows + Counters + ?Sized>(
    node: &N,
    arrival: &Arrival,
    packet: &Packet<F>,
    bytes: u32,
) -> bool {
    from_pod_if(node, arrival, packet, bytes, |_, _| true)
}

/// The same where `also` holds; it is asked once all else does, of the packet's endpoint and of the local one that the
/// packet is for (0 for none).
#[inline(always)]
pub fn from_pod_if<F: Family, N: Tables + Flows + Counters + ?Sized>(
    node: &N,
    arrival: &Arrival,
    packet: &Packet<F>,
    bytes: u32,
    also: impl FnOnce(u16, u16) -> bool,
) -> bool {
    if is_opening(node, packet) {
        return false;
    }
    let Some((endpoint, record, sets)) = judged(node, arrival) else {
        return false;
    };
    let own = F::own(record);
    if packet.source != own || own == F::Address::default() || packet.destination == own {
        return false;
    }
    let peer = F::source(node, packet.destination);
    let cell = lookup::cell(node, F::set(sets), peer.class, packet.source_port);
    let allowed = cell.action() == Action::Allow;
    let own = (!allowed || packet.changes_state())
        && is_own::<F, N>(node, &packet.flow_from_pod(endpoint), packet.flags, Side::Pod);
    if (!allowed && !own) || !also(endpoint, peer.local) {
        return false;
    }
    node.endpoint(endpoint, Direction::FromPod, true);
    if !allowed {
        node.reason(Reason::OwnConnection, bytes);
    }
    true
}

/// Whether the packet opens a connection, or answers to one of the flow log's. One test of a bit where it has no SYN.
#[inline(always)]
fn is_opening<F: Family, N: Tables + ?Sized>(node: &N, packet: &Packet<F>) -> bool {
    packet.has_syn() && (!packet.is_answer() || node.control().logs(packet.answered()))
}

/// The endpoint at the packet's interface, if its packets are judged at all.
#[inline(always)]
fn judged<'a, N: Tables + ?Sized>(
    node: &'a N,
    arrival: &Arrival,
) -> Option<(u16, &'a EndpointRecord, EndpointSets)> {
    let (endpoint, record) = endpoint_at(node, arrival.ifindex)?;
    let sets = node.sets(endpoint);
    (sets.is_placed() && sets.mode() != Mode::Off).then_some((endpoint, record, sets))
}
