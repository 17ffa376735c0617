//! HTTP/1.1 and h2c: an echo that tells what it saw, and a gRPC echo.
//!
//! Invariant: every answer carries `x-thyra-lab`, so that a proxy's own answer can be told from the
//! application's.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;

use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::json;

use super::Identity;
use super::witness::Witness;

/// On each answer of an application in the lab; its value is the pod.
pub(crate) const APPLICATION_HEADER: &str = "x-thyra-lab";
/// `grpc.health.v1.HealthCheckResponse{status: SERVING}` in its frame.
const SERVING: &[u8] = &[0, 0, 0, 0, 2, 0x08, 0x01];

/// A port of this name speaks HTTP.
pub(crate) fn is_http(name: &str) -> bool {
    name.starts_with("http")
}

pub(super) async fn serve(stream: Witness, identity: Identity, peer: SocketAddr) -> io::Result<()> {
    let service = service_fn(move |request| echo(request, identity.clone(), peer));
    let builder = auto::Builder::new(TokioExecutor::new());
    builder
        .serve_connection(TokioIo::new(stream), service)
        .await
        .map_err(io::Error::other)
}

pub(super) async fn serve_grpc(stream: Witness) -> io::Result<()> {
    let builder = auto::Builder::new(TokioExecutor::new());
    builder
        .serve_connection(TokioIo::new(stream), service_fn(grpc))
        .await
        .map_err(io::Error::other)
}

async fn echo(
    request: Request<Incoming>,
    identity: Identity,
    peer: SocketAddr,
) -> Result<Response<Full<Bytes>>, hyper::Error> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let headers: serde_json::Map<String, serde_json::Value> = parts
        .headers
        .iter()
        .map(|(name, value)| (name.to_string(), json!(String::from_utf8_lossy(value.as_bytes()))))
        .collect();
    let seen = json!({
        "pod": &*identity.pod,
        "port": identity.port,
        "source": peer.ip().to_canonical().to_string(),
        "method": parts.method.as_str(),
        "path": parts.uri.path_and_query().map_or("/", |path| path.as_str()),
        "version": format!("{:?}", parts.version),
        "headers": headers,
        "body": String::from_utf8_lossy(&body),
    });
    let mut response = Response::new(Full::from(format!("{seen}\n")));
    let pod = HeaderValue::from_str(&identity.pod).unwrap_or(HeaderValue::from_static("pod"));
    response.headers_mut().insert(APPLICATION_HEADER, pod);
    response
        .headers_mut()
        .insert("content-type", HeaderValue::from_static("application/json"));
    Ok(response)
}

/// Answers every method with the message it was given; health checks with SERVING.
async fn grpc(
    request: Request<Incoming>,
) -> Result<Response<UnsyncBoxBody<Bytes, Infallible>>, hyper::Error> {
    let health = request.uri().path() == "/grpc.health.v1.Health/Check";
    let body = request.into_body().collect().await?.to_bytes();
    let message = if health { Bytes::from_static(SERVING) } else { body };
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let frames = [Ok(Frame::data(message)), Ok(Frame::trailers(trailers))];
    let body = StreamBody::new(futures::stream::iter(frames)).boxed_unsync();
    let mut response = Response::new(body);
    response
        .headers_mut()
        .insert("content-type", HeaderValue::from_static("application/grpc"));
    response
        .headers_mut()
        .insert(APPLICATION_HEADER, HeaderValue::from_static("grpc"));
    Ok(response)
}
