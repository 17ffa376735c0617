//! Open connections through Envoy live on when the agent doesn't.

use std::io::Write as _;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::process::{Signal, kill_process};

use super::node::{Node, folder, get, status};

#[test]
fn open_connections_through_envoy_outlive_the_agent() {
    let Some(node) = Node::up() else { return };
    let envoy = node.envoy();
    assert!(envoy.is_some());
    let mut idle = node.connect().expect("a connection");
    assert_eq!(get(&mut idle, "/public").expect("an answer"), 200);
    for signal in [Signal::KILL, Signal::TERM, Signal::KILL] {
        let mut sending = node.connect().expect("a connection");
        let half = b"POST /public HTTP/1.1\r\nhost: cart\r\ncontent-length: 10\r\n\r\nhalf.";
        sending.write_all(half).expect("sent");
        node.replace_agent(signal);
        assert_eq!(node.envoy(), envoy, "{signal:?}: the same one");
        assert_eq!(get(&mut idle, "/admin").expect("an answer"), 403, "{signal:?}");
        assert_eq!(get(&mut idle, "/public").expect("an answer"), 200, "{signal:?}");
        sending.write_all(b".half").expect("sent");
        assert_eq!(status(&mut sending).expect("an answer"), 200, "{signal:?}");
        assert_eq!(node.ask("/admin").expect("an answer"), 403, "{signal:?}");
    }
    let log = node.log();
    assert_eq!(log.matches("envoy is at work").count(), 3, "{log}");
    node.down();
}

#[test]
fn what_changed_without_an_agent_acts_on_connections_that_outlived_it() {
    let Some(node) = Node::up() else { return };
    let mut open = node.connect().expect("a connection");
    assert_eq!(get(&mut open, "/public").expect("an answer"), 200);
    let (before, envoy) = (node.agent().expect("an agent"), node.envoy());
    kill_process(before, Signal::KILL).expect("it was alive");
    // Returns once the next agent enforces it.
    node.wait("the change is taken", || {
        node.lab("apply", &folder().join("later/frozen.yaml"))
    });
    assert_eq!(node.envoy(), envoy, "the same one");
    assert_eq!(get(&mut open, "/public").expect("an answer"), 403);
    assert_eq!(get(&mut open, "/other").expect("an answer"), 200);
    node.down();
}

#[test]
fn an_envoy_that_can_not_be_known_again_is_replaced_and_its_connections_end() {
    let Some(node) = Node::up() else { return };
    for file in ["envoy.json", "envoy.ports.json"] {
        let mut open = node.connect().expect("a connection");
        assert_eq!(get(&mut open, "/public").expect("an answer"), 200);
        let envoy = node.envoy();
        std::fs::write(node.folder().join(file), "{").expect("written");
        let killed = Instant::now();
        node.replace_agent(Signal::KILL);
        get(&mut open, "/public").expect_err("another one has nothing of it");
        node.wait("requests are answered", || {
            node.ask("/public").is_ok_and(|s| s == 200)
        });
        println!(
            "`{file}` lost: requests are answered again after {:?}",
            killed.elapsed()
        );
        assert_ne!(node.envoy(), envoy);
        assert_eq!(node.ask("/admin").expect("an answer"), 403);
    }
    assert_eq!(node.bypasses.load(Ordering::Relaxed), 0);
    node.down();
}
