//! HTTP/2 by hand: frames (RFC 9113 4.1) whose header blocks (RFC 7541 6.2.2) may say what no library would.

use std::io::Read as _;
use std::net::TcpStream;

use http_body_util::Empty;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::AsyncWriteExt as _;

use super::super::node::LIMIT;
use super::client::is_an_end;

pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const GO_AWAY: u8 = 7;
pub(super) const CONTINUATION: u8 = 9;

pub(super) const END_STREAM: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;

pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut all = length[1..].to_vec();
    all.extend([kind, flags]);
    all.extend(stream.to_be_bytes());
    all.extend_from_slice(payload);
    all
}

/// What a client begins with.
pub(super) fn opening() -> Vec<u8> {
    let mut all = PREFACE.to_vec();
    all.extend(frame(SETTINGS, 0, 0, &[]));
    all
}

fn string(bytes: &[u8], block: &mut Vec<u8>) {
    const FULL: usize = 127;
    if bytes.len() < FULL {
        block.push(u8::try_from(bytes.len()).unwrap());
    } else {
        block.push(127);
        let mut rest = bytes.len() - FULL;
        while rest >= 128 {
            block.push(u8::try_from(rest % 128 + 128).unwrap());
            rest /= 128;
        }
        block.push(u8::try_from(rest).unwrap());
    }
    block.extend_from_slice(bytes);
}

/// Literal fields without indexing, without Huffman's code.
pub(super) fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        string(name.as_bytes(), &mut block);
        string(value.as_bytes(), &mut block);
    }
    block
}

/// A request without a body.
pub(super) fn request(stream: u32, fields: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &block(fields))
}

/// What comes back for a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    Status(u16),
    Reset,
    /// The whole connection is refused or closed.
    Gone,
}

pub(super) fn reply(from: &mut TcpStream, stream: u32) -> Reply {
    let mut head = [0; 9];
    loop {
        let mut read = |buffer: &mut [u8]| from.read_exact(buffer).map_err(|error| is_an_end(&error));
        if read(&mut head).is_err() {
            return Reply::Gone;
        }
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        if read(&mut payload).is_err() {
            return Reply::Gone;
        }
        let of = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        match head[3] {
            HEADERS if of == stream => return Reply::Status(status(&payload)),
            RESET if of == stream => return Reply::Reset,
            GO_AWAY => return Reply::Gone,
            _ => {}
        }
    }
}

/// The first field of a block: `:status`, by its index (RFC 7541 A) or as a literal beside its name's.
fn status(block: &[u8]) -> u16 {
    let resizes = block.iter().take_while(|byte| *byte & 0xe0 == 0x20).count();
    match &block[resizes..] {
        [0x88, ..] => 200,
        [0x8c, ..] => 400,
        [0x8d, ..] => 404,
        [0x48, 3, text @ ..] => std::str::from_utf8(&text[..3]).unwrap().parse().unwrap(),
        // Huffman's code, which is as long.
        [0x48, 0x83, 0x68, 0x0c, 0xff, ..] => 403,
        other => panic!("{other:02x?}"),
    }
}

/// A request that a pod got: its method, target and authority, and its headers by name.
pub(super) type Got = (String, Vec<(String, String)>);

/// How many header blocks are in what a pod got so far.
pub(super) fn count_headers(got: &[u8]) -> usize {
    let mut rest = got.get(PREFACE.len()..).unwrap_or_default();
    let mut count = 0;
    while let [a, b, c, kind, _, _, _, _, _, ..] = rest {
        count += usize::from(*kind == HEADERS);
        let length = usize::try_from(u32::from_be_bytes([0, *a, *b, *c])).unwrap();
        rest = rest.get(9 + length..).unwrap_or_default();
    }
    count
}

/// The requests in what a pod got over a connection, read by a server that was not there.
pub(super) async fn requests(record: &[u8]) -> Vec<Got> {
    let (mut from, to) = tokio::io::duplex(record.len() + 1024 * 1024);
    from.write_all(record).await.unwrap();
    let (found, mut all) = tokio::sync::mpsc::unbounded_channel();
    let service = service_fn(move |request: Request<Incoming>| {
        let found = found.clone();
        async move {
            found.send(told(&request)).unwrap();
            Ok::<_, hyper::Error>(Response::new(Empty::<Bytes>::new()))
        }
    });
    let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
    let server = tokio::spawn(server.serve_connection(TokioIo::new(to), service));
    let mut got = Vec::new();
    for _ in 0..count_headers(record) {
        let one = tokio::time::timeout(LIMIT, all.recv()).await;
        got.push(one.expect("each block is a request").unwrap());
    }
    server.abort();
    got
}

fn told(request: &Request<Incoming>) -> Got {
    let added = ["x-request-id", "x-forwarded-proto"];
    let headers = request.headers().iter();
    let headers = headers.filter(|(name, _)| !added.contains(&name.as_str()));
    let text = |value: &hyper::header::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
    let mut headers: Vec<_> = headers
        .map(|(name, value)| (name.to_string(), text(value)))
        .collect();
    headers.sort();
    (format!("{} {}", request.method(), request.uri()), headers)
}
