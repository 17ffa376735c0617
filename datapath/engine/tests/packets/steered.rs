//! Connections whose verdict needs L7, packet by packet: at port 8080 of the world's pods the foe's verdict is Envoy's.

use std::sync::Arc;

use thyra_datapath_abi::limits::L7_FIRST_PORT;
use thyra_datapath_abi::tables::Verdict;
use thyra_datapath_abi::{Action, Reason};
use thyra_datapath_engine::decide::Arrival;
use thyra_datapath_engine::decide::steer::{Seeking, Steer, steer};
use thyra_datapath_engine::host::{End, HostNode, HostPacket};
use thyra_datapath_engine::program::{FromPod, ToPod};
use thyra_datapath_engine::{BankImage, Family, V4, V6};

use crate::{frame, world};

/// Verdict id of what needs L7.
pub(crate) const NEEDS_L7: u16 = 5;
const PORT: u16 = L7_FIRST_PORT;
pub(crate) const POD: u32 = 2;
const UPLINK: u32 = 9;

/// The foe's and the pod's end, by family.
pub(crate) const ENDS: [(&str, &str); 2] = [
    ("10.244.1.66:40000", "10.244.0.2:8080"),
    ("[fd00:10:244:1::66]:40000", "[fd00:10:244::2]:8080"),
];

/// The world where the foe's verdict at 8080 is left to Envoy, which has a listener for it.
pub(crate) fn node() -> HostNode {
    let mut tables = world::tables();
    Arc::make_mut(&mut tables.verdicts).push(Verdict {
        action: Action::Deny,
        reason: Reason::NeedsL7,
        rule: None,
        because: Vec::new(),
        residual: Some("r".into()),
        would: None,
    });
    Arc::make_mut(&mut tables.rows)[1][2] = NEEDS_L7 - 1;
    let id = |index: usize| u16::try_from(index).unwrap() + 1;
    let mut node = world::node_with(BankImage::build(&tables, &id).unwrap(), 0);
    node.steered.endpoints.insert(1);
    node.steered.listeners.insert(NEEDS_L7, PORT);
    node
}

pub(crate) fn arrives(node: &HostNode, (client, pod): (&str, &str), words: &str) -> End {
    let bytes = frame::frame(&format!("{client} > {pod} {words}"));
    node.run::<ToPod>(HostPacket {
        bytes: &bytes,
        arrival: Arrival {
            ifindex: POD,
            ingress_ifindex: UPLINK,
            has_socket: false,
            at_pod: false,
        },
        mark: 0,
        taken: false,
    })
}

pub(crate) fn leaves(node: &HostNode, (client, pod): (&str, &str), words: &str) -> End {
    let bytes = frame::frame(&format!("{pod} > {client} {words}"));
    node.run::<FromPod>(HostPacket {
        bytes: &bytes,
        arrival: Arrival {
            ifindex: POD,
            ingress_ifindex: POD,
            has_socket: false,
            at_pod: false,
        },
        mark: 0,
        taken: false,
    })
}

/// What the pod's stack asks for a connection.
fn seeks(node: &HostNode, (client, pod): (&str, &str)) -> Steer {
    let (client, pod): (std::net::SocketAddr, std::net::SocketAddr) =
        (client.parse().unwrap(), pod.parse().unwrap());
    fn ask<F: Family>(node: &HostNode, local: F::Address, remote: F::Address, ports: (u16, u16)) -> Steer {
        let seeking = Seeking::<F> {
            local,
            remote,
            local_port: ports.0.to_be_bytes(),
            remote_port: ports.1.to_be_bytes(),
        };
        steer(&node, &seeking)
    }
    let ports = (pod.port(), client.port());
    match (pod.ip(), client.ip()) {
        (std::net::IpAddr::V4(pod), std::net::IpAddr::V4(client)) => {
            ask::<V4>(node, pod.into(), client.into(), ports)
        }
        (std::net::IpAddr::V6(pod), std::net::IpAddr::V6(client)) => {
            let wide = thyra_datapath_engine::family::Address6::from_bytes;
            ask::<V6>(node, wide(pod.octets()), wide(client.octets()), ports)
        }
        _ => panic!("of one family"),
    }
}

const LISTENER: Steer = Steer::Listener {
    endpoint: 1,
    port: PORT,
};

/// As far as the pod's answer.
fn answered(node: &HostNode, ends: (&str, &str)) {
    assert_eq!(arrives(node, ends, "S seq=10"), End::Pass);
    assert_eq!(seeks(node, ends), LISTENER);
    assert_eq!(leaves(node, ends, "SA seq=100 ack=11"), End::Pass);
}

#[test]
fn a_connection_with_the_listener_passes_both_ways() {
    for ends in ENDS {
        let node = node();
        answered(&node, ends);
        assert_eq!(arrives(&node, ends, "A seq=11 ack=101"), End::Pass);
        assert_eq!(arrives(&node, ends, "AP seq=11 ack=101 payload=40"), End::Pass);
        assert_eq!(leaves(&node, ends, "AP seq=101 ack=51 payload=400"), End::Pass);
        assert_eq!(arrives(&node, ends, "AF seq=51 ack=501"), End::Pass);
        assert_eq!(leaves(&node, ends, "AF seq=501 ack=52"), End::Pass);
        assert_eq!(arrives(&node, ends, "A seq=52 ack=502"), End::Pass);
    }
}

#[test]
fn a_pod_has_so_many_connections_with_envoy_and_no_more() {
    let [four, six] = ENDS;
    let third = ("10.244.1.66:40001", four.1);
    let mut node = node();
    node.steered.budget = 2;
    for ends in [four, six] {
        answered(&node, ends);
        assert_eq!(arrives(&node, ends, "A seq=11 ack=101"), End::Pass);
    }
    assert_eq!(arrives(&node, third, "S seq=10"), End::Refuse);
    assert!(node.ledger.borrow().reasons.contains_key(&Reason::L7Full));
    assert_eq!(
        arrives(&node, four, "AP seq=11 ack=101 payload=40"),
        End::Pass,
        "others go on"
    );
    // Two SYNs for the last place: who answers first has it.
    node.steered.budget = 3;
    let fourth = ("10.244.1.66:40002", four.1);
    answered(&node, third);
    answered(&node, fourth);
    assert_eq!(arrives(&node, third, "A seq=11 ack=101"), End::Pass);
    assert_eq!(arrives(&node, fourth, "A seq=11 ack=101"), End::Drop);
}

#[test]
fn nothing_but_a_syn_passes_of_a_connection_that_no_listener_has() {
    for ends in ENDS {
        let node = node();
        assert_eq!(arrives(&node, ends, "AP seq=11 ack=101 payload=40"), End::Revoke);
        // The program in the pod was not there: the pod's own socket answers.
        assert_eq!(arrives(&node, ends, "S seq=10"), End::Pass);
        assert_eq!(leaves(&node, ends, "SA seq=100 ack=11"), End::Revoke);
        assert_eq!(arrives(&node, ends, "A seq=11 ack=101"), End::Revoke);
        assert_eq!(
            arrives(&node, ends, "S seq=10 payload=40"),
            End::Refuse,
            "data on a SYN"
        );
    }
}

#[test]
fn only_who_has_seen_the_pods_number_goes_on() {
    for ends in ENDS {
        let node = node();
        assert_eq!(arrives(&node, ends, "S seq=10"), End::Pass);
        assert_eq!(seeks(&node, ends), LISTENER);
        assert_eq!(
            arrives(&node, ends, "A seq=11 ack=101"),
            End::Revoke,
            "before the answer"
        );
        assert_eq!(leaves(&node, ends, "SA seq=100 ack=11"), End::Pass);
        for other in [
            "A seq=11 ack=100",
            "A seq=11 ack=102",
            "R seq=11",
            "SA seq=10 ack=101",
            "- seq=11",
        ] {
            assert_ne!(arrives(&node, ends, other), End::Pass, "{other}");
        }
        assert_eq!(leaves(&node, ends, "SA seq=100 ack=11"), End::Pass, "sent again");
        assert_eq!(arrives(&node, ends, "A seq=11 ack=101"), End::Pass);
    }
}

#[test]
fn another_listener_or_none_cuts_it() {
    for ends in ENDS {
        let mut node = node();
        answered(&node, ends);
        assert_eq!(arrives(&node, ends, "A seq=11 ack=101"), End::Pass);
        node.steered.listeners.insert(NEEDS_L7, PORT + 1);
        assert_eq!(arrives(&node, ends, "AP seq=11 ack=101 payload=40"), End::Revoke);
        assert_eq!(leaves(&node, ends, "AP seq=101 ack=11 payload=40"), End::Revoke);
        node.steered.listeners.clear();
        assert_eq!(arrives(&node, ends, "AP seq=11 ack=101 payload=40"), End::Revoke);
        assert_eq!(arrives(&node, ends, "S seq=10"), End::Refuse);
        assert_eq!(seeks(&node, ends), Steer::Nothing);
    }
}

#[test]
fn a_tuple_that_went_to_the_pod_itself_is_no_longer_envoys() {
    for ends in ENDS {
        let node = node();
        answered(&node, ends);
        assert_eq!(arrives(&node, ends, "A seq=11 ack=101"), End::Pass);
        // Enforced no more, the same ends again: the pod's own socket has them.
        let enforced = node.banks[0].clone();
        let mut node = node;
        let mut tables = world::tables();
        let endpoints = Arc::make_mut(&mut tables.endpoints);
        endpoints[0].mode = thyra_datapath_abi::Mode::Off;
        let id = |index: usize| u16::try_from(index).unwrap() + 1;
        node.banks[0] = BankImage::build(&tables, &id).unwrap();
        assert_eq!(seeks(&node, ends), Steer::Own);
        node.banks[0] = enforced;
        assert_eq!(arrives(&node, ends, "AP seq=11 ack=101 payload=4"), End::Revoke);
    }
}

#[test]
fn who_gets_which_socket() {
    for (client, pod) in ENDS {
        let node = node();
        let friend = client.replace("66", "10");
        assert_eq!(seeks(&node, (&friend, pod)), Steer::Own, "allowed");
        let own = pod.replace("8080", "9999");
        assert_eq!(seeks(&node, (&own, pod)), Steer::Own, "envoy's way to the pod");
        let closed = pod.replace("8080", "8081");
        assert_eq!(seeks(&node, (client, &closed)), Steer::Nothing, "denied");
        for port in [PORT, PORT + 1023] {
            let envoys = pod.replace("8080", &port.to_string());
            assert_eq!(
                seeks(&node, (&friend, &envoys)),
                Steer::Nothing,
                "envoy's own port"
            );
            assert_eq!(seeks(&node, (&own, &envoys)), Steer::Nothing, "from inside too");
        }
    }
}

#[test]
fn what_the_node_makes_gets_the_pods_own_socket() {
    for ends in ENDS {
        let node = node();
        let bytes = frame::frame(&format!("{} > {} S seq=10", ends.0, ends.1));
        let made_here = HostPacket {
            bytes: &bytes,
            arrival: Arrival {
                ifindex: POD,
                ingress_ifindex: 0,
                has_socket: true,
                at_pod: false,
            },
            mark: 0,
            taken: false,
        };
        assert_eq!(node.run::<ToPod>(made_here), End::Pass);
        assert_eq!(seeks(&node, ends), Steer::Own);
    }
}
