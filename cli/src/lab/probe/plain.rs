//! The plain probe, and connections that are kept open.
//!
//! Invariant: `allow` needs the connection established, and bytes back or still open after 300 ms.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

use super::{Dial, Outcome, connect, of_error};
use crate::lab::netns::Netns;
use crate::lab::scenario::ConnectionState;

/// A connection that is still open then, though nothing came back, is allowed.
const SETTLED: Duration = Duration::from_millis(300);
/// How long `expect_open` waits for its echo.
const ECHO_WAIT: Duration = Duration::from_secs(1);

pub(super) async fn run(dial: &Dial<'_>, mut stream: TcpStream, deadline: Instant) -> Outcome {
    let line = opening(dial.speaks_http, &dial.token);
    if let Err(error) = stream.write_all(line.as_bytes()).await {
        return of_error(&error);
    }
    let settled = Instant::now() + SETTLED;
    let mut byte = [0; 1];
    match timeout_at(settled.min(deadline), stream.read(&mut byte)).await {
        Err(_) => Outcome::Allow,
        Ok(Ok(0)) if dial.seen.holds(&dial.token) => Outcome::Allow,
        Ok(Ok(0)) => Outcome::Deny,
        Ok(Ok(_)) => Outcome::Allow,
        Ok(Err(error)) => of_error(&error),
    }
}

/// The line that a plain probe sends.
fn opening(speaks_http: bool, token: &str) -> String {
    if speaks_http {
        format!("GET / HTTP/1.1\r\nhost: lab\r\nuser-agent: {token}\r\n\r\n")
    } else {
        format!("{token}\n")
    }
}

/// What to hold open.
pub(crate) struct Hold<'a> {
    pub(crate) netns: &'a Netns,
    pub(crate) to: SocketAddr,
    pub(crate) speaks_http: bool,
    pub(crate) timeout: Duration,
    pub(crate) token: String,
}

/// A connection that is kept open.
pub(crate) struct Held {
    stream: TcpStream,
    client: SocketAddr,
    line: String,
}

impl Held {
    /// Connects and waits for the first answer.
    pub(crate) async fn open(hold: &Hold<'_>) -> Result<Self, (Outcome, Option<SocketAddr>)> {
        let deadline = Instant::now() + hold.timeout;
        let (stream, client) = connect(hold.netns, hold.to, deadline).await?;
        let mut held = Self {
            stream,
            client,
            line: opening(hold.speaks_http, &hold.token),
        };
        match held.state().await {
            ConnectionState::Alive => Ok(held),
            ConnectionState::Reset => Err((Outcome::Deny, Some(client))),
            ConnectionState::Timeout => Err((Outcome::Drop, Some(client))),
        }
    }

    pub(crate) fn client(&self) -> SocketAddr {
        self.client
    }

    /// Sends a line and waits for its echo.
    pub(crate) async fn state(&mut self) -> ConnectionState {
        let mut buffer = [0; 4096];
        // What came since the last look is not the answer to this line; an error shows again below.
        while let Ok(1..) = self.stream.try_read(&mut buffer) {}
        if self.stream.write_all(self.line.as_bytes()).await.is_err() {
            return ConnectionState::Reset;
        }
        match timeout(ECHO_WAIT, self.stream.read(&mut buffer)).await {
            Err(_) => ConnectionState::Timeout,
            Ok(Ok(1..)) => ConnectionState::Alive,
            Ok(Ok(0) | Err(_)) => ConnectionState::Reset,
        }
    }
}
