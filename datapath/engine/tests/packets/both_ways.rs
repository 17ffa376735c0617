//! The usual packet's short way against the whole one: a long random traffic on two nodes, one of which knows no
//! short way.

use thyra_datapath_abi::Control;
use thyra_datapath_engine::Family;
use thyra_datapath_engine::account::Direction;
use thyra_datapath_engine::decide::{Arrival, Outcome};
use thyra_datapath_engine::flows::FlowTable;
use thyra_datapath_engine::host::{End, HostNode, HostPacket, Ledger};
use thyra_datapath_engine::packet::{Packet, Parsed};
use thyra_datapath_engine::parse::non_tcp::NonTcp;
use thyra_datapath_engine::program::{FromPod, Node, Program, ToPod};

use crate::{frame, world};

const PACKETS: u32 = 60_000;
const PEERS4: [&str; 9] = [
    "10.244.1.10",
    "10.244.1.66",
    "10.244.1.70",
    "10.244.0.4",
    "10.244.0.2",
    "192.0.2.5",
    "192.0.2.200",
    "203.0.113.7",
    "127.0.0.1",
];
const PEERS6: [&str; 5] = [
    "fd00:10:244:1::10",
    "fd00:10:244:1::66",
    "fd00:10:244::4",
    "2001:db8:1::5",
    "2001:db8:7::7",
];
const PORTS: [u16; 4] = [8080, 9090, 7070, 22];
const FLAGS: [&str; 9] = ["A", "A", "A", "PA", "-", "S", "SA", "FA", "R"];
const AT: [u32; 6] = [2, 2, 3, 4, 5, 6];
const INGRESS: [u32; 6] = [9, 9, 0, 2, 4, 8];

/// The program without its short way.
struct Whole<P>(P);

impl<P: Program> Program for Whole<P> {
    const DIRECTION: Direction = P::DIRECTION;

    fn decide<F: Family, N: Node>(node: &N, arrival: &Arrival, parsed: &Parsed<F>) -> Outcome {
        P::decide(node, arrival, parsed)
    }
    fn ask<F: Family, N: Node>(node: &N, arrival: &Arrival, packet: &Packet<F>) -> Outcome {
        P::ask(node, arrival, packet)
    }
    fn hold<F: Family, N: Node>(node: &N, arrival: &Arrival, packet: &Packet<F>) -> Outcome {
        P::hold(node, arrival, packet)
    }
    fn decide_other<F: Family, N: Node>(node: &N, arrival: &Arrival, other: &NonTcp<F>) -> Outcome {
        P::decide_other(node, arrival, other)
    }
    fn is_usual<F: Family, N: Node>(_: &N, _: &Arrival, _: &Packet<F>, _: u32) -> bool {
        false
    }
}

/// A generator of numbers that are the same in every run (Knuth's MMIX constants).
struct Random(u64);

impl Random {
    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        choices[usize::try_from(self.0 >> 33).unwrap() % choices.len()]
    }
}

/// A packet to or from the pod at interface `at`.
fn packet(random: &mut Random, at: u32, to_pod: bool) -> Vec<u8> {
    let (pod, peer) = if random.of(&[true, true, false]) {
        (format!("10.244.0.{at}"), random.of(&PEERS4).to_owned())
    } else {
        (
            format!("[fd00:10:244::{at}]"),
            format!("[{}]", random.of(&PEERS6)),
        )
    };
    let (port, other) = (random.of(&PORTS), random.of(&[40_000, 443]));
    let flags = random.of(&FLAGS);
    frame::frame(&if to_pod {
        format!("{peer}:{other} > {pod}:{port} {flags}")
    } else {
        format!("{pod}:{port} > {peer}:{other} {flags}")
    })
}

fn run(node: &HostNode, packet: HostPacket<'_>, to_pod: bool, short: bool) -> (End, Ledger) {
    let end = match (to_pod, short) {
        (true, true) => node.run::<ToPod>(packet),
        (true, false) => node.run::<Whole<ToPod>>(packet),
        (false, true) => node.run::<FromPod>(packet),
        (false, false) => node.run::<Whole<FromPod>>(packet),
    };
    (end, node.ledger.take())
}

fn traffic(flags: u64, seed: u64) {
    let mut random = Random(seed);
    let (short, whole) = (world::node(flags), world::node(flags));
    let mut passed = 0;
    for i in 0..PACKETS {
        let (at, to_pod) = (random.of(&AT), random.of(&[true, false]));
        let bytes = packet(&mut random, at, to_pod);
        let ingress_ifindex = if to_pod { random.of(&INGRESS) } else { at };
        let arrival = Arrival {
            ifindex: at,
            ingress_ifindex,
            has_socket: ingress_ifindex == 0 && random.of(&[true, false]),
            at_pod: false,
        };
        let packet = HostPacket {
            bytes: &bytes,
            arrival,
            mark: 0,
            taken: false,
        };
        let expected = run(&whole, packet, to_pod, false);
        assert_eq!(
            expected,
            run(&short, packet, to_pod, true),
            "packet {i}: {arrival:?} {bytes:02x?}"
        );
        passed += u32::from(expected.0 == End::Pass);
        if i % 1_000 == 0 {
            for table in [FlowTable::Outbound, FlowTable::Host] {
                assert_eq!(whole.flows4(table), short.flows4(table), "packet {i}");
                assert_eq!(whole.flows6(table), short.flows6(table), "packet {i}");
            }
        }
    }
    // Both ends must be common, or the test shows nothing.
    assert!(
        (PACKETS / 10..PACKETS * 9 / 10).contains(&passed),
        "{passed} of {PACKETS} passed"
    );
}

#[test]
fn the_short_way_changes_nothing() {
    let all = [
        0,
        Control::REPORT_NEW,
        Control::flow_log(0),
        Control::ENFORCE_HOST,
        Control::DENY_DROP,
    ];
    for (seed, flags) in all.into_iter().enumerate() {
        traffic(flags, u64::try_from(seed).unwrap());
    }
}
