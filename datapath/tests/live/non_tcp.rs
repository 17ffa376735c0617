//! Datagrams and pings through live veths, with other protocols than TCP judged and without.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::FromRawFd;
use std::time::Duration;

use thyra_datapath::abi::Mode;
use thyra_datapath::{Config, Datapath, NonTcp};

use crate::node::{Pod, chain, config, on_a_node, open, output, run};
use crate::packet::checksum;
use crate::{FRIEND, PORT, SERVER, STRANGER, enforce, families, pods, tables, tables_of_both};

/// Nothing comes for that long: nothing comes.
const SILENCE: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(2);

fn judging() -> Datapath {
    let config = Config {
        non_tcp: NonTcp::Enforce,
        ..config()
    };
    Datapath::open(config).unwrap_or_else(|e| panic!("{}", chain(&e)))
}

/// A socket of a pod, at any port when it is 0.
fn socket(pod: Pod, address: IpAddr, port: u16) -> UdpSocket {
    let socket = pod.inside(|| UdpSocket::bind((address, port)).unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// What comes next at a socket, and from whom; none when nothing does.
fn next(socket: &UdpSocket, patience: Duration) -> Option<(Vec<u8>, SocketAddr)> {
    socket.set_read_timeout(Some(patience)).unwrap();
    let mut buffer = [0; 9_000];
    match socket.recv_from(&mut buffer) {
        Ok((read, from)) => Some((buffer[..read].to_vec(), from)),
        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => None,
        Err(e) => panic!("{e}"),
    }
}

/// Whether a datagram from one socket arrives at the other, and its answer at the first.
fn talks(client: &UdpSocket, server: &UdpSocket, to: SocketAddr) -> (bool, bool) {
    client.send_to(b"question", to).unwrap();
    let Some((_, from)) = next(server, SILENCE) else {
        return (false, false);
    };
    server.send_to(b"answer", from).unwrap();
    (true, next(client, SILENCE).is_some())
}

/// Whether an answer comes to an echo request, from inside whichever namespace the thread is in.
fn ping(to: IpAddr) -> bool {
    let (family, protocol, kind, answer) = match to {
        IpAddr::V4(_) => (libc::AF_INET, libc::IPPROTO_ICMP, 8, 0),
        IpAddr::V6(_) => (libc::AF_INET6, libc::IPPROTO_ICMPV6, 128, 129),
    };
    // SAFETY: a new socket, owned at once; such a one takes every call that a datagram socket takes.
    let socket = unsafe {
        let fd = libc::socket(family, libc::SOCK_RAW, protocol);
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        UdpSocket::from_raw_fd(fd)
    };
    let mut packet = vec![kind, 0, 0, 0, 0x7e, 0x57, 0, 1];
    if to.is_ipv4() {
        // The kernel writes the sum of ICMPv6 alone.
        let [a, b] = checksum(&packet).to_be_bytes();
        packet[2..4].copy_from_slice(&[a, b]);
    }
    socket.send_to(&packet, (to, 0)).unwrap();
    let header = if to.is_ipv4() { 20 } else { 0 };
    while let Some((seen, from)) = next(&socket, SILENCE) {
        if seen[header] == answer && from.ip() == to && seen[header + 4..][..2] == [0x7e, 0x57] {
            return true;
        }
    }
    false
}

fn pings(from: Pod, to: IpAddr) -> bool {
    from.inside(|| ping(to))
}

/// The server's two addresses, each with one of the pod's own family.
fn pairs(pod: Pod) -> impl Iterator<Item = (IpAddr, IpAddr)> {
    families(pod).into_iter().zip(families(SERVER))
}

#[test]
fn a_friends_datagram_is_answered_and_a_strangers_never_arrives() {
    on_a_node(
        "non_tcp::a_friends_datagram_is_answered_and_a_strangers_never_arrives",
        || {
            pods();
            let turn = |friend: (bool, bool), stranger: (bool, bool)| {
                for (pod, fate) in [(FRIEND, friend), (STRANGER, stranger)] {
                    for (own, to) in pairs(pod) {
                        let server = socket(SERVER, to, PORT);
                        let client = socket(pod, own, 0);
                        let seen = talks(&client, &server, SocketAddr::new(to, PORT));
                        assert_eq!(seen, fate, "{pod:?} to {to}");
                    }
                }
            };
            turn((true, true), (true, true));
            let mut datapath = open();
            enforce(&mut datapath);
            // Not asked for, nothing is judged but TCP.
            turn((true, true), (true, true));
            drop(datapath);
            let mut datapath = judging();
            let tables = tables(&mut datapath, Mode::Enforce, false);
            // The other value takes over with the next commit, of the same tables too.
            datapath.commit(&tables, 2).unwrap();
            turn((true, true), (false, false));
            drop(datapath);
            // Without a process, and with the next one that wants the same.
            turn((true, true), (false, false));
            let mut datapath = judging();
            turn((true, true), (false, false));
            datapath.commit(&tables, 3).unwrap();
            turn((true, true), (false, false));
            drop(datapath);
            open().commit(&tables, 4).unwrap();
            turn((true, true), (true, true));
        },
    );
}

#[test]
fn answers_to_a_pods_own_datagrams_come_in_and_nothing_beside_them() {
    on_a_node(
        "non_tcp::answers_to_a_pods_own_datagrams_come_in_and_nothing_beside_them",
        || {
            pods();
            let mut datapath = judging();
            enforce(&mut datapath);
            for (other, own) in pairs(STRANGER) {
                let resolver = socket(STRANGER, other, 53);
                let beside = socket(STRANGER, other, 54);
                let client = socket(SERVER, own, 0);
                let client_at = client.local_addr().unwrap();
                resolver.send_to(b"unasked", client_at).unwrap();
                assert_eq!(next(&client, SILENCE), None, "{own}");
                let seen = talks(&client, &resolver, SocketAddr::new(other, 53));
                assert_eq!(seen, (true, true), "{own}");
                beside.send_to(b"beside", client_at).unwrap();
                assert_eq!(next(&client, SILENCE), None, "{own}");
                // Again and again, as long as the pod has sent of late.
                resolver.send_to(b"more", client_at).unwrap();
                assert!(next(&client, PATIENCE).is_some(), "{own}");
                // Another port of the pod has asked nobody.
                let quiet = socket(SERVER, own, 0);
                resolver.send_to(b"unasked", quiet.local_addr().unwrap()).unwrap();
                assert_eq!(next(&quiet, SILENCE), None, "{own}");
            }
        },
    );
}

#[test]
fn whom_policy_turns_against_gets_no_datagram_in_or_out() {
    on_a_node(
        "non_tcp::whom_policy_turns_against_gets_no_datagram_in_or_out",
        || {
            pods();
            let mut datapath = judging();
            enforce(&mut datapath);
            let (own, to) = pairs(FRIEND).next().unwrap();
            let (client, server) = (socket(FRIEND, own, 0), socket(SERVER, to, PORT));
            assert_eq!(talks(&client, &server, SocketAddr::new(to, PORT)), (true, true));
            // A question is under way when policy turns.
            client.send_to(b"question", (to, PORT)).unwrap();
            let (_, from) = next(&server, PATIENCE).unwrap();
            let id = datapath.reserve(&SERVER.uid()).unwrap();
            let turned = crate::policy::Policy {
                endpoints: &[(SERVER, id)],
                allowed: &[],
                denied: &[FRIEND, STRANGER],
                mode: Mode::Enforce,
            };
            datapath.commit(&turned.tables(false), 2).unwrap();
            server.send_to(b"late", from).unwrap();
            assert_eq!(next(&client, SILENCE), None, "no answer leaks");
            assert_eq!(talks(&client, &server, SocketAddr::new(to, PORT)), (false, false));
            let restored = tables(&mut datapath, Mode::Enforce, false);
            datapath.commit(&restored, 3).unwrap();
            assert_eq!(talks(&client, &server, SocketAddr::new(to, PORT)), (true, true));
        },
    );
}

#[test]
fn pings_are_judged_by_rules_without_ports_and_a_pods_own_are_answered() {
    on_a_node(
        "non_tcp::pings_are_judged_by_rules_without_ports_and_a_pods_own_are_answered",
        || {
            pods();
            let mut datapath = judging();
            enforce(&mut datapath);
            for (friend, stranger, server) in [
                (FRIEND.v4(), STRANGER.v4(), SERVER.v4()),
                (FRIEND.v6(), STRANGER.v6(), SERVER.v6()),
            ] {
                assert!(pings(FRIEND, server), "{server}");
                assert!(!pings(STRANGER, server), "{server}");
                assert!(pings(SERVER, stranger), "{stranger}");
                assert!(pings(SERVER, friend), "{friend}");
                // Made by the node, and the pod's to the node.
                assert!(ping(server), "{server}");
                let node = if server.is_ipv4() {
                    "10.244.0.1"
                } else {
                    "fd00:10:244::1"
                };
                assert!(pings(SERVER, node.parse().unwrap()), "{node}");
            }
        },
    );
}

#[test]
fn the_nodes_datagrams_pass_and_are_answered() {
    on_a_node("non_tcp::the_nodes_datagrams_pass_and_are_answered", || {
        pods();
        let mut datapath = judging();
        enforce(&mut datapath);
        for (node, to) in ["0.0.0.0:0", "[::]:0"].into_iter().zip(families(SERVER)) {
            let server = socket(SERVER, to, 5353);
            let client = UdpSocket::bind(node).unwrap();
            assert_eq!(
                talks(&client, &server, SocketAddr::new(to, 5353)),
                (true, true),
                "{to}"
            );
        }
    });
}

#[test]
fn large_datagrams_pass_in_pieces() {
    on_a_node("non_tcp::large_datagrams_pass_in_pieces", || {
        pods();
        let mut datapath = judging();
        enforce(&mut datapath);
        let tables = tables_of_both(&mut datapath);
        datapath.commit(&tables, 2).unwrap();
        datapath.attach(&FRIEND.spec()).unwrap();
        let large = vec![7; 4_000];
        for (own, to) in pairs(FRIEND) {
            let (client, server) = (socket(FRIEND, own, 0), socket(SERVER, to, PORT));
            client.send_to(&large, (to, PORT)).unwrap();
            let (seen, from) = next(&server, PATIENCE).expect("all pieces");
            assert_eq!(seen.len(), large.len());
            server.send_to(&large, from).unwrap();
            assert_eq!(next(&client, PATIENCE).expect("all pieces").0.len(), large.len());
        }
        for (own, to) in pairs(STRANGER) {
            let (client, server) = (socket(STRANGER, own, 0), socket(SERVER, to, PORT));
            client.send_to(&large, (to, PORT)).unwrap();
            assert_eq!(next(&server, SILENCE), None);
        }
    });
}

#[test]
fn a_resolver_behind_a_service_is_asked_and_answers() {
    on_a_node(
        "non_tcp::a_resolver_behind_a_service_is_asked_and_answers",
        || {
            pods();
            let mut datapath = judging();
            enforce(&mut datapath);
            // The server asks 10.96.0.10, which the node translates to the stranger.
            run("nft add table ip t
             nft 'add chain ip t c { type nat hook prerouting priority dstnat; }'
             nft add rule ip t c ip daddr 10.96.0.10 udp dport 53 dnat to 10.244.0.3:5300");
            assert!(output("nft list ruleset").contains("10.244.0.3"));
            let resolver = socket(STRANGER, STRANGER.v4(), 5300);
            let client = socket(SERVER, SERVER.v4(), 0);
            let seen = talks(&client, &resolver, "10.96.0.10:53".parse().unwrap());
            assert_eq!(seen, (true, true));
            // Past the translation nobody has asked it.
            let unasked = socket(STRANGER, STRANGER.v4(), 5301);
            unasked.send_to(b"unasked", client.local_addr().unwrap()).unwrap();
            assert_eq!(next(&client, SILENCE), None);
        },
    );
}

#[test]
fn an_error_about_a_pods_own_datagram_reaches_it() {
    on_a_node("non_tcp::an_error_about_a_pods_own_datagram_reaches_it", || {
        pods();
        let mut datapath = judging();
        enforce(&mut datapath);
        for (other, own) in pairs(STRANGER) {
            // Nobody listens there: the stranger's own stack says so.
            let client = socket(SERVER, own, 0);
            client.connect((other, 9)).unwrap();
            client.send(b"anybody").unwrap();
            let mut buffer = [0; 8];
            let error = client.recv(&mut buffer).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{other}");
        }
    });
}
