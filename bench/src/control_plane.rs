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
use prost_types::Timestamp;
use thyra_proto::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use thyra_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use thyra_proto::istio::mcp::v1alpha1 as mcp;
use thyra_proto::istio::security::v1beta1 as security;
use thyra_proto::istio::workload as wire;
use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use crate::mesh;

/// Type of workloads and Services.
pub(crate) const ADDRESS: &str = "type.googleapis.com/istio.workload.Address";
/// Type of policies.
pub(crate) const AUTHORIZATION: &str = "security.istio.io/v1/AuthorizationPolicy";
/// What else an agent asks for, and waits for.
pub(crate) const CONFIG_TYPES: [&str; 3] = [
    "security.istio.io/v1/PeerAuthentication",
    "security.istio.io/v1/RequestAuthentication",
    "core/v1alpha1/MeshConfig",
];

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

/// Workload `i` of the mesh, of which a Service declares these ports to be HTTP.
#[must_use]
pub(crate) fn workload(i: u32, endpoints: u16, http: &[u16]) -> Resource {
    let uid = format!("Kubernetes//Pod/{}/w-{i}", mesh::NAMESPACE);
    let port = |port: &u16| wire::Port {
        service_port: u32::from(*port),
        target_port: u32::from(*port),
        app_protocol: wire::AppProtocol::Http11.into(),
    };
    let ports = wire::PortList {
        ports: http.iter().map(port).collect(),
    };
    let service = format!("{0}/w.{0}.svc.cluster.local", mesh::NAMESPACE);
    let body = wire::Workload {
        uid: uid.clone(),
        name: format!("w-{i}"),
        namespace: mesh::NAMESPACE.into(),
        addresses: vec![mesh::address(i, endpoints).octets().to_vec()],
        service_account: format!("sa-{i}"),
        cluster_id: "Kubernetes".into(),
        services: (!http.is_empty())
            .then_some((service, ports))
            .into_iter()
            .collect(),
        ..wire::Workload::default()
    };
    let address = wire::Address {
        r#type: Some(wire::address::Type::Workload(body)),
    };
    resource(&uid, 1, ADDRESS, &address)
}

/// A policy of the mesh's namespace.
#[must_use]
pub(crate) fn policy(name: &str, version: u64, spec: &security::AuthorizationPolicy) -> Resource {
    let name = format!("{}/{name}", mesh::NAMESPACE);
    let envelope = mcp::Resource {
        metadata: Some(mcp::Metadata {
            name: name.clone(),
            version: version.to_string(),
            create_time: Some(Timestamp::default()),
            ..mcp::Metadata::default()
        }),
        body: Some(any(
            "type.googleapis.com/istio.security.v1beta1.AuthorizationPolicy",
            spec,
        )),
    };
    let type_url = "type.googleapis.com/istio.mcp.v1alpha1.Resource";
    resource(&name, version, type_url, &envelope)
}

fn resource(name: &str, version: u64, type_url: &str, body: &impl Message) -> Resource {
    Resource {
        name: name.to_owned(),
        version: version.to_string(),
        resource: Some(any(type_url, body)),
        ..Resource::default()
    }
}

fn any(type_url: &str, body: &impl Message) -> prost_types::Any {
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
