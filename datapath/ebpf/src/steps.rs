//! The engine's steps as global functions (Linux 5.6): the verifier reads each once, and not for every way that leads
//! to it. A call costs what any other does.
//!
//! Invariant: arguments are the context and numbers, the result is a number; nothing that the verifier knows of the
//! caller is needed, and it knows nothing of what is returned.

use aya_ebpf::bindings::__sk_buff;
use thyra_datapath_engine::account::Direction;
use thyra_datapath_engine::decide::Act;
use thyra_datapath_engine::parse::ipv6::Chain;
use thyra_datapath_engine::program::{self, FromPod, Next, Step, ToPod};

use crate::node::ThisNode;
use crate::skb::Skb;

/// The number, which counts as used: the compiler hands over nothing in the place of one that is not, and the verifier
/// refuses the call.
#[inline(always)]
pub fn needed(mut number: u32) -> u32 {
    // SAFETY: no instruction at all.
    unsafe { core::arch::asm!("/* {0} */", inout(reg) number, options(nomem, nostack)) };
    number
}

/// A function for each step that a program takes, known by its name, with `SHORT` of its `ThisNode`; and `step`, which
/// calls it.
macro_rules! steps {
    ($function:ident $at_pod:literal: $($direction:ident $name:ident = $step:ident $short:literal;)*) => {
        $(
            #[unsafe(no_mangle)]
            #[inline(never)]
            extern "C" fn $name(skb: *mut __sk_buff, at: u32) -> u32 {
                program::step::take::<$direction, _, _>(
                    ThisNode::<$short>,
                    Skb::<$at_pod>(skb),
                    Step::$step,
                    needed(at),
                )
                .0
            }
        )*

        /// Takes a step; what no program takes is none.
        #[inline(always)]
        pub fn $function(direction: Direction, step: Step, skb: *mut __sk_buff, at: u32) -> u32 {
            match (direction, step) {
                $((Direction::$direction, Step::$step) => $name(skb, at),)*
                _ => Next::DROP,
            }
        }
    };
}

steps! {
    step false:
    ToPod to_pod_usual4 = Usual4 true;
    ToPod to_pod_usual6 = Usual6 true;
    ToPod to_pod_plain4 = Plain4 false;
    ToPod to_pod_plain6 = Plain6 false;
    ToPod to_pod_ask4 = Ask4 false;
    ToPod to_pod_ask6 = Ask6 false;
    ToPod to_pod_hold4 = Hold4 false;
    ToPod to_pod_hold6 = Hold6 false;
    ToPod to_pod_unusual4 = Unusual4 false;
    ToPod to_pod_unusual6 = Unusual6 false;
    ToPod to_pod_other4 = Other4 false;
    ToPod to_pod_other6 = Other6 false;
    ToPod to_pod_about4 = About4 false;
    ToPod to_pod_about6 = About6 false;
    ToPod to_pod_error4 = Error4 false;
    ToPod to_pod_error6 = Error6 false;
    ToPod to_pod_occupied4 = Occupied4 false;
    ToPod to_pod_occupied6 = Occupied6 false;
    ToPod to_pod_clash4 = Clash4 false;
    ToPod to_pod_clash6 = Clash6 false;
    ToPod origin4 = Origin4 false;
    ToPod origin6 = Origin6 false;
    ToPod other_origin4 = OtherOrigin4 false;
    ToPod other_origin6 = OtherOrigin6 false;
    ToPod to_pod_invalid = Invalid false;
    ToPod to_pod_unsupported = Unsupported false;
    FromPod from_pod_usual6 = Usual6 true;
    FromPod from_pod_plain4 = Plain4 false;
    FromPod from_pod_plain6 = Plain6 false;
    FromPod from_pod_ask4 = Ask4 false;
    FromPod from_pod_ask6 = Ask6 false;
    FromPod from_pod_hold4 = Hold4 false;
    FromPod from_pod_hold6 = Hold6 false;
    FromPod from_pod_unusual4 = Unusual4 false;
    FromPod from_pod_unusual6 = Unusual6 false;
    FromPod from_pod_other4 = Other4 false;
    FromPod from_pod_other6 = Other6 false;
    FromPod from_pod_invalid = Invalid false;
    FromPod from_pod_unsupported = Unsupported false;
}

/// The acts that `program::answer` carries out, as numbers.
const REFUSE: u32 = 0;
const REVOKE: u32 = 1;
const DIVERT: u32 = 2;

steps! {
    step_at_pod true:
    ToPod at_pod_usual6 = Usual6 true;
    ToPod at_pod_plain4 = Plain4 false;
    ToPod at_pod_plain6 = Plain6 false;
    ToPod at_pod_ask4 = Ask4 false;
    ToPod at_pod_ask6 = Ask6 false;
    ToPod at_pod_unusual4 = Unusual4 false;
    ToPod at_pod_unusual6 = Unusual6 false;
    ToPod at_pod_other4 = Other4 false;
    ToPod at_pod_other6 = Other6 false;
    ToPod at_pod_about4 = About4 false;
    ToPod at_pod_about6 = About6 false;
    ToPod at_pod_error4 = Error4 false;
    ToPod at_pod_error6 = Error6 false;
    ToPod at_pod_exempt4 = Exempt4 false;
    ToPod at_pod_exempt6 = Exempt6 false;
    ToPod at_pod_other_exempt4 = OtherExempt4 false;
    ToPod at_pod_other_exempt6 = OtherExempt6 false;
    ToPod at_pod_invalid = Invalid false;
    ToPod at_pod_unsupported = Unsupported false;
}

#[inline(always)]
fn act(number: u32) -> Act {
    match number {
        DIVERT => Act::Divert,
        REVOKE => Act::Revoke,
        _ => Act::Refuse,
    }
}

#[inline(always)]
fn number(act: Act) -> u32 {
    match act {
        Act::Divert => DIVERT,
        Act::Revoke => REVOKE,
        _ => REFUSE,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn to_pod_answer(skb: *mut __sk_buff, number: u32) -> i32 {
    program::answer::<ToPod, _>(Skb::<false>(skb), act(number))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn from_pod_answer(skb: *mut __sk_buff, number: u32) -> i32 {
    program::answer::<FromPod, _>(Skb::<false>(skb), act(number))
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn at_pod_answer(skb: *mut __sk_buff, number: u32) -> i32 {
    program::answer::<ToPod, _>(Skb::<true>(skb), act(number))
}

/// The same as `answer`, of a packet to the pod inside the pod.
#[inline(always)]
pub fn answer_at_pod(skb: *mut __sk_buff, act: Act) -> i32 {
    at_pod_answer(skb, number(act))
}

/// Answers the packet's sender, and the far end of an established connection; or gives the packet to the agent.
#[inline(always)]
pub fn answer(direction: Direction, skb: *mut __sk_buff, act: Act) -> i32 {
    match direction {
        Direction::ToPod => to_pod_answer(skb, number(act)),
        Direction::FromPod => from_pod_answer(skb, number(act)),
    }
}

/// The chain of an IPv6 packet's extension headers, as the number that it is handed over as.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn walk(skb: *mut __sk_buff, chain: u64, end: u32) -> u64 {
    Chain::from_number(chain)
        .walk(&Skb::<false>(skb), end)
        .to_number()
}
