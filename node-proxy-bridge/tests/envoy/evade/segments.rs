//! Bytes that come in any pieces, stop anywhere, or end too soon.

use std::io::Write as _;
use std::net::{Shutdown, TcpStream};

use super::client::{ask, rest, statuses};
use super::door::{Door, FULL, Guard, Node};
use super::pod::{fine, lines, text};
use super::policy::{FORMS, Form, declared};

const PUBLIC: &[u8] = b"GET /public HTTP/1.1\r\nHost: shop.example\r\nX-Role: user\r\n\r\n";
const ADMIN: &[u8] = b"GET /admin HTTP/1.1\r\nHost: shop.example\r\nX-Role: user\r\n\r\n";
const PUBLIC_LINE: &str = "GET /public HTTP/1.1";
const ADMIN_LINE: &str = "GET /admin HTTP/1.1";

/// Whatever was sent before this, Envoy has read: it has one worker, which has answered this since.
fn barrier(node: &Node, door: &Door) {
    assert_eq!(ask(&mut node.connect(door), PUBLIC, 1), [200]);
}

/// One connection for each place to cut: all first pieces are read before any second one is sent.
fn cut_anywhere(node: &Node, door: &Door, bytes: &[u8]) -> Vec<Vec<u16>> {
    let cuts = 1..bytes.len();
    let mut streams: Vec<TcpStream> = cuts.clone().map(|_| node.connect(door)).collect();
    for (stream, cut) in streams.iter_mut().zip(cuts.clone()) {
        stream.write_all(&bytes[..cut]).unwrap();
    }
    barrier(node, door);
    let both = streams.iter_mut().zip(cuts);
    both.map(|(stream, cut)| ask(stream, &bytes[cut..], 1)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_cut_at_any_byte_is_judged_as_a_whole() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let (mut doors, mut expected) = (Vec::new(), Vec::new());
    for form in FORMS {
        for (guard, bytes, line, answer) in [
            (FULL, ADMIN, None, 403),
            (FULL, PUBLIC, Some(PUBLIC_LINE), 200),
            // The control: without rules the same pieces make a request that reaches the pod.
            (Guard::NoRules, ADMIN, Some(ADMIN_LINE), 200),
        ] {
            let door = node.door(&declared(form), guard, fine).await;
            let answers = cut_anywhere(&node, &door, bytes);
            assert!(
                answers.iter().all(|one| *one == [answer]),
                "{form:?}, {guard:?}: {answers:?}"
            );
            let mut lines = vec![PUBLIC_LINE.to_owned()];
            lines.extend(answers.iter().filter_map(|_| line.map(str::to_owned)));
            lines.sort();
            doors.push(door);
            expected.push(lines);
        }
    }
    for (record, expected) in node.finish_all(doors).await.iter().zip(expected) {
        assert_eq!(lines(record), expected);
    }
}

/// A client that sends a byte, waits until it is read, and sends the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_client_gets_no_further() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let (mut doors, mut expected) = (Vec::new(), Vec::new());
    for (guard, answer) in [(FULL, 403), (Guard::NoRules, 200)] {
        let door = node.door(&declared(Form::Deny), guard, fine).await;
        let mut stream = node.connect(&door);
        for byte in ADMIN {
            stream.write_all(&[*byte]).unwrap();
            barrier(&node, &door);
        }
        assert_eq!(statuses(&mut stream, 1), [answer]);
        let mut lines = vec![PUBLIC_LINE.to_owned(); ADMIN.len()];
        if answer == 200 {
            lines.insert(0, ADMIN_LINE.to_owned());
        }
        doors.push(door);
        expected.push(lines);
    }
    for (record, expected) in node.finish_all(doors).await.iter().zip(expected) {
        assert_eq!(lines(record), expected);
    }
}

/// Nothing of a head that isn't complete reaches the pod, not even of an allowed request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_that_ends_too_soon_reaches_nobody() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let door = node.door(&declared(Form::Deny), FULL, fine).await;
    for bytes in [ADMIN, PUBLIC] {
        let mut streams: Vec<TcpStream> = (1..bytes.len()).map(|_| node.connect(&door)).collect();
        for (length, stream) in streams.iter_mut().enumerate() {
            stream.write_all(&bytes[..=length]).unwrap();
        }
        barrier(&node, &door);
        let last = bytes.len() - 2;
        for (length, stream) in streams.iter_mut().enumerate() {
            stream.shutdown(Shutdown::Write).unwrap();
            // The last one lacks a line feed: Envoy 1.40 waits for it.
            let heard = rest(stream);
            assert!(!heard.starts_with(b"HTTP/1.1 200"), "{length} of {last}");
        }
    }
    // The control is the barrier: a whole head does reach it.
    let [record] = node.finish([door]).await;
    assert_eq!(lines(&record), [PUBLIC_LINE, PUBLIC_LINE]);
}

/// A client that has said all and closes its side: allowed or denied, as if it hadn't.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_closes_its_side_gets_no_further() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let (mut doors, mut expected) = (Vec::new(), Vec::new());
    for form in FORMS {
        for (guard, bytes, line) in [
            (FULL, ADMIN, None),
            (FULL, PUBLIC, Some(PUBLIC_LINE)),
            (Guard::NoRules, ADMIN, Some(ADMIN_LINE)),
        ] {
            let door = node.door(&declared(form), guard, fine).await;
            let mut stream = node.connect(&door);
            stream.write_all(bytes).unwrap();
            if let Some(line) = line {
                door.pod.wait(|got| got.starts_with(line.as_bytes()));
            }
            stream.shutdown(Shutdown::Write).unwrap();
            rest(&mut stream);
            doors.push(door);
            expected.push(line.unwrap_or_default());
        }
    }
    for (record, expected) in node.finish_all(doors).await.iter().zip(expected) {
        assert_eq!(text(record).lines().next().unwrap_or_default(), expected);
    }
}
