//! What Envoy tells the bridge of the requests and streams that it judged inside a pod, and of those that it judged
//! while they were held.
//!
//! Invariant: neither headers nor bodies, and of a stream no byte but its server name.

use envoy_types::pb::envoy::config::accesslog::v3::AccessLog;
use envoy_types::pb::envoy::config::accesslog::v3::access_log::ConfigType;
use envoy_types::pb::envoy::config::core::v3::{ApiVersion, GrpcService, grpc_service};
use envoy_types::pb::envoy::extensions::access_loggers::grpc::v3::{
    CommonGrpcAccessLogConfig, HttpGrpcAccessLogConfig, TcpGrpcAccessLogConfig,
};
use envoy_types::pb::envoy::r#type::tracing::v3::CustomTag;
use envoy_types::pb::envoy::r#type::tracing::v3::custom_tag::Type;
use envoy_types::pb::google::protobuf::{Any, Duration};

use super::packed;
use crate::als::{DETAILS, ENDED_BY, HELD, SERVER_NAME};
use crate::bootstrap::BRIDGE;

/// How long records may wait for others.
const FLUSH: Duration = Duration {
    seconds: 0,
    nanos: 20_000_000,
};

/// Each request, within a moment of its end.
pub(super) fn requests() -> AccessLog {
    let config = HttpGrpcAccessLogConfig {
        common_config: Some(to_the_bridge("requests", Vec::new())),
        ..HttpGrpcAccessLogConfig::default()
    };
    log("envoy.access_loggers.http_grpc", packed(&config))
}

/// Each other stream, within a moment of its end.
pub(super) fn streams() -> AccessLog {
    of_streams(stream_tags())
}

/// Each question about a stream that is held, within a moment of its answer.
pub(super) fn held() -> AccessLog {
    let mut tags = stream_tags();
    tags.push(tag(HELD, "yes"));
    of_streams(tags)
}

fn stream_tags() -> Vec<CustomTag> {
    vec![
        tag(SERVER_NAME, "%REQUESTED_SERVER_NAME%"),
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

fn to_the_bridge(name: &str, custom_tags: Vec<CustomTag>) -> CommonGrpcAccessLogConfig {
    let service = GrpcService {
        target_specifier: Some(grpc_service::TargetSpecifier::EnvoyGrpc(
            grpc_service::EnvoyGrpc {
                cluster_name: BRIDGE.to_owned(),
                ..grpc_service::EnvoyGrpc::default()
            },
        )),
        ..GrpcService::default()
    };
    CommonGrpcAccessLogConfig {
        log_name: name.to_owned(),
        grpc_service: Some(service),
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
