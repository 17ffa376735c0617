//! What `--hook=pod` has besides `to_pod` and `from_pod`: the program at the host end of the veth, and the steps before
//! `to_pod` inside the pod; the rules are in `decide::origin`.

use super::step::end;
use super::{Hook, Maps, Next, Step, ToPod};
use crate::Family;
use crate::decide::{Act, Outcome, origin as decide};
use crate::packet::{Kind, Parsed};
use crate::parse::non_tcp::NonTcp;
use crate::parse::{self, Link};
use crate::tables::Tables as _;
use thyra_datapath_abi::Control;

/// Runs `maps::ORIGIN` on one packet.
#[inline(always)]
pub fn origin<M: Maps, H: Hook>(maps: M, hook: H) -> H::End {
    if hook.is_own() {
        return hook.pass();
    }
    let steps = [
        Step::Origin4,
        Step::OtherOrigin4,
        Step::Origin6,
        Step::OtherOrigin6,
    ];
    // What can't be read has no origin; `to_pod` says what becomes of it.
    match by_family(maps, hook, steps) {
        Some(Act::Pass) | None => hook.pass(),
        Some(_) => hook.drop(),
    }
}

/// The end of a packet inside the pod by where it came from, before policy is asked.
#[inline(always)]
pub(super) fn exempt<M: Maps, H: Hook>(maps: M, hook: H) -> Option<Act> {
    let steps = [
        Step::Exempt4,
        Step::OtherExempt4,
        Step::Exempt6,
        Step::OtherExempt6,
    ];
    by_family(maps, hook, steps)
}

/// Takes the steps for TCP and for others of the packet's family; none when neither is its end.
#[inline(always)]
fn by_family<M: Maps, H: Hook>(maps: M, hook: H, steps: [Step; 4]) -> Option<Act> {
    let [tcp4, other4, tcp6, other6] = steps;
    match parse::link(&hook) {
        Link::V4(l3) => either(maps, hook, (tcp4, other4), l3),
        Link::V6(l3) => either(maps, hook, (tcp6, other6), l3),
        Link::NotIp | Link::Bad(_) => None,
    }
}

#[inline(always)]
fn either<M: Maps, H: Hook>(maps: M, hook: H, (tcp, other): (Step, Step), l3: u32) -> Option<Act> {
    match hook.step::<ToPod, M>(maps, tcp, l3).act() {
        Some(act) => Some(act),
        None => hook.step::<ToPod, M>(maps, other, l3).act(),
    }
}

/// What is not TCP takes another step where it is judged.
#[inline(always)]
pub(super) fn noted<F: Family, M: Maps, H: Hook>(maps: M, hook: H, parsed: &Parsed<F>) -> Next {
    let Some(node) = maps.open() else {
        return Next::end(Act::Drop);
    };
    let outcome = match parsed.kind {
        Kind::Tcp => decide::tcp(&node, &hook.arrival(), &parsed.packet),
        Kind::Other if node.control().has(Control::ENFORCE_NON_TCP) => return Next::on(),
        _ => None,
    };
    ended(&node, &hook, outcome, parsed)
}

/// Of another protocol.
#[inline(always)]
pub(super) fn noted_other<F: Family, M: Maps, H: Hook>(maps: M, hook: H, other: &NonTcp<F>) -> Next {
    let Some(node) = maps.open() else {
        return Next::end(Act::Drop);
    };
    let outcome = decide::non_tcp(&node, &hook.arrival(), other);
    ended(&node, &hook, outcome, &other.parsed)
}

/// `exempt` of TCP; what is neither goes on.
#[inline(always)]
pub(super) fn exempted<F: Family, M: Maps, H: Hook>(maps: M, hook: H, parsed: &Parsed<F>) -> Next {
    let Some(node) = maps.open().filter(|_| parsed.kind == Kind::Tcp) else {
        return Next::on();
    };
    match decide::exempt(&node, &hook.arrival(), &parsed.packet) {
        Some(outcome) => end(&node, &hook, &outcome, parsed),
        None => Next::on(),
    }
}

/// The same of another protocol.
#[inline(always)]
pub(super) fn exempted_other<F: Family, M: Maps, H: Hook>(maps: M, hook: H, other: &NonTcp<F>) -> Next {
    let judged = |node: &M::Node| node.control().has(Control::ENFORCE_NON_TCP);
    let Some(node) = maps.open().filter(judged) else {
        return Next::on();
    };
    match decide::exempt_other(&node, &hook.arrival(), other) {
        Some(outcome) => end(&node, &hook, &outcome, &other.parsed),
        None => Next::on(),
    }
}

/// Counted only where it ends here: what goes on is counted by `to_pod`.
#[inline(always)]
fn ended<F: Family, N: super::Node, H: Hook>(
    node: &N,
    hook: &H,
    outcome: Option<Outcome>,
    parsed: &Parsed<F>,
) -> Next {
    match outcome {
        None => Next::end(Act::Pass),
        Some(outcome) => end(node, hook, &outcome, parsed),
    }
}
