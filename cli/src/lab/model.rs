//! What the lab has to build: pods with their addresses, Services with their backends, labels of namespaces.
//!
//! Invariant: an address belongs to one pod or one Service of a lab; the rule that hands them out depends on
//! nothing but the
//! order of the manifests.

mod address;
mod service;

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::Value;

pub(crate) use address::{Addresses, NodeAddresses, OUTSIDE4, OUTSIDE6};
pub(crate) use service::{Backend, Service, ServicePort, TargetPort};

use super::object::{Object, text};

/// Most nodes of a lab.
pub(crate) const MAX_NODES: usize = 16;

/// A pod as its manifest has it, with the addresses it gets.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pod {
    pub(crate) namespace: String,
    pub(crate) name: String,
    /// Made up by the lab, or the API server's.
    pub(crate) uid: String,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) service_account: String,
    /// Which node of the lab, from 0.
    pub(crate) node: usize,
    pub(crate) host_network: bool,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) containers: Vec<String>,
    pub(crate) ports: Vec<ContainerPort>,
}

/// A declared port; its name decides the server behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ContainerPort {
    pub(crate) name: String,
    pub(crate) number: u16,
    pub(crate) udp: bool,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    /// By `namespace/name`.
    pub(crate) pods: BTreeMap<String, Pod>,
    /// By `namespace/name`.
    pub(crate) services: BTreeMap<String, Service>,
    /// Labels by namespace.
    pub(crate) namespaces: BTreeMap<String, BTreeMap<String, String>>,
    /// Node names, by index.
    pub(crate) nodes: Vec<String>,
    addresses: Addresses,
}

/// Why an object can't be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModelError {
    #[error("pod `{pod}` asks for `{address}`, which is no address; mend `status.podIPs`")]
    Address { pod: String, address: String },
    #[error("`{what}` asks for `{address}`, which `{owner}` has; give it another one")]
    Taken {
        what: String,
        address: IpAddr,
        owner: String,
    },
    #[error(
        "pod `{pod}` is on node `{node}`, but the lab has only `{known}`; raise `nodes` in scenario.yaml"
    )]
    Node {
        pod: String,
        node: String,
        known: String,
    },
    #[error("the manifests name {0} nodes; a lab has at most {MAX_NODES}")]
    Nodes(usize),
    #[error("`{what}` finds no free address in `{range}`")]
    Full { what: String, range: String },
}

impl Model {
    /// An empty model with at least this many nodes; their names come from the Node objects, in order, then
    /// from the pods that name one.
    ///
    /// # Errors
    /// More nodes than a lab can have.
    pub(crate) fn new(least: usize, objects: &[Object]) -> Result<Self, ModelError> {
        let mut names: Vec<String> = Vec::new();
        let declared = objects
            .iter()
            .filter(|object| object.kind == "Node")
            .map(|node| node.name.clone());
        let pods = objects.iter().filter(|object| object.kind == "Pod");
        let named = pods
            .map(|pod| text(&pod.json, "/spec/nodeName"))
            .filter(|name| !name.is_empty());
        for name in declared.chain(named) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let mut spare = (0..).map(|index| format!("node-{index}"));
        while names.len() < least.max(1) {
            names.extend(spare.by_ref().find(|name| !names.contains(name)));
        }
        if names.len() > MAX_NODES {
            return Err(ModelError::Nodes(names.len()));
        }
        Ok(Self {
            nodes: names,
            ..Self::default()
        })
    }

    /// Takes in every object that it knows; what others ask for by themselves is placed before what may lie
    /// anywhere.
    pub(crate) fn add(&mut self, objects: &[Object]) -> Result<(), ModelError> {
        for object in objects.iter().filter(|object| object.kind == "Namespace") {
            self.namespaces
                .insert(object.name.clone(), labels(&object.json, "/metadata/labels"));
        }
        let (fixed, free): (Vec<_>, Vec<_>) = objects
            .iter()
            .partition(|object| address::asked_for(object).next().is_some());
        for object in fixed.into_iter().chain(free) {
            match object.kind.as_str() {
                "Pod" => self.add_pod(object)?,
                "Service" => self.add_service(object)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Forgets an object; its addresses are free again.
    pub(crate) fn remove(&mut self, object: &Object) {
        let key = object.key();
        match object.kind.as_str() {
            "Pod" => {
                self.pods.remove(&key);
                self.addresses.release(&format!("pod {key}"));
            }
            "Service" => {
                self.services.remove(&key);
                self.addresses.release(&format!("service {key}"));
            }
            "Namespace" => {
                self.namespaces.remove(&object.name);
            }
            _ => {}
        }
    }

    fn add_pod(&mut self, object: &Object) -> Result<(), ModelError> {
        let key = object.key();
        let node = self.node_of(object)?;
        let host_network = object.json.pointer("/spec/hostNetwork") == Some(&Value::Bool(true));
        let before = self
            .pods
            .get(&key)
            .filter(|pod| pod.node == node && pod.host_network == host_network);
        let addresses = match before {
            Some(pod) => pod.addresses.clone(),
            None if host_network => NodeAddresses::of(node).own.to_vec(),
            None => self.addresses.pod(&format!("pod {key}"), node, object)?,
        };
        let pod = Pod {
            uid: match text(&object.json, "/metadata/uid") {
                empty if empty.is_empty() => format!("lab-{}-{}", object.namespace, object.name),
                uid => uid,
            },
            labels: labels(&object.json, "/metadata/labels"),
            annotations: labels(&object.json, "/metadata/annotations"),
            service_account: match text(&object.json, "/spec/serviceAccountName") {
                empty if empty.is_empty() => "default".to_owned(),
                account => account,
            },
            node,
            host_network,
            addresses,
            containers: containers(object)
                .map(|container| text(container, "/name"))
                .collect(),
            ports: containers(object).flat_map(container_ports).collect(),
            namespace: object.namespace.clone(),
            name: object.name.clone(),
        };
        self.pods.insert(key, pod);
        Ok(())
    }

    fn node_of(&self, object: &Object) -> Result<usize, ModelError> {
        let name = text(&object.json, "/spec/nodeName");
        if name.is_empty() {
            return Ok(0);
        }
        self.nodes
            .iter()
            .position(|node| *node == name)
            .ok_or_else(|| ModelError::Node {
                pod: object.key(),
                node: name,
                known: self.nodes.join(", "),
            })
    }

    fn add_service(&mut self, object: &Object) -> Result<(), ModelError> {
        let key = object.key();
        let vips = match self.services.get(&key) {
            Some(service) => service.vips.clone(),
            None => self.addresses.service(&format!("service {key}"), object)?,
        };
        self.services.insert(key, Service::new(object, vips));
        Ok(())
    }

    /// The pods behind a Service, in order of name.
    pub(crate) fn backends<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = &'a Pod> {
        self.pods.values().filter(|pod| service.selects(pod))
    }
}

impl Pod {
    /// `namespace/name`.
    pub(crate) fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// The port's name, if a container declares the number.
    pub(crate) fn port_name(&self, number: u16) -> &str {
        self.ports
            .iter()
            .find(|port| port.number == number)
            .map_or("", |port| port.name.as_str())
    }
}

fn containers(object: &Object) -> impl Iterator<Item = &Value> {
    ["/spec/containers", "/spec/initContainers"]
        .into_iter()
        .filter_map(|list| object.json.pointer(list).and_then(Value::as_array))
        .flatten()
}

fn container_ports(container: &Value) -> impl Iterator<Item = ContainerPort> {
    let ports = container
        .get("ports")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    ports.filter_map(|port| {
        let number = port.get("containerPort").and_then(Value::as_u64)?;
        Some(ContainerPort {
            name: text(port, "/name"),
            number: u16::try_from(number).ok()?,
            udp: text(port, "/protocol") == "UDP",
        })
    })
}

/// A map of strings at `pointer`.
pub(crate) fn labels(value: &Value, pointer: &str) -> BTreeMap<String, String> {
    let entries = value
        .pointer(pointer)
        .and_then(Value::as_object)
        .into_iter()
        .flatten();
    entries
        .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{Model, Object};

    fn pod(name: &str, more: serde_json::Value) -> Object {
        let mut json = json!({"kind": "Pod", "metadata": {"name": name, "namespace": "shop"}, "spec": {}});
        if let Some(entries) = more.as_object() {
            for (key, value) in entries {
                json[key] = value.clone();
            }
        }
        Object::from_json(&json)
    }

    #[test]
    fn addresses_follow_the_order_and_leave_out_what_is_taken() {
        let objects = [
            pod("a", json!({})),
            pod(
                "b",
                json!({"status": {"podIPs": [{"ip": "10.244.0.2"}, {"ip": "fd00:10:244::2"}]}}),
            ),
            pod("c", json!({})),
        ];
        let mut model = Model::new(1, &objects).expect("one node");
        model.add(&objects).expect("room for three");
        let of = |name: &str| model.pods[&format!("shop/{name}")].addresses.clone();
        assert_eq!(of("b")[0].to_string(), "10.244.0.2");
        assert_eq!(of("a")[0].to_string(), "10.244.0.3");
        assert_eq!(of("c")[1].to_string(), "fd00:10:244::4");
    }

    #[test]
    fn a_pod_that_changes_keeps_its_address() {
        let objects = [pod("a", json!({})), pod("b", json!({}))];
        let mut model = Model::new(1, &objects).expect("one node");
        model.add(&objects).expect("room for two");
        model.add(&objects[1..]).expect("again");
        assert_eq!(model.pods["shop/b"].addresses[0].to_string(), "10.244.0.3");
        model.remove(&objects[0]);
        model.add(&[pod("c", json!({}))]).expect("room");
        assert_eq!(model.pods["shop/c"].addresses[0].to_string(), "10.244.0.2");
    }

    #[test]
    fn a_pod_on_an_unknown_node_is_refused() {
        let objects = [
            pod("a", json!({})),
            pod("b", json!({"spec": {"nodeName": "far"}})),
        ];
        let mut model = Model::new(1, &objects[..1]).expect("one node");
        assert!(model.add(&objects).is_err());
    }

    #[test]
    fn nodes_are_those_that_are_named_and_as_many_as_asked() {
        let objects = [pod("a", json!({"spec": {"nodeName": "node-1"}}))];
        let names = |least| Model::new(least, &objects).expect("few").nodes;
        assert_eq!(names(1), ["node-1"]);
        assert_eq!(names(3), ["node-1", "node-0", "node-2"]);
    }
}
