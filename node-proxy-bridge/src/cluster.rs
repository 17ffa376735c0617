//! The way from a listener inside a pod to the pod's own port, as Envoy's cluster: one for each pod, so that what is
//! under way to one pod has a limit of its own.
//!
//! Invariant: it leads nowhere but to where the client wanted to, from inside the namespace of the listener
//! (`listener::inline` says both to it as filter state).

use std::collections::HashMap;
use std::num::NonZeroU32;

use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::Thresholds;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{ClusterDiscoveryType, DiscoveryType, LbPolicy};
use envoy_types::pb::envoy::config::cluster::v3::{CircuitBreakers, Cluster};
use envoy_types::pb::envoy::config::core::v3::{
    BindConfig, ExtraSourceAddress, Http1ProtocolOptions, SocketAddress, TypedExtensionConfig, socket_address,
};
use envoy_types::pb::envoy::extensions::local_address_selectors::filter_state_override::v3::Config as Override;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::HttpProtocolOptions;
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::{
    UpstreamProtocolOptions, UseDownstreamHttpConfig,
};
use envoy_types::pb::google::protobuf::{Any, Duration, UInt32Value};
use envoy_types::util::pack_any;

use crate::listener::{Place, budget};

const CONNECT_TIMEOUT: Duration = Duration { seconds: 2, nanos: 0 };

/// Name of a pod's cluster.
#[must_use]
pub fn name(place: &Place) -> String {
    format!("pod@{}", place.pod)
}

/// A pod's cluster; `limit`: its requests and other streams at a time, more get 503.
#[must_use]
pub fn cluster(place: &Place, limit: NonZeroU32) -> Cluster {
    let protocols = UpstreamProtocolOptions::UseDownstreamProtocolConfig(UseDownstreamHttpConfig {
        http_protocol_options: Some(Http1ProtocolOptions::default()),
        http2_protocol_options: Some(budget::http2()),
        ..UseDownstreamHttpConfig::default()
    });
    Cluster {
        name: name(place),
        // All of them count together: names come and go.
        alt_stat_name: "pod".to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst.into())),
        lb_policy: LbPolicy::ClusterProvided.into(),
        connect_timeout: Some(CONNECT_TIMEOUT),
        per_connection_buffer_limit_bytes: Some(UInt32Value {
            value: budget::BUFFER,
        }),
        circuit_breakers: Some(at_once(limit.get())),
        upstream_bind_config: Some(inside()),
        typed_extension_protocol_options: speaking(protocols),
        ..Cluster::default()
    }
}

/// What may be under way to a cluster; as much more waits. Envoy's defaults (1,024 of each) are too few for a node.
pub(crate) fn at_once(limit: u32) -> CircuitBreakers {
    let limit = Some(UInt32Value { value: limit });
    CircuitBreakers {
        thresholds: vec![Thresholds {
            max_connections: limit,
            max_pending_requests: limit,
            max_requests: limit,
            ..Thresholds::default()
        }],
        ..CircuitBreakers::default()
    }
}

/// How HTTP is spoken to a cluster, as it holds that.
pub(crate) fn speaking(protocols: UpstreamProtocolOptions) -> HashMap<String, Any> {
    let options = HttpProtocolOptions {
        upstream_protocol_options: Some(protocols),
        ..HttpProtocolOptions::default()
    };
    let name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions".to_owned();
    HashMap::from([(name, pack_any(options))])
}

/// From any address of the namespace that the filter state names.
fn inside() -> BindConfig {
    let any = |address: &str| SocketAddress {
        address: address.to_owned(),
        port_specifier: Some(socket_address::PortSpecifier::PortValue(0)),
        ..SocketAddress::default()
    };
    BindConfig {
        source_address: Some(any("0.0.0.0")),
        extra_source_addresses: vec![ExtraSourceAddress {
            address: Some(any("::")),
            ..ExtraSourceAddress::default()
        }],
        local_address_selector: Some(TypedExtensionConfig {
            name: "envoy.upstream.local_address_selector.filter_state_override".to_owned(),
            typed_config: Some(pack_any(Override {})),
        }),
        ..BindConfig::default()
    }
}
