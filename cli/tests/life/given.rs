//! An Envoy that somebody else runs, as in a container of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;

use rustix::process::Signal;

use super::node::{Node, binary, get, thyra};

/// A control group that ends with its test.
struct Group(PathBuf);

impl Group {
    /// Beside those of the agents.
    fn make(name: &str) -> Self {
        let mounts = fs::read_to_string("/proc/mounts").expect("mounts");
        let mut places = mounts.lines().filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (fields[2] == "cgroup2" && fields[3].starts_with("rw")).then(|| PathBuf::from(fields[1]))
        });
        let root = places.next().expect("control groups of the second version");
        let path = root.join(format!("test-{}-{name}", std::process::id()));
        fs::create_dir(&path).expect("a group");
        Self(path)
    }

    /// Starts a program in it.
    fn start(&self, program: &Path, arguments: &[&str]) -> Child {
        let enter = "echo $$ > \"$0/cgroup.procs\" && exec \"$@\"";
        Command::new("sh")
            .args(["-c", enter])
            .arg(&self.0)
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .expect("a shell")
    }

    fn envoy(&self, node: &Node) -> Child {
        let agent = Path::new(env!("CARGO_BIN_EXE_thyra")).with_file_name("thyra-agent");
        let socket = node.folder().join("given/xds.sock");
        let socket = format!("--envoy-socket={}", socket.display());
        let binary = format!("--envoy={}", binary().expect("an Envoy").display());
        self.start(&agent, &["envoy", &socket, &binary])
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // What a failed test left; a group goes once nothing runs in it.
        drop(fs::write(self.0.join("cgroup.kill"), "1"));
        for _ in 0..500 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

fn end(mut child: Child) {
    child.kill().expect("it was alive");
    child.wait().expect("it ends");
}

fn answers(node: &Node) {
    node.wait("requests are answered", || {
        node.ask("/public").is_ok_and(|status| status == 200)
    });
    assert_eq!(node.ask("/admin").expect("an answer"), 403);
}

#[test]
fn connections_through_a_given_envoy_outlive_the_agent_and_no_other_is_taken_for_it() {
    let Some(node) = Node::without_envoy() else { return };
    node.ask("/public").expect_err("there is no Envoy");
    let (one, two) = (Group::make("one"), Group::make("two"));
    let first = one.envoy(&node);
    answers(&node);
    let envoy = node.envoy();
    assert_eq!(
        envoy.map(|pid| pid.as_raw_nonzero().get().unsigned_abs()),
        Some(first.id())
    );
    is_confined(first.id());
    let mut idle = node.connect().expect("a connection");
    assert_eq!(get(&mut idle, "/public").expect("an answer"), 200);
    for signal in [Signal::KILL, Signal::TERM] {
        node.replace_agent(signal);
        assert_eq!(node.envoy(), envoy, "{signal:?}: the same one");
        assert_eq!(get(&mut idle, "/admin").expect("an answer"), 403, "{signal:?}");
        assert_eq!(get(&mut idle, "/public").expect("an answer"), 200, "{signal:?}");
        answers(&node);
    }

    let second = two.envoy(&node);
    node.wait("the second one is refused", || {
        node.log().contains("is not the Envoy that is at work")
    });
    assert_eq!(get(&mut idle, "/public").expect("an answer"), 200);
    answers(&node);
    assert_eq!(node.envoy(), envoy);
    end(second);

    end(first);
    get(&mut idle, "/public").expect_err("its connections end with it");
    node.ask("/public").expect_err("there is no Envoy");
    let third = one.envoy(&node);
    answers(&node);
    end(third);

    let stranger = two.start(Path::new("sleep"), &["600"]);
    let crowded = two.envoy(&node);
    node.wait("one that isn't alone is refused", || {
        node.log().contains("give it one of its own")
    });
    node.ask("/public").expect_err("nobody is Envoy");
    end(stranger);
    answers(&node);
    end(crowded);
    assert_eq!(node.bypasses.load(Ordering::Relaxed), 0);
    node.down();
}

/// As one that the agent starts itself.
fn is_confined(pid: u32) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let lines = [
        "Uid:\t65532\t65532\t65532\t65532",
        "CapEff:\t0000000000200000",
        "CapPrm:\t0000000000200000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ];
    for line in lines {
        assert!(status.contains(line), "{line}: {status}");
    }
}

#[test]
fn what_an_agent_that_nobody_continues_told_a_given_envoy_ends_with_it() {
    let Some(node) = Node::without_envoy() else { return };
    let group = Group::make("one");
    let first = group.envoy(&node);
    answers(&node);
    let mut open = node.connect().expect("a connection");
    assert_eq!(get(&mut open, "/public").expect("an answer"), 200);
    fs::write(node.folder().join("envoy.ports.json"), "{").expect("written");
    node.replace_agent(Signal::KILL);
    get(&mut open, "/public").expect_err("nobody knows what it was judged by");
    let mut first = first;
    first.wait().expect("it was ended");
    let next = group.envoy(&node);
    answers(&node);
    assert!(thyra(&["lab", "list"]).status.success());
    end(next);
    node.down();
}
