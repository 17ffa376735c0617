//! Packets by hand: segments, headers, sums.

use std::net::IpAddr;

/// TCP's number.
pub(crate) const TCP: u8 = 6;

pub(crate) fn insert(bytes: &[u8], at: usize, more: &[u8]) -> Vec<u8> {
    [&bytes[..at], more, &bytes[at..]].concat()
}

pub(crate) fn tcp(
    source: IpAddr,
    destination: IpAddr,
    port: u16,
    flags: u16,
    sequence: [u8; 4],
    data: &[u8],
) -> Vec<u8> {
    let mut segment = vec![0x9c, 0x40];
    segment.extend(port.to_be_bytes());
    segment.extend(sequence);
    segment.extend([0, 0, 0, 1]);
    segment.extend((0x5000 | flags).to_be_bytes());
    segment.extend([0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(data);
    let length = u32::try_from(segment.len()).unwrap();
    let pseudo = [
        octets(source),
        octets(destination),
        length.to_be_bytes().to_vec(),
        vec![0, 0, 0, TCP],
    ]
    .concat();
    let sum = checksum(&[pseudo, segment.clone()].concat());
    segment[16..18].copy_from_slice(&sum.to_be_bytes());
    segment
}

pub(crate) fn ip(source: IpAddr, destination: IpAddr, next: u8, payload: &[u8]) -> Vec<u8> {
    if source.is_ipv4() {
        let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
        let mut header = vec![0x45, 0, length[0], length[1], 0, 9, 0x40, 0, 64, next, 0, 0];
        header.extend(octets(source));
        header.extend(octets(destination));
        seal(&mut header);
        return [header, payload.to_vec()].concat();
    }
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    let header = vec![0x60, 0, 0, 0, length[0], length[1], next, 64];
    [header, octets(source), octets(destination), payload.to_vec()].concat()
}

pub(crate) fn with_options(packet: &[u8], options: &[u8]) -> Vec<u8> {
    let mut header = [&packet[..20], options].concat();
    header[0] = 0x40 | u8::try_from(header.len() / 4).unwrap();
    let length = u16::try_from(packet.len() + options.len()).unwrap();
    header[2..4].copy_from_slice(&length.to_be_bytes());
    seal(&mut header);
    [&header, &packet[20..]].concat()
}

pub(crate) fn fragment4(packet: &[u8], field: u16) -> Vec<u8> {
    let mut packet = packet.to_vec();
    packet[6..8].copy_from_slice(&field.to_be_bytes());
    seal(&mut packet[..20]);
    packet
}

/// Puts the sum into an IPv4 header.
fn seal(header: &mut [u8]) {
    header[10..12].copy_from_slice(&[0, 0]);
    let sum = checksum(header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap()
}
