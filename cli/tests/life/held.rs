//! Connections that are held until their first bytes are judged, while the agent and its rules come and go.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::sockopt::{set_socket_linger, set_socket_reuseaddr};
use rustix::net::{AddressFamily, SocketType};
use rustix::process::Signal;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use serde_json::{Value, json};

use super::node::{Node, serve_each, thyra};

const ALLOWED: &str = "cart.example.com";
const OTHER: &str = "other.example.com";

/// What each connection has said to the pod, in the order in which they came.
pub(crate) type Heard = Arc<Mutex<Vec<(SocketAddr, Vec<u8>)>>>;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/held")
}

/// In the pod: what is heard is noted before it is said back.
pub(crate) fn serve(node: &Node) -> Heard {
    let (heard, server) = (Heard::default(), node.server());
    let notes = Arc::clone(&heard);
    node.inside("shop.cart", move || {
        let listener = TcpListener::bind(server).expect("a port");
        serve_each(listener, move |stream| listen(stream, &notes));
    });
    heard
}

fn listen(mut stream: TcpStream, heard: &Heard) {
    let Ok(peer) = stream.peer_addr() else { return };
    let number = {
        let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.push((peer, Vec::new()));
        heard.len() - 1
    };
    let mut bytes = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut bytes) {
        let said = &bytes[..length];
        let mut notes = heard.lock().unwrap_or_else(PoisonError::into_inner);
        notes[number].1.extend_from_slice(said);
        drop(notes);
        if stream.write_all(said).is_err() {
            return;
        }
    }
}

/// What the last connection with this end has said.
pub(crate) fn heard_of(heard: &Heard, client: SocketAddr) -> Vec<u8> {
    let heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
    let last = heard.iter().rfind(|(peer, _)| *peer == client);
    last.map(|(_, bytes)| bytes.clone()).unwrap_or_default()
}

/// The first bytes of TLS with this server name.
fn hello(name: &'static str) -> Vec<u8> {
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from(name).expect("a name");
    let mut client = ClientConnection::new(Arc::new(config), name).expect("a client");
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).expect("written");
    bytes
}

/// Says it, and waits until all of it was heard and said back.
fn say(stream: &mut TcpStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)?;
    let mut answer = vec![0; bytes.len()];
    stream.read_exact(&mut answer)?;
    assert_eq!(answer, bytes);
    Ok(())
}

fn passes(node: &Node, bytes: &[u8]) -> bool {
    node.connect()
        .and_then(|mut stream| say(&mut stream, bytes))
        .is_ok()
}

/// A connection of the client's with this end.
fn connect_from(node: &Node, local: SocketAddr) -> io::Result<TcpStream> {
    let server = node.server();
    node.inside("shop.front", move || {
        let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
        set_socket_reuseaddr(&socket, true)?;
        rustix::net::bind(&socket, &local)?;
        rustix::net::connect(&socket, &server)?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(Duration::from_secs(30)))?;
        Ok(stream)
    })
}

/// Ends it with a reset, which leaves nothing of it in either kernel.
fn cut(stream: &TcpStream) {
    set_socket_linger(stream, Some(Duration::ZERO)).expect("set");
}

/// How many bytes nobody has acknowledged of the client's connection with this port (`/proc/net/tcp`).
fn unacknowledged(node: &Node, port: u16) -> Option<u32> {
    node.inside("shop.front", move || {
        let table = std::fs::read_to_string("/proc/thread-self/net/tcp").ok()?;
        let local = format!(":{port:04X}");
        let mut lines = table
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>());
        let found = lines.find(|words| words.get(1).is_some_and(|word| word.ends_with(&local)))?;
        u32::from_str_radix(found.get(4)?.split(':').next()?, 16).ok()
    })
}

#[test]
fn a_hello_in_whose_middle_the_agent_dies_is_judged_whole_or_its_connection_ends() {
    let Some(node) = Node::bare(&folder()) else { return };
    let heard = serve(&node);
    node.wait("an allowed name passes", || passes(&node, &hello(ALLOWED)));
    assert!(!passes(&node, &hello(OTHER)));
    let envoy = node.envoy();
    for (name, is_acknowledged) in [(ALLOWED, true), (OTHER, true), (ALLOWED, false), (OTHER, false)] {
        let whole = hello(name);
        let (first, rest) = whole.split_at(whole.len() / 2);
        let mut stream = node.connect().expect("a connection");
        let client = stream.local_addr().expect("an address");
        stream.write_all(first).expect("sent");
        if is_acknowledged {
            // It is said again, and the agent says that it has it.
            node.wait("it is acknowledged", || {
                unacknowledged(&node, client.port()) == Some(0)
            });
        }
        assert_eq!(heard_of(&heard, client), b"", "{name}: half of a name is none");
        node.replace_agent(Signal::KILL);
        node.wait("another agent judges", || passes(&node, &hello(ALLOWED)));
        assert_eq!(node.envoy(), envoy, "the same one, with new oracles");
        let mut answer = vec![0; whole.len()];
        let sent = stream.write_all(rest);
        let ended = sent.and_then(|()| stream.read_exact(&mut answer)).err();
        println!("{name}, acknowledged: {is_acknowledged}: {ended:?}");
        if let Some(error) = &ended {
            assert_ne!(error.kind(), io::ErrorKind::WouldBlock, "{name}: it hangs");
        }
        let heard = heard_of(&heard, client);
        // What was acknowledged is lost with the agent, and nobody says it again.
        let may_pass = name == ALLOWED && !is_acknowledged;
        assert!(
            heard.is_empty() || (may_pass && heard == whole),
            "{name}: {heard:?}"
        );
        assert_eq!(ended.is_none(), !heard.is_empty(), "{name}");
    }
    node.down();
}

fn json_of(arguments: &[&str], socket: &str) -> Value {
    let output = thyra(&[arguments, &["-o", "json", "--socket", socket]].concat());
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    serde_json::from_slice(&output.stdout).expect(&error)
}

/// The kernel's entry of an open connection, with its names.
fn assert_shown(socket: &str, client: SocketAddr) {
    let json = |arguments: &[&str]| json_of(arguments, socket);
    let all = json(&["bpf", "flows", "list", "--endpoint", "shop/cart"]);
    let flows = all.as_array().expect("a list");
    let open = flows
        .iter()
        .find(|flow| flow["source_port"] == client.port())
        .expect("it is in the kernel");
    let asked = "shop/by-name#0: connection.sni";
    let wanted = [
        ("state", "open"),
        ("verdict", "allow"),
        ("source_workload", "shop/front"),
    ];
    assert!(wanted.iter().all(|(key, word)| open[*key] == *word), "{open}");
    assert!(open["residual"].is_string(), "{open}");
    assert_eq!(open["because"][0], asked, "{open}");
    assert_eq!(
        json(&["bpf", "flows", "list", "--endpoint", "shop/front"]),
        json!([])
    );
}

#[test]
fn who_takes_the_ends_of_a_judged_connection_while_nobody_judges_inherits_nothing() {
    let Some(node) = Node::bare(&folder()) else { return };
    let heard = serve(&node);
    node.wait("an allowed name passes", || passes(&node, &hello(ALLOWED)));
    let mut judged = node.connect().expect("a connection");
    let client = judged.local_addr().expect("an address");
    say(&mut judged, &hello(ALLOWED)).expect("its name is allowed");
    say(&mut judged, b"it is open").expect("the rest is the kernel's");
    let socket = node.folder().join("agent.sock").display().to_string();
    let shown = thyra(&["endpoint", "policy", "get", "shop/cart", "--socket", &socket]);
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(shown.contains("hold: the server name is the same"), "{shown}");
    assert!(shown.contains("kernel+envoy"), "{shown}");
    assert_shown(&socket, client);
    assert!(node.lab("apply", &folder().join("later/allowed.yaml")));
    cut(&judged);
    drop(judged);
    let mut unseen = connect_from(&node, client).expect("a connection with the same ends");
    // Also says that this test would see bytes that pass unjudged.
    say(&mut unseen, b"no name").expect("nobody judges");
    assert!(node.lab("apply", &folder().join("later/held.yaml")));
    say(&mut unseen, b"anything").expect_err("nobody has judged it");
    assert_eq!(heard_of(&heard, client), b"no name");
    cut(&unseen);
    drop(unseen);
    let mut held = connect_from(&node, client).expect("a connection with the same ends");
    say(&mut held, &hello(OTHER)).expect_err("another name");
    let said = heard_of(&heard, client);
    assert!(said.is_empty() || said == b"no name", "{said:?}");
    let mut again = node.connect().expect("a connection");
    say(&mut again, &hello(ALLOWED)).expect("its name is allowed");
    let counted = |action: &str, policy: &str| {
        let rules = json_of(&["requests"], &socket)["rules"].clone();
        let rules = rules.as_array().cloned().unwrap_or_default();
        rules
            .iter()
            .any(|rule| rule["action"] == action && rule["policy"] == policy && rule["requests"] != 0)
    };
    node.wait("both verdicts are told", || {
        counted("allow", "shop/by-name") && counted("deny", "")
    });
    let mut slow = node.connect().expect("a connection");
    slow.write_all(&hello(ALLOWED)[..7]).expect("sent");
    node.wait("it is shown to wait for its verdict", || {
        let flows = json_of(&["bpf", "flows", "list"], &socket);
        let flows = flows.as_array().cloned().unwrap_or_default();
        flows
            .iter()
            .any(|flow| flow["state"] == "await" && flow["verdict"].is_null())
    });
    slow.read_exact(&mut [0]).expect_err("it says no name");
    node.wait("that is told, too", || counted("refused", ""));
    node.down();
}
