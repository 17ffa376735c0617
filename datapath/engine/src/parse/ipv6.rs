//! IPv6 with its chain of extension headers (RFC 8200 section 4).

use super::non_tcp::Ip;
use super::{ETHERNET, Tcp, end_of, upper};
use crate::family::Address6;
use crate::packet::{Kind, Packet, Parsed, TCP};
use crate::{Load, V6};

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;
const HIP: u8 = 139;
const SHIM6: u8 = 140;
/// Longer chains are refused; real ones have one or two.
const MAX_EXTENSIONS: u32 = 6;
const HEADER: u32 = 40;
/// Offset and more-fragments bit of a fragment header; both zero is a whole packet in one piece.
const FRAGMENTED: u16 = 0xfff9;
const OFFSET: u16 = 0xfff8;

/// Whether a frame's first 54 bytes, known to be IPv6, are of the usual shape.
#[inline(always)]
pub(super) fn is_plain(head: &[u8; 54]) -> bool {
    head[14] >> 4 == 6 && head[20] == TCP
}

/// Reads a frame of the usual shape (`parse::shape`); none when its lengths lie.
#[inline(always)]
pub fn plain<L: Load>(load: &L) -> Option<Packet<V6>> {
    let head = load.head::<74>()?;
    let source = Address6 {
        high: L::near64::<22, 74>(head),
        low: L::near64::<30, 74>(head),
    };
    let destination = Address6 {
        high: L::near64::<38, 74>(head),
        low: L::near64::<46, 74>(head),
    };
    let end = end_of(load, ETHERNET, HEADER, claimed(L::near16::<18, 74>(head)));
    let (l4, tcp) = (ETHERNET + HEADER, Tcp::near::<L, 54, 58, 62, 66, 74>(head));
    tcp.is_whole(l4, end)
        .then(|| tcp.packet((source, destination), (ETHERNET, l4, end)))
}

/// Bytes from the header on, by the length field; 0 when that is 0, which only a merged packet may say.
#[inline(always)]
fn claimed(payload: u16) -> u32 {
    if payload == 0 {
        0
    } else {
        u32::from(payload) + HEADER
    }
}

/// Reads the IPv6 header at `l3`, of whatever shape, and what follows it.
#[inline(never)]
pub fn unusual<L: Load>(load: &L, l3: u32) -> Parsed<V6> {
    let claimed = claimed(load.far16(l3 + 4));
    // No payload at all is legal (next header 59), and then there is nothing to judge.
    let claimed = if claimed == 0 && !load.is_merged() {
        HEADER
    } else {
        claimed
    };
    let end = end_of(load, l3, HEADER, claimed);
    if load.far8(l3) >> 4 != 6 || end == 0 {
        return Parsed::empty(Kind::Invalid);
    }
    let (source, destination, chain) = headers(load, l3, end);
    if !chain.fragmented && is_extension(chain.protocol) {
        // Cut short: by the end of the packet, or by the bound.
        let kind = if chain.l4 + 8 > end {
            Kind::Invalid
        } else {
            Kind::Unsupported
        };
        return Parsed::empty(kind);
    }
    // A fragment's next header may be one more extension, and then TCP may follow.
    let protocol = if is_extension(chain.protocol) {
        TCP
    } else {
        chain.protocol
    };
    upper(
        load,
        (source, destination),
        protocol,
        (l3, chain.l4, end),
        chain.fragmented,
    )
}

/// Reads the IPv6 header at `l3`, which `unusual` has found good.
#[inline(always)]
pub(super) fn non_tcp<L: Load>(load: &L, l3: u32) -> Ip<V6> {
    let claimed = claimed(load.far16(l3 + 4));
    let claimed = if claimed == 0 && !load.is_merged() {
        HEADER
    } else {
        claimed
    };
    ip(load, l3, end_of(load, l3, HEADER, claimed))
}

/// Reads the header of a packet that an ICMP error carries, from `l3` on; its own length means nothing here.
#[inline(always)]
pub(super) fn embedded<L: Load>(load: &L, l3: u32, end: u32) -> Ip<V6> {
    let inner = ip(load, l3, end);
    let good = load.far8(l3) >> 4 == 6;
    Ip {
        protocol: if good { inner.protocol } else { 0 },
        ..inner
    }
}

/// Source, destination, and where the walk over the extension headers ends.
#[inline(always)]
fn headers<L: Load>(load: &L, l3: u32, end: u32) -> (Address6, Address6, Chain) {
    let source = Address6 {
        high: load.far64(l3 + 8),
        low: load.far64(l3 + 16),
    };
    let destination = Address6 {
        high: load.far64(l3 + 24),
        low: load.far64(l3 + 32),
    };
    let chain = Chain {
        protocol: load.far8(l3 + 6),
        l4: l3 + HEADER,
        fragmented: false,
    };
    (source, destination, load.walk(chain, end))
}

#[inline(always)]
fn ip<L: Load>(load: &L, l3: u32, end: u32) -> Ip<V6> {
    let (source, destination, chain) = headers(load, l3, end);
    // The walk ends at the fragment header of a piece.
    let (l4, field, id) = if chain.fragmented {
        (chain.l4 + 8, load.far16(chain.l4 + 2), load.far32(chain.l4 + 4))
    } else {
        (chain.l4, 0, 0)
    };
    Ip {
        addresses: (source, destination),
        protocol: chain.protocol,
        hops: load.far8(l3 + 7),
        l4,
        end,
        is_fragment: chain.fragmented,
        offset: field & OFFSET,
        id,
    }
}

/// A place in a chain of extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain {
    /// The header there.
    pub protocol: u8,
    /// Where it begins.
    pub l4: u32,
    /// Whether it is the fragment header of a piece.
    pub fragmented: bool,
}

impl Chain {
    /// To the first header that is no extension, or to a fragment, or as far as the packet and the bound go.
    #[must_use]
    #[inline(always)]
    pub fn walk<L: Load + ?Sized>(mut self, load: &L, end: u32) -> Self {
        for _ in 0..MAX_EXTENSIONS {
            if !is_extension(self.protocol) || self.l4 + 8 > end {
                break;
            }
            let [following, length] = load.far16(self.l4).to_be_bytes();
            let header = self.protocol;
            self.protocol = following;
            if header == FRAGMENT && load.far16(self.l4 + 2) & FRAGMENTED != 0 {
                self.fragmented = true;
                break;
            }
            self.l4 += match header {
                FRAGMENT => 8,
                AUTHENTICATION => (u32::from(length) + 2) * 4,
                _ => (u32::from(length) + 1) * 8,
            };
        }
        self
    }

    /// As one number.
    #[must_use]
    #[inline(always)]
    pub fn to_number(self) -> u64 {
        u64::from(self.l4) | u64::from(self.protocol) << 32 | u64::from(self.fragmented) << 40
    }

    /// From such a number.
    #[must_use]
    #[inline(always)]
    pub fn from_number(number: u64) -> Self {
        let [a, b, c, d, protocol, fragmented, ..] = number.to_le_bytes();
        Self {
            protocol,
            l4: u32::from_le_bytes([a, b, c, d]),
            fragmented: fragmented != 0,
        }
    }
}

#[inline(always)]
fn is_extension(header: u8) -> bool {
    matches!(
        header,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS | MOBILITY | HIP | SHIM6
    )
}
