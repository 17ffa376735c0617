//! What `--local-redirect` leaves alone: pods that take no part, and what needs L7.

use thyra_datapath_abi::{FlowState, Reason};
use thyra_datapath_engine::Flows as _;
use thyra_datapath_engine::decide::Arrival;
use thyra_datapath_engine::flows::FlowTable;
use thyra_datapath_engine::host::{End, HostNode, HostPacket};

use crate::case::{self, Key, Remembered};
use crate::{frame, steered};

/// Interfaces of two pods that take part; at 8080 what the first sends to the second needs L7.
const CLIENT: u32 = 6;
const SERVER: u32 = 2;

/// Their addresses, by family.
const ENDS: [(&str, &str); 2] = [
    ("10.244.0.6", "10.244.0.2"),
    ("[fd00:10:244::6]", "[fd00:10:244::2]"),
];

#[test]
fn what_takes_no_part_ends_as_without_the_option() {
    let mut cases = 0;
    for case in case::all().into_iter().filter_map(|(_, case)| case.apart()) {
        case.check(&case.run(&frame::frame(&case.packet)));
        cases += 1;
    }
    assert!(cases > 200, "{cases}");
}

fn arrival(ifindex: u32, ingress_ifindex: u32) -> Arrival {
    Arrival {
        ifindex,
        ingress_ifindex,
        has_socket: false,
        at_pod: false,
    }
}

fn sends(node: &HostNode, from: u32, packet: &str) -> End {
    node.run_from_pod_direct(HostPacket {
        bytes: &frame::frame(packet),
        arrival: arrival(from, from),
        mark: 0,
        taken: false,
    })
}

/// The client's entry of a connection with the server's port.
fn entry((client, server): (&str, &str), port: u16) -> Key {
    case::key(&Remembered::parse(&format!(
        "outbound {client}:40000 {server}:{port}"
    )))
}

fn flags(node: &HostNode, entry: &Key) -> Option<u32> {
    match entry {
        Key::V4(key) => node.find4(FlowTable::Outbound, key, 0),
        Key::V6(key) => node.find6(FlowTable::Outbound, key, 0),
    }
}

fn open(node: &HostNode, entry: &Key, flags: u32) {
    assert!(match entry {
        Key::V4(key) => node.open4(FlowTable::Outbound, key, flags),
        Key::V6(key) => node.open6(FlowTable::Outbound, key, flags),
    });
}

#[test]
fn a_connection_that_needs_l7_never_goes_straight() {
    for ends in ENDS {
        let node = steered::node();
        let (client, server) = ends;
        let syn = |port: u16| format!("{client}:40000 > {server}:{port} S");
        assert_eq!(sends(&node, CLIENT, &syn(8080)), End::Pass);
        assert_eq!(flags(&node, &entry(ends, 8080)), Some(0));
        // The control: one that doesn't.
        assert_eq!(sends(&node, CLIENT, &syn(9090)), End::Redirect(SERVER));
        assert_eq!(flags(&node, &entry(ends, 9090)), Some(FlowState::DIRECT));
    }
}

#[test]
fn one_that_needs_l7_since_it_goes_straight_ends_both_ways() {
    for ends in ENDS {
        let node = steered::node();
        let (client, server) = ends;
        open(&node, &entry(ends, 8080), FlowState::DIRECT | FlowState::ANSWERED);
        let data = format!("{client}:40000 > {server}:8080 AP seq=11 ack=101 payload=40");
        assert_eq!(sends(&node, CLIENT, &data), End::RevokeInto(SERVER));
        let answer = format!("{server}:8080 > {client}:40000 AP seq=101 ack=51 payload=40");
        assert_eq!(sends(&node, SERVER, &answer), End::RevokeInto(CLIENT));
    }
}

#[test]
fn a_syn_to_envoy_with_the_tuple_of_one_that_goes_straight_is_a_clash() {
    for ends in ENDS {
        let node = steered::node();
        let (client, server) = ends;
        let syn = format!("{client}:40000 > {server}:8080 S");
        let arrives = || {
            node.run_to_pod_direct(HostPacket {
                bytes: &frame::frame(&syn),
                arrival: arrival(SERVER, CLIENT),
                mark: 0,
                taken: false,
            })
        };
        assert_eq!(arrives(), End::Pass, "the control");
        open(&node, &entry(ends, 8080), FlowState::DIRECT | FlowState::ANSWERED);
        assert_eq!(arrives(), End::Refuse);
        let ledger = node.ledger.borrow();
        assert_eq!(ledger.reasons[&Reason::TupleClash].packets, 1);
    }
}
