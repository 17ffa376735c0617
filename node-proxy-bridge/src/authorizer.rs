//! External authorizers as clusters of Envoy: whom the CUSTOM rules of all listeners ask, and where they are.
//!
//! Invariant: Envoy connects to addresses that it was given, from the network namespace that it runs in, the node's; it
//! resolves no name. An authorizer without an address has a cluster without one: asking it fails.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use envoy_types::pb::envoy::config::cluster::v3::cluster::{
    ClusterDiscoveryType, DiscoveryType, EdsClusterConfig, LbPolicy,
};
use envoy_types::pb::envoy::config::cluster::v3::{Cluster, UpstreamConnectionOptions};
use envoy_types::pb::envoy::config::core::v3::{
    Address, Http1ProtocolOptions, Http2ProtocolOptions, KeepaliveSettings, SocketAddress as WireAddress,
    TcpKeepalive, address, socket_address,
};
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{
    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints,
};
use envoy_types::pb::envoy::extensions::upstreams::http::v3::http_protocol_options::{
    self as options, ExplicitHttpConfig, UpstreamProtocolOptions,
};
use envoy_types::pb::google::protobuf::{Duration, UInt32Value};
use options::explicit_http_config::ProtocolConfig;
use thyra_policy_compiler::authorizer::{Authorizer, Check};

use crate::ads::{Kind, Name, Resource};
use crate::cluster::{at_once, speaking};
use crate::listener::ads;
use crate::lower::{Chain, Places};

/// For a connection to an authorizer; what a check may take is the provider's to say.
const CONNECT_TIMEOUT: Duration = Duration { seconds: 2, nanos: 0 };
/// Between two signs of life on a connection to one that answers over gRPC, and how long one may take.
const KEEPALIVE: [Duration; 2] = [
    Duration { seconds: 5, nanos: 0 },
    Duration { seconds: 2, nanos: 0 },
];

/// The cluster that answers for it: its service, by what it speaks.
#[must_use]
pub(crate) fn cluster_name(authorizer: &Authorizer) -> String {
    let speaks = match authorizer.check {
        Check::Http(_) => "http",
        Check::Grpc => "grpc",
    };
    format!("authorizer/{}/{speaks}", authorizer.target)
}

/// Names of the clusters that a chain asks, and of their addresses.
pub fn names<'a>(chains: impl Iterator<Item = &'a Chain>) -> Vec<Name> {
    let asks = chains.flat_map(|chain| &chain.asks);
    let both = |name: String| [Kind::Cluster, Kind::Endpoints].map(|kind| (kind, name.as_str().into()));
    let mut names: Vec<Name> = asks
        .flat_map(|asks| both(cluster_name(&asks.authorizer)))
        .collect();
    names.sort();
    names.dedup();
    names
}

/// The clusters that these chains ask, with their addresses, by name.
pub fn clusters<'a>(chains: impl Iterator<Item = &'a Chain>, places: &Places) -> BTreeMap<Name, Resource> {
    let mut clusters = BTreeMap::new();
    for asks in chains.flat_map(|chain| &chain.asks) {
        let name = cluster_name(&asks.authorizer);
        let addresses = places.get(&asks.authorizer.target).map_or(&[][..], Vec::as_slice);
        let endpoints = Resource::endpoints(endpoints(&name, addresses));
        let cluster = Resource::cluster(cluster(&name, asks.authorizer.check == Check::Grpc));
        clusters.insert((Kind::Endpoints, name.as_str().into()), endpoints);
        clusters.insert((Kind::Cluster, name.into()), cluster);
    }
    clusters
}

fn cluster(name: &str, grpc: bool) -> Cluster {
    let protocols = UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
        protocol_config: Some(if grpc {
            ProtocolConfig::Http2ProtocolOptions(http2())
        } else {
            ProtocolConfig::HttpProtocolOptions(Http1ProtocolOptions::default())
        }),
    });
    Cluster {
        name: name.to_owned(),
        // All of them count together: names come and go.
        alt_stat_name: "authorizer".to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        connect_timeout: Some(CONNECT_TIMEOUT),
        lb_policy: LbPolicy::LeastRequest.into(),
        eds_cluster_config: Some(EdsClusterConfig {
            eds_config: Some(ads()),
            ..EdsClusterConfig::default()
        }),
        typed_extension_protocol_options: speaking(protocols),
        // How much is asked of it is what the pods' own limits let in.
        circuit_breakers: Some(at_once(u32::MAX)),
        upstream_connection_options: Some(UpstreamConnectionOptions {
            tcp_keepalive: Some(TcpKeepalive {
                keepalive_probes: Some(UInt32Value { value: 3 }),
                keepalive_time: Some(UInt32Value { value: 10 }),
                keepalive_interval: Some(UInt32Value { value: 5 }),
            }),
            ..UpstreamConnectionOptions::default()
        }),
        ..Cluster::default()
    }
}

fn endpoints(name: &str, addresses: &[SocketAddr]) -> ClusterLoadAssignment {
    ClusterLoadAssignment {
        cluster_name: name.to_owned(),
        endpoints: vec![LocalityLbEndpoints {
            lb_endpoints: addresses.iter().map(endpoint).collect(),
            ..LocalityLbEndpoints::default()
        }],
        ..ClusterLoadAssignment::default()
    }
}

fn http2() -> Http2ProtocolOptions {
    let [interval, timeout] = KEEPALIVE;
    Http2ProtocolOptions {
        connection_keepalive: Some(KeepaliveSettings {
            interval: Some(interval),
            timeout: Some(timeout),
            ..KeepaliveSettings::default()
        }),
        ..Http2ProtocolOptions::default()
    }
}

fn endpoint(to: &SocketAddr) -> LbEndpoint {
    let address = WireAddress {
        address: to.ip().to_string(),
        port_specifier: Some(socket_address::PortSpecifier::PortValue(to.port().into())),
        ..WireAddress::default()
    };
    LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: Some(Address {
                address: Some(address::Address::SocketAddress(address)),
            }),
            ..Endpoint::default()
        })),
        ..LbEndpoint::default()
    }
}
