//! IPv4 with options and fragments (RFC 791).

use super::non_tcp::Ip;
use super::{ETHERNET, Tcp, end_of, upper};
use crate::packet::{Kind, Packet, Parsed, TCP};
use crate::{Load, V4};

/// More fragments, and the offset: anything here means the ports may be elsewhere.
const FRAGMENTED: u16 = 0x3fff;
/// Units of eight bytes.
const OFFSET: u16 = 0x1fff;
const HEADER: u32 = 20;

/// Whether a frame's first 54 bytes, known to be IPv4, are of the usual shape.
#[inline(always)]
pub(super) fn is_plain<L: Load>(head: &[u8; 54]) -> bool {
    head[14] == 0x45 && head[23] == TCP && L::near16::<20, 54>(head) & FRAGMENTED == 0
}

/// Reads a frame of the usual shape (`parse::shape`); none when its lengths lie.
#[inline(always)]
pub fn plain<L: Load>(load: &L) -> Option<Packet<V4>> {
    let head = load.head::<54>()?;
    let addresses = (L::near32::<26, 54>(head), L::near32::<30, 54>(head));
    let end = end_of(load, ETHERNET, HEADER, u32::from(L::near16::<16, 54>(head)));
    let (l4, tcp) = (ETHERNET + HEADER, Tcp::near::<L, 34, 38, 42, 46, 54>(head));
    tcp.is_whole(l4, end)
        .then(|| tcp.packet(addresses, (ETHERNET, l4, end)))
}

/// Reads the IPv4 header at `l3`, of whatever shape, and what follows it.
#[inline(never)]
pub fn unusual<L: Load>(load: &L, l3: u32) -> Parsed<V4> {
    let first = load.far8(l3);
    let header = u32::from(first & 15) * 4;
    let end = end_of(load, l3, header, u32::from(load.far16(l3 + 2)));
    if first >> 4 != 4 || header < HEADER || end == 0 {
        return Parsed::empty(Kind::Invalid);
    }
    let fragmented = load.far16(l3 + 6) & FRAGMENTED != 0;
    let protocol = load.far8(l3 + 9);
    let addresses = (load.far32(l3 + 12), load.far32(l3 + 16));
    upper(load, addresses, protocol, (l3, l3 + header, end), fragmented)
}

/// Reads the IPv4 header at `l3`, which `unusual` has found good.
#[inline(always)]
pub(super) fn non_tcp<L: Load>(load: &L, l3: u32) -> Ip<V4> {
    let header = u32::from(load.far8(l3) & 15) * 4;
    let end = end_of(load, l3, header, u32::from(load.far16(l3 + 2)));
    ip(load, l3, end)
}

/// Reads the header of a packet that an ICMP error carries, from `l3` on; its own length means nothing here.
#[inline(always)]
pub(super) fn embedded<L: Load>(load: &L, l3: u32, end: u32) -> Ip<V4> {
    let first = load.far8(l3);
    let good = first >> 4 == 4 && first & 15 >= 5;
    Ip {
        protocol: if good { load.far8(l3 + 9) } else { 0 },
        ..ip(load, l3, end)
    }
}

#[inline(always)]
fn ip<L: Load>(load: &L, l3: u32, end: u32) -> Ip<V4> {
    let field = load.far16(l3 + 6);
    Ip {
        addresses: (load.far32(l3 + 12), load.far32(l3 + 16)),
        protocol: load.far8(l3 + 9),
        hops: load.far8(l3 + 8),
        l4: l3 + u32::from(load.far8(l3) & 15) * 4,
        end,
        is_fragment: field & FRAGMENTED != 0,
        offset: field & OFFSET,
        id: u32::from(load.far16(l3 + 4)),
    }
}
