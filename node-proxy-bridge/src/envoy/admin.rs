//! Envoy's administration socket, as far as it is asked.

use std::path::{Path, PathBuf};

use http_body_util::Empty;
use hyper::body::Bytes;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::task::JoinSet;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Nobody listens.
    #[error("can't reach Envoy's administration at `{}`", path.display())]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It broke off.
    #[error("Envoy's administration didn't answer")]
    Http(#[from] hyper::Error),
    /// A fault of this program.
    #[error("the question is no request")]
    Request(#[from] hyper::http::Error),
}

/// Whether Envoy has its first configuration and takes connections (`/ready`).
///
/// # Errors
/// It doesn't answer.
pub async fn is_ready(socket: &Path) -> Result<bool, AdminError> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| AdminError::Connect {
            path: socket.to_owned(),
            source,
        })?;
    let (mut ask, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Ends with this function, whatever becomes of the answer.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let request = Request::get("/ready")
        .header("host", "envoy")
        .body(Empty::<Bytes>::new())?;
    Ok(ask.send_request(request).await?.status() == StatusCode::OK)
}
