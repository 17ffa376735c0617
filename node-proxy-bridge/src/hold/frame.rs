//! Frames of held connections: read as they come from the kernel, written as they go back.
//!
//! Invariant: what goes back is built anew from the copy: its lengths, sums and sequence numbers are those of its own
//! bytes, and it carries no urgent data and, of options, timestamps alone.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use thyra_datapath::TAP_HEADER;

/// FIN.
pub const FIN: u8 = 1;
/// SYN.
pub const SYN: u8 = 2;
/// RST.
pub const RST: u8 = 4;
/// PSH.
pub const PSH: u8 = 8;
/// ACK.
pub const ACK: u8 = 16;

const ETHERNET: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;
const TCP: usize = 20;
const PROTOCOL: u8 = 6;
/// Kinds of TCP options (RFC 9293 3.1).
const END: u8 = 0;
const NOP: u8 = 1;
const TIMESTAMPS: u8 = 8;
/// `struct virtio_net_hdr`: the checksum is still to be added.
const NEEDS_CSUM: u8 = 1;
/// The kernel has looked at the checksum.
const DATA_VALID: u8 = 2;
/// What every TCP/IP host takes (RFC 9293 3.7.1): 536 for IPv4; IPv6 has more.
const SMALLEST_SEGMENT: usize = 536;

/// The headers of a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Headers {
    bytes: Vec<u8>,
    /// Bytes of the IP header.
    ip: usize,
}

/// A segment on its way to the pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// The client's end.
    pub remote: SocketAddr,
    /// The pod's.
    pub local: SocketAddr,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgment number.
    pub acknowledgment: u32,
    /// Flags.
    pub flags: u8,
    /// What it carries.
    pub payload: &'a [u8],
    /// Most bytes that its sender puts into a segment, as far as this one shows.
    pub largest: usize,
    /// Its headers.
    pub headers: Headers,
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Reads a frame with its `TAP_HEADER`; none where it is no whole TCP segment of the plain shape, or its sum is wrong.
#[must_use]
pub fn read(frame: &[u8]) -> Option<Segment<'_>> {
    let (head, frame) = frame.split_at_checked(TAP_HEADER)?;
    let packet = frame.get(ETHERNET..)?;
    let (ip, length) = match be16(frame, 12)? {
        0x0800 if *packet.first()? == 0x45 && *packet.get(9)? == PROTOCOL => {
            // A fragment has no business here.
            (be16(packet, 6)? & 0x3fff == 0).then_some((IPV4, usize::from(be16(packet, 2)?)))?
        }
        0x86dd if *packet.get(6)? == PROTOCOL => (IPV6, IPV6 + usize::from(be16(packet, 4)?)),
        _ => return None,
    };
    let segment = packet.get(ip..length)?;
    let header = usize::from(*segment.get(12)? >> 4) * 4;
    if header < TCP || segment.len() < header {
        return None;
    }
    let (source, destination) = addresses(packet, ip)?;
    let is_known = head.first()? & (NEEDS_CSUM | DATA_VALID) != 0;
    if !is_known && fold(pseudo(packet, ip, segment.len())? + sum(segment)) != 0xffff {
        return None;
    }
    let merged = usize::from(u16::from_le_bytes([*head.get(4)?, *head.get(5)?]));
    let payload = segment.get(header..)?;
    Some(Segment {
        remote: SocketAddr::new(source, be16(segment, 0)?),
        local: SocketAddr::new(destination, be16(segment, 2)?),
        sequence: be32(segment, 4)?,
        acknowledgment: be32(segment, 8)?,
        flags: *segment.get(13)?,
        payload,
        largest: if head.get(1)? & 0x7f == 0 {
            payload.len()
        } else {
            merged
        }
        .max(SMALLEST_SEGMENT),
        headers: Headers {
            bytes: frame.get(..ETHERNET + ip + header)?.to_vec(),
            ip,
        },
    })
}

fn addresses(packet: &[u8], ip: usize) -> Option<(IpAddr, IpAddr)> {
    Some(if ip == IPV4 {
        let octets = |at| Some(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?));
        (octets(12)?.into(), octets(16)?.into())
    } else {
        let octets = |at| Some(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?));
        (octets(8)?.into(), octets(24)?.into())
    })
}

/// The sum of the pseudo-header, not folded.
fn pseudo(packet: &[u8], ip: usize, length: usize) -> Option<u32> {
    let addresses = if ip == IPV4 {
        packet.get(12..20)?
    } else {
        packet.get(8..40)?
    };
    Some(sum(addresses) + u32::from(PROTOCOL) + u32::try_from(length).ok()?)
}

/// The ones' complement sum, not folded; of at most 65,535 bytes.
fn sum(bytes: &[u8]) -> u32 {
    let mut words = bytes.chunks_exact(2);
    let whole: u32 = words
        .by_ref()
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
        .sum();
    whole + words.remainder().first().map_or(0, |last| u32::from(*last) << 8)
}

fn fold(mut sum: u32) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(u16::MAX)
}

/// What a segment says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgment number.
    pub acknowledgment: u32,
    /// Flags.
    pub flags: u8,
}

impl Headers {
    /// The headers, `TAP_HEADER` first, of a segment to the pod with these bytes.
    #[must_use]
    pub fn to_pod(&self, numbers: Numbers, payload: &[u8]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        only_timestamps(bytes.get_mut(ETHERNET + self.ip + TCP..).unwrap_or_default());
        finished(bytes, self.ip, numbers, payload)
    }

    /// A bare segment to the client, as if the pod had sent it.
    #[must_use]
    pub fn to_client(&self, numbers: Numbers) -> Vec<u8> {
        let mut bytes = self.without_options();
        let (ethernet, rest) = bytes.split_at_mut(ETHERNET);
        swap(ethernet, 0, 6);
        let (packet, segment) = rest.split_at_mut(self.ip);
        if self.ip == IPV4 {
            swap(packet, 12, 4);
            packet[8] = 64;
        } else {
            swap(packet, 8, 16);
            packet[7] = 64;
        }
        swap(segment, 0, 2);
        finished(bytes, self.ip, numbers, &[])
    }

    /// A bare segment to the pod.
    #[must_use]
    pub fn bare_to_pod(&self, numbers: Numbers) -> Vec<u8> {
        finished(self.without_options(), self.ip, numbers, &[])
    }

    fn without_options(&self) -> Vec<u8> {
        let mut bytes = self.bytes[..ETHERNET + self.ip + TCP].to_vec();
        bytes[ETHERNET + self.ip + 12] = 5 << 4;
        bytes
    }
}

/// Leaves of a segment's options the timestamps alone (RFC 7323 3.2): another may give its bytes another place than the
/// one in which they were judged (RFC 8684 3.3).
fn only_timestamps(options: &mut [u8]) {
    let mut at = 0;
    while let Some(kind) = options.get(at).copied() {
        let rest = options.len() - at;
        let length = match kind {
            END => rest,
            NOP => 1,
            _ => options.get(at + 1).map_or(rest, |length| usize::from(*length)),
        };
        // One that says it has no length, or more than there is, is the last.
        let length = if length == 0 { rest } else { length.min(rest) };
        if kind != TIMESTAMPS || length != 10 {
            options[at..at + length].fill(NOP);
        }
        at += length;
    }
}

/// The `length` bytes at `at` change places with those behind them.
fn swap(bytes: &mut [u8], at: usize, length: usize) {
    bytes[at..at + 2 * length].rotate_left(length);
}

/// The checksum is left to the kernel, which knows how whoever is next wants it.
fn finished(mut bytes: Vec<u8>, ip: usize, numbers: Numbers, payload: &[u8]) -> Vec<u8> {
    let (packet, l4) = (ETHERNET, ETHERNET + ip);
    let length = bytes.len() - l4 + payload.len();
    let total = |length: usize| u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes();
    if ip == IPV4 {
        bytes[packet + 2..packet + 4].copy_from_slice(&total(length + IPV4));
        bytes[packet + 10..packet + 12].fill(0);
        let sum = !fold(sum(&bytes[packet..l4]));
        bytes[packet + 10..packet + 12].copy_from_slice(&sum.to_be_bytes());
    } else {
        bytes[packet + 4..packet + 6].copy_from_slice(&total(length));
    }
    let sum = fold(pseudo(&bytes[packet..], ip, length).unwrap_or(0));
    let segment = &mut bytes[l4..];
    segment[4..8].copy_from_slice(&numbers.sequence.to_be_bytes());
    segment[8..12].copy_from_slice(&numbers.acknowledgment.to_be_bytes());
    segment[13] = numbers.flags;
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment[18..20].fill(0);
    let place = |at: usize| u16::try_from(at).unwrap_or(0).to_le_bytes();
    let ([s0, s1], [o0, o1], [h0, h1]) = (place(l4), place(16), place(bytes.len()));
    let mut all = vec![NEEDS_CSUM, 0, h0, h1, 0, 0, s0, s1, o0, o1];
    all.append(&mut bytes);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ethernet(kind: [u8; 2]) -> Vec<u8> {
        let mut frame = vec![0; TAP_HEADER];
        frame[0] = NEEDS_CSUM;
        frame.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
        frame.extend(kind);
        frame
    }

    fn segment(payload: &[u8]) -> Vec<u8> {
        let mut all = vec![
            0x9c,
            0x40,
            0x01,
            0xbb,
            0,
            0,
            0,
            11,
            0,
            0,
            0,
            101,
            5 << 4,
            ACK | PSH,
        ];
        all.extend([1, 0, 0, 0, 0, 9]);
        all.extend(payload);
        all
    }

    fn v4(payload: &[u8]) -> Vec<u8> {
        let mut frame = ethernet([8, 0]);
        let length = u8::try_from(40 + payload.len()).unwrap();
        frame.extend([
            0x45, 0, 0, length, 0, 0, 0x40, 0, 63, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
        ]);
        frame.extend(segment(payload));
        frame
    }

    fn v6(payload: &[u8]) -> Vec<u8> {
        let mut frame = ethernet([0x86, 0xdd]);
        let length = u8::try_from(20 + payload.len()).unwrap();
        frame.extend([0x60, 0, 0, 0, 0, length, 6, 63]);
        frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        frame.extend(segment(payload));
        frame
    }

    /// What the device would add.
    fn with_sum(mut frame: Vec<u8>) -> Vec<u8> {
        let ip = if frame[TAP_HEADER + 12] == 8 { IPV4 } else { IPV6 };
        let l4 = TAP_HEADER + ETHERNET + ip;
        frame[l4 + 16..l4 + 18].fill(0);
        let packet = &frame[TAP_HEADER + ETHERNET..];
        let total = !fold(pseudo(packet, ip, frame.len() - l4).unwrap() + sum(&frame[l4..]));
        frame[l4 + 16..l4 + 18].copy_from_slice(&total.to_be_bytes());
        frame[0] = 0;
        frame
    }

    #[test]
    fn a_segment_is_read_and_a_wrong_sum_is_not() {
        for frame in [v4(b"hello"), v6(b"hello")] {
            let read_one = read(&frame).unwrap();
            assert_eq!((read_one.sequence, read_one.acknowledgment), (11, 101));
            assert_eq!((read_one.remote.port(), read_one.local.port()), (40_000, 443));
            assert_eq!(
                (read_one.payload, read_one.flags),
                (b"hello".as_slice(), ACK | PSH)
            );
            let whole = with_sum(frame);
            assert!(read(&whole).is_some());
            let mut wrong = whole.clone();
            *wrong.last_mut().unwrap() ^= 1;
            assert_eq!(read(&wrong), None);
        }
    }

    #[test]
    fn of_options_timestamps_alone_go_back() {
        let times = [TIMESTAMPS, 10, 1, 2, 3, 4, 5, 6, 7, 8];
        let only = |options: &[u8]| {
            let mut options = options.to_vec();
            only_timestamps(&mut options);
            options
        };
        let usual = [&[NOP, NOP], &times[..]].concat();
        assert_eq!(only(&usual), usual);
        let multipath = [30, 4, 9, 9];
        let sacked = [5, 10, 0, 0, 0, 1, 0, 0, 0, 2];
        let cut = [&multipath[..], &sacked, &times].concat();
        assert_eq!(only(&cut), [&[NOP; 14], &times[..]].concat());
        for broken in [
            [30, 0, 8, 10],
            [30, 1, 30, 200],
            [TIMESTAMPS, 10, 1, 2],
            [NOP, NOP, NOP, 30],
        ] {
            assert_eq!(only(&broken), [NOP; 4], "{broken:?}");
        }
        assert_eq!(
            only(&[&[END], &times[..]].concat()),
            [NOP; 11],
            "nobody reads behind the end"
        );
    }

    #[test]
    fn whatever_is_cut_off_is_no_segment() {
        for frame in [v4(b"hello"), v6(b"hello")] {
            for length in 0..frame.len() {
                assert_eq!(read(&frame[..length]), None, "{length}");
            }
        }
    }

    #[test]
    fn what_goes_back_reads_as_what_it_says_and_has_no_urgent_data() {
        let numbers = Numbers {
            sequence: 7,
            acknowledgment: 9,
            flags: ACK,
        };
        for frame in [v4(b"hello"), v6(b"hello")] {
            let headers = read(&frame).unwrap().headers;
            let mut back = headers.to_pod(numbers, b"other bytes");
            back.extend(b"other bytes");
            let again = read(&back).unwrap();
            assert_eq!((again.sequence, again.acknowledgment, again.flags), (7, 9, ACK));
            assert_eq!(again.payload, b"other bytes");
            let l4 = back.len() - 11 - TCP;
            assert_eq!(back[l4 + 18..l4 + 20], [0, 0]);
            let reset = headers.to_client(Numbers {
                flags: RST | ACK,
                ..numbers
            });
            let reset = read(&reset).unwrap();
            assert_eq!((reset.remote.port(), reset.local.port()), (443, 40_000));
            assert_eq!(
                (reset.remote.ip(), reset.local.ip()),
                (again.local.ip(), again.remote.ip())
            );
        }
    }
}
