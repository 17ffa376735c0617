//! External authorizers, over HTTP and over gRPC: they say yes to `x-ext-authz: allow`, as Istio's sample does.
//!
//! Invariant: only what says so is let through. `x-ext-authz: error` and `hang` make them fail. A stream that is not
//! HTTP has no header: it passes to an even port.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::pending;
use std::io;

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use prost::Message;

use super::witness::Witness;

/// What decides.
const HEADER: &str = "x-ext-authz";
/// What the pod and the client may hear of it.
const RESULT: &str = "x-ext-authz-check-result";
const DENIED: &str = "denied by ext_authz for not found header `x-ext-authz: allow` in the request";
/// `google.rpc.Code`.
const OK: i32 = 0;
const PERMISSION_DENIED: i32 = 7;
const UNAVAILABLE: &str = "14";
/// The byte and the four of the length before a message of gRPC.
const FRAME: usize = 5;

/// `envoy.service.auth.v3`, as far as it is read here.
#[derive(Clone, PartialEq, Message)]
struct CheckRequest {
    #[prost(message, optional, tag = "1")]
    attributes: Option<Attributes>,
}

#[derive(Clone, PartialEq, Message)]
struct Attributes {
    #[prost(message, optional, tag = "2")]
    destination: Option<Peer>,
    #[prost(message, optional, tag = "4")]
    request: Option<Asked>,
}

#[derive(Clone, PartialEq, Message)]
struct Peer {
    #[prost(message, optional, tag = "1")]
    address: Option<Address>,
}

#[derive(Clone, PartialEq, Message)]
struct Address {
    #[prost(message, optional, tag = "1")]
    socket: Option<Socket>,
}

#[derive(Clone, PartialEq, Message)]
struct Socket {
    #[prost(uint32, tag = "3")]
    port: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Asked {
    #[prost(message, optional, tag = "2")]
    http: Option<AskedHttp>,
}

#[derive(Clone, PartialEq, Message)]
struct AskedHttp {
    #[prost(map = "string, string", tag = "3")]
    headers: HashMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
struct CheckResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<Code>,
    #[prost(message, optional, tag = "2")]
    denied: Option<Said>,
    #[prost(message, optional, tag = "3")]
    ok: Option<Said>,
}

/// `google.rpc.Status`, and `envoy.type.v3.HttpStatus`.
#[derive(Clone, PartialEq, Message)]
struct Code {
    #[prost(int32, tag = "1")]
    code: i32,
}

/// `DeniedHttpResponse`, and `OkHttpResponse`, which has headers only.
#[derive(Clone, PartialEq, Message)]
struct Said {
    #[prost(message, optional, tag = "1")]
    status: Option<Code>,
    #[prost(message, repeated, tag = "2")]
    headers: Vec<HeaderOption>,
    #[prost(string, tag = "3")]
    body: String,
}

/// `HeaderValueOption`.
#[derive(Clone, PartialEq, Message)]
struct HeaderOption {
    #[prost(message, optional, tag = "1")]
    header: Option<Header>,
}

#[derive(Clone, PartialEq, Message)]
struct Header {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
}

/// What it says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Word {
    Yes,
    No,
    Error,
}

impl Word {
    async fn of(header: Option<&str>) -> Self {
        match header {
            Some("allow") => Self::Yes,
            Some("error") => Self::Error,
            Some("hang") => pending().await,
            _ => Self::No,
        }
    }
}

/// Whether a port of this name is an authorizer's.
pub(super) fn is_authorizer(name: &str) -> bool {
    name.starts_with("ext-authz")
}

pub(super) async fn serve(stream: Witness) -> io::Result<()> {
    let builder = auto::Builder::new(TokioExecutor::new());
    builder
        .serve_connection(TokioIo::new(stream), service_fn(answer))
        .await
        .map_err(io::Error::other)
}

async fn answer(
    request: Request<Incoming>,
) -> Result<Response<UnsyncBoxBody<Bytes, Infallible>>, hyper::Error> {
    let is_grpc = request
        .headers()
        .get("content-type")
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    if is_grpc {
        return over_grpc(request).await;
    }
    let header = request
        .headers()
        .get(HEADER)
        .and_then(|value| value.to_str().ok());
    let word = Word::of(header).await;
    let (status, result, body) = match word {
        Word::Yes => (StatusCode::OK, "allowed", ""),
        Word::No => (StatusCode::FORBIDDEN, "denied", DENIED),
        Word::Error => (StatusCode::SERVICE_UNAVAILABLE, "error", ""),
    };
    let mut response = Response::new(Full::from(body).boxed_unsync());
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(RESULT, HeaderValue::from_static(result));
    Ok(response)
}

async fn over_grpc(
    request: Request<Incoming>,
) -> Result<Response<UnsyncBoxBody<Bytes, Infallible>>, hyper::Error> {
    let body = request.into_body().collect().await?.to_bytes();
    let message = body.get(FRAME..).unwrap_or_default();
    let attributes = CheckRequest::decode(message)
        .ok()
        .and_then(|check| check.attributes);
    let word = match attributes {
        Some(attributes) => word(attributes).await,
        None => Word::Error,
    };
    let mut trailers = HeaderMap::new();
    let status = if word == Word::Error { UNAVAILABLE } else { "0" };
    trailers.insert("grpc-status", HeaderValue::from_static(status));
    let mut frames = Vec::new();
    if word != Word::Error {
        frames.push(Ok(Frame::data(frame(&response(word == Word::Yes)))));
    }
    frames.push(Ok(Frame::trailers(trailers)));
    let body = StreamBody::new(futures::stream::iter(frames)).boxed_unsync();
    let mut response = Response::new(body);
    response
        .headers_mut()
        .insert("content-type", HeaderValue::from_static("application/grpc"));
    Ok(response)
}

async fn word(attributes: Attributes) -> Word {
    let headers = attributes
        .request
        .and_then(|asked| asked.http)
        .map(|http| http.headers);
    match headers.filter(|headers| !headers.is_empty()) {
        Some(headers) => Word::of(headers.get(HEADER).map(String::as_str)).await,
        None => {
            let socket = attributes.destination.and_then(|peer| peer.address?.socket);
            let even = socket.is_some_and(|socket| socket.port % 2 == 0);
            if even { Word::Yes } else { Word::No }
        }
    }
}

fn response(yes: bool) -> CheckResponse {
    let said = |result: &str| {
        vec![HeaderOption {
            header: Some(Header {
                key: RESULT.to_owned(),
                value: result.to_owned(),
            }),
        }]
    };
    if yes {
        return CheckResponse {
            status: Some(Code { code: OK }),
            ok: Some(Said {
                headers: said("allowed"),
                ..Said::default()
            }),
            denied: None,
        };
    }
    CheckResponse {
        status: Some(Code {
            code: PERMISSION_DENIED,
        }),
        denied: Some(Said {
            status: Some(Code { code: 403 }),
            headers: said("denied"),
            body: DENIED.to_owned(),
        }),
        ok: None,
    }
}

/// Not compressed, its length, itself.
fn frame(message: &CheckResponse) -> Bytes {
    let message = message.encode_to_vec();
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    let mut frame = vec![0];
    frame.extend(length.to_be_bytes());
    frame.extend(message);
    frame.into()
}
