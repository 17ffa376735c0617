//! Connections that need L7: they reach the listener of an Envoy inside the pod, or nothing. This process plays the
//! Envoy.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use thyra_datapath::abi::limits::L7_FIRST_PORT;
use thyra_datapath::abi::tables::{SourceAddress, Tables, Verdict};
use thyra_datapath::abi::{Action, Mode, Reason};
use thyra_datapath::{Config, Datapath, EnvoyGroup};

use crate::node::{Fate, Pod, chain, config, eventually, on_a_node, open, run, serve_each};
use crate::policy::{Policy, rule};
use crate::{FRIEND, PORT, SERVER, STRANGER, families, pods};

/// What the Envoy of this test answers, whatever it is asked.
const ENVOYS: &[u8; 4] = b"ENVY";

/// Where the stranger's connections end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Envoy,
    App,
    Nowhere,
}

/// A control group of this process alone, removed at the end.
struct Cgroup(PathBuf);

impl Cgroup {
    fn join() -> Self {
        run("mkdir /run/cgroup && mount -t cgroup2 cgroup2 /run/cgroup");
        let folder = PathBuf::from(format!("/run/cgroup/thyra-live-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("cgroup.procs"), "0").unwrap();
        Self(folder)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // What can't be removed any more is the next failure's to tell.
        let _ = fs::write("/run/cgroup/cgroup.procs", "0");
        let _ = fs::remove_dir(&self.0);
    }
}

/// Listens on one port as an Envoy in a pod, until the process ends.
fn play_envoy(pod: Pod, port: u16) {
    for any in ["0.0.0.0", "::"] {
        let listener = pod.inside(|| listener(any, port));
        serve_each(listener, answer);
    }
}

/// `::` alone would take the IPv4 connections too.
fn listener(any: &str, port: u16) -> TcpListener {
    let v6 = any.contains(':');
    let family = if v6 {
        rustix::net::AddressFamily::INET6
    } else {
        rustix::net::AddressFamily::INET
    };
    let socket = rustix::net::socket(family, rustix::net::SocketType::STREAM, None).unwrap();
    rustix::net::sockopt::set_socket_reuseaddr(&socket, true).unwrap();
    if v6 {
        rustix::net::sockopt::set_ipv6_v6only(&socket, true).unwrap();
    }
    let address: std::net::IpAddr = any.parse().unwrap();
    rustix::net::bind(&socket, &std::net::SocketAddr::new(address, port)).unwrap();
    rustix::net::listen(&socket, 16).unwrap();
    TcpListener::from(socket)
}

fn answer(mut stream: TcpStream) {
    let mut buffer = [0; 4];
    while stream.read_exact(&mut buffer).is_ok() && stream.write_all(ENVOYS).is_ok() {}
}

/// Who answers on an open connection.
fn speaks(mut stream: &TcpStream) -> At {
    stream
        .set_read_timeout(Some(std::time::Duration::from_secs(2)))
        .unwrap();
    let mut answer = [0; 4];
    if stream.write_all(b"ping").is_err() || stream.read_exact(&mut answer).is_err() {
        return At::Nowhere;
    }
    match &answer {
        ENVOYS => At::Envoy,
        b"ping" => At::App,
        other => panic!("nobody says {other:?}"),
    }
}

fn reached(from: Pod) -> [At; 2] {
    families(SERVER).map(|address| match from.connect(address, PORT) {
        Ok(stream) => speaks(&stream),
        Err(_) => At::Nowhere,
    })
}

fn needs_l7(residual: &str) -> Verdict {
    Verdict {
        action: Action::Deny,
        reason: Reason::NeedsL7,
        rule: None,
        because: vec![(rule("l7"), "methods".into())],
        residual: Some(residual.into()),
        would: None,
    }
}

/// The friend may connect; the stranger's verdict is `other`.
fn tables(datapath: &mut Datapath, other: Verdict) -> Tables {
    let id = datapath.reserve(&SERVER.uid()).unwrap();
    let endpoints = [(SERVER, id)];
    let mut tables = Policy {
        endpoints: &endpoints,
        allowed: &[FRIEND],
        denied: &[STRANGER],
        mode: Mode::Enforce,
    }
    .tables(false);
    // Class 2 is the stranger's; so is its column.
    let own = Arc::make_mut(&mut tables.verdicts);
    own.push(other);
    let at = u16::try_from(own.len() - 1).unwrap();
    Arc::make_mut(&mut tables.rows)[0][2] = at;
    let addresses = Arc::make_mut(&mut tables.addresses);
    for address in families(SERVER) {
        addresses.push(SourceAddress {
            address,
            class: 0,
            local: id,
        });
    }
    addresses.sort();
    tables
}

fn listeners(all: &[(&str, u16)]) -> BTreeMap<Arc<str>, u16> {
    all.iter().map(|(name, port)| (Arc::from(*name), *port)).collect()
}

/// The server under the tables, with its namespace steered.
fn steered(verdict: Verdict) -> (Datapath, u16) {
    pods();
    let mut datapath = open();
    let tables = tables(&mut datapath, verdict);
    datapath.commit(&tables, 1).unwrap();
    let id = datapath
        .attach(&SERVER.spec())
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    steer(&mut datapath, id);
    (datapath, id)
}

fn steer(datapath: &mut Datapath, id: u16) {
    let netns = SERVER.spec().netns.unwrap();
    datapath
        .steer(id, &netns)
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
}

/// The same with an Envoy that judges `r1`, in a control group that goes with the test.
fn at_work(verdict: Verdict) -> (Cgroup, Datapath, u16) {
    let cgroup = Cgroup::join();
    let (mut datapath, id) = steered(verdict);
    datapath.register(&cgroup.0).unwrap();
    play_envoy(SERVER, FIRST);
    datapath.set_listeners(listeners(&[("r1", FIRST)])).unwrap();
    (cgroup, datapath, id)
}

const FIRST: u16 = L7_FIRST_PORT;
const OTHER: u16 = L7_FIRST_PORT + 7;

#[test]
fn a_connection_that_needs_l7_reaches_envoy_or_nothing() {
    on_a_node(
        "steered::a_connection_that_needs_l7_reaches_envoy_or_nothing",
        || {
            let cgroup = Cgroup::join();
            let (mut datapath, _) = steered(needs_l7("r1"));
            assert_eq!(reached(STRANGER), [At::Nowhere; 2], "no envoy");
            datapath
                .register(&cgroup.0)
                .unwrap_or_else(|e| panic!("{}", chain(&e)));
            play_envoy(SERVER, FIRST);
            assert_eq!(
                reached(STRANGER),
                [At::Nowhere; 2],
                "envoy listens for nobody yet"
            );
            datapath.set_listeners(listeners(&[("r1", FIRST)])).unwrap();
            assert_eq!(reached(STRANGER), [At::Envoy; 2]);
            assert_eq!(reached(FRIEND), [At::App; 2], "allowed by the kernel alone");
            for address in families(SERVER) {
                assert_eq!(
                    STRANGER.try_connect(address, FIRST),
                    Fate::Refused,
                    "envoy's own port"
                );
                let own = std::net::SocketAddr::new(address, PORT);
                assert_eq!(
                    speaks(&TcpStream::connect(own).unwrap()),
                    At::App,
                    "made by the node"
                );
                let inside = SERVER.inside(|| TcpStream::connect(own).unwrap());
                assert_eq!(speaks(&inside), At::App, "envoy's way to the pod");
            }
            datapath.set_listeners(listeners(&[("r1", OTHER)])).unwrap();
            assert_eq!(reached(STRANGER), [At::Nowhere; 2], "nobody listens there");
        },
    );
}

#[test]
fn an_open_connection_is_cut_when_its_listener_no_longer_judges_it() {
    let name = "steered::an_open_connection_is_cut_when_its_listener_no_longer_judges_it";
    on_a_node(name, || {
        let cgroup = Cgroup::join();
        let (mut datapath, _) = steered(needs_l7("r1"));
        datapath.register(&cgroup.0).unwrap();
        play_envoy(SERVER, FIRST);
        play_envoy(SERVER, OTHER);
        let both = listeners(&[("r1", FIRST), ("r2", OTHER)]);
        datapath.set_listeners(both).unwrap();
        let open = || families(SERVER).map(|address| STRANGER.connect(address, PORT).unwrap());
        let all = |streams: &[TcpStream; 2]| streams.each_ref().map(speaks);

        let streams = open();
        assert_eq!(all(&streams), [At::Envoy; 2]);
        let other = tables(&mut datapath, needs_l7("r2"));
        datapath.commit(&other, 2).unwrap();
        assert_eq!(all(&streams), [At::Nowhere; 2], "another residual");

        let streams = open();
        assert_eq!(all(&streams), [At::Envoy; 2]);
        // The rules of the listener changed in place: it judges the new residual now.
        datapath.set_listeners(listeners(&[("r3", OTHER)])).unwrap();
        let changed = tables(&mut datapath, needs_l7("r3"));
        datapath.commit(&changed, 3).unwrap();
        assert_eq!(reached(STRANGER), [At::Envoy; 2]);

        let streams = open();
        datapath.set_listeners(BTreeMap::new()).unwrap();
        assert_eq!(all(&streams), [At::Nowhere; 2], "the listener went");
        datapath.set_listeners(listeners(&[("r3", OTHER)])).unwrap();
        assert_eq!(all(&streams), [At::Nowhere; 2], "what was cut stays cut");
        assert_eq!(reached(STRANGER), [At::Envoy; 2]);
    });
}

#[test]
fn a_pod_has_so_many_connections_with_envoy_and_those_that_end_make_room() {
    let name = "steered::a_pod_has_so_many_connections_with_envoy_and_those_that_end_make_room";
    on_a_node(name, || {
        let (_cgroup, datapath, _) = at_work(needs_l7("r1"));
        drop(datapath);
        let two = Config {
            l7_connections: 2,
            ..config()
        };
        let mut datapath = Datapath::open(two).unwrap_or_else(|e| panic!("{}", chain(&e)));
        datapath.set_listeners(listeners(&[("r1", FIRST)])).unwrap();
        let full = || {
            let streams = families(SERVER).map(|address| STRANGER.connect(address, PORT).unwrap());
            assert_eq!(streams.each_ref().map(speaks), [At::Envoy; 2]);
            for address in families(SERVER) {
                assert_eq!(STRANGER.try_connect(address, PORT), Fate::Refused);
            }
            assert_eq!(streams.each_ref().map(speaks), [At::Envoy; 2]);
            streams
        };
        drop(full());
        let minute = 61_000_000_000;
        // The other end may take a moment to close its own.
        eventually("both are collected", || {
            datapath.collect(Datapath::now_ns() + minute).unwrap();
            let left = datapath.status().fill;
            let used = left.iter().filter(|fill| fill.table.starts_with("L7_FLOWS"));
            used.map(|fill| fill.used).eq([0, 0]).then_some(())
        });
        let streams = full();
        datapath.set_listeners(BTreeMap::new()).unwrap();
        assert_eq!(streams.each_ref().map(speaks), [At::Nowhere; 2]);
        datapath.set_listeners(listeners(&[("r1", FIRST)])).unwrap();
        full();
    });
}

#[test]
fn an_open_connection_to_the_app_is_not_taken_for_one_of_envoy() {
    let name = "steered::an_open_connection_to_the_app_is_not_taken_for_one_of_envoy";
    on_a_node(name, || {
        let (_cgroup, mut datapath, _) = at_work(crate::allow("open"));
        let streams = families(SERVER).map(|address| STRANGER.connect(address, PORT).unwrap());
        assert_eq!(streams.each_ref().map(speaks), [At::App; 2]);
        let l7 = tables(&mut datapath, needs_l7("r1"));
        datapath.commit(&l7, 2).unwrap();
        assert_eq!(streams.each_ref().map(speaks), [At::Nowhere; 2]);
        assert_eq!(reached(STRANGER), [At::Envoy; 2]);
    });
}

#[test]
fn links_listeners_and_connections_outlive_the_process_and_a_restart() {
    let name = "steered::links_listeners_and_connections_outlive_the_process_and_a_restart";
    on_a_node(name, || {
        let (cgroup, datapath, id) = at_work(needs_l7("r1"));
        assert_eq!(reached(STRANGER), [At::Envoy; 2]);
        let held = families(SERVER).map(|address| STRANGER.connect(address, PORT).unwrap());
        drop(datapath);
        assert_eq!(reached(STRANGER), [At::Envoy; 2], "without a process");
        let mut datapath = open();
        assert!(datapath.is_steered(id));
        assert!(
            datapath.register(&cgroup.0).unwrap(),
            "its sockets are known as before"
        );
        assert_eq!(reached(STRANGER), [At::Envoy; 2]);
        assert_eq!(held.each_ref().map(speaks), [At::Envoy; 2]);
        datapath.set_listeners(listeners(&[])).unwrap();
        assert_eq!(reached(STRANGER), [At::Nowhere; 2], "there is no Envoy any more");
        assert_eq!(held.each_ref().map(speaks), [At::Nowhere; 2]);
        datapath.set_listeners(listeners(&[("r1", FIRST)])).unwrap();
        assert_eq!(reached(STRANGER), [At::Envoy; 2]);
        datapath.detach(id).unwrap();
        assert!(!datapath.is_steered(id));
        assert_eq!(reached(STRANGER), [At::App; 2], "no endpoint any more");
    });
}

#[test]
fn the_end_of_enforcement_is_the_end_of_envoy() {
    let name = "steered::the_end_of_enforcement_is_the_end_of_envoy";
    on_a_node(name, || {
        run("mkdir /run/cgroup && mount -t cgroup2 cgroup2 /run/cgroup");
        let folder = format!("/run/thyra-live-{}/envoy", std::process::id());
        let group = EnvoyGroup::make(folder.as_ref()).unwrap();
        let mut envoy = Command::new("sleep").arg("600").spawn().unwrap();
        fs::write(group.path().join("cgroup.procs"), envoy.id().to_string()).unwrap();
        let mut datapath = open();
        assert!(!datapath.register(group.path()).unwrap(), "nobody knew of it");
        drop(datapath);
        assert!(open().register(group.path()).unwrap());
        let bpffs = config().bpffs;
        assert_eq!(envoy.try_wait().unwrap(), None);
        Datapath::cleanup(&bpffs).unwrap();
        eventually("it ends", || envoy.try_wait().unwrap());
        assert!(!group.path().exists());
        assert!(!bpffs.exists(), "no pin is left");
    });
}

#[test]
fn without_the_link_no_byte_reaches_the_app() {
    let name = "steered::without_the_link_no_byte_reaches_the_app";
    on_a_node(name, || {
        let (_cgroup, _datapath, id) = at_work(needs_l7("r1"));
        assert_eq!(reached(STRANGER), [At::Envoy; 2]);
        run(&format!("rm /run/bpf/thyra/*/steer-{id}"));
        // The kernel lets go of it after a grace period.
        eventually("nothing answers any more", || {
            let at = reached(STRANGER);
            assert!(!at.contains(&At::App), "{at:?}");
            (at == [At::Nowhere; 2]).then_some(())
        });
    });
}
