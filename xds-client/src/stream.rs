//! One stream's life: connect, ask, apply and answer, and again when it ends.
//!
//! Invariant: what was applied stays applied, whatever becomes of the connection; only a push changes it.

use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use thyra_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tracing::{debug, info, warn};

use crate::backoff::Pace;
use crate::cause::chain;
use crate::delta::{Delta, Received};
use crate::kind::StreamKind;
use crate::node::NodeIdentity;
use crate::peer::Peer;
use crate::server::Server;
use crate::sink::{Push, Sink, StreamState};
use crate::transport::{self, Conversation, TransportError};

/// A synced stream that lived this long was a good one: the next try starts without waiting. Istiod ends
/// streams every half an hour; a server that ends them at once must not be asked for its whole mesh a hundred
/// times a second.
const GOOD: Duration = Duration::from_secs(1);

/// What a stream needs to know.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Which of the two.
    pub stream: StreamKind,
    /// Whom to ask.
    pub server: Server,
    /// Who asks.
    pub node: NodeIdentity,
    /// On the workloads stream: ask for `Authorization` too, istiod's lossy L4 policies.
    pub lossy: bool,
    /// Waits between tries.
    pub pace: Pace,
}

/// How a connection ended, or why there was none.
#[derive(Debug)]
struct Ended {
    error: EndReason,
    /// Every type was answered, and the stream lived for a while.
    good: bool,
}

#[derive(Debug, thiserror::Error)]
enum EndReason {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("the server ended the stream before it answered")]
    EndedUnanswered,
    #[error("the server ended the stream")]
    Ended,
}

/// Runs a stream until `stop` is cancelled: connects, keeps `sink` up to date and reconnects, for ever.
pub async fn run(config: ClientConfig, mut sink: impl Sink, stop: CancellationToken) {
    let stream = config.stream;
    let mut delta = Delta::new(config.node.node(stream), &stream.kinds(config.lossy));
    // A different one in each process, which is all that is asked of it.
    let seed = RandomState::new().hash_one(stream);
    let mut attempt = 0;
    loop {
        sink.state(stream, StreamState::Connecting { attempt });
        let ended = tokio::select! {
            () = stop.cancelled() => break,
            ended = serve(&config, &mut delta, &mut sink) => ended,
        };
        if ended.good {
            attempt = 0;
        }
        let (state, retry) = after(&config, &ended.error, seed, attempt);
        sink.state(stream, state);
        attempt = attempt.saturating_add(1);
        tokio::select! {
            () = stop.cancelled() => break,
            () = tokio::time::sleep(retry) => {}
        }
    }
    sink.state(stream, StreamState::Stopped);
}

/// What is told about the end of a stream, and the wait that follows.
fn after(config: &ClientConfig, error: &EndReason, seed: u64, attempt: u32) -> (StreamState, Duration) {
    let stream = config.stream;
    let text = chain(error);
    if !is_refusal(error) {
        let retry = config.pace.delay(seed, attempt);
        info!(%stream, ?retry, "xds stream ended: {text}");
        return (StreamState::Disconnected { error: text, retry }, retry);
    }
    let retry = match stream {
        StreamKind::Config => config.pace.after_refusal(seed, attempt),
        StreamKind::Workloads => config.pace.delay(seed, attempt),
    };
    warn!(%stream, ?retry, "xds stream refused: {text}");
    (StreamState::Refused { error: text, retry }, retry)
}

fn is_refusal(error: &EndReason) -> bool {
    match error {
        EndReason::Transport(TransportError::Status(status)) => {
            matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied)
        }
        EndReason::Transport(_) | EndReason::EndedUnanswered | EndReason::Ended => false,
    }
}

/// One connection, from the first request to its end.
async fn serve(config: &ClientConfig, delta: &mut Delta, sink: &mut impl Sink) -> Ended {
    let since = Instant::now();
    let error = match converse(config, delta, sink).await {
        Ok(end) => end,
        Err(error) => error.into(),
    };
    Ended {
        error,
        good: delta.is_synced() && since.elapsed() >= GOOD,
    }
}

async fn converse(
    config: &ClientConfig,
    delta: &mut Delta,
    sink: &mut impl Sink,
) -> Result<EndReason, TransportError> {
    let stream = config.stream;
    let first = delta.connect();
    let connection = transport::connect(&config.server, &config.node.cluster_id).await?;
    let peer = connection.peer.clone();
    info!(%stream, server = %peer.address, "xds connection made");
    sink.state(
        stream,
        StreamState::Syncing {
            peer: peer.clone(),
            ready: delta.ready(),
        },
    );
    let Conversation {
        requests,
        mut responses,
    } = connection.open(first).await?;
    let mut answered = false;
    while let Some(response) = responses.message().await? {
        let request = handle(stream, delta, sink, &peer, response);
        answered = true;
        // Where that direction is gone, the next read says why.
        if requests.send(request).await.is_err() {
            debug!(%stream, "an answer had nowhere to go");
        }
    }
    Ok(if answered {
        EndReason::Ended
    } else {
        EndReason::EndedUnanswered
    })
}

/// Applies a response and gives its answer.
fn handle(
    stream: StreamKind,
    delta: &mut Delta,
    sink: &mut impl Sink,
    peer: &Peer,
    response: DeltaDiscoveryResponse,
) -> DeltaDiscoveryRequest {
    let received = Instant::now();
    let mut batch = match delta.receive(response) {
        Received::Batch(batch) => batch,
        Received::Unasked(request) => {
            warn!(%stream, kind = request.type_url, "refused a resource type that was not asked for");
            return request;
        }
    };
    let (kind, initial) = (batch.kind, batch.initial);
    let mut refused = Vec::new();
    if initial || !batch.is_empty() {
        let push = Push {
            stream,
            type_url: kind.type_url().to_owned(),
            resources: std::mem::take(&mut batch.resources),
            removed: batch.removed.clone(),
            undecodable: batch.undecodable.clone(),
            initial,
            received,
        };
        let fresh = push.resources.len();
        debug!(%stream, %kind, fresh, removed = push.removed.len(), initial, "xds push");
        refused = sink.apply(push);
    }
    let request = delta.answer(batch, refused);
    if let Some(detail) = &request.error_detail {
        warn!(%stream, %kind, "refused xds resources: {}", detail.message);
    }
    if initial {
        let peer = peer.clone();
        sink.state(
            stream,
            match delta.is_synced() {
                true => StreamState::Synced { peer },
                false => StreamState::Syncing {
                    peer,
                    ready: delta.ready(),
                },
            },
        );
    }
    request
}
