//! CUSTOM rules to Envoy: for each provider a filter that finds what its rules match, and one that asks it of that.
//!
//! Invariant: a provider is asked of what a rule with it matches, and of nothing else; what matches and gets no answer
//! passes only where the provider says so (`failOpen`) and its service is known. How Istio lowers the same:
//! `pilot/pkg/security/authz/builder` (builder.go, extauthz.go), istio at a5f9585.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::http_uri::HttpUpstreamType;
use envoy_types::pb::envoy::config::core::v3::{ApiVersion, GrpcService, HeaderValue, HttpUri, grpc_service};
use envoy_types::pb::envoy::config::rbac::v3::{Rbac, rbac};
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::ext_authz::Services;
use envoy_types::pb::envoy::extensions::filters::http::ext_authz::v3::{
    AuthorizationRequest, AuthorizationResponse, BufferSettings, ExtAuthz, HttpService,
};
use envoy_types::pb::envoy::extensions::filters::http::rbac::v3::Rbac as HttpRbac;
use envoy_types::pb::envoy::extensions::filters::network::ext_authz::v3::ExtAuthz as NetworkExtAuthz;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac as NetworkRbac;
use envoy_types::pb::envoy::r#type::matcher::v3::metadata_matcher::{PathSegment, path_segment};
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::value_matcher::MatchPattern as ValuePattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{
    ListStringMatcher, MetadataMatcher, StringMatcher, ValueMatcher,
};
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use envoy_types::pb::google::protobuf::Duration as WireDuration;
use thyra_datapath_abi::tables::RuleRef;
use thyra_policy_compiler::authorizer::{Authorizer, BodyInCheck, Check, HttpCheck, Target};
use thyra_policy_compiler::residual::{Ask, Conditions};

use super::NotExpressible;
use crate::authorizer::cluster_name;

/// Where services are, by what providers say; what is missing is not known at all.
pub type Places = BTreeMap<Target, Vec<SocketAddr>>;

/// The metadata of a filter that matches requests.
pub(crate) const HTTP_RBAC: &str = "envoy.filters.http.rbac";
/// The same of streams.
pub(crate) const NETWORK_RBAC: &str = "envoy.filters.network.rbac";

/// What a filter calls the rule that matched, after its prefix.
const MATCHED: &str = "shadow_effective_policy_id";

/// A provider with all rules of one chain that ask it.
#[derive(Clone, Debug, PartialEq)]
pub struct Asks {
    /// As policies name it.
    pub name: Arc<str>,
    /// How it is asked.
    pub authorizer: Arc<Authorizer>,
    /// What it is asked of.
    pub rules: Rbac,
}

/// The rules that ask, by provider in the order of their names, as istiod sorts them; and those whose provider can't
/// be asked.
pub(super) type Sorted = (Vec<Asks>, Vec<(RuleRef, Arc<Conditions>)>);

pub(super) fn sorted<'a>(asks: impl Iterator<Item = &'a Ask<RuleRef>>) -> Result<Sorted, NotExpressible> {
    type Rules = Vec<(RuleRef, Arc<Conditions>)>;
    let mut mute = Vec::new();
    let mut by_provider: BTreeMap<&Arc<str>, (&Arc<Authorizer>, Rules)> = BTreeMap::new();
    for ask in asks {
        let rule = (ask.rule.clone(), Arc::clone(&ask.conditions));
        match &ask.provider.authorizer {
            Err(_) => mute.push(rule),
            Ok(authorizer) => {
                let asked = by_provider.entry(&ask.provider.name);
                asked.or_insert_with(|| (authorizer, Vec::new())).1.push(rule);
            }
        }
    }
    let asks = by_provider.into_iter().map(|(name, (authorizer, rules))| {
        Ok(Asks {
            name: Arc::clone(name),
            authorizer: Arc::clone(authorizer),
            rules: super::rbac(rbac::Action::Deny, &rules)?,
        })
    });
    Ok((asks.collect::<Result<_, _>>()?, mute))
}

/// In front of what the filter at `index` says of the rules: two filters share their metadata.
fn prefix(index: usize) -> String {
    format!("custom{index}_")
}

/// What the filter at `index` writes the name of a rule into that matched.
pub(crate) fn matched_field(index: usize) -> String {
    format!("{}{MATCHED}", prefix(index))
}

/// The number of the filter that wrote this name into the metadata: that of a rule that matched.
pub(crate) fn index_of(field: &str) -> Option<usize> {
    let rest = field.strip_prefix("custom")?;
    rest.strip_suffix(MATCHED)?.strip_suffix('_')?.parse().ok()
}

/// Finds what the rules match, and refuses nothing.
pub(crate) fn requests(index: usize, asks: &Asks) -> HttpRbac {
    HttpRbac {
        shadow_rules: Some(asks.rules.clone()),
        shadow_rules_stat_prefix: prefix(index),
        ..HttpRbac::default()
    }
}

/// The same of streams.
pub(crate) fn streams(index: usize, asks: &Asks) -> NetworkRbac {
    NetworkRbac {
        shadow_rules: Some(asks.rules.clone()),
        shadow_rules_stat_prefix: prefix(index),
        stat_prefix: "oracle".to_owned(),
        ..NetworkRbac::default()
    }
}

/// Only what the filter before it found: no client writes metadata.
fn found(rbac: &str, index: usize) -> MetadataMatcher {
    let field = format!("{}shadow_engine_result", prefix(index));
    MetadataMatcher {
        filter: rbac.to_owned(),
        path: vec![PathSegment {
            segment: Some(path_segment::Segment::Key(field)),
        }],
        value: Some(ValueMatcher {
            match_pattern: Some(ValuePattern::StringMatch(StringMatcher {
                match_pattern: Some(MatchPattern::Exact("denied".to_owned())),
                ..StringMatcher::default()
            })),
        }),
        ..MetadataMatcher::default()
    }
}

/// Asks of requests. `known`: the service is; else nobody passes whom it is asked of.
pub(crate) fn of_requests(index: usize, authorizer: &Authorizer, known: bool) -> ExtAuthz {
    let mut filter = ExtAuthz {
        failure_mode_allow: authorizer.fail_open && known,
        status_on_error: Some(HttpStatus {
            code: authorizer.status_on_error.into(),
        }),
        with_request_body: authorizer.body.map(body),
        filter_enabled_metadata: Some(found(HTTP_RBAC, index)),
        transport_api_version: ApiVersion::V3.into(),
        ..ExtAuthz::default()
    };
    filter.services = Some(match &authorizer.check {
        Check::Grpc => Services::GrpcService(grpc(authorizer)),
        Check::Http(check) => {
            filter.allowed_headers = names(&check.request_headers);
            Services::HttpService(http(authorizer, check))
        }
    });
    filter
}

/// Asks of streams: over gRPC, or nobody passes.
pub(crate) fn of_streams(index: usize, authorizer: &Authorizer, known: bool) -> NetworkExtAuthz {
    NetworkExtAuthz {
        stat_prefix: "custom".to_owned(),
        grpc_service: Some(grpc(authorizer)),
        failure_mode_allow: authorizer.fail_open && known,
        transport_api_version: ApiVersion::V3.into(),
        filter_enabled_metadata: Some(found(NETWORK_RBAC, index)),
        ..NetworkExtAuthz::default()
    }
}

fn grpc(authorizer: &Authorizer) -> GrpcService {
    GrpcService {
        timeout: Some(wire(authorizer.timeout)),
        target_specifier: Some(grpc_service::TargetSpecifier::EnvoyGrpc(
            grpc_service::EnvoyGrpc {
                cluster_name: cluster_name(authorizer),
                authority: authorizer.target.host.clone(),
                ..grpc_service::EnvoyGrpc::default()
            },
        )),
        ..GrpcService::default()
    }
}

fn http(authorizer: &Authorizer, check: &HttpCheck) -> HttpService {
    let HttpCheck {
        path_prefix,
        request_headers: _,
        added_headers,
        to_upstream,
        to_downstream_on_allow,
        to_downstream_on_deny,
    } = check;
    let added = added_headers.iter().map(|(key, value)| HeaderValue {
        key: key.clone(),
        value: value.clone(),
        ..HeaderValue::default()
    });
    HttpService {
        server_uri: Some(HttpUri {
            // Envoy wants one and reads the cluster alone.
            uri: format!("http://{}", authorizer.target.host),
            timeout: Some(wire(authorizer.timeout)),
            http_upstream_type: Some(HttpUpstreamType::Cluster(cluster_name(authorizer))),
        }),
        path_prefix: path_prefix.clone(),
        authorization_request: Some(AuthorizationRequest {
            headers_to_add: added.collect(),
            ..AuthorizationRequest::default()
        }),
        authorization_response: Some(AuthorizationResponse {
            allowed_upstream_headers: names(to_upstream),
            allowed_client_headers: names(to_downstream_on_deny),
            allowed_client_headers_on_success: names(to_downstream_on_allow),
            ..AuthorizationResponse::default()
        }),
        ..HttpService::default()
    }
}

fn body(body: BodyInCheck) -> BufferSettings {
    BufferSettings {
        max_request_bytes: body.max_bytes,
        allow_partial_message: body.partial,
        pack_as_bytes: body.as_bytes,
    }
}

/// None where none is named: Envoy's own choice stands then.
fn names(names: &[String]) -> Option<ListStringMatcher> {
    let patterns = names.iter().map(|name| {
        let pattern = if let Some(end) = name.strip_prefix('*') {
            MatchPattern::Suffix(end.to_owned())
        } else if let Some(start) = name.strip_suffix('*') {
            MatchPattern::Prefix(start.to_owned())
        } else {
            MatchPattern::Exact(name.clone())
        };
        StringMatcher {
            match_pattern: Some(pattern),
            ignore_case: true,
        }
    });
    (!names.is_empty()).then(|| ListStringMatcher {
        patterns: patterns.collect(),
    })
}

fn wire(duration: Duration) -> WireDuration {
    WireDuration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}
