//! What Envoy is started with: where its administration is and whom it asks for everything else.
//!
//! Invariant: no TCP port is opened, and nothing is sent anywhere but to the bridge's socket, to the pods that its
//! listeners are in, and to the authorizers that the bridge names.

use std::path::Path;

use serde_json::{Value, json};

/// The cluster of the bridge's own socket.
pub const BRIDGE: &str = "thyra";
/// The cluster of every pod: from inside its namespace to where the client wanted to.
pub const POD: &str = "pod";
/// Connections that Envoy holds at most; it refuses more by itself.
const MAX_CONNECTIONS: u32 = 50_000;

/// Envoy's bootstrap configuration, as JSON that Envoy reads.
#[must_use]
pub fn bootstrap(node: &str, xds: &Path, admin: &Path) -> Value {
    let pipe = |path: &Path| json!({"pipe": {"path": path, "mode": 0o600}});
    let grpc = json!({
        "envoy_grpc": {
            "cluster_name": BRIDGE,
            "retry_policy": {"retry_back_off": {"base_interval": "0.05s", "max_interval": "1s"}},
        },
    });
    json!({
        "node": {"id": node, "cluster": BRIDGE},
        "admin": {"address": pipe(admin)},
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": true,
                "grpc_services": [grpc],
            },
            "cds_config": {"ads": {}, "resource_api_version": "V3"},
            "lds_config": {"ads": {}, "resource_api_version": "V3"},
        },
        "static_resources": {"clusters": [bridge(xds), pod()]},
        "overload_manager": {
            "resource_monitors": [{
                "name": "envoy.resource_monitors.global_downstream_max_connections",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.resource_monitors.\
                              downstream_connections.v3.DownstreamConnectionsConfig",
                    "max_active_downstream_connections": MAX_CONNECTIONS,
                },
            }],
        },
    })
}

/// Which namespace and which address: the listener's filter state says it (`listener::inline`).
fn pod() -> Value {
    json!({
        "name": POD,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "2s",
        "upstream_bind_config": {
            "source_address": {"address": "0.0.0.0", "port_value": 0},
            "extra_source_addresses": [{"address": {"address": "::", "port_value": 0}}],
            "local_address_selector": {
                "name": "envoy.upstream.local_address_selector.filter_state_override",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.local_address_selectors.\
                              filter_state_override.v3.Config",
                },
            },
        },
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "use_downstream_protocol_config": {"http_protocol_options": {}, "http2_protocol_options": {}},
            },
        },
    })
}

fn bridge(xds: &Path) -> Value {
    json!({
        "name": BRIDGE,
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            },
        },
        "load_assignment": {
            "cluster_name": BRIDGE,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": xds}}}}]}],
        },
    })
}
