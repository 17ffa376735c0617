//! `--hook=pod`: the host end and the pod's own end together.

use thyra_datapath_abi::Reason;
use thyra_datapath_abi::maps::OWN_MARK;
use thyra_datapath_engine::decide::Arrival;
use thyra_datapath_engine::host::{End, HostNode, HostPacket};
use thyra_datapath_engine::program::ToPod;

use crate::case::{self, Case, Program};
use crate::frame;

/// What comes to a pod by the host end of its veth, and then inside.
fn both_ends(case: &Case, node: &HostNode) -> End {
    let packet = HostPacket {
        bytes: &frame::frame(&case.packet),
        arrival: Arrival {
            ifindex: case.at,
            ingress_ifindex: case.ingress(),
            has_socket: case.socket,
            at_pod: false,
        },
        mark: if case.own { OWN_MARK } else { 0 },
        taken: false,
    };
    match node.run_origin(packet) {
        End::Pass => inside(node, packet),
        end => end,
    }
}

/// What comes to the pod, however it got there.
fn inside(node: &HostNode, packet: HostPacket<'_>) -> End {
    let arrival = Arrival {
        ifindex: packet.arrival.ifindex,
        at_pod: true,
        ..Arrival::default()
    };
    node.run::<ToPod>(HostPacket { arrival, ..packet })
}

#[test]
fn both_ends_do_to_each_packet_what_the_host_end_does_alone() {
    let (mut cases, mut differ) = (0, Vec::new());
    for (_, case) in case::all() {
        if !matches!(case.program, Program::ToPod) {
            continue;
        }
        cases += 1;
        let (alone, both) = (
            case.run(&frame::frame(&case.packet)).end,
            both_ends(&case, &case.node()),
        );
        if alone != both {
            differ.push((case.name.clone(), alone, both));
        }
    }
    assert!(cases > 100, "{cases}");
    assert!(differ.is_empty(), "{differ:#?}");
}

#[test]
fn without_the_host_end_nothing_is_taken_for_the_nodes_or_the_pods_own() {
    let (mut cases, mut exempt) = (0, 0);
    for (_, case) in case::all() {
        if !matches!(case.program, Program::ToPod) || case.own || !case.before.is_empty() {
            continue;
        }
        cases += 1;
        let node = case.node();
        let packet = HostPacket {
            bytes: &frame::frame(&case.packet),
            arrival: Arrival {
                ifindex: case.at,
                ..Arrival::default()
            },
            mark: 0,
            taken: false,
        };
        let alone = inside(&node, packet);
        assert!(
            node.ledger
                .borrow()
                .reasons
                .keys()
                .all(|reason| { !matches!(reason, Reason::HostTraffic | Reason::SelfTraffic) })
        );
        exempt += usize::from(alone != both_ends(&case, &case.node()));
    }
    assert!(
        cases > 50 && exempt > 5,
        "the control: {exempt} of {cases} are exempt by where they come from"
    );
}
