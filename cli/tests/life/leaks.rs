//! Pods come and go, and leave nothing in the agent, in Envoy and in the kernel.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::process::Pid;

use super::node::Node;

/// Pods of a round; all of them come before the first goes.
const PODS: usize = 10;
const ROUNDS: usize = 6;

/// What may leak.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    listeners: Vec<String>,
    pins: Vec<String>,
    files: BTreeMap<&'static str, usize>,
}

impl Held {
    fn now(node: &Node) -> Self {
        let pins = fs::read_dir(node.folder().join("bpf")).expect("a folder");
        // Beside them are the kernel's own files of a BPF file system.
        let layouts = pins
            .map(|entry| entry.expect("an entry").path())
            .filter(|path| path.is_dir());
        let pins = layouts.flat_map(|layout| fs::read_dir(layout).expect("pins"));
        let mut pins: Vec<String> = pins
            .map(|pin| pin.expect("a pin").file_name().to_string_lossy().into_owned())
            .collect();
        pins.sort();
        let (agent, envoy) = (node.agent().expect("an agent"), node.envoy().expect("an envoy"));
        Self {
            listeners: listeners(node),
            pins,
            files: [("agent", files(agent)), ("envoy", files(envoy))].into(),
        }
    }

    /// Within a few descriptors: connections to and fro come and go by themselves.
    fn is_no_more_than(&self, before: &Self) -> bool {
        const SLACK: usize = 5;
        let mut files = self.files.iter();
        let few = files.all(|(who, now)| *now <= before.files[who] + SLACK);
        (&self.listeners, &self.pins) == (&before.listeners, &before.pins) && few
    }
}

fn files(pid: Pid) -> usize {
    let folder = format!("/proc/{}/fd", pid.as_raw_nonzero());
    fs::read_dir(folder).expect("root may").count()
}

/// The pods of all of them, those that drain too; ports are given out anew.
fn listeners(node: &Node) -> Vec<String> {
    let mut stream =
        UnixStream::connect(node.folder().join("envoy/admin.sock")).expect("envoy's administration");
    let request =
        b"GET /config_dump?resource=dynamic_listeners HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request).expect("asked");
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    let quoted = text
        .split('"')
        .filter(|word| word.contains('@') && word.starts_with('p'));
    let mut names: Vec<String> = quoted.map(str::to_owned).collect();
    names.sort();
    names.dedup();
    // `p<port>@<pod>`
    let pods = names.iter().filter_map(|name| name.split_once('@'));
    let mut pods: Vec<String> = pods.map(|(_, pod)| pod.to_owned()).collect();
    pods.sort();
    pods
}

/// Pods with a server whose requests are judged by the shop's own rules.
fn pods(round: usize) -> String {
    let mut text = String::new();
    for pod in 0..PODS {
        write!(
            text,
            "apiVersion: v1\nkind: Pod\n\
             metadata: {{name: passing-{round}-{pod}, namespace: shop, labels: {{app: cart}}}}\n\
             spec:\n  containers:\n  - name: main\n    image: example/echo\n\
             \x20   ports: [{{containerPort: 9000, name: tcp}}]\n---\n"
        )
        .expect("a string");
    }
    text
}

#[test]
fn pods_that_come_and_go_leave_no_listener_no_pin_and_no_descriptor() {
    let Some(node) = Node::up() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("pods.yaml");
    let one_round = |round| {
        fs::write(&file, pods(round)).expect("written");
        assert!(node.lab("apply", &file));
        node.wait("each pod has its listener", || listeners(&node).len() > PODS);
        assert!(node.lab("delete", &file));
    };
    // What is opened once and kept is no leak.
    let before = Held::now(&node);
    one_round(0);
    node.wait("the first pods are forgotten", || {
        listeners(&node) == before.listeners
    });
    let before = Held::now(&node);
    let begun = Instant::now();
    for round in 1..=ROUNDS {
        one_round(round);
    }
    let took = begun.elapsed();
    node.wait(&format!("all is as before: {before:?}"), || {
        Held::now(&node).is_no_more_than(&before)
    });
    println!(
        "{} pods came and went in {took:?}; {:?}",
        PODS * ROUNDS,
        Held::now(&node)
    );
    assert_eq!(node.ask("/public").expect("an answer"), 200);
    node.down();
}
