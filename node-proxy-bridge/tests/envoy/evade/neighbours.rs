//! Pods share one Envoy: what one of them does with it, or lets be done, is not felt by another.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::num::NonZeroU32;
use std::time::{Duration, Instant};

use http_body_util::StreamBody;
use hyper::body::{Bytes, Frame};
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::super::node::LIMIT;
use super::client::{ask, statuses};
use super::door::{Door, FULL, Node};
use super::pod::{fine, lines, silent};
use super::policy::{Form, declared};

const REQUEST: &[u8] = b"GET /public HTTP/1.1\r\nHost: shop.example\r\nX-Role: user\r\n\r\n";
/// More than Envoy's own defaults for a cluster: 1,024 connections, 1,024 requests.
const MANY: usize = 1_100;
const MIB: usize = 1 << 20;

/// So many clients ask the pod and get no answer.
fn wait(node: &Node, door: &Door, clients: usize) -> Vec<TcpStream> {
    let mut waiting = Vec::new();
    for _ in 0..clients {
        let mut stream = node.connect(door);
        stream.write_all(REQUEST).unwrap();
        waiting.push(stream);
    }
    door.pod.wait_all(clients, |one| one.ends_with(b"\r\n\r\n"));
    waiting
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_wait_for_one_pod_leave_another_reachable() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let slow = node.door(&declared(Form::Deny), FULL, silent).await;
    let other = node.door(&declared(Form::Deny), FULL, fine).await;
    let waiting = wait(&node, &slow, MANY);
    assert_eq!(ask(&mut node.connect(&other), REQUEST, 1), [200]);
    drop(waiting);
    let [_, record] = node.finish([slow, other]).await;
    assert_eq!(record.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_has_so_many_requests_at_once_and_no_more() {
    const AT_ONCE: usize = 20;
    let Some(mut node) = Node::start().await else {
        return;
    };
    node.options.requests_at_once = NonZeroU32::new(20).unwrap();
    let slow = node.door(&declared(Form::Deny), FULL, silent).await;
    let other = node.door(&declared(Form::Deny), FULL, fine).await;
    let waiting = wait(&node, &slow, AT_ONCE);
    // As many more wait their turn; the one beyond is told.
    let mut more = Vec::new();
    for _ in 0..=AT_ONCE {
        let mut stream = node.connect(&slow);
        stream.write_all(REQUEST).unwrap();
        stream.set_nonblocking(true).unwrap();
        more.push(stream);
    }
    let begun = Instant::now();
    let told = loop {
        if let Some(at) = more.iter().position(|stream| stream.peek(&mut [0]).is_ok()) {
            break more.swap_remove(at);
        }
        assert!(begun.elapsed() < LIMIT);
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    told.set_nonblocking(false).unwrap();
    assert_eq!(statuses(&mut { told }, 1), [503]);
    assert!(more.iter().all(|stream| stream.peek(&mut [0]).is_err()));
    assert_eq!(ask(&mut node.connect(&other), REQUEST, 1), [200]);
    assert_eq!(slow.pod.connections(), AT_ONCE, "none of the others arrived");
    drop(waiting);
    let [_, _] = node.finish([slow, other]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_has_so_many_requests_in_a_second_and_no_more() {
    const REQUESTS: usize = 500;
    let Some(mut node) = Node::start().await else {
        return;
    };
    node.options.requests_per_second = NonZeroU32::new(20);
    let busy = node.door(&declared(Form::Deny), FULL, fine).await;
    let other = node.door(&declared(Form::Deny), FULL, fine).await;
    let begun = Instant::now();
    let mut stream = node.connect(&busy);
    let answers: Vec<u16> = (0..REQUESTS).flat_map(|_| ask(&mut stream, REQUEST, 1)).collect();
    let seconds = usize::try_from(begun.elapsed().as_secs()).unwrap();
    let count = |status: u16| answers.iter().filter(|answer| **answer == status).count();
    assert_eq!(count(200) + count(429), REQUESTS);
    assert!(
        (20..=20 * (seconds + 2)).contains(&count(200)),
        "{} in {seconds} s",
        count(200)
    );
    assert_eq!(ask(&mut node.connect(&other), REQUEST, 1), [200]);
    let passed = count(200);
    let [record, _] = node.finish([busy, other]).await;
    assert_eq!(lines(&record).len(), passed);
}

/// Answers with more than anybody reads.
fn floods(stream: &mut TcpStream, _: &[u8], _: usize) {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", 64 * MIB);
    let mut sent = stream.write_all(head.as_bytes());
    let chunk = vec![b'x'; MIB];
    for _ in 0..64 {
        sent = sent.and_then(|()| stream.write_all(&chunk));
    }
    // Envoy ends before all of it has gone.
    drop(sent);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_nobody_reads_fills_no_memory() {
    const CLIENTS: usize = 150;
    let Some(mut node) = Node::start().await else {
        return;
    };
    let door = node.door(&declared(Form::Deny), FULL, floods).await;
    let before = node.memory().await;
    let mut waiting = Vec::new();
    for _ in 0..CLIENTS {
        let mut stream = node.connect(&door);
        stream.write_all(REQUEST).unwrap();
        let mut first = [0];
        stream.read_exact(&mut first).unwrap();
        waiting.push(stream);
    }
    let each = settled(&node).await.saturating_sub(before) / CLIENTS;
    assert!(each < MIB / 4, "{each} bytes for each");
    drop(waiting);
    let [_] = node.finish([door]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_a_pod_does_not_read_end_before_memory_does() {
    const CLIENTS: usize = 30;
    const STREAMS: usize = 100;
    const HEAP: u64 = 128 << 20;
    let Some(mut node) = Node::start_within(HEAP).await else {
        return;
    };
    // It accepts nothing: what Envoy sends stays in the kernel's buffers.
    let deaf = node.listen();
    let door = node
        .listener(&declared(Form::Deny), FULL, deaf.local_addr().unwrap())
        .await;
    let other = node.door(&declared(Form::Deny), FULL, fine).await;
    let mut drivers = Vec::new();
    for _ in 0..CLIENTS {
        let stream = node.connect_to(door);
        stream.set_nonblocking(true).unwrap();
        let stream = TokioIo::new(tokio::net::TcpStream::from_std(stream).unwrap());
        let (client, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream)
            .await
            .unwrap();
        drivers.push(tokio::spawn(async { drop(connection.await) }));
        for _ in 0..STREAMS {
            let endless = futures::stream::repeat_with(|| {
                Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from(vec![b'x'; 64 << 10])))
            });
            let request = hyper::Request::post("http://shop.example/public")
                .header("x-role", "user")
                .body(StreamBody::new(endless))
                .unwrap();
            let mut client = client.clone();
            client.ready().await.unwrap();
            drivers.push(tokio::spawn(
                async move { drop(client.send_request(request).await) },
            ));
        }
    }
    settled(&node).await;
    // What stands still ends by itself, and nobody has to be refused for want of memory any more.
    let mut answer = Vec::new();
    let begun = Instant::now();
    while answer != [200] {
        assert!(begun.elapsed() < 2 * LIMIT, "{answer:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
        answer = ask(&mut node.connect(&other), REQUEST, 1);
    }
    for driver in drivers {
        driver.abort();
    }
    let [_] = node.finish([other]).await;
}

/// Envoy's memory when it grows no more.
async fn settled(node: &Node) -> usize {
    let mut memory = node.memory().await;
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let next = node.memory().await;
        if next <= memory + MIB {
            return next;
        }
        memory = next;
    }
}
