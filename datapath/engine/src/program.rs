//! The two programs, from the packet's bytes to its end.
//!
//! Invariant: this is all that runs per packet, in the kernel and in the tests alike; the kernel's part is to load
//! bytes, to look up maps and to carry out the `Hook`.

use thyra_datapath_abi::Reason;

use crate::account::{Counters, Direction, account, feasible};
use crate::decide::{self, Act, Arrival, Outcome};
use crate::packet::{Packet, Parsed};
use crate::parse::{self, Link};
use crate::{Family, Flows, Load, Tables, V4};

/// How a packet ends.
pub trait Hook {
    /// What the program returns.
    type End;

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

/// Runs a program on one packet; `is_own` tells that it carries Thyra's mark.
#[inline(always)]
pub fn run<L, N, H>(
    direction: Direction,
    load: &L,
    arrival: &Arrival,
    is_own: bool,
    node: &N,
    hook: &H,
) -> H::End
where
    L: Load + ?Sized,
    N: Tables + Flows + Counters + ?Sized,
    H: Hook + ?Sized,
{
    if is_own {
        node.reason(Reason::OwnPacket, load.length());
        return hook.pass_own();
    }
    match parse::link(load) {
        Link::V4(l3) => judge(
            direction,
            load.length(),
            arrival,
            &parse::ipv4(load, l3),
            node,
            hook,
        ),
        Link::V6(l3) => judge(
            direction,
            load.length(),
            arrival,
            &parse::ipv6(load, l3),
            node,
            hook,
        ),
        Link::NotIp => {
            node.reason(Reason::NotIp, load.length());
            hook.pass()
        }
        Link::Bad(reason) => {
            // Which family it would have been makes no difference.
            judge(
                direction,
                load.length(),
                arrival,
                &Parsed::<V4>::Bad(reason),
                node,
                hook,
            )
        }
    }
}

#[inline(always)]
fn judge<F, N, H>(
    direction: Direction,
    bytes: u32,
    arrival: &Arrival,
    parsed: &Parsed<F>,
    node: &N,
    hook: &H,
) -> H::End
where
    F: Family,
    N: Tables + Flows + Counters + ?Sized,
    H: Hook + ?Sized,
{
    let outcome = match direction {
        Direction::ToPod => decide::to_pod(node, arrival, parsed),
        Direction::FromPod => decide::from_pod(node, arrival, parsed),
    };
    finish(direction, bytes, arrival, parsed, &outcome, node, hook)
}

#[inline(always)]
fn finish<F, N, H>(
    direction: Direction,
    bytes: u32,
    arrival: &Arrival,
    parsed: &Parsed<F>,
    outcome: &Outcome,
    node: &N,
    hook: &H,
) -> H::End
where
    F: Family,
    N: Tables + Flows + Counters + ?Sized,
    H: Hook + ?Sized,
{
    let act = feasible(outcome, parsed);
    let generation = node.control().generation();
    account(node, outcome, act, parsed, (arrival, bytes, generation));
    match (act, parsed) {
        (Act::Pass, _) => hook.pass(),
        (Act::Refuse, Parsed::Tcp(packet)) => hook.refuse(packet, direction),
        (Act::Revoke, Parsed::Tcp(packet)) => hook.revoke(packet, direction),
        _ => hook.drop(),
    }
}
