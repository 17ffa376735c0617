//! The socket, and a task for each stream of Envoy's.
//!
//! Invariant: one stream at a time has a say; a newer one takes its place, since there is one Envoy. While the catalog
//! is held back nothing is sent, so that an Envoy never sees half a change, nor loses what the catalog doesn't have
//! yet.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use envoy_types::pb::envoy::service::accesslog::v3::access_log_service_server::AccessLogServiceServer;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use futures::Stream;
use tokio::net::UnixListener;
use tokio::net::unix::UCred;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::server::UdsConnectInfo;
use tonic::{Request, Response, Status, Streaming};
use tracing::{debug, info, warn};

use super::catalog::Catalog;
use super::conversation::Conversation;
use crate::envoy::Given;
use crate::keep;
use crate::otlp::{self, Requests};
use crate::records::Records;

/// Responses that wait to be written; a stream that doesn't read them is waited for.
const QUEUE: usize = 64;
/// Only the owner connects: the user that Envoy runs as, and root.
const SOCKET_MODE: u32 = 0o600;

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum AdsError {
    /// The socket can't be made.
    #[error("can't listen on `{}`", path.display())]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// The catalog, and who waits for changes of it.
#[derive(Debug)]
struct Shared {
    catalog: Mutex<Catalog>,
    /// Counts changes of what is wanted, and of what Envoy said.
    changes: watch::Sender<u64>,
    streams: Mutex<Streams>,
    held: AtomicBool,
    stop: CancellationToken,
    /// Says who is Envoy; none where only an Envoy of this process's own can ask.
    given: Option<Arc<Given>>,
}

#[derive(Debug, Default)]
struct Streams {
    /// Counts them: the last one has the say.
    last: u64,
    /// The one before ended with resources unanswered: something may have ended Envoy.
    careful: bool,
}

/// A running xDS server; dropping it ends it.
#[derive(Debug)]
pub struct AdsServer {
    shared: Arc<Shared>,
    records: Records,
    path: PathBuf,
    task: JoinHandle<()>,
}

impl AdsServer {
    /// Listens on a socket, which belongs to `owner` (uid and gid) if there is one.
    ///
    /// # Errors
    /// The socket can't be made or given to its owner.
    pub fn start(path: &Path, owner: Option<(u32, u32)>) -> Result<Self, AdsError> {
        Self::over(path, owner, None)
    }

    /// The same for an Envoy that somebody else runs: who isn't it gets nothing and has no say.
    ///
    /// # Errors
    /// The socket can't be made or given to Envoy's user.
    pub fn start_for(given: Arc<Given>) -> Result<Self, AdsError> {
        let (path, user) = (given.config().socket.clone(), given.config().user);
        Self::over(&path, Some((user, user)), Some(given))
    }

    fn over(path: &Path, owner: Option<(u32, u32)>, given: Option<Arc<Given>>) -> Result<Self, AdsError> {
        let listener = listen(path, owner).map_err(|source| AdsError::Listen {
            path: path.to_owned(),
            source,
        })?;
        let shared = Arc::new(Shared {
            catalog: Mutex::default(),
            changes: watch::Sender::new(0),
            streams: Mutex::default(),
            held: AtomicBool::new(false),
            stop: CancellationToken::new(),
            given: given.clone(),
        });
        let service = AggregatedDiscoveryServiceServer::new(Service(Arc::clone(&shared)));
        let records = Records::default();
        let only_envoy = move |request: Request<()>| match &given {
            Some(given) if !given.is_at_work(peer(&request)) => {
                Err(Status::permission_denied("this process is not the Envoy at work"))
            }
            _ => Ok(request),
        };
        let requests = InterceptedService::new(Requests::new(records.clone()), only_envoy.clone());
        let logs = AccessLogServiceServer::new(records.clone()).max_decoding_message_size(otlp::MAX_BATCH);
        let logs = InterceptedService::new(logs, only_envoy);
        let stop = shared.stop.clone();
        let task = tokio::spawn(async move {
            let served = tonic::transport::Server::builder()
                .add_service(service)
                .add_service(logs)
                .add_service(requests)
                .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled_owned());
            if let Err(error) = served.await {
                warn!(%error, "the xds server ended");
            }
        });
        Ok(Self {
            shared,
            records,
            path: path.to_owned(),
            task,
        })
    }

    /// Reads or changes the catalog; what differs then goes out.
    pub fn with<T>(&self, change: impl FnOnce(&mut Catalog) -> T) -> T {
        let answer = change(&mut self.shared.catalog());
        self.shared.changed();
        answer
    }

    /// Reads the catalog.
    pub fn read<T>(&self, read: impl FnOnce(&Catalog) -> T) -> T {
        read(&self.shared.catalog())
    }

    /// Sends nothing until `release`; Envoy is heard all the same.
    pub fn hold(&self) {
        // Who sends has the catalog: a change that begins now is not seen in part.
        let _catalog = self.shared.catalog();
        self.shared.held.store(true, Ordering::Release);
    }

    /// Whether nothing is sent.
    #[cfg(test)]
    pub(crate) fn is_held(&self) -> bool {
        self.shared.held.load(Ordering::Acquire)
    }

    /// What differs goes out.
    pub fn release(&self) {
        self.shared.held.store(false, Ordering::Release);
        self.shared.changed();
    }

    /// What Envoy says of each request.
    #[must_use]
    pub fn records(&self) -> &Records {
        &self.records
    }

    /// A counter of changes, Envoy's answers included.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }

    /// Waits until something is so that changes with what Envoy says, or the time is out; whether it is.
    pub async fn until(&self, limit: Duration, is_so: impl Fn() -> bool) -> bool {
        let mut changes = self.changes();
        let done = async {
            // They go on as long as this server is there.
            while !is_so() && changes.changed().await.is_ok() {}
        };
        tokio::time::timeout(limit, done).await.is_ok()
    }
}

impl Drop for AdsServer {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        self.task.abort();
        // Gone already is as good.
        let _gone = std::fs::remove_file(&self.path);
    }
}

fn listen(path: &Path, owner: Option<(u32, u32)>) -> std::io::Result<UnixListener> {
    keep::remove(path)?;
    let listener = UnixListener::bind(path)?;
    keep::give(path, SOCKET_MODE, owner)?;
    Ok(listener)
}

impl Shared {
    /// A panic while it was held can't leave half a change: every change is one call.
    fn catalog(&self) -> MutexGuard<'_, Catalog> {
        self.catalog.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn streams(&self) -> MutexGuard<'_, Streams> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream that had the say ended, and mostly its Envoy with it.
    fn ended(&self, talk: &Conversation, careful: bool) {
        let left = talk.unanswered();
        self.streams().careful = !left.is_empty() && !self.stop.is_cancelled();
        let mut catalog = self.catalog();
        if careful {
            for (name, version) in &left {
                warn!(name = &*name.1, "envoy ended while it took this");
                catalog.ended_while_taking(name, version);
            }
        }
        catalog.forgotten();
        drop(catalog);
        self.changed();
    }

    /// What a stream is to be sent now.
    fn news(&self, talk: &mut Conversation) -> Vec<DeltaDiscoveryResponse> {
        let mut catalog = self.catalog();
        if self.held.load(Ordering::Acquire) {
            return Vec::new();
        }
        let confirmed = talk.confirm(&mut catalog);
        let news = talk.news(&catalog);
        drop(catalog);
        if confirmed {
            self.changed();
        }
        news
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }
}

struct Service(Arc<Shared>);

type Responses<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type StreamAggregatedResourcesStream = Responses<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = Responses<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        _: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented(
            "ask with delta xds; the bootstrap says `DELTA_GRPC`",
        ))
    }

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (send, receive) = mpsc::channel(QUEUE);
        let (shared, peer) = (Arc::clone(&self.0), peer(&request));
        tokio::spawn(async move {
            let mut requests = request.into_inner();
            match first(&shared, peer, &mut requests).await {
                Ok(first) => converse(shared, first, requests, send).await,
                // Who has gone doesn't need to know.
                Err(status) => drop(send.send(Err(status)).await),
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receive))))
    }
}

/// Whoever is at the other end.
fn peer<T>(request: &Request<T>) -> Option<UCred> {
    request.extensions().get::<UdsConnectInfo>()?.peer_cred
}

/// What a process says first, if it has to be judged by that.
async fn first(
    shared: &Shared,
    peer: Option<UCred>,
    requests: &mut Streaming<DeltaDiscoveryRequest>,
) -> Result<Option<DeltaDiscoveryRequest>, Status> {
    let Some(given) = shared.given.clone() else {
        return Ok(None);
    };
    let first = requests.message().await?;
    let first = first.ok_or_else(|| Status::invalid_argument("it asks for nothing"))?;
    // Control groups are looked through, and what is being committed is waited for.
    let judged = tokio::task::spawn_blocking(move || given.admit(peer, &first).map(|()| first)).await;
    match judged {
        Ok(Ok(first)) => Ok(Some(first)),
        Ok(Err(why)) => Err(Status::permission_denied(why.to_string())),
        Err(error) => Err(Status::internal(error.to_string())),
    }
}

async fn converse(
    shared: Arc<Shared>,
    mut first: Option<DeltaDiscoveryRequest>,
    mut requests: Streaming<DeltaDiscoveryRequest>,
    send: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
) {
    let (number, careful) = {
        let mut streams = shared.streams();
        streams.last += 1;
        (streams.last, streams.careful)
    };
    let is_last = || shared.streams().last == number;
    // What an Envoy before this one took says nothing.
    shared.catalog().forgotten();
    shared.changed();
    info!(stream = number, careful, "envoy asks for its configuration");
    let mut changes = shared.changes.subscribe();
    let mut talk = Conversation::new(careful);
    loop {
        let responses = tokio::select! {
            () = shared.stop.cancelled() => break,
            request = next(&mut first, &mut requests) => match request {
                Ok(Some(request)) if is_last() => {
                    log(&request);
                    if let Some(Err(why)) = shared.given.as_ref().map(|given| given.hear(&request)) {
                        warn!(%why, "envoy is not listened to");
                        break;
                    }
                    talk.hear(&request, &mut shared.catalog());
                    shared.changed();
                    shared.news(&mut talk)
                }
                Ok(_) => break,
                Err(status) => {
                    debug!(stream = number, %status, "envoy's stream broke");
                    break;
                }
            },
            changed = changes.changed() => match changed {
                Ok(()) if is_last() => shared.news(&mut talk),
                _ => break,
            },
        };
        for response in responses {
            if send.send(Ok(response)).await.is_err() {
                break;
            }
        }
    }
    if is_last() {
        shared.ended(&talk, careful);
    }
    info!(stream = number, "envoy's stream ended");
}

/// The request that was read already, then those that come.
async fn next(
    first: &mut Option<DeltaDiscoveryRequest>,
    requests: &mut Streaming<DeltaDiscoveryRequest>,
) -> Result<Option<DeltaDiscoveryRequest>, Status> {
    match first.take() {
        Some(first) => Ok(Some(first)),
        None => requests.message().await,
    }
}

fn log(request: &DeltaDiscoveryRequest) {
    match &request.error_detail {
        Some(error) => warn!(
            kind = request.type_url,
            error = error.message,
            "envoy refused a configuration"
        ),
        None => debug!(
            kind = request.type_url,
            nonce = request.response_nonce,
            "envoy asked or agreed"
        ),
    }
}
