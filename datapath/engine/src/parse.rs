//! From bytes to the fields that decide; strict about lengths, bounded in work.
//!
//! ```text
//! Ethernet [802.1Q tag] IPv4 [options]            TCP
//!                       IPv6 [extension headers]  TCP
//! ```
//!
//! Invariant: a packet that is judged is judged by the ports that its receiver will read. Whatever leaves a doubt
//! (a header that ends outside the packet, a chain that is too long) is `Bad` with its reason, or a `Fragment`.

mod ipv4;
mod ipv6;

use thyra_datapath_abi::Reason;

pub use self::ipv4::ipv4;
pub use self::ipv6::ipv6;
use crate::packet::{Packet, Parsed};
use crate::{Family, Load};

/// Length of an Ethernet header.
pub const ETHERNET: u32 = 14;
const TAG: u32 = 4;
const TCP: u8 = 6;
const UDP: u8 = 17;
const TCP_HEADER: u32 = 20;

/// What follows the link header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// IPv4 at this offset.
    V4(u32),
    /// IPv6 at this offset.
    V6(u32),
    /// Neither.
    NotIp,
    /// Can't be judged.
    Bad(Reason),
}

/// Reads the link header.
#[inline(always)]
pub fn link<L: Load + ?Sized>(load: &L) -> Link {
    let kind = match load.head::<14>() {
        Some(&[.., a, b]) => [a, b],
        None => match load.bytes::<2>(ETHERNET - 2) {
            Some(kind) => kind,
            None => return Link::Bad(Reason::InvalidPacket),
        },
    };
    match kind {
        [0x08, 0x00] => Link::V4(ETHERNET),
        [0x86, 0xdd] => Link::V6(ETHERNET),
        [0x81, 0x00] | [0x88, 0xa8] => tagged(load),
        _ => Link::NotIp,
    }
}

/// Behind one VLAN tag; a tag that the kernel has taken out of the frame doesn't show here.
fn tagged<L: Load + ?Sized>(load: &L) -> Link {
    match load.bytes::<2>(ETHERNET + 2) {
        Some([0x08, 0x00]) => Link::V4(ETHERNET + TAG),
        Some([0x86, 0xdd]) => Link::V6(ETHERNET + TAG),
        Some([0x81, 0x00] | [0x88, 0xa8]) => Link::Bad(Reason::UnsupportedShape),
        Some(_) => Link::NotIp,
        None => Link::Bad(Reason::InvalidPacket),
    }
}

/// The fields of a TCP header; `end` is where the IP packet ends.
#[inline(always)]
fn tcp<F: Family>(
    header: &[u8; 20],
    (source, destination): (F::Address, F::Address),
    (l3, l4, end): (u32, u32, u32),
) -> Parsed<F> {
    let [s0, s1, d0, d1, q0, q1, q2, q3, a0, a1, a2, a3, offset, flags, ..] = *header;
    let header_length = u32::from(offset >> 4) * 4;
    let data = l4 + header_length;
    if header_length < TCP_HEADER || data > end {
        return Parsed::Bad(Reason::InvalidPacket);
    }
    Parsed::Tcp(Packet {
        source,
        destination,
        source_port: [s0, s1],
        destination_port: [d0, d1],
        sequence: u32::from_be_bytes([q0, q1, q2, q3]),
        acknowledgment: u32::from_be_bytes([a0, a1, a2, a3]),
        flags,
        l3,
        l4,
        payload: end - data,
    })
}

/// Where the IP packet ends by its own word, none when it lies: beyond the packet, or before its header's end.
#[inline(always)]
fn end_of<L: Load + ?Sized>(load: &L, l3: u32, header: u32, claimed: u32) -> Option<u32> {
    // A merged packet of 64 KiB or more carries the length 0 (BIG TCP).
    let end = if claimed == 0 && load.is_merged() {
        load.length()
    } else {
        l3 + claimed
    };
    (end <= load.length() && end >= l3 + header).then_some(end)
}

/// The ports of a UDP header; zero when it is not all there.
fn udp_ports<L: Load + ?Sized>(load: &L, protocol: u8, l4: u32) -> [u8; 4] {
    if protocol == UDP {
        load.bytes::<4>(l4).unwrap_or_default()
    } else {
        [0; 4]
    }
}
