//! One connection attempt and what came of it.
//!
//! Invariant: the outcome is what the client itself saw; only "closed without the server having seen a byte"
//! asks the servers.

mod http;
mod plain;
mod tls;
mod udp;

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;
use tokio::time::timeout_at;

pub(crate) use plain::{Held, Hold};

use super::netns::Netns;
use super::scenario::{Expect, Kind};
use super::server::Seen;

/// What a client saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Allow,
    Deny,
    Drop,
    /// An HTTP status; whether the application itself answered.
    Status {
        status: u16,
        application: bool,
    },
    /// The client could not even try.
    Failed(String),
}

/// An outcome with what it takes to find its verdict.
#[derive(Clone, Debug)]
pub(crate) struct Seen5 {
    pub(crate) outcome: Outcome,
    /// The client's own end, where the socket had one.
    pub(crate) client: Option<SocketAddr>,
    pub(crate) latency: Duration,
}

/// What to dial and how.
pub(crate) struct Dial<'a> {
    pub(crate) netns: &'a Netns,
    pub(crate) to: SocketAddr,
    pub(crate) kind: &'a Kind,
    /// The port speaks HTTP by its name: a plain probe sends a GET.
    pub(crate) speaks_http: bool,
    pub(crate) timeout: Duration,
    pub(crate) token: String,
    pub(crate) seen: &'a Seen,
}

/// Runs the attempt.
pub(crate) async fn run(dial: &Dial<'_>) -> Seen5 {
    let started = Instant::now();
    let (outcome, client) = match dial.kind {
        Kind::Udp => udp::run(dial).await,
        Kind::Plain | Kind::Http(_) | Kind::Tls(_) => run_tcp(dial).await,
    };
    Seen5 {
        outcome,
        client,
        latency: started.elapsed(),
    }
}

async fn run_tcp(dial: &Dial<'_>) -> (Outcome, Option<SocketAddr>) {
    let deadline = tokio::time::Instant::now() + dial.timeout;
    let (stream, client) = match connect(dial.netns, dial.to, deadline).await {
        Ok(connected) => connected,
        Err((outcome, client)) => return (outcome, client),
    };
    let outcome = match dial.kind {
        Kind::Plain | Kind::Udp => plain::run(dial, stream, deadline).await,
        Kind::Http(request) => http::run(dial, stream, request, deadline).await,
        Kind::Tls(hello) => tls::run(dial, stream, hello, deadline).await,
    };
    (outcome, Some(client))
}

/// Connects; an end of its own is bound first, so that it is known even if nobody answers.
async fn connect(
    netns: &Netns,
    to: SocketAddr,
    deadline: tokio::time::Instant,
) -> Result<(TcpStream, SocketAddr), (Outcome, Option<SocketAddr>)> {
    let socket = netns.tcp(to.is_ipv4()).map_err(|error| (failed(&error), None))?;
    // The kernel chooses the address by route at connect; the port is chosen here, so that it can be told.
    let any: IpAddr = if to.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    socket
        .bind((any, 0).into())
        .map_err(|error| (failed(&error), None))?;
    let bound = socket.local_addr().ok();
    match timeout_at(deadline, socket.connect(to)).await {
        Err(_) => Err((Outcome::Drop, bound)),
        Ok(Err(error)) => Err((of_error(&error), bound)),
        Ok(Ok(stream)) => match stream.local_addr() {
            Ok(client) => Ok((stream, client)),
            Err(error) => Err((of_error(&error), bound)),
        },
    }
}

/// What an error of a socket means for a probe.
fn of_error(error: &io::Error) -> Outcome {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::ConnectionRefused
        | Kind::ConnectionReset
        | Kind::ConnectionAborted
        | Kind::BrokenPipe
        | Kind::NotConnected
        | Kind::UnexpectedEof => Outcome::Deny,
        Kind::TimedOut => Outcome::Drop,
        _ => failed(error),
    }
}

fn failed(error: &io::Error) -> Outcome {
    Outcome::Failed(error.to_string())
}

impl Outcome {
    /// `true` if this is what was wanted.
    pub(crate) fn meets(&self, expect: Expect) -> bool {
        match (self, expect) {
            (Self::Allow, Expect::Allow) | (Self::Deny, Expect::Deny) | (Self::Drop, Expect::Drop) => true,
            (Self::Status { application, .. }, Expect::Allow) => *application,
            (Self::Status { status, .. }, Expect::Status(wanted)) => *status == wanted,
            _ => false,
        }
    }

    /// As the report shows it: an application's answer is `allow` unless a status was asked for.
    pub(crate) fn show(&self, expect: Expect) -> String {
        match self {
            Self::Status {
                application: true, ..
            } if !matches!(expect, Expect::Status(_)) => "allow".to_owned(),
            other => other.to_string(),
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allow => f.write_str("allow"),
            Self::Deny => f.write_str("deny"),
            Self::Drop => f.write_str("drop"),
            Self::Status { status, .. } => write!(f, "{status}"),
            Self::Failed(text) => write!(f, "failed: {text}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Expect, Outcome};

    #[test]
    fn a_proxys_own_answer_is_no_allow() {
        let of = |status, application| Outcome::Status { status, application };
        assert!(of(200, true).meets(Expect::Allow));
        assert!(of(404, true).meets(Expect::Allow));
        assert!(!of(403, false).meets(Expect::Allow));
        assert!(of(403, false).meets(Expect::Status(403)));
        assert!(!of(200, true).meets(Expect::Deny));
        assert_eq!(of(200, true).show(Expect::Allow), "allow");
        assert_eq!(of(200, true).show(Expect::Status(200)), "200");
    }
}
