//! Who asks: the node id and metadata of a stream's first request.
//!
//! Invariant: both streams of an agent give the same address, pod and node; only the first word of the id
//! differs.

use std::collections::BTreeMap;
use std::net::IpAddr;

use prost_types::value::Kind as ValueKind;
use prost_types::{Struct, Value};
use thyra_proto::envoy::config::core::v3::Node;

use crate::kind::StreamKind;

/// The agent, as istiod knows its clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeIdentity {
    /// The agent's (or its node's) address.
    pub address: IpAddr,
    /// The agent's pod; the namespace must be the one its token names.
    pub pod: String,
    /// Its namespace.
    pub namespace: String,
    /// The Kubernetes node.
    pub node: String,
    /// Istio's name of the cluster, `Kubernetes` unless set otherwise.
    pub cluster_id: String,
    /// DNS suffix of the cluster, `cluster.local` unless set otherwise.
    pub domain: String,
}

impl NodeIdentity {
    /// `<kind>~<ip>~<pod>.<namespace>~<namespace>.svc.<domain>`.
    #[must_use]
    pub fn id(&self, stream: StreamKind) -> String {
        let Self {
            address,
            pod,
            namespace,
            domain,
            node: _,
            cluster_id: _,
        } = self;
        format!(
            "{}~{address}~{pod}.{namespace}~{namespace}.svc.{domain}",
            stream.node_kind()
        )
    }

    /// The node message of the first request.
    #[must_use]
    pub fn node(&self, stream: StreamKind) -> Node {
        let fields = [
            ("NAME", self.pod.clone()),
            ("NAMESPACE", self.namespace.clone()),
            ("INSTANCE_IPS", self.address.to_string()),
            ("NODE_NAME", self.node.clone()),
            ("CLUSTER_ID", self.cluster_id.clone()),
        ];
        Node {
            id: self.id(stream),
            cluster: String::new(),
            metadata: Some(Struct {
                fields: fields.map(text).into_iter().collect::<BTreeMap<_, _>>(),
            }),
            locality: None,
        }
    }
}

fn text((key, value): (&str, String)) -> (String, Value) {
    (
        key.to_owned(),
        Value {
            kind: Some(ValueKind::StringValue(value)),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_has_the_form_istiod_parses() {
        let identity = NodeIdentity {
            address: "10.1.0.1".parse().unwrap(),
            pod: "thyra-abc".into(),
            namespace: "istio-system".into(),
            node: "node-a".into(),
            cluster_id: "Kubernetes".into(),
            domain: "cluster.local".into(),
        };
        assert_eq!(
            identity.id(StreamKind::Workloads),
            "ztunnel~10.1.0.1~thyra-abc.istio-system~istio-system.svc.cluster.local"
        );
        let node = identity.node(StreamKind::Config);
        assert!(node.id.starts_with("router~10.1.0.1~"));
        assert_eq!(node.metadata.unwrap().fields.len(), 5);
    }
}
