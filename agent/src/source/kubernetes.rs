//! Policies and MeshConfig from the Kubernetes API: the same objects that istiod would send.
//!
//! Invariant: an object that can't be read counts as one, by name; it is never skipped.

use std::collections::BTreeSet;
use std::sync::Arc;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::DynamicObject;
use kube::core::{ApiResource, GroupVersionKind};
use kube::runtime::watcher;
use kube::{Api, ResourceExt};
use thyra_datapath_abi::tables::PolicyRef;
use thyra_policy_compiler::manifest::{self, Body, ManifestError};
use thyra_policy_compiler::report::PolicyKind;
use thyra_policy_compiler::world::Mesh;
use tokio_util::sync::CancellationToken;

use super::follow::{Reading, client, follow};
use super::{Feed, POLICIES, Source};
use crate::api_server::ApiServer;
use crate::board::State;
use crate::change::{Change, Topic};

/// Status name.
pub const NAME: &str = "kubernetes";
/// The ConfigMap that holds MeshConfig.
const MESH_MAP: &str = "istio";

/// See the module.
#[derive(Clone)]
pub struct Policies {
    server: ApiServer,
    root: String,
}

impl Policies {
    /// Policies of an API server; MeshConfig is in namespace `root`.
    #[must_use]
    pub fn new(server: ApiServer, root: String) -> Self {
        Self { server, root }
    }
}

#[async_trait::async_trait]
impl Source for Policies {
    fn name(&self) -> &'static str {
        NAME
    }

    fn topics(&self) -> Vec<Topic> {
        POLICIES.to_vec()
    }

    async fn run(self: Box<Self>, feed: Feed, stop: CancellationToken) {
        feed.board.expect(NAME, &POLICIES.map(Topic::name));
        let Some(client) = client(&self.server, NAME, &feed, &stop).await else {
            return;
        };
        feed.board.state(NAME, State::Syncing, "");
        let policies = |kind: PolicyKind| {
            let api = Api::<DynamicObject>::all_with(client.clone(), &resource(kind));
            follow(
                NAME,
                PolicyReading(kind),
                api,
                watcher::Config::default(),
                feed.clone(),
                stop.clone(),
            )
        };
        let mesh = Api::<ConfigMap>::namespaced(client.clone(), &self.root);
        let only_mesh = watcher::Config::default().fields(&format!("metadata.name={MESH_MAP}"));
        tokio::join!(
            policies(PolicyKind::Authorization),
            policies(PolicyKind::PeerAuthentication),
            policies(PolicyKind::RequestAuthentication),
            follow(NAME, MeshReading, mesh, only_mesh, feed.clone(), stop.clone()),
        );
        feed.board.state(NAME, State::Stopped, "");
    }
}

fn resource(kind: PolicyKind) -> ApiResource {
    let plural = match kind {
        PolicyKind::Authorization => "authorizationpolicies",
        PolicyKind::PeerAuthentication => "peerauthentications",
        PolicyKind::RequestAuthentication => "requestauthentications",
    };
    let kind = GroupVersionKind::gvk("security.istio.io", "v1", kind.name());
    ApiResource::from_gvk_with_plural(&kind, plural)
}

struct PolicyReading(PolicyKind);

impl PolicyReading {
    fn read(&self, object: &DynamicObject, label: &str) -> Result<Change, String> {
        // Items of a list don't carry their type.
        let mut json = serde_json::to_value(object).map_err(|e| e.to_string())?;
        json["apiVersion"] = "security.istio.io/v1".into();
        json["kind"] = self.0.name().into();
        match body(label, &json)? {
            Body::AuthorizationPolicy(p) => Ok(Change::Authorization(Arc::new(p))),
            Body::PeerAuthentication(p) => Ok(Change::Peer(Arc::new(p))),
            Body::RequestAuthentication(p) => Ok(Change::Request(Arc::new(p))),
            _ => Err("it is of another kind".into()),
        }
    }
}

impl Reading for PolicyReading {
    type Object = DynamicObject;
    type Key = PolicyRef;

    fn topic(&self) -> Topic {
        match self.0 {
            PolicyKind::Authorization => Topic::Authorization,
            PolicyKind::PeerAuthentication => Topic::Peer,
            PolicyKind::RequestAuthentication => Topic::Request,
        }
    }

    fn key(&self, object: &DynamicObject) -> PolicyRef {
        PolicyRef {
            namespace: Arc::from(object.namespace().unwrap_or_default()),
            name: Arc::from(object.name_any()),
        }
    }

    fn set(&self, object: DynamicObject) -> (Change, Option<String>) {
        let key = self.key(&object);
        match self.read(&object, &self.label(&key)) {
            Ok(change) => (change, None),
            Err(why) => (
                Change::Unreadable(self.0, key, Arc::from(why.as_str())),
                Some(why),
            ),
        }
    }

    fn gone(&self, key: PolicyRef) -> Change {
        Change::PolicyGone(self.0, key)
    }

    fn only(&self, keys: BTreeSet<PolicyRef>) -> Option<Change> {
        Some(Change::OnlyPolicies(self.0, keys))
    }

    fn label(&self, key: &PolicyRef) -> String {
        format!("{} {key}", self.0.name())
    }
}

/// The ConfigMap with MeshConfig; without one Istio's defaults hold.
struct MeshReading;

impl Reading for MeshReading {
    type Object = ConfigMap;
    type Key = ();

    fn topic(&self) -> Topic {
        Topic::Mesh
    }

    fn key(&self, _: &ConfigMap) {}

    /// MeshConfig that can't be read leaves the defaults, which know no alias and no provider: the stricter
    /// reading.
    fn set(&self, map: ConfigMap) -> (Change, Option<String>) {
        let read: Result<Change, String> =
            serde_json::to_value(&map)
                .map_err(|e| e.to_string())
                .and_then(|mut json| {
                    json["apiVersion"] = "v1".into();
                    json["kind"] = "ConfigMap".into();
                    match body("ConfigMap istio", &json)? {
                        Body::MeshConfig(mesh) => Ok(Change::Mesh(mesh)),
                        _ => Err("it holds no MeshConfig".into()),
                    }
                });
        match read {
            Ok(change) => (change, None),
            Err(why) => (Change::Mesh(Mesh::default()), Some(why)),
        }
    }

    fn gone(&self, (): ()) -> Change {
        Change::Mesh(Mesh::default())
    }

    fn only(&self, keys: BTreeSet<()>) -> Option<Change> {
        keys.is_empty().then(|| Change::Mesh(Mesh::default()))
    }

    fn label(&self, (): &()) -> String {
        "ConfigMap istio".into()
    }
}

/// The typed part of an object.
fn body(label: &str, json: &serde_json::Value) -> Result<Body, String> {
    let list = |errors: Vec<ManifestError>| {
        errors
            .iter()
            .map(|e| e.text.clone())
            .collect::<Vec<_>>()
            .join("; ")
    };
    match manifest::object_from_json(label, json).map_err(list)? {
        Some(object) => Ok(object.body),
        None => Err("it is of a kind that can't change a verdict".into()),
    }
}
