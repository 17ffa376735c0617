//! The two programs, from the packet's bytes to its end.
//!
//! Invariant: this is all that runs per packet, in the kernel and in the tests alike; the kernel's part is to
//! load bytes, to look up maps and to carry out the `Hook`.
//!
//! The usual packet takes the short way (`decide::usual`). Each step of the others is a function of its own from
//! parsing to the end, so that none needs more than the 512 bytes of stack that a program has together with what it
//! calls; each opens the maps itself, and what decides about a packet is what it read then.

pub mod direct;
mod origin;
pub mod step;

use thyra_datapath_abi::{EndpointRecord, Reason};

pub use self::direct::{Leg, Way, Whole, from_pod_direct, to_pod_direct};
pub use self::origin::origin;
pub use self::step::{Next, Step};
use crate::account::{Counters, Direction};
use crate::decide::hold::Back;
use crate::decide::{self, Act, Arrival, Outcome, hold, l7, usual};
use crate::flows::Datagrams;
use crate::packet::{Kind, Packet, Parsed};
use crate::parse::non_tcp::NonTcp;
use crate::parse::{self, Link, Shape};
use crate::tables::endpoint_at;
use crate::{Family, Flows, Held, Load, Steered, Tables, V4, V6};

/// A packet at a hook: its bytes, what the kernel says about it, and how it ends.
pub trait Hook: Load + Copy {
    /// What the program returns.
    type End;

    /// What the kernel says about the packet.
    fn arrival(&self) -> Arrival;
    /// Whether the packet carries the mark of those that Thyra makes.
    fn is_own(&self) -> bool;
    /// On to the next program.
    fn pass(&self) -> Self::End;
    /// On to the next program, without the mark by which Thyra knows its own packets.
    fn pass_own(&self) -> Self::End;
    /// Gone.
    fn drop(&self) -> Self::End;
    /// A reset to the sender in the packet's place (`reset::refusal`).
    fn refuse<F: Family>(&self, packet: &Packet<F>, direction: Direction) -> Self::End;
    /// A reset to the sender and a bare ACK to the far end (`reset::revocation`, `reset::probe`).
    fn revoke<F: Family>(&self, packet: &Packet<F>, direction: Direction) -> Self::End;

    /// To the agent, which holds it.
    fn divert(&self) -> Self::End;
    /// What the agent gives back, marked as Thyra's own.
    fn give_back(&self, back: Back) -> Self::End;
    /// Straight into the pod with this record.
    fn redirect(&self, to: &EndpointRecord) -> Self::End;
    /// As `answer` of a packet that the pod sends and that is revoked; the bare ACK goes straight into the pod with
    /// this record.
    fn revoke_into(&self, to: &EndpointRecord) -> Self::End;
    /// Whether the stack in a network namespace has a connection with a SYN's addresses and ports already.
    fn is_taken<F: Family>(&self, packet: &Packet<F>, netns: u16) -> bool;

    /// `step::take`, by a function of its own in the kernel.
    fn step<P: Program, M: Maps>(&self, maps: M, step: Step, at: u32) -> Next {
        step::take::<P, M, Self>(maps, *self, step, at)
    }
    /// `direct::take`, by a function of its own in the kernel.
    fn leg<F: Whole, M: Maps>(&self, maps: M, leg: Leg, way: Way) -> Way {
        direct::take::<F, M, Self>(maps, *self, leg, way)
    }
    /// `answer`, by a function of its own in the kernel.
    fn answer<P: Program>(&self, act: Act) -> Self::End {
        answer::<P, Self>(*self, act)
    }
}

/// Whoever holds the maps.
pub trait Node: Tables + Flows + Datagrams + Steered + Held + Counters + Copy {}

impl<N: Tables + Flows + Datagrams + Steered + Held + Counters + Copy> Node for N {}

/// Where the maps are found, before a packet has looked.
pub trait Maps: Copy {
    /// The maps with the bank that is live now.
    type Node: Node;

    /// Reads the control word and finds the live bank; none when a map is not there, which a packet doesn't
    /// survive.
    fn open(self) -> Option<Self::Node>;
}

/// One of the two programs.
pub trait Program {
    /// Which.
    const DIRECTION: Direction;

    /// Decides about a packet.
    fn decide<F: Family, N: Node>(node: &N, arrival: &Arrival, parsed: &Parsed<F>) -> Outcome;
    /// Decides about a packet that Envoy is to be asked about (`Act::Ask`).
    fn ask<F: Family, N: Node>(node: &N, arrival: &Arrival, packet: &Packet<F>) -> Outcome;
    /// Decides about a packet of a connection that is held, or was (`Act::Hold`).
    fn hold<F: Family, N: Node>(node: &N, arrival: &Arrival, packet: &Packet<F>) -> Outcome;
    /// Decides about one that is not TCP, where those are judged; to the pod no ICMP error.
    fn decide_other<F: Family, N: Node>(node: &N, arrival: &Arrival, other: &NonTcp<F>) -> Outcome;
    /// Whether it is of the usual kind and may go on; it is counted then (`decide::usual`).
    fn is_usual<F: Family, N: Node>(node: &N, arrival: &Arrival, packet: &Packet<F>, bytes: u32) -> bool;
}

/// At the host veth's egress, or with `--hook=pod` at the ingress of the pod's own end.
#[derive(Clone, Copy, Debug)]
pub struct ToPod;

/// At the host veth's ingress.
#[derive(Clone, Copy, Debug)]
pub struct FromPod;

impl Program for ToPod {
    const DIRECTION: Direction = Direction::ToPod;

    #[inline(always)]
    fn decide<F: Family, N: Node>(node: &N, arrival: &Arrival, parsed: &Parsed<F>) -> Outcome {
        decide::to_pod(node, arrival, parsed)
    }
    #[inline(always)]
    fn ask<F: Family, N: Node>(node: &N, arrival: &Arrival, packet: &Packet<F>) -> Outcome {
        l7::to_pod(node, arrival, packet)
    }
    #[inline(always)]
    fn hold<F: Family, N: Node>(node: &N, arrival: &Arrival, packet: &Packet<F>) -> Outcome {
        hold::to_pod(node, arrival, packet)
    }
    #[inline(always)]
    fn decide_other<F: Family, N: Node>(node: &N, arrival: &Arrival, other: &NonTcp<F>) -> Outcome {
        decide::non_tcp::to_pod(node, arrival, other)
    }
    #[inline(always)]
    fn is_usual<F: Family, N: Node>(node: &N, arrival: &Arrival, packet: &Packet<F>, bytes: u32) -> bool {
        usual::to_pod(node, arrival, packet, bytes)
    }
}

impl Program for FromPod {
    const DIRECTION: Direction = Direction::FromPod;

    #[inline(always)]
    fn decide<F: Family, N: Node>(node: &N, arrival: &Arrival, parsed: &Parsed<F>) -> Outcome {
        decide::from_pod(node, arrival, parsed)
    }
    #[inline(always)]
    fn ask<F: Family, N: Node>(node: &N, arrival: &Arrival, packet: &Packet<F>) -> Outcome {
        l7::from_pod(node, arrival, packet)
    }
    #[inline(always)]
    fn hold<F: Family, N: Node>(node: &N, arrival: &Arrival, packet: &Packet<F>) -> Outcome {
        hold::from_pod(node, arrival, packet)
    }
    #[inline(always)]
    fn decide_other<F: Family, N: Node>(node: &N, arrival: &Arrival, other: &NonTcp<F>) -> Outcome {
        decide::non_tcp::from_pod(node, arrival, other)
    }
    #[inline(always)]
    fn is_usual<F: Family, N: Node>(node: &N, arrival: &Arrival, packet: &Packet<F>, bytes: u32) -> bool {
        usual::from_pod(node, arrival, packet, bytes)
    }
}

/// Runs a program on one packet.
#[inline(always)]
pub fn run<P: Program, M: Maps, H: Hook>(maps: M, hook: H) -> H::End {
    if hook.is_own() {
        passes_unread::<P, M, H>(maps, &hook, Reason::OwnPacket);
        return hook.pass_own();
    }
    let act = match parse::shape(&hook) {
        Shape::Plain4 if is_usual::<P, V4, M, H>(maps, &hook, parse::ipv4::plain(&hook)) => Act::Pass,
        Shape::Plain4 => judged::<P, M, H>(maps, hook, Shape::Plain4),
        Shape::Plain6 => match hook.step::<P, M>(maps, Step::Usual6, 0).act() {
            Some(act) => act,
            None => judged::<P, M, H>(maps, hook, Shape::Plain6),
        },
        Shape::Unusual => judged::<P, M, H>(maps, hook, Shape::Unusual),
    };
    match act {
        Act::Pass => hook.pass(),
        Act::Drop | Act::Ask | Act::Hold => hook.drop(),
        Act::Refuse | Act::Revoke | Act::Divert => hook.answer::<P>(act),
    }
}

/// Runs `maps::FROM_AGENT` on a packet that the agent gives back: it goes on as Thyra's own, or nowhere.
#[inline(always)]
pub fn from_agent<M: Maps, H: Hook>(maps: M, hook: H) -> H::End {
    let back = match parse::shape(&hook) {
        Shape::Plain4 => given_back::<V4, M>(maps, parse::ipv4::plain(&hook)),
        Shape::Plain6 => given_back::<V6, M>(maps, parse::ipv6::plain(&hook)),
        Shape::Unusual => None,
    };
    match back {
        Some(back) => hook.give_back(back),
        None => hook.drop(),
    }
}

#[inline(always)]
fn given_back<F: Family, M: Maps>(maps: M, packet: Option<Packet<F>>) -> Option<Back> {
    hold::from_agent(&maps.open()?, &packet?)
}

/// Counts a packet that passes whatever is in it.
#[inline(always)]
fn passes_unread<P: Program, M: Maps, H: Hook>(maps: M, hook: &H, reason: Reason) {
    if let Some(node) = maps.open() {
        node.reason(reason, hook.length());
        if let Some((endpoint, _)) = endpoint_at(&node, hook.arrival().ifindex) {
            node.endpoint(endpoint, P::DIRECTION, true);
        }
    }
}

#[inline(always)]
fn is_usual<P: Program, F: Family, M: Maps, H: Hook>(maps: M, hook: &H, packet: Option<Packet<F>>) -> bool {
    // One after the other: a packet that could not be read must not live on beside the look-ups.
    let Some(packet) = packet else {
        return false;
    };
    let Some(node) = maps.open() else {
        return false;
    };
    P::is_usual(&node, &hook.arrival(), &packet, hook.length())
}

/// `slow`, unless inside the pod the packet needs no policy.
#[inline(always)]
fn judged<P: Program, M: Maps, H: Hook>(maps: M, hook: H, shape: Shape) -> Act {
    if hook.arrival().at_pod
        && let Some(act) = origin::exempt(maps, hook)
    {
        return act;
    }
    slow::<P, M, H>(maps, hook, shape)
}

/// What is left of `run` for a packet that is not usual.
#[inline(always)]
fn slow<P: Program, M: Maps, H: Hook>(maps: M, hook: H, shape: Shape) -> Act {
    match shape {
        Shape::Plain4 => plain::<P, M, H>(maps, hook, [Step::Plain4, Step::Ask4, Step::Hold4]),
        Shape::Plain6 => plain::<P, M, H>(maps, hook, [Step::Plain6, Step::Ask6, Step::Hold6]),
        Shape::Unusual => unusual::<P, M, H>(maps, hook),
    }
}

/// Another step where Envoy is to be asked, or was.
#[inline(always)]
fn plain<P: Program, M: Maps, H: Hook>(maps: M, hook: H, [first, ask, hold]: [Step; 3]) -> Act {
    match last(hook.step::<P, M>(maps, first, 0)) {
        Act::Ask => last(hook.step::<P, M>(maps, ask, 0)),
        Act::Hold => last(hook.step::<P, M>(maps, hold, 0)),
        act => act,
    }
}

#[inline(always)]
fn unusual<P: Program, M: Maps, H: Hook>(maps: M, hook: H) -> Act {
    match parse::link(&hook) {
        Link::V4(l3) => {
            let steps = [Step::Unusual4, Step::Other4, Step::About4, Step::Error4];
            walk::<P, M, H>(maps, hook, l3, steps)
        }
        Link::V6(l3) => {
            let steps = [Step::Unusual6, Step::Other6, Step::About6, Step::Error6];
            walk::<P, M, H>(maps, hook, l3, steps)
        }
        Link::NotIp => {
            passes_unread::<P, M, H>(maps, &hook, Reason::NotIp);
            Act::Pass
        }
        Link::Bad(Kind::Unsupported) => last(hook.step::<P, M>(maps, Step::Unsupported, 0)),
        Link::Bad(_) => last(hook.step::<P, M>(maps, Step::Invalid, 0)),
    }
}

/// As far as the packet needs.
#[inline(always)]
fn walk<P: Program, M: Maps, H: Hook>(maps: M, hook: H, l3: u32, steps: [Step; 4]) -> Act {
    let [unusual, other, about, error] = steps;
    if let Some(act) = hook.step::<P, M>(maps, unusual, l3).act() {
        return act;
    }
    if let Some(act) = hook.step::<P, M>(maps, other, l3).act() {
        return act;
    }
    if P::DIRECTION == Direction::FromPod {
        return Act::Drop;
    }
    let about = hook.step::<P, M>(maps, about, l3);
    last(hook.step::<P, M>(maps, error, step::related(l3, about)))
}

/// Of a step that none follows.
#[inline(always)]
fn last(next: Next) -> Act {
    next.act().unwrap_or(Act::Drop)
}

/// Carries out `Act::Divert`, or answers it: `Act::Refuse` or `Act::Revoke`. Reads the packet once more, so that
/// the way of those that pass carries nothing for this one.
#[inline(always)]
pub fn answer<P: Program, H: Hook>(hook: H, act: Act) -> H::End {
    if act == Act::Divert {
        return hook.divert();
    }
    match parse::link(&hook) {
        Link::V4(l3) => answer_with::<P, V4, H>(hook, act, &parse::ipv4::unusual(&hook, l3)),
        Link::V6(l3) => answer_with::<P, V6, H>(hook, act, &parse::ipv6::unusual(&hook, l3)),
        Link::NotIp | Link::Bad(_) => hook.drop(),
    }
}

#[inline(always)]
fn answer_with<P: Program, F: Family, H: Hook>(hook: H, act: Act, parsed: &Parsed<F>) -> H::End {
    match (act, parsed.kind) {
        (Act::Refuse, Kind::Tcp) => hook.refuse(&parsed.packet, P::DIRECTION),
        (Act::Revoke, Kind::Tcp) => hook.revoke(&parsed.packet, P::DIRECTION),
        _ => hook.drop(),
    }
}
