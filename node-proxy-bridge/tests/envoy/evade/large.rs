//! What passes, passes whole: long connections, large bodies, streams both ways, trailers.

use std::convert::Infallible;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use futures::SinkExt as _;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::header::{HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::client::ask;
use super::door::{FULL, Node};
use super::pod::{fine, lines};
use super::policy::{FORMS, Form, declared};

/// Bytes of a large body.
const SIZE: usize = 64 * 1024 * 1024;
const CHUNK: usize = 256 * 1024;
const HEAD: &str = "Host: shop.example\r\nX-Role: user\r\n";

/// Bytes of a body from `at` on: other ones at every place of it.
fn pattern(at: usize, length: usize) -> Vec<u8> {
    let words = at / 8..(at + length) / 8;
    words
        .flat_map(|word| u64::try_from(word).unwrap().to_le_bytes())
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_request_of_a_long_connection_is_judged() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let mut doors = Vec::new();
    for form in FORMS {
        let door = node.door(&declared(form), FULL, fine).await;
        let mut stream = node.connect(&door);
        for number in 0..200 {
            let (path, answer) = [("public", 200), ("admin", 403)][number % 2];
            let request = format!("GET /{path}/{number:03} HTTP/1.1\r\n{HEAD}\r\n");
            assert_eq!(ask(&mut stream, request.as_bytes(), 1), [answer], "{number}");
        }
        doors.push(door);
    }
    let allowed = (0..200)
        .step_by(2)
        .map(|number| format!("GET /public/{number:03} HTTP/1.1"));
    let allowed: Vec<String> = allowed.collect();
    for record in node.finish_all(doors).await {
        assert_eq!(lines(&record), allowed);
    }
}

/// A pod that says that it wants a body before it has one.
fn welcomes(stream: &mut TcpStream, all: &[u8], before: usize) {
    let head = all.windows(4).position(|four| four == b"\r\n\r\n");
    let Some(start) = head.map(|at| at + 4) else {
        return;
    };
    if before < start {
        stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").unwrap();
    }
    if all.ends_with(b"body") {
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_waits_to_be_asked_for_its_body_is_asked_by_the_pod() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let door = node.door(&declared(Form::Deny), FULL, welcomes).await;
    let mut stream = node.connect(&door);
    let head = format!("POST /public HTTP/1.1\r\n{HEAD}Expect: 100-continue\r\nContent-Length: 4\r\n\r\n");
    assert_eq!(ask(&mut stream, head.as_bytes(), 1), [100]);
    assert_eq!(ask(&mut stream, b"body", 1), [200]);
    let [record] = node.finish([door]).await;
    assert!(record.len() == 1 && record[0].ends_with(b"\r\n\r\nbody"));
}

/// A pod that takes a large body and gives it back, once it has all of it.
fn mirror(stream: &mut TcpStream, all: &[u8], before: usize) {
    let head = all.windows(4).take(4096).position(|four| four == b"\r\n\r\n");
    let Some(start) = head.map(|at| at + 4) else {
        return;
    };
    if before < start + SIZE && all.len() == start + SIZE {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {SIZE}\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&all[start..]).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_body_passes_both_ways() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let door = node.door(&declared(Form::Deny), FULL, mirror).await;
    let mut stream = node.connect(&door);
    let head = format!("POST /public HTTP/1.1\r\n{HEAD}Content-Length: {SIZE}\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    for at in (0..SIZE).step_by(CHUNK) {
        stream.write_all(&pattern(at, CHUNK)).unwrap();
    }
    let mut answer = Vec::new();
    let mut one = [0];
    while !answer.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut one).unwrap();
        answer.push(one[0]);
    }
    assert!(
        answer.starts_with(b"HTTP/1.1 200 OK\r\n"),
        "{}",
        String::from_utf8_lossy(&answer)
    );
    let mut heard = vec![0; CHUNK];
    for at in (0..SIZE).step_by(CHUNK) {
        stream.read_exact(&mut heard).unwrap();
        assert!(heard == pattern(at, CHUNK), "at {at}");
    }
    let [record] = node.finish([door]).await;
    let lengths: Vec<usize> = record.iter().map(Vec::len).collect();
    assert!(lengths.len() == 1 && lengths[0] > SIZE, "{lengths:?}");
}

/// A pod of HTTP/2 that says what it hears while it hears it, its trailers too; as many connections as come.
async fn echo(listener: std::net::TcpListener) {
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::TcpListener::from_std(listener).unwrap();
    while let Ok((stream, _)) = listener.accept().await {
        let service = service_fn(|request: Request<Incoming>| async {
            assert_eq!(request.uri().path(), "/public");
            Ok::<_, Infallible>(Response::new(request.into_body()))
        });
        let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        // It ends with Envoy.
        tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
    }
}

type Body = StreamBody<futures::channel::mpsc::Receiver<Result<Frame<Bytes>, Infallible>>>;

fn call(path: &str, body: Body) -> Request<Body> {
    Request::post(format!("http://shop.example{path}"))
        .header("x-role", "user")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .unwrap()
}

/// As gRPC does it: each message is answered before the next one is sent, and trailers end both ways.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_goes_both_ways_at_once_with_its_trailers() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let server = node.listen();
    let pod = server.local_addr().unwrap();
    let server = tokio::spawn(echo(server));
    let door = node.listener(&declared(Form::Allow), FULL, pod).await;
    let stream = node.connect_to(door);
    stream.set_nonblocking(true).unwrap();
    let stream = TokioIo::new(tokio::net::TcpStream::from_std(stream).unwrap());
    let (mut client, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream)
        .await
        .unwrap();
    let driver = tokio::spawn(connection);
    let (nothing, body) = futures::channel::mpsc::channel(1);
    drop(nothing);
    let refused = client
        .send_request(call("/admin", StreamBody::new(body)))
        .await
        .unwrap();
    // PERMISSION_DENIED, as gRPC says it.
    assert_eq!(refused.headers()["grpc-status"], "7");
    let (mut says, body) = futures::channel::mpsc::channel(1);
    let mut answer = client
        .send_request(call("/public", StreamBody::new(body)))
        .await
        .unwrap();
    assert_eq!(answer.status(), 200);
    for at in (0..SIZE).step_by(CHUNK) {
        let sent = pattern(at, CHUNK);
        says.send(Ok(Frame::data(sent.clone().into()))).await.unwrap();
        let mut heard = Vec::new();
        while heard.len() < CHUNK {
            let frame = answer.body_mut().frame().await.unwrap().unwrap();
            heard.extend_from_slice(&frame.into_data().unwrap());
        }
        assert!(heard == sent, "at {at}");
    }
    let trailers = HeaderMap::from_iter([(
        hyper::header::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static("0"),
    )]);
    says.send(Ok(Frame::trailers(trailers.clone()))).await.unwrap();
    drop(says);
    let last = answer.body_mut().frame().await.unwrap().unwrap();
    assert_eq!(last.into_trailers().unwrap(), trailers);
    assert!(answer.body_mut().frame().await.is_none());
    drop(client);
    let [] = node.finish([]).await;
    driver.abort();
    server.abort();
}
