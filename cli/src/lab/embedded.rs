//! The embedded control plane: a delta-ADS server that tells agents what istiod would tell of the same
//! manifests.
//!
//! Invariant: what a stream is told is always a whole snapshot's difference to what it holds; an object never
//! appears half.

mod mesh;
mod security;
mod snapshot;
mod stream;
mod workload;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use thyra_proto::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use thyra_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Request, Response, Status, Streaming};

pub(crate) use mesh::{content as mesh_content, default_content as default_mesh_content};
use snapshot::Snapshot;

use super::model::Model;
use super::object::Object;

/// istiod's plain port.
pub(crate) const PORT: u16 = 15010;
/// Longest response, as istiod's.
const MAX_MESSAGE: usize = 200 << 20;

/// Objects by kind and key, each with the version it got when it was last applied.
type Objects = BTreeMap<(String, String), Held>;

/// An object as the control plane has it.
#[derive(Clone, Debug)]
struct Held {
    object: Object,
    /// `resourceVersion`.
    version: u64,
    /// What came in one step is equally old, as in an API server that tells time in seconds.
    created: i64,
}

/// The control plane's state, as the lab changes it.
pub(crate) struct Embedded {
    objects: Objects,
    version: u64,
    step: i64,
    sender: watch::Sender<Arc<Snapshot>>,
    rejections: Rejections,
}

/// What agents refused, newest last.
type Rejections = Arc<Mutex<Vec<String>>>;

#[derive(Clone)]
struct Server {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    rejections: Rejections,
}

impl Embedded {
    pub(crate) fn new() -> Self {
        let (sender, _) = watch::channel(Arc::new(Snapshot::default()));
        // As an API server, which never starts at 1.
        Self {
            objects: BTreeMap::new(),
            version: 100,
            step: 0,
            sender,
            rejections: Rejections::default(),
        }
    }

    /// Puts objects in and publishes them in one step; `model` has them already.
    ///
    /// # Errors
    /// An object that has no form on the wire.
    pub(crate) fn apply(&mut self, objects: &[Object], model: &Model) -> anyhow::Result<()> {
        self.step += 1;
        for object in objects {
            let place = (object.kind.clone(), object.key());
            let before = self.objects.get(&place);
            if before.is_some_and(|held| held.object == *object) {
                continue;
            }
            self.version += 1;
            let created = before.map_or(self.step, |held| held.created);
            self.objects.insert(
                place,
                Held {
                    object: object.clone(),
                    version: self.version,
                    created,
                },
            );
        }
        self.publish(model)
    }

    /// Takes objects out and publishes.
    ///
    /// # Errors
    /// As `apply`.
    pub(crate) fn delete(&mut self, objects: &[Object], model: &Model) -> anyhow::Result<()> {
        for object in objects {
            self.objects.remove(&(object.kind.clone(), object.key()));
        }
        self.publish(model)
    }

    /// The version that an agent is told with an object; of mesh settings also when their ConfigMap is gone.
    pub(crate) fn version(&self, object: &Object) -> Option<String> {
        if object.kind == "ConfigMap" {
            return Some(self.sender.borrow().mesh_version());
        }
        let held = self.objects.get(&(object.kind.clone(), object.key()))?;
        Some(held.version.to_string())
    }

    /// What agents refused since the last call.
    pub(crate) fn take_rejections(&self) -> Vec<String> {
        std::mem::take(&mut *self.rejections.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn publish(&self, model: &Model) -> anyhow::Result<()> {
        self.sender
            .send_replace(Arc::new(Snapshot::build(&self.objects, model)?));
        Ok(())
    }

    /// Serves agents that connect to `listener`, until the returned task is dropped.
    pub(crate) fn serve(&self, listener: TcpListener) -> tokio::task::JoinHandle<()> {
        let server = Server {
            snapshots: self.sender.subscribe(),
            rejections: self.rejections.clone(),
        };
        let service = AggregatedDiscoveryServiceServer::new(server)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        tokio::spawn(async move {
            let router = tonic::transport::Server::builder().add_service(service);
            if let Err(error) = router.serve_with_incoming(TcpListenerStream::new(listener)).await {
                tracing::error!(%error, "embedded control plane ended");
            }
        })
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Server {
    type DeltaAggregatedResourcesStream = ReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let (sender, receiver) = mpsc::channel(16);
        let (snapshots, rejections) = (self.snapshots.clone(), self.rejections.clone());
        let requests = request.into_inner();
        tokio::spawn(async move {
            if let Err(status) = stream::run(requests, &sender, snapshots, rejections).await
                && let Err(error) = sender.send(Err(status)).await
            {
                tracing::debug!(%error, "agent went away");
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}
