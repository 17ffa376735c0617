//! Each guard of the packet path against a packet that it alone stops: with the guard the packet ends, without it the
//! same packet gets through. A guard whose control did not pass would be guarding nothing.

use std::net::Ipv6Addr;

use thyra_datapath_abi::limits::{SLOTS4, SLOTS6};
use thyra_datapath_abi::{
    Action, Cell, Control, EndpointRecord, EndpointSets, Flow4, Flow6, Mode, Opening, Slot4, Slot6,
};
use thyra_datapath_engine::decide::{Act, Arrival, from_pod, to_pod};
use thyra_datapath_engine::family::Address6;
use thyra_datapath_engine::flows::{FlowTable, Flows};
use thyra_datapath_engine::host::{HostNode, HostPacket};
use thyra_datapath_engine::packet::Parsed;
use thyra_datapath_engine::parse::{self, Link};
use thyra_datapath_engine::{Family, Steered, Tables, V4, V6};

use crate::{frame, world};

/// What is switched off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    /// None.
    None,
    /// A local address is believed from any interface.
    SourceInterface,
    /// A pod may send from any address.
    OwnAddress,
    /// An endpoint needs no place in the tables.
    Place,
    /// Everything is a connection that the pod opened.
    OwnConnections,
    /// Every cell allows.
    Cells,
    /// A forwarded SYN leaves the node's connections alone.
    TakenTuple,
}

/// The node with a guard off.
struct Off<'a> {
    node: &'a HostNode,
    guard: Guard,
    record: EndpointRecord,
}

impl Tables for Off<'_> {
    fn control(&self) -> Control {
        Tables::control(&self.node)
    }
    fn endpoint_in(&self, slot: u32) -> u16 {
        Tables::endpoint_in(&self.node, slot)
    }
    fn record(&self, endpoint: u16) -> &EndpointRecord {
        match self.guard {
            Guard::SourceInterface if endpoint != 1 => &self.record,
            Guard::OwnAddress => &self.record,
            _ => (&self.node).record(endpoint),
        }
    }
    fn sets(&self, endpoint: u16) -> EndpointSets {
        match self.guard {
            Guard::Place => EndpointSets::new(0, 0, Mode::Enforce),
            _ => Tables::sets(&self.node, endpoint),
        }
    }
    fn bucket4(&self, index: u32) -> &[Slot4; SLOTS4] {
        Tables::bucket4(&self.node, index)
    }
    fn bucket6(&self, index: u32) -> &[Slot6; SLOTS6] {
        Tables::bucket6(&self.node, index)
    }
    fn block4(&self, address: u32) -> u16 {
        Tables::block4(&self.node, address)
    }
    fn block6(&self, address: Address6) -> u16 {
        Tables::block6(&self.node, address)
    }
    fn column(&self, class: u16) -> u16 {
        Tables::column(&self.node, class)
    }
    fn port_class(&self, port: u16) -> u16 {
        Tables::port_class(&self.node, port)
    }
    fn row(&self, set: u16, port_class: u16) -> u16 {
        Tables::row(&self.node, set, port_class)
    }
    fn cell(&self, row: u16, column: u16) -> Cell {
        match self.guard {
            Guard::Cells => Cell::new(Action::Allow, world::ALLOW).unwrap(),
            _ => Tables::cell(&self.node, row, column),
        }
    }
}

impl Flows for Off<'_> {
    fn find4(&self, table: FlowTable, key: &Flow4, mark: u32) -> Option<u32> {
        match (self.guard, table) {
            (Guard::OwnConnections, FlowTable::Outbound) => Some(0),
            _ => self.node.find4(table, key, mark),
        }
    }
    fn find6(&self, table: FlowTable, key: &Flow6, mark: u32) -> Option<u32> {
        match (self.guard, table) {
            (Guard::OwnConnections, FlowTable::Outbound) => Some(0),
            _ => self.node.find6(table, key, mark),
        }
    }
    fn open4(&self, table: FlowTable, key: &Flow4, flags: u32) -> bool {
        self.node.open4(table, key, flags)
    }
    fn open6(&self, table: FlowTable, key: &Flow6, flags: u32) -> bool {
        self.node.open6(table, key, flags)
    }
    fn forget4(&self, key: &Flow4) {
        if self.guard != Guard::TakenTuple {
            self.node.forget4(key);
        }
    }
    fn forget6(&self, key: &Flow6) {
        if self.guard != Guard::TakenTuple {
            self.node.forget6(key);
        }
    }
}

impl Steered for Off<'_> {
    fn listener(&self, verdict: u16) -> u16 {
        self.node.listener(verdict)
    }
    fn is_steered(&self, endpoint: u16) -> bool {
        self.node.is_steered(endpoint)
    }
    fn has_room(&self, endpoint: u16) -> bool {
        self.node.has_room(endpoint)
    }
    fn opening4(&self, key: &Flow4) -> Option<Opening> {
        self.node.opening4(key)
    }
    fn opening6(&self, key: &Flow6) -> Option<Opening> {
        self.node.opening6(key)
    }
    fn begin4(&self, key: &Flow4, opening: Opening) -> bool {
        self.node.begin4(key, opening)
    }
    fn begin6(&self, key: &Flow6, opening: Opening) -> bool {
        self.node.begin6(key, opening)
    }
    fn accepted4(&self, key: &Flow4, mark: u32) -> Option<u16> {
        self.node.accepted4(key, mark)
    }
    fn accepted6(&self, key: &Flow6, mark: u32) -> Option<u16> {
        self.node.accepted6(key, mark)
    }
    fn accept4(&self, key: &Flow4, port: u16, flags: u32) -> bool {
        self.node.accept4(key, port, flags)
    }
    fn accept6(&self, key: &Flow6, port: u16, flags: u32) -> bool {
        self.node.accept6(key, port, flags)
    }
    fn leave4(&self, key: &Flow4) {
        self.node.leave4(key);
    }
    fn leave6(&self, key: &Flow6) {
        self.node.leave6(key);
    }
}

/// The uplink's interface.
const UPLINK: u32 = 9;
/// The protected pod: endpoint 1 at interface 2.
const POD: u32 = 2;

/// A packet of either family, at a hook of the node.
struct Try {
    to_pod: bool,
    at: u32,
    ingress: u32,
    has_socket: bool,
    /// IPv4, IPv6.
    lines: [&'static str; 2],
}

/// On its way to the pod, from the uplink.
fn arriving(lines: [&'static str; 2]) -> Try {
    Try {
        to_pod: true,
        at: POD,
        ingress: UPLINK,
        has_socket: false,
        lines,
    }
}

/// Sent by the pod.
fn sent(lines: [&'static str; 2]) -> Try {
    Try {
        to_pod: false,
        at: POD,
        ingress: POD,
        ..arriving(lines)
    }
}

impl Try {
    /// How the packet of one family ends.
    fn on(&self, node: &HostNode, guard: Guard, family: usize) -> Act {
        let bytes = frame::frame(self.lines[family]);
        let arrival = Arrival {
            ifindex: self.at,
            ingress_ifindex: self.ingress,
            has_socket: self.has_socket,
            at_pod: false,
        };
        let packet = HostPacket {
            bytes: &bytes,
            arrival,
            mark: 0,
            taken: false,
        };
        match parse::link(&packet) {
            Link::V4(l3) => self.decide::<V4>(node, guard, &arrival, &parse::ipv4::unusual(&packet, l3)),
            Link::V6(l3) => self.decide::<V6>(node, guard, &arrival, &parse::ipv6::unusual(&packet, l3)),
            other => panic!("{other:?}"),
        }
    }

    fn decide<F: Family>(&self, node: &HostNode, guard: Guard, arrival: &Arrival, parsed: &Parsed<F>) -> Act {
        let record = EndpointRecord {
            ifindex: match guard {
                Guard::SourceInterface => self.ingress,
                _ => self.at,
            },
            // The pod that an address is stolen from.
            address4: [10, 244, 0, 4],
            address6: "fd00:10:244::4".parse::<Ipv6Addr>().unwrap().octets(),
            ..EndpointRecord::default()
        };
        let off = Off { node, guard, record };
        if self.to_pod {
            to_pod(&off, arrival, parsed).act
        } else {
            from_pod(&off, arrival, parsed).act
        }
    }

    /// It ends with all guards on, and passes with this one off.
    fn is_stopped_by(&self, guard: Guard) {
        for family in [0, 1] {
            let line = self.lines[family];
            assert_ne!(self.on(&world::node(0), Guard::None, family), Act::Pass, "{line}");
            assert_eq!(
                self.on(&world::node(0), guard, family),
                Act::Pass,
                "{line} without {guard:?}"
            );
        }
    }

    /// It ends, and this one, which differs in what the guard looks at alone, passes.
    fn is_stopped_unlike(&self, other: &Self) {
        for family in [0, 1] {
            let node = world::node(0);
            assert_ne!(
                self.on(&node, Guard::None, family),
                Act::Pass,
                "{}",
                self.lines[family]
            );
            assert_eq!(
                other.on(&node, Guard::None, family),
                Act::Pass,
                "{}",
                other.lines[family]
            );
        }
    }
}

#[test]
fn a_local_address_lends_its_identity_from_its_own_interface_alone() {
    arriving([
        "10.244.0.4:40000 > 10.244.0.2:8080 S",
        "[fd00:10:244::4]:40000 > [fd00:10:244::2]:8080 S",
    ])
    .is_stopped_by(Guard::SourceInterface);
}

#[test]
fn a_pod_sends_from_its_own_address_alone() {
    sent([
        "10.244.0.4:40000 > 203.0.113.7:443 S",
        "[fd00:10:244::4]:40000 > [2001:db8:7::7]:443 S",
    ])
    .is_stopped_by(Guard::OwnAddress);
}

#[test]
fn an_endpoint_that_no_commit_has_placed_lets_no_friend_in() {
    Try {
        at: 5,
        ..arriving([
            "10.244.1.10:40000 > 10.244.0.5:8080 S",
            "[fd00:10:244:1::10]:40000 > [fd00:10:244::5]:8080 S",
        ])
    }
    .is_stopped_by(Guard::Place);
}

#[test]
fn a_stranger_gets_in_by_no_connection_that_the_pod_did_not_open() {
    for flags in ["A", "SA", "FA", "PA", "R", "-"] {
        let v4 = format!("203.0.113.7:443 > 10.244.0.2:50000 {flags}");
        let v6 = format!("[2001:db8:7::7]:443 > [fd00:10:244::2]:50000 {flags}");
        arriving([v4.leak(), v6.leak()]).is_stopped_by(Guard::OwnConnections);
    }
}

#[test]
fn a_syn_is_no_reply() {
    let opened = sent([
        "10.244.0.2:8080 > 203.0.113.7:443 S",
        "[fd00:10:244::2]:8080 > [2001:db8:7::7]:443 S",
    ]);
    let on_its_tuple = |lines| {
        for family in [0, 1] {
            let node = world::node(0);
            assert_eq!(opened.on(&node, Guard::None, family), Act::Pass);
            let act = arriving(lines).on(&node, Guard::None, family);
            let is_syn = lines[family].ends_with(" S");
            assert_eq!(act != Act::Pass, is_syn, "{}", lines[family]);
        }
    };
    on_its_tuple([
        "203.0.113.7:443 > 10.244.0.2:8080 S",
        "[2001:db8:7::7]:443 > [fd00:10:244::2]:8080 S",
    ]);
    on_its_tuple([
        "203.0.113.7:443 > 10.244.0.2:8080 SA",
        "[2001:db8:7::7]:443 > [fd00:10:244::2]:8080 SA",
    ]);
}

#[test]
fn a_refused_peer_neither_gets_in_nor_is_answered() {
    arriving([
        "10.244.1.66:40000 > 10.244.0.2:8080 S",
        "[fd00:10:244:1::66]:40000 > [fd00:10:244::2]:8080 S",
    ])
    .is_stopped_by(Guard::Cells);
    // Its open connection, after policy has turned against it: both directions.
    arriving([
        "10.244.1.66:40000 > 10.244.0.2:8080 PA payload=9",
        "[fd00:10:244:1::66]:40000 > [fd00:10:244::2]:8080 PA payload=9",
    ])
    .is_stopped_by(Guard::Cells);
    sent([
        "10.244.0.2:8080 > 10.244.1.66:40000 PA payload=9",
        "[fd00:10:244::2]:8080 > [fd00:10:244:1::66]:40000 PA payload=9",
    ])
    .is_stopped_by(Guard::Cells);
}

#[test]
fn a_cell_that_nobody_wrote_lets_nothing_in() {
    arriving([
        "10.244.1.10:40000 > 10.244.0.2:7070 S",
        "[fd00:10:244:1::10]:40000 > [fd00:10:244::2]:7070 S",
    ])
    .is_stopped_by(Guard::Cells);
}

#[test]
fn only_what_has_a_socket_and_no_interface_is_the_nodes() {
    let foe = || {
        arriving([
            "10.244.1.66:40000 > 10.244.0.2:8080 S",
            "[fd00:10:244:1::66]:40000 > [fd00:10:244::2]:8080 S",
        ])
    };
    let made_by_the_node = Try {
        ingress: 0,
        has_socket: true,
        ..foe()
    };
    // What the node fragments again or answers for has lost its interface; what a proxy on the node sends on has a
    // socket.
    Try { ingress: 0, ..foe() }.is_stopped_unlike(&made_by_the_node);
    Try {
        has_socket: true,
        ..foe()
    }
    .is_stopped_unlike(&made_by_the_node);
}

#[test]
fn a_forwarded_syn_ends_the_nodes_claim_to_the_tuple() {
    let from_the_node = Try {
        ingress: 0,
        has_socket: true,
        ..arriving([
            "10.244.1.66:40000 > 10.244.0.2:8080 S",
            "[fd00:10:244:1::66]:40000 > [fd00:10:244::2]:8080 S",
        ])
    };
    let forwarded = arriving(from_the_node.lines);
    let answer = sent([
        "10.244.0.2:8080 > 10.244.1.66:40000 PA payload=9",
        "[fd00:10:244::2]:8080 > [fd00:10:244:1::66]:40000 PA payload=9",
    ]);
    for family in [0, 1] {
        for (guard, leaks) in [(Guard::None, false), (Guard::TakenTuple, true)] {
            let node = world::node(0);
            assert_eq!(from_the_node.on(&node, guard, family), Act::Pass);
            assert_eq!(
                answer.on(&node, guard, family),
                Act::Pass,
                "the node gets its answer"
            );
            assert_ne!(forwarded.on(&node, guard, family), Act::Pass);
            assert_eq!(answer.on(&node, guard, family) == Act::Pass, leaks, "{guard:?}");
        }
    }
}
