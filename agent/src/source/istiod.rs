//! istiod's streams: what a push means for what is held.
//!
//! Invariant: each resource of a push either becomes news or is refused by name; a policy that is refused
//! counts as one that can't be read, whatever was held of it before.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use thyra_policy_compiler::report::PolicyKind;
use thyra_proto::istio::workload::{Address, address};
use thyra_proto::thyra::v1 as api;
use thyra_xds_client::backoff::Pace;
use thyra_xds_client::{
    Body, ClientConfig, Kind, Named, NodeIdentity, Peer, Push, Rejected, Server, Sink, StreamKind,
    StreamState,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Feed, Source};
use crate::board::State;
use crate::change::{Change, Topic};
use crate::config::{Config, PolicySource};
use crate::convert::{self, ConvertError};

/// Status name of the workload stream.
pub const WORKLOADS: &str = "istiod/workloads";
/// Status name of the config stream.
pub const CONFIG: &str = "istiod/config";
/// DNS suffix in node ids; only istiod's own logs read it.
const DOMAIN: &str = "cluster.local";

/// A stream's client.
#[must_use]
pub fn client(config: &Config, server: &Server, stream: StreamKind) -> ClientConfig {
    let address = config.node.node_addresses.iter().next().copied();
    ClientConfig {
        stream,
        server: server.clone(),
        node: NodeIdentity {
            // istiod wants one; it plays no part in what these two kinds of node are sent.
            address: address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            pod: config.pod_name.clone(),
            namespace: config.namespace.clone(),
            node: config.node.name.clone(),
            cluster_id: config.cluster_id.clone(),
            domain: DOMAIN.into(),
        },
        lossy: stream == StreamKind::Workloads && config.policy_source == PolicySource::Authorization,
        pace: Pace::default(),
    }
}

/// The workload stream, with istiod's L4 policies where asked for.
pub struct Workloads {
    client: ClientConfig,
    root: String,
}

impl Workloads {
    /// A workload stream.
    #[must_use]
    pub fn new(client: ClientConfig, root: String) -> Self {
        Self { client, root }
    }
}

#[async_trait::async_trait]
impl Source for Workloads {
    fn name(&self) -> &'static str {
        WORKLOADS
    }

    fn topics(&self) -> Vec<Topic> {
        if self.client.lossy {
            vec![Topic::Workloads, Topic::Authorization]
        } else {
            vec![Topic::Workloads]
        }
    }

    async fn run(self: Box<Self>, feed: Feed, stop: CancellationToken) {
        let sink = StreamSink::new(WORKLOADS, feed, self.root, self.client.lossy);
        thyra_xds_client::run(self.client, sink, stop).await;
    }
}

/// Turns what a stream brings into news.
pub struct StreamSink {
    name: &'static str,
    feed: Feed,
    root: String,
    lossy: bool,
    held: BTreeMap<Kind, BTreeSet<String>>,
    states: watch::Sender<Option<StreamState>>,
}

impl StreamSink {
    /// A sink; `root` is the root namespace that mesh-wide L4 policies must be in.
    #[must_use]
    pub fn new(name: &'static str, feed: Feed, root: String, lossy: bool) -> Self {
        Self {
            name,
            feed,
            root,
            lossy,
            held: BTreeMap::new(),
            states: watch::Sender::new(None),
        }
    }

    /// The stream's states from now on.
    #[must_use]
    pub fn states(&self) -> watch::Receiver<Option<StreamState>> {
        self.states.subscribe()
    }

    fn refuse(&mut self, kind: Kind, rejected: &Rejected, changes: &mut Vec<Change>) {
        let Rejected { name, error } = rejected;
        warn!(source = self.name, kind = %kind, name, error, "resource refused");
        self.feed
            .board
            .reject(self.name, &label(kind, &rejected.name), &rejected.error);
        let why: Arc<str> = Arc::from(rejected.error.as_str());
        match (policy_kind(kind), convert::reference(&rejected.name)) {
            (Some(policy), Ok(reference)) => changes.push(Change::Unreadable(policy, reference, why)),
            // A workload whose news can't be read has no identity any more.
            (None, _) if kind == Kind::Address => {
                changes.push(Change::AddressGone(Arc::from(rejected.name.as_str())))
            }
            _ => {}
        }
    }
}

impl Sink for StreamSink {
    fn apply(&mut self, push: Push) -> Vec<Rejected> {
        let Push {
            stream: _,
            type_url,
            resources,
            removed,
            undecodable,
            initial,
            received,
        } = push;
        let Some(kind) = Kind::from_type_url(&type_url) else {
            return Vec::new();
        };
        let mut changes = Vec::with_capacity(resources.len() + removed.len() + 1);
        let mut refused = Vec::new();
        for name in removed {
            self.feed.board.accept(self.name, &label(kind, &name));
            self.held.entry(kind).or_default().remove(&name);
            changes.extend(gone(kind, &name));
        }
        for rejected in &undecodable {
            self.refuse(kind, rejected, &mut changes);
        }
        for resource in resources {
            let name = resource.name.clone();
            match change(resource, &self.root) {
                Ok(change) => {
                    self.feed.board.accept(self.name, &label(kind, &name));
                    self.held.entry(kind).or_default().insert(name);
                    changes.push(change);
                }
                Err(error) => {
                    let rejected = Rejected {
                        name,
                        error: error.to_string(),
                    };
                    self.refuse(kind, &rejected, &mut changes);
                    refused.push(rejected);
                }
            }
        }
        if initial {
            changes.push(Change::Ready(topic(kind)));
            self.feed.board.ready(self.name, topic(kind).name());
        }
        self.feed.board.pushed(self.name);
        self.feed.board.resources(
            self.name,
            topic(kind).name(),
            self.held.get(&kind).map_or(0, BTreeSet::len),
        );
        self.feed.news(changes, received);
        refused
    }

    fn state(&mut self, stream: StreamKind, state: StreamState) {
        let board = &self.feed.board;
        let lossy = if self.lossy { "L4 only, lossy" } else { "" };
        match &state {
            StreamState::Connecting { attempt: 0 } => {}
            StreamState::Connecting { attempt } => {
                info!(source = self.name, attempt, "connecting");
            }
            StreamState::Syncing { peer, ready: _ } => {
                board.state(self.name, State::Syncing, lossy);
                board.peer(peer_status(stream, peer));
            }
            StreamState::Synced { peer } => {
                info!(source = self.name, "in sync");
                board.state(self.name, State::Synced, lossy);
                board.peer(peer_status(stream, peer));
            }
            StreamState::Disconnected { error, retry } => {
                let state = if self.held.is_empty() {
                    State::Connecting
                } else {
                    State::Stale
                };
                warn!(
                    source = self.name,
                    error,
                    retry_ms = retry.as_millis(),
                    "not connected"
                );
                board.state(
                    self.name,
                    state,
                    format!("{error} (next try in {} ms)", retry.as_millis()),
                );
            }
            StreamState::Refused { error, retry } => {
                warn!(source = self.name, error, retry_s = retry.as_secs(), "refused");
                board.state(
                    self.name,
                    State::Refused,
                    format!("{error} (next try in {} s)", retry.as_secs()),
                );
            }
            StreamState::Stopped => board.state(self.name, State::Stopped, ""),
        }
        self.states.send_replace(Some(state));
    }
}

fn label(kind: Kind, name: &str) -> String {
    format!("{kind} {name}")
}

fn topic(kind: Kind) -> Topic {
    match kind {
        Kind::Address => Topic::Workloads,
        Kind::Authorization | Kind::AuthorizationPolicy => Topic::Authorization,
        Kind::PeerAuthentication => Topic::Peer,
        Kind::RequestAuthentication => Topic::Request,
        Kind::MeshConfig => Topic::Mesh,
    }
}

fn policy_kind(kind: Kind) -> Option<PolicyKind> {
    match kind {
        Kind::Authorization | Kind::AuthorizationPolicy => Some(PolicyKind::Authorization),
        Kind::PeerAuthentication => Some(PolicyKind::PeerAuthentication),
        Kind::RequestAuthentication => Some(PolicyKind::RequestAuthentication),
        Kind::Address | Kind::MeshConfig => None,
    }
}

/// A MeshConfig is replaced, never removed; a policy whose name isn't one was never held.
fn gone(kind: Kind, name: &str) -> Option<Change> {
    match policy_kind(kind) {
        Some(policy) => convert::reference(name)
            .ok()
            .map(|r| Change::PolicyGone(policy, r)),
        None if kind == Kind::Address => Some(Change::AddressGone(Arc::from(name))),
        None => None,
    }
}

fn change(resource: Named, root: &str) -> Result<Change, ConvertError> {
    let Named {
        name,
        version,
        body,
        unknown,
    } = resource;
    Ok(match body {
        Body::Address(Address { r#type: None }) => return Err(ConvertError::Missing("type")),
        Body::Address(Address {
            r#type: Some(address::Type::Workload(w)),
        }) => {
            let workload = convert::workload::workload(w)?;
            // Under another name its removal would not be understood.
            if *workload.uid != name {
                return Err(ConvertError::Name(name));
            }
            Change::Workload(Arc::new(workload))
        }
        Body::Address(Address {
            r#type: Some(address::Type::Service(s)),
        }) => {
            let service = convert::workload::service(s)?;
            if format!("{}/{}", service.namespace, service.hostname) != name {
                return Err(ConvertError::Name(name));
            }
            Change::Service(Arc::new(service))
        }
        Body::Authorization(a) => Change::Authorization(Arc::new(convert::authorization::authorization(
            a, root, version, &unknown,
        )?)),
        Body::AuthorizationPolicy { metadata, spec } => Change::Authorization(Arc::new(
            convert::policy::authorization(metadata, spec, &unknown)?,
        )),
        Body::PeerAuthentication { metadata, spec } => {
            Change::Peer(Arc::new(convert::peer::authentication(metadata, spec, &unknown)?))
        }
        Body::RequestAuthentication { metadata, spec } => {
            Change::Request(Arc::new(convert::policy::request(metadata, spec, &unknown)?))
        }
        Body::MeshConfig(mesh) => Change::Mesh(convert::mesh::mesh(mesh, version)),
    })
}

fn peer_status(stream: StreamKind, peer: &Peer) -> api::XdsPeer {
    let Peer {
        address,
        subject,
        sans,
        not_after,
    } = peer.clone();
    api::XdsPeer {
        stream: stream.to_string(),
        address: address.to_string(),
        subject,
        sans,
        not_after,
    }
}
