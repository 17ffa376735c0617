//! Objects as a kubelet, a scheduler and an endpoint controller would have left them in the API server.
//!
//! Invariant: what a manifest says is kept; only what a bare API server lacks or can't take is added or left
//! out.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};

use crate::lab::model::{Model, NodeAddresses, Pod, Service, ServicePort};
use crate::lab::object::{Object, text};

/// Lists of the kinds that istio adds and that the lab applies.
pub(super) const CUSTOM_LISTS: &[&str] = &[
    "/apis/security.istio.io/v1/authorizationpolicies",
    "/apis/security.istio.io/v1/peerauthentications",
    "/apis/security.istio.io/v1/requestauthentications",
    "/apis/networking.istio.io/v1/workloadentries",
];

/// The object's address on the API server.
pub(super) fn path(object: &Value) -> String {
    let version = text(object, "/apiVersion");
    let root = if version.contains('/') {
        format!("/apis/{version}")
    } else {
        format!("/api/{version}")
    };
    let kind = text(object, "/kind").to_ascii_lowercase();
    let plural = match kind.strip_suffix('y') {
        Some(stem) => format!("{stem}ies"),
        None => format!("{kind}s"),
    };
    let name = text(object, "/metadata/name");
    match text(object, "/metadata/namespace") {
        empty if empty.is_empty() => format!("{root}/{plural}/{name}"),
        namespace => format!("{root}/namespaces/{namespace}/{plural}/{name}"),
    }
}

/// What is sent: without what only a server may say.
pub(super) fn bare(object: &Object) -> Value {
    let mut json = object.json.clone();
    if let Some(fields) = json.as_object_mut() {
        fields.remove("status");
    }
    if let Some(metadata) = json.get_mut("metadata").and_then(Value::as_object_mut) {
        for key in [
            "uid",
            "resourceVersion",
            "creationTimestamp",
            "generation",
            "managedFields",
            "selfLink",
        ] {
            metadata.remove(key);
        }
    }
    json
}

/// A scheduled pod; names and images that the lab doesn't need are made up.
pub(super) fn pod(object: &Object, pod: &Pod, model: &Model) -> Value {
    let mut json = bare(object);
    json["spec"]["nodeName"] = json!(model.nodes.get(pod.node));
    let containers = json["spec"].get_mut("containers").and_then(Value::as_array_mut);
    match containers {
        Some(containers) if !containers.is_empty() => {
            for (index, container) in containers.iter_mut().enumerate() {
                complete_container(container, index);
            }
        }
        _ => json["spec"]["containers"] = json!([{"name": "lab", "image": "lab"}]),
    }
    json
}

fn complete_container(container: &mut Value, index: usize) {
    if container.get("image").is_none() {
        container["image"] = json!("lab");
    }
    if container.get("name").is_none() {
        container["name"] = json!(format!("lab-{index}"));
    }
}

/// What a kubelet reports of a pod that runs and is ready.
pub(super) fn pod_status(pod: &Pod) -> Value {
    let node = NodeAddresses::of(pod.node).own;
    let list = |addresses: &[IpAddr]| addresses.iter().map(|ip| json!({"ip": ip})).collect::<Vec<_>>();
    let condition = |kind: &str| json!({"type": kind, "status": "True"});
    let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"].map(condition);
    json!({
        "phase": "Running",
        "podIP": pod.addresses.first(),
        "podIPs": list(&pod.addresses),
        "hostIP": node[0],
        "hostIPs": list(&node),
        "conditions": conditions,
    })
}

pub(super) fn node(index: usize, name: &str) -> Value {
    let addresses = NodeAddresses::of(index);
    let ranges: Vec<String> = addresses
        .ranges
        .iter()
        .map(|(range, length)| format!("{range}/{length}"))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
        "spec": {"podCIDR": ranges[0], "podCIDRs": ranges}
    })
}

pub(super) fn node_status(index: usize, name: &str) -> Value {
    let own = NodeAddresses::of(index).own;
    let mut addresses: Vec<Value> = own
        .iter()
        .map(|address| json!({"type": "InternalIP", "address": address}))
        .collect();
    addresses.push(json!({"type": "Hostname", "address": name}));
    json!({"addresses": addresses, "conditions": [{"type": "Ready", "status": "True"}]})
}

/// The lab's cluster has both families: a Service that asks for nothing else gets both, at the lab's
/// addresses.
pub(super) fn service(object: &Object, service: &Service) -> Value {
    let mut json = bare(object);
    if service.external_name {
        return json;
    }
    let spec = &mut json["spec"];
    if service.vips.is_empty() {
        if spec.get("ipFamilyPolicy").is_none() && spec.get("ipFamilies").is_none() {
            spec["ipFamilyPolicy"] = json!("PreferDualStack");
        }
        return json;
    }
    spec["clusterIP"] = json!(service.vips[0]);
    spec["clusterIPs"] = json!(service.vips);
    if service.vips.len() == 2 {
        let family = |vip: &IpAddr| if vip.is_ipv4() { "IPv4" } else { "IPv6" };
        spec["ipFamilies"] = service.vips.iter().map(family).collect();
        if spec.get("ipFamilyPolicy").is_none() {
            spec["ipFamilyPolicy"] = json!("PreferDualStack");
        }
    }
    json
}

/// EndpointSlices of every Service, by `namespace/name`: one a family and set of target ports.
pub(super) fn slices(model: &Model) -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    for service in model
        .services
        .values()
        .filter(|service| !service.selector.is_empty())
    {
        for v4 in [true, false] {
            let mut groups: BTreeMap<Vec<Option<u16>>, Vec<&Pod>> = BTreeMap::new();
            for pod in model.backends(service) {
                if pod.addresses.iter().any(|address| address.is_ipv4() == v4) {
                    let targets = service
                        .ports
                        .iter()
                        .map(|port| Service::target(port, pod))
                        .collect();
                    groups.entry(targets).or_default().push(pod);
                }
            }
            for (number, (targets, pods)) in groups.iter().enumerate() {
                let family = if v4 { "v4" } else { "v6" };
                let name = format!("{}-{family}-{number}", service.name);
                let slice = slice(&name, service, targets, pods, v4, model);
                all.insert(format!("{}/{name}", service.namespace), slice);
            }
        }
    }
    all
}

fn slice(
    name: &str,
    service: &Service,
    targets: &[Option<u16>],
    pods: &[&Pod],
    v4: bool,
    model: &Model,
) -> Value {
    let endpoints = pods.iter().map(|pod| {
        let addresses: Vec<&IpAddr> = pod
            .addresses
            .iter()
            .filter(|address| address.is_ipv4() == v4)
            .collect();
        json!({
            "addresses": addresses[..1],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "nodeName": model.nodes.get(pod.node),
            "targetRef": {"kind": "Pod", "namespace": pod.namespace, "name": pod.name, "uid": pod.uid}
        })
    });
    let ports = service.ports.iter().zip(targets).filter_map(|(port, target)| {
        let ServicePort { name, udp, .. } = port;
        Some(json!({"name": name, "port": (*target)?, "protocol": if *udp { "UDP" } else { "TCP" }}))
    });
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": name, "namespace": service.namespace,
            "labels": {
                "kubernetes.io/service-name": service.name,
                "endpointslice.kubernetes.io/managed-by": "thyra-lab"
            }
        },
        "addressType": if v4 { "IPv4" } else { "IPv6" },
        "endpoints": endpoints.collect::<Vec<_>>(),
        "ports": ports.collect::<Vec<_>>()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{path, slices};
    use crate::lab::model::Model;
    use crate::lab::object::Object;

    #[test]
    fn objects_have_their_address_on_the_api_server() {
        let of = |version: &str, kind: &str, namespace: Option<&str>| {
            path(&json!({
                "apiVersion": version, "kind": kind, "metadata": {"name": "x", "namespace": namespace}
            }))
        };
        assert_eq!(of("v1", "Namespace", None), "/api/v1/namespaces/x");
        assert_eq!(of("v1", "Pod", Some("shop")), "/api/v1/namespaces/shop/pods/x");
        assert_eq!(
            of("security.istio.io/v1", "AuthorizationPolicy", Some("shop")),
            "/apis/security.istio.io/v1/namespaces/shop/authorizationpolicies/x"
        );
        assert_eq!(
            of("networking.istio.io/v1", "WorkloadEntry", Some("shop")),
            "/apis/networking.istio.io/v1/namespaces/shop/workloadentries/x"
        );
    }

    #[test]
    fn a_slice_has_the_pods_own_port() {
        let objects = [
            Object::from_json(&json!({
                "kind": "Pod", "metadata": {"name": "cart", "namespace": "shop", "labels": {"app": "cart"}},
                "spec": {"containers": [{"ports": [{"name": "http", "containerPort": 8080}]}]}
            })),
            Object::from_json(&json!({
                "kind": "Service", "metadata": {"name": "cart", "namespace": "shop"},
                "spec": {
                    "selector": {"app": "cart"},
                    "ports": [{"name": "web", "port": 80, "targetPort": "http"}]
                }
            })),
        ];
        let mut model = Model::new(1, &objects).expect("one node");
        model.add(&objects).expect("room");
        let slices = slices(&model);
        assert_eq!(slices["shop/cart-v4-0"]["ports"][0]["port"], json!(8080));
        assert_eq!(
            slices["shop/cart-v6-0"]["endpoints"][0]["addresses"],
            json!(["fd00:10:244::2"])
        );
    }
}
