//! Who asks an oracle: bytes on a Unix socket, as the agent will send them.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use thyra_node_proxy_bridge::listener::REASON_HEADER;
use thyra_policy_compiler::traffic::Request;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use super::token;

/// What an answer may take.
const LIMIT: Duration = Duration::from_secs(10);

/// A client's port.
pub(crate) const PORT: u16 = 40_000;

/// Envoy's answer to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    /// The rule, or Envoy's words.
    pub(crate) reason: String,
}

/// A connection to an oracle, its PROXY header sent.
pub(crate) async fn connect(oracle: &Path, source: IpAddr) -> UnixStream {
    connect_from(oracle, source, PORT).await
}

/// The same with another source port.
pub(crate) async fn connect_from(oracle: &Path, source: IpAddr, port: u16) -> UnixStream {
    // Acknowledged is not yet listening.
    let connecting = async {
        loop {
            match UnixStream::connect(oracle).await {
                Ok(stream) => return stream,
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
                    sleep(Duration::from_millis(2)).await;
                }
                Err(error) => panic!("{}: {error}", oracle.display()),
            }
        }
    };
    let mut stream = timeout(LIMIT, connecting)
        .await
        .expect("an active oracle listens");
    let (family, to) = match source {
        IpAddr::V4(_) => ("TCP4", "10.0.0.1"),
        IpAddr::V6(_) => ("TCP6", "fd00::1"),
    };
    let header = format!("PROXY {family} {source} {to} {port} 80\r\n");
    stream.write_all(header.as_bytes()).await.unwrap();
    stream
}

/// The bytes of a request.
pub(crate) fn http(request: &Request) -> Vec<u8> {
    http_answered(request, &BTreeMap::new())
}

/// The same with what authorizers are to say.
pub(crate) fn http_answered(request: &Request, answers: &BTreeMap<String, bool>) -> Vec<u8> {
    let Request {
        method,
        target,
        authority,
        headers,
        claims,
    } = request;
    let mut text = format!("{method} {target} HTTP/1.1\r\nHost: {authority}\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    for (name, yes) in answers {
        let word = if *yes { "yes" } else { "no" };
        text.push_str(&format!("x-answer-{name}: {word}\r\n"));
    }
    if let Some(claims) = claims {
        text.push_str(&format!("authorization: Bearer {}\r\n", token::signed(claims)));
    }
    text.push_str("\r\n");
    text.into_bytes()
}

/// Sends a request on an open connection and reads the answer.
pub(crate) async fn ask(stream: &mut UnixStream, bytes: &[u8]) -> Reply {
    match exchange(stream, bytes).await {
        Ok(answer) => Reply {
            status: answer.status(),
            reason: answer.field(REASON_HEADER).unwrap_or_default(),
        },
        Err(reason) => Reply { status: 0, reason },
    }
}

/// An answer as it was read.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn status(&self) -> u16 {
        let status = self.head.split(' ').nth(1).and_then(|text| text.parse().ok());
        status.unwrap_or(0)
    }

    pub(crate) fn field(&self, name: &str) -> Option<String> {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(n, _)| *n == name).map(|(_, value)| value.to_owned())
    }
}

/// The whole answer, or that there is none.
pub(crate) async fn exchange(stream: &mut UnixStream, bytes: &[u8]) -> Result<Answer, String> {
    timeout(LIMIT, async {
        stream.write_all(bytes).await.unwrap();
        let mut read = Vec::new();
        let head = loop {
            if let Some(end) = read.windows(4).position(|four| four == b"\r\n\r\n") {
                break String::from_utf8_lossy(&read[..end]).into_owned();
            }
            let mut more = [0; 4096];
            let count = stream.read(&mut more).await.unwrap_or(0);
            if count == 0 {
                return Err(format!("closed after {} bytes", read.len()));
            }
            read.extend_from_slice(&more[..count]);
        };
        let mut answer = Answer {
            head,
            body: String::new(),
        };
        let length = answer.field("content-length");
        let length: usize = length.and_then(|text| text.parse().ok()).unwrap_or(0);
        let start = answer.head.len() + 4;
        while read.len() < start + length {
            let mut more = [0; 4096];
            let count = stream.read(&mut more).await.unwrap();
            assert!(count > 0, "the answer's body is cut off");
            read.extend_from_slice(&more[..count]);
        }
        answer.body = String::from_utf8_lossy(&read[start..start + length]).into_owned();
        Ok(answer)
    })
    .await
    .expect("the oracle answers")
}

/// Whether a stream that is not HTTP passes: bytes come back, or the end.
pub(crate) async fn passes(stream: &mut UnixStream, bytes: &[u8]) -> bool {
    timeout(LIMIT, async {
        stream.write_all(bytes).await.unwrap();
        let mut one = [0; 1];
        stream.read(&mut one).await.is_ok_and(|count| count == 1)
    })
    .await
    .expect("the oracle answers")
}

/// A TLS ClientHello (RFC 8446, 4.1.2) with a server name, or without.
pub(crate) fn client_hello(name: Option<&str>) -> Vec<u8> {
    let with_length = |bytes: &[u8]| {
        let mut all = u16::try_from(bytes.len()).unwrap().to_be_bytes().to_vec();
        all.extend_from_slice(bytes);
        all
    };
    let mut extensions = Vec::new();
    if let Some(name) = name {
        let mut entry = vec![0];
        entry.extend(with_length(name.as_bytes()));
        extensions.extend([0, 0]);
        extensions.extend(with_length(&with_length(&entry)));
    }
    // supported_versions: TLS 1.3.
    extensions.extend([0, 43, 0, 3, 2, 3, 4]);
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    // No session, two suites, no compression.
    body.extend([0, 0, 4, 0x13, 0x01, 0xc0, 0x2f, 1, 0]);
    body.extend(with_length(&extensions));
    let mut handshake = vec![1, 0];
    handshake.extend(with_length(&body));
    let mut record = vec![0x16, 3, 1];
    record.extend(with_length(&handshake));
    record
}
