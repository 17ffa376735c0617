//! Reading the bytes of a packet, wherever they are.
//!
//! Invariant: a read that is not wholly inside the packet gives none; nothing is padded or cut.

/// A packet's bytes, from the link header on.
pub trait Load {
    /// Bytes of the packet, link header included.
    fn length(&self) -> u32;

    /// The first `N` bytes where they lie, none when they are not in one piece (then `bytes` finds them).
    fn head<const N: usize>(&self) -> Option<&[u8; N]>;

    /// `N` bytes from `offset`.
    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;

    /// Whether the kernel holds several segments as one packet, whose IP length field may then be zero.
    fn is_merged(&self) -> bool;
}

#[cfg(not(target_arch = "bpf"))]
impl Load for [u8] {
    fn length(&self) -> u32 {
        u32::try_from(self.len()).unwrap_or(u32::MAX)
    }

    fn head<const N: usize>(&self) -> Option<&[u8; N]> {
        self.first_chunk()
    }

    fn bytes<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.get(usize::try_from(offset).ok()?..)?.first_chunk().copied()
    }

    fn is_merged(&self) -> bool {
        false
    }
}
