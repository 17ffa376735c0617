//! `--local-redirect` on real veths: who goes straight, who doesn't, and what ends it.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketType, sockopt};
use thyra_datapath::abi::tables::Tables;
use thyra_datapath::abi::{Mode, Reason};
use thyra_datapath::{Config, Datapath, LocalRedirect, OpenError, Place};

use crate::node::{Fate, Pod, chain, config, echoes, on_a_node, open, output, run};
use crate::policy::Policy;
use crate::{FRIEND, PORT, SERVER, STRANGER, families, pods};

/// A Service of the server.
const SERVICE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 96, 0, 10));
const SERVICE_PORT: u16 = 80;

fn open_direct() -> Datapath {
    let opened: Result<Datapath, OpenError> = Datapath::open(Config {
        local_redirect: true,
        place: Place::Host,
        ..config()
    });
    opened.unwrap_or_else(|e| panic!("{}", chain(&e)))
}

/// `allowed` may connect to each other, the rest may not.
fn tables(datapath: &mut Datapath, allowed: Pod, denied: Pod) -> Tables {
    let endpoints = [FRIEND, STRANGER, SERVER].map(|pod| (pod, datapath.reserve(&pod.uid()).unwrap()));
    Policy {
        endpoints: &endpoints,
        allowed: &[allowed],
        denied: &[denied, SERVER],
        mode: Mode::Enforce,
    }
    .tables(false)
}

fn attach_all(datapath: &mut Datapath) {
    for pod in [FRIEND, STRANGER, SERVER] {
        datapath
            .attach(&pod.spec())
            .unwrap_or_else(|e| panic!("{}", chain(&e)));
    }
}

/// Three pods under policy whose connections go straight.
fn node_of_pods() -> Datapath {
    pods();
    let mut datapath = open_direct();
    let tables = tables(&mut datapath, FRIEND, STRANGER);
    datapath.commit(&tables, 1).unwrap();
    attach_all(&mut datapath);
    assert_eq!(
        datapath.check_coverage(),
        [],
        "the first look has nothing to compare with"
    );
    datapath
}

/// Packets that left the host end of a pod's veth.
fn sent_by_host_end(pod: Pod) -> u64 {
    let file = format!("cat /sys/class/net/{}/statistics/tx_packets", pod.interface());
    output(&format!("mount -t sysfs sysfs /sys; {file}; umount /sys"))
        .trim()
        .parse()
        .unwrap()
}

/// Exchanges so much that a packet more or less (of neighbour discovery) makes no difference; whether it went straight.
fn goes_straight(connection: &TcpStream) -> bool {
    let before = sent_by_host_end(SERVER);
    for _ in 0..50 {
        assert!(echoes(connection));
    }
    sent_by_host_end(SERVER) - before < 25
}

fn clashes(datapath: &Datapath) -> u64 {
    let counters = datapath.counters();
    counters.reasons.get(&Reason::TupleClash).map_or(0, |c| c.packets)
}

/// Translates the Service as kube-proxy does, and drops what conntrack finds invalid.
fn serve_service() {
    run(&format!(
        "nft 'add table ip services
              add chain ip services translate {{ type nat hook prerouting priority -100; }}
              add rule ip services translate ip daddr {SERVICE} tcp dport {SERVICE_PORT} dnat to {}:{PORT}
              add chain ip services invalid {{ type filter hook forward priority 0; }}
              add rule ip services invalid ct state invalid counter drop'",
        SERVER.v4()
    ));
}

/// A connection from a port of the friend's choice.
fn connect_from(port: u16, to: IpAddr, to_port: u16) -> std::io::Result<TcpStream> {
    FRIEND.inside(|| {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(Duration::from_secs(2)))?;
        rustix::net::bind(&socket, &SocketAddr::new(FRIEND.v4(), port))?;
        rustix::net::connect(&socket, &SocketAddr::new(to, to_port))?;
        Ok(socket.into())
    })
}

#[test]
fn an_allowed_connection_goes_straight_and_a_refused_one_is_reset() {
    on_a_node(
        "direct::an_allowed_connection_goes_straight_and_a_refused_one_is_reset",
        || {
            let mut datapath = node_of_pods();
            let status = datapath.status();
            assert_eq!(status.local_redirect, LocalRedirect::On);
            for endpoint in &status.endpoints {
                assert_eq!(endpoint.through_the_stack, None);
            }
            for address in families(SERVER) {
                let connection = FRIEND.connect(address, PORT).unwrap();
                assert!(goes_straight(&connection), "{address}");
                assert_eq!(STRANGER.try_connect(address, PORT), Fate::Refused);
            }
            assert_eq!(
                datapath.check_coverage(),
                [],
                "what went straight was counted at the server"
            );
            assert_eq!(clashes(&datapath), 0);
            let server = datapath.reservations()[&SERVER.uid()];
            assert!(datapath.counters().endpoints[&server].to_pod_packets > 100);

            // The control: without the option.
            drop(datapath);
            let mut datapath = open();
            attach_all(&mut datapath);
            for address in families(SERVER) {
                let connection = FRIEND.connect(address, PORT).unwrap();
                assert!(!goes_straight(&connection), "{address}");
            }
        },
    );
}

#[test]
fn a_policy_change_cuts_what_goes_straight() {
    on_a_node("direct::a_policy_change_cuts_what_goes_straight", || {
        let mut datapath = node_of_pods();
        let connections = families(SERVER).map(|address| FRIEND.connect(address, PORT).unwrap());
        assert!(connections.iter().all(goes_straight));
        let turned = tables(&mut datapath, STRANGER, FRIEND);
        datapath.commit(&turned, 2).unwrap();
        for connection in &connections {
            assert!(!echoes(connection));
        }
        let fresh = FRIEND.connect(SERVER.v4(), PORT);
        assert!(fresh.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused));
        assert_eq!(STRANGER.try_connect(SERVER.v4(), PORT), Fate::Answered);
    });
}

#[test]
fn a_service_and_its_pod_are_reached_side_by_side() {
    on_a_node("direct::a_service_and_its_pod_are_reached_side_by_side", || {
        let datapath = node_of_pods();
        serve_service();
        let service = FRIEND.connect(SERVICE, SERVICE_PORT).unwrap();
        let direct = FRIEND.connect(SERVER.v4(), PORT).unwrap();
        assert!(!goes_straight(&service));
        assert!(goes_straight(&direct));
        assert!(echoes(&service) && echoes(&direct));
        let stranger = STRANGER.connect(SERVICE, SERVICE_PORT);
        assert!(stranger.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused));
        assert_eq!(clashes(&datapath), 0);
    });
}

#[test]
fn one_port_used_directly_and_through_a_service_is_a_clash_or_stays_in_the_stack() {
    on_a_node(
        "direct::one_port_used_directly_and_through_a_service_is_a_clash_or_stays_in_the_stack",
        || {
            let datapath = node_of_pods();
            serve_service();
            for port in 20_000..20_020 {
                // The Service first: the direct one stays where conntrack gives it another port.
                let service = connect_from(port, SERVICE, SERVICE_PORT).unwrap();
                let direct = connect_from(port, SERVER.v4(), PORT).unwrap();
                assert!(echoes(&service) && echoes(&direct), "{port}");
                assert!(!goes_straight(&direct));
            }
            assert_eq!(clashes(&datapath), 0);
            for (done, port) in (1..).zip(21_000..21_020) {
                // The direct one first: nobody would know whose the server's answers are.
                let direct = connect_from(port, SERVER.v4(), PORT).unwrap();
                let refused = connect_from(port, SERVICE, SERVICE_PORT);
                assert!(
                    refused.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused),
                    "{port}"
                );
                assert_eq!(clashes(&datapath), done);
                assert!(goes_straight(&direct));
            }
        },
    );
}

/// 1,000 connections to the pod and 1,000 to its Service, all held open: those that are refused are counted as clashes,
/// all others live. Of direct ones, too: what the stack has to itself conntrack gives another port, which one that goes
/// straight may have.
fn hold_a_thousand_of_each() {
    // Both ends of all of them are open in this process.
    let files = libc::rlimit {
        rlim_cur: 10_000,
        rlim_max: 10_000,
    };
    // SAFETY: the limit is read, nothing else.
    assert_eq!(0, unsafe {
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const files)
    });
    let datapath = node_of_pods();
    serve_service();
    FRIEND.inside(|| {
        if let Ok(range) = std::env::var("THYRA_PORTS") {
            run(&format!(
                "echo '{range}' > /proc/sys/net/ipv4/ip_local_port_range"
            ));
        }
    });
    let (mut open, mut refused) = (Vec::new(), [0; 2]);
    for i in 0..2_000 {
        let (to, port) = [(SERVER.v4(), PORT), (SERVICE, SERVICE_PORT)][i % 2];
        match FRIEND.connect(to, port) {
            Ok(connection) => open.push(connection),
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "{to}");
                refused[i % 2] += 1;
            }
        }
    }
    let ports: HashSet<u16> = open.iter().map(|c| c.local_addr().unwrap().port()).collect();
    let twice = open.len() - ports.len();
    println!("refused of 1,000 direct ones and 1,000 of the Service {refused:?}, {twice} ports used twice");
    assert!(open.iter().all(echoes));
    assert_eq!(clashes(&datapath), refused.iter().sum::<u64>());
}

#[test]
fn a_thousand_of_each_held_open_lose_none_but_the_clashes() {
    on_a_node(
        "direct::a_thousand_of_each_held_open_lose_none_but_the_clashes",
        hold_a_thousand_of_each,
    );
}

#[test]
fn connections_outlive_the_process_and_the_option() {
    on_a_node("direct::connections_outlive_the_process_and_the_option", || {
        let datapath = node_of_pods();
        let connection = FRIEND.connect(SERVER.v4(), PORT).unwrap();
        assert!(goes_straight(&connection));
        drop(datapath);
        assert!(goes_straight(&connection), "without a process");
        let mut datapath = open_direct();
        attach_all(&mut datapath);
        assert!(goes_straight(&connection), "picked up");
        drop(datapath);
        let mut datapath = open();
        assert!(!goes_straight(&connection), "without the option");
        attach_all(&mut datapath);
        assert!(!goes_straight(&connection));
        drop(datapath);
        let mut datapath = open_direct();
        attach_all(&mut datapath);
        assert!(
            !goes_straight(&connection),
            "what went through the stack stays there"
        );
        assert!(goes_straight(&FRIEND.connect(SERVER.v4(), PORT).unwrap()));
    });
}

#[test]
fn an_interface_without_a_far_end_takes_no_part_and_says_why() {
    on_a_node(
        "direct::an_interface_without_a_far_end_takes_no_part_and_says_why",
        || {
            run("ip link add veth9 type veth peer name near9 && ip link set veth9 up");
            let mut datapath = open_direct();
            datapath
                .attach(&thyra_datapath::EndpointSpec {
                    netns: None,
                    ..Pod(9).spec()
                })
                .unwrap();
            let status = datapath.status();
            let why = status.endpoints[0].through_the_stack.clone().unwrap();
            assert!(why.contains("no other network namespace"), "{why}");
        },
    );
}
