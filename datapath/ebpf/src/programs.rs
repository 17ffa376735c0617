//! The entry points.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use thyra_datapath_engine::program::{self, FromPod, ToPod};

use crate::node::ThisNode;
use crate::skb::Skb;

/// At the egress of the host veth: a packet on its way to the pod.
#[classifier]
pub fn to_pod(ctx: TcContext) -> i32 {
    program::run::<ToPod, _, _>(ThisNode::<true>, Skb(ctx.skb.skb))
}

/// At the ingress of the host veth: a packet that the pod sends.
#[classifier]
pub fn from_pod(ctx: TcContext) -> i32 {
    program::run::<FromPod, _, _>(ThisNode::<true>, Skb(ctx.skb.skb))
}

/// `to_pod` with `--local-redirect`.
#[classifier]
pub fn to_pod_direct(ctx: TcContext) -> i32 {
    program::to_pod_direct(ThisNode::<true>, Skb(ctx.skb.skb))
}

/// `from_pod` with `--local-redirect`.
#[classifier]
pub fn from_pod_direct(ctx: TcContext) -> i32 {
    program::from_pod_direct(ThisNode::<true>, Skb(ctx.skb.skb))
}

/// At the ingress of the agent's interface: a packet that it gives back.
#[classifier]
pub fn from_agent(ctx: TcContext) -> i32 {
    program::from_agent(ThisNode::<true>, Skb(ctx.skb.skb))
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
