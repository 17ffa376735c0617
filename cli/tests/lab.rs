//! The lab by itself: its network, Services, servers and probes without an agent, and what it leaves behind.
//!
//! Invariant: these tests need root; without it they say so, and fail on CI, since an ordinary user can't try
//! a lab.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long a janitor may take.
const GONE_WITHIN: Duration = Duration::from_secs(15);

fn thyra(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_thyra"))
        .args(arguments)
        .output()
        .expect("the command runs")
}

fn scenario(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab").join(name)
}

/// `true` with root; loud without.
fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    assert!(
        root || std::env::var_os("CI").is_none(),
        "the lab's tests need root"
    );
    if !root {
        eprintln!("SKIPPED: the lab's tests need root");
    }
    root
}

/// Namespaces of the lab `id`.
fn namespaces(id: &str) -> usize {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return 0;
    };
    let prefix = format!("thyra-{id}-");
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        .count()
}

fn is_gone(id: &str) -> bool {
    namespaces(id) == 0 && !Path::new("/run/thyra-lab").join(id).exists()
}

/// Starts a lab in the background; its id and its process.
fn up(name: &str) -> (String, i32) {
    let folder = scenario(name);
    let output = thyra(&["lab", "up", "--no-agent", &folder.display().to_string()]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    let id = text
        .lines()
        .find_map(|line| line.strip_prefix("lab `")?.split('`').next());
    let id = id.unwrap_or_else(|| panic!("no id in {text}")).to_owned();
    let record = std::fs::read(Path::new("/run/thyra-lab").join(&id).join("lab.json")).expect("a record");
    let record: Value = serde_json::from_slice(&record).expect("JSON");
    let pid = record["pid"]
        .as_i64()
        .and_then(|pid| i32::try_from(pid).ok())
        .expect("a process");
    (id, pid)
}

#[test]
fn every_kind_of_probe_gets_through_where_nothing_stops_it() {
    if !root() {
        return;
    }
    let folder = scenario("protocols").display().to_string();
    let output = thyra(&["lab", "run", "--no-agent", "-o", "json", &folder]);
    let report: Value = serde_json::from_slice(&output.stdout).expect("the JSON alone is on stdout");
    let failed: Vec<&Value> = report["probes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|probe| probe["ok"] != true)
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert!(output.status.success());
    assert_eq!(report["passed"], 25);
}

#[test]
fn a_mistake_in_a_scenario_is_code_2_and_starts_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("manifests")).expect("a folder");
    let probes =
        "- {from: a/b, to: a/c, port: 80, expect: deny}\n- {from: a/b, to: a/c, prt: 80, expect: deny}\n";
    std::fs::write(folder.path().join("probes.yaml"), probes).expect("written");
    let output = thyra(&["lab", "run", &folder.path().display().to_string()]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("probes.yaml:2: unknown key `prt`"), "{text}");
    assert!(output.stdout.is_empty());
}

#[test]
fn two_labs_run_at_once_and_each_goes_alone() {
    if !root() {
        return;
    }
    let ((first, _), (second, _)) = (up("protocols"), up("protocols"));
    assert!(thyra(&["lab", "down", &first]).status.success());
    assert!(is_gone(&first));
    assert!(namespaces(&second) > 0);
    let output = thyra(&[
        "lab",
        "exec",
        "--lab",
        &second,
        "a/client",
        "--",
        "cat",
        "/proc/net/dev",
    ]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("eth0"));
    assert!(thyra(&["lab", "down", &second]).status.success());
    assert!(is_gone(&second));
    assert!(
        thyra(&["lab", "down", &second]).status.success(),
        "what is gone already is down"
    );
}

#[test]
fn a_killed_lab_leaves_nothing_behind() {
    if !root() {
        return;
    }
    let (id, pid) = up("protocols");
    assert!(namespaces(&id) > 0);
    let pid = rustix::process::Pid::from_raw(pid).expect("a process");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it was alive");
    let deadline = Instant::now() + GONE_WITHIN;
    while !is_gone(&id) {
        assert!(Instant::now() < deadline, "lab `{id}` is still there");
        std::thread::sleep(Duration::from_millis(50));
    }
}
