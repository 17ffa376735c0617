//! From bytes to the fields that decide; strict about lengths, bounded in work.
//!
//! ```text
//! Ethernet [802.1Q tag] IPv4 [options]            TCP
//!                       IPv6 [extension headers]  TCP
//! ```
//!
//! Invariant: a packet that is judged is judged by the ports that its receiver will read. Whatever leaves a
//! doubt (a header that ends outside the packet, a chain that is too long) is `Invalid`, `Unsupported` or a
//! `Fragment`.

pub mod ipv4;
pub mod ipv6;
pub mod non_tcp;

use crate::packet::{Kind, Packet, Parsed, TCP};
use crate::{Family, Load};

/// Length of an Ethernet header.
pub const ETHERNET: u32 = 14;
const TAG: u32 = 4;
const UDP: u8 = 17;
const TCP_HEADER: u32 = 20;
const UDP_HEADER: u32 = 8;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// 802.1Q, 802.1ad, and what came before 802.1ad: Linux reads the last two as no tag, other receivers may.
const TAGS: [u16; 4] = [0x8100, 0x88a8, 0x9100, 0x9200];

/// The usual shapes, which are read where they lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Ethernet, IPv4 without options, TCP, not a fragment: `ipv4::plain` reads it.
    Plain4,
    /// Ethernet, IPv6 without extension headers, TCP: `ipv6::plain` reads it.
    Plain6,
    /// Anything else: `link`, then `ipv4::unusual` or `ipv6::unusual`.
    Unusual,
}

/// Tells the usual shapes from the others.
#[inline(always)]
pub fn shape<L: Load>(load: &L) -> Shape {
    let Some(head) = load.head::<54>() else {
        return Shape::Unusual;
    };
    match L::near16::<12, 54>(head) {
        IPV4 if ipv4::is_plain::<L>(head) => Shape::Plain4,
        IPV6 if ipv6::is_plain(head) && load.head::<74>().is_some() => Shape::Plain6,
        _ => Shape::Unusual,
    }
}

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
    Bad(Kind),
}

/// Reads the link header.
#[inline(always)]
pub fn link<L: Load>(load: &L) -> Link {
    match load.far16(ETHERNET - 2) {
        IPV4 => Link::V4(ETHERNET),
        IPV6 => Link::V6(ETHERNET),
        kind if TAGS.contains(&kind) => tagged(load),
        _ if load.length() < ETHERNET => Link::Bad(Kind::Invalid),
        _ => Link::NotIp,
    }
}

/// Behind one VLAN tag; a tag that the kernel has taken out of the frame doesn't show here.
#[inline(always)]
fn tagged<L: Load>(load: &L) -> Link {
    match load.far16(ETHERNET + TAG - 2) {
        IPV4 => Link::V4(ETHERNET + TAG),
        IPV6 => Link::V6(ETHERNET + TAG),
        kind if TAGS.contains(&kind) => Link::Bad(Kind::Unsupported),
        _ if load.length() < ETHERNET + TAG => Link::Bad(Kind::Invalid),
        _ => Link::NotIp,
    }
}

/// A TCP header as four numbers: ports, sequence, acknowledgment, and length with flags.
#[derive(Clone, Copy)]
struct Tcp {
    ports: u32,
    sequence: u32,
    acknowledgment: u32,
    /// Upper four bits: 32-bit words of the header; lower eight: flags.
    length_flags: u16,
}

impl Tcp {
    #[inline(always)]
    fn near<
        L: Load,
        const AT: usize,
        const SEQUENCE: usize,
        const ACK: usize,
        const FLAGS: usize,
        const N: usize,
    >(
        head: &[u8; N],
    ) -> Self {
        const {
            assert!(
                SEQUENCE == AT + 4 && ACK == AT + 8 && FLAGS == AT + 12,
                "RFC 9293 3.1"
            )
        };
        Self {
            ports: L::near32::<AT, N>(head),
            sequence: L::near32::<SEQUENCE, N>(head),
            acknowledgment: L::near32::<ACK, N>(head),
            length_flags: L::near16::<FLAGS, N>(head),
        }
    }

    #[inline(always)]
    fn far<L: Load>(load: &L, at: u32) -> Self {
        Self {
            ports: load.far32(at),
            sequence: load.far32(at + 4),
            acknowledgment: load.far32(at + 8),
            length_flags: load.far16(at + 12),
        }
    }

    /// Whether the header that begins at `l4` is all there; `end` is where the IP packet ends.
    #[inline(always)]
    fn is_whole(self, l4: u32, end: u32) -> bool {
        let header = self.header();
        header >= TCP_HEADER && l4 + header <= end
    }

    /// Bytes of the header, options included.
    #[inline(always)]
    fn header(self) -> u32 {
        u32::from(self.length_flags >> 12) * 4
    }

    #[inline(always)]
    fn packet<F: Family>(
        self,
        (source, destination): (F::Address, F::Address),
        (l3, l4, end): (u32, u32, u32),
    ) -> Packet<F> {
        let [s0, s1, d0, d1] = self.ports.to_be_bytes();
        let [_, flags] = self.length_flags.to_be_bytes();
        Packet {
            source,
            destination,
            source_port: [s0, s1],
            destination_port: [d0, d1],
            sequence: self.sequence,
            acknowledgment: self.acknowledgment,
            flags,
            l3,
            l4,
            payload: end.wrapping_sub(l4 + self.header()),
        }
    }
}

/// Where the IP packet ends by its own word, 0 when it lies: beyond the packet, or before its header's end.
#[inline(always)]
fn end_of<L: Load>(load: &L, l3: u32, header: u32, claimed: u32) -> u32 {
    // A merged packet of 64 KiB or more carries the length 0 (BIG TCP).
    let end = if claimed == 0 && load.is_merged() {
        load.length()
    } else {
        l3 + claimed
    };
    if end <= load.length() && end >= l3 + header {
        end
    } else {
        0
    }
}

/// What follows the IP header and its extensions.
#[inline(always)]
fn upper<F: Family, L: Load>(
    load: &L,
    addresses: (F::Address, F::Address),
    protocol: u8,
    (l3, l4, end): (u32, u32, u32),
    fragmented: bool,
) -> Parsed<F> {
    let packet = Packet::without_ports(addresses.0, addresses.1);
    if fragmented {
        let kind = if protocol == TCP {
            Kind::Fragment
        } else {
            Kind::Other
        };
        return Parsed {
            kind,
            protocol,
            packet,
        };
    }
    match protocol {
        TCP => {
            let tcp = Tcp::far(load, l4);
            let kind = if tcp.is_whole(l4, end) {
                Kind::Tcp
            } else {
                Kind::Invalid
            };
            Parsed {
                kind,
                protocol,
                packet: tcp.packet(addresses, (l3, l4, end)),
            }
        }
        UDP if l4 + UDP_HEADER <= end => {
            let [s0, s1, d0, d1] = load.far32(l4).to_be_bytes();
            let packet = Packet {
                source_port: [s0, s1],
                destination_port: [d0, d1],
                ..packet
            };
            Parsed {
                kind: Kind::Other,
                protocol,
                packet,
            }
        }
        _ => Parsed {
            kind: Kind::Other,
            protocol,
            packet,
        },
    }
}
