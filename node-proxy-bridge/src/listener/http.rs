//! The oracle for HTTP: 200 means yes; everything else means no and is the answer for the client.
//!
//! Invariant: what decides over a request before RBAC sees it is as in a sidecar's inbound listener (istio's
//! `pilot/pkg/networking/core/listener_builder.go`, `buildHTTPConnectionManager`): normalisation of paths,
//! X-Forwarded-For, the tokens' filter and then the authorizers' before RBAC.

use std::num::NonZeroU32;
use std::path::Path;

use envoy_types::pb::envoy::config::accesslog::v3::access_log_filter::FilterSpecifier;
use envoy_types::pb::envoy::config::accesslog::v3::{
    AccessLogFilter, ComparisonFilter, StatusCodeFilter, comparison_filter,
};
use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3::{HeaderValue, HeaderValueOption, RuntimeUInt32};
use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType as NetworkConfig;
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, Listener};
use envoy_types::pb::envoy::config::rbac::v3::Rbac;
use envoy_types::pb::envoy::config::route::v3::{
    DirectResponseAction, Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost, route,
    route_action, route_match,
};
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::ExtAuthz;
use envoy_types::pb::envoy::extensions::filters::http::jwt_authn::v3::JwtAuthentication;
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac as HttpRbac;
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as manager_v3;
use envoy_types::pb::google::protobuf::{Any, BoolValue, Duration};
use manager_v3::http_connection_manager::{
    CodecType, PathWithEscapedSlashesAction, RouteSpecifier, ServerHeaderTransformation, UpgradeConfig,
};
use manager_v3::http_filter::ConfigType;
use manager_v3::{HttpConnectionManager, HttpFilter, LocalReplyConfig, ResponseMapper};
use thyra_policy_compiler::traffic::PathNormalization;

use super::told::Redact;
use super::{FilterKind, budget, discovered, first, on_socket, packed, told};
use crate::lower::StepKind;

/// What Envoy's answer says of its reason, when asked to: a response header that never goes to a client.
pub const REASON_HEADER: &str = "thyra-reason";
/// How long a client may take for its headers.
const HEADERS_TIMEOUT: Duration = Duration {
    seconds: 10,
    nanos: 0,
};

/// How long a stream may stand still; it is cut to seconds when memory is at its end (`bootstrap`). A sidecar knows no
/// such limit.
const STANDSTILL: Duration = Duration {
    seconds: 24 * 3600,
    nanos: 0,
};

/// What every HTTP listener of a node has in common.
#[derive(Clone, Debug, PartialEq)]
pub struct HttpOptions {
    /// The mesh's way with paths.
    pub paths: PathNormalization,
    /// Answers carry `REASON_HEADER`: the rule that allowed, or Envoy's own words for a refusal.
    pub reasons: bool,
    /// Requests in a second that each listener inside a pod passes on; more get 429. None: as many as come.
    pub requests_per_second: Option<NonZeroU32>,
    /// Requests and other streams of a pod that are under way at a time; more get 503.
    pub requests_at_once: NonZeroU32,
    /// What of a request or stream is not told to the bridge.
    pub redact: Redact,
    /// Of oracles: who asks gives the bytes on as they are (`first`).
    pub as_it_is: bool,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            paths: PathNormalization::default(),
            reasons: false,
            requests_per_second: None,
            requests_at_once: budget::REQUESTS_AT_ONCE,
            redact: Redact::default(),
            as_it_is: false,
        }
    }
}

/// The listener of HTTP requests, as far as its filters go.
#[must_use]
pub fn http(name: &str, socket: &Path, shape: &[StepKind], options: &HttpOptions) -> Listener {
    let mut manager = manager(name, shape, options);
    if options.as_it_is {
        first::only(&mut manager, options.paths);
    }
    let filter = Filter {
        name: "envoy.filters.network.http_connection_manager".to_owned(),
        config_type: Some(NetworkConfig::TypedConfig(packed(&manager))),
    };
    let chain = FilterChain {
        filters: vec![filter],
        ..FilterChain::default()
    };
    on_socket(name, socket, Vec::new(), chain)
}

pub(super) fn filter(rules: Option<Rbac>) -> Any {
    packed(&HttpRbac {
        rules,
        ..HttpRbac::default()
    })
}

/// The manager of a listener inside a pod; as a sidecar's inbound one (`buildInboundHttpOptions`).
pub(super) fn to_pod(
    name: &str,
    shape: &[StepKind],
    cluster: &str,
    options: &HttpOptions,
) -> HttpConnectionManager {
    let mut asks = manager(name, shape, options);
    if let Some(per_second) = options.requests_per_second {
        let limit = ConfigType::TypedConfig(budget::requests(per_second));
        // Before all others: what is too much costs no judgement.
        asks.http_filters
            .insert(0, named("envoy.filters.http.local_ratelimit", limit));
    }
    let route = Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(route_match::PathSpecifier::Prefix("/".to_owned())),
            ..RouteMatch::default()
        }),
        action: Some(route::Action::Route(RouteAction {
            cluster_specifier: Some(route_action::ClusterSpecifier::Cluster(cluster.to_owned())),
            timeout: Some(Duration::default()),
            ..RouteAction::default()
        })),
        ..Route::default()
    };
    HttpConnectionManager {
        stat_prefix: "pod".to_owned(),
        access_log: vec![told::requests(shape, options.redact)],
        // The pod's answer is its own.
        server_header_transformation: ServerHeaderTransformation::PassThrough.into(),
        proxy_100_continue: true,
        stream_idle_timeout: Some(STANDSTILL),
        delayed_close_timeout: None,
        route_specifier: Some(RouteSpecifier::RouteConfig(RouteConfiguration {
            name: "pod".to_owned(),
            virtual_hosts: vec![VirtualHost {
                name: "any".to_owned(),
                domains: vec!["*".to_owned()],
                routes: vec![route],
                ..VirtualHost::default()
            }],
            ..RouteConfiguration::default()
        })),
        ..asks
    }
}

fn manager(name: &str, shape: &[StepKind], options: &HttpOptions) -> HttpConnectionManager {
    let yes = |value: bool| Some(BoolValue { value });
    HttpConnectionManager {
        codec_type: CodecType::Auto.into(),
        http2_protocol_options: Some(budget::http2()),
        stat_prefix: "oracle".to_owned(),
        http_filters: filters(name, shape),
        // The last address of X-Forwarded-For, as a sidecar takes it.
        use_remote_address: yes(false),
        normalize_path: yes(options.paths != PathNormalization::None),
        merge_slashes: options.paths >= PathNormalization::MergeSlashes,
        path_with_escaped_slashes_action: escaped_slashes(options.paths).into(),
        upgrade_configs: vec![UpgradeConfig {
            upgrade_type: "websocket".to_owned(),
            ..UpgradeConfig::default()
        }],
        request_headers_timeout: Some(HEADERS_TIMEOUT),
        // An answer has no peer that could miss it: who asks closes.
        delayed_close_timeout: Some(Duration::default()),
        local_reply_config: options.reasons.then(refusals_say_why),
        route_specifier: Some(RouteSpecifier::RouteConfig(everything_is_fine(options.reasons))),
        ..HttpConnectionManager::default()
    }
}

fn escaped_slashes(paths: PathNormalization) -> PathWithEscapedSlashesAction {
    if paths == PathNormalization::DecodeAndMergeSlashes {
        PathWithEscapedSlashesAction::UnescapeAndForward
    } else {
        PathWithEscapedSlashesAction::KeepUnchanged
    }
}

/// Tokens before authorizers before rules before the way on.
fn filters(name: &str, shape: &[StepKind]) -> Vec<HttpFilter> {
    let asking = super::filters(name, shape).into_iter().map(|(name, kind)| {
        let config = match kind {
            FilterKind::Tokens => discovered::<JwtAuthentication>(),
            FilterKind::Rules => discovered::<HttpRbac>(),
            FilterKind::Authorizer => discovered::<ExtAuthz>(),
        };
        named(&name, ConfigType::ConfigDiscovery(config))
    });
    let mut filters: Vec<HttpFilter> = asking.collect();
    let router = Router {
        suppress_envoy_headers: true,
        ..Router::default()
    };
    let config = ConfigType::TypedConfig(packed(&router));
    filters.push(named("envoy.filters.http.router", config));
    filters
}

pub(super) fn named(name: &str, config: ConfigType) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(config),
        ..HttpFilter::default()
    }
}

/// Every path but CONNECT's, which has none: that one ends as 404.
fn everything_is_fine(reasons: bool) -> RouteConfiguration {
    let fine = Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(route_match::PathSpecifier::Prefix("/".to_owned())),
            ..RouteMatch::default()
        }),
        action: Some(route::Action::DirectResponse(DirectResponseAction {
            status: 200,
            ..DirectResponseAction::default()
        })),
        ..Route::default()
    };
    let named = "%DYNAMIC_METADATA(envoy.filters.http.rbac:enforced_effective_policy_id)%";
    RouteConfiguration {
        name: "oracle".to_owned(),
        virtual_hosts: vec![VirtualHost {
            name: "any".to_owned(),
            domains: vec!["*".to_owned()],
            routes: vec![fine],
            response_headers_to_add: reasons.then(|| reason(named)).into_iter().collect(),
            ..VirtualHost::default()
        }],
        ..RouteConfiguration::default()
    }
}

fn reason(format: &str) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue {
            key: REASON_HEADER.to_owned(),
            value: format.to_owned(),
            ..HeaderValue::default()
        }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
        ..HeaderValueOption::default()
    }
}

/// `rbac_access_denied_matched_policy[00000:shop/no-admin#0]` and the like.
fn refusals_say_why() -> LocalReplyConfig {
    let refused = ComparisonFilter {
        op: comparison_filter::Op::Ge.into(),
        value: Some(RuntimeUInt32 {
            default_value: 400,
            runtime_key: "thyra.refused".to_owned(),
        }),
    };
    LocalReplyConfig {
        mappers: vec![ResponseMapper {
            filter: Some(AccessLogFilter {
                filter_specifier: Some(FilterSpecifier::StatusCodeFilter(StatusCodeFilter {
                    comparison: Some(refused),
                })),
            }),
            headers_to_add: vec![reason("%RESPONSE_CODE_DETAILS%")],
            ..ResponseMapper::default()
        }],
        ..LocalReplyConfig::default()
    }
}
