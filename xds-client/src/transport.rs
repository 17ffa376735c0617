//! A connection to the server, and a stream on it.
//!
//! Invariant: a connection is made for one stream and never made again behind its back; each begins with the
//! files as they are at that moment.

use std::future::ready;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use http::Uri;
use hyper_util::rt::TokioIo;
use thyra_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use thyra_proto::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use thyra_proto::envoy::service::discovery::v3::aggregated_discovery_service_client as ads;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::metadata::{AsciiMetadataValue, MetadataMap};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};
use tower::service_fn;

use crate::peer::Peer;
use crate::server::{Security, Server};
use crate::tls::{self, TlsError};

/// For name look-up, TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Between pings of an idle connection.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// An unanswered ping ends the connection.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Istiod sends a whole mesh in one message.
const MESSAGE_LIMIT: usize = 200 << 20;
/// HTTP/2's default of 64 KiB makes a round trip of every 64 KiB of a first push.
const WINDOW: u32 = 4 << 20;
/// Requests under way; the first ones of a stream and one answer at a time.
const OUTBOX: usize = 16;

/// Why there is no stream.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Name look-up or TCP.
    #[error("connect to `{server}`")]
    Tcp {
        /// `host:port`.
        server: String,
        /// From the system.
        source: io::Error,
    },
    /// It took too long.
    #[error("connect to `{server}`: no connection within {CONNECT_TIMEOUT:?}")]
    Timeout {
        /// `host:port`.
        server: String,
    },
    /// TLS.
    #[error("connect to `{server}`")]
    Tls {
        /// `host:port`.
        server: String,
        /// Roots, name or handshake.
        source: TlsError,
    },
    /// HTTP/2.
    #[error("speak http/2 with `{server}`")]
    Http {
        /// `host:port`.
        server: String,
        /// From the transport.
        source: tonic::transport::Error,
    },
    /// The token can't be used.
    #[error("read the token from `{path}`")]
    Token {
        /// The file.
        path: PathBuf,
        /// From the system, or that it is no token.
        source: io::Error,
    },
    /// A name that can't be a header.
    #[error("cluster id `{cluster}` can't be sent: it must be visible ascii")]
    ClusterId {
        /// As configured.
        cluster: String,
    },
    /// The server ended it.
    #[error("{}: {}", code_name(.0.code()), .0.message())]
    Status(Box<Status>),
}

/// A connection that no stream was opened on yet.
#[derive(Debug)]
pub struct Connection {
    /// Who answers.
    pub peer: Peer,
    channel: Channel,
    metadata: MetadataMap,
}

/// Both directions of a stream.
#[derive(Debug)]
pub struct Conversation {
    /// Requests to the server; dropping it ends the stream.
    pub requests: mpsc::Sender<DeltaDiscoveryRequest>,
    /// Responses.
    pub responses: Streaming<DeltaDiscoveryResponse>,
}

/// A byte stream, plain or TLS.
trait Io: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// Connects; the files are read now.
///
/// # Errors
/// If there is no connection, or the token or the cluster id can't be sent.
pub async fn connect(server: &Server, cluster_id: &str) -> Result<Connection, TransportError> {
    let metadata = metadata(server, cluster_id).await?;
    let dial = tokio::time::timeout(CONNECT_TIMEOUT, dial(server));
    let (io, peer) = dial.await.map_err(|_| TransportError::Timeout {
        server: server.authority(),
    })??;
    let channel = channel(server, io).await?;
    Ok(Connection {
        peer,
        channel,
        metadata,
    })
}

impl Connection {
    /// Opens the one stream, which begins with `first`. A server may say nothing, not even that it listens,
    /// until it has a first response.
    ///
    /// # Errors
    /// If the server refuses the stream or the connection ends.
    pub async fn open(self, first: Vec<DeltaDiscoveryRequest>) -> Result<Conversation, TransportError> {
        let (requests, outbox) = mpsc::channel(OUTBOX.max(first.len()));
        for request in first {
            // There is room for all of them, and the receiver is at hand.
            requests
                .try_send(request)
                .map_err(|_| Status::internal("the outbox is full"))?;
        }
        let mut request = Request::new(ReceiverStream::new(outbox));
        *request.metadata_mut() = self.metadata;
        let client = ads::AggregatedDiscoveryServiceClient::new(self.channel);
        let mut client = client.max_decoding_message_size(MESSAGE_LIMIT);
        let responses = client.delta_aggregated_resources(request).await?.into_inner();
        Ok(Conversation { requests, responses })
    }
}

impl From<Status> for TransportError {
    fn from(status: Status) -> Self {
        Self::Status(Box::new(status))
    }
}

async fn dial(server: &Server) -> Result<(Box<dyn Io>, Peer), TransportError> {
    let tcp = |source| TransportError::Tcp {
        server: server.authority(),
        source,
    };
    let stream = TcpStream::connect((server.host.as_str(), server.port))
        .await
        .map_err(tcp)?;
    stream.set_nodelay(true).map_err(tcp)?;
    let address = stream.peer_addr().map_err(tcp)?;
    match &server.security {
        Security::Plain => Ok((Box::new(stream), Peer::plain(address))),
        Security::Tls { name, root } => {
            let stream = tls::connect(stream, name, root)
                .await
                .map_err(|source| TransportError::Tls {
                    server: server.authority(),
                    source,
                })?;
            let leaf = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
            let peer = leaf.map_or_else(|| Peer::plain(address), |leaf| Peer::certified(address, leaf));
            Ok((Box::new(stream), peer))
        }
    }
}

async fn channel(server: &Server, io: Box<dyn Io>) -> Result<Channel, TransportError> {
    let http = |source| TransportError::Http {
        server: server.authority(),
        source,
    };
    // The connection is at hand, with or without TLS; for the transport it is plain HTTP/2, under the
    // server's own name.
    let mut endpoint = Endpoint::from_shared(format!("http://{}", server.authority())).map_err(http)?;
    if let Ok(origin) = server.origin().parse::<Uri>() {
        endpoint = endpoint.origin(origin);
    }
    let endpoint = endpoint
        .http2_keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW)
        .initial_connection_window_size(WINDOW);
    let once = Mutex::new(Some(io));
    let connector = service_fn(move |_: Uri| {
        let io = once.lock().ok().and_then(|mut io| io.take());
        ready(
            io.map(TokioIo::new)
                .ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected)),
        )
    });
    endpoint.connect_with_connector(connector).await.map_err(http)
}

async fn metadata(server: &Server, cluster_id: &str) -> Result<MetadataMap, TransportError> {
    let mut map = MetadataMap::new();
    if let Some(path) = &server.token {
        let refuse = |source| TransportError::Token {
            path: path.clone(),
            source,
        };
        let token = tokio::fs::read_to_string(path).await.map_err(refuse)?;
        let token = token.trim();
        if token.is_empty() {
            return Err(refuse(io::Error::new(
                io::ErrorKind::InvalidData,
                "the file is empty",
            )));
        }
        let value = AsciiMetadataValue::try_from(format!("Bearer {token}"));
        let mut value = value.map_err(|_| {
            refuse(io::Error::new(
                io::ErrorKind::InvalidData,
                "the file holds no single line of text",
            ))
        })?;
        value.set_sensitive(true);
        map.insert("authorization", value);
    }
    let cluster = AsciiMetadataValue::try_from(cluster_id);
    let cluster = cluster.map_err(|_| TransportError::ClusterId {
        cluster: cluster_id.to_owned(),
    })?;
    map.insert("clusterid", cluster);
    Ok(map)
}

/// The name of a gRPC code as protocols and istiod's logs write it.
fn code_name(code: tonic::Code) -> &'static str {
    use tonic::Code;
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
