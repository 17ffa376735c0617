//! IPv4 with options and fragments.

use thyra_datapath_abi::Reason;

use super::{ETHERNET, TCP, TCP_HEADER, end_of, tcp, udp_ports};
use crate::packet::{Datagram, Parsed};
use crate::{Load, V4};

/// More fragments, and the offset (RFC 791): anything here means the ports may be elsewhere.
const FRAGMENTED: u16 = 0x3fff;

/// Reads the IPv4 header at `l3` and what follows it.
#[inline(always)]
pub fn ipv4<L: Load + ?Sized>(load: &L, l3: u32) -> Parsed<V4> {
    // The usual case is read where it lies: Ethernet, no options, TCP.
    if l3 == ETHERNET
        && let Some(head) = load.head::<54>()
        && let Some((ip, rest)) = head[14..].split_first_chunk::<20>()
        && ip[0] == 0x45
        && ip[9] == TCP
        && let Some(segment) = rest.first_chunk::<20>()
    {
        return plain(load, ip, segment);
    }
    unusual(load, l3)
}

#[inline(always)]
fn plain<L: Load + ?Sized>(load: &L, ip: &[u8; 20], segment: &[u8; 20]) -> Parsed<V4> {
    let header = Header::read(ip);
    if header.fragment & FRAGMENTED != 0 {
        return unusual(load, ETHERNET);
    }
    match end_of(load, ETHERNET, 20, header.total) {
        Some(end) => tcp(
            segment,
            (header.source, header.destination),
            (ETHERNET, ETHERNET + 20, end),
        ),
        None => Parsed::Bad(Reason::InvalidPacket),
    }
}

/// The fixed part.
struct Header {
    version: u8,
    /// Bytes of the header, options included.
    length: u32,
    /// Bytes of the packet from the header on.
    total: u32,
    fragment: u16,
    protocol: u8,
    source: u32,
    destination: u32,
}

impl Header {
    #[inline(always)]
    fn read(ip: &[u8; 20]) -> Self {
        let [
            first,
            _,
            t0,
            t1,
            _,
            _,
            f0,
            f1,
            _,
            protocol,
            _,
            _,
            s0,
            s1,
            s2,
            s3,
            d0,
            d1,
            d2,
            d3,
        ] = *ip;
        Self {
            version: first >> 4,
            length: u32::from(first & 15) * 4,
            total: u32::from(u16::from_be_bytes([t0, t1])),
            fragment: u16::from_be_bytes([f0, f1]),
            protocol,
            source: u32::from_be_bytes([s0, s1, s2, s3]),
            destination: u32::from_be_bytes([d0, d1, d2, d3]),
        }
    }
}

#[inline(never)]
fn unusual<L: Load + ?Sized>(load: &L, l3: u32) -> Parsed<V4> {
    let Some(ip) = load.bytes::<20>(l3) else {
        return Parsed::Bad(Reason::InvalidPacket);
    };
    let header = Header::read(&ip);
    if header.version != 4 || header.length < 20 {
        return Parsed::Bad(Reason::InvalidPacket);
    }
    let Some(end) = end_of(load, l3, header.length, header.total) else {
        return Parsed::Bad(Reason::InvalidPacket);
    };
    let fragmented = header.fragment & FRAGMENTED != 0;
    let l4 = l3 + header.length;
    let ports = if fragmented {
        [0; 4]
    } else {
        udp_ports(load, header.protocol, l4)
    };
    let (source, destination, protocol) = (header.source, header.destination, header.protocol);
    let datagram = Datagram {
        source,
        destination,
        protocol,
        ports,
    };
    if protocol != TCP {
        return Parsed::Other(datagram);
    }
    if fragmented {
        return Parsed::Fragment(datagram);
    }
    if l4 + TCP_HEADER > end {
        return Parsed::Bad(Reason::InvalidPacket);
    }
    match load.bytes::<20>(l4) {
        Some(segment) => tcp(&segment, (source, destination), (l3, l4, end)),
        None => Parsed::Bad(Reason::InvalidPacket),
    }
}
