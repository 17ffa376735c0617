//! Reading the bytes of a packet, wherever they are.
//!
//! Invariant: a read that is not wholly inside the packet gives zero, and the parser compares lengths before
//! it believes a number. (An option would be safer, but what it leaves unset the compiler may spill, and the
//! verifier refuses to read that.) Numbers are read whole, never put together from bytes: the BPF target has
//! no unaligned loads of its own, and sixteen byte loads for an address cost more than its look-up.

use crate::parse::ipv6::Chain;

/// A packet's bytes, from the link header on. Numbers are in host byte order.
pub trait Load {
    /// Bytes of the packet, link header included.
    fn length(&self) -> u32;

    /// Whether the kernel holds several segments as one packet, whose IP length field may then be zero.
    fn is_merged(&self) -> bool;

    /// The first `N` bytes where they lie, none when they are not in one piece (then `far` finds them).
    fn head<const N: usize>(&self) -> Option<&[u8; N]>;

    /// The 16-bit number at `AT` in a head.
    fn near16<const AT: usize, const N: usize>(head: &[u8; N]) -> u16;
    /// The 32-bit number at `AT` in a head.
    fn near32<const AT: usize, const N: usize>(head: &[u8; N]) -> u32;
    /// The 64-bit number at `AT` in a head.
    fn near64<const AT: usize, const N: usize>(head: &[u8; N]) -> u64;

    /// The byte at `offset`, zero outside the packet; so are the others.
    fn far8(&self, offset: u32) -> u8;
    /// The 16-bit number at `offset`.
    fn far16(&self, offset: u32) -> u16;
    /// The 32-bit number at `offset`.
    fn far32(&self, offset: u32) -> u32;
    /// The 64-bit number at `offset`.
    fn far64(&self, offset: u32) -> u64;

    /// `Chain::walk`, by a function of its own in the kernel.
    fn walk(&self, chain: Chain, end: u32) -> Chain {
        chain.walk(self, end)
    }
}

/// `N` bytes of a slice, zeros outside it.
#[cfg(not(target_arch = "bpf"))]
pub(crate) fn chunk<const N: usize>(bytes: &[u8], offset: u32) -> [u8; N] {
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| bytes.get(offset..));
    rest.and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}
