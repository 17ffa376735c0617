//! The entry points.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use thyra_datapath_engine::program::{self, FromPod, ToPod};

use crate::maps;
use crate::node::ThisNode;
use crate::skb::{SHOT, Skb};

/// At the egress of the host veth: a packet on its way to the pod.
#[classifier]
pub fn to_pod(ctx: TcContext) -> i32 {
    program::run::<ToPod, _, _>(ThisNode::<true>, Skb::<false>(ctx.skb.skb))
}

/// At the ingress of the host veth: a packet that the pod sends.
#[classifier]
pub fn from_pod(ctx: TcContext) -> i32 {
    program::run::<FromPod, _, _>(ThisNode::<true>, Skb::<false>(ctx.skb.skb))
}

/// `to_pod` with `--local-redirect`.
#[classifier]
pub fn to_pod_direct(ctx: TcContext) -> i32 {
    program::to_pod_direct(ThisNode::<true>, Skb::<false>(ctx.skb.skb))
}

/// `from_pod` with `--local-redirect`.
#[classifier]
pub fn from_pod_direct(ctx: TcContext) -> i32 {
    program::from_pod_direct(ThisNode::<true>, Skb::<false>(ctx.skb.skb))
}

/// Index of the host end of the veth that `to_pod_entry` belongs to: each pod has an instance of its own, which is
/// given this number when it is loaded.
#[unsafe(no_mangle)]
static HOST_IFINDEX: u32 = 0;

/// At the ingress of the pod's own end of the veth (`--hook=pod`). Interface indices repeat between network namespaces:
/// it says in which it is, and goes on to `to_pod_inside`, which all pods share.
#[classifier]
pub fn to_pod_entry(ctx: TcContext) -> i32 {
    // SAFETY: a number of this very program, which the loader has changed, and a field that tc programs may write.
    unsafe { (*ctx.skb.skb).cb[0] = core::ptr::read_volatile(&raw const HOST_IFINDEX) };
    // SAFETY: a program of the same kind, or none.
    unsafe { maps::INSIDE.tail_call(&ctx, 0) };
    // There was none.
    SHOT
}

/// `to_pod` there.
#[classifier]
pub fn to_pod_inside(ctx: TcContext) -> i32 {
    program::run::<ToPod, _, _>(ThisNode::<true>, Skb::<true>(ctx.skb.skb))
}

/// In the place of `to_pod` then.
#[classifier]
pub fn origin(ctx: TcContext) -> i32 {
    program::origin(ThisNode::<true>, Skb::<false>(ctx.skb.skb))
}

/// At the ingress of the agent's interface: a packet that it gives back.
#[classifier]
pub fn from_agent(ctx: TcContext) -> i32 {
    program::from_agent(ThisNode::<true>, Skb::<false>(ctx.skb.skb))
}

/// Lets every packet go on: what benchmarks compare with. Never attached to a pod.
#[classifier]
pub fn empty(_: TcContext) -> i32 {
    crate::skb::NEXT
}

/// Nothing here panics; the compiler asks for it, and the verifier would refuse the loop.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Helpers like `bpf_ktime_get_ns` are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual BSD/GPL\0";
