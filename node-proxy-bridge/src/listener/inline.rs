//! The listener of a residual inside a pod: it ends the client's connection, judges each request or the stream, and
//! goes on to the pod's own port from inside the pod.
//!
//! Invariant: wherever a stream is read as, the residual's rules for that reading stand before the way to the pod. One
//! socket for each family and no other: a process in the pod can't join it (`enable_reuse_port`).

use envoy_types::pb::envoy::config::core::v3::substitution_format_string::Format;
use envoy_types::pb::envoy::config::core::v3::{
    Address, DataSource, SocketAddress, SubstitutionFormatString, address, data_source, socket_address,
};
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::{
    AdditionalAddress, Filter, FilterChain, FilterChainMatch, Listener,
};
use envoy_types::pb::envoy::extensions::filters::common::set_filter_state::v3::FilterStateValue;
use envoy_types::pb::envoy::extensions::filters::common::set_filter_state::v3::filter_state_value::{
    Key, SharedWithUpstream, Value,
};
use envoy_types::pb::envoy::extensions::filters::listener::http_inspector::v3::HttpInspector;
use envoy_types::pb::envoy::extensions::filters::listener::tls_inspector::v3::TlsInspector;
use envoy_types::pb::envoy::extensions::filters::network::set_filter_state::v3::Config as SetFilterState;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::TcpProxy;
use envoy_types::pb::envoy::extensions::filters::network::tcp_proxy::v3::tcp_proxy::ClusterSpecifier;
use envoy_types::pb::google::protobuf::{BoolValue, UInt32Value};

use super::budget::BUFFER;
use super::told::Redact;
use super::{HttpOptions, INSPECTION, http, listener_filter, packed, tls, told};
use crate::cluster;
use crate::lower::StepKind;

/// What the HTTP inspector calls HTTP; inside of TLS a client may want the same, which its ClientHello says.
const HTTP: [&str; 3] = ["http/1.0", "http/1.1", "h2c"];
/// What the TLS inspector calls a stream that is none.
const NO_TLS: &str = "raw_buffer";

/// Where a listener is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The pod's uid.
    pub pod: String,
    /// Path of its network namespace, for Envoy.
    pub netns: String,
}

/// What a residual's listeners have in common.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// What the rules of its filters are named after.
    pub name: String,
    /// Its port.
    pub port: u16,
    /// Filters for a request.
    pub http: Vec<StepKind>,
    /// Filters for any other stream; none where such bytes get 400.
    pub other: Option<Vec<StepKind>>,
}

impl Shape {
    /// What the rules of its HTTP filters are named after.
    #[must_use]
    pub fn http_name(&self) -> String {
        format!("{}/http", self.name)
    }

    /// The same for other streams.
    #[must_use]
    pub fn other_name(&self) -> String {
        format!("{}/other", self.name)
    }
}

/// The listener of a residual in a pod.
#[must_use]
pub fn inline(place: &Place, shape: &Shape, options: &HttpOptions) -> Listener {
    let manager = Filter {
        name: "envoy.filters.network.http_connection_manager".to_owned(),
        config_type: Some(ConfigType::TypedConfig(packed(&http::to_pod(
            &shape.http_name(),
            &shape.http,
            &cluster::name(place),
            options,
        )))),
    };
    let requests = FilterChain {
        name: "http".to_owned(),
        filters: vec![way_to_pod(), manager],
        ..FilterChain::default()
    };
    let (chains, default, inspectors) = match &shape.other {
        None => (vec![requests], None, Vec::new()),
        Some(steps) => (
            vec![FilterChain {
                filter_chain_match: Some(FilterChainMatch {
                    transport_protocol: NO_TLS.to_owned(),
                    application_protocols: HTTP.map(str::to_owned).to_vec(),
                    ..FilterChainMatch::default()
                }),
                ..requests
            }],
            Some(streams(place, shape, steps, options.redact)),
            vec![
                listener_filter("envoy.filters.listener.tls_inspector", &TlsInspector::default()),
                listener_filter("envoy.filters.listener.http_inspector", &HttpInspector::default()),
            ],
        ),
    };
    Listener {
        name: format!("{}@{}", shape.name, place.pod),
        // All of them count together: names come and go.
        stat_prefix: "pod".to_owned(),
        address: Some(address_in(place, "0.0.0.0", shape.port)),
        additional_addresses: vec![AdditionalAddress {
            address: Some(address_in(place, "::", shape.port)),
            ..AdditionalAddress::default()
        }],
        per_connection_buffer_limit_bytes: Some(UInt32Value { value: BUFFER }),
        enable_reuse_port: Some(BoolValue { value: false }),
        listener_filters: inspectors,
        listener_filters_timeout: Some(INSPECTION),
        filter_chains: chains,
        default_filter_chain: default,
        ..Listener::default()
    }
}

fn streams(place: &Place, shape: &Shape, steps: &[StepKind], redact: Redact) -> FilterChain {
    let mut filters = vec![way_to_pod()];
    filters.extend(tls::judges(&shape.other_name(), steps));
    filters.push(Filter {
        name: "envoy.filters.network.tcp_proxy".to_owned(),
        config_type: Some(ConfigType::TypedConfig(packed(&TcpProxy {
            stat_prefix: "pod".to_owned(),
            cluster_specifier: Some(ClusterSpecifier::Cluster(cluster::name(place))),
            access_log: vec![told::streams(redact)],
            ..TcpProxy::default()
        }))),
    });
    FilterChain {
        name: "other".to_owned(),
        filters,
        ..FilterChain::default()
    }
}

fn address_in(place: &Place, any: &str, port: u16) -> Address {
    Address {
        address: Some(address::Address::SocketAddress(SocketAddress {
            address: any.to_owned(),
            port_specifier: Some(socket_address::PortSpecifier::PortValue(port.into())),
            network_namespace_filepath: place.netns.clone(),
            ..SocketAddress::default()
        })),
    }
}

/// Upstream sockets are made in the listener's own namespace and go to where the client wanted to.
fn way_to_pod() -> Filter {
    let state = SetFilterState {
        on_new_connection: vec![
            value(
                "envoy.network.upstream_bind_override.network_namespace",
                "envoy.string",
                "%FILTER_STATE(envoy.network.network_namespace:PLAIN)%",
            ),
            value(
                "envoy.network.transport_socket.original_dst_address",
                "",
                "%DOWNSTREAM_DIRECT_LOCAL_ADDRESS%",
            ),
        ],
        ..SetFilterState::default()
    };
    Filter {
        name: "envoy.filters.network.set_filter_state".to_owned(),
        config_type: Some(ConfigType::TypedConfig(packed(&state))),
    }
}

fn value(key: &str, factory: &str, format: &str) -> FilterStateValue {
    FilterStateValue {
        key: Some(Key::ObjectKey(key.to_owned())),
        factory_key: factory.to_owned(),
        shared_with_upstream: SharedWithUpstream::Once.into(),
        value: Some(Value::FormatString(SubstitutionFormatString {
            format: Some(Format::TextFormatSource(DataSource {
                specifier: Some(data_source::Specifier::InlineString(format.to_owned())),
                ..DataSource::default()
            })),
            ..SubstitutionFormatString::default()
        })),
        ..FilterStateValue::default()
    }
}
