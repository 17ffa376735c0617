//! What happens to oracles over time: changes in place, an Envoy that dies, one that is too old.

use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process, setrlimit};
use thyra_datapath_abi::tables::RuleRef;
use thyra_node_proxy_bridge::bridge::{Question, Standing};
use thyra_node_proxy_bridge::envoy::{
    Binary, BinaryError, DEFAULT_HEAP, EnvoyConfig, EnvoyState, OLDEST, Supervisor,
};
use thyra_node_proxy_bridge::listener::Reading;
use thyra_policy_compiler::residual::{Residual, Test};
use thyra_policy_compiler::traffic::PathNormalization;
use tokio::net::UnixStream;

use super::client::{ask, connect, http};
use super::named::{allowing, get, values};
use super::node::{LIMIT, Node, binary, wanted};

fn path(value: &str) -> Arc<Residual<RuleRef>> {
    allowing("path", vec![Test::Path(values(vec![value.into()]))])
}

fn question(residual: &Residual<RuleRef>) -> Question {
    (Reading::Http, residual.address())
}

fn source() -> std::net::IpAddr {
    "10.0.0.2".parse().unwrap()
}

async fn status(oracle: &Path, target: &str) -> u16 {
    let mut stream = connect(oracle, source()).await;
    ask(&mut stream, &http(&get(target))).await.status
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_rule_acts_on_the_next_request_of_an_open_connection() {
    let Some(binary) = binary().await else { return };
    let mut node = Node::start(&binary, PathNormalization::Base, false).await;
    let (a, b) = (path("/a"), path("/b"));
    node.bridge.apply(&[wanted("cell", Reading::Http, &a)]);
    let oracle = node.oracle(&question(&a)).await;
    let mut stream = connect(&oracle, source()).await;
    let mut times = Vec::new();
    for round in 0..20 {
        let (now, then, yes, no) = if round % 2 == 0 {
            (&a, &b, "/a", "/b")
        } else {
            (&b, &a, "/b", "/a")
        };
        assert_eq!(ask(&mut stream, &http(&get(yes))).await.status, 200);
        assert_eq!(ask(&mut stream, &http(&get(no))).await.status, 403);
        let changed = Instant::now();
        node.bridge.apply(&[wanted("cell", Reading::Http, then)]);
        assert_eq!(
            node.oracle(&question(then)).await,
            oracle,
            "the listener is the same"
        );
        times.push(changed.elapsed());
        assert_eq!(ask(&mut stream, &http(&get(no))).await.status, 200);
        assert_eq!(node.bridge.standing(&question(now)), Standing::Unknown);
    }
    times.sort();
    println!("a changed rule is acknowledged in {:?} (median of 20)", times[10]);
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_residuals_share_a_listener_and_the_last_one_takes_it_along() {
    let Some(binary) = binary().await else { return };
    let mut node = Node::start(&binary, PathNormalization::Base, false).await;
    let residual = path("/a");
    let one = wanted("one", Reading::Http, &residual);
    let two = wanted("two", Reading::Http, &residual);
    node.bridge.apply(&[one.clone(), two]);
    let oracle = node.oracle(&question(&residual)).await;
    assert_eq!(status(&oracle, "/a").await, 200);
    let entries = std::fs::read_dir(node.folder.path()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.filter(|name| name.starts_with('h')).count(), 1);
    // One of the two changes: the other one keeps the listener, so a new one is made.
    let other = path("/b");
    node.bridge.apply(&[one, wanted("two", Reading::Http, &other)]);
    assert_ne!(node.oracle(&question(&other)).await, oracle);
    assert_eq!(node.oracle(&question(&residual)).await, oracle);
    node.bridge.apply(&[]);
    assert_eq!(node.bridge.standing(&question(&residual)), Standing::Unknown);
    let gone = tokio::time::timeout(LIMIT, async {
        while UnixStream::connect(&oracle).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    gone.await.expect("nobody listens any more");
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_envoy_comes_back_with_its_oracles() {
    let Some(binary) = binary().await else { return };
    let mut node = Node::start(&binary, PathNormalization::Base, false).await;
    let residual = path("/a");
    node.bridge.apply(&[wanted("cell", Reading::Http, &residual)]);
    let oracle = node.oracle(&question(&residual)).await;
    let pid = node.ready().await;
    let killed = Instant::now();
    kill(pid);
    let mut changes = node.bridge.changes();
    let noticed = tokio::time::timeout(LIMIT, async {
        while node.bridge.standing(&question(&residual)) != Standing::Awaited {
            changes.changed().await.unwrap();
        }
    });
    noticed.await.expect("its end is noticed");
    let mut state = node.supervisor.state();
    let another = state.wait_for(|state| matches!(state, EnvoyState::Ready { pid: now } if *now != pid));
    tokio::time::timeout(LIMIT, another)
        .await
        .expect("it is started again")
        .unwrap();
    assert_eq!(node.oracle(&question(&residual)).await, oracle);
    println!("killed, and active again after {:?}", killed.elapsed());
    assert_eq!(status(&oracle, "/a").await, 200);
    node.supervisor.stop().await;
    let refused = UnixStream::connect(&oracle).await.unwrap_err().kind();
    assert!([ErrorKind::ConnectionRefused, ErrorKind::NotFound].contains(&refused));
}

/// The Envoy that this test started, not yet reaped by its supervisor.
fn kill(pid: u32) {
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn envoy_runs_as_its_own_user_without_privileges() {
    let Some(binary) = binary().await else { return };
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: only root can give Envoy a user of its own");
        return;
    }
    // Root's home is closed to others.
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let copy = folder.path().join("envoy");
    std::fs::copy(&binary.path, &copy).unwrap();
    let binary = Binary { path: copy, ..binary };
    let user = 61_000;
    let mut node = Node::start_as(&binary, PathNormalization::Base, false, Some((user, user))).await;
    let pid = node.ready().await;
    let status_of = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = |name: &str| {
        let mut lines = status_of.lines().filter_map(|line| line.split_once(":\t"));
        let found = lines.find(|(n, _)| *n == name);
        found.map(|(_, value)| value.trim().to_owned()).unwrap()
    };
    assert_eq!(line("Uid"), format!("{user}\t{user}\t{user}\t{user}"));
    assert_eq!(line("Groups"), "");
    assert_eq!(line("NoNewPrivs"), "1");
    assert_eq!(line("Seccomp"), "2");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(line(set), "0000000000000000", "{set}");
    }
    let residual = path("/a");
    node.bridge.apply(&[wanted("cell", Reading::Http, &residual)]);
    let oracle = node.oracle(&question(&residual)).await;
    assert_eq!(status(&oracle, "/a").await, 200);
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_oracles_are_up_at_once() {
    let Some(binary) = binary().await else { return };
    let mut node = Node::start(&binary, PathNormalization::Base, false).await;
    let pid = node.ready().await;
    let idle = megabytes(pid);
    let residuals: Vec<_> = (0..100).map(|number| path(&format!("/{number}"))).collect();
    let mut cells: Vec<_> = residuals
        .iter()
        .map(|r| wanted(&r.address(), Reading::Http, r))
        .collect();
    let asked = Instant::now();
    node.bridge.apply(&cells);
    for residual in &residuals {
        node.oracle(&question(residual)).await;
    }
    let took = asked.elapsed();
    let one_more = path("/more");
    cells.push(wanted("more", Reading::Http, &one_more));
    let asked = Instant::now();
    node.bridge.apply(&cells);
    let oracle = node.oracle(&question(&one_more)).await;
    let more = asked.elapsed();
    assert_eq!(status(&oracle, "/more").await, 200);
    println!(
        "100 oracles active in {took:?}, one more in {more:?}; envoy {idle:.1} MB idle, {:.1} MB with them",
        megabytes(pid)
    );
    node.supervisor.stop().await;
}

fn megabytes(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes: f64 = line.unwrap().trim().trim_end_matches(" kB").parse().unwrap();
    kilobytes / 1024.0
}

fn script(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("envoy");
    std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test]
async fn an_envoy_that_can_not_be_used_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let old = script(
        folder.path(),
        "echo 'envoy  version: 0/1.31.2/Clean/RELEASE/BoringSSL'",
    );
    let error = Binary::find(Some(&old), None).await.unwrap_err();
    assert!(matches!(error, BinaryError::TooOld { .. }));
    let words = "is Envoy 1.31.2, Thyra needs 1.40.0 or newer";
    assert!(error.to_string().ends_with(words), "{error}");
    let other = script(folder.path(), "echo 'nginx version: nginx/1.22'");
    let error = Binary::find(Some(&other), None).await.unwrap_err();
    assert!(matches!(error, BinaryError::NoVersion { .. }), "{error}");
    let nowhere = Path::new("/nowhere/envoy");
    let error = Binary::find(Some(nowhere), None).await.unwrap_err();
    assert!(matches!(error, BinaryError::Run { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_envoy_that_keeps_ending_is_started_again_ever_later() {
    let folder = tempfile::tempdir().unwrap();
    let _held = std::fs::File::create(folder.path().join("secret")).unwrap();
    let mut own = getrlimit(Resource::Nofile);
    let most = own.maximum.unwrap();
    own.current = Some(most / 2);
    setrlimit(Resource::Nofile, own).unwrap();
    let path = script(
        folder.path(),
        "ls -l /proc/$$/fd >> fds; ulimit -S -n > files; exit 7",
    );
    let supervisor = Supervisor::start(EnvoyConfig {
        binary: Binary {
            path,
            version: OLDEST,
        },
        folder: folder.path().to_owned(),
        node: "test".to_owned(),
        concurrency: 1,
        heap: DEFAULT_HEAP,
        user: None,
        cgroup: None,
        note: None,
    })
    .unwrap();
    let mut state = supervisor.state();
    let mut waits = Vec::new();
    while waits.len() < 3 {
        state.changed().await.unwrap();
        if let EnvoyState::Waiting { why, wait } = &*state.borrow_and_update() {
            assert!(why.contains('7'), "{why}");
            waits.push(*wait);
        }
    }
    supervisor.stop().await;
    assert!(waits[1] > waits[0] && waits[2] > waits[1], "{waits:?}");
    let files = std::fs::read_to_string(folder.path().join("files")).unwrap();
    assert_eq!(files.trim(), most.to_string(), "as many as this process may have");
    let descriptors = std::fs::read_to_string(folder.path().join("fds")).unwrap();
    assert!(
        descriptors.contains("pipe:") && !descriptors.contains("secret"),
        "{descriptors}"
    );
}
