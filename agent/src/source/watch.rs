//! What only the API server tells: this node's pods, the namespaces, the nodes.
//!
//! Invariant: labels decide who is selected and enrolled; addresses of pods are never taken from here.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use kube::runtime::watcher;
use kube::{Api, ResourceExt};
use tokio_util::sync::CancellationToken;

use super::follow::{Reading, client, follow};
use super::{Feed, Source};
use crate::api_server::ApiServer;
use crate::board::State;
use crate::change::{Change, Namespace, Node, Pod, Topic};

/// Status name.
pub const NAME: &str = "kubernetes/cluster";

/// See the module.
pub struct Cluster {
    server: ApiServer,
    node: String,
}

impl Cluster {
    /// The watches of a node.
    #[must_use]
    pub fn new(server: ApiServer, node: String) -> Self {
        Self { server, node }
    }
}

#[async_trait::async_trait]
impl Source for Cluster {
    fn name(&self) -> &'static str {
        NAME
    }

    fn topics(&self) -> Vec<Topic> {
        vec![Topic::Pods, Topic::Namespaces, Topic::Nodes]
    }

    async fn run(self: Box<Self>, feed: Feed, stop: CancellationToken) {
        let Some(client) = client(&self.server, NAME, &feed, &stop).await else {
            return;
        };
        feed.board.state(NAME, State::Syncing, "");
        let here = watcher::Config::default().fields(&format!("spec.nodeName={}", self.node));
        let all = watcher::Config::default();
        let (pods, namespaces, nodes) = (
            Api::all(client.clone()),
            Api::all(client.clone()),
            Api::all(client),
        );
        tokio::join!(
            follow(NAME, Pods, pods, here, feed.clone(), stop.clone()),
            follow(
                NAME,
                Namespaces,
                namespaces,
                all.clone(),
                feed.clone(),
                stop.clone()
            ),
            follow(NAME, Nodes, nodes, all, feed.clone(), stop.clone()),
        );
    }
}

struct Pods;

impl Reading for Pods {
    type Object = core::Pod;
    type Key = (String, String);

    fn topic(&self) -> Topic {
        Topic::Pods
    }

    fn key(&self, pod: &core::Pod) -> (String, String) {
        (pod.namespace().unwrap_or_default(), pod.name_any())
    }

    fn set(&self, pod: core::Pod) -> (Change, Option<String>) {
        let (namespace, name) = self.key(&pod);
        let spec = pod.spec.unwrap_or_default();
        let own = spec.containers.into_iter().map(|c| c.name);
        let init = spec
            .init_containers
            .unwrap_or_default()
            .into_iter()
            .map(|c| c.name);
        let account = spec.service_account_name.filter(|a| !a.is_empty());
        let pod = Change::Pod(Arc::new(Pod {
            namespace,
            name,
            uid: pod.metadata.uid.unwrap_or_default(),
            version: pod.metadata.resource_version.unwrap_or_default(),
            labels: pod.metadata.labels.unwrap_or_default(),
            annotations: pod.metadata.annotations.unwrap_or_default(),
            service_account: account.unwrap_or_else(|| "default".into()),
            containers: own.chain(init).collect(),
        }));
        (pod, None)
    }

    fn gone(&self, (namespace, name): (String, String)) -> Change {
        Change::PodGone(namespace, name)
    }

    fn only(&self, keys: BTreeSet<(String, String)>) -> Option<Change> {
        Some(Change::OnlyPods(keys))
    }

    fn label(&self, (namespace, name): &(String, String)) -> String {
        format!("Pod {namespace}/{name}")
    }
}

struct Namespaces;

impl Reading for Namespaces {
    type Object = core::Namespace;
    type Key = String;

    fn topic(&self) -> Topic {
        Topic::Namespaces
    }

    fn key(&self, namespace: &core::Namespace) -> String {
        namespace.name_any()
    }

    fn set(&self, namespace: core::Namespace) -> (Change, Option<String>) {
        let name = namespace.name_any();
        let version = namespace.metadata.resource_version.unwrap_or_default();
        let labels = namespace.metadata.labels.unwrap_or_default();
        (Change::Namespace(name, Namespace { version, labels }), None)
    }

    fn gone(&self, name: String) -> Change {
        Change::NamespaceGone(name)
    }

    fn only(&self, keys: BTreeSet<String>) -> Option<Change> {
        Some(Change::OnlyNamespaces(keys))
    }

    fn label(&self, name: &String) -> String {
        format!("Namespace {name}")
    }
}

struct Nodes;

impl Reading for Nodes {
    type Object = core::Node;
    type Key = String;

    fn topic(&self) -> Topic {
        Topic::Nodes
    }

    fn key(&self, node: &core::Node) -> String {
        node.name_any()
    }

    /// What can't be read of a node is named; what can be read counts.
    fn set(&self, node: core::Node) -> (Change, Option<String>) {
        let name = node.name_any();
        let mut bad = Vec::new();
        let told = node.status.unwrap_or_default().addresses.unwrap_or_default();
        let mut addresses = BTreeSet::new();
        // `Hostname` and the DNS types are names.
        for address in told.into_iter().filter(|a| a.type_.ends_with("IP")) {
            match address.address.parse::<IpAddr>() {
                Ok(ip) => drop(addresses.insert(ip.to_canonical())),
                Err(_) => bad.push(address.address),
            }
        }
        let spec = node.spec.unwrap_or_default();
        let mut ranges = Vec::new();
        let both = spec
            .pod_cidrs
            .unwrap_or_default()
            .into_iter()
            .chain(spec.pod_cidr);
        for text in both.collect::<BTreeSet<_>>() {
            match text.parse::<IpNet>() {
                Ok(range) => ranges.push(range.trunc()),
                Err(_) => bad.push(text),
            }
        }
        let change = Change::Node(name, Node { addresses, ranges });
        let fault = (!bad.is_empty()).then(|| format!("neither address nor CIDR: {}", bad.join(", ")));
        (change, fault)
    }

    fn gone(&self, name: String) -> Change {
        Change::NodeGone(name)
    }

    fn only(&self, keys: BTreeSet<String>) -> Option<Change> {
        Some(Change::OnlyNodes(keys))
    }

    fn label(&self, name: &String) -> String {
        format!("Node {name}")
    }
}
