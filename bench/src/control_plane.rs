//! A delta-ADS server as small as the measurement needs: it sends what it is told and counts the answers.
//!
//! Invariant: a push is stamped just before it is handed to the streams, so queueing counts as propagation.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use prost::Message;
use thyra_proto::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use thyra_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

type Held = Arc<Mutex<BTreeMap<String, BTreeMap<String, Resource>>>>;

/// The running server.
pub(crate) struct ControlPlane {
    held: Held,
    pushes: broadcast::Sender<(String, Vec<Resource>)>,
    /// Where it listens.
    pub(crate) address: SocketAddr,
}

impl ControlPlane {
    /// Starts the server in the caller's network namespace, on the loopback address.
    ///
    /// # Errors
    /// When no port is free.
    pub(crate) async fn start() -> Result<Self> {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .context("bind the ADS server")?;
        let address = listener.local_addr()?;
        let held = Held::default();
        let (pushes, _) = broadcast::channel(64);
        let service = Service {
            held: held.clone(),
            pushes: pushes.clone(),
        };
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(AggregatedDiscoveryServiceServer::new(service))
                .serve_with_incoming(tokio_stream::wrappers::TcpListenerStream::new(listener)),
        );
        Ok(Self {
            held,
            pushes,
            address,
        })
    }

    /// Holds resources for clients that come later and sends them to those that are there.
    pub(crate) fn push(&self, type_url: &str, resources: Vec<Resource>) -> Instant {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let of_type = held.entry(type_url.to_owned()).or_default();
        of_type.extend(resources.iter().map(|r| (r.name.clone(), r.clone())));
        let sent = Instant::now();
        // Nobody listens before the agent starts; it gets the held state when it asks.
        drop(self.pushes.send((type_url.to_owned(), resources)));
        sent
    }
}

/// A resource with its body as an `Any`.
#[must_use]
pub(crate) fn resource(name: &str, version: &str, type_url: &str, body: &impl Message) -> Resource {
    Resource {
        name: name.to_owned(),
        version: version.to_owned(),
        resource: Some(any(type_url, body)),
        ..Resource::default()
    }
}

/// A message as an `Any`.
#[must_use]
pub(crate) fn any(type_url: &str, body: &impl Message) -> prost_types::Any {
    prost_types::Any {
        type_url: type_url.to_owned(),
        value: body.encode_to_vec(),
    }
}

struct Service {
    held: Held,
    pushes: broadcast::Sender<(String, Vec<Resource>)>,
}

type Responses = Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream = Responses;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Responses>, Status> {
        let (responses, receiver) = mpsc::channel(64);
        tokio::spawn(serve(
            request.into_inner(),
            self.held.clone(),
            self.pushes.subscribe(),
            responses,
        ));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

async fn serve(
    mut requests: Streaming<DeltaDiscoveryRequest>,
    held: Held,
    mut pushes: broadcast::Receiver<(String, Vec<Resource>)>,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
) {
    let mut nonce = 0_u64;
    let mut subscribed = Vec::new();
    loop {
        let (type_url, resources) = tokio::select! {
            request = requests.next() => match request {
                Some(Ok(request)) if request.response_nonce.is_empty() => {
                    let state = held.lock().unwrap_or_else(PoisonError::into_inner);
                    let all = state.get(&request.type_url).map(|r| r.values().cloned().collect());
                    subscribed.push(request.type_url.clone());
                    (request.type_url, all.unwrap_or_default())
                }
                Some(Ok(request)) => {
                    if let Some(error) = request.error_detail {
                        eprintln!("the agent refused: {}", error.message);
                    }
                    continue;
                }
                _ => return,
            },
            push = pushes.recv() => match push {
                Ok((type_url, resources)) if subscribed.contains(&type_url) => (type_url, resources),
                Ok(_) => continue,
                Err(_) => return,
            },
        };
        nonce += 1;
        let response = DeltaDiscoveryResponse {
            type_url,
            resources,
            nonce: nonce.to_string(),
            ..DeltaDiscoveryResponse::default()
        };
        if responses.send(Ok(response)).await.is_err() {
            return;
        }
    }
}
