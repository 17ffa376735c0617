//! The two programs, from the packet's bytes to its end.
//!
//! Invariant: this is all that runs per packet, in the kernel and in the tests alike; the kernel's part is to
//! load bytes, to look up maps and to carry out the `Hook`.
//!
//! The usual packet takes the short way (`decide::usual`). Each of the others is a function of its own from parsing
//! to the end, so that none needs more than the 512 bytes of stack that a program has together with what it
//! calls; each opens the maps itself, and what decides about a packet is what it read then.

use thyra_datapath_abi::{Control, Reason};

use crate::account::{Counters, Direction, account, feasible};
use crate::decide::{self, Act, Arrival, Outcome, l7, usual};
use crate::flows::Datagrams;
use crate::packet::{Kind, Packet, Parsed};
use crate::parse::non_tcp::{self, About, NonTcp};
use crate::parse::{self, Link, Shape};
use crate::tables::endpoint_at;
use crate::{Family, Flows, Load, Steered, Tables, V4, V6};

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
}

/// Whoever holds the maps.
pub trait Node: Tables + Flows + Datagrams + Steered + Counters + Copy {}

impl<N: Tables + Flows + Datagrams + Steered + Counters + Copy> Node for N {}

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
    /// Decides about one that is not TCP, where those are judged; to the pod no ICMP error.
    fn decide_other<F: Family, N: Node>(node: &N, arrival: &Arrival, other: &NonTcp<F>) -> Outcome;
    /// Whether it is of the usual kind and may go on; it is counted then (`decide::usual`).
    fn is_usual<F: Family, N: Node>(node: &N, arrival: &Arrival, packet: &Packet<F>, bytes: u32) -> bool;
}

/// At the host veth's egress.
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
        Shape::Plain6 if is_usual6::<P, M, H>(maps, hook) => Act::Pass,
        Shape::Plain4 => match plain4::<P, M, H>(maps, hook) {
            Act::Ask => ask4::<P, M, H>(maps, hook),
            act => act,
        },
        Shape::Plain6 => match plain6::<P, M, H>(maps, hook) {
            Act::Ask => ask6::<P, M, H>(maps, hook),
            act => act,
        },
        Shape::Unusual => unusual::<P, M, H>(maps, hook),
    };
    match act {
        Act::Pass => hook.pass(),
        Act::Drop | Act::Ask => hook.drop(),
        Act::Refuse | Act::Revoke => answer::<P, H>(hook, act),
    }
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

/// A function of its own, so that the two families share the program's 512 bytes of stack.
#[inline(never)]
fn is_usual6<P: Program, M: Maps, H: Hook>(maps: M, hook: H) -> bool {
    is_usual::<P, V6, M, H>(maps, &hook, parse::ipv6::plain(&hook))
}

#[inline(never)]
fn plain4<P: Program, M: Maps, H: Hook>(maps: M, hook: H) -> Act {
    match parse::ipv4::plain(&hook) {
        Some(packet) => judge::<P, V4, M, H>(maps, hook, &Parsed::tcp(packet), true),
        None => bad::<P, M, H>(maps, hook, Kind::Invalid),
    }
}

#[inline(never)]
fn plain6<P: Program, M: Maps, H: Hook>(maps: M, hook: H) -> Act {
    match parse::ipv6::plain(&hook) {
        Some(packet) => judge::<P, V6, M, H>(maps, hook, &Parsed::tcp(packet), true),
        None => bad::<P, M, H>(maps, hook, Kind::Invalid),
    }
}

#[inline(always)]
fn unusual<P: Program, M: Maps, H: Hook>(maps: M, hook: H) -> Act {
    match parse::link(&hook) {
        Link::V4(l3) => match unusual4::<P, M, H>(maps, hook, l3) {
            Some(act) => act,
            None => match other4::<P, M, H>(maps, hook, l3) {
                Some(act) => act,
                None => error4::<M, H>(maps, hook, l3, is_related4(maps, hook, l3)),
            },
        },
        Link::V6(l3) => match unusual6::<P, M, H>(maps, hook, l3) {
            Some(act) => act,
            None => match other6::<P, M, H>(maps, hook, l3) {
                Some(act) => act,
                None => error6::<M, H>(maps, hook, l3, is_related6(maps, hook, l3)),
            },
        },
        Link::NotIp => {
            passes_unread::<P, M, H>(maps, &hook, Reason::NotIp);
            Act::Pass
        }
        Link::Bad(kind) => bad::<P, M, H>(maps, hook, kind),
    }
}

#[inline(never)]
fn unusual4<P: Program, M: Maps, H: Hook>(maps: M, hook: H, l3: u32) -> Option<Act> {
    judge_tcp::<P, V4, M, H>(maps, hook, &parse::ipv4::unusual(&hook, l3))
}

#[inline(never)]
fn unusual6<P: Program, M: Maps, H: Hook>(maps: M, hook: H, l3: u32) -> Option<Act> {
    judge_tcp::<P, V6, M, H>(maps, hook, &parse::ipv6::unusual(&hook, l3))
}

/// Reads the packet once more, for what only other protocols than TCP have. None for an ICMP error to the pod.
#[inline(never)]
fn other4<P: Program, M: Maps, H: Hook>(maps: M, hook: H, l3: u32) -> Option<Act> {
    judge_other::<P, V4, M, H>(maps, hook, &non_tcp::v4(&hook, l3))
}

#[inline(never)]
fn other6<P: Program, M: Maps, H: Hook>(maps: M, hook: H, l3: u32) -> Option<Act> {
    judge_other::<P, V6, M, H>(maps, hook, &non_tcp::v6(&hook, l3))
}

/// An ICMP error to the pod; two functions, since what it is about takes room, too.
#[inline(never)]
fn error4<M: Maps, H: Hook>(maps: M, hook: H, l3: u32, is_related: bool) -> Act {
    judge_error::<V4, M, H>(maps, hook, &non_tcp::v4(&hook, l3), is_related)
}

#[inline(never)]
fn error6<M: Maps, H: Hook>(maps: M, hook: H, l3: u32, is_related: bool) -> Act {
    judge_error::<V6, M, H>(maps, hook, &non_tcp::v6(&hook, l3), is_related)
}

#[inline(never)]
fn is_related4<M: Maps, H: Hook>(maps: M, hook: H, l3: u32) -> bool {
    is_related::<V4, M, H>(maps, hook, &non_tcp::about4(&hook, l3))
}

#[inline(never)]
fn is_related6<M: Maps, H: Hook>(maps: M, hook: H, l3: u32) -> bool {
    is_related::<V6, M, H>(maps, hook, &non_tcp::about6(&hook, l3))
}

/// Which family it would have been makes no difference.
#[inline(never)]
fn bad<P: Program, M: Maps, H: Hook>(maps: M, hook: H, kind: Kind) -> Act {
    judge::<P, V4, M, H>(maps, hook, &Parsed::empty(kind), false)
}

/// A packet that Envoy is to be asked about is not counted yet, if it `may_ask`; else it is dropped.
#[inline(always)]
fn judge<P: Program, F: Family, M: Maps, H: Hook>(
    maps: M,
    hook: H,
    parsed: &Parsed<F>,
    may_ask: bool,
) -> Act {
    let Some(node) = maps.open() else {
        return Act::Drop;
    };
    judge_on::<P, F, M::Node, H>(node, hook, parsed, may_ask)
}

/// None where the packet is not TCP and is to be judged all the same.
#[inline(always)]
fn judge_tcp<P: Program, F: Family, M: Maps, H: Hook>(maps: M, hook: H, parsed: &Parsed<F>) -> Option<Act> {
    let Some(node) = maps.open() else {
        return Some(Act::Drop);
    };
    if parsed.kind == Kind::Other && node.control().has(Control::ENFORCE_NON_TCP) {
        return None;
    }
    Some(judge_on::<P, F, M::Node, H>(node, hook, parsed, false))
}

#[inline(always)]
fn judge_other<P: Program, F: Family, M: Maps, H: Hook>(maps: M, hook: H, other: &NonTcp<F>) -> Option<Act> {
    if other.shape == non_tcp::Shape::Error && P::DIRECTION == Direction::ToPod {
        return None;
    }
    let Some(node) = maps.open() else {
        return Some(Act::Drop);
    };
    let outcome = P::decide_other(&node, &hook.arrival(), other);
    Some(account_other(&node, hook, &outcome, &other.parsed))
}

#[inline(always)]
fn judge_error<F: Family, M: Maps, H: Hook>(maps: M, hook: H, error: &NonTcp<F>, is_related: bool) -> Act {
    let Some(node) = maps.open() else {
        return Act::Drop;
    };
    let outcome = decide::non_tcp::error_to_pod(&node, &hook.arrival(), error, is_related);
    account_other(&node, hook, &outcome, &error.parsed)
}

#[inline(always)]
fn is_related<F: Family, M: Maps, H: Hook>(maps: M, hook: H, about: &About<F>) -> bool {
    maps.open()
        .is_some_and(|node| decide::non_tcp::is_related(&node, hook.arrival().ifindex, about))
}

#[inline(always)]
fn account_other<F: Family, N: Node, H: Hook>(
    node: &N,
    hook: H,
    outcome: &Outcome,
    parsed: &Parsed<F>,
) -> Act {
    let generation = node.control().generation();
    account(
        node,
        outcome,
        outcome.act,
        parsed,
        (&hook.arrival(), hook.length(), generation),
    );
    outcome.act
}

#[inline(always)]
fn judge_on<P: Program, F: Family, N: Node, H: Hook>(
    node: N,
    hook: H,
    parsed: &Parsed<F>,
    may_ask: bool,
) -> Act {
    let arrival = hook.arrival();
    let outcome = P::decide(&node, &arrival, parsed);
    if may_ask && outcome.act == Act::Ask {
        return Act::Ask;
    }
    end(&node, &hook, &outcome, parsed)
}

#[inline(never)]
fn ask4<P: Program, M: Maps, H: Hook>(maps: M, hook: H) -> Act {
    ask::<P, V4, M, H>(maps, hook, parse::ipv4::plain(&hook))
}

#[inline(never)]
fn ask6<P: Program, M: Maps, H: Hook>(maps: M, hook: H) -> Act {
    ask::<P, V6, M, H>(maps, hook, parse::ipv6::plain(&hook))
}

#[inline(always)]
fn ask<P: Program, F: Family, M: Maps, H: Hook>(maps: M, hook: H, packet: Option<Packet<F>>) -> Act {
    let Some(packet) = packet else {
        return Act::Drop;
    };
    let Some(node) = maps.open() else {
        return Act::Drop;
    };
    let outcome = P::ask(&node, &hook.arrival(), &packet);
    end(&node, &hook, &outcome, &Parsed::tcp(packet))
}

/// Counts and reports the packet; what is done with it.
#[inline(always)]
fn end<F: Family, N: Node, H: Hook>(node: &N, hook: &H, outcome: &Outcome, parsed: &Parsed<F>) -> Act {
    let act = feasible(outcome, parsed);
    account(
        node,
        outcome,
        act,
        parsed,
        (&hook.arrival(), hook.length(), node.control().generation()),
    );
    act
}

/// Reads the packet once more, so that the way of those that pass carries nothing for this one.
#[inline(never)]
fn answer<P: Program, H: Hook>(hook: H, act: Act) -> H::End {
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
