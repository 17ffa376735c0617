//! Manifests into the API server, and what the missing controllers would add.
//!
//! Invariant: the order is one that a cluster could have had: namespaces, nodes, pods as scheduled; then what
//! makes them live.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use http::StatusCode;
use serde_json::{Value, json};

use super::api::ApiError;
use super::{Cluster, shape};
use crate::lab::model::Model;
use crate::lab::object::{Object, text};

/// `resourceVersion` by kind and key.
pub(crate) type Versions = BTreeMap<(String, String), String>;

impl Cluster {
    pub(super) async fn create_namespace(&self, name: &str) -> anyhow::Result<()> {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        // Applying what a manifest has set as well would take its labels away.
        match self.api.get(&shape::path(&namespace)).await {
            Ok(_) => Ok(()),
            Err(_) => self.api.apply(&namespace).await.map(drop).context("no namespace"),
        }
    }

    /// Nodes with their addresses, before anything runs on them.
    ///
    /// # Errors
    /// The API server refuses.
    pub(crate) async fn create_nodes(&self, model: &Model) -> anyhow::Result<()> {
        for (index, name) in model.nodes.iter().enumerate() {
            let node = shape::node(index, name);
            self.api.apply(&node).await?;
            self.api
                .patch_status(&node, &shape::node_status(index, name))
                .await?;
        }
        Ok(())
    }

    /// Everything up to the moment when a CNI plugin is called: namespaces, accounts, and pods that have a
    /// node but no address.
    /// Gives each pod its real uid.
    ///
    /// # Errors
    /// The API server refuses an object.
    pub(crate) async fn schedule(&self, objects: &[Object], model: &mut Model) -> anyhow::Result<Versions> {
        let mut versions = Versions::new();
        for object in objects.iter().filter(|object| object.kind == "Namespace") {
            let stored = self.api.apply(&shape::bare(object)).await?;
            note(&mut versions, object, &stored);
        }
        let named: BTreeSet<&str> = objects.iter().map(|object| object.namespace.as_str()).collect();
        for name in named.into_iter().filter(|name| !name.is_empty()) {
            self.create_namespace(name).await?;
        }
        for object in objects.iter().filter(|object| object.kind == "ServiceAccount") {
            self.api.apply(&shape::bare(object)).await?;
        }
        for object in objects.iter().filter(|object| object.kind == "Pod") {
            let Some(pod) = model.pods.get(&object.key()) else {
                continue;
            };
            let stored = self.apply_pod(&shape::pod(object, pod, model)).await?;
            if let Some(pod) = model.pods.get_mut(&object.key()) {
                pod.uid = text(&stored, "/metadata/uid");
            }
            note(&mut versions, object, &stored);
        }
        Ok(versions)
    }

    /// A pod's containers can't be changed in place: then it is replaced.
    async fn apply_pod(&self, pod: &Value) -> Result<Value, ApiError> {
        match self.api.apply(pod).await {
            Err(ApiError::Refused {
                status: StatusCode::UNPROCESSABLE_ENTITY,
                ..
            }) => {
                self.api.delete(pod).await?;
                self.api.apply(pod).await
            }
            other => other,
        }
    }

    /// The rest: pods' addresses, Services with their EndpointSlices, mesh settings, policies.
    ///
    /// # Errors
    /// The API server refuses an object.
    pub(crate) async fn complete(
        &mut self,
        objects: &[Object],
        model: &Model,
        versions: &mut Versions,
    ) -> anyhow::Result<()> {
        for object in objects {
            let stored = match object.kind.as_str() {
                "Namespace" | "ServiceAccount" | "Node" => continue,
                "Pod" => match model.pods.get(&object.key()) {
                    Some(pod) => {
                        self.api
                            .patch_status(&object.json, &shape::pod_status(pod))
                            .await?
                    }
                    None => continue,
                },
                "Service" => match model.services.get(&object.key()) {
                    Some(service) => self.api.apply(&shape::service(object, service)).await?,
                    None => continue,
                },
                _ => self.api.apply(&shape::bare(object)).await?,
            };
            note(versions, object, &stored);
        }
        self.update_slices(model).await
    }

    /// Deletes objects; a namespace goes at once, since no controller would finish it.
    ///
    /// # Errors
    /// The API server refuses.
    pub(crate) async fn remove(&mut self, objects: &[Object], model: &Model) -> anyhow::Result<()> {
        for object in objects.iter().filter(|object| object.kind != "Node") {
            self.api.delete(&object.json).await?;
            if object.kind == "Namespace" {
                self.finish_namespace(object).await?;
            }
        }
        self.update_slices(model).await
    }

    async fn finish_namespace(&self, object: &Object) -> anyhow::Result<()> {
        let path = shape::path(&object.json);
        let Ok(mut stored) = self.api.get(&path).await else {
            return Ok(());
        };
        stored["spec"]["finalizers"] = json!([]);
        self.api.put(&format!("{path}/finalize"), &stored).await?;
        Ok(())
    }

    async fn update_slices(&mut self, model: &Model) -> anyhow::Result<()> {
        let wanted = shape::slices(model);
        for (key, slice) in &wanted {
            if self.slices.get(key) != Some(slice) {
                self.api.apply(slice).await?;
            }
        }
        for (key, slice) in &self.slices {
            if !wanted.contains_key(key) {
                self.api.delete(slice).await?;
            }
        }
        self.slices = wanted;
        Ok(())
    }
}

fn note(versions: &mut Versions, object: &Object, stored: &Value) {
    versions.insert(
        (object.kind.clone(), object.key()),
        text(stored, "/metadata/resourceVersion"),
    );
}
