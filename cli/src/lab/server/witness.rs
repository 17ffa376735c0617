//! Notes which probes' bytes a server has received.
//!
//! Invariant: a token is in the set only if a server read it from its socket.

use std::collections::HashSet;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// Begins each token, so that it is found in whatever surrounds it.
const MARK: &[u8] = b"thyra-lab-probe-";
/// Digits after the mark.
const DIGITS: usize = 16;
/// A token is near the beginning of what a probe sends.
const LOOK_AT: usize = 2048;

/// Tokens that some server has read.
#[derive(Debug, Default)]
pub(crate) struct Seen(Mutex<HashSet<Vec<u8>>>);

impl Seen {
    /// A token for the `number`th probe.
    pub(crate) fn token(number: u64) -> String {
        format!("{}{number:016x}", String::from_utf8_lossy(MARK))
    }

    pub(crate) fn holds(&self, token: &str) -> bool {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(token.as_bytes())
    }

    fn look_for_token(&self, bytes: &[u8]) {
        let length = MARK.len() + DIGITS;
        if let Some(at) = bytes.windows(length).position(|window| window.starts_with(MARK)) {
            let token = bytes[at..at + length].to_vec();
            self.0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(token);
        }
    }
}

/// A server's end of a connection, looked at while it is read.
pub(super) struct Witness {
    stream: TcpStream,
    seen: Arc<Seen>,
    read: Vec<u8>,
}

impl Witness {
    pub(super) fn new(stream: TcpStream, seen: Arc<Seen>) -> Self {
        Self {
            stream,
            seen,
            read: Vec::new(),
        }
    }
}

impl AsyncRead for Witness {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        let fresh = &buf.filled()[before..];
        if self.read.len() < LOOK_AT && !fresh.is_empty() {
            self.read.extend_from_slice(fresh);
            self.seen.look_for_token(&self.read);
        }
        result
    }
}

impl AsyncWrite for Witness {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::Seen;

    #[test]
    fn a_token_is_found_among_other_bytes() {
        let seen = Seen::default();
        let token = Seen::token(42);
        seen.look_for_token(format!("GET / HTTP/1.1\r\nx: {token}\r\n").as_bytes());
        assert!(seen.holds(&token));
        assert!(!seen.holds(&Seen::token(43)));
        seen.look_for_token(b"thyra-lab-probe-12");
    }
}
