//! Manifests in a folder, read again when the folder changes.
//!
//! Invariant: a folder that can't be read whole changes nothing; status names what is wrong with it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use thyra_policy_compiler::manifest::{self, Manifests};
use thyra_policy_compiler::report::PolicyKind;
use thyra_policy_compiler::world::{NodeOptions, World};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{Feed, POLICIES, Source};
use crate::board::State;
use crate::chain::chain;
use crate::change::{Change, Namespace, Pod, Topic};

/// Status name.
pub const NAME: &str = "files";
/// How often the folder is looked at.
const PERIOD: Duration = Duration::from_secs(1);

/// What of the manifests counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scope {
    /// Workloads, services, pods.
    pub workloads: bool,
    /// Policies, MeshConfig.
    pub policies: bool,
}

/// See the module.
pub struct Files {
    folder: PathBuf,
    scope: Scope,
    node: NodeOptions,
}

impl Files {
    /// A folder of manifests.
    #[must_use]
    pub fn new(folder: PathBuf, scope: Scope, node: NodeOptions) -> Self {
        Self { folder, scope, node }
    }
}

/// Name, size and time of change of each file: what tells a changed folder.
type Fingerprint = BTreeSet<(PathBuf, u64, Option<SystemTime>)>;

/// What a folder says, or all that is wrong with it.
type Read = Result<Vec<Change>, Vec<String>>;

#[async_trait::async_trait]
impl Source for Files {
    fn name(&self) -> &'static str {
        NAME
    }

    fn topics(&self) -> Vec<Topic> {
        let mut topics = vec![Topic::Namespaces];
        if self.scope.workloads {
            topics.extend([Topic::Workloads, Topic::Pods]);
        }
        if self.scope.policies {
            topics.extend(POLICIES);
        }
        topics
    }

    async fn run(self: Box<Self>, feed: Feed, stop: CancellationToken) {
        let this = Arc::new(*self);
        let mut seen: Option<Fingerprint> = None;
        let mut timer = tokio::time::interval(PERIOD);
        loop {
            tokio::select! {
                _ = timer.tick() => {}
                () = stop.cancelled() => return feed.board.state(NAME, State::Stopped, ""),
            }
            let (reader, last) = (this.clone(), seen.clone());
            let looked = tokio::task::spawn_blocking(move || reader.look(last.as_ref())).await;
            match looked {
                Ok(Some((fingerprint, read))) => {
                    seen = Some(fingerprint);
                    this.tell(read, &feed);
                }
                Ok(None) => {}
                Err(error) => warn!(error = chain(&error), "manifests can't be read"),
            }
        }
    }
}

impl Files {
    /// The folder's content when it differs from the last time, good or bad.
    fn look(&self, last: Option<&Fingerprint>) -> Option<(Fingerprint, Read)> {
        let now = fingerprint(&self.folder);
        (last != Some(&now)).then(|| (now, self.read()))
    }

    fn read(&self) -> Read {
        let manifests = manifest::read_dir(&self.folder)
            .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>())?;
        let world =
            manifest::world(&manifests, self.node.clone()).map_err(|error| vec![error.to_string()])?;
        Ok(self.changes(&manifests, world))
    }

    fn tell(&self, read: Read, feed: &Feed) {
        match read {
            Ok(changes) => {
                info!(folder = %self.folder.display(), "manifests read");
                feed.board.only_rejected(NAME, &BTreeSet::new());
                feed.board.resources(NAME, "changes", changes.len());
                feed.board.pushed(NAME);
                for topic in self.topics() {
                    feed.board.ready(NAME, topic.name());
                }
                feed.board.recovered(NAME);
                feed.news(changes, Instant::now());
            }
            Err(errors) => {
                for error in &errors {
                    warn!(error, "manifests are not used");
                    feed.board.reject(NAME, "manifests", error);
                }
                feed.board.trouble(NAME, errors.join("; "));
            }
        }
    }

    fn changes(&self, manifests: &Manifests, world: World) -> Vec<Change> {
        let mut changes = Vec::new();
        let names = world.namespaces.keys().cloned().collect();
        for (name, labels) in world.namespaces {
            changes.push(Change::Namespace(
                name,
                Namespace {
                    version: String::new(),
                    labels,
                },
            ));
        }
        changes.push(Change::OnlyNamespaces(names));
        if self.scope.workloads {
            let known = world
                .workloads
                .keys()
                .chain(world.services.keys())
                .cloned()
                .collect();
            changes.extend(world.workloads.values().cloned().map(Change::Workload));
            changes.extend(world.services.into_values().map(Change::Service));
            changes.push(Change::OnlyAddresses(known));
            let pods: Vec<Arc<Pod>> = manifests.pods().map(|p| Arc::new(pod(p))).collect();
            let known = pods
                .iter()
                .map(|p| (p.namespace.clone(), p.name.clone()))
                .collect();
            changes.extend(pods.into_iter().map(Change::Pod));
            changes.push(Change::OnlyPods(known));
        }
        if self.scope.policies {
            let known = world.authorization.keys().cloned().collect();
            changes.extend(world.authorization.into_values().map(Change::Authorization));
            changes.push(Change::OnlyPolicies(PolicyKind::Authorization, known));
            let known = world.peer_authentication.keys().cloned().collect();
            changes.extend(world.peer_authentication.into_values().map(Change::Peer));
            changes.push(Change::OnlyPolicies(PolicyKind::PeerAuthentication, known));
            let known = world.request_authentication.keys().cloned().collect();
            changes.extend(world.request_authentication.into_values().map(Change::Request));
            changes.push(Change::OnlyPolicies(PolicyKind::RequestAuthentication, known));
            changes.push(Change::Mesh(world.mesh));
        }
        changes.extend(self.topics().into_iter().map(Change::Ready));
        changes
    }
}

fn pod(pod: &manifest::object::Pod) -> Pod {
    Pod {
        uid: String::new(),
        namespace: pod.namespace.clone(),
        name: pod.name.clone(),
        version: String::new(),
        labels: pod.labels.clone(),
        annotations: pod.annotations.clone(),
        service_account: pod.service_account.clone(),
        containers: pod.containers.iter().map(|c| c.name.clone()).collect(),
    }
}

/// A file that can't be looked at counts by its name alone; reading it will say what is wrong.
fn fingerprint(folder: &Path) -> Fingerprint {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mark = |e: std::fs::DirEntry| {
        let meta = e.metadata().ok();
        (
            e.path(),
            meta.as_ref().map_or(0, std::fs::Metadata::len),
            meta.and_then(|m| m.modified().ok()),
        )
    };
    entries.map(mark).collect()
}
