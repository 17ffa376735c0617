//! Connections that are judged once, packet by packet: at port 8080 of the world's pods what the foe says first is
//! held.

use thyra_datapath_abi::{Control, Flow4, Flow6, HeldVerdict, Isns, Reason};
use thyra_datapath_engine::decide::Arrival;
use thyra_datapath_engine::decide::hold::Back;
use thyra_datapath_engine::host::{End, HostNode, HostPacket};

use crate::frame;
use crate::steered::{ENDS, NEEDS_L7, POD, arrives, leaves, node as steered_node};

const RESIDUAL: u16 = 7;
const ISNS: Isns = Isns { client: 10, pod: 100 };

fn node() -> HostNode {
    let mut node = steered_node();
    // No program in the pod takes part.
    node.steered.endpoints.clear();
    node.steered.listeners.insert(NEEDS_L7, RESIDUAL);
    node
}

/// As far as the client's answer.
fn awaiting(node: &HostNode, ends: (&str, &str)) {
    assert_eq!(arrives(node, ends, "S seq=10"), End::Pass);
    assert_eq!(leaves(node, ends, "SA seq=100 ack=11"), End::Pass);
    assert_eq!(arrives(node, ends, "A seq=11 ack=101"), End::Pass);
}

/// What the agent says of the connection that began with these numbers.
fn judge(node: &HostNode, (client, pod): (&str, &str), isns: Isns, action: u32, end: u32) {
    let verdict = HeldVerdict { isns, action, end };
    match (client.parse().unwrap(), pod.parse().unwrap()) {
        (std::net::SocketAddr::V4(client), std::net::SocketAddr::V4(pod)) => {
            let key = Flow4::between(pod, client, 1);
            node.held.v4.verdicts.borrow_mut().insert((key, isns), verdict);
        }
        (std::net::SocketAddr::V6(client), std::net::SocketAddr::V6(pod)) => {
            let key = Flow6::between(pod, client, 1);
            node.held.v6.verdicts.borrow_mut().insert((key, isns), verdict);
        }
        _ => panic!("of one family"),
    }
}

fn allow(node: &HostNode, ends: (&str, &str)) {
    judge(node, ends, ISNS, HeldVerdict::ALLOW, 51);
}

fn gives(node: &HostNode, from: &str, to: &str, words: &str) -> End {
    let bytes = frame::frame(&format!("{from} > {to} {words}"));
    node.run_from_agent(HostPacket {
        bytes: &bytes,
        arrival: Arrival::default(),
        mark: 0,
        taken: false,
    })
}

#[test]
fn the_first_bytes_go_to_the_agent_and_once_the_pod_has_acknowledged_them_everything_passes() {
    for ends in ENDS {
        let node = node();
        awaiting(&node, ends);
        assert_eq!(arrives(&node, ends, "AP seq=11 ack=101 payload=40"), End::Divert);
        allow(&node, ends);
        assert_eq!(
            arrives(&node, ends, "AP seq=11 ack=101 payload=40"),
            End::Divert,
            "sent again, perhaps with other bytes"
        );
        assert_eq!(
            arrives(&node, ends, "AP seq=50 ack=101 payload=40"),
            End::Divert,
            "over the end"
        );
        assert_eq!(arrives(&node, ends, "AP seq=51 ack=101 payload=40"), End::Pass);
        assert_eq!(leaves(&node, ends, "A seq=101 ack=50"), End::Pass);
        assert_eq!(
            arrives(&node, ends, "AP seq=11 ack=101 payload=40"),
            End::Divert,
            "not all acknowledged"
        );
        assert_eq!(leaves(&node, ends, "AP seq=101 ack=51 payload=9"), End::Pass);
        assert_eq!(
            arrives(&node, ends, "AP seq=11 ack=110 payload=40"),
            End::Pass,
            "the pod has them"
        );
        assert_eq!(arrives(&node, ends, "AF seq=91 ack=110"), End::Pass);
        assert_eq!(leaves(&node, ends, "AF seq=110 ack=92"), End::Pass);
    }
}

#[test]
fn nothing_is_said_either_way_before_the_verdict() {
    for ends in ENDS {
        let node = node();
        awaiting(&node, ends);
        for words in [
            "AP seq=11 ack=101 payload=1",
            "AP seq=500 ack=101 payload=40",
            "AF seq=11 ack=101 payload=4",
        ] {
            assert_eq!(arrives(&node, ends, words), End::Divert, "{words}");
        }
        assert_eq!(
            arrives(&node, ends, "R seq=11 payload=4"),
            End::Drop,
            "data on a reset"
        );
        assert_eq!(
            leaves(&node, ends, "AP seq=101 ack=11 payload=40"),
            End::Drop,
            "the pod's"
        );
        for words in ["A seq=11 ack=101", "AF seq=11 ack=101"] {
            assert_eq!(arrives(&node, ends, words), End::Pass, "{words}");
        }
        assert_eq!(leaves(&node, ends, "A seq=101 ack=11"), End::Pass);
    }
}

#[test]
fn a_refused_connection_is_cut_both_ways() {
    for ends in ENDS {
        let node = node();
        awaiting(&node, ends);
        judge(&node, ends, ISNS, HeldVerdict::DENY, 0);
        assert_eq!(arrives(&node, ends, "AP seq=11 ack=101 payload=40"), End::Revoke);
        assert_eq!(leaves(&node, ends, "AP seq=101 ack=11 payload=40"), End::Revoke);
        // No other word allows, either.
        judge(&node, ends, ISNS, 77, 51);
        assert_eq!(arrives(&node, ends, "AP seq=51 ack=101 payload=40"), End::Revoke);
    }
}

#[test]
fn a_verdict_is_for_the_connection_that_began_with_its_numbers() {
    for ends in ENDS {
        let node = node();
        for isns in [
            Isns { client: 10, pod: 99 },
            Isns { client: 9, pod: 100 },
            Isns::default(),
        ] {
            judge(&node, ends, isns, HeldVerdict::ALLOW, 51);
        }
        awaiting(&node, ends);
        assert_eq!(arrives(&node, ends, "AP seq=51 ack=101 payload=40"), End::Divert);
    }
}

#[test]
fn a_tuple_that_is_used_again_inherits_nothing() {
    for ends in ENDS {
        let node = node();
        awaiting(&node, ends);
        allow(&node, ends);
        assert_eq!(leaves(&node, ends, "A seq=101 ack=51"), End::Pass);
        assert_eq!(
            arrives(&node, ends, "AP seq=51 ack=101 payload=40"),
            End::Pass,
            "open"
        );
        // Whoever sends a SYN alone has no part in it.
        assert_eq!(arrives(&node, ends, "S seq=1000"), End::Pass);
        assert_eq!(
            arrives(&node, ends, "AP seq=91 ack=101 payload=40"),
            End::Pass,
            "still open"
        );
        assert_eq!(leaves(&node, ends, "SA seq=2000 ack=1001"), End::Pass);
        assert_eq!(
            arrives(&node, ends, "AP seq=1001 ack=2001 payload=40"),
            End::Divert
        );
        assert_eq!(
            arrives(&node, ends, "AP seq=1041 ack=2001 payload=40"),
            End::Divert
        );
        assert_eq!(leaves(&node, ends, "A seq=2001 ack=51"), End::Pass);
        assert_eq!(
            arrives(&node, ends, "AP seq=1041 ack=2001 payload=40"),
            End::Divert,
            "not opened"
        );
    }
}

#[test]
fn only_who_has_seen_the_pods_number_is_held_and_a_syn_carries_nothing() {
    for ends in ENDS {
        let node = node();
        assert_eq!(arrives(&node, ends, "AP seq=11 ack=101 payload=40"), End::Revoke);
        assert_eq!(
            arrives(&node, ends, "S seq=10 payload=40"),
            End::Drop,
            "data on a SYN"
        );
        assert_eq!(
            leaves(&node, ends, "SA seq=100 ack=11"),
            End::Revoke,
            "nobody asked"
        );
        assert_eq!(arrives(&node, ends, "S seq=10"), End::Pass);
        assert_eq!(
            leaves(&node, ends, "SA seq=100 ack=12"),
            End::Revoke,
            "of another SYN"
        );
        assert_eq!(leaves(&node, ends, "SA seq=100 ack=11 payload=4"), End::Drop);
        assert_eq!(leaves(&node, ends, "SA seq=100 ack=11"), End::Pass);
        assert_eq!(arrives(&node, ends, "S seq=10"), End::Pass, "sent again");
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
        assert_eq!(
            arrives(&node, ends, "AP seq=11 ack=101 payload=40"),
            End::Divert,
            "with its first bytes"
        );
        assert_eq!(
            leaves(&node, ends, "SA seq=100 ack=11"),
            End::Pass,
            "sent once more"
        );
    }
}

#[test]
fn no_pointer_to_bytes_to_come_gets_ahead_of_the_judged_ones() {
    for ends in ENDS {
        let node = node();
        assert_eq!(arrives(&node, ends, "SU seq=10"), End::Drop);
        awaiting(&node, ends);
        for words in ["AU seq=11 ack=101", "AFU seq=11 ack=101", "AU seq=20 ack=101"] {
            assert_eq!(arrives(&node, ends, words), End::Drop, "{words}");
        }
        let first = "APU seq=11 ack=101 payload=40";
        assert_eq!(arrives(&node, ends, first), End::Divert, "it goes back without");
        allow(&node, ends);
        assert_eq!(arrives(&node, ends, first), End::Divert);
        assert_eq!(arrives(&node, ends, "AU seq=11 ack=101"), End::Drop);
        assert_eq!(
            arrives(&node, ends, "AU seq=51 ack=101"),
            End::Pass,
            "behind them"
        );
        assert_eq!(leaves(&node, ends, "A seq=101 ack=51"), End::Pass);
        assert_eq!(
            arrives(&node, ends, "AU seq=11 ack=101"),
            End::Pass,
            "the pod has them"
        );
    }
}

#[test]
fn another_residual_cuts_an_open_connection() {
    for ends in ENDS {
        let mut node = node();
        awaiting(&node, ends);
        allow(&node, ends);
        assert_eq!(leaves(&node, ends, "A seq=101 ack=51"), End::Pass);
        node.steered.listeners.insert(NEEDS_L7, RESIDUAL + 1);
        assert_eq!(arrives(&node, ends, "AP seq=51 ack=101 payload=40"), End::Revoke);
        assert_eq!(leaves(&node, ends, "AP seq=101 ack=51 payload=40"), End::Revoke);
        node.steered.listeners.clear();
        assert_eq!(arrives(&node, ends, "AP seq=51 ack=101 payload=40"), End::Revoke);
    }
}

#[test]
fn a_pod_has_so_many_held_connections_and_no_more() {
    let [four, six] = ENDS;
    let mut node = node();
    node.steered.budget = 0;
    for ends in [four, six] {
        assert_eq!(arrives(&node, ends, "S seq=10"), End::Refuse);
    }
    assert!(node.ledger.borrow().reasons.contains_key(&Reason::L7Full));
}

#[test]
fn what_the_agent_gives_back_reaches_the_pod_only_once_it_is_allowed() {
    for (client, pod) in ENDS {
        let ends = (client, pod);
        let node = node();
        let bytes = "AP seq=11 ack=101 payload=40";
        assert_eq!(gives(&node, client, pod, bytes), End::Drop, "nobody is held");
        awaiting(&node, ends);
        assert_eq!(gives(&node, client, pod, bytes), End::Drop, "not judged");
        judge(&node, ends, ISNS, HeldVerdict::DENY, 0);
        assert_eq!(gives(&node, client, pod, bytes), End::Drop, "refused");
        allow(&node, ends);
        assert_eq!(gives(&node, client, pod, bytes), End::GivenBack(Back::ToPod(POD)));
        assert_eq!(gives(&node, client, pod, "S seq=11"), End::Drop, "a SYN");
        let elsewhere = client.replace("40000", "40001");
        assert_eq!(
            gives(&node, &elsewhere, pod, bytes),
            End::Drop,
            "another connection"
        );
    }
}

#[test]
fn what_is_given_back_after_a_switch_of_the_tables_is_dropped() {
    for (client, pod) in ENDS {
        let mut node = node();
        let bytes = "AP seq=11 ack=101 payload=40";
        awaiting(&node, (client, pod));
        allow(&node, (client, pod));
        assert_eq!(gives(&node, client, pod, bytes), End::GivenBack(Back::ToPod(POD)));
        for listener in [Some(RESIDUAL + 1), None] {
            match listener {
                Some(number) => node.steered.listeners.insert(NEEDS_L7, number),
                None => node.steered.listeners.remove(&NEEDS_L7),
            };
            assert_eq!(gives(&node, client, pod, bytes), End::Drop, "{listener:?}");
            let reset = gives(&node, client, pod, "RA seq=11 ack=101");
            assert_eq!(reset, End::GivenBack(Back::ToPod(POD)), "{listener:?}");
        }
    }
}

#[test]
fn the_agent_speaks_to_the_client_without_a_byte() {
    for (client, pod) in ENDS {
        let mut node = node();
        assert_eq!(
            gives(&node, pod, client, "RA seq=101 ack=51"),
            End::Drop,
            "nobody is held"
        );
        awaiting(&node, (client, pod));
        assert_eq!(
            gives(&node, pod, client, "AP seq=101 ack=51 payload=4"),
            End::Drop
        );
        assert_eq!(gives(&node, pod, client, "AF seq=101 ack=51"), End::Drop);
        for words in ["A seq=101 ack=51", "RA seq=101 ack=51"] {
            assert_eq!(
                gives(&node, pod, client, words),
                End::GivenBack(Back::ToClient(POD)),
                "{words}"
            );
        }
        node.control = Control(node.control.0 | Control::DENY_DROP);
        assert_eq!(
            gives(&node, pod, client, "RA seq=101 ack=51"),
            End::Drop,
            "`--deny=drop`"
        );
        let reset = gives(&node, client, pod, "RA seq=11 ack=101");
        assert_eq!(
            reset,
            End::GivenBack(Back::ToPod(POD)),
            "the pod is told all the same"
        );
    }
}
