//! Fetching a small text over HTTP or HTTPS.
//!
//! Invariant: a tenant writes the URI and the agent is in the node's own network, so addresses that only the node
//! reaches are not dialled, whatever a name resolves to; no redirect is followed; nothing of an answer is told but its
//! status.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::vec;

use futures::TryFutureExt as _;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::Uri;
use hyper::body::Bytes;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use hyper_util::rt::TokioExecutor;
use rustls::{ClientConfig, RootCertStore};
use tower::Service;
use tracing::warn;

use crate::reach::Reach;

/// Most bytes of an answer.
const MAX_BODY: usize = 256 * 1024;
/// Why there is no text.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Not a URI, or not one of HTTP.
    #[error("it is no http or https URI without a user")]
    Uri,
    /// An address that is not dialled.
    #[error("`{0}` is an address of this node or its cloud, which is not dialled")]
    Address(IpAddr),
    /// No answer.
    #[error("the server can't be asked")]
    Ask(#[source] legacy::Error),
    /// Another answer than 2xx.
    #[error("the server answers with status {0}")]
    Status(u16),
    /// It ended too soon or never.
    #[error("the answer can't be read, or is larger than {MAX_BODY} bytes")]
    Body,
}

/// Asks.
#[derive(Clone, Debug)]
pub struct Client {
    client: legacy::Client<HttpsConnector<HttpConnector<Resolver>>, Empty<Bytes>>,
    reach: Reach,
}

impl Client {
    /// A client that trusts the system's certificate authorities; where there are none no HTTPS server is trusted.
    #[must_use]
    pub fn new(reach: Reach) -> Self {
        let mut tcp = HttpConnector::new_with_resolver(Resolver {
            names: GaiResolver::new(),
            reach,
        });
        tcp.enforce_http(false);
        let tls = HttpsConnectorBuilder::new()
            .with_native_roots()
            .unwrap_or_else(|error| {
                warn!(%error, "no key set can be fetched over https");
                let trusting_nobody = ClientConfig::builder().with_root_certificates(RootCertStore::empty());
                HttpsConnectorBuilder::new().with_tls_config(trusting_nobody.with_no_client_auth())
            });
        let connector = tls.https_or_http().enable_http1().wrap_connector(tcp);
        let client = legacy::Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(0)
            .build(connector);
        Self { client, reach }
    }

    /// The text at `uri`.
    ///
    /// # Errors
    /// It can't be had.
    pub async fn get(&self, uri: &str) -> Result<String, FetchError> {
        let uri: Uri = uri.parse().map_err(|_| FetchError::Uri)?;
        let host = uri.host().ok_or(FetchError::Uri)?;
        let is_http = matches!(uri.scheme_str(), Some("http" | "https"));
        if !is_http || uri.authority().is_some_and(|a| a.as_str().contains('@')) {
            return Err(FetchError::Uri);
        }
        // The connector resolves names alone.
        let literal = host.trim_start_matches('[').trim_end_matches(']').parse().ok();
        if let Some(address) = literal.filter(|address| !self.reach.holds(*address)) {
            return Err(FetchError::Address(address));
        }
        let answer = self.client.get(uri).await.map_err(FetchError::Ask)?;
        if !answer.status().is_success() {
            return Err(FetchError::Status(answer.status().as_u16()));
        }
        let body = Limited::new(answer.into_body(), MAX_BODY).collect().await;
        let body = body.map_err(|_| FetchError::Body)?.to_bytes();
        String::from_utf8(body.into()).map_err(|_| FetchError::Body)
    }
}

/// Names to addresses that may be dialled.
#[derive(Clone, Debug)]
struct Resolver {
    names: GaiResolver,
    reach: Reach,
}

impl Service<Name> for Resolver {
    type Response = vec::IntoIter<SocketAddr>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, io::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), io::Error>> {
        Service::poll_ready(&mut self.names, context)
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let reach = self.reach;
        let resolved = Service::call(&mut self.names, name).and_then(async move |addresses| {
            let (fine, refused): (Vec<SocketAddr>, Vec<SocketAddr>) =
                addresses.partition(|address| reach.holds(address.ip()));
            match refused.first().filter(|_| fine.is_empty()) {
                Some(address) => Err(io::Error::other(FetchError::Address(address.ip()))),
                None => Ok(fine.into_iter()),
            }
        });
        Box::pin(resolved)
    }
}
