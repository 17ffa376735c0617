//! The programs of `--local-redirect`; its rules are in `decide::direct`.
//!
//! They take the steps of `to_pod` and `from_pod` (`step`), and between them those that are here.
//!
//! Invariant: a packet goes straight into a pod only with that pod's own verdict, which is counted there as `to_pod`
//! would have counted it. What is left to the stack is not: `to_pod` sees it.

use thyra_datapath_abi::{Reason, limits};

use super::{FromPod, Hook, Maps, Next, Step, ToPod, passes_unread, slow};
use crate::account::{Counters as _, Direction, account, feasible, is_logged_answer};
use crate::decide::{self, Act, Outcome, direct, l7, usual};
use crate::packet::{Kind, Packet, Parsed};
use crate::parse::{self, Link, Shape};
use crate::reset::TCP_HEADER;
use crate::tables::Tables as _;
use crate::{Family, Load, V4, V6};

/// Where a packet at `from_pod` is on its way: an act, the endpoint that the packet, or what takes its place, goes
/// straight to, and where its IP header begins.
///
/// ```text
/// bits 0..8 offset    8..16 endpoint, 0 for the stack    16..24 `Way::*`, the act    24..32 `Way::*`, of a SYN
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way(pub u32);

impl Way {
    const PASS: u8 = 0;
    const DROP: u8 = 1;
    const REFUSE: u8 = 2;
    const REVOKE: u8 = 3;
    /// Not a usual packet: look again.
    const JUDGE: u8 = 4;
    /// The far pod's policy does not let the SYN in.
    const NOT_LET_IN: u8 = 5;
    /// Envoy is to be asked in the far pod.
    const ASK: u8 = 6;

    /// A SYN.
    const SYN: u8 = 1;
    /// Of a connection that is known already.
    const KNOWN: u8 = 2;
    /// That one goes straight and is not answered yet.
    const STRAIGHT: u8 = 4;
    /// That one goes through the stack and is not answered yet.
    const STACK: u8 = 8;

    #[inline(always)]
    const fn at(l3: u32) -> Self {
        Self(l3 & 0xff)
    }
    #[inline(always)]
    const fn offset(self) -> u32 {
        self.0 & 0xff
    }
    #[inline(always)]
    fn syn(self) -> u8 {
        self.0.to_le_bytes()[3]
    }
    #[inline(always)]
    fn with_syn(self, syn: u8) -> Self {
        let [offset, to, act, _] = self.0.to_le_bytes();
        Self(u32::from_le_bytes([offset, to, act, syn]))
    }
    #[inline(always)]
    fn number(self) -> u8 {
        self.0.to_le_bytes()[2]
    }
    #[inline(always)]
    fn with_number(self, number: u8) -> Self {
        let [offset, to, _, syn] = self.0.to_le_bytes();
        Self(u32::from_le_bytes([offset, to, number, syn]))
    }
    #[inline(always)]
    fn with(self, act: Act) -> Self {
        self.with_number(match act {
            Act::Pass => Self::PASS,
            Act::Drop => Self::DROP,
            Act::Refuse => Self::REFUSE,
            Act::Revoke => Self::REVOKE,
            // A connection that goes straight was never given to Envoy, nor held: `asked` ends it.
            Act::Ask | Act::Hold => Self::ASK,
            // Only what goes to a pod is held, and not here.
            Act::Divert => Self::DROP,
        })
    }
    #[inline(always)]
    fn act(self) -> Act {
        match self.number() {
            Self::PASS => Act::Pass,
            Self::REFUSE => Act::Refuse,
            Self::REVOKE => Act::Revoke,
            _ => Act::Drop,
        }
    }
    /// The endpoint that it goes straight to; 0 for the stack.
    #[inline(always)]
    fn to(self) -> u16 {
        u16::from(self.0.to_le_bytes()[1])
    }
    #[inline(always)]
    fn straight_to(self, to: u16) -> Self {
        let [offset, _, act, syn] = self.0.to_le_bytes();
        // Ids of endpoints have eight bits.
        let [to, _] = to.to_le_bytes();
        Self(u32::from_le_bytes([offset, to, act, syn]))
    }
    /// Left to the stack.
    #[inline(always)]
    fn through_the_stack(self) -> Self {
        self.straight_to(0).with(Act::Pass)
    }
    #[inline(always)]
    fn gone(self) -> Self {
        self.straight_to(0).with(Act::Drop)
    }
    /// Whether the packet itself, not what takes its place, is on its way to another pod.
    #[inline(always)]
    fn goes_straight(self) -> bool {
        self.number() == Self::PASS && self.to() != 0
    }
    #[inline(always)]
    fn is(self, syn: u8) -> bool {
        self.syn() & syn != 0
    }
}

const _: () = assert!(limits::MAX_ENDPOINTS == 256);

/// A step of a packet that a pod sends. In the kernel each is a global function, as those of `step` are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Leg {
    /// The short way of a frame of the usual shape.
    Usual,
    /// What is known of the connection that a SYN opens; asked before the decision begins it anew.
    Known,
    /// Where it goes on once it is judged where it comes from.
    Onward,
    /// A SYN's connection is noted as one that goes straight, unless it may not.
    Begun,
    /// The decision where it goes straight to.
    Arrived,
    /// The same of a packet that Envoy is to be asked about.
    Asked,
    /// What is not let in goes back to the stack.
    Ended,
}

/// A family whose packets can be read wherever their headers lie.
pub trait Whole: Family {
    /// Reads one.
    fn read<L: Load>(packet: &L, l3: u32) -> Parsed<Self>;
    /// Reads one of the usual shape.
    fn read_plain<L: Load>(packet: &L) -> Option<Packet<Self>>;
}

impl Whole for V4 {
    #[inline(always)]
    fn read<L: Load>(packet: &L, l3: u32) -> Parsed<Self> {
        parse::ipv4::unusual(packet, l3)
    }
    #[inline(always)]
    fn read_plain<L: Load>(packet: &L) -> Option<Packet<Self>> {
        parse::ipv4::plain(packet)
    }
}

impl Whole for V6 {
    #[inline(always)]
    fn read<L: Load>(packet: &L, l3: u32) -> Parsed<Self> {
        parse::ipv6::unusual(packet, l3)
    }
    #[inline(always)]
    fn read_plain<L: Load>(packet: &L) -> Option<Packet<Self>> {
        parse::ipv6::plain(packet)
    }
}

/// Runs `maps::TO_POD_DIRECT` on one packet.
#[inline(always)]
pub fn to_pod_direct<M: Maps, H: Hook>(maps: M, hook: H) -> H::End {
    if hook.is_own() {
        passes_unread::<ToPod, M, H>(maps, &hook, Reason::OwnPacket);
        return hook.pass_own();
    }
    match arriving(maps, hook) {
        Act::Pass => hook.pass(),
        Act::Drop | Act::Ask | Act::Hold => hook.drop(),
        act @ (Act::Refuse | Act::Revoke | Act::Divert) => hook.answer::<ToPod>(act),
    }
}

#[inline(always)]
fn arriving<M: Maps, H: Hook>(maps: M, hook: H) -> Act {
    let shape = parse::shape(&hook);
    let usual = match shape {
        // Not here, as in `run`: the stack is for the steps that follow.
        Shape::Plain4 => hook.step::<ToPod, M>(maps, Step::Usual4, 0).act().is_some(),
        Shape::Plain6 => hook.step::<ToPod, M>(maps, Step::Usual6, 0).act().is_some(),
        Shape::Unusual => false,
    };
    if usual {
        return Act::Pass;
    }
    let clash = match parse::link(&hook) {
        Link::V4(l3) => clashes::<M, H>(maps, hook, l3, (Step::Occupied4, Step::Clash4)),
        Link::V6(l3) => clashes::<M, H>(maps, hook, l3, (Step::Occupied6, Step::Clash6)),
        Link::NotIp | Link::Bad(_) => None,
    };
    clash.unwrap_or_else(|| slow::<ToPod, M, H>(maps, hook, shape))
}

/// The end of a SYN whose addresses and ports belong to a connection that goes straight; none of any other packet.
#[inline(always)]
fn clashes<M: Maps, H: Hook>(maps: M, hook: H, l3: u32, (occupied, clash): (Step, Step)) -> Option<Act> {
    let Act::Pass = hook.step::<ToPod, M>(maps, occupied, l3).act()? else {
        return Some(Act::Drop);
    };
    hook.step::<ToPod, M>(maps, clash, l3).act()
}

/// Whether it is such a SYN.
#[inline(always)]
pub(super) fn is_occupied<F: Family, M: Maps, H: Hook>(maps: M, hook: H, parsed: &Parsed<F>) -> bool {
    let is_syn = parsed.kind == Kind::Tcp && parsed.packet.is_syn();
    let node = maps.open().filter(|_| is_syn);
    node.is_some_and(|node| direct::is_occupied(&node, &hook.arrival(), &parsed.packet))
}

/// It is refused, unless policy does so: then it goes on to be judged.
#[inline(always)]
pub(super) fn clash<F: Family, M: Maps, H: Hook>(maps: M, hook: H, parsed: &Parsed<F>) -> Next {
    let Some(node) = maps.open() else {
        return Next::end(Act::Drop);
    };
    let outcome = decide::to_pod(&node, &hook.arrival(), parsed);
    match direct::clash(&outcome, node.control()) {
        Some(outcome) => super::step::end(&node, &hook, &outcome, parsed),
        None => Next::on(),
    }
}

/// Runs `maps::FROM_POD_DIRECT` on one packet.
#[inline(always)]
pub fn from_pod_direct<M: Maps, H: Hook>(maps: M, hook: H) -> H::End {
    if hook.is_own() {
        passes_unread::<FromPod, M, H>(maps, &hook, Reason::OwnPacket);
        return hook.pass_own();
    }
    let shape = parse::shape(&hook);
    let usual = match shape {
        Shape::Plain4 => hook.leg::<V4, M>(maps, Leg::Usual, Way(0)),
        Shape::Plain6 => hook.leg::<V6, M>(maps, Leg::Usual, Way(0)),
        Shape::Unusual => Way(0).with_number(Way::JUDGE),
    };
    let way = if usual.number() == Way::JUDGE {
        sent(maps, hook, shape)
    } else {
        usual
    };
    if way.to() == 0 {
        return match way.act() {
            Act::Pass => hook.pass(),
            // Only what goes to a pod is held.
            Act::Drop | Act::Ask | Act::Hold | Act::Divert => hook.drop(),
            act @ (Act::Refuse | Act::Revoke) => hook.answer::<FromPod>(act),
        };
    }
    match (way.act(), maps.open()) {
        (Act::Pass, Some(node)) => hook.redirect(node.record(way.to())),
        (Act::Revoke, Some(node)) => hook.revoke_into(node.record(way.to())),
        _ => hook.drop(),
    }
}

/// The whole way.
#[inline(always)]
fn sent<M: Maps, H: Hook>(maps: M, hook: H, shape: Shape) -> Way {
    match parse::link(&hook) {
        Link::V4(l3) => legs::<V4, M, H>(maps, hook, shape, l3),
        Link::V6(l3) => legs::<V6, M, H>(maps, hook, shape, l3),
        Link::NotIp | Link::Bad(_) => Way(0).with(slow::<FromPod, M, H>(maps, hook, shape)),
    }
}

#[inline(always)]
fn legs<F: Whole, M: Maps, H: Hook>(maps: M, hook: H, shape: Shape, l3: u32) -> Way {
    let known = hook.leg::<F, M>(maps, Leg::Known, Way::at(l3));
    let judged = known.with(slow::<FromPod, M, H>(maps, hook, shape));
    let mut way = hook.leg::<F, M>(maps, Leg::Onward, judged);
    for leg in [Leg::Begun, Leg::Arrived, Leg::Asked, Leg::Ended] {
        way = hook.leg::<F, M>(maps, leg, way);
    }
    way
}

/// Takes a step; one that is not on the packet's way changes nothing.
#[inline(always)]
pub fn take<F: Whole, M: Maps, H: Hook>(maps: M, hook: H, leg: Leg, way: Way) -> Way {
    let wanted = match leg {
        Leg::Usual => return usual::<F, M, H>(maps, hook),
        Leg::Known => true,
        Leg::Onward => matches!(way.number(), Way::PASS | Way::REVOKE),
        Leg::Begun => way.goes_straight() && way.is(Way::SYN),
        Leg::Arrived => way.goes_straight(),
        Leg::Asked => way.number() == Way::ASK,
        Leg::Ended => way.number() == Way::NOT_LET_IN,
    };
    if !wanted {
        return way;
    }
    let parsed = F::read(&hook, way.offset());
    if parsed.kind != Kind::Tcp {
        return way;
    }
    match leg {
        Leg::Usual | Leg::Known => known(maps, hook, &parsed.packet, way),
        Leg::Onward => onward(maps, hook, &parsed.packet, way),
        Leg::Begun => begun(maps, hook, &parsed.packet, way),
        Leg::Arrived => arrived(maps, hook, &parsed, way),
        Leg::Asked => asked(maps, hook, &parsed, way),
        Leg::Ended => ended(maps, hook, &parsed.packet, way),
    }
}

/// The short way: judged at both ends and counted at both, or left alone.
#[inline(always)]
fn usual<F: Whole, M: Maps, H: Hook>(maps: M, hook: H) -> Way {
    let unusual = Way(0).with_number(Way::JUDGE);
    let Some(packet) = F::read_plain(&hook) else {
        return unusual;
    };
    let Some(node) = maps.open() else {
        return unusual;
    };
    let arrival = hook.arrival();
    let mut to = 0;
    let arrives = |endpoint: u16, peer: u16| {
        if peer == 0 || !direct::is_direct(&node, endpoint, peer, &packet) {
            return true;
        }
        to = peer;
        let there = direct::arrival(&arrival, node.record(peer));
        usual::to_pod(&node, &there, &packet, hook.length())
    };
    if !usual::from_pod_if(&node, &arrival, &packet, hook.length(), arrives) {
        return unusual;
    }
    Way(0).straight_to(to)
}

/// What is known of the connection that a SYN opens.
#[inline(always)]
fn known<F: Family, M: Maps, H: Hook>(maps: M, hook: H, packet: &Packet<F>, way: Way) -> Way {
    if !packet.is_syn() {
        return way;
    }
    let Some(node) = maps.open() else {
        return way;
    };
    let before = direct::before(&node, &hook.arrival(), packet);
    let known = match before {
        None => 0,
        Some(flags) if direct::went_straight(flags) => Way::KNOWN | Way::STRAIGHT,
        Some(flags) if direct::went_through_the_stack(flags) => Way::KNOWN | Way::STACK,
        Some(_) => Way::KNOWN,
    };
    way.with_syn(Way::SYN | known)
}

/// Where a packet goes that was judged where it comes from.
#[inline(always)]
fn onward<F: Family, M: Maps, H: Hook>(maps: M, hook: H, packet: &Packet<F>, way: Way) -> Way {
    let Some(node) = maps.open() else {
        return way.gone();
    };
    let to = if way.is(Way::STACK) {
        0
    } else {
        direct::onward(&node, &hook.arrival(), packet)
    };
    if to != 0 && way.act() == Act::Revoke {
        // The bare ACK that the far pod gets in its place.
        node.reason(Reason::OwnPacket, packet.l4 + TCP_HEADER);
        node.endpoint(to, Direction::ToPod, true);
    }
    way.straight_to(to)
}

/// Notes that the connection of a SYN goes straight, unless the server's policy has something else for it or its stack
/// has such a connection already.
#[inline(always)]
fn begun<F: Family, M: Maps, H: Hook>(maps: M, hook: H, packet: &Packet<F>, way: Way) -> Way {
    let Some(node) = maps.open() else {
        return way.gone();
    };
    let to = way.to();
    // Looked for before anything else: a look-up in the pod is one that `steer` answers.
    let may_begin = direct::may_enter(&node, to, packet)
        && (way.is(Way::STRAIGHT) || !hook.is_taken(packet, node.record(to).netns));
    if may_begin && direct::note(&node, &hook.arrival(), packet, true) {
        way
    } else {
        way.through_the_stack()
    }
}

/// A SYN that the far pod's policy does not let in is left to the stack, where it is refused.
#[inline(always)]
fn ended<F: Family, M: Maps, H: Hook>(maps: M, hook: H, packet: &Packet<F>, way: Way) -> Way {
    match maps.open() {
        Some(node) if direct::note(&node, &hook.arrival(), packet, false) => way.through_the_stack(),
        _ => way.gone(),
    }
}

/// Judges a packet that goes straight to a pod as that pod's `to_pod` would.
#[inline(always)]
fn arrived<F: Family, M: Maps, H: Hook>(maps: M, hook: H, parsed: &Parsed<F>, way: Way) -> Way {
    let Some(node) = maps.open() else {
        return way.gone();
    };
    let arrival = direct::arrival(&hook.arrival(), node.record(way.to()));
    let outcome = decide::to_pod(&node, &arrival, parsed);
    if parsed.packet.is_syn() && !direct::lets_in(&outcome) {
        return way.with_number(Way::NOT_LET_IN);
    }
    if matches!(outcome.act, Act::Ask | Act::Hold) {
        return way.with(Act::Ask);
    }
    way.with(there(&node, &hook, &outcome, parsed, way.to()))
}

/// A connection that goes straight was never given to Envoy: it ends, as one through the stack does that policy no
/// longer lets in without an Envoy.
#[inline(always)]
fn asked<F: Family, M: Maps, H: Hook>(maps: M, hook: H, parsed: &Parsed<F>, way: Way) -> Way {
    let Some(node) = maps.open() else {
        return way.gone();
    };
    let arrival = direct::arrival(&hook.arrival(), node.record(way.to()));
    let outcome = l7::to_pod(&node, &arrival, &parsed.packet);
    way.with(there(&node, &hook, &outcome, parsed, way.to()))
}

/// Counts and reports the packet at the pod that it goes straight to; what is done with it. Where it is revoked, it has
/// been counted in the place of the bare ACK that the pod gets.
#[inline(always)]
fn there<F: Family, N: super::Node, H: Hook>(
    node: &N,
    hook: &H,
    outcome: &Outcome,
    parsed: &Parsed<F>,
    to: u16,
) -> Act {
    let act = feasible(outcome, parsed);
    let arrival = direct::arrival(&hook.arrival(), node.record(to));
    let control = node.control();
    let is_answer = is_logged_answer(act, parsed, control);
    let rest = (&arrival, hook.length(), control.generation());
    account(node, outcome, act, parsed, is_answer, rest);
    act
}
