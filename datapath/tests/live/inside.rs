//! `--hook=pod` on real veths: what comes to a pod is judged at its own end, whatever skips the host end.

use std::ffi::CString;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::time::Duration;

use aya::programs::{SchedClassifier, TcAttachType};
use rustix::net::{AddressFamily, SocketType, sockopt};
use thyra_datapath::abi::{Mode, Reason, maps};
use thyra_datapath::{
    AttachError, Config, Datapath, EndpointSpec, Hook, InsideError, OpenError, Order, Place,
};

use crate::node::{self, Fate, Pod, chain, config, echoes, eventually, on_a_node, output, run};
use crate::{
    FRIEND, PORT, SERVER, STRANGER, enforce, everybody_gets_in, families, flood, links,
    only_the_friend_gets_in, pods, problems, tables, tables_of_both,
};

fn at(place: Place) -> Config {
    Config {
        hook: Some(Hook::Tcx),
        place,
        ..config()
    }
}

fn open(place: Place) -> Datapath {
    Datapath::open(at(place)).unwrap_or_else(|e| panic!("{}", chain(&e)))
}

/// Runs `body` on a node whose kernel has tcx links.
fn on_tcx(test: &str, body: impl FnOnce()) {
    if Hook::newest() == Hook::Tcx {
        on_a_node(test, body);
    } else {
        eprintln!("SKIPPED `{test}`: `--hook=pod` needs tcx links");
    }
}

/// Programs at the ingress of the pod's own interface.
fn inside(pod: Pod) -> usize {
    pod.inside(|| {
        SchedClassifier::query_tcx("eth0", TcAttachType::Ingress)
            .unwrap()
            .1
            .len()
    })
}

fn spoofed(datapath: &Datapath) -> u64 {
    let counters = datapath.counters();
    counters
        .reasons
        .get(&Reason::InvalidSourceIp)
        .map_or(0, |c| c.packets)
}

/// What the server's own netfilter has counted of SYNs to its port.
fn syns_inside() -> u64 {
    let list = output("ip netns exec pod4 nft list ruleset");
    let count = list.split("packets ").nth(1).unwrap().split(' ').next().unwrap();
    count.parse().unwrap()
}

fn count_syns_inside() {
    run(&format!(
        "ip netns exec pod4 nft 'add table inet seen
             add chain inet seen input {{ type filter hook input priority 0; }}
             add rule inet seen input tcp dport {PORT} tcp flags & (syn | ack) == syn counter'"
    ));
}

/// A connection from an address and with a mark of the pod's choice.
fn connect_as(pod: Pod, from: IpAddr, mark: u32, to: IpAddr) -> std::io::Result<TcpStream> {
    pod.inside(|| {
        let family = if from.is_ipv4() {
            AddressFamily::INET
        } else {
            AddressFamily::INET6
        };
        let socket = rustix::net::socket(family, SocketType::STREAM, None)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(Duration::from_secs(1)))?;
        let (option, size) = (
            (&raw const mark).cast(),
            libc::socklen_t::try_from(size_of_val(&mark)).unwrap(),
        );
        // SAFETY: a number that lives past the call, with its size.
        let set =
            unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_MARK, option, size) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        rustix::net::bind(&socket, &SocketAddr::new(from, 0))?;
        rustix::net::connect(&socket, &SocketAddr::new(to, PORT))?;
        Ok(socket.into())
    })
}

#[test]
fn inside_a_pod_the_same_gets_in_and_is_refused() {
    on_tcx("inside::inside_a_pod_the_same_gets_in_and_is_refused", || {
        pods();
        STRANGER.serve(PORT);
        let mut datapath = open(Place::Pod);
        let id = enforce(&mut datapath);
        assert_eq!(datapath.check_coverage(), []);
        only_the_friend_gets_in();
        for address in families(STRANGER) {
            assert_eq!(
                SERVER.try_connect(address, PORT),
                Fate::Answered,
                "its own, {address}"
            );
        }
        // Probes: the node may, by any address, whatever policy says.
        let probes = families(SERVER).map(|address| TcpStream::connect((address, PORT)).unwrap());
        assert!(probes.iter().all(echoes));
        let open_ones = families(SERVER).map(|address| FRIEND.connect(address, PORT).unwrap());
        assert!(open_ones.iter().all(echoes));
        assert_eq!(datapath.check_coverage(), [], "each was counted inside");
        let status = datapath.status();
        assert_eq!(problems(&status), Vec::<&String>::new());
        assert_eq!(status.hook, "tcx at the pod's own end of the veth");
        assert_eq!((inside(SERVER), links()), (1, 2));

        // Policy turns: both ends are told at once.
        let turned = tables(&mut datapath, Mode::Enforce, false);
        let turned = thyra_datapath::abi::tables::Tables {
            class_column: vec![0, 2, 1].into(),
            ..turned
        };
        datapath.commit(&turned, 2).unwrap();
        assert!(!open_ones.iter().any(echoes));
        for connection in &open_ones {
            eventually("the client's end is reset", || {
                connection.take_error().unwrap().or_else(|| {
                    let _ = connection.set_nonblocking(true);
                    std::io::Write::write(&mut &*connection, b"x").err()
                })
            });
        }
        let port = PORT;
        eventually("the server's end is reset", || {
            let held = output(&format!(
                "ip netns exec pod4 ss -Htn state established sport = {port}"
            ));
            let of_friend = |line: &&str| line.contains("10.244.0.2:") || line.contains("[fd00:10:244::2]:");
            (held.lines().filter(of_friend).count() == 0).then_some(())
        });
        assert!(probes.iter().all(echoes), "the node's go on");
        datapath.detach(id).unwrap();
        assert_eq!((inside(SERVER), links()), (0, 0));
        everybody_gets_in();
    });
}

#[test]
fn what_skips_the_host_end_is_judged_inside() {
    on_tcx("inside::what_skips_the_host_end_is_judged_inside", || {
        pods();
        count_syns_inside();
        // The control: at the host end nothing is seen of what another program puts straight into the pod.
        let mut datapath = open(Place::Host);
        enforce(&mut datapath);
        let _foreign = redirects(STRANGER, SERVER);
        for address in families(SERVER) {
            let before = syns_inside();
            assert_ne!(STRANGER.try_connect(address, PORT), Fate::Refused, "{address}");
            assert_ne!(syns_inside(), before, "past the host end, {address}");
        }
        drop(datapath);
        let mut datapath = open(Place::Pod);
        let id = datapath
            .attach(&SERVER.spec())
            .unwrap_or_else(|e| panic!("{}", chain(&e)));
        assert_eq!(datapath.check_coverage(), []);
        for address in families(SERVER) {
            let before = syns_inside();
            let fate = STRANGER.try_connect(address, PORT);
            assert_eq!(fate, Fate::Refused, "{address}");
            assert_eq!(syns_inside(), before, "{address}");
        }
        assert_eq!(datapath.check_coverage(), []);
        assert!(datapath.counters().endpoints[&id].to_pod_dropped >= 2);
    });
}

#[test]
fn pods_with_equal_interface_indices_are_told_apart() {
    on_tcx("inside::pods_with_equal_interface_indices_are_told_apart", || {
        pods();
        FRIEND.serve(PORT);
        let index = |pod: Pod| {
            pod.inside(|| {
                output("ip -o link show eth0")
                    .split(':')
                    .next()
                    .unwrap()
                    .to_owned()
            })
        };
        assert_eq!(index(FRIEND), index(SERVER));
        let mut datapath = open(Place::Pod);
        let tables = tables_of_both(&mut datapath);
        datapath.commit(&tables, 1).unwrap();
        let ids = [FRIEND, SERVER].map(|pod| datapath.attach(&pod.spec()).unwrap());
        let dropped = |datapath: &Datapath| ids.map(|id| datapath.counters().endpoints[&id].to_pod_dropped);
        assert_eq!(dropped(&datapath), [0, 0]);
        assert_eq!(STRANGER.try_connect(SERVER.v4(), PORT), Fate::Refused);
        assert_eq!(dropped(&datapath), [0, 1]);
        assert_eq!(STRANGER.try_connect(FRIEND.v6(), PORT), Fate::Refused);
        assert_eq!(dropped(&datapath), [1, 1]);
        only_the_friend_gets_in();
    });
}

#[test]
fn nobody_lends_himself_an_address_or_a_mark() {
    on_tcx("inside::nobody_lends_himself_an_address_or_a_mark", || {
        pods();
        let mut datapath = open(Place::Pod);
        let tables = tables_of_both(&mut datapath);
        datapath.commit(&tables, 1).unwrap();
        for pod in [FRIEND, SERVER] {
            datapath.attach(&pod.spec()).unwrap();
        }
        let marked = connect_as(STRANGER, STRANGER.v4(), maps::OWN_MARK, SERVER.v4());
        assert_eq!(
            marked.unwrap_err().kind(),
            std::io::ErrorKind::ConnectionRefused,
            "a mark does not leave a pod"
        );
        // A pod without programs takes the friend's address: the server's host end knows better.
        run("ip -n pod3 addr add 10.244.0.2/32 dev eth0");
        let before = spoofed(&datapath);
        let lent = connect_as(STRANGER, FRIEND.v4(), 0, SERVER.v4()).unwrap_err();
        assert_ne!(lent.kind(), std::io::ErrorKind::ConnectionRefused, "{lent}");
        let by_address = spoofed(&datapath) - before;
        assert!(by_address >= 1);
        // A pod with programs, past its own egress: it is asked at the host end.
        FRIEND.inside(|| node::send_frames("eth0", 50, true));
        eventually("all of those are dropped", || {
            (spoofed(&datapath) - before - by_address >= 50).then_some(())
        });
        only_the_friend_gets_in();
    });
}

#[test]
fn a_pod_reaches_itself_by_its_service() {
    on_tcx("inside::a_pod_reaches_itself_by_its_service", || {
        pods();
        run(&format!(
            "nft 'add table ip services
                  add chain ip services translate {{ type nat hook prerouting priority -100; }}
                  add rule ip services translate ip daddr 10.96.0.10 tcp dport 80 dnat to {}:{PORT}
                  add chain ip services hairpin {{ type nat hook postrouting priority 100; }}
                  add rule ip services hairpin ct status dnat masquerade'",
            SERVER.v4()
        ));
        let mut datapath = open(Place::Pod);
        enforce(&mut datapath);
        let service = IpAddr::from([10, 96, 0, 10]);
        assert_eq!(SERVER.try_connect(service, 80), Fate::Answered);
        assert_eq!(
            STRANGER.try_connect(service, 80),
            Fate::Refused,
            "masquerading lends nothing"
        );
    });
}

#[test]
fn the_other_end_takes_over_under_load_without_a_gap() {
    on_tcx(
        "inside::the_other_end_takes_over_under_load_without_a_gap",
        || {
            pods();
            enforce(&mut open(Place::Host));
            let connection = FRIEND.connect(SERVER.v4(), PORT).unwrap();
            let probe = TcpStream::connect((SERVER.v6(), PORT)).unwrap();
            count_syns_inside();
            let tries = flood(|| {
                for place in [Place::Pod, Place::Pod, Place::Host, Place::Pod, Place::Host] {
                    // As if another build had pinned them.
                    run("rm /run/bpf/thyra/*/program-*");
                    let mut datapath = open(place);
                    datapath
                        .attach(&SERVER.spec())
                        .unwrap_or_else(|e| panic!("{}", chain(&e)));
                    let expected = usize::from(place == Place::Pod);
                    assert_eq!((inside(SERVER), links()), (expected, 2));
                    assert_eq!(problems(&datapath.status()), Vec::<&String>::new());
                }
            });
            assert!(tries > 10, "{tries}");
            assert!(echoes(&connection) && echoes(&probe));
            let status = open(Place::Pod).status();
            assert!(
                problems(&status)[0].contains("not inside the pod"),
                "until it is attached again it is judged at the host end: {status:?}"
            );
            only_the_friend_gets_in();
        },
    );
}

#[test]
fn cleaning_up_leaves_nothing_inside_pods() {
    on_tcx("inside::cleaning_up_leaves_nothing_inside_pods", || {
        pods();
        let mut datapath = open(Place::Pod);
        enforce(&mut datapath);
        drop(datapath);
        assert_eq!(inside(SERVER), 1);
        Datapath::cleanup(&config().bpffs).unwrap();
        assert_eq!(inside(SERVER), 0);
        assert!(!config().bpffs.exists());
        everybody_gets_in();
    });
}

#[test]
fn what_can_not_be_judged_inside_is_refused_by_name() {
    on_tcx("inside::what_can_not_be_judged_inside_is_refused_by_name", || {
        pods();
        let pod = || at(Place::Pod);
        for (config, name) in [
            (
                Config {
                    local_redirect: true,
                    ..pod()
                },
                "--local-redirect",
            ),
            (
                Config {
                    order: Order::Last,
                    ..pod()
                },
                "--attach=tcx-last",
            ),
            (
                Config {
                    hook: Some(Hook::Clsact),
                    ..pod()
                },
                "needs tcx links",
            ),
        ] {
            let refused = Datapath::open(config).unwrap_err();
            assert!(
                matches!(&refused, OpenError::Place(why) if why.contains(name)),
                "{refused}"
            );
        }
        let mut datapath = open(Place::Pod);
        let tables = tables(&mut datapath, Mode::Enforce, false);
        datapath.commit(&tables, 1).unwrap();
        let refused = |datapath: &mut Datapath, spec: EndpointSpec| match datapath.attach(&spec) {
            Err(AttachError::Inside(why)) => why,
            other => panic!("{other:?}"),
        };
        let netns = |netns: Option<&str>| EndpointSpec {
            netns: netns.map(PathBuf::from),
            ..SERVER.spec()
        };
        assert!(matches!(
            refused(&mut datapath, netns(None)),
            InsideError::NoNamespace
        ));
        let elsewhere = refused(&mut datapath, netns(Some("/run/netns/pod2")));
        assert!(
            chain(&elsewhere).contains("is it the pod's namespace?"),
            "{}",
            chain(&elsewhere)
        );
        run("ip link add veth9 type bridge");
        let no_veth = EndpointSpec {
            host_interface: "veth9".into(),
            ..SERVER.spec()
        };
        assert!(matches!(refused(&mut datapath, no_veth), InsideError::NoVeth(_)));
        assert_eq!((inside(SERVER), links()), (0, 0));
        everybody_gets_in();
    });
}

/// Another program that puts whatever a pod sends straight into another pod, until it is dropped.
fn redirects(from: Pod, to: Pod) -> SchedClassifier {
    let Pod(n) = from;
    // Nobody answers for the gateway any more.
    run(&format!(
        "mac=$(ip -o link show veth{n} | sed 's/.*ether \\([^ ]*\\).*/\\1/')
         ip -n pod{n} neigh replace 10.244.0.1 lladdr $mac dev eth0
         ip -n pod{n} neigh replace fd00:10:244::1 lladdr $mac dev eth0
         own=$(ip -n pod{n} -o link show eth0 | sed 's/.*ether \\([^ ]*\\).*/\\1/')
         ip neigh replace {} lladdr $own dev veth{n}
         ip neigh replace {} lladdr $own dev veth{n}",
        from.v4(),
        from.v6()
    ));
    let name = CString::new(to.interface()).unwrap();
    // SAFETY: a function that reads a string.
    let ifindex = unsafe { libc::if_nametoindex(name.as_ptr()) };
    let [a, b, c, d] = ifindex.to_le_bytes();
    // `return bpf_redirect_peer(ifindex, 0);`
    let instructions = [
        [0xb7, 0x01, 0, 0, a, b, c, d],
        [0xb7, 0x02, 0, 0, 0, 0, 0, 0],
        [0x85, 0x00, 0, 0, 155, 0, 0, 0],
        [0x95, 0x00, 0, 0, 0, 0, 0, 0],
    ];
    let pin = format!("/run/bpf/redirects-{n}");
    load_and_pin(&instructions, &pin);
    let mut program = SchedClassifier::from_pin(&pin).unwrap();
    program.attach(&from.interface(), TcAttachType::Ingress).unwrap();
    program
}

/// The head of `union bpf_attr` for `BPF_PROG_LOAD`, and as much for `BPF_OBJ_PIN`.
#[repr(C)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    rest: [u64; 12],
}

#[repr(C)]
struct Pin {
    path: u64,
    fd: u32,
    flags: u32,
}

fn load_and_pin(instructions: &[[u8; 8]], pin: &str) {
    let address = |pointer: *const u8| u64::try_from(pointer.addr()).unwrap();
    let license = c"GPL";
    let path = CString::new(pin).unwrap();
    let load = Load {
        kind: 3,
        count: u32::try_from(instructions.len()).unwrap(),
        instructions: address(instructions.as_ptr().cast()),
        license: address(license.as_ptr().cast()),
        rest: [0; 12],
    };
    // SAFETY: attributes that live past each call, with their sizes; what they point to does, too.
    unsafe {
        let fd = libc::syscall(libc::SYS_bpf, 5, &raw const load, size_of::<Load>());
        assert!(fd >= 0, "{}", std::io::Error::last_os_error());
        let pin = Pin {
            path: address(path.as_ptr().cast()),
            fd: u32::try_from(fd).unwrap(),
            flags: 0,
        };
        let pinned = libc::syscall(libc::SYS_bpf, 6, &raw const pin, size_of::<Pin>());
        assert_eq!(pinned, 0, "{}", std::io::Error::last_os_error());
        libc::close(libc::c_int::try_from(fd).unwrap());
    }
}
