//! A server in this process, in the test's hands: it hands over each stream as it is opened.

use std::net::SocketAddr;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use thyra_proto::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use thyra_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::{TcpListenerStream, UnboundedReceiverStream};
use tonic::metadata::MetadataMap;
use tonic::transport::{Identity, Server, ServerTlsConfig};
use tonic::{Request, Response, Status, Streaming};

/// Nothing here takes longer, unless something is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A certificate authority and one server certificate under it.
pub(crate) struct Authority {
    /// PEM of the root.
    pub(crate) root: String,
    identity: Identity,
}

/// A stream that a client opened.
pub(crate) struct Session {
    pub(crate) metadata: MetadataMap,
    requests: Streaming<DeltaDiscoveryRequest>,
    responses: mpsc::UnboundedSender<Result<DeltaDiscoveryResponse, Status>>,
}

/// The server; its streams come out of `sessions`.
pub(crate) struct Istiod {
    pub(crate) address: SocketAddr,
    sessions: mpsc::UnboundedReceiver<Session>,
    task: tokio::task::JoinHandle<()>,
}

struct Service(mpsc::UnboundedSender<Session>);

impl Authority {
    /// A root, and a server certificate for `name` with a SPIFFE id beside it.
    pub(crate) fn new(name: &str) -> Self {
        let mut root = CertificateParams::new(Vec::new()).unwrap();
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        root.distinguished_name
            .push(DnType::OrganizationName, "test root");
        let root_key = KeyPair::generate().unwrap();
        let root_certificate = root.self_signed(&root_key).unwrap();
        let issuer = Issuer::new(root, root_key);
        let mut leaf = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let spiffe = "spiffe://cluster.local/ns/istio-system/sa/istiod";
        leaf.subject_alt_names
            .push(SanType::URI(spiffe.try_into().unwrap()));
        let leaf_key = KeyPair::generate().unwrap();
        let certificate = leaf.signed_by(&leaf_key, &issuer).unwrap();
        Self {
            root: root_certificate.pem(),
            identity: Identity::from_pem(certificate.pem(), leaf_key.serialize_pem()),
        }
    }
}

impl Istiod {
    /// Serves on a loopback port of its own, with TLS if there is an authority.
    pub(crate) async fn start(authority: Option<&Authority>) -> Self {
        Self::listen(TcpListener::bind("127.0.0.1:0").await.unwrap(), authority)
    }

    fn listen(listener: TcpListener, authority: Option<&Authority>) -> Self {
        let address = listener.local_addr().unwrap();
        let (sender, sessions) = mpsc::unbounded_channel();
        let mut server = Server::builder();
        if let Some(authority) = authority {
            server = server
                .tls_config(ServerTlsConfig::new().identity(authority.identity.clone()))
                .unwrap();
        }
        let router = server.add_service(AggregatedDiscoveryServiceServer::new(Service(sender)));
        let serve = router.serve_with_incoming(TcpListenerStream::new(listener));
        let task = tokio::spawn(async move { serve.await.unwrap() });
        Self {
            address,
            sessions,
            task,
        }
    }

    /// Goes away; nobody listens any more.
    pub(crate) async fn stop(mut self) -> SocketAddr {
        self.task.abort();
        let _ = (&mut self.task).await;
        self.address
    }

    /// Comes back where it was, plain.
    pub(crate) async fn restart(address: SocketAddr) -> Self {
        Self::listen(TcpListener::bind(address).await.unwrap(), None)
    }

    /// The next stream that a client opens.
    pub(crate) async fn session(&mut self) -> Session {
        timeout(PATIENCE, self.sessions.recv())
            .await
            .expect("no stream was opened")
            .unwrap()
    }
}

impl Drop for Istiod {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Session {
    /// The client's next request; none: it ended the stream.
    pub(crate) async fn request(&mut self) -> Option<DeltaDiscoveryRequest> {
        timeout(PATIENCE, self.requests.message())
            .await
            .expect("no request came")
            .ok()
            .flatten()
    }

    /// Sends a response.
    pub(crate) fn send(&self, response: DeltaDiscoveryResponse) {
        self.responses.send(Ok(response)).unwrap();
    }

    /// Ends the stream with a status.
    pub(crate) fn fail(self, status: Status) {
        self.responses.send(Err(status)).unwrap();
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Service {
    type DeltaAggregatedResourcesStream = UnboundedReceiverStream<Result<DeltaDiscoveryResponse, Status>>;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        let metadata = request.metadata().clone();
        let (responses, outgoing) = mpsc::unbounded_channel();
        let _ = self.0.send(Session {
            metadata,
            requests: request.into_inner(),
            responses,
        });
        Ok(Response::new(UnboundedReceiverStream::new(outgoing)))
    }
}
