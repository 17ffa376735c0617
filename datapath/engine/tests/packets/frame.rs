//! Frames from a line of text: `10.0.0.1:40000 > 10.0.0.2:80 SA payload=4 vlan …`.
//!
//! | word | meaning |
//! | --- | --- |
//! | `S A F R P U` letters | TCP flags; `-` for none |
//! | `seq=N` `ack=N` `payload=N` | numbers, bytes after the header |
//! | `udp` `udplite` `sctp` `icmp` | instead of TCP flags |
//! | `proto=N` | instead of TCP: another protocol's number, whose ports stand first |
//! | `ping=N` `pong=N` | ICMP echo, with this identifier |
//! | `type=N` | ICMP of this type; of an error, `about=` and `by=` follow |
//! | `about=A>B` | the packet from A to B that an ICMP error carries, `by=N` its protocol (17 when not said) |
//! | `hops=N` | time to live, or hop limit |
//! | `vlan` `vlan2` | one or two 802.1Q tags |
//! | `tag=HEX` | one more tag of this Ethernet type |
//! | `options` | four bytes of IPv4 options, or a destination-options header |
//! | `extensions=N` | N IPv6 destination-options headers |
//! | `fragment` `later` | a first or a later fragment |
//! | `atomic` | an IPv6 fragment header with nothing left out |
//! | `short=N` | N bytes cut from the end, the length field unchanged |
//! | `length=N` | the IP length field says N |
//! | `offset=N` | the TCP header length field says N words |
//! | `ether=HEX` | instead of the whole: an Ethernet frame of this type |

use std::net::{IpAddr, SocketAddr};

const VLAN: [u8; 4] = [0x81, 0x00, 0x00, 0x07];
/// A destination-options header of eight bytes: the next header goes first.
const PADDING_OPTIONS: [u8; 7] = [0, 1, 4, 0, 0, 0, 0];
const TCP: u8 = 6;
const UDP: u8 = 17;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// The words of a line.
struct Line<'a> {
    words: Vec<&'a str>,
    text: &'a str,
}

impl Line<'_> {
    fn has(&self, word: &str) -> bool {
        self.words.contains(&word)
    }

    fn text(&self, key: &str) -> Option<&str> {
        let mut words = self.words.iter();
        words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }

    fn number(&self, key: &str) -> Option<u32> {
        let word = self.text(key)?;
        Some(
            word.parse()
                .unwrap_or_else(|_| panic!("`{}`: `{key}={word}` is no number", self.text)),
        )
    }

    fn flags(&self) -> u8 {
        let letters = self.words.first().unwrap_or(&"-");
        letters.chars().fold(0, |flags, letter| {
            flags
                | match letter {
                    'F' => 1,
                    'S' => 2,
                    'R' => 4,
                    'P' => 8,
                    'A' => 16,
                    'U' => 32,
                    '-' => 0,
                    other => panic!("`{}`: no TCP flag is called `{other}`", self.text),
                }
        })
    }
}

/// The bytes of the frame.
pub(crate) fn frame(text: &str) -> Vec<u8> {
    let mut bytes = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2];
    if let Some(kind) = text.strip_prefix("ether=") {
        bytes.extend(u16::from_str_radix(kind, 16).unwrap().to_be_bytes());
        bytes.extend([0; 46]);
        return bytes;
    }
    let (source, rest) = text
        .split_once(" > ")
        .unwrap_or_else(|| panic!("`{text}`: no ` > `"));
    let mut words = rest.split_whitespace();
    let address =
        |word: &str| -> SocketAddr { word.parse().unwrap_or_else(|_| panic!("`{text}`: `{word}`")) };
    let (source, destination) = (address(source), address(words.next().unwrap_or_default()));
    let line = Line {
        words: words.collect(),
        text,
    };
    for tag in ["vlan", "vlan2"] {
        if line.has(tag) || line.has("vlan2") {
            bytes.extend(VLAN);
        }
    }
    if let Some(kind) = line.text("tag") {
        bytes.extend(u16::from_str_radix(kind, 16).unwrap().to_be_bytes());
        bytes.extend(&VLAN[2..]);
    }
    let (protocol, segment) = upper(&line, source.port(), destination.port());
    let ip = match (source.ip(), destination.ip()) {
        (IpAddr::V4(s), IpAddr::V4(d)) => ipv4(&line, (s.octets(), d.octets()), protocol, &segment),
        (IpAddr::V6(s), IpAddr::V6(d)) => ipv6(&line, (s.octets(), d.octets()), protocol, &segment),
        _ => panic!("`{text}`: two families"),
    };
    bytes.extend(ip);
    let cut = usize::try_from(line.number("short").unwrap_or(0)).unwrap();
    bytes.truncate(bytes.len() - cut);
    bytes
}

fn upper(line: &Line<'_>, source: u16, destination: u16) -> (u8, Vec<u8>) {
    let payload = vec![0x2a; usize::try_from(line.number("payload").unwrap_or(0)).unwrap()];
    let ports = [source.to_be_bytes(), destination.to_be_bytes()].concat();
    let is_v6 = line.text.contains('[');
    let icmp = if is_v6 { 58 } else { 1 };
    if line.has("icmp") {
        return (icmp, [vec![128, 0, 0, 0, 0, 0, 0, 0], payload].concat());
    }
    for (word, v4, v6) in [("ping", 8, 128), ("pong", 0, 129)] {
        if let Some(id) = line.number(word) {
            let [a, b] = u16::try_from(id).unwrap().to_be_bytes();
            let kind = if is_v6 { v6 } else { v4 };
            return (icmp, [vec![kind, 0, 0, 0, a, b, 0, 1], payload].concat());
        }
    }
    if let Some(kind) = line.number("type") {
        let header = vec![u8::try_from(kind).unwrap(), 0, 0, 0, 0, 0, 0, 0];
        return (icmp, [header, about(line), payload].concat());
    }
    let other = [("udp", UDP), ("udplite", 136), ("sctp", 132)];
    let named = other.into_iter().find(|(word, _)| line.has(word));
    let number = line.number("proto").map(|number| u8::try_from(number).unwrap());
    if let Some(protocol) = number.or(named.map(|(_, number)| number)) {
        let length = u16::try_from(8 + payload.len()).unwrap().to_be_bytes();
        return (protocol, [ports, length.to_vec(), vec![0, 0], payload].concat());
    }
    let mut segment = ports;
    segment.extend(line.number("seq").unwrap_or(1000).to_be_bytes());
    segment.extend(line.number("ack").unwrap_or(0).to_be_bytes());
    let words = u8::try_from(line.number("offset").unwrap_or(5)).unwrap();
    segment.extend([words << 4, line.flags(), 0xff, 0xff, 0, 0, 0, 0]);
    segment.extend(payload);
    (TCP, segment)
}

/// The packet that an ICMP error is about: its IP header and eight bytes.
fn about(line: &Line<'_>) -> Vec<u8> {
    let Some(text) = line.text("about") else {
        return Vec::new();
    };
    let (source, destination) = text.split_once('>').unwrap();
    let (source, destination): (SocketAddr, SocketAddr) =
        (source.parse().unwrap(), destination.parse().unwrap());
    let protocol = u8::try_from(line.number("by").unwrap_or(17)).unwrap();
    let (s, d) = (source.port().to_be_bytes(), destination.port().to_be_bytes());
    // A ping's identifier is written as its source port.
    let upper = match protocol {
        1 => vec![8, 0, 0, 0, s[0], s[1], 0, 1],
        58 => vec![128, 0, 0, 0, s[0], s[1], 0, 1],
        _ => vec![s[0], s[1], d[0], d[1], 0, 0, 0, 0],
    };
    let empty = Line {
        words: Vec::new(),
        text: line.text,
    };
    let whole = match (source.ip(), destination.ip()) {
        (IpAddr::V4(s), IpAddr::V4(d)) => ipv4(&empty, (s.octets(), d.octets()), protocol, &upper),
        (IpAddr::V6(s), IpAddr::V6(d)) => ipv6(&empty, (s.octets(), d.octets()), protocol, &upper),
        _ => panic!("`{text}`: two families"),
    };
    whole[2..].to_vec()
}

/// The Ethernet type and what follows it.
fn ipv4(line: &Line<'_>, (source, destination): ([u8; 4], [u8; 4]), protocol: u8, segment: &[u8]) -> Vec<u8> {
    let options: &[u8] = if line.has("options") { &[1, 1, 1, 1] } else { &[] };
    let header = 20 + options.len();
    let length = line
        .number("length")
        .map_or(header + segment.len(), |n| usize::try_from(n).unwrap());
    let fragment: u16 = match (line.has("fragment"), line.has("later")) {
        (true, _) => 0x2000,
        (_, true) => 0x0003,
        _ => 0x4000,
    };
    let mut bytes = vec![0x08, 0x00, 0x40 | u8::try_from(header / 4).unwrap(), 0];
    bytes.extend(u16::try_from(length).unwrap().to_be_bytes());
    bytes.extend([0, 1]);
    bytes.extend(fragment.to_be_bytes());
    bytes.extend([hops(line), protocol, 0, 0]);
    bytes.extend(source);
    bytes.extend(destination);
    bytes.extend(options);
    bytes.extend(segment);
    bytes
}

/// The same for IPv6.
fn ipv6(
    line: &Line<'_>,
    (source, destination): ([u8; 16], [u8; 16]),
    protocol: u8,
    segment: &[u8],
) -> Vec<u8> {
    let mut next = protocol;
    let mut body = segment.to_vec();
    let mut put = |kind: u8, header: [u8; 7]| {
        body.splice(0..0, [&[next][..], &header].concat());
        next = kind;
    };
    let options = line
        .number("extensions")
        .unwrap_or(u32::from(line.has("options")));
    for _ in 0..options {
        put(DESTINATION_OPTIONS, PADDING_OPTIONS);
    }
    for (word, offset) in [("fragment", 1), ("later", 24), ("atomic", 0)] {
        if line.has(word) {
            put(FRAGMENT, [0, 0, offset, 0, 0, 0, 1]);
        }
    }
    let length = line
        .number("length")
        .map_or(body.len(), |n| usize::try_from(n).unwrap());
    let mut bytes = vec![0x86, 0xdd, 0x60, 0, 0, 0];
    bytes.extend(u16::try_from(length).unwrap().to_be_bytes());
    bytes.extend([next, hops(line)]);
    bytes.extend(source);
    bytes.extend(destination);
    bytes.extend(body);
    bytes
}

fn hops(line: &Line<'_>) -> u8 {
    u8::try_from(line.number("hops").unwrap_or(64)).unwrap()
}
