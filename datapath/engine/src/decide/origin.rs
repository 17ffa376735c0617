//! Where a packet on its way to the pod came from (`--hook=pod`): noted at the host end of the veth, since only there
//! the kernel knows it, and asked for inside the pod's network namespace, before `to_pod`.
//!
//! What gets into the pod past the host end (`bpf_redirect_peer`) was made by neither the node nor the pod itself.
//!
//! Invariant: nothing is allowed at the host end. What is dropped has another pod's address; the rest is judged inside.

use thyra_datapath_abi::{Control, Event, EventKind, FlowState, Reason};

use super::non_tcp::note_origin;
use super::to_pod::{is_own_interface, is_spoofed, note};
use super::tuple::Tuple;
use super::{Arrival, Outcome};
use crate::Family;
use crate::flows::{FlowTable, Flows};
use crate::packet::Packet;
use crate::parse::non_tcp::{NonTcp, Shape};
use crate::tables::{Tables, endpoint_at};

/// Notes where a TCP packet came from; an outcome only where it ends here.
#[inline(always)]
pub fn tcp<F: Family, N: Tables + Flows + ?Sized>(
    node: &N,
    arrival: &Arrival,
    packet: &Packet<F>,
) -> Option<Outcome> {
    let (endpoint, record) = endpoint_at(node, arrival.ifindex)?;
    if arrival.is_from_node() {
        note(node, packet, endpoint, 0);
        return None;
    }
    if is_own_interface(arrival, record, packet) {
        note(node, packet, endpoint, FlowState::SELF);
        return None;
    }
    let spoofed = spoofed::<F, N>(node, arrival, endpoint, packet);
    if spoofed.is_none() && packet.is_syn() {
        // The tuple is no longer the node's.
        F::forget(node, &packet.flow_to_pod(endpoint));
    }
    spoofed
}

/// The same of another protocol, where those are judged.
#[inline(always)]
pub fn non_tcp<F: Family, N: Tables + Flows + ?Sized>(
    node: &N,
    arrival: &Arrival,
    other: &NonTcp<F>,
) -> Option<Outcome> {
    let (endpoint, record) = endpoint_at(node, arrival.ifindex)?;
    let packet = &other.parsed.packet;
    if matches!(other.shape, Shape::Link | Shape::Cut) {
        return None;
    }
    let is_self = !arrival.is_from_node() && is_own_interface(arrival, record, packet);
    let spoofed = if is_self || arrival.is_from_node() {
        None
    } else {
        spoofed::<F, N>(node, arrival, endpoint, packet)
    };
    if spoofed.is_none() && matches!(other.shape, Shape::Ports | Shape::EchoRequest) {
        note_origin::<F, N>(node, arrival, is_self, &Tuple::to_pod(endpoint, other).flow());
    }
    spoofed
}

/// The end of a TCP packet inside the pod that needs no policy, by what is noted.
#[inline(always)]
pub fn exempt<F: Family, N: Tables + Flows + ?Sized>(
    node: &N,
    arrival: &Arrival,
    packet: &Packet<F>,
) -> Option<Outcome> {
    let (endpoint, _) = endpoint_at(node, arrival.ifindex)?;
    let flags = F::find(node, FlowTable::Host, &packet.flow_to_pod(endpoint), 0)?;
    exempt_by(node, endpoint, flags)
}

/// The same of another protocol, where those are judged.
#[inline(always)]
pub fn exempt_other<F: Family, N: Tables + Flows + ?Sized>(
    node: &N,
    arrival: &Arrival,
    other: &NonTcp<F>,
) -> Option<Outcome> {
    let (endpoint, _) = endpoint_at(node, arrival.ifindex)?;
    // An answer to the pod's ping has the name of a ping of the node's that bears the same identifier.
    if !matches!(other.shape, Shape::Ports | Shape::EchoRequest | Shape::EchoReply) {
        return None;
    }
    let flags = Tuple::to_pod(endpoint, other).of_node(node)?;
    exempt_by(node, endpoint, flags)
}

#[inline(always)]
fn exempt_by<N: Tables + ?Sized>(node: &N, endpoint: u16, flags: u32) -> Option<Outcome> {
    if !node.sets(endpoint).is_placed() {
        return None;
    }
    let pass = Outcome::pass(endpoint);
    if flags & FlowState::SELF != 0 {
        return Some(pass.because(Reason::SelfTraffic).flags(Event::SELF));
    }
    let exempt = !node.control().has(Control::ENFORCE_HOST);
    exempt.then(|| pass.because(Reason::HostTraffic).flags(Event::HOST))
}

#[inline(always)]
fn spoofed<F: Family, N: Tables + ?Sized>(
    node: &N,
    arrival: &Arrival,
    endpoint: u16,
    packet: &Packet<F>,
) -> Option<Outcome> {
    let source = F::source(node, packet.source);
    is_spoofed::<F, N>(node, arrival, packet.source, &source)
        .then(|| Outcome::drop(endpoint, Reason::InvalidSourceIp).event(EventKind::Spoof))
}
