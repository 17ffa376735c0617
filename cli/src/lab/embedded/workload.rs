//! Workloads and Services, as istiod's ambient index tells them.
//!
//! Invariant: every live pod is told, enrolled or not; an identity is the node agent's to conclude.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::Value;
use thyra_proto::istio::workload::{
    self as wire, Address, AppProtocol, NetworkAddress, NetworkMode, Port, PortList, TunnelProtocol,
    WorkloadStatus, WorkloadType, address,
};

use super::{Objects, mesh};
use crate::lab::model::{Model, Pod, Service, ServicePort, TargetPort, labels};
use crate::lab::object::{Object, text};

/// The cluster's name, first part of each uid.
const CLUSTER: &str = "Kubernetes";
/// What istiod says as "".
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";

/// Every Address resource by name.
///
/// # Errors
/// Mesh settings that can't be read.
pub(super) fn addresses(objects: &Objects, model: &Model) -> anyhow::Result<BTreeMap<String, Address>> {
    let trust_domain = trust_domain(objects)?;
    let mut all = BTreeMap::new();
    for pod in model.pods.values() {
        let mut workload = of_pod(pod, model);
        workload.trust_domain.clone_from(&trust_domain);
        workload.authorization_policies = selected_by(objects, &pod.namespace, &pod.labels);
        all.insert(workload.uid.clone(), address::Type::Workload(workload));
    }
    for held in objects
        .values()
        .filter(|held| held.object.kind == "WorkloadEntry")
    {
        let mut workload = of_entry(&held.object, model);
        workload.trust_domain.clone_from(&trust_domain);
        all.insert(workload.uid.clone(), address::Type::Workload(workload));
    }
    for service in model.services.values() {
        let name = format!("{}/{}", service.namespace, service.hostname());
        all.insert(name, address::Type::Service(of_service(service)));
    }
    Ok(all
        .into_iter()
        .map(|(name, kind)| (name, Address { r#type: Some(kind) }))
        .collect())
}

fn trust_domain(objects: &Objects) -> anyhow::Result<String> {
    let mesh = objects.values().find(|held| held.object.kind == "ConfigMap");
    let domain = mesh
        .map(|held| mesh::read(&held.object))
        .transpose()?
        .map(|mesh| mesh.trust_domain);
    Ok(domain
        .filter(|domain| domain != DEFAULT_TRUST_DOMAIN)
        .unwrap_or_default())
}

fn of_pod(pod: &Pod, model: &Model) -> wire::Workload {
    let ambient = pod
        .annotations
        .get("ambient.istio.io/redirection")
        .is_some_and(|value| value == "enabled");
    let mut services = BTreeMap::new();
    for service in model.services.values().filter(|service| service.selects(pod)) {
        let ports = service.ports.iter().map(|port| Port {
            service_port: port.port.into(),
            target_port: Service::target(port, pod).unwrap_or(0).into(),
            app_protocol: app_protocol(port).into(),
        });
        services.insert(
            format!("{}/{}", service.namespace, service.hostname()),
            PortList {
                ports: ports.collect(),
            },
        );
    }
    wire::Workload {
        uid: format!("{CLUSTER}//Pod/{}/{}", pod.namespace, pod.name),
        name: pod.name.clone(),
        namespace: pod.namespace.clone(),
        addresses: pod.addresses.iter().map(bytes).collect(),
        tunnel_protocol: if ambient {
            TunnelProtocol::Hbone
        } else {
            TunnelProtocol::None
        }
        .into(),
        service_account: account(&pod.service_account),
        node: model.nodes.get(pod.node).cloned().unwrap_or_default(),
        canonical_name: pod.labels.get("app").unwrap_or(&pod.name).clone(),
        canonical_revision: "latest".to_owned(),
        workload_type: WorkloadType::Pod.into(),
        workload_name: pod.name.clone(),
        status: WorkloadStatus::Healthy.into(),
        cluster_id: CLUSTER.to_owned(),
        network_mode: if pod.host_network {
            NetworkMode::HostNetwork
        } else {
            NetworkMode::Standard
        }
        .into(),
        services,
        ..wire::Workload::default()
    }
}

fn of_entry(object: &Object, model: &Model) -> wire::Workload {
    let spec = object.json.get("spec").cloned().unwrap_or_default();
    let given = text(&spec, "/address");
    // What is no address is a host name, and lends none.
    let address: Option<IpAddr> = given.parse().ok();
    let own = labels(&spec, "/labels");
    let mut services = BTreeMap::new();
    let selecting = model.services.values().filter(|service| {
        !service.selector.is_empty()
            && service.namespace == object.namespace
            && service
                .selector
                .iter()
                .all(|(key, value)| own.get(key) == Some(value))
    });
    for service in selecting {
        let ports = service.ports.iter().map(|port| Port {
            service_port: port.port.into(),
            target_port: entry_port(&spec, port).into(),
            app_protocol: app_protocol(port).into(),
        });
        services.insert(
            format!("{}/{}", service.namespace, service.hostname()),
            PortList {
                ports: ports.collect(),
            },
        );
    }
    wire::Workload {
        uid: format!(
            "{CLUSTER}/networking.istio.io/WorkloadEntry/{}/{}",
            object.namespace, object.name
        ),
        name: object.name.clone(),
        namespace: object.namespace.clone(),
        addresses: address.iter().map(bytes).collect(),
        hostname: if address.is_some() { String::new() } else { given },
        network: text(&spec, "/network"),
        service_account: account(&text(&spec, "/serviceAccount")),
        canonical_name: own.get("app").unwrap_or(&object.name).clone(),
        canonical_revision: "latest".to_owned(),
        workload_type: WorkloadType::Pod.into(),
        workload_name: object.name.clone(),
        status: WorkloadStatus::Healthy.into(),
        cluster_id: CLUSTER.to_owned(),
        services,
        ..wire::Workload::default()
    }
}

/// A WorkloadEntry may map a Service port's name to its own number.
fn entry_port(spec: &Value, port: &ServicePort) -> u16 {
    let mapped = spec
        .get("ports")
        .and_then(|ports| ports.get(&port.name))
        .and_then(Value::as_u64);
    match (mapped.and_then(|number| u16::try_from(number).ok()), &port.target) {
        (Some(number), _) => number,
        (None, TargetPort::Number(number)) => *number,
        (None, TargetPort::Name(_)) => port.port,
    }
}

fn of_service(service: &Service) -> wire::Service {
    wire::Service {
        name: service.name.clone(),
        namespace: service.namespace.clone(),
        hostname: service.hostname(),
        addresses: service
            .vips
            .iter()
            .map(|vip| NetworkAddress {
                network: String::new(),
                address: bytes(vip),
                length: None,
            })
            .collect(),
        ports: service
            .ports
            .iter()
            .map(|port| Port {
                service_port: port.port.into(),
                target_port: match port.target {
                    TargetPort::Number(number) => number.into(),
                    TargetPort::Name(_) => 0,
                },
                app_protocol: app_protocol(port).into(),
            })
            .collect(),
        canonical: true,
        ..wire::Service::default()
    }
}

/// Istio's protocol selection: `appProtocol`, else the port name up to its first dash.
fn app_protocol(port: &ServicePort) -> AppProtocol {
    let declared = if port.app_protocol.is_empty() {
        &port.name
    } else {
        &port.app_protocol
    };
    let declared = declared.to_ascii_lowercase();
    let prefix = match declared.as_str() {
        "grpc-web" | "kubernetes.io/h2c" | "kubernetes.io/ws" | "kubernetes.io/wss" => declared.as_str(),
        other => other.split('-').next().unwrap_or_default(),
    };
    match prefix {
        "http" | "kubernetes.io/ws" => AppProtocol::Http11,
        "http2" | "kubernetes.io/h2c" => AppProtocol::Http2,
        "grpc" | "grpc-web" => AppProtocol::Grpc,
        "tls" | "https" | "kubernetes.io/wss" => AppProtocol::Tls,
        "tcp" | "mongo" | "redis" | "mysql" => AppProtocol::Tcp,
        _ => AppProtocol::Unknown,
    }
}

/// Policies with a selector that chose this workload, as istiod lists them.
fn selected_by(objects: &Objects, namespace: &str, own: &BTreeMap<String, String>) -> Vec<String> {
    let policies = objects.values().map(|held| &held.object);
    let policies = policies.filter(|object| object.kind == "AuthorizationPolicy");
    let chosen = policies.filter(|policy| {
        let selector = labels(&policy.json, "/spec/selector/matchLabels");
        policy.namespace == namespace
            && !selector.is_empty()
            && selector.iter().all(|(key, value)| own.get(key) == Some(value))
    });
    chosen.map(Object::key).collect()
}

/// istiod says `default` as "".
fn account(name: &str) -> String {
    if name == "default" {
        String::new()
    } else {
        name.to_owned()
    }
}

fn bytes(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
