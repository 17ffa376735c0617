//! Kubernetes objects as the lab handles them: a key and the JSON that an API server would be given.
//!
//! Invariant: a workload (Deployment …) has become one Pod of its template, under the workload's name.

use serde_json::{Value, json};
use thyra_policy_compiler::manifest::{Body, Manifests};

/// Kinds whose template becomes a pod.
const WORKLOADS: &[&str] = &[
    "Deployment",
    "StatefulSet",
    "DaemonSet",
    "ReplicaSet",
    "Job",
    "CronJob",
];

/// An object of a manifest.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Object {
    pub(crate) kind: String,
    /// Empty for what has no namespace.
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) json: Value,
}

/// Every object that Thyra reads, in file order.
pub(crate) fn objects(manifests: &Manifests) -> Vec<Object> {
    let wanted = manifests
        .objects
        .iter()
        .filter(|object| !matches!(object.body, Body::Pod(None)));
    wanted.map(|object| Object::from_json(&object.raw)).collect()
}

impl Object {
    pub(crate) fn from_json(raw: &Value) -> Self {
        let kind = text(raw, "/kind");
        let json = if WORKLOADS.contains(&kind.as_str()) {
            pod_of(raw)
        } else {
            raw.clone()
        };
        let kind = text(&json, "/kind");
        let cluster_wide = matches!(kind.as_str(), "Namespace" | "Node");
        let namespace = match text(&json, "/metadata/namespace") {
            _ if cluster_wide => String::new(),
            empty if empty.is_empty() => "default".to_owned(),
            namespace => namespace,
        };
        let mut json = json;
        if !cluster_wide {
            json["metadata"]["namespace"] = json!(namespace);
        }
        Self {
            kind,
            namespace,
            name: text(&json, "/metadata/name"),
            json,
        }
    }

    /// `namespace/name`, or the name alone.
    pub(crate) fn key(&self) -> String {
        if self.namespace.is_empty() {
            self.name.clone()
        } else {
            format!("{}/{}", self.namespace, self.name)
        }
    }
}

/// One pod of a workload's template, under the workload's name.
fn pod_of(raw: &Value) -> Value {
    let template = raw
        .pointer("/spec/jobTemplate/spec/template")
        .or_else(|| raw.pointer("/spec/template"))
        .cloned()
        .unwrap_or_default();
    let mut metadata = template
        .get("metadata")
        .filter(|value| value.is_object())
        .cloned()
        .unwrap_or(json!({}));
    metadata["name"] = raw.pointer("/metadata/name").cloned().unwrap_or_default();
    if let Some(namespace) = raw.pointer("/metadata/namespace") {
        metadata["namespace"] = namespace.clone();
    }
    let spec = template.get("spec").cloned().unwrap_or(json!({}));
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
}

/// The string at `pointer`, else "".
pub(crate) fn text(value: &Value, pointer: &str) -> String {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_default()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Object;

    #[test]
    fn a_deployment_becomes_a_pod_of_its_name() {
        let object = Object::from_json(&json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "front", "namespace": "shop"},
            "spec": {"template": {
                "metadata": {"labels": {"app": "front"}}, "spec": {"serviceAccountName": "front"}
            }}
        }));
        assert_eq!(
            (object.kind.as_str(), object.key().as_str()),
            ("Pod", "shop/front")
        );
        assert_eq!(object.json.pointer("/metadata/labels/app"), Some(&json!("front")));
    }

    #[test]
    fn an_object_without_namespace_is_in_default() {
        let object = Object::from_json(&json!({"kind": "Pod", "metadata": {"name": "x"}}));
        assert_eq!(object.key(), "default/x");
    }
}
