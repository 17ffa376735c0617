//! Where news comes from: one trait, one task each.
//!
//! Invariant: a source that ends or fails takes nothing back; what was held stays.

pub mod auto;
pub mod files;
mod follow;
pub mod istiod;
pub mod kubernetes;
pub mod watch;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use thyra_policy_compiler::world::Mesh;
use thyra_xds_client::StreamKind;
use tokio_util::sync::CancellationToken;

use crate::board::Board;
use crate::change::{Change, Topic};
use crate::config::{Config, PolicySource, WorkloadSource};
use crate::store::{Command, Handle};

/// The policy topics, whoever tells them.
pub const POLICIES: [Topic; 4] = [Topic::Authorization, Topic::Peer, Topic::Request, Topic::Mesh];

/// Where a source puts what it hears.
#[derive(Clone)]
pub struct Feed {
    handle: Handle,
    /// How it stands.
    pub board: Arc<Board>,
}

impl Feed {
    /// A feed into the store.
    #[must_use]
    pub fn new(handle: Handle, board: Arc<Board>) -> Self {
        Self { handle, board }
    }

    /// Hands news over; `received` is when it arrived here. A stopped store needs no news.
    pub fn news(&self, changes: Vec<Change>, received: Instant) {
        if !changes.is_empty() {
            self.handle.send(Command::News(changes, received));
        }
    }
}

/// A source.
#[async_trait::async_trait]
pub trait Source: Send {
    /// As status names it.
    fn name(&self) -> &'static str;
    /// What it tells; the world isn't whole before.
    fn topics(&self) -> Vec<Topic>;
    /// Runs until `stop`.
    async fn run(self: Box<Self>, feed: Feed, stop: CancellationToken);
}

/// The sources that a configuration asks for.
#[must_use]
pub fn all(config: &Config) -> Vec<Box<dyn Source>> {
    let mut sources: Vec<Box<dyn Source>> = Vec::new();
    if let (WorkloadSource::Istiod, Some(server)) = (config.workload_source, &config.istiod) {
        let client = istiod::client(config, server, StreamKind::Workloads);
        sources.push(Box::new(istiod::Workloads::new(client, root_namespace(config))));
    }
    match (config.policy_source, &config.istiod) {
        (PolicySource::Auto, Some(server)) => {
            let client = istiod::client(config, server, StreamKind::Config);
            let fallback = config
                .api_server()
                .map(|api| kubernetes::Policies::new(api, root_namespace(config)));
            sources.push(Box::new(auto::Auto::new(client, fallback)));
        }
        (PolicySource::Istiod, Some(server)) => {
            let client = istiod::client(config, server, StreamKind::Config);
            sources.push(Box::new(auto::Auto::new(client, None)));
        }
        (PolicySource::Kubernetes, _) => {
            if let Some(api) = config.api_server() {
                sources.push(Box::new(kubernetes::Policies::new(api, root_namespace(config))));
            }
        }
        _ => {}
    }
    let files = files::Scope {
        workloads: config.workload_source == WorkloadSource::Files,
        policies: config.policy_source == PolicySource::Files,
    };
    if let (true, Some(folder)) = (files.workloads || files.policies, &config.manifests) {
        sources.push(Box::new(files::Files::new(
            folder.clone(),
            files,
            config.node.clone(),
        )));
    }
    if let Some(api) = config.api_server() {
        sources.push(Box::new(watch::Cluster::new(api, config.node.name.clone())));
    }
    sources
}

/// Everything that these sources must tell.
#[must_use]
pub fn awaited(sources: &[Box<dyn Source>]) -> BTreeSet<Topic> {
    sources.iter().flat_map(|s| s.topics()).collect()
}

fn root_namespace(config: &Config) -> String {
    config
        .root_namespace
        .clone()
        .unwrap_or_else(|| Mesh::default().root_namespace)
}
