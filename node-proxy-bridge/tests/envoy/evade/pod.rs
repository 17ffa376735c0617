//! A pod: a raw TCP server that keeps every byte that reaches it.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use super::super::node::LIMIT;
use super::namespace::Namespace;

/// What the pod does with a connection besides recording it: called after each read with all that came so far and
/// how much of it was there before.
pub(super) type Serve = fn(&mut TcpStream, &[u8], usize);

/// Says nothing.
pub(super) fn silent(_: &mut TcpStream, _: &[u8], _: usize) {}

/// 200 for every head of a request that is complete.
pub(super) fn fine(stream: &mut TcpStream, all: &[u8], before: usize) {
    for _ in ends(before.saturating_sub(3), all) {
        // Who is gone hears nothing.
        let _sent = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
    }
}

/// Where heads end in `all` from `from` on: behind each empty line.
fn ends(from: usize, all: &[u8]) -> impl Iterator<Item = usize> {
    let windows = all[from..].windows(4).enumerate();
    windows
        .filter(|(_, four)| four == b"\r\n\r\n")
        .map(move |(at, _)| from + at + 4)
}

#[derive(Default)]
struct Record {
    /// Of each connection.
    bytes: Mutex<Vec<Vec<u8>>>,
    more: Condvar,
    closing: AtomicBool,
}

/// It listens until `finish`.
pub(super) struct Pod {
    pub(super) address: SocketAddr,
    record: Arc<Record>,
    acceptor: JoinHandle<Vec<JoinHandle<()>>>,
}

impl Pod {
    pub(super) fn new(namespace: &Namespace, serve: Serve) -> Self {
        let listener = namespace.listen();
        let address = listener.local_addr().unwrap();
        let record = Arc::new(Record::default());
        let kept = Arc::clone(&record);
        let acceptor = std::thread::spawn(move || accept(&listener, &kept, serve));
        Self {
            address,
            record,
            acceptor,
        }
    }

    /// Connections over which something came so far.
    pub(super) fn connections(&self) -> usize {
        let all = self.record.bytes.lock().unwrap();
        all.iter().filter(|one| !one.is_empty()).count()
    }

    /// Waits until `enough` is true of what came over one connection.
    pub(super) fn wait(&self, enough: impl Fn(&[u8]) -> bool) {
        self.wait_all(1, enough);
    }

    /// The same of `count` connections.
    pub(super) fn wait_all(&self, count: usize, enough: impl Fn(&[u8]) -> bool) {
        self.wait_until(|all| all.iter().filter(|one| enough(one)).count() >= count);
    }

    /// The same of all that came.
    pub(super) fn wait_until(&self, enough: impl Fn(&[Vec<u8>]) -> bool) {
        let bytes = self.record.bytes.lock().unwrap();
        let waits = |all: &mut Vec<Vec<u8>>| !enough(all);
        let (bytes, timed_out) = self.record.more.wait_timeout_while(bytes, LIMIT, waits).unwrap();
        assert!(!timed_out.timed_out(), "the pod got {:?} only", *bytes);
    }

    /// All that ever came, by connection, once Envoy is gone; empty ones are left out.
    pub(super) fn finish(self, namespace: &Namespace) -> Vec<Vec<u8>> {
        self.record.closing.store(true, Ordering::SeqCst);
        drop(namespace.connect(self.address).unwrap());
        for reader in self.acceptor.join().unwrap() {
            reader.join().unwrap();
        }
        let mut bytes = std::mem::take(&mut *self.record.bytes.lock().unwrap());
        bytes.retain(|one| !one.is_empty());
        bytes
    }
}

fn accept(listener: &TcpListener, record: &Arc<Record>, serve: Serve) -> Vec<JoinHandle<()>> {
    let mut readers = Vec::new();
    // Whatever is accepted after `closing` was connected before it, or is its own last connection.
    while let Ok((stream, _)) = listener.accept() {
        if record.closing.load(Ordering::SeqCst) {
            listener.set_nonblocking(true).unwrap();
        }
        stream.set_nonblocking(false).unwrap();
        let record = Arc::clone(record);
        readers.push(std::thread::spawn(move || read(stream, &record, serve)));
    }
    readers
}

fn read(mut stream: TcpStream, record: &Record, serve: Serve) {
    let number = {
        let mut all = record.bytes.lock().unwrap();
        all.push(Vec::new());
        all.len() - 1
    };
    let mut own: Vec<u8> = Vec::new();
    let mut buffer = vec![0; 65_536];
    // A reset is an end too, after all that came before it.
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        let before = own.len();
        own.extend_from_slice(&buffer[..count]);
        record.bytes.lock().unwrap()[number].extend_from_slice(&buffer[..count]);
        record.more.notify_all();
        serve(&mut stream, &own, before);
    }
}

/// The request lines of what a pod got, sorted; requests without bodies only.
pub(super) fn lines(connections: &[Vec<u8>]) -> Vec<String> {
    let mut found = Vec::new();
    for bytes in connections {
        let mut start = 0;
        for end in ends(0, bytes) {
            let head = &bytes[start..end];
            let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
            found.push(String::from_utf8_lossy(line).into_owned());
            start = end;
        }
        assert_eq!(
            start,
            bytes.len(),
            "a part of a request: {:?}",
            String::from_utf8_lossy(bytes)
        );
    }
    found.sort();
    found
}

/// What a pod got as text, without what Envoy adds to each request.
pub(super) fn text(connections: &[Vec<u8>]) -> String {
    let added = |line: &&str| !line.starts_with("x-request-id: ") && *line != "x-forwarded-proto: http\r\n";
    let all = String::from_utf8_lossy(&connections.concat()).into_owned();
    all.split_inclusive('\n').filter(added).collect()
}
