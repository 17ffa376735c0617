//! A packet in the kernel: its bytes, and how it ends.
//!
//! Invariant: the one place where an engine's decision becomes a return code. A packet that goes on returns
//! `TCX_NEXT`, so that the programs behind this one see it too.
#![expect(
    clippy::as_conversions,
    reason = "the context holds addresses as 32-bit numbers that the verifier widens; helpers take raw lengths"
)]

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::bpf_skb_load_bytes;
use thyra_datapath_abi::EndpointRecord;
use thyra_datapath_abi::maps::OWN_MARK;
use thyra_datapath_engine::account::Direction;
use thyra_datapath_engine::decide::hold::Back;
use thyra_datapath_engine::decide::{Act, Arrival};
use thyra_datapath_engine::parse::ipv6::Chain;
use thyra_datapath_engine::program::{self, Hook, Leg, Maps, Next, Program, Step, Whole};
use thyra_datapath_engine::{Family, Load, Packet};

use crate::segment::Way;
use crate::{direct, held, segment, steps};

/// The next program decides (`TCX_NEXT`, and `TC_ACT_UNSPEC` of clsact).
pub const NEXT: i32 = -1;
/// The packet is gone (`TC_ACT_SHOT`).
pub const SHOT: i32 = 2;

/// A packet at a tc hook; `AT_POD`: of the pod's own end of the veth, for the packets to the pod.
#[derive(Clone, Copy)]
pub struct Skb<const AT_POD: bool = false>(pub *mut __sk_buff);

impl<const AT_POD: bool> Skb<AT_POD> {
    /// Sets the packet's mark.
    #[inline(always)]
    pub fn set_mark(self, mark: u32) {
        // SAFETY: as above; tc programs may write this field.
        unsafe { (*self.0).mark = mark }
    }
}

/// A number of the packet, read in one piece wherever it lies: the kernel allows that on all its 64-bit
/// targets (CONFIG_HAVE_EFFICIENT_UNALIGNED_ACCESS), the compiler, left alone, reads single bytes.
macro_rules! load {
    ($type:ty, $instruction:literal, $head:expr, $at:expr) => {{
        let number: u64;
        // SAFETY: inside the head, which the caller has compared with the packet's end.
        unsafe {
            core::arch::asm!(
                $instruction,
                number = lateout(reg) number,
                head = in(reg) $head.as_ptr(),
                at = const $at,
                options(pure, readonly, nostack),
            );
        }
        <$type>::from_be(number as $type)
    }};
}

/// A number of the packet, copied by the kernel from wherever it is; the helper clears it when it fails.
#[inline(always)]
fn far<T: Default, const AT_POD: bool>(skb: Skb<AT_POD>, offset: u32) -> T {
    let mut number = T::default();
    let to = (&raw mut number).cast();
    // SAFETY: the helper writes the bytes of a number, or fails.
    let _failed = unsafe { bpf_skb_load_bytes(skb.0.cast(), offset, to, size_of::<T>() as u32) };
    number
}

impl<const AT_POD: bool> Load for Skb<AT_POD> {
    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).len }
    }
    #[inline(always)]
    fn is_merged(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0).gso_segs > 1 }
    }
    #[inline(always)]
    fn head<const N: usize>(&self) -> Option<&[u8; N]> {
        // SAFETY: compared with the end of the packet's first piece before it is made a reference.
        unsafe {
            let (start, end) = ((*self.0).data as usize, (*self.0).data_end as usize);
            if start + N > end {
                None
            } else {
                Some(&*(start as *const [u8; N]))
            }
        }
    }
    #[inline(always)]
    fn near16<const AT: usize, const N: usize>(head: &[u8; N]) -> u16 {
        load!(u16, "{number} = *(u16 *)({head} + {at})", head, AT)
    }
    #[inline(always)]
    fn near32<const AT: usize, const N: usize>(head: &[u8; N]) -> u32 {
        load!(u32, "{number} = *(u32 *)({head} + {at})", head, AT)
    }
    #[inline(always)]
    fn near64<const AT: usize, const N: usize>(head: &[u8; N]) -> u64 {
        load!(u64, "{number} = *(u64 *)({head} + {at})", head, AT)
    }
    #[inline(always)]
    fn far8(&self, offset: u32) -> u8 {
        far(*self, offset)
    }
    #[inline(always)]
    fn far16(&self, offset: u32) -> u16 {
        u16::from_be(far(*self, offset))
    }
    #[inline(always)]
    fn far32(&self, offset: u32) -> u32 {
        u32::from_be(far(*self, offset))
    }
    #[inline(always)]
    fn far64(&self, offset: u32) -> u64 {
        u64::from_be(far(*self, offset))
    }
    #[inline(always)]
    fn walk(&self, chain: Chain, end: u32) -> Chain {
        Chain::from_number(steps::walk(self.0, chain.to_number(), end))
    }
}

impl<const AT_POD: bool> Hook for Skb<AT_POD> {
    type End = i32;

    #[inline(always)]
    fn arrival(&self) -> Arrival {
        if AT_POD {
            return Arrival {
                // SAFETY: as below; `to_pod_entry`, which alone leads here, has left it there.
                ifindex: unsafe { (*self.0).cb[0] },
                at_pod: true,
                ..Arrival::default()
            };
        }
        // SAFETY: the context of a tc program; the verifier turns each read into one of the packet's record.
        unsafe {
            Arrival {
                ifindex: (*self.0).ifindex,
                ingress_ifindex: (*self.0).ingress_ifindex,
                // Asked only where it matters: reading it costs a branch and a load.
                has_socket: (*self.0).ingress_ifindex == 0 && !(*self.0).__bindgen_anon_2.sk.is_null(),
                at_pod: false,
            }
        }
    }

    #[inline(always)]
    fn is_own(&self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.0).mark == OWN_MARK }
    }
    #[inline(always)]
    fn pass(&self) -> i32 {
        NEXT
    }
    #[inline(always)]
    fn pass_own(&self) -> i32 {
        // The mark is Thyra's alone: the stack's own rules must not see it.
        self.set_mark(0);
        NEXT
    }
    #[inline(always)]
    fn drop(&self) -> i32 {
        SHOT
    }
    #[inline(always)]
    fn refuse<F: Family>(&self, packet: &Packet<F>, direction: Direction) -> i32 {
        segment::refuse(Skb(self.0), packet, Way::back(direction, AT_POD))
    }
    #[inline(always)]
    fn revoke<F: Family>(&self, packet: &Packet<F>, direction: Direction) -> i32 {
        segment::revoke(Skb(self.0), packet, Way::back(direction, AT_POD))
    }
    #[inline(always)]
    fn divert(&self) -> i32 {
        // Inside a pod the agent's interface has no number, and nothing is held there.
        if AT_POD { SHOT } else { held::divert() }
    }
    #[inline(always)]
    fn give_back(&self, back: Back) -> i32 {
        held::give_back(Skb(self.0), back)
    }
    #[inline(always)]
    fn redirect(&self, to: &EndpointRecord) -> i32 {
        direct::redirect(Skb(self.0), to)
    }
    #[inline(always)]
    fn revoke_into(&self, to: &EndpointRecord) -> i32 {
        if steps::answer(Direction::FromPod, self.0, Act::Revoke) == NEXT {
            direct::redirect(Skb(self.0), to)
        } else {
            SHOT
        }
    }
    #[inline(always)]
    fn is_taken<F: Family>(&self, packet: &Packet<F>, netns: u16) -> bool {
        direct::is_taken(Skb(self.0), packet, netns)
    }

    /// Of this node's maps: there are no others.
    #[inline(always)]
    fn step<P: Program, M: Maps>(&self, _: M, step: Step, at: u32) -> Next {
        if AT_POD {
            return Next(steps::step_at_pod(P::DIRECTION, step, self.0, at));
        }
        Next(steps::step(P::DIRECTION, step, self.0, at))
    }
    #[inline(always)]
    fn leg<F: Whole, M: Maps>(&self, _: M, leg: Leg, way: program::Way) -> program::Way {
        program::Way(direct::leg(F::VERSION, leg, self.0, way.0))
    }
    #[inline(always)]
    fn answer<P: Program>(&self, act: Act) -> i32 {
        if AT_POD {
            return steps::answer_at_pod(self.0, act);
        }
        steps::answer(P::DIRECTION, self.0, act)
    }
}
