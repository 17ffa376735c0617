//! The two programs, from the packet's bytes to its end.
//!
//! Invariant: this is all that runs per packet, in the kernel and in the tests alike; the kernel's part is to
//! load bytes, to look up maps and to carry out the `Hook`.
//!
//! Each way from parsing to the end is a function of its own: the usual shapes stay in registers, and none of
//! them needs more than the 512 bytes of stack that a program has together with what it calls.

use thyra_datapath_abi::Reason;

use crate::account::{Counters, Direction, account, feasible};
use crate::decide::{self, Act, Arrival, Outcome};
use crate::packet::{Kind, Packet, Parsed};
use crate::parse::{self, Link, Shape};
use crate::{Family, Flows, Load, Tables, V4, V6};

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
pub trait Node: Tables + Flows + Counters + Copy {}

impl<N: Tables + Flows + Counters + Copy> Node for N {}

/// One of the two programs.
pub trait Program {
    /// Which.
    const DIRECTION: Direction;

    /// Decides about a packet.
    fn decide<F: Family, N: Tables + Flows>(node: &N, arrival: &Arrival, parsed: &Parsed<F>) -> Outcome;
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
    fn decide<F: Family, N: Tables + Flows>(node: &N, arrival: &Arrival, parsed: &Parsed<F>) -> Outcome {
        decide::to_pod(node, arrival, parsed)
    }
}

impl Program for FromPod {
    const DIRECTION: Direction = Direction::FromPod;

    #[inline(always)]
    fn decide<F: Family, N: Tables + Flows>(node: &N, arrival: &Arrival, parsed: &Parsed<F>) -> Outcome {
        decide::from_pod(node, arrival, parsed)
    }
}

/// Runs a program on one packet.
#[inline(always)]
pub fn run<P: Program, N: Node, H: Hook>(node: N, hook: H) -> H::End {
    if hook.is_own() {
        node.reason(Reason::OwnPacket, hook.length());
        return hook.pass_own();
    }
    let act = match parse::shape(&hook) {
        Shape::Plain4 => plain4::<P, N, H>(node, hook),
        Shape::Plain6 => plain6::<P, N, H>(node, hook),
        Shape::Unusual => unusual::<P, N, H>(node, hook),
    };
    match act {
        Act::Pass => hook.pass(),
        Act::Drop => hook.drop(),
        Act::Refuse | Act::Revoke => answer::<P, H>(hook, act),
    }
}

#[inline(never)]
fn plain4<P: Program, N: Node, H: Hook>(node: N, hook: H) -> Act {
    match parse::ipv4::plain(&hook) {
        Some(packet) => judge::<P, V4, N, H>(node, hook, &Parsed::tcp(packet)),
        None => bad::<P, N, H>(node, hook, Kind::Invalid),
    }
}

#[inline(never)]
fn plain6<P: Program, N: Node, H: Hook>(node: N, hook: H) -> Act {
    match parse::ipv6::plain(&hook) {
        Some(packet) => judge::<P, V6, N, H>(node, hook, &Parsed::tcp(packet)),
        None => bad::<P, N, H>(node, hook, Kind::Invalid),
    }
}

#[inline(always)]
fn unusual<P: Program, N: Node, H: Hook>(node: N, hook: H) -> Act {
    match parse::link(&hook) {
        Link::V4(l3) => unusual4::<P, N, H>(node, hook, l3),
        Link::V6(l3) => unusual6::<P, N, H>(node, hook, l3),
        Link::NotIp => {
            node.reason(Reason::NotIp, hook.length());
            Act::Pass
        }
        Link::Bad(kind) => bad::<P, N, H>(node, hook, kind),
    }
}

#[inline(never)]
fn unusual4<P: Program, N: Node, H: Hook>(node: N, hook: H, l3: u32) -> Act {
    judge::<P, V4, N, H>(node, hook, &parse::ipv4::unusual(&hook, l3))
}

#[inline(never)]
fn unusual6<P: Program, N: Node, H: Hook>(node: N, hook: H, l3: u32) -> Act {
    judge::<P, V6, N, H>(node, hook, &parse::ipv6::unusual(&hook, l3))
}

/// Which family it would have been makes no difference.
#[inline(never)]
fn bad<P: Program, N: Node, H: Hook>(node: N, hook: H, kind: Kind) -> Act {
    judge::<P, V4, N, H>(node, hook, &Parsed::empty(kind))
}

#[inline(always)]
fn judge<P: Program, F: Family, N: Node, H: Hook>(node: N, hook: H, parsed: &Parsed<F>) -> Act {
    let arrival = hook.arrival();
    let outcome = P::decide(&node, &arrival, parsed);
    let act = feasible(&outcome, parsed);
    account(
        &node,
        &outcome,
        act,
        parsed,
        (&arrival, hook.length(), node.control().generation()),
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
