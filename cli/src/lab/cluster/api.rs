//! A small client of the API server: one HTTP/2 connection out of the node's namespace.
//!
//! Invariant: every request names its object by kind, namespace and name; objects are applied server-side, by
//! one field manager.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Bytes;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::sync::Mutex;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use super::pki::{Pki, TOKEN};
use super::shape;
use crate::lab::model::NodeAddresses;
use crate::lab::netns::Netns;
use crate::lab::server::provider;

const PORT: u16 = 6443;
const APPLY: &str = "application/apply-patch+yaml";
const MERGE: &str = "application/merge-patch+json";
const JSON: &str = "application/json";

pub(super) struct Api {
    netns: Netns,
    address: SocketAddr,
    tls: TlsConnector,
    sender: Mutex<Option<SendRequest<Full<Bytes>>>>,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    #[error("no connection to the API server")]
    Connect(#[source] std::io::Error),
    #[error("the API server broke off")]
    Broken(#[source] hyper::Error),
    #[error("the API server refuses `{what}`: {message}")]
    Refused {
        what: String,
        status: StatusCode,
        message: String,
    },
}

impl Api {
    /// # Errors
    /// TLS can't be set up.
    pub(super) fn new(netns: Netns, pki: &Pki) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from(pki.root.clone()))
            .context("the lab's own certificate is no use")?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .context("can't set up TLS")?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        let [own, _] = NodeAddresses::of(0).own;
        Ok(Self {
            netns,
            address: (own, PORT).into(),
            tls: TlsConnector::from(Arc::new(config)),
            sender: Mutex::new(None),
        })
    }

    pub(super) async fn get(&self, path: &str) -> Result<Value, ApiError> {
        self.request(Method::GET, path, JSON, Bytes::new()).await
    }

    pub(super) async fn post(&self, path: &str, body: &Value) -> Result<Value, ApiError> {
        self.request(Method::POST, path, JSON, body.to_string().into())
            .await
    }

    pub(super) async fn put(&self, path: &str, body: &Value) -> Result<Value, ApiError> {
        self.request(Method::PUT, path, JSON, body.to_string().into())
            .await
    }

    /// Creates or changes an object; returns it as stored.
    pub(super) async fn apply(&self, object: &Value) -> Result<Value, ApiError> {
        let path = format!("{}?fieldManager=thyra-lab&force=true", shape::path(object));
        self.request(Method::PATCH, &path, APPLY, object.to_string().into())
            .await
    }

    /// Applies a custom resource definition as its file has it.
    pub(super) async fn apply_crd(&self, name: &str, document: &str) -> Result<Value, ApiError> {
        let kind = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
        let path = format!("{kind}/{name}?fieldManager=thyra-lab&force=true");
        self.request(Method::PATCH, &path, APPLY, document.to_owned().into())
            .await
    }

    /// Writes an object's status.
    pub(super) async fn patch_status(&self, object: &Value, status: &Value) -> Result<Value, ApiError> {
        let path = format!("{}/status", shape::path(object));
        let body = serde_json::json!({ "status": status });
        self.request(Method::PATCH, &path, MERGE, body.to_string().into())
            .await
    }

    /// Deletes an object at once; one that isn't there is no error.
    pub(super) async fn delete(&self, object: &Value) -> Result<(), ApiError> {
        let path = format!(
            "{}?gracePeriodSeconds=0&propagationPolicy=Background",
            shape::path(object)
        );
        match self.request(Method::DELETE, &path, JSON, Bytes::new()).await {
            Err(ApiError::Refused {
                status: StatusCode::NOT_FOUND,
                ..
            })
            | Ok(_) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn request(
        &self,
        method: Method,
        path: &str,
        content_type: &str,
        body: Bytes,
    ) -> Result<Value, ApiError> {
        let what = format!("{method} {}", path.split('?').next().unwrap_or_default());
        let uri = format!("https://{}{path}", self.address);
        let request = Request::builder()
            .method(method)
            .uri(uri)
            .header("authorization", format!("Bearer {TOKEN}"))
            .header("content-type", content_type)
            .header("accept", JSON)
            .body(Full::new(body))
            .map_err(|error| ApiError::Connect(std::io::Error::other(error)))?;
        let mut sender = self.sender().await.map_err(ApiError::Connect)?;
        let answer = match sender.send_request(request).await {
            Ok(answer) => answer,
            Err(error) => {
                self.sender.lock().await.take();
                return Err(ApiError::Broken(error));
            }
        };
        let status = answer.status();
        let bytes = answer
            .into_body()
            .collect()
            .await
            .map_err(ApiError::Broken)?
            .to_bytes();
        let value = serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&bytes).into_owned()));
        if status.is_success() {
            return Ok(value);
        }
        let message = value
            .get("message")
            .and_then(Value::as_str)
            .map_or_else(|| value.to_string(), str::to_owned);
        Err(ApiError::Refused {
            what,
            status,
            message,
        })
    }

    /// The connection, made anew when the last one broke.
    async fn sender(&self) -> std::io::Result<SendRequest<Full<Bytes>>> {
        let mut held = self.sender.lock().await;
        if let Some(sender) = held.as_ref().filter(|sender| !sender.is_closed()) {
            return Ok(sender.clone());
        }
        let stream = self.netns.tcp(true)?.connect(self.address).await?;
        let stream = self
            .tls
            .connect(ServerName::IpAddress(self.address.ip().into()), stream)
            .await?;
        let handshake =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await;
        let (sender, connection) = handshake.map_err(std::io::Error::other)?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to the API server ended");
            }
        });
        *held = Some(sender.clone());
        Ok(sender)
    }
}
