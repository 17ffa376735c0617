//! IPv6 with its chain of extension headers (RFC 8200 section 4).

use thyra_datapath_abi::Reason;

use super::{ETHERNET, TCP, TCP_HEADER, end_of, tcp, udp_ports};
use crate::family::Address6;
use crate::packet::{Datagram, Parsed};
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

/// Reads the IPv6 header at `l3` and what follows it.
#[inline(always)]
pub fn ipv6<L: Load + ?Sized>(load: &L, l3: u32) -> Parsed<V6> {
    // The usual case is read where it lies: Ethernet, no extension header, TCP.
    if l3 == ETHERNET
        && let Some(head) = load.head::<74>()
        && let Some((ip, rest)) = head[14..].split_first_chunk::<40>()
        && ip[6] == TCP
        && ip[0] >> 4 == 6
        && let Some(segment) = rest.first_chunk::<20>()
    {
        let header = Header::read(ip);
        return match end_of(load, ETHERNET, HEADER, header.total) {
            Some(end) => tcp(
                segment,
                (header.source, header.destination),
                (ETHERNET, ETHERNET + HEADER, end),
            ),
            None => Parsed::Bad(Reason::InvalidPacket),
        };
    }
    unusual(load, l3)
}

/// The fixed header.
struct Header {
    version: u8,
    next: u8,
    /// Bytes of the packet from the header on; 0 when the field is 0 (only a merged packet may say that).
    total: u32,
    source: Address6,
    destination: Address6,
}

impl Header {
    #[inline(always)]
    fn read(ip: &[u8; 40]) -> Self {
        let [first, _, _, _, l0, l1, next, _, addresses @ ..] = *ip;
        let [
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            s8,
            s9,
            sa,
            sb,
            sc,
            sd,
            se,
            sf,
            destination @ ..,
        ] = addresses;
        let source = [s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, sa, sb, sc, sd, se, sf];
        let payload = u32::from(u16::from_be_bytes([l0, l1]));
        Self {
            version: first >> 4,
            next,
            total: if payload == 0 { 0 } else { payload + HEADER },
            source: Address6::from_bytes(source),
            destination: Address6::from_bytes(destination),
        }
    }
}

/// Where a chain of extension headers ends.
enum Chain {
    /// At this protocol and offset.
    Upper {
        protocol: u8,
        l4: u32,
    },
    /// In a fragment; the protocol may be one more extension header.
    Fragment {
        protocol: u8,
    },
    Bad(Reason),
}

#[inline(never)]
fn unusual<L: Load + ?Sized>(load: &L, l3: u32) -> Parsed<V6> {
    let Some(ip) = load.bytes::<40>(l3) else {
        return Parsed::Bad(Reason::InvalidPacket);
    };
    let header = Header::read(&ip);
    if header.version != 6 {
        return Parsed::Bad(Reason::InvalidPacket);
    }
    // No payload at all is legal (next header 59), and then there is nothing to judge.
    let total = if header.total == 0 && !load.is_merged() {
        HEADER
    } else {
        header.total
    };
    let Some(end) = end_of(load, l3, HEADER, total) else {
        return Parsed::Bad(Reason::InvalidPacket);
    };
    let (source, destination) = (header.source, header.destination);
    match walk(load, header.next, l3 + HEADER, end) {
        Chain::Bad(reason) => Parsed::Bad(reason),
        Chain::Fragment { protocol } if protocol == TCP || is_extension(protocol) => {
            Parsed::Fragment(Datagram {
                source,
                destination,
                protocol,
                ports: [0; 4],
            })
        }
        Chain::Fragment { protocol } => Parsed::Other(Datagram {
            source,
            destination,
            protocol,
            ports: [0; 4],
        }),
        Chain::Upper { protocol, l4 } if protocol != TCP => {
            let ports = udp_ports(load, protocol, l4);
            Parsed::Other(Datagram {
                source,
                destination,
                protocol,
                ports,
            })
        }
        Chain::Upper { l4, .. } if l4 + TCP_HEADER > end => Parsed::Bad(Reason::InvalidPacket),
        Chain::Upper { l4, .. } => match load.bytes::<20>(l4) {
            Some(segment) => tcp(&segment, (source, destination), (l3, l4, end)),
            None => Parsed::Bad(Reason::InvalidPacket),
        },
    }
}

fn walk<L: Load + ?Sized>(load: &L, first: u8, start: u32, end: u32) -> Chain {
    let (mut next, mut at) = (first, start);
    for _ in 0..MAX_EXTENSIONS {
        if !is_extension(next) {
            return Chain::Upper {
                protocol: next,
                l4: at,
            };
        }
        if at + 8 > end {
            return Chain::Bad(Reason::InvalidPacket);
        }
        let Some([following, length, offset_high, offset_low]) = load.bytes::<4>(at) else {
            return Chain::Bad(Reason::InvalidPacket);
        };
        at += match next {
            FRAGMENT => 8,
            AUTHENTICATION => (u32::from(length) + 2) * 4,
            _ => (u32::from(length) + 1) * 8,
        };
        // Bits 15..3 are the offset, bit 0 says that more follow; both zero is a whole packet in one piece.
        if next == FRAGMENT && u16::from_be_bytes([offset_high, offset_low]) & 0xfff9 != 0 {
            return Chain::Fragment { protocol: following };
        }
        next = following;
    }
    if is_extension(next) {
        return Chain::Bad(Reason::UnsupportedShape);
    }
    Chain::Upper {
        protocol: next,
        l4: at,
    }
}

#[inline(always)]
fn is_extension(header: u8) -> bool {
    matches!(
        header,
        HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS | MOBILITY | HIP | SHIM6
    )
}
