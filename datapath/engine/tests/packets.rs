//! Every case of `testdata/packets`, on the host. `datapath/tests/testrun.rs` runs the same in the kernel.

#[path = "packets/any.rs"]
mod any;
#[path = "packets/both_ways.rs"]
mod both_ways;
#[path = "packets/case.rs"]
mod case;
#[path = "packets/direct.rs"]
mod direct;
#[path = "packets/frame.rs"]
mod frame;
#[path = "packets/guards.rs"]
mod guards;
#[path = "packets/held.rs"]
mod held;
#[path = "packets/inside.rs"]
mod inside;
#[path = "packets/steered.rs"]
mod steered;
#[path = "packets/world.rs"]
mod world;

use std::net::IpAddr;
use std::path::Path;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use thyra_datapath_abi::{Action, Control};
use thyra_datapath_engine::host::End;

#[test]
fn every_packet_ends_as_its_case_says() {
    for (file, case) in case::all() {
        println!("{file}: {}", case.name);
        case.check(&case.run(&frame::frame(&case.packet)));
    }
}

#[test]
fn an_allowed_frame_that_is_cut_anywhere_is_dropped() {
    for (_, case) in case::all()
        .into_iter()
        .filter(|(_, case)| case.verdict == world::ALLOW)
    {
        let node = case.node();
        let whole = frame::frame(&case.packet).len();
        let headers = 14 + if case.packet.starts_with('[') { 40 } else { 20 };
        for cut in 1..=whole - headers {
            let packet = format!("{} short={cut}", case.packet);
            let end = case.end_on(&node, &frame::frame(&packet));
            assert_eq!(End::Drop, end, "{}: {cut} bytes cut off", case.name);
        }
    }
}

#[test]
fn the_page_about_packets_names_cases_that_exist() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/packets.md");
    let page = std::fs::read_to_string(page).unwrap();
    let known: Vec<String> = case::all().into_iter().map(|(_, case)| case.name).collect();
    let rows = page
        .lines()
        .filter(|line| line.starts_with("| ") && line.contains('`'));
    let last = rows.filter_map(|row| row.trim_end_matches(" |").rsplit(" | ").next());
    let named: Vec<&str> = last
        .flat_map(|cell| cell.split(", "))
        .map(|name| name.trim_matches('`'))
        .collect();
    assert!(named.len() > 50, "{} names", named.len());
    for name in named {
        assert!(
            known.iter().any(|case| case == name),
            "no case is called `{name}`"
        );
    }
}

/// A packet as a parser that is not ours reads it.
struct Read {
    source: IpAddr,
    /// Destination port of a whole TCP packet.
    tcp: Option<u16>,
    /// Both ports of a whole UDP datagram.
    udp: Option<(u16, u16)>,
}

fn read(bytes: &[u8]) -> Option<Read> {
    let packet = SlicedPacket::from_ethernet(bytes).ok()?;
    let source = match packet.net.as_ref()? {
        NetSlice::Ipv4(ip) => IpAddr::V4(ip.header().source_addr()),
        NetSlice::Ipv6(ip) => IpAddr::V6(ip.header().source_addr()),
        NetSlice::Arp(_) => return None,
    };
    let tcp = match packet.transport.as_ref() {
        Some(TransportSlice::Tcp(tcp)) => Some(tcp.destination_port()),
        _ => None,
    };
    let udp = match packet.transport.as_ref() {
        Some(TransportSlice::Udp(udp)) => Some((udp.source_port(), udp.destination_port())),
        _ => None,
    };
    Some(Read { source, tcp, udp })
}

/// Changes the packets of `program`'s cases at the enforced pod 2, which has no connections, and hands `check` those
/// that pass; at least one of a hundred must. `THYRA_PACKETS` is how many are changed.
fn change_all(program: case::Program, ingress: u32, flags: u64, check: impl Fn(&Read, &[u8])) {
    let plain = |case: &case::Case| {
        let usual = case.ingress() == ingress && !case.socket && !case.own;
        case.program == program && case.at == 2 && usual && case.before.is_empty()
    };
    let cases: Vec<case::Case> = case::all()
        .into_iter()
        .map(|(_, case)| case)
        .filter(plain)
        .collect();
    let frames: Vec<Vec<u8>> = cases.iter().map(|case| frame::frame(&case.packet)).collect();
    let mut node = world::node(flags);
    let mut random = any::Random(1);
    let (wanted, mut passed) = (any::wanted(200_000), 0);
    for done in 1..=wanted {
        let (at, other) = (random.below(cases.len()), random.below(cases.len()));
        let bytes = random.changed(&frames[at], &frames[other]);
        if cases[at].end_on(&node, &bytes) == End::Pass
            && let Some(read) = read(&bytes)
        {
            passed += 1;
            check(&read, &bytes);
        }
        if done % 4096 == 0 {
            node = world::node(flags);
        }
    }
    assert!(passed > wanted / 100, "only {passed} of {wanted} packets passed");
}

#[test]
fn no_change_of_a_packet_lets_in_whom_policy_refuses() {
    let tables = world::tables();
    change_all(case::Program::ToPod, 9, 0, |read, bytes| {
        if let Some(port) = read.tcp {
            let source = read.source;
            let verdict = tables.judge(1, source, port).expect("endpoint 1");
            assert_eq!(
                verdict.action,
                Action::Allow,
                "{source} at port {port}: {bytes:02x?}"
            );
        }
    });
}

#[test]
fn no_change_of_a_packet_lets_in_a_datagram_that_policy_refuses() {
    let tables = world::tables();
    let datagrams = std::cell::Cell::new(0);
    change_all(
        case::Program::ToPod,
        9,
        Control::ENFORCE_NON_TCP,
        |read, bytes| {
            if let Some((from, port)) = read.udp.filter(|ports| ![(67, 68), (68, 67)].contains(ports)) {
                let source = read.source;
                // DHCPv6 goes between link-local addresses.
                let dhcp6 = source.is_ipv6() && [(546, 547), (547, 546)].contains(&(from, port));
                let verdict = tables.judge(1, source, port).expect("endpoint 1");
                let allowed = verdict.action == Action::Allow;
                assert!(allowed || dhcp6, "{source} at port {port}: {bytes:02x?}");
                datagrams.set(datagrams.get() + 1);
            }
        },
    );
    assert!(datagrams.get() > 1_000, "{}", datagrams.get());
}

#[test]
fn no_change_of_a_packet_lets_a_pod_speak_for_another() {
    for flags in [0, Control::ENFORCE_NON_TCP] {
        speaks_for_itself(flags);
    }
}

fn speaks_for_itself(flags: u64) {
    change_all(case::Program::FromPod, 2, flags, |read, bytes| {
        let own = ["10.244.0.2", "fd00:10:244::2"].map(|own| own.parse::<IpAddr>().unwrap());
        // What a host says before it has an address, and to its link: DHCP, neighbour discovery.
        let before_any = match read.source {
            IpAddr::V4(source) => source.is_unspecified(),
            IpAddr::V6(source) => source.is_unspecified() || source.is_unicast_link_local(),
        };
        let allowed = own.contains(&read.source) || (before_any && read.tcp.is_none());
        assert!(allowed, "{}: {bytes:02x?}", read.source);
    });
}
