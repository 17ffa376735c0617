//! TLS to the server.
//!
//! Invariant: the roots are read from their file for each connection, and nothing but them is trusted; the
//! certificate must have the wanted name.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, InvalidDnsNameError, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Why there is no TLS connection.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file of the roots.
    #[error("read root certificates from `{path}`")]
    Read {
        /// The file.
        path: PathBuf,
        /// From the system.
        source: io::Error,
    },
    /// It isn't PEM, or not a certificate.
    #[error("`{path}` holds no usable root certificate: {reason}")]
    Roots {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Not a name that a certificate can have.
    #[error("`{name}` can't be the name of a server")]
    Name {
        /// As configured.
        name: String,
        /// Why.
        source: InvalidDnsNameError,
    },
    /// The TLS library was built without what we need.
    #[error("set up tls")]
    Setup(#[source] rustls::Error),
    /// The handshake: most often the wrong root or the wrong name.
    #[error("tls handshake as `{name}`")]
    Handshake {
        /// The name that the certificate must have.
        name: String,
        /// From rustls.
        source: io::Error,
    },
}

/// Shakes hands over `stream`; HTTP/2 is the only protocol offered.
///
/// # Errors
/// If the roots can't be read or the server can't prove that it is `name`.
pub async fn connect(stream: TcpStream, name: &str, root: &Path) -> Result<TlsStream<TcpStream>, TlsError> {
    let server = ServerName::try_from(name.to_owned()).map_err(|source| TlsError::Name {
        name: name.to_owned(),
        source,
    })?;
    let roots = roots(root).await?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Setup)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let handshake = TlsConnector::from(Arc::new(config)).connect(server, stream).await;
    handshake.map_err(|source| TlsError::Handshake {
        name: name.to_owned(),
        source,
    })
}

async fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let pem = tokio::fs::read(path).await.map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })?;
    let refuse = |reason: String| TlsError::Roots {
        path: path.to_owned(),
        reason,
    };
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| refuse(error.to_string()))?;
        store
            .add(certificate)
            .map_err(|error| refuse(error.to_string()))?;
    }
    if store.is_empty() {
        return Err(refuse("no PEM block of a certificate".to_owned()));
    }
    Ok(store)
}
