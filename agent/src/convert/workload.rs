//! `istio.workload.Workload` and `Service` to the model.
//!
//! Invariant: an unknown enum value never refuses the resource; it is read as the value that trusts least.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use thyra_policy_compiler::world::{AppProtocol, Service, ServicePort, Workload, WorkloadKind};
use thyra_proto::istio::workload as wire;

use super::ConvertError;

/// istiod says "" for it (`spiffe.GetTrustDomain` of a default mesh).
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
/// istiod says "" for it.
const DEFAULT_SERVICE_ACCOUNT: &str = "default";

/// A workload.
///
/// # Errors
/// An address or a port that can't be one.
pub fn workload(message: wire::Workload) -> Result<Workload, ConvertError> {
    let wire::Workload {
        name,
        namespace,
        addresses,
        network,
        tunnel_protocol,
        trust_domain,
        service_account,
        node,
        authorization_policies,
        uid,
        services,
        network_mode,
        native_tunnel,
        status,
        // None of these can change an L4 verdict on the node that the pod is on.
        waypoint: _,
        canonical_name: _,
        canonical_revision: _,
        workload_type: _,
        workload_name: _,
        cluster_id: _,
        network_gateway: _,
        hostname: _,
        application_tunnel: _,
        locality: _,
        extensions: _,
        capacity: _,
    } = message;
    let services = services
        .into_iter()
        .map(|(name, wire::PortList { ports: list })| Ok((Arc::from(name), ports(list)?)))
        .collect::<Result<BTreeMap<Arc<str>, _>, ConvertError>>()?;
    Ok(Workload {
        kind: kind(&uid),
        uid: Arc::from(uid),
        name,
        namespace,
        addresses: addresses
            .iter()
            .map(|bytes| address("addresses", bytes))
            .collect::<Result<_, _>>()?,
        network,
        trust_domain: or(trust_domain, DEFAULT_TRUST_DOMAIN),
        service_account: or(service_account, DEFAULT_SERVICE_ACCOUNT),
        node,
        // Only STANDARD is known to own its address; any other mode lends no identity.
        host_network: wire::NetworkMode::try_from(network_mode) != Ok(wire::NetworkMode::Standard),
        healthy: wire::WorkloadStatus::try_from(status) == Ok(wire::WorkloadStatus::Healthy),
        hbone: native_tunnel
            || wire::TunnelProtocol::try_from(tunnel_protocol) == Ok(wire::TunnelProtocol::Hbone),
        services,
        authorization_policies,
    })
}

/// A service.
///
/// # Errors
/// An address or a port that can't be one.
pub fn service(message: wire::Service) -> Result<Service, ConvertError> {
    let wire::Service {
        name,
        namespace,
        hostname,
        addresses,
        ports: list,
        // None of these can change an L4 verdict.
        subject_alt_names: _,
        waypoint: _,
        load_balancing: _,
        ip_families: _,
        extensions: _,
        canonical: _,
        ingress_use_waypoint: _,
        weighted_waypoints: _,
        visibility: _,
    } = message;
    // A VIP of another network is a VIP all the same: no address here that is a Service's lends an identity.
    // A prefix length can only be the whole address for a VIP.
    let vip = |a: &wire::NetworkAddress| address("addresses", &a.address);
    Ok(Service {
        name,
        namespace,
        hostname,
        addresses: addresses.iter().map(vip).collect::<Result<_, _>>()?,
        ports: ports(list)?,
    })
}

/// The kind in a uid `cluster/group/kind/namespace/name`.
#[must_use]
pub fn kind(uid: &str) -> WorkloadKind {
    let parts: Vec<&str> = uid.split('/').collect();
    match parts.as_slice() {
        [_, "", "Pod", _, _] => WorkloadKind::Pod,
        _ => WorkloadKind::Other,
    }
}

/// An address of 4 or 16 bytes, canonical.
///
/// # Errors
/// Any other length.
pub fn address(field: &'static str, bytes: &[u8]) -> Result<IpAddr, ConvertError> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(IpAddr::from(v4));
    }
    let v6 = <[u8; 16]>::try_from(bytes).map_err(|_| ConvertError::Address {
        field,
        bytes: bytes.len(),
    })?;
    Ok(IpAddr::from(v6).to_canonical())
}

fn ports(list: Vec<wire::Port>) -> Result<Vec<ServicePort>, ConvertError> {
    list.into_iter().map(port).collect()
}

fn port(
    wire::Port {
        service_port,
        target_port,
        app_protocol,
    }: wire::Port,
) -> Result<ServicePort, ConvertError> {
    Ok(ServicePort {
        port: port_number("service_port", service_port)?,
        target_port: port_number("target_port", target_port)?,
        protocol: protocol(app_protocol),
    })
}

/// A port that fits.
///
/// # Errors
/// More than 16 bits.
pub fn port_number(field: &str, number: u32) -> Result<u16, ConvertError> {
    u16::try_from(number).map_err(|_| ConvertError::Number {
        field: field.into(),
        value: i64::from(number),
    })
}

/// A protocol of a later istiod counts as undeclared: its first bytes decide, so HTTP rules are not skipped.
fn protocol(number: i32) -> AppProtocol {
    match wire::AppProtocol::try_from(number) {
        Ok(wire::AppProtocol::Http11 | wire::AppProtocol::Http2 | wire::AppProtocol::Grpc) => {
            AppProtocol::Http
        }
        Ok(wire::AppProtocol::Tcp) => AppProtocol::NotHttp,
        Ok(wire::AppProtocol::Tls) => AppProtocol::Tls,
        Ok(wire::AppProtocol::Unknown) | Err(_) => AppProtocol::Unknown,
    }
}

fn or(value: String, default: &str) -> String {
    if value.is_empty() { default.into() } else { value }
}
