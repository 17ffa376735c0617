//! A client that says what it likes and hears what comes back.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

/// The statuses of answers in HTTP/1 until there are `count` of them or the connection ends; one that says 100 counts.
pub(super) fn statuses(stream: &mut TcpStream, count: usize) -> Vec<u16> {
    let mut read = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let found = found(&read);
        if found.len() >= count {
            return found;
        }
        match stream.read(&mut buffer) {
            Ok(0) => return found,
            Err(error) => {
                is_an_end(&error);
                return found;
            }
            Ok(more) => read.extend_from_slice(&buffer[..more]),
        }
    }
}

fn found(read: &[u8]) -> Vec<u16> {
    let text = String::from_utf8_lossy(read);
    let starts = text.match_indices("HTTP/1.");
    let status = |at: usize| text.get(at + 9..at + 12)?.parse().ok();
    starts.filter_map(|(at, _)| status(at)).collect()
}

/// Sends and hears; a peer that closes before all was said is an answer too.
pub(super) fn ask(stream: &mut TcpStream, bytes: &[u8], count: usize) -> Vec<u16> {
    let _said = stream.write_all(bytes);
    statuses(stream, count)
}

/// Until the other side ends the connection.
pub(super) fn rest(stream: &mut TcpStream) -> Vec<u8> {
    let mut read = Vec::new();
    if let Err(error) = stream.read_to_end(&mut read) {
        is_an_end(&error);
    }
    read
}

/// A reset ends a connection as well; nothing for `LIMIT` does not.
pub(super) fn is_an_end(error: &std::io::Error) {
    use std::io::ErrorKind::{ConnectionReset, UnexpectedEof};
    assert!(
        [ConnectionReset, UnexpectedEof].contains(&error.kind()),
        "no answer: {error}"
    );
}
