//! What tells the agents of policies and workloads: the embedded server, or a production istiod.
//!
//! Invariant: an object that is applied has a version, and that version is what the agents are asked about.

use serde_json::json;
use thyra_proto::thyra::v1 as api;

use super::embedded::{self, Embedded};
use super::model::Model;
use super::netns::Netns;
use super::object::Object;

/// Where objects go.
pub(crate) enum ControlPlane {
    Embedded(Embedded),
    /// For the network alone.
    None,
}

impl ControlPlane {
    /// As the report calls it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Embedded(_) => "embedded",
            Self::None => "none",
        }
    }

    /// Listens in every node; the embedded server has no other home.
    pub(crate) fn listen(&self, nodes: &[Netns]) -> anyhow::Result<()> {
        if let Self::Embedded(server) = self {
            for node in nodes {
                let local = std::net::Ipv4Addr::LOCALHOST.into();
                server.serve(node.listen(local, embedded::PORT)?);
            }
        }
        Ok(())
    }

    /// Flags that let an agent find it.
    pub(crate) fn agent_flags(&self) -> Vec<(String, String)> {
        let flag = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        match self {
            Self::Embedded(_) => vec![
                flag("policy-source", "istiod"),
                flag("xds-address", &format!("http://127.0.0.1:{}", embedded::PORT)),
            ],
            Self::None => Vec::new(),
        }
    }

    /// Applies objects in one step; returns what agents must come to enforce.
    pub(crate) fn apply(
        &mut self,
        objects: &[Object],
        model: &Model,
    ) -> anyhow::Result<Vec<api::ObjectVersion>> {
        match self {
            Self::Embedded(server) => {
                server.apply(objects, model)?;
                let version = |object: &Object| server.version(object).unwrap_or_default();
                Ok(objects.iter().filter_map(|object| wanted(object, version(object), model)).collect())
            }
            Self::None => Ok(Vec::new()),
        }
    }

    /// Deletes objects in one step; returns what agents must have forgotten.
    pub(crate) fn delete(
        &mut self,
        objects: &[Object],
        model: &Model,
    ) -> anyhow::Result<Vec<api::ObjectVersion>> {
        match self {
            Self::Embedded(server) => server.delete(objects, model)?,
            Self::None => return Ok(Vec::new()),
        }
        let gone = objects.iter().filter_map(|object| {
            let wanted = wanted(object, String::new(), model)?;
            Some(api::ObjectVersion { deleted: true, content: String::new(), ..wanted })
        });
        Ok(gone.collect())
    }

    /// What agents refused since the last call.
    pub(crate) fn take_rejections(&self) -> Vec<String> {
        match self {
            Self::Embedded(server) => server.take_rejections(),
            Self::None => Vec::new(),
        }
    }
}

/// What an agent is asked about an object; none for kinds that it never hears of.
fn wanted(object: &Object, version: String, model: &Model) -> Option<api::ObjectVersion> {
    let (kind, content) = match object.kind.as_str() {
        kind @ ("AuthorizationPolicy" | "PeerAuthentication" | "RequestAuthentication") => (kind, String::new()),
        "ConfigMap" => ("MeshConfig", String::new()),
        "Service" => {
            let service = model.services.get(&object.key());
            let ports = service.into_iter().flat_map(|service| &service.ports).filter(|port| !port.udp);
            let ports: Vec<_> = ports
                .map(|port| match port.target {
                    super::model::TargetPort::Number(number) => json!([port.port, number]),
                    super::model::TargetPort::Name(_) => json!([port.port, 0]),
                })
                .collect();
            ("Service", json!({ "ports": ports }).to_string())
        }
        "WorkloadEntry" => {
            let address = object.json.pointer("/spec/address").cloned().unwrap_or_default();
            ("WorkloadEntry", json!({ "addresses": [address] }).to_string())
        }
        "Pod" => {
            let pod = model.pods.get(&object.key());
            let addresses: Vec<String> =
                pod.into_iter().flat_map(|pod| &pod.addresses).map(ToString::to_string).collect();
            ("Pod", json!({ "addresses": addresses }).to_string())
        }
        _ => return None,
    };
    Some(api::ObjectVersion {
        kind: kind.to_owned(),
        namespace: object.namespace.clone(),
        name: object.name.clone(),
        version,
        deleted: false,
        content,
    })
}
