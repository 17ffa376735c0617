//! Turning a refused packet into the segments that say so (`thyra_datapath_engine::reset`).
//!
//! Invariant: what leaves here carries Thyra's mark, so that the other program lets it pass and takes the
//! mark off; a segment that could not be written whole is dropped.
#![expect(
    clippy::as_conversions,
    reason = "helpers take lengths and flags as raw numbers of their own width"
)]

use aya_ebpf::bindings::BPF_F_INGRESS;
use aya_ebpf::helpers::generated::{
    bpf_clone_redirect, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh, bpf_skb_change_tail,
    bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use thyra_datapath_abi::EndpointRecord;
use thyra_datapath_abi::maps::OWN_MARK;
use thyra_datapath_engine::account::Direction;
use thyra_datapath_engine::program::{Hook as _, Maps as _};
use thyra_datapath_engine::reset::{self, Segment, TCP_HEADER};
use thyra_datapath_engine::tables::endpoint_at;
use thyra_datapath_engine::{Family, Packet};

use crate::direct;
use crate::node::ThisNode;
use crate::skb::{SHOT, Skb};

/// Bytes of an Ethernet header without tags.
const ETHERNET: u32 = 14;
/// Offset of the checksum in a TCP header.
const CHECKSUM: u32 = 16;

/// The kernel refused an operation.
pub(crate) struct Refused;

/// The sender of a SYN gets a reset as if the pod had sent it, so that translations on the way back apply.
#[inline(always)]
pub fn refuse<F: Family>(skb: Skb, packet: &Packet<F>, way: Way) -> i32 {
    if rewrite(skb, reset::refusal(packet)).is_err() {
        return SHOT;
    }
    if is_past_host_end(skb, way) {
        return direct::into_pod(skb, ifindex(skb));
    }
    if matches!(way, Way::Out) && packet.l3 == ETHERNET {
        // By the pod's own routes: whoever put the packet here may have left it another link's addresses. Since 5.10:
        // <https://github.com/torvalds/linux/commit/b4ab31414970a7a03a5d55d75083f2c101a30592>.
        // SAFETY: a helper that takes numbers, and no parameters.
        return unsafe { bpf_redirect_neigh(ifindex(skb), core::ptr::null_mut(), 0, 0) as i32 };
    }
    // SAFETY: a helper that takes numbers.
    unsafe { bpf_redirect(ifindex(skb), way.flags()) as i32 }
}

/// The sender gets a reset, the far end a bare ACK in the packet's own direction.
#[inline(always)]
pub fn revoke<F: Family>(skb: Skb, packet: &Packet<F>, way: Way) -> i32 {
    if rewrite(skb, reset::revocation(packet)).is_err() {
        return SHOT;
    }
    if is_past_host_end(skb, way) {
        return revoke_inside(skb, packet);
    }
    // SAFETY: a helper on the program's own context. If it fails, the next packet is answered again.
    let _lost = unsafe { bpf_clone_redirect(skb.0, ifindex(skb), way.flags()) };
    if rewrite(skb, reset::probe(packet)).is_err() {
        return SHOT;
    }
    skb.pass_own()
}

#[inline(always)]
fn ifindex(skb: Skb) -> u32 {
    // SAFETY: the program's own context.
    unsafe { (*skb.0).ifindex }
}

/// How a packet goes to where the one came from that is answered.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// In by the interface: by the host end, as if the pod had sent it.
    In,
    /// Out by the interface: by the host end to the pod; by the pod's own end, as if the pod had sent it.
    Out,
    /// Out by the host end, unless what comes to the pod is judged inside it.
    ToPod,
}

impl Way {
    #[inline(always)]
    pub const fn back(direction: Direction, at_pod: bool) -> Self {
        match (direction, at_pod) {
            (Direction::ToPod, false) => Self::In,
            (Direction::ToPod, true) => Self::Out,
            (Direction::FromPod, _) => Self::ToPod,
        }
    }

    #[inline(always)]
    fn flags(self) -> u64 {
        match self {
            Self::In => u64::from(BPF_F_INGRESS),
            Self::Out | Self::ToPod => 0,
        }
    }
}

/// Whether the mark would not be there any more where the pod judges what comes to it: it is zeroed between network
/// namespaces, but not where a packet is put straight into the pod.
#[inline(always)]
fn is_past_host_end(skb: Skb, way: Way) -> bool {
    matches!(way, Way::ToPod) && judges_inside(ifindex(skb)) != 0
}

/// A function of its own (`steps`), which Linux 6.1 needs for the stack.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judges_inside(ifindex: u32) -> u32 {
    let flags = ThisNode::<false>
        .open()
        .and_then(|node| endpoint_at(&node, ifindex).map(|(_, record)| record.flags));
    flags.unwrap_or(0) & EndpointRecord::AT_POD
}

/// As `revoke` of a packet that the pod sends. A clone can't be put straight into the pod: it is the far end's bare
/// ACK, which comes by here again.
#[inline(always)]
fn revoke_inside<F: Family>(skb: Skb, packet: &Packet<F>) -> i32 {
    if rewrite(skb, reset::probe(packet)).is_err() {
        return SHOT;
    }
    // SAFETY: a helper on the program's own context. If it fails, the next packet is answered again.
    let _lost = unsafe { bpf_clone_redirect(skb.0, ifindex(skb), u64::from(BPF_F_INGRESS)) };
    if rewrite(skb, reset::revocation(packet)).is_err() {
        return SHOT;
    }
    direct::into_pod(skb, ifindex(skb))
}

/// Writes `segment` in the place of the packet.
#[inline(always)]
fn rewrite<F: Family>(skb: Skb, segment: Segment<F>) -> Result<(), Refused> {
    let partial = match prepare(skb, segment.l4) {
        Prepared::REFUSED => return Err(Refused),
        prepared => prepared == Prepared::PARTIAL,
    };
    if write(skb, &segment, partial) {
        Ok(())
    } else {
        Err(Refused)
    }
}

/// A function of its own, because a program's stack is 512 bytes.
#[inline(never)]
fn write<F: Family>(skb: Skb, segment: &Segment<F>, partial: bool) -> bool {
    try_write(skb, segment, partial).is_ok()
}

#[inline(always)]
fn try_write<F: Family>(skb: Skb, segment: &Segment<F>, partial: bool) -> Result<(), Refused> {
    let (ip, tcp) = reset::bytes(segment, partial);
    store(skb, segment.l3, &ip)?;
    store(skb, segment.l4, &tcp)?;
    skb.set_mark(OWN_MARK);
    Ok(())
}

/// What `prepare` found; a number, since a function of its own returns nothing else.
struct Prepared;

impl Prepared {
    /// The kernel refused an operation.
    const REFUSED: u32 = 0;
    /// The checksum is the programs' to write.
    const WHOLE: u32 = 1;
    /// The device still has to add the checksum.
    const PARTIAL: u32 = 2;
}

/// Cuts the packet behind the TCP header that begins at `l4` and swaps its MACs: the second segment of a pair
/// swaps them back. A function of its own for the stack's sake, too.
#[inline(never)]
fn prepare(skb: Skb, l4: u32) -> u32 {
    match try_prepare(skb, l4) {
        Err(Refused) => Prepared::REFUSED,
        Ok(false) => Prepared::WHOLE,
        Ok(true) => Prepared::PARTIAL,
    }
}

#[inline(always)]
fn try_prepare(skb: Skb, l4: u32) -> Result<bool, Refused> {
    let partial = is_partial(skb, l4)?;
    // SAFETY: a helper on the program's own context.
    if unsafe { bpf_skb_change_tail(skb.0, l4 + TCP_HEADER, 0) } != 0 {
        return Err(Refused);
    }
    let (destination, source) = (load::<6>(skb, 0)?, load::<6>(skb, 6)?);
    store(skb, 0, &source)?;
    store(skb, 6, &destination)?;
    Ok(partial)
}

/// Whether the device still has to add the checksum (`CHECKSUM_PARTIAL`): then, and only then, a change that
/// is not in the pseudo-header leaves the checksum field as it is. `bpf_l4_csum_replace` →
/// `inet_proto_csum_replace2(pseudohdr = false)`, net/core/utils.c.
#[inline(always)]
fn is_partial(skb: Skb, l4: u32) -> Result<bool, Refused> {
    let before = load::<2>(skb, l4 + CHECKSUM)?;
    // SAFETY: a helper on the program's own context; the packet is rewritten right after.
    if unsafe { bpf_l4_csum_replace(skb.0, l4 + CHECKSUM, 0, 0x0100, 2) } != 0 {
        return Err(Refused);
    }
    Ok(before == load::<2>(skb, l4 + CHECKSUM)?)
}

#[inline(always)]
fn load<const N: usize>(skb: Skb, offset: u32) -> Result<[u8; N], Refused> {
    let mut bytes = [0; N];
    // SAFETY: the helper writes at most N bytes, or fails.
    let failed = unsafe { bpf_skb_load_bytes(skb.0.cast(), offset, bytes.as_mut_ptr().cast(), N as u32) };
    if failed == 0 { Ok(bytes) } else { Err(Refused) }
}

#[inline(always)]
pub(crate) fn store<T: Copy>(skb: Skb, offset: u32, bytes: &T) -> Result<(), Refused> {
    let from = core::ptr::from_ref(bytes).cast();
    // BPF_F_RECOMPUTE_CSUM: a sum that a device made over the whole packet stays true.
    // SAFETY: the helper reads the bytes of `T`, an array.
    let failed = unsafe { bpf_skb_store_bytes(skb.0, offset, from, size_of::<T>() as u32, 1) };
    if failed == 0 { Ok(()) } else { Err(Refused) }
}
