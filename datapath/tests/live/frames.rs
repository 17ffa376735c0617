//! Ethernet frames that try to get TCP into a pod, one for every shape that there is.
//!
//! Each bears `MAGIC` and its number, as sequence number and again in its data, by which it is known where it arrives.

use std::net::IpAddr;

use crate::PORT;
use crate::node::Pod;
use crate::packet::{TCP, fragment4, insert, ip, tcp, with_options};

/// Begins what a probe is known by.
pub(crate) const MAGIC: [u8; 2] = *b"Th";

const SYN: u16 = 0x002;
const ACK: u16 = 0x010;
const PUSH_ACK: u16 = 0x018;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
/// `struct virtio_net_hdr`.
const NO_OFFLOAD: [u8; 10] = [0; 10];
const MORE: u16 = 0x2000;

/// A frame to send.
pub(crate) struct Probe {
    /// What is special about it.
    pub(crate) name: String,
    /// `struct virtio_net_hdr`, as `PACKET_VNET_HDR` wants it before the frame.
    pub(crate) offload: [u8; 10],
    /// From the destination's MAC address on.
    pub(crate) frame: Vec<u8>,
}

/// Collects probes; each gets the next number.
struct Probes {
    from: Pod,
    to: Pod,
    all: Vec<Probe>,
}

/// Every shape, in both families.
pub(crate) fn all(from: Pod, to: Pod) -> Vec<Probe> {
    let mut probes = Probes {
        from,
        to,
        all: Vec::new(),
    };
    probes.flags();
    probes.tags();
    probes.addresses();
    probes.options_and_extensions();
    probes.fragments();
    probes.lies();
    probes.offloads();
    probes.all
}

/// The number of a probe, wherever its mark lies.
pub(crate) fn number(frame: &[u8]) -> Option<usize> {
    let mark = frame.windows(4).find(|window| window.starts_with(&MAGIC))?;
    Some(usize::from(u16::from_be_bytes([mark[2], mark[3]])))
}

/// A bare ACK without data: what the programs themselves send to a pod to end a connection that is refused.
pub(crate) fn is_revocation(frame: &[u8]) -> bool {
    let (header, length) = match frame.get(12..14) {
        Some([0x08, 0x00]) => (34, usize::from(u16::from_be_bytes([frame[16], frame[17]])) + 14),
        Some([0x86, 0xdd]) => (54, usize::from(u16::from_be_bytes([frame[18], frame[19]])) + 54),
        _ => return false,
    };
    frame.get(header + 13) == Some(&0x10) && length == header + 20
}

impl Probes {
    fn mark(&self) -> [u8; 4] {
        let [high, low] = u16::try_from(self.all.len()).unwrap().to_be_bytes();
        [MAGIC[0], MAGIC[1], high, low]
    }

    fn push(&mut self, name: impl Into<String>, frame: Vec<u8>) {
        self.all.push(Probe {
            name: name.into(),
            offload: NO_OFFLOAD,
            frame,
        });
    }

    /// Addresses of a family, by name.
    fn ends(&self) -> [(&'static str, IpAddr, IpAddr); 2] {
        [
            ("v4", self.from.v4(), self.to.v4()),
            ("v6", self.from.v6(), self.to.v6()),
        ]
    }

    fn segment(&self, source: IpAddr, destination: IpAddr, flags: u16, data: bool) -> Vec<u8> {
        let mark = self.mark();
        tcp(
            source,
            destination,
            PORT,
            flags,
            mark,
            if data { &mark } else { &[] },
        )
    }

    fn flags(&mut self) {
        for (family, source, destination) in self.ends() {
            for flags in 0..512 {
                let segment = self.segment(source, destination, flags, false);
                let frame = self.ethernet(&ip(source, destination, TCP, &segment));
                self.push(format!("{family} flags {flags:#05x}"), frame);
                let segment = self.segment(source, destination, flags, true);
                let frame = self.ethernet(&ip(source, destination, TCP, &segment));
                self.push(format!("{family} flags {flags:#05x} with data"), frame);
            }
        }
    }

    fn tags(&mut self) {
        let tag = |kind: u16, id: u16| [kind.to_be_bytes(), id.to_be_bytes()].concat();
        let kinds = [0x8100, 0x88a8, 0x9100, 0x9200];
        for (family, source, destination) in self.ends() {
            for outer in kinds {
                for id in [0, 1, 7, 0x1fff] {
                    let segment = self.segment(source, destination, SYN, true);
                    let frame = self.ethernet(&ip(source, destination, TCP, &segment));
                    let name = if id == 7 {
                        String::new()
                    } else {
                        format!(" id {id}")
                    };
                    self.push(
                        format!("{family} tag {outer:#x}{name}"),
                        insert(&frame, 12, &tag(outer, id)),
                    );
                }
                for inner in kinds {
                    let segment = self.segment(source, destination, SYN, true);
                    let frame = self.ethernet(&ip(source, destination, TCP, &segment));
                    let tags = [tag(outer, 7), tag(inner, 8)].concat();
                    self.push(
                        format!("{family} tags {outer:#x} {inner:#x}"),
                        insert(&frame, 12, &tags),
                    );
                    let segment = self.segment(source, destination, SYN, true);
                    let frame = self.ethernet(&ip(source, destination, TCP, &segment));
                    let tags = [tags, tag(0x8100, 9)].concat();
                    self.push(
                        format!("{family} three tags {outer:#x} {inner:#x}"),
                        insert(&frame, 12, &tags),
                    );
                }
            }
        }
    }

    /// Sources that are somebody else's, and destinations that more than one pod has.
    fn addresses(&mut self) {
        let sources = [
            "10.244.0.4",
            "10.244.0.2",
            "10.244.0.1",
            "127.0.0.1",
            "0.0.0.0",
            "255.255.255.255",
            "224.0.0.1",
            "169.254.1.1",
            "fd00:10:244::4",
            "fd00:10:244::2",
            "::1",
            "::",
            "fe80::2",
            "ff02::1",
            "::ffff:10.244.0.2",
            "::ffff:10.244.0.3",
            "::10.244.0.2",
            "64:ff9b::af4:2",
            "2002:af4:2::1",
        ];
        let friend = if self.from == Pod(2) { "10.244.0.2" } else { "" };
        for source in sources.into_iter().filter(|source| *source != friend) {
            let source: IpAddr = source.parse().unwrap();
            let destination = if source.is_ipv4() {
                self.to.v4()
            } else {
                self.to.v6()
            };
            for flags in [SYN, ACK, PUSH_ACK, 0x012, 0x004, 0x001] {
                let segment = self.segment(source, destination, flags, true);
                let frame = self.ethernet(&ip(source, destination, TCP, &segment));
                self.push(format!("from {source} flags {flags:#x}"), frame);
            }
        }
        for destination in [
            "224.0.0.1",
            "255.255.255.255",
            "10.244.0.255",
            "ff02::1",
            "fe80::4",
            "::ffff:10.244.0.4",
        ] {
            let destination: IpAddr = destination.parse().unwrap();
            let source = if destination.is_ipv4() {
                self.from.v4()
            } else {
                self.from.v6()
            };
            let segment = self.segment(source, destination, SYN, true);
            let frame = self.ethernet(&ip(source, destination, TCP, &segment));
            self.push(format!("to {destination}"), frame.clone());
            let mut everybody = frame;
            everybody[..6].copy_from_slice(&[0xff; 6]);
            self.renumber(format!("to {destination} as a broadcast"), everybody);
        }
        for port in [0, 1, 22, 8080, 8081, 15_021, 65_535] {
            for (family, source, destination) in self.ends() {
                let mark = self.mark();
                let segment = tcp(
                    source,
                    destination,
                    if port == 8080 { PORT } else { port },
                    SYN,
                    mark,
                    &mark,
                );
                let frame = self.ethernet(&ip(source, destination, TCP, &segment));
                self.push(format!("{family} port {port}"), frame);
            }
        }
    }

    /// Takes a frame that was made for the number before.
    fn renumber(&mut self, name: String, mut frame: Vec<u8>) {
        let mark = self.mark();
        let last = u16::try_from(self.all.len() - 1).unwrap().to_be_bytes();
        let before = [MAGIC[0], MAGIC[1], last[0], last[1]];
        for at in 0..frame.len() - 3 {
            if frame[at..at + 4] == before {
                frame[at..at + 4].copy_from_slice(&mark);
            }
        }
        self.push(name, frame);
    }

    fn options_and_extensions(&mut self) {
        let (source, destination) = (self.from.v4(), self.to.v4());
        let options: [(&str, &[u8]); 6] = [
            ("no operation", &[1; 40]),
            ("end of list", &[0; 4]),
            ("record route", &[7, 7, 4, 0, 0, 0, 0, 0]),
            ("source route", &[131, 7, 4, 10, 244, 0, 4, 0]),
            ("router alert", &[148, 4, 0, 0]),
            ("a length that lies", &[131, 255, 4, 0]),
        ];
        for (name, options) in options {
            for flags in [SYN, PUSH_ACK] {
                let segment = self.segment(source, destination, flags, true);
                let packet = with_options(&ip(source, destination, TCP, &segment), options);
                let frame = self.ethernet(&packet);
                self.push(format!("v4 option {name} flags {flags:#x}"), frame);
            }
        }
        let (source, destination) = (self.from.v6(), self.to.v6());
        for kind in [HOP_BY_HOP, ROUTING, AUTHENTICATION, DESTINATION, 135, 139, 140] {
            for count in [1, 2, 5, 6, 7, 12] {
                let mut payload = self.segment(source, destination, SYN, true);
                let mut next = TCP;
                for _ in 0..count {
                    let length = u8::from(kind == AUTHENTICATION);
                    let mut header = vec![next, length, 1, 4, 0, 0, 0, 0];
                    if kind == ROUTING {
                        header[2..4].copy_from_slice(&[0, 0]);
                    }
                    if kind == AUTHENTICATION {
                        header.extend([0; 4]);
                    }
                    payload = [header, payload].concat();
                    next = kind;
                }
                let frame = self.ethernet(&ip(source, destination, next, &payload));
                self.push(format!("v6 header {kind} × {count}"), frame);
            }
        }
    }

    fn fragments(&mut self) {
        let (source, destination) = (self.from.v4(), self.to.v4());
        let cuts: [(&str, usize, usize, u16); 6] = [
            ("first", 0, 24, MORE),
            ("tiny first", 0, 8, MORE),
            ("second", 24, 64, 3),
            ("at offset 1", 0, 64, 1),
            ("overlapping", 8, 64, 1),
            ("last, far behind", 0, 64, 0x1ff0),
        ];
        for (name, from, to, field) in cuts {
            let segment = self.long_segment(source, destination);
            let packet = fragment4(&ip(source, destination, TCP, &segment[from..to]), field);
            let frame = self.ethernet(&packet);
            self.push(format!("v4 fragment {name}"), frame);
        }
        let (source, destination) = (self.from.v6(), self.to.v6());
        for (name, from, to, field) in cuts {
            for next in [TCP, HOP_BY_HOP, ROUTING, DESTINATION, FRAGMENT] {
                let mut payload = self.long_segment(source, destination)[from..to].to_vec();
                if next != TCP {
                    payload = [vec![TCP, 0, 1, 4, 0, 0, 0, 0], payload].concat();
                }
                let more = u16::from(field == MORE);
                let offset = (field & 0x1fff) << 3 | more;
                let header = [vec![next, 0], offset.to_be_bytes().to_vec(), vec![0, 0, 0, 9]].concat();
                let frame = self.ethernet(&ip(source, destination, FRAGMENT, &[header, payload].concat()));
                self.push(format!("v6 fragment {name} of {next}"), frame);
            }
        }
        let segment = self.segment(source, destination, SYN, true);
        let atomic = [vec![TCP, 0, 0, 0, 0, 0, 0, 9], segment].concat();
        let frame = self.ethernet(&ip(source, destination, FRAGMENT, &atomic));
        self.push("v6 atomic fragment", frame);
    }

    /// 64 bytes with the mark all over, so that every piece is known.
    fn long_segment(&self, source: IpAddr, destination: IpAddr) -> Vec<u8> {
        let mark = self.mark();
        tcp(source, destination, PORT, PUSH_ACK, mark, &mark.repeat(11))
    }

    /// Lengths, versions and sums that aren't so.
    fn lies(&mut self) {
        for (family, source, destination) in self.ends() {
            let start = 14;
            let at: &[(&str, usize, u8)] = if source.is_ipv4() {
                &[
                    ("header length 4", start, 0x44),
                    ("header length 6", start, 0x46),
                    ("header length 15", start, 0x4f),
                    ("version 5", start, 0x55),
                    ("version 6", start, 0x65),
                    ("total length 0", start + 3, 0),
                    ("total length 21", start + 3, 21),
                    ("total length 255", start + 3, 255),
                    ("lifetime 0", start + 8, 0),
                    ("a wrong sum", start + 10, 0xab),
                    ("data offset 0", start + 32, 0x00),
                    ("data offset 15", start + 32, 0xf0),
                    ("a wrong TCP sum", start + 36, 0xab),
                ]
            } else {
                &[
                    ("version 4", start, 0x45),
                    ("version 7", start, 0x70),
                    ("payload length 0", start + 5, 0),
                    ("payload length 1", start + 5, 1),
                    ("payload length 255", start + 5, 255),
                    ("hop limit 0", start + 7, 0),
                    ("data offset 0", start + 52, 0x00),
                    ("data offset 15", start + 52, 0xf0),
                    ("a wrong TCP sum", start + 56, 0xab),
                ]
            };
            for (name, at, value) in at {
                for flags in [SYN, PUSH_ACK] {
                    let segment = self.segment(source, destination, flags, true);
                    let mut frame = self.ethernet(&ip(source, destination, TCP, &segment));
                    frame[*at] = *value;
                    self.push(format!("{family} {name} flags {flags:#x}"), frame);
                }
            }
            let segment = self.segment(source, destination, SYN, true);
            let mut other = self.ethernet(&ip(source, destination, TCP, &segment));
            let swapped: [u8; 2] = if source.is_ipv4() {
                [0x86, 0xdd]
            } else {
                [0x08, 0x00]
            };
            other[12..14].copy_from_slice(&swapped);
            self.push(format!("{family} under the other's type"), other);
            let segment = self.segment(source, destination, SYN, true);
            let padded = [
                self.ethernet(&ip(source, destination, TCP, &segment)),
                vec![0; 200],
            ]
            .concat();
            self.push(format!("{family} with padding"), padded);
        }
    }

    /// Ten segments in one frame, and a sum that is still to be made.
    fn offloads(&mut self) {
        for (family, source, destination) in self.ends() {
            let (kind, header) = if source.is_ipv4() { (1, 34_u16) } else { (4, 54) };
            for (name, kind) in [
                ("segments", kind),
                ("segments with ECN", kind | 0x80),
                ("a partial sum", 0),
            ] {
                let mark = self.mark();
                let data = mark.repeat(if kind == 0 { 10 } else { 2500 });
                let segment = tcp(source, destination, PORT, PUSH_ACK, mark, &data);
                let frame = self.ethernet(&ip(source, destination, TCP, &segment));
                let size: u16 = if kind == 0 { 0 } else { 1000 };
                let mut offload = [1, kind, 0, 0, 0, 0, 0, 0, 0, 0];
                for (at, value) in [(2, header + 20), (4, size), (6, header), (8, 16)] {
                    offload[at..at + 2].copy_from_slice(&value.to_ne_bytes());
                }
                self.all.push(Probe {
                    name: format!("{family} {name}"),
                    offload,
                    frame,
                });
            }
        }
    }

    fn ethernet(&self, packet: &[u8]) -> Vec<u8> {
        let kind = if packet[0] >> 4 == 4 {
            [0x08, 0x00]
        } else {
            [0x86, 0xdd]
        };
        let mac = |pod: Pod| [2, 0, 0, 0, 0, pod.0];
        [&mac(self.to)[..], &mac(self.from)[..], &kind, packet].concat()
    }
}
