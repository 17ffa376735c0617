//! One HTTP request, version 1 or 2, and the status that came back.
//!
//! Invariant: with version 1 the path goes out byte for byte as given.

use http::{Method, Request, Uri};
use http_body_util::Full;
use hyper::body::Bytes;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use super::{Dial, Outcome, of_error};
use crate::lab::scenario::HttpRequest;
use crate::lab::server::APPLICATION_HEADER;

/// An answer's head is small; more is not one.
const MAX_HEAD: usize = 64 * 1024;

pub(super) async fn run(
    dial: &Dial<'_>,
    stream: TcpStream,
    request: &HttpRequest,
    deadline: Instant,
) -> Outcome {
    let answer = async {
        if request.version == 1 {
            version_1(dial, stream, request).await
        } else {
            version_2(stream, dial, request).await
        }
    };
    match timeout_at(deadline, answer).await {
        Err(_) => Outcome::Drop,
        Ok(Ok((status, application))) => Outcome::Status { status, application },
        Ok(Err(error)) => of_error(&error),
    }
}

async fn version_1(
    dial: &Dial<'_>,
    mut stream: TcpStream,
    request: &HttpRequest,
) -> std::io::Result<(u16, bool)> {
    stream.write_all(head(dial, request).as_bytes()).await?;
    stream.write_all(request.body.as_bytes()).await?;
    let mut answer = Vec::new();
    let mut buffer = [0; 4096];
    while find_end(&answer).is_none() && answer.len() < MAX_HEAD {
        match stream.read(&mut buffer).await? {
            0 => break,
            length => answer.extend_from_slice(&buffer[..length]),
        }
    }
    read_head(&answer).ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into())
}

/// The request's head with the given path untouched.
fn head(dial: &Dial<'_>, request: &HttpRequest) -> String {
    let mut head = format!("{} {} HTTP/1.1\r\n", request.method, request.path);
    if !has(request, "host") {
        head.push_str(&format!("host: {}\r\n", dial.to));
    }
    if !request.body.is_empty() && !has(request, "content-length") {
        head.push_str(&format!("content-length: {}\r\n", request.body.len()));
    }
    if !has(request, "user-agent") {
        head.push_str(&format!("user-agent: {}\r\n", dial.token));
    }
    for (name, value) in &request.headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    head
}

fn has(request: &HttpRequest, name: &str) -> bool {
    request
        .headers
        .iter()
        .any(|(given, _)| given.eq_ignore_ascii_case(name))
}

fn find_end(answer: &[u8]) -> Option<usize> {
    answer.windows(4).position(|window| window == b"\r\n\r\n")
}

/// Status, and whether the application itself answered.
fn read_head(answer: &[u8]) -> Option<(u16, bool)> {
    let text = String::from_utf8_lossy(&answer[..find_end(answer)?]).into_owned();
    let mut lines = text.split("\r\n");
    let status = lines
        .next()?
        .strip_prefix("HTTP/1.")?
        .split(' ')
        .nth(1)?
        .parse()
        .ok()?;
    let application = lines
        .filter_map(|line| line.split_once(':'))
        .any(|(name, _)| name.eq_ignore_ascii_case(APPLICATION_HEADER));
    Some((status, application))
}

async fn version_2(
    stream: TcpStream,
    dial: &Dial<'_>,
    request: &HttpRequest,
) -> std::io::Result<(u16, bool)> {
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
            .await
            .map_err(to_io)?;
    let driver = tokio::spawn(connection);
    let uri = Uri::builder()
        .scheme("http")
        .authority(dial.to.to_string())
        .path_and_query(&*request.path);
    let uri = uri.build().map_err(std::io::Error::other)?;
    let method = Method::from_bytes(request.method.as_bytes()).map_err(std::io::Error::other)?;
    let mut builder = Request::builder().method(method).uri(uri);
    for (name, value) in &request.headers {
        builder = builder.header(name, value);
    }
    let request = builder
        .body(Full::new(Bytes::from(request.body.clone())))
        .map_err(std::io::Error::other)?;
    let answer = sender.send_request(request).await;
    driver.abort();
    let answer = answer.map_err(to_io)?;
    Ok((
        answer.status().as_u16(),
        answer.headers().contains_key(APPLICATION_HEADER),
    ))
}

/// The socket's own error where there is one, so that a reset is seen as one.
fn to_io(error: hyper::Error) -> std::io::Error {
    let mut source: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(&error);
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return std::io::Error::new(io.kind(), error.to_string());
        }
        source = cause.source();
    }
    if error.is_incomplete_message() || error.is_closed() || error.is_canceled() {
        return std::io::ErrorKind::UnexpectedEof.into();
    }
    std::io::Error::other(error)
}

#[cfg(test)]
mod tests {
    use super::read_head;

    #[test]
    fn an_answers_status_and_origin_are_read() {
        assert_eq!(
            read_head(b"HTTP/1.1 200 OK\r\nX-Thyra-Lab: a/b\r\n\r\nbody"),
            Some((200, true))
        );
        assert_eq!(
            read_head(b"HTTP/1.1 403 Forbidden\r\nserver: envoy\r\n\r\n"),
            Some((403, false))
        );
        assert_eq!(read_head(b"SSH-2.0"), None);
    }
}
