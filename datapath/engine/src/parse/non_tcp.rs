//! Packets of other protocols than TCP, as far as their judgement needs.
//!
//! ```text
//! UDP, UDP-Lite, SCTP, DCCP   source port, destination port                     4 bytes are enough
//! ICMP echo                   type, code, checksum, identifier
//! ICMP error                  type, code, checksum, –, IP header, first bytes   of what the error is about
//! ```
//!
//! Invariant: read only after `unusual` has called the packet `Kind::Other`, whose IP header is whole then. What is too
//! short for its own header is `Shape::Cut`; of a fragmented packet the first piece alone has a header.

use thyra_datapath_abi::datagram;

use super::{ipv4, ipv6};
use crate::packet::{Kind, Packet, Parsed, TCP};
use crate::{Family, Load, V4, V6};

/// IP protocol number of ICMP.
pub const ICMP: u8 = 1;
const IGMP: u8 = 2;
/// IP protocol number of UDP.
pub const UDP: u8 = 17;
const DCCP: u8 = 33;
/// IP protocol number of ICMPv6.
pub const ICMP6: u8 = 58;
const SCTP: u8 = 132;
const UDP_LITE: u8 = 136;

/// Ports of DHCP (RFC 2131) and of DHCPv6 (RFC 8415 section 7.2), both ways.
const DHCP: [u32; 2] = [67 << 16 | 68, 68 << 16 | 67];
const DHCP6: [u32; 2] = [546 << 16 | 547, 547 << 16 | 546];
/// What no router has forwarded (RFC 4861), and what none would (RFC 3810, RFC 3376).
const ON_LINK: u8 = 255;
const ONE_HOP: u8 = 1;
/// ICMP's own header.
const ICMP_HEADER: u32 = 8;

/// What the packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Has ports, like UDP.
    Ports,
    /// A ping.
    EchoRequest,
    /// The answer to one.
    EchoReply,
    /// An ICMP error; `about` says about what.
    Error,
    /// What a link needs, of the kind that no router forwards: neighbour discovery, multicast listeners; and DHCP.
    Link,
    /// A later piece of a fragmented packet.
    Later,
    /// Ends before its header does.
    Cut,
    /// Nothing that can be judged by ports.
    Unknown,
}

/// What an ICMP error is about: a packet that the error's receiver has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct About<F: Family> {
    /// Its protocol; 0 when it can't be told.
    pub protocol: u8,
    /// Its source.
    pub source: F::Address,
    /// Its destination.
    pub destination: F::Address,
    /// Its source port; of a ping the identifier.
    pub source_port: [u8; 2],
    /// Its destination port; of a ping 0.
    pub destination_port: [u8; 2],
    /// Whether it is a ping itself, not an answer to one.
    pub is_ping: bool,
}

/// A packet that is not TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NonTcp<F: Family> {
    /// Protocol, addresses, and the ports where it has any.
    pub parsed: Parsed<F>,
    /// What it is.
    pub shape: Shape,
    /// The first of several pieces.
    pub is_first: bool,
    /// Identification of a fragmented packet.
    pub id: u32,
    /// Identifier of a ping.
    pub echo: [u8; 2],
}

/// What the IP header says.
#[derive(Clone, Copy)]
pub(super) struct Ip<F: Family> {
    pub(super) addresses: (F::Address, F::Address),
    pub(super) protocol: u8,
    pub(super) hops: u8,
    pub(super) l4: u32,
    pub(super) end: u32,
    pub(super) is_fragment: bool,
    /// Where the piece lies in the whole.
    pub(super) offset: u16,
    pub(super) id: u32,
}

impl<F: Family> NonTcp<F> {
    /// Reads what follows the IP header.
    #[inline(always)]
    pub(super) fn new<L: Load>(load: &L, ip: &Ip<F>) -> Self {
        let mut packet = Packet::without_ports(ip.addresses.0, ip.addresses.1);
        let (mut shape, mut echo) = (Shape::Unknown, [0; 2]);
        let has_ports = kind_of(ip.protocol) != 0;
        let is_icmp = ip.protocol == if F::VERSION == 4 { ICMP } else { ICMP6 };
        if ip.is_fragment && ip.offset != 0 {
            if has_ports || is_icmp {
                shape = Shape::Later;
            }
        } else if has_ports {
            let ports = load.far32(ip.l4);
            let [s0, s1, d0, d1] = ports.to_be_bytes();
            packet.source_port = [s0, s1];
            packet.destination_port = [d0, d1];
            let dhcp = if F::VERSION == 4 { DHCP } else { DHCP6 };
            shape = if ip.l4 + 8 > ip.end {
                Shape::Cut
            } else if ip.protocol == UDP && !ip.is_fragment && (ports == dhcp[0] || ports == dhcp[1]) {
                Shape::Link
            } else {
                Shape::Ports
            };
        } else if is_icmp {
            shape = if ip.l4 + ICMP_HEADER > ip.end {
                Shape::Cut
            } else {
                icmp::<F>(load.far8(ip.l4), ip.hops, ip.is_fragment)
            };
            echo = load.far16(ip.l4 + 4).to_be_bytes();
        } else if F::VERSION == 4 && ip.protocol == IGMP && ip.hops == ONE_HOP && !ip.is_fragment {
            shape = Shape::Link;
        }
        Self {
            parsed: Parsed {
                kind: Kind::Other,
                protocol: ip.protocol,
                packet,
            },
            shape,
            is_first: ip.is_fragment && ip.offset == 0,
            id: ip.id,
            echo,
        }
    }

    /// `abi::datagram`'s name for the protocol; 0 for one without ports.
    #[must_use]
    #[inline(always)]
    pub fn kind(&self) -> u32 {
        match self.shape {
            Shape::EchoRequest | Shape::EchoReply => datagram::ECHO,
            _ => kind_of(self.parsed.protocol),
        }
    }
}

/// `abi::datagram`'s name for a protocol with ports where UDP has them; else 0.
#[must_use]
#[inline(always)]
pub fn kind_of(protocol: u8) -> u32 {
    match protocol {
        UDP => datagram::UDP,
        UDP_LITE => datagram::UDP_LITE,
        SCTP => datagram::SCTP,
        DCCP => datagram::DCCP,
        _ => 0,
    }
}

/// What an ICMP type means; errors in fragments are no errors (RFC 792, RFC 4443), and neighbour discovery may not be
/// fragmented (RFC 6980).
#[inline(always)]
fn icmp<F: Family>(kind: u8, hops: u8, is_fragment: bool) -> Shape {
    match (F::VERSION, kind) {
        (4, 8) | (6, 128) => Shape::EchoRequest,
        (4, 0) | (6, 129) => Shape::EchoReply,
        (4, 3 | 11 | 12) | (6, 1..=4) if !is_fragment => Shape::Error,
        (6, 133..=137) if hops == ON_LINK && !is_fragment => Shape::Link,
        (6, 130..=132 | 143) if hops == ONE_HOP && !is_fragment => Shape::Link,
        _ => Shape::Unknown,
    }
}

/// Reads the IPv4 packet at `l3`.
#[inline(never)]
pub fn v4<L: Load>(load: &L, l3: u32) -> NonTcp<V4> {
    NonTcp::new(load, &ipv4::non_tcp(load, l3))
}

/// Reads the IPv6 packet at `l3`.
#[inline(never)]
pub fn v6<L: Load>(load: &L, l3: u32) -> NonTcp<V6> {
    NonTcp::new(load, &ipv6::non_tcp(load, l3))
}

/// What the ICMP error at `l3` is about.
#[inline(always)]
pub fn about4<L: Load>(load: &L, l3: u32) -> About<V4> {
    let outer = ipv4::non_tcp(load, l3);
    about(load, &ipv4::embedded(load, outer.l4 + ICMP_HEADER, outer.end))
}

/// The same of IPv6.
#[inline(always)]
pub fn about6<L: Load>(load: &L, l3: u32) -> About<V6> {
    let outer = ipv6::non_tcp(load, l3);
    about(load, &ipv6::embedded(load, outer.l4 + ICMP_HEADER, outer.end))
}

/// The packet that an ICMP error carries may be cut anywhere behind the ports (RFC 792, RFC 4443).
#[inline(always)]
fn about<F: Family, L: Load>(load: &L, inner: &Ip<F>) -> About<F> {
    let is_icmp = inner.protocol == if F::VERSION == 4 { ICMP } else { ICMP6 };
    let known = inner.protocol == TCP || is_icmp || kind_of(inner.protocol) != 0;
    let whole = inner.l4 + if is_icmp { 6 } else { 4 } <= inner.end;
    let kind = load.far8(inner.l4);
    let is_ping = is_icmp && kind == if F::VERSION == 4 { 8 } else { 128 };
    let is_pong = is_icmp && kind == if F::VERSION == 4 { 0 } else { 129 };
    let readable = known && whole && inner.offset == 0 && (!is_icmp || is_ping || is_pong);
    let [s0, s1, d0, d1] = load.far32(inner.l4).to_be_bytes();
    let (source_port, destination_port) = if is_icmp {
        (load.far16(inner.l4 + 4).to_be_bytes(), [0; 2])
    } else {
        ([s0, s1], [d0, d1])
    };
    About {
        protocol: if readable { inner.protocol } else { 0 },
        source: inner.addresses.0,
        destination: inner.addresses.1,
        source_port,
        destination_port,
        is_ping,
    }
}
