//! What a refusal looks like on the wire: bare TCP segments in the place of the refused packet (RFC 9293
//! 3.5.2).
//!
//! ```text
//! SYN            → sender: RST|ACK  SEQ 0         ACK SEG.SEQ + SEG.LEN
//! anything else  → sender: RST      SEQ SEG.ACK
//!                → far end: ACK     SEQ SEG.SEQ−1 ACK SEG.ACK   (its answer is judged and gets the exact RST)
//! ```
//!
//! The far end gets no direct reset: SEG.SEQ is not what it expects when the packet is a keepalive or was
//! sent again, while an ACK outside the window is always answered with the right numbers.

use crate::family::Address6;
use crate::packet::{ACK, Packet, RST};
use crate::{Family, V4};

/// Bytes of a TCP header without options.
pub const TCP_HEADER: u32 = 20;
const TTL: u8 = 64;
const TCP: u8 = 6;

/// A bare segment that takes the place of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<F: Family> {
    /// Source address.
    pub source: F::Address,
    /// Destination address.
    pub destination: F::Address,
    /// Source port, network byte order.
    pub source_port: [u8; 2],
    /// Destination port, network byte order.
    pub destination_port: [u8; 2],
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgment number.
    pub acknowledgment: u32,
    /// Offset of the IP header, bytes.
    pub l3: u32,
    /// Offset of the TCP header, bytes.
    pub l4: u32,
    /// TCP flags.
    pub flags: u8,
}

impl<F: Family> Segment<F> {
    #[inline(always)]
    fn to_sender(packet: &Packet<F>, sequence: u32, acknowledgment: u32, flags: u8) -> Self {
        Self {
            source: packet.destination,
            destination: packet.source,
            source_port: packet.destination_port,
            destination_port: packet.source_port,
            sequence,
            acknowledgment,
            l3: packet.l3,
            l4: packet.l4,
            flags,
        }
    }
}

/// The answer to a refused SYN.
#[must_use]
#[inline(always)]
pub fn refusal<F: Family>(packet: &Packet<F>) -> Segment<F> {
    let acknowledgment = packet.sequence.wrapping_add(packet.segment_length());
    Segment::to_sender(packet, 0, acknowledgment, RST | ACK)
}

/// What the sender of a packet of a revoked connection gets.
#[must_use]
#[inline(always)]
pub fn revocation<F: Family>(packet: &Packet<F>) -> Segment<F> {
    Segment::to_sender(packet, packet.acknowledgment, 0, RST)
}

/// What the far end gets.
#[must_use]
#[inline(always)]
pub fn probe<F: Family>(packet: &Packet<F>) -> Segment<F> {
    Segment {
        source: packet.source,
        destination: packet.destination,
        source_port: packet.source_port,
        destination_port: packet.destination_port,
        sequence: packet.sequence.wrapping_sub(1),
        acknowledgment: packet.acknowledgment,
        l3: packet.l3,
        l4: packet.l4,
        flags: ACK,
    }
}

/// Whether a segment can take this packet's place: its TCP header is where a header without options ends, so
/// that the kernel's own notes about the packet (where its checksum goes) stay true.
#[must_use]
#[inline(always)]
pub fn fits<F: Family>(packet: &Packet<F>) -> bool {
    packet.l4 == packet.l3 + F::HEADER
}

/// The IP header and the TCP header of `segment`. With `partial`, the checksum field holds the
/// pseudo-header's sum alone, as the kernel keeps it in a packet whose checksum the device will add
/// (`CHECKSUM_PARTIAL`).
#[must_use]
#[inline(always)]
pub fn bytes<F: Family>(segment: &Segment<F>, partial: bool) -> (F::Header, [u8; 20]) {
    let (source, destination) = (segment.source, segment.destination);
    let pseudo = F::sum(source, destination) + u32::from(TCP) + TCP_HEADER;
    let [s0, s1, s2, s3] = segment.sequence.to_be_bytes();
    let [a0, a1, a2, a3] = segment.acknowledgment.to_be_bytes();
    let words = [
        segment.source_port,
        segment.destination_port,
        [s0, s1],
        [s2, s3],
        [a0, a1],
        [a2, a3],
        // Five words of header, then the flags; no window, no checksum yet, no urgent pointer.
        [5 << 4, segment.flags],
    ];
    let mut sum = pseudo;
    for word in words {
        sum += u32::from(u16::from_be_bytes(word));
    }
    let checksum = if partial { fold(pseudo) } else { !fold(sum) };
    let [[p0, p1], [d0, d1], ..] = words;
    let [c0, c1] = checksum.to_be_bytes();
    let tcp = [
        p0,
        p1,
        d0,
        d1,
        s0,
        s1,
        s2,
        s3,
        a0,
        a1,
        a2,
        a3,
        5 << 4,
        segment.flags,
        0,
        0,
        c0,
        c1,
        0,
        0,
    ];
    (F::header(source, destination), tcp)
}

#[inline(always)]
pub(crate) fn header4(source: u32, destination: u32) -> [u8; 20] {
    let length = V4::HEADER + TCP_HEADER;
    let first: u32 = 0x4500;
    let dont_fragment: u32 = 0x4000;
    let life = u32::from(u16::from_be_bytes([TTL, TCP]));
    let sum = first + length + dont_fragment + life + sum4(source) + sum4(destination);
    let [c0, c1] = (!fold(sum)).to_be_bytes();
    let [.., l0, l1] = length.to_be_bytes();
    let [s0, s1, s2, s3] = source.to_be_bytes();
    let [d0, d1, d2, d3] = destination.to_be_bytes();
    [
        0x45, 0, l0, l1, 0, 0, 0x40, 0, TTL, TCP, c0, c1, s0, s1, s2, s3, d0, d1, d2, d3,
    ]
}

#[inline(always)]
pub(crate) fn header6(source: Address6, destination: Address6) -> [u8; 40] {
    let [.., l0, l1] = TCP_HEADER.to_be_bytes();
    let mut header = [0; 40];
    let (fixed, addresses) = header.split_at_mut(8);
    fixed.copy_from_slice(&[0x60, 0, 0, 0, l0, l1, TCP, TTL]);
    let (first, second) = addresses.split_at_mut(16);
    first.copy_from_slice(&source.to_bytes());
    second.copy_from_slice(&destination.to_bytes());
    header
}

#[inline(always)]
pub(crate) fn sum4(address: u32) -> u32 {
    (address >> 16) + (address & 0xffff)
}

#[inline(always)]
pub(crate) fn sum6(address: Address6) -> u32 {
    sum8(address.high) + sum8(address.low)
}

#[inline(always)]
fn sum8(half: u64) -> u32 {
    let [a, b, c, d, e, f, g, h] = half.to_be_bytes();
    sum4(u32::from_be_bytes([a, b, c, d])) + sum4(u32::from_be_bytes([e, f, g, h]))
}

/// The ones' complement sum in 16 bits.
#[inline(always)]
fn fold(sum: u32) -> u16 {
    let once = sum4(sum);
    let [.., a, b] = sum4(once).to_be_bytes();
    u16::from_be_bytes([a, b])
}
