//! What tells the agents of policies and workloads: the embedded server, or a production istiod.
//!
//! Invariant: an object that is applied has a version, and that version is what the agents are asked about.

use serde_json::json;
use thyra_proto::thyra::v1 as api;

use super::cluster::{Cluster, Versions};
use super::embedded::{self, Embedded};
use super::model::Model;
use super::netns::Netns;
use super::object::Object;
use super::registry::RunDir;
use super::running::Choice;

/// Where objects go.
pub(crate) enum ControlPlane {
    Embedded(Embedded),
    Istiod(Box<Cluster>),
    /// For the network alone.
    None,
}

impl ControlPlane {
    /// Starts what `choice` asks for; listens in every node, or runs in the first.
    ///
    /// # Errors
    /// It doesn't come up.
    pub(crate) async fn start(
        choice: Choice,
        dir: &RunDir,
        nodes: &[Netns],
        model: &Model,
    ) -> anyhow::Result<Self> {
        if choice.no_agent {
            return Ok(Self::None);
        }
        if choice.istiod {
            let mut cluster = Cluster::start(dir, &nodes[0]).await?;
            cluster.create_nodes(model).await?;
            cluster.start_proxies(nodes, model)?;
            return Ok(Self::Istiod(Box::new(cluster)));
        }
        let server = Embedded::new();
        for node in nodes {
            let local = std::net::Ipv4Addr::LOCALHOST.into();
            server.serve(node.listen(local, embedded::PORT)?);
        }
        Ok(Self::Embedded(server))
    }

    /// As the report calls it.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Embedded(_) => "embedded",
            Self::Istiod(_) => "istiod",
            Self::None => "none",
        }
    }

    /// Services are kube-proxy's, not the lab's.
    pub(crate) fn has_proxies(&self) -> bool {
        matches!(self, Self::Istiod(_))
    }

    /// Flags that let a node's agent find it.
    ///
    /// # Errors
    /// It gives no credentials.
    pub(crate) async fn agent_flags(&mut self, model: &Model) -> anyhow::Result<Vec<Vec<(String, String)>>> {
        let flag = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        Ok(match self {
            Self::Embedded(_) => {
                let address = format!("http://127.0.0.1:{}", embedded::PORT);
                vec![vec![flag("policy-source", "istiod"), flag("xds-address", &address)]; model.nodes.len()]
            }
            Self::Istiod(cluster) => cluster.credentials(model).await?,
            Self::None => Vec::new(),
        })
    }

    /// The part of a change that comes before a CNI plugin is called; gives pods their uids.
    ///
    /// # Errors
    /// An object is refused.
    pub(crate) async fn schedule(
        &mut self,
        objects: &[Object],
        model: &mut Model,
    ) -> anyhow::Result<Versions> {
        match self {
            Self::Istiod(cluster) => cluster.schedule(objects, model).await,
            Self::Embedded(_) | Self::None => Ok(Versions::new()),
        }
    }

    /// The rest of a change; returns what agents must come to enforce.
    ///
    /// # Errors
    /// An object is refused.
    pub(crate) async fn apply(
        &mut self,
        objects: &[Object],
        model: &Model,
        mut versions: Versions,
    ) -> anyhow::Result<Vec<api::ObjectVersion>> {
        match self {
            Self::Embedded(server) => {
                server.apply(objects, model)?;
                for object in objects {
                    let place = (object.kind.clone(), object.key());
                    versions.insert(place, server.version(object).unwrap_or_default());
                }
            }
            Self::Istiod(cluster) => cluster.complete(objects, model, &mut versions).await?,
            Self::None => return Ok(Vec::new()),
        }
        let version = |object: &Object| versions.get(&(object.kind.clone(), object.key())).cloned();
        let wanted = objects
            .iter()
            .filter_map(|object| wanted(object, version(object)?, model));
        Ok(wanted.collect())
    }

    /// Deletes objects; returns what agents must have forgotten.
    ///
    /// # Errors
    /// A deletion is refused.
    pub(crate) async fn delete(
        &mut self,
        objects: &[Object],
        model: &Model,
    ) -> anyhow::Result<Vec<api::ObjectVersion>> {
        match self {
            Self::Embedded(server) => server.delete(objects, model)?,
            Self::Istiod(cluster) => cluster.remove(objects, model).await?,
            Self::None => return Ok(Vec::new()),
        }
        let gone = objects.iter().filter_map(|object| {
            let wanted = wanted(object, String::new(), model)?;
            if wanted.kind == "MeshConfig" {
                // Settings are never gone: the defaults come back.
                let version = match self {
                    Self::Embedded(server) => server.version(object).unwrap_or_default(),
                    Self::Istiod(_) | Self::None => String::new(),
                };
                let wanted = api::ObjectVersion { version, ..wanted };
                return Some(api::ObjectVersion {
                    content: embedded::default_mesh_content(),
                    ..wanted
                });
            }
            Some(api::ObjectVersion {
                deleted: true,
                content: String::new(),
                ..wanted
            })
        });
        Ok(gone.collect())
    }

    /// Waits until each node sends Services where the model says.
    ///
    /// # Errors
    /// kube-proxy doesn't.
    pub(crate) async fn wait_for_services(&mut self, nodes: &[Netns], model: &Model) -> anyhow::Result<()> {
        match self {
            Self::Istiod(cluster) => cluster.wait_for_proxies(nodes, model).await,
            Self::Embedded(_) | Self::None => Ok(()),
        }
    }

    /// Starts again what has ended; says what and how.
    ///
    /// # Errors
    /// It can't be started.
    pub(crate) fn revive(&mut self) -> anyhow::Result<Vec<String>> {
        match self {
            Self::Istiod(cluster) => cluster.revive(),
            Self::Embedded(_) | Self::None => Ok(Vec::new()),
        }
    }

    /// What agents refused since the last call; istiod keeps that to itself.
    pub(crate) fn take_rejections(&self) -> Vec<String> {
        match self {
            Self::Embedded(server) => server.take_rejections(),
            Self::Istiod(_) | Self::None => Vec::new(),
        }
    }
}

/// What an agent is asked about an object; none for kinds that it never hears of.
fn wanted(object: &Object, version: String, model: &Model) -> Option<api::ObjectVersion> {
    let (kind, content) = match object.kind.as_str() {
        kind @ ("AuthorizationPolicy" | "PeerAuthentication" | "RequestAuthentication") => {
            (kind, String::new())
        }
        "ConfigMap" => ("MeshConfig", embedded::mesh_content(object)),
        "Namespace" => ("Namespace", String::new()),
        "Service" => {
            let service = model.services.get(&object.key());
            let ports = service.into_iter().flat_map(|service| &service.ports);
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
            let addresses: Vec<String> = pod
                .into_iter()
                .flat_map(|pod| &pod.addresses)
                .map(ToString::to_string)
                .collect();
            let labels = pod.map(|pod| &pod.labels);
            (
                "Pod",
                json!({ "addresses": addresses, "labels": labels }).to_string(),
            )
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
