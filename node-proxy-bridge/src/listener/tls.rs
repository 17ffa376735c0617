//! The oracle for server names: bytes that come back mean yes, the end of the stream means no.

use std::path::Path;

use envoy_types::pb::envoy::config::listener::v3::filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::{Filter, FilterChain, Listener};
use envoy_types::pb::envoy::config::rbac::v3::Rbac;
use envoy_types::pb::envoy::extensions::filters::listener::tls_inspector::v3::TlsInspector;
use envoy_types::pb::envoy::extensions::filters::network::echo::v3::Echo;
use envoy_types::pb::envoy::extensions::filters::network::ext_authz::v3::ExtAuthz;
use envoy_types::pb::envoy::extensions::filters::network::rbac::v3::Rbac as NetworkRbac;
use envoy_types::pb::google::protobuf::Any;

use super::{FilterKind, Redact, discovered, listener_filter, on_socket, packed, told};
use crate::als::TOLD;
use crate::lower::StepKind;

/// The listener of a stream that is not HTTP, as far as its filters go.
#[must_use]
pub fn tls(name: &str, socket: &Path, shape: &[StepKind], redact: Redact) -> Listener {
    let mut filters: Vec<Filter> = judges(name, shape).collect();
    filters.push(Filter {
        name: "envoy.filters.network.echo".to_owned(),
        config_type: Some(ConfigType::TypedConfig(packed(&Echo {}))),
    });
    let inspector = listener_filter("envoy.filters.listener.tls_inspector", &TlsInspector::default());
    let chain = FilterChain {
        filters,
        ..FilterChain::default()
    };
    Listener {
        access_log: vec![told::held(redact)],
        ..on_socket(name, socket, vec![inspector], chain)
    }
}

/// The filters that judge a stream, in the order in which they ask.
pub(super) fn judges(name: &str, shape: &[StepKind]) -> impl Iterator<Item = Filter> {
    super::filters(name, shape).into_iter().map(|(name, kind)| {
        let config = match kind {
            // Of requests only (`lower`).
            FilterKind::Tokens | FilterKind::Rules => discovered::<NetworkRbac>(),
            FilterKind::Authorizer => discovered::<ExtAuthz>(),
        };
        Filter {
            name,
            config_type: Some(ConfigType::ConfigDiscovery(config)),
        }
    })
}

/// The rules once more, to be told of: of those that it enforces, Envoy says only which one refused.
pub(super) fn filter(rules: Option<Rbac>) -> Any {
    packed(&NetworkRbac {
        shadow_rules: rules.clone(),
        shadow_rules_stat_prefix: TOLD.to_owned(),
        rules,
        stat_prefix: "oracle".to_owned(),
        ..NetworkRbac::default()
    })
}
