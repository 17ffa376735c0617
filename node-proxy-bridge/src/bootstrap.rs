//! What Envoy is started with: where its administration is and whom it asks for everything else.
//!
//! Invariant: no TCP port is opened, and nothing is sent anywhere but to the bridge's socket, to the pods that its
//! listeners are in, and to the authorizers that the bridge names.

use std::path::Path;

use serde_json::{Value, json};

/// The cluster of the bridge's own socket.
pub const BRIDGE: &str = "thyra";
/// The same socket, for what is told of requests: it has a bound of its own.
pub const RECORDS: &str = "thyra-records";
/// Batches of records that are under way at a time; more are dropped: a bridge that stands still fills no memory.
const MAX_BATCHES: u32 = 64;
/// Connections that Envoy holds at most; it refuses more by itself.
pub const MAX_CONNECTIONS: u32 = 50_000;

/// How long a stream or connection may stand still when memory is at its end.
const SHORTEST_IDLE: &str = "5s";
/// Streams that hold less than two to this power of bytes are never reset for memory's sake.
const HOARD_POWER: u32 = 14;

/// Envoy's bootstrap configuration, as JSON that Envoy reads; `heap` is what it may allocate, bytes.
#[must_use]
pub fn bootstrap(node: &str, xds: &Path, admin: &Path, heap: u64) -> Value {
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
        "static_resources": {"clusters": [bridge(BRIDGE, xds), records(xds)]},
        "overload_manager": overload_manager(heap),
    })
}

/// When memory runs short the streams that hold the most of it are reset first; only then is everybody refused.
fn overload_manager(heap: u64) -> Value {
    const CONNECTIONS: &str = "envoy.resource_monitors.global_downstream_max_connections";
    const HEAP: &str = "envoy.resource_monitors.fixed_heap";
    let action = |name: &str, trigger: Value| {
        json!({
            "name": format!("envoy.overload_actions.{name}"),
            "triggers": [trigger],
        })
    };
    json!({
        // It resets at most 50 streams of each worker at a time.
        "refresh_interval": "0.05s",
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": HOARD_POWER},
        "resource_monitors": [
            {
                "name": CONNECTIONS,
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.resource_monitors.\
                              downstream_connections.v3.DownstreamConnectionsConfig",
                    "max_active_downstream_connections": MAX_CONNECTIONS,
                },
            },
            {
                "name": HEAP,
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.resource_monitors.\
                              fixed_heap.v3.FixedHeapConfig",
                    "max_heap_size_bytes": heap,
                },
            },
        ],
        "actions": [
            action("shrink_heap", json!({"name": HEAP, "threshold": {"value": 0.7}})),
            action("reset_high_memory_stream", json!({
                "name": HEAP,
                "scaled": {"scaling_threshold": 0.7, "saturation_threshold": 0.85},
            })),
            // What stands still for so long holds its memory for nothing, whoever it is.
            json!({
                "name": "envoy.overload_actions.reduce_timeouts",
                "triggers": [{
                    "name": HEAP,
                    "scaled": {"scaling_threshold": 0.85, "saturation_threshold": 0.95},
                }],
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.config.overload.v3.ScaleTimersOverloadActionConfig",
                    "timer_scale_factors": [
                        {"timer": "HTTP_DOWNSTREAM_CONNECTION_IDLE", "min_timeout": SHORTEST_IDLE},
                        {"timer": "HTTP_DOWNSTREAM_STREAM_IDLE", "min_timeout": SHORTEST_IDLE},
                    ],
                },
            }),
            action("stop_accepting_requests", json!({"name": HEAP, "threshold": {"value": 0.95}})),
        ],
    })
}

fn records(xds: &Path) -> Value {
    let mut cluster = bridge(RECORDS, xds);
    cluster["circuit_breakers"] = json!({
        "thresholds": [{"max_requests": MAX_BATCHES, "max_pending_requests": MAX_BATCHES}],
    });
    cluster
}

fn bridge(name: &str, xds: &Path) -> Value {
    json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            },
        },
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": xds}}}}]}],
        },
    })
}
