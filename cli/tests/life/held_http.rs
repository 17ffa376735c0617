//! HTTP connections that are judged by their first request, where their policies want that.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};

use super::held::{heard_of, serve};
use super::node::{Node, thyra};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab/held_http")
}

fn request(path: &str, body: usize) -> Vec<u8> {
    let head = format!("POST {path} HTTP/1.1\r\nhost: cart\r\ncontent-length: {body}\r\n\r\n");
    [head.into_bytes(), vec![b'x'; body]].concat()
}

/// Whether all of it was heard and said back; Envoy would not.
fn echoes(stream: &mut TcpStream, bytes: &[u8]) -> bool {
    let mut answer = vec![0; bytes.len()];
    let asked = stream.write_all(bytes);
    asked.and_then(|()| stream.read_exact(&mut answer)).is_ok() && answer == bytes
}

fn passes(node: &Node, bytes: &[u8]) -> bool {
    node.connect().is_ok_and(|mut stream| echoes(&mut stream, bytes))
}

#[test]
fn the_first_request_decides_for_its_connection_as_long_as_the_policy_says_so() {
    let Some(node) = Node::bare(&folder()) else { return };
    let heard = serve(&node);
    node.wait("an allowed request passes", || {
        passes(&node, &request("/public", 0))
    });
    let mut open = node.connect().expect("a connection");
    assert!(echoes(&mut open, &request("/public", 0)));
    assert!(echoes(&mut open, &request("/admin", 0)), "it is not judged");
    assert!(passes(&node, &request("/public", 100_000)), "its head is enough");
    let both = [request("/public", 0), request("/admin", 0)].concat();
    assert!(passes(&node, &both), "what is pipelined is not judged");
    let other_way = [request("/admin", 0), request("/public", 0)].concat();
    for refused in [
        request("/admin", 0),
        other_way,
        b"\x16\x03\x01 no http\r\n\r\n".to_vec(),
    ] {
        let mut stream = node.connect().expect("a connection");
        let client = stream.local_addr().expect("an address");
        assert!(!echoes(&mut stream, &refused));
        assert_eq!(heard_of(&heard, client), b"", "a refused request reached the pod");
    }
    let socket = node.folder().join("agent.sock").display().to_string();
    let shown = || {
        let shown = thyra(&["endpoint", "policy", "get", "shop/cart", "--socket", &socket]);
        String::from_utf8_lossy(&shown.stdout).into_owned()
    };
    assert!(shown().contains("hold: the first request decides"), "{}", shown());
    assert!(node.lab("apply", &folder().join("later/each-request.yaml")));
    node.wait("each request is judged", || {
        shown().contains("inline: each request is judged")
    });
    let mut byte = [0];
    let sent = open.write_all(&request("/public", 0));
    let read = sent.and_then(|()| open.read(&mut byte));
    assert!(
        !matches!(read, Ok(1..)),
        "what was judged once ends with the annotation"
    );
    node.down();
}
