//! One agent's stream: what it holds of each type, and what it must be told.
//!
//! Invariant: a response is exactly the difference between a snapshot and what the stream was told (or said
//! it held) before.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError};

use thyra_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};
use tokio::sync::{mpsc, watch};
use tonic::{Status, Streaming};

use super::Rejections;
use super::snapshot::{Snapshot, Type};

type Sender = mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>;

/// What the stream has of one type: versions by name.
#[derive(Default)]
struct Held {
    versions: BTreeMap<String, String>,
    /// Nonce of the response that waits for its ACK.
    nonce: Option<String>,
}

#[derive(Default)]
struct State {
    types: BTreeMap<String, Held>,
    responses: u64,
}

/// Serves until the agent goes away.
pub(super) async fn run(
    mut requests: Streaming<DeltaDiscoveryRequest>,
    sender: &Sender,
    mut snapshots: watch::Receiver<Arc<Snapshot>>,
    rejections: Rejections,
) -> Result<(), Status> {
    let mut state = State::default();
    loop {
        tokio::select! {
            request = requests.message() => {
                let Some(request) = request? else { return Ok(()) };
                let snapshot = snapshots.borrow().clone();
                if let Some(response) = state.answer(request, &snapshot, &rejections)? {
                    send(sender, response).await?;
                }
            }
            changed = snapshots.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let snapshot = snapshots.borrow_and_update().clone();
                for response in state.push(&snapshot) {
                    send(sender, response).await?;
                }
            }
        }
    }
}

async fn send(sender: &Sender, response: DeltaDiscoveryResponse) -> Result<(), Status> {
    sender
        .send(Ok(response))
        .await
        .map_err(|_| Status::cancelled("the agent went away"))
}

impl State {
    /// The first request of a type is answered at once; later ones are ACKs and NACKs.
    fn answer(
        &mut self,
        request: DeltaDiscoveryRequest,
        snapshot: &Snapshot,
        rejections: &Rejections,
    ) -> Result<Option<DeltaDiscoveryResponse>, Status> {
        let type_url = request.type_url;
        if Type::of(&type_url).is_none() {
            return Err(Status::invalid_argument(format!(
                "type `{type_url}` is not served"
            )));
        }
        if let Some(held) = self.types.get_mut(&type_url) {
            if held.nonce.as_deref() == Some(&request.response_nonce) {
                held.nonce = None;
            }
            if let Some(error) = request.error_detail {
                let text = format!("{type_url}: {}", error.message);
                rejections
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(text);
            }
            return Ok(None);
        }
        let held = Held {
            versions: request.initial_resource_versions,
            nonce: None,
        };
        self.types.insert(type_url.clone(), held);
        Ok(Some(
            self.respond(&type_url, snapshot)
                .unwrap_or_else(|| self.empty(&type_url)),
        ))
    }

    fn push(&mut self, snapshot: &Snapshot) -> Vec<DeltaDiscoveryResponse> {
        // Workloads first: a policy may name an identity that came with the same change.
        let order = [
            Type::Address,
            Type::MeshConfig,
            Type::PeerAuthentication,
            Type::RequestAuthentication,
        ];
        let order = order
            .into_iter()
            .chain([Type::AuthorizationPolicy, Type::Authorization]);
        let urls: Vec<String> = order
            .map(|kind| kind.url().to_owned())
            .filter(|url| self.types.contains_key(url))
            .collect();
        urls.iter()
            .filter_map(|url| self.respond(url, snapshot))
            .collect()
    }

    /// The difference, unless there is none. Raw kinds are resent whole whenever one of them changes, as
    /// istiod does.
    fn respond(&mut self, type_url: &str, snapshot: &Snapshot) -> Option<DeltaDiscoveryResponse> {
        let kind = Type::of(type_url)?;
        let held = self.types.get_mut(type_url)?;
        let wanted = snapshot.resources(kind);
        let removed: Vec<String> = held
            .versions
            .keys()
            .filter(|name| !wanted.contains_key(*name))
            .cloned()
            .collect();
        let changed = |(name, stored): &(&String, &super::snapshot::Stored)| {
            held.versions.get(*name) != Some(&stored.version)
        };
        if removed.is_empty() && !wanted.iter().any(|entry| changed(&entry)) {
            return None;
        }
        let resources = wanted
            .iter()
            .filter(|entry| kind.resent_whole() || changed(entry))
            .map(|(name, stored)| Resource {
                name: name.clone(),
                version: stored.version.clone(),
                resource: Some(stored.body.clone()),
                aliases: Vec::new(),
                ttl: None,
            })
            .collect();
        held.versions = wanted
            .iter()
            .map(|(name, stored)| (name.clone(), stored.version.clone()))
            .collect();
        let mut response = self.empty(type_url);
        response.resources = resources;
        response.removed_resources = removed;
        Some(response)
    }

    fn empty(&mut self, type_url: &str) -> DeltaDiscoveryResponse {
        self.responses += 1;
        let nonce = format!("lab-{}", self.responses);
        if let Some(held) = self.types.get_mut(type_url) {
            held.nonce = Some(nonce.clone());
        }
        DeltaDiscoveryResponse {
            system_version_info: String::new(),
            resources: Vec::new(),
            type_url: type_url.to_owned(),
            nonce,
            removed_resources: Vec::new(),
            control_plane: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;
    use thyra_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest;

    use super::{Rejections, State};
    use crate::lab::embedded::Held;
    use crate::lab::embedded::snapshot::{Snapshot, Type};
    use crate::lab::model::Model;
    use crate::lab::object::Object;

    fn snapshot(names: &[(&str, u64)]) -> Snapshot {
        let held = names.iter().map(|(name, version)| {
            let json = json!({
                "kind": "AuthorizationPolicy", "metadata": {"name": name, "namespace": "shop"}, "spec": {}
            });
            Held {
                object: Object::from_json(&json),
                version: *version,
                created: 0,
            }
        });
        let objects: BTreeMap<_, _> = held
            .map(|held| ((held.object.kind.clone(), held.object.key()), held))
            .collect();
        Snapshot::build(&objects, &Model::default()).expect("they have a form")
    }

    fn first(held: &[(&str, &str)]) -> DeltaDiscoveryRequest {
        DeltaDiscoveryRequest {
            type_url: Type::AuthorizationPolicy.url().to_owned(),
            initial_resource_versions: held.iter().map(|(n, v)| ((*n).into(), (*v).into())).collect(),
            ..DeltaDiscoveryRequest::default()
        }
    }

    #[test]
    fn a_deletion_during_an_outage_arrives() {
        let mut state = State::default();
        let held = [("shop/a", "1"), ("shop/b", "2")];
        let response = state
            .answer(first(&held), &snapshot(&[("b", 2)]), &Rejections::default())
            .expect("a known type")
            .expect("the first request is answered");
        assert_eq!(response.removed_resources, ["shop/a"]);
    }

    #[test]
    fn a_first_request_is_answered_even_if_nothing_is_there() {
        let mut state = State::default();
        let response = state.answer(first(&[]), &snapshot(&[]), &Rejections::default());
        assert!(
            response
                .expect("a known type")
                .expect("an answer")
                .resources
                .is_empty()
        );
    }

    #[test]
    fn an_unchanged_snapshot_is_not_pushed() {
        let mut state = State::default();
        let now = snapshot(&[("a", 1)]);
        state
            .answer(first(&[]), &now, &Rejections::default())
            .expect("a known type");
        assert!(state.push(&now).is_empty());
        let pushed = state.push(&snapshot(&[("a", 1), ("b", 2)]));
        assert_eq!(pushed.len(), 1);
        assert_eq!(pushed[0].resources.len(), 2, "raw kinds are resent whole");
    }

    #[test]
    fn a_rejection_is_kept_with_its_words() {
        let mut state = State::default();
        let rejections = Rejections::default();
        let now = snapshot(&[("a", 1)]);
        let response = state
            .answer(first(&[]), &now, &rejections)
            .expect("a known type")
            .expect("an answer");
        let nack = DeltaDiscoveryRequest {
            type_url: response.type_url,
            response_nonce: response.nonce,
            error_detail: Some(thyra_proto::google::rpc::Status {
                code: 3,
                message: "shop/a: no".into(),
                details: Vec::new(),
            }),
            ..DeltaDiscoveryRequest::default()
        };
        assert!(
            state
                .answer(nack, &now, &rejections)
                .expect("a known type")
                .is_none()
        );
        assert_eq!(rejections.lock().expect("not poisoned").len(), 1);
    }
}
