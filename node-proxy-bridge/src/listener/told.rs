//! What Envoy tells the bridge of the requests and streams that it judged inside a pod, and of those that it judged
//! while they were held.
//!
//! Invariant: neither headers nor bodies, and of a stream no byte but its server name; what is redacted never leaves
//! Envoy.

use envoy_types::pb::envoy::config::accesslog::v3::AccessLog;
use envoy_types::pb::envoy::config::accesslog::v3::access_log::ConfigType;
use envoy_types::pb::envoy::config::core::v3::{ApiVersion, GrpcService, grpc_service};
use envoy_types::pb::envoy::extensions::access_loggers::grpc::v3::{
    CommonGrpcAccessLogConfig, TcpGrpcAccessLogConfig,
};
use envoy_types::pb::envoy::extensions::access_loggers::open_telemetry::v3::OpenTelemetryAccessLogConfig;
use envoy_types::pb::envoy::r#type::tracing::v3::CustomTag;
use envoy_types::pb::envoy::r#type::tracing::v3::custom_tag::Type;
use envoy_types::pb::google::protobuf::{Any, Duration, UInt32Value};
use envoy_types::pb::opentelemetry::proto::common::v1::AnyValue;
use envoy_types::pb::opentelemetry::proto::common::v1::any_value::Value;

use super::packed;
use crate::als::{DETAILS, ENDED_BY, HELD, SERVER_NAME};
use crate::bootstrap::{BRIDGE, RECORDS};
use crate::lower::StepKind;
use crate::otlp;

/// What stands where something is redacted.
pub const REDACTED: &str = "(redacted)";
/// How long the bridge may take for a batch; Envoy forgets it then.
const TIMEOUT: Duration = Duration { seconds: 5, nanos: 0 };
/// How long records may wait for others.
const FLUSH: Duration = Duration {
    seconds: 0,
    nanos: 20_000_000,
};

/// Bytes of records after which they wait no longer.
const BATCH: u32 = 128 << 10;

/// What Envoy leaves out of what it tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redact {
    /// What comes after the `?` of a path: tokens, session numbers and search words are there.
    pub query: bool,
    /// The whole path, its query with it.
    pub path: bool,
    /// The server name of a stream.
    pub server_name: bool,
}

impl Redact {
    /// Nothing is left out.
    pub const NOTHING: Self = Self {
        query: false,
        path: false,
        server_name: false,
    };

    /// How Envoy writes a path of at most `length` bytes.
    pub(crate) fn path_format(self, length: usize) -> String {
        match self {
            Self { path: true, .. } => REDACTED.to_owned(),
            Self { query: true, .. } => format!("%PATH(NQ:ORIG_OR_PATH):{length}%"),
            Self { .. } => format!("%PATH(WQ:ORIG_OR_PATH):{length}%"),
        }
    }
}

impl Default for Redact {
    fn default() -> Self {
        Self {
            query: true,
            ..Self::NOTHING
        }
    }
}

/// Each request, within a moment of its end; `shape`: the filters that it went through.
///
/// One line of text costs Envoy and the bridge a fraction of what `envoy.access_loggers.http_grpc` does, which writes
/// all that it knows of a request.
pub(super) fn requests(shape: &[StepKind], redact: Redact) -> AccessLog {
    let asks = shape.iter().filter(|kind| **kind == StepKind::Ask).count();
    let config = OpenTelemetryAccessLogConfig {
        log_name: "requests".to_owned(),
        grpc_service: Some(GrpcService {
            timeout: Some(TIMEOUT),
            ..service(RECORDS)
        }),
        disable_builtin_labels: true,
        body: Some(AnyValue {
            value: Some(Value::StringValue(otlp::format(asks, redact))),
        }),
        buffer_flush_interval: Some(FLUSH),
        buffer_size_bytes: Some(UInt32Value { value: BATCH }),
        ..OpenTelemetryAccessLogConfig::default()
    };
    log("envoy.access_loggers.open_telemetry", packed(&config))
}

/// Each other stream, within a moment of its end.
pub(super) fn streams(redact: Redact) -> AccessLog {
    of_streams(stream_tags(redact))
}

/// Each question about a stream that is held, within a moment of its answer.
pub(super) fn held(redact: Redact) -> AccessLog {
    let mut tags = stream_tags(redact);
    tags.push(tag(HELD, "yes"));
    of_streams(tags)
}

fn stream_tags(redact: Redact) -> Vec<CustomTag> {
    let name = if redact.server_name {
        REDACTED
    } else {
        "%REQUESTED_SERVER_NAME%"
    };
    vec![
        tag(SERVER_NAME, name),
        tag(ENDED_BY, "%CONNECTION_TERMINATION_DETAILS%"),
        tag(DETAILS, "%RESPONSE_CODE_DETAILS%"),
    ]
}

fn of_streams(tags: Vec<CustomTag>) -> AccessLog {
    let config = TcpGrpcAccessLogConfig {
        common_config: Some(to_the_bridge("streams", tags)),
    };
    log("envoy.access_loggers.tcp_grpc", packed(&config))
}

fn service(cluster: &str) -> GrpcService {
    GrpcService {
        target_specifier: Some(grpc_service::TargetSpecifier::EnvoyGrpc(
            grpc_service::EnvoyGrpc {
                cluster_name: cluster.to_owned(),
                ..grpc_service::EnvoyGrpc::default()
            },
        )),
        ..GrpcService::default()
    }
}

fn to_the_bridge(name: &str, custom_tags: Vec<CustomTag>) -> CommonGrpcAccessLogConfig {
    CommonGrpcAccessLogConfig {
        log_name: name.to_owned(),
        grpc_service: Some(service(BRIDGE)),
        transport_api_version: ApiVersion::V3.into(),
        buffer_flush_interval: Some(FLUSH),
        custom_tags,
        ..CommonGrpcAccessLogConfig::default()
    }
}

fn log(name: &str, config: Any) -> AccessLog {
    AccessLog {
        name: name.to_owned(),
        config_type: Some(ConfigType::TypedConfig(config)),
        ..AccessLog::default()
    }
}

fn tag(name: &str, format: &str) -> CustomTag {
    CustomTag {
        tag: name.to_owned(),
        r#type: Some(Type::Value(format.to_owned())),
    }
}
