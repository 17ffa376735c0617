//! The steps that the unusual packet takes, each a function of its own.
//!
//! In the kernel they are global functions (Linux 5.6), whose arguments and result are numbers: the verifier reads each
//! once, as if it knew nothing of its caller, and not again for every way that leads to it.
//!
//! Invariant: a number that no step returns is a drop.

use thyra_datapath_abi::Control;

use super::{Hook, Maps, Node, Program, direct, is_usual, origin};
use crate::account::{Direction, account, feasible, is_logged_answer};
use crate::decide::{self, Act, Outcome};
use crate::packet::{Kind, Packet, Parsed};
use crate::parse::non_tcp::{self, About, NonTcp, Shape};
use crate::parse::{ipv4, ipv6};
use crate::{Family, Tables, V4, V6};

/// Which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// With `--local-redirect`: a frame of the shape `Plain4`, as `Usual6`.
    Usual4,
    /// A frame of the shape `Plain6`; what is usual passes, the rest goes on to `Plain6`.
    Usual6,
    /// A frame of the shape `Plain4` that is not usual.
    Plain4,
    /// The same of `Plain6`.
    Plain6,
    /// A frame that Envoy is to be asked about.
    Ask4,
    /// The same of IPv6.
    Ask6,
    /// A frame of a connection that is held, or was.
    Hold4,
    /// The same of IPv6.
    Hold6,
    /// IPv4 of any other shape, at the offset; what is not TCP goes on to `Other4` where it is judged.
    Unusual4,
    /// The same of IPv6.
    Unusual6,
    /// Another protocol than TCP, at the offset; an ICMP error to the pod goes on to `About4` and `Error4`.
    Other4,
    /// The same of IPv6.
    Other6,
    /// Whether the sender of the ICMP error to the pod at the offset may know of what it is about.
    About4,
    /// The same of IPv6.
    About6,
    /// The ICMP error to the pod at the offset, which `related` marks.
    Error4,
    /// The same of IPv6.
    Error6,
    /// With `--local-redirect`: whether a SYN to the pod, at the offset, has the addresses and ports of a connection
    /// that goes straight.
    Occupied4,
    /// The same of IPv6.
    Occupied6,
    /// Such a SYN is refused, unless policy does so.
    Clash4,
    /// The same of IPv6.
    Clash6,
    /// With `--hook=pod`, at the host end: where a packet to the pod, at the offset, came from; what is not TCP goes on
    /// to `OtherOrigin4` where it is judged.
    Origin4,
    /// The same of IPv6.
    Origin6,
    /// The same of another protocol.
    OtherOrigin4,
    /// The same of IPv6.
    OtherOrigin6,
    /// With `--hook=pod`, inside the pod: whether a TCP packet, at the offset, needs no policy by where it came from.
    Exempt4,
    /// The same of IPv6.
    Exempt6,
    /// The same of another protocol.
    OtherExempt4,
    /// The same of IPv6.
    OtherExempt6,
    /// What is no packet that could be read.
    Invalid,
    /// A packet of a shape that is not read.
    Unsupported,
}

/// Added to the offset of an ICMP error.
const RELATED: u32 = 1 << 31;

/// How a step ends, as a number: the packet's end, or none where another step follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next(pub u32);

impl Next {
    const PASS: u32 = 0;
    /// Silently gone.
    pub const DROP: u32 = 1;
    const REFUSE: u32 = 2;
    const ASK: u32 = 3;
    const REVOKE: u32 = 4;
    const ON: u32 = 5;
    const HOLD: u32 = 6;
    const DIVERT: u32 = 7;

    /// Another step follows.
    #[inline(always)]
    pub(super) const fn on() -> Self {
        Self(Self::ON)
    }

    /// The packet's end.
    #[inline(always)]
    pub(super) fn end(act: Act) -> Self {
        Self(match act {
            Act::Pass => Self::PASS,
            Act::Drop => Self::DROP,
            Act::Refuse => Self::REFUSE,
            Act::Ask => Self::ASK,
            Act::Revoke => Self::REVOKE,
            Act::Hold => Self::HOLD,
            Act::Divert => Self::DIVERT,
        })
    }

    /// The packet's end; none when another step follows.
    #[inline(always)]
    pub(super) fn act(self) -> Option<Act> {
        Some(match self.0 {
            Self::ON => return None,
            Self::PASS => Act::Pass,
            Self::REFUSE => Act::Refuse,
            Self::ASK => Act::Ask,
            Self::REVOKE => Act::Revoke,
            Self::HOLD => Act::Hold,
            Self::DIVERT => Act::Divert,
            _ => Act::Drop,
        })
    }

    /// Of a question: no is none.
    #[inline(always)]
    fn pass_if(condition: bool) -> Self {
        Self(if condition { Self::PASS } else { Self::ON })
    }
}

/// An ICMP error's offset, marked if its sender may know of what it is about.
#[inline(always)]
pub(super) fn related(l3: u32, about: Next) -> u32 {
    if about.0 == Next::PASS { l3 | RELATED } else { l3 }
}

/// Takes one.
#[inline(always)]
pub fn take<P: Program, M: Maps, H: Hook>(maps: M, hook: H, step: Step, at: u32) -> Next {
    let (l3, is_related) = (at & !RELATED, at & RELATED != 0);
    match step {
        Step::Usual4 => Next::pass_if(is_usual::<P, V4, M, H>(maps, &hook, ipv4::plain(&hook))),
        Step::Usual6 => Next::pass_if(is_usual::<P, V6, M, H>(maps, &hook, ipv6::plain(&hook))),
        Step::Plain4 => plain::<P, V4, M, H>(maps, hook, ipv4::plain(&hook)),
        Step::Plain6 => plain::<P, V6, M, H>(maps, hook, ipv6::plain(&hook)),
        Step::Ask4 => ask::<P, V4, M, H>(maps, hook, ipv4::plain(&hook)),
        Step::Ask6 => ask::<P, V6, M, H>(maps, hook, ipv6::plain(&hook)),
        Step::Hold4 => hold::<P, V4, M, H>(maps, hook, ipv4::plain(&hook)),
        Step::Hold6 => hold::<P, V6, M, H>(maps, hook, ipv6::plain(&hook)),
        Step::Unusual4 => unusual::<P, V4, M, H>(maps, hook, &ipv4::unusual(&hook, l3)),
        Step::Unusual6 => unusual::<P, V6, M, H>(maps, hook, &ipv6::unusual(&hook, l3)),
        Step::Other4 => other::<P, V4, M, H>(maps, hook, &non_tcp::v4(&hook, l3)),
        Step::Other6 => other::<P, V6, M, H>(maps, hook, &non_tcp::v6(&hook, l3)),
        Step::About4 => about::<V4, M, H>(maps, hook, &non_tcp::about4(&hook, l3)),
        Step::About6 => about::<V6, M, H>(maps, hook, &non_tcp::about6(&hook, l3)),
        Step::Error4 => error::<V4, M, H>(maps, hook, &non_tcp::v4(&hook, l3), is_related),
        Step::Error6 => error::<V6, M, H>(maps, hook, &non_tcp::v6(&hook, l3), is_related),
        Step::Occupied4 => Next::pass_if(direct::is_occupied::<V4, M, H>(
            maps,
            hook,
            &ipv4::unusual(&hook, l3),
        )),
        Step::Occupied6 => Next::pass_if(direct::is_occupied::<V6, M, H>(
            maps,
            hook,
            &ipv6::unusual(&hook, l3),
        )),
        Step::Clash4 => direct::clash::<V4, M, H>(maps, hook, &ipv4::unusual(&hook, l3)),
        Step::Clash6 => direct::clash::<V6, M, H>(maps, hook, &ipv6::unusual(&hook, l3)),
        Step::Origin4 => origin::noted::<V4, M, H>(maps, hook, &ipv4::unusual(&hook, l3)),
        Step::Origin6 => origin::noted::<V6, M, H>(maps, hook, &ipv6::unusual(&hook, l3)),
        Step::OtherOrigin4 => origin::noted_other::<V4, M, H>(maps, hook, &non_tcp::v4(&hook, l3)),
        Step::OtherOrigin6 => origin::noted_other::<V6, M, H>(maps, hook, &non_tcp::v6(&hook, l3)),
        Step::Exempt4 => origin::exempted::<V4, M, H>(maps, hook, &ipv4::unusual(&hook, l3)),
        Step::Exempt6 => origin::exempted::<V6, M, H>(maps, hook, &ipv6::unusual(&hook, l3)),
        Step::OtherExempt4 => origin::exempted_other::<V4, M, H>(maps, hook, &non_tcp::v4(&hook, l3)),
        Step::OtherExempt6 => origin::exempted_other::<V6, M, H>(maps, hook, &non_tcp::v6(&hook, l3)),
        // Which family it would have been makes no difference.
        Step::Invalid => judge::<P, V4, M, H>(maps, hook, &Parsed::empty(Kind::Invalid)),
        Step::Unsupported => judge::<P, V4, M, H>(maps, hook, &Parsed::empty(Kind::Unsupported)),
    }
}

/// One that Envoy is to be asked about, or that is held, is not counted yet.
#[inline(always)]
fn plain<P: Program, F: Family, M: Maps, H: Hook>(maps: M, hook: H, packet: Option<Packet<F>>) -> Next {
    let Some(packet) = packet else {
        return hook.step::<P, M>(maps, Step::Invalid, 0);
    };
    let Some(node) = maps.open() else {
        return Next::end(Act::Drop);
    };
    let parsed = Parsed::tcp(packet);
    let outcome = P::decide(&node, &hook.arrival(), &parsed);
    if matches!(outcome.act, Act::Ask | Act::Hold) {
        return Next::end(outcome.act);
    }
    end(&node, &hook, &outcome, &parsed)
}

#[inline(always)]
fn ask<P: Program, F: Family, M: Maps, H: Hook>(maps: M, hook: H, packet: Option<Packet<F>>) -> Next {
    let Some(packet) = packet else {
        return Next::end(Act::Drop);
    };
    let Some(node) = maps.open() else {
        return Next::end(Act::Drop);
    };
    let outcome = P::ask(&node, &hook.arrival(), &packet);
    end(&node, &hook, &outcome, &Parsed::tcp(packet))
}

#[inline(always)]
fn hold<P: Program, F: Family, M: Maps, H: Hook>(maps: M, hook: H, packet: Option<Packet<F>>) -> Next {
    let Some(packet) = packet else {
        return Next::end(Act::Drop);
    };
    let Some(node) = maps.open() else {
        return Next::end(Act::Drop);
    };
    let outcome = P::hold(&node, &hook.arrival(), &packet);
    end(&node, &hook, &outcome, &Parsed::tcp(packet))
}

#[inline(always)]
fn unusual<P: Program, F: Family, M: Maps, H: Hook>(maps: M, hook: H, parsed: &Parsed<F>) -> Next {
    let Some(node) = maps.open() else {
        return Next::end(Act::Drop);
    };
    if parsed.kind == Kind::Other && node.control().has(Control::ENFORCE_NON_TCP) {
        return Next(Next::ON);
    }
    let outcome = P::decide(&node, &hook.arrival(), parsed);
    end(&node, &hook, &outcome, parsed)
}

#[inline(always)]
fn judge<P: Program, F: Family, M: Maps, H: Hook>(maps: M, hook: H, parsed: &Parsed<F>) -> Next {
    let Some(node) = maps.open() else {
        return Next::end(Act::Drop);
    };
    let outcome = P::decide(&node, &hook.arrival(), parsed);
    end(&node, &hook, &outcome, parsed)
}

/// The packet is read once more, for what only other protocols than TCP have.
#[inline(always)]
fn other<P: Program, F: Family, M: Maps, H: Hook>(maps: M, hook: H, other: &NonTcp<F>) -> Next {
    if other.shape == Shape::Error && matches!(P::DIRECTION, Direction::ToPod) {
        return Next(Next::ON);
    }
    let Some(node) = maps.open() else {
        return Next::end(Act::Drop);
    };
    let outcome = P::decide_other(&node, &hook.arrival(), other);
    end_other(&node, &hook, &outcome, &other.parsed)
}

#[inline(always)]
fn about<F: Family, M: Maps, H: Hook>(maps: M, hook: H, about: &About<F>) -> Next {
    Next::pass_if(
        maps.open()
            .is_some_and(|node| decide::non_tcp::is_related(&node, hook.arrival().ifindex, about)),
    )
}

/// What the error is about is not read here: it takes room, too.
#[inline(always)]
fn error<F: Family, M: Maps, H: Hook>(maps: M, hook: H, error: &NonTcp<F>, is_related: bool) -> Next {
    let Some(node) = maps.open() else {
        return Next::end(Act::Drop);
    };
    let outcome = decide::non_tcp::error_to_pod(&node, &hook.arrival(), error, is_related);
    end_other(&node, &hook, &outcome, &error.parsed)
}

/// Counts and reports the packet; what is done with it.
#[inline(always)]
pub(super) fn end<F: Family, N: Node, H: Hook>(
    node: &N,
    hook: &H,
    outcome: &Outcome,
    parsed: &Parsed<F>,
) -> Next {
    let act = feasible(outcome, parsed);
    let is_answer = is_logged_answer(act, parsed, node.control());
    end_with(node, hook, outcome, parsed, (act, is_answer))
}

/// The same of another protocol than TCP: nothing of the flow log's takes room on its stack, which Linux 6.1 has none
/// of to spare.
#[inline(always)]
fn end_other<F: Family, N: Node, H: Hook>(node: &N, hook: &H, outcome: &Outcome, parsed: &Parsed<F>) -> Next {
    end_with(node, hook, outcome, parsed, (feasible(outcome, parsed), false))
}

#[inline(always)]
fn end_with<F: Family, N: Node, H: Hook>(
    node: &N,
    hook: &H,
    outcome: &Outcome,
    parsed: &Parsed<F>,
    (act, is_answer): (Act, bool),
) -> Next {
    let rest = (&hook.arrival(), hook.length(), node.control().generation());
    account(node, outcome, act, parsed, is_answer, rest);
    Next::end(act)
}
