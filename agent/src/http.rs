//! `/metrics` and `/healthz` over HTTP/1.1.
//!
//! Invariant: read only; a slow or silent client holds one connection for ten seconds at most.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::chain::chain;

/// How long a client may take to ask, and to be answered.
const PATIENCE: Duration = Duration::from_secs(10);
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Opens the socket.
///
/// # Errors
/// The address is in use or isn't this machine's.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until `stop`.
pub async fn serve(listener: TcpListener, registry: Arc<Registry>, stop: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                debug!(error = chain(&error), "metrics connection not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let registry = registry.clone();
        tokio::spawn(async move {
            let answer = service_fn(move |request| answer(request, registry.clone()));
            let mut server = hyper::server::conn::http1::Builder::new();
            server
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .keep_alive(false);
            let served =
                tokio::time::timeout(PATIENCE, server.serve_connection(TokioIo::new(stream), answer)).await;
            if let Ok(Err(error)) = served {
                debug!(error = chain(&error), "metrics connection ended early");
            }
        });
    }
}

async fn answer<B>(
    request: Request<B>,
    registry: Arc<Registry>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let reply = match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => metrics(registry).await,
        (&Method::GET, "/healthz") => text(StatusCode::OK, "text/plain", "ok\n".into()),
        _ => text(
            StatusCode::NOT_FOUND,
            "text/plain",
            "only /metrics and /healthz are here\n".into(),
        ),
    };
    Ok(reply)
}

async fn metrics(registry: Arc<Registry>) -> Response<Full<Bytes>> {
    let written = tokio::task::spawn_blocking(move || {
        let mut body = String::new();
        encode(&mut body, &registry).map(|()| body)
    });
    match written.await {
        Ok(Ok(body)) => text(StatusCode::OK, OPEN_METRICS, body),
        _ => text(
            StatusCode::INTERNAL_SERVER_ERROR,
            "text/plain",
            "metrics can't be written\n".into(),
        ),
    }
}

fn text(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut reply = Response::new(Full::new(Bytes::from(body)));
    *reply.status_mut() = status;
    reply
        .headers_mut()
        .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    reply
}
