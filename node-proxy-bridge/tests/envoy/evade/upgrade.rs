//! WebSocket: a tunnel once the pod has said so, and not a byte before.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use super::client::{ask, statuses};
use super::door::{Door, FULL, Guard, Node};
use super::pod::{Serve, fine, silent, text};
use super::policy::{Form, declared};

const UPGRADE: &str = "GET /public HTTP/1.1\r\nHost: shop.example\r\nX-Role: user\r\nConnection: Upgrade\r\n\
                       Upgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                       Sec-WebSocket-Version: 13\r\n\r\n";
/// How it reaches the pod.
const UPGRADED: &str = "GET /public HTTP/1.1\r\nhost: shop.example\r\nx-role: user\r\nconnection: Upgrade\r\n\
                        upgrade: websocket\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                        sec-websocket-version: 13\r\n\r\n";
const PUBLIC: &[u8] = b"GET /public HTTP/1.1\r\nHost: shop.example\r\nX-Role: user\r\n\r\n";
const ADMIN: &[u8] = b"GET /admin HTTP/1.1\r\nHost: shop.example\r\nX-Role: user\r\n\r\n";

fn head_of(all: &[u8]) -> Option<usize> {
    let at = all.windows(4).position(|four| four == b"\r\n\r\n")?;
    Some(at + 4)
}

/// A pod that switches, and then says what it hears.
fn switches(stream: &mut TcpStream, all: &[u8], before: usize) {
    let Some(head) = head_of(all) else { return };
    if before < head {
        let answer = b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n";
        let _sent = stream.write_all(answer);
    }
    let _sent = stream.write_all(&all[before.max(head)..]);
}

/// One that wants another version.
fn declines(stream: &mut TcpStream, all: &[u8], before: usize) {
    if head_of(all).is_some_and(|head| before < head) {
        let _sent = stream.write_all(b"HTTP/1.1 426 Upgrade Required\r\ncontent-length: 0\r\n\r\n");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_websocket_goes_both_ways() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let door = node.door(&declared(Form::Deny), FULL, switches).await;
    let mut stream = node.connect(&door);
    assert_eq!(ask(&mut stream, UPGRADE.as_bytes(), 1), [101]);
    let mut sent = Vec::new();
    for number in 0..100_u8 {
        let bytes = vec![number; 4096];
        stream.write_all(&bytes).unwrap();
        let mut heard = vec![0; bytes.len()];
        stream.read_exact(&mut heard).unwrap();
        assert!(heard == bytes, "{number}");
        sent.extend(bytes);
    }
    let [record] = node.finish([door]).await;
    assert_eq!(record.len(), 1);
    let head = head_of(&record[0]).unwrap();
    assert_eq!(text(&[record[0][..head].to_vec()]), UPGRADED);
    assert!(record[0][head..] == sent, "the pod gets what was sent");
}

/// Whatever was sent before this, Envoy's one worker has read; the pod need not answer.
fn barrier(node: &Node, fence: &Door) {
    assert_eq!(ask(&mut node.connect(fence), PUBLIC, 1), [200]);
}

/// A pod that never wanted to switch would read what follows as its next request.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_an_upgrade_that_the_pod_does_not_make_nothing_reaches_it() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let fence = node.door(&declared(Form::Deny), FULL, fine).await;
    let pods: [(&str, Serve, Option<u16>); 3] = [
        ("silent", silent, None),
        ("as if nothing was asked", fine, Some(200)),
        ("declines", declines, Some(426)),
    ];
    let mut doors = Vec::new();
    for (_, serve, answer) in pods {
        for at_once in [true, false] {
            let door = node.door(&declared(Form::Deny), FULL, serve).await;
            let mut stream = node.connect(&door);
            if at_once {
                stream.write_all(&[UPGRADE.as_bytes(), ADMIN].concat()).unwrap();
            } else {
                stream.write_all(UPGRADE.as_bytes()).unwrap();
                door.pod.wait(|got| head_of(got).is_some());
                // The pod's refusal may have closed it.
                let _said = stream.write_all(ADMIN);
            }
            door.pod.wait(|got| head_of(got).is_some());
            if let Some(answer) = answer {
                assert_eq!(statuses(&mut stream, 1), [answer]);
            }
            let _said = stream.write_all(ADMIN);
            barrier(&node, &fence);
            doors.push((door, stream));
        }
    }
    // The control: where nothing is read, what follows does reach it.
    let open = node.door(&declared(Form::Deny), Guard::NoParser, silent).await;
    let all = [UPGRADE.as_bytes(), ADMIN].concat();
    let mut through = node.connect(&open);
    through.write_all(&all).unwrap();
    open.pod.wait(|got| got == all);
    let (mut doors, _streams): (Vec<_>, Vec<_>) = doors.into_iter().unzip();
    doors.extend([fence, open]);
    let records = node.finish_all(doors).await;
    for (record, (what, ..)) in records.iter().zip(pods.iter().flat_map(|pod| [pod, pod])) {
        assert_eq!(text(record), UPGRADED, "{what}");
    }
}
