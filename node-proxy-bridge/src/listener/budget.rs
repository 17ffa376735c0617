//! What a connection may take of Envoy, which all pods of a node share.
//!
//! Invariant: what a connection makes Envoy keep is bounded by these constants, whatever the client sends or the pod
//! answers; how many connections a pod has is bounded in the kernel (`thyra_datapath_abi::limits::L7_BUDGET`).
//! `docs/design/0011-neighbours.md` has the numbers.

use std::num::NonZeroU32;

use envoy_types::pb::envoy::config::core::v3::{Http2ProtocolOptions, RuntimeFractionalPercent};
use envoy_types::pb::envoy::extensions::filters::http::local_ratelimit::v3::LocalRateLimit;
use envoy_types::pb::envoy::r#type::v3::{FractionalPercent, TokenBucket};
use envoy_types::pb::google::protobuf::{Any, Duration, UInt32Value};

use super::packed;

/// Bytes of each buffer of a connection, to the client and to the pod, above which Envoy stops reading; its default is
/// 1 MiB.
pub const BUFFER: u32 = 64 << 10;
/// Bytes that a stream of HTTP/2 may send before Envoy has passed them on; its default is 16 MiB.
pub const STREAM_WINDOW: u32 = 64 << 10;
/// The same of all streams of a connection together; its default is 24 MiB.
pub const CONNECTION_WINDOW: u32 = 1 << 20;
/// Streams of a connection at a time.
pub const STREAMS: u32 = 100;
/// Requests and other streams of a pod at a time where nobody says otherwise.
pub const REQUESTS_AT_ONCE: NonZeroU32 = NonZeroU32::new(4096).expect("not zero");
/// How often the bucket of requests is filled; Envoy takes no shorter time.
const FILL: Duration = Duration {
    seconds: 0,
    nanos: 50_000_000,
};
const FILLS_PER_SECOND: u32 = 20;

/// How HTTP/2 is spoken, with clients and with pods.
pub(crate) fn http2() -> Http2ProtocolOptions {
    let value = |value: u32| Some(UInt32Value { value });
    Http2ProtocolOptions {
        max_concurrent_streams: value(STREAMS),
        initial_stream_window_size: value(STREAM_WINDOW),
        initial_connection_window_size: value(CONNECTION_WINDOW),
        ..Http2ProtocolOptions::default()
    }
}

/// The filter that answers 429 to more requests than that in a second, of a whole second's worth at once.
pub(super) fn requests(per_second: NonZeroU32) -> Any {
    let always = || {
        Some(RuntimeFractionalPercent {
            default_value: Some(FractionalPercent {
                numerator: 100,
                ..FractionalPercent::default()
            }),
            ..RuntimeFractionalPercent::default()
        })
    };
    packed(&LocalRateLimit {
        stat_prefix: "pod".to_owned(),
        token_bucket: Some(TokenBucket {
            max_tokens: per_second.get(),
            tokens_per_fill: Some(UInt32Value {
                value: per_second.get().div_ceil(FILLS_PER_SECOND),
            }),
            fill_interval: Some(FILL),
        }),
        filter_enabled: always(),
        filter_enforced: always(),
        ..LocalRateLimit::default()
    })
}
