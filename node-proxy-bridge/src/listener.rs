//! Envoy's listeners for residuals: oracles on Unix sockets, which answer whether a stream may pass and have nothing
//! behind them, and listeners inside pods (`inline`), which go on to the pod.
//!
//! Invariant: a listener says what its filters are, never what their rules are; the rules come as extension
//! configurations (`rules`), so that a change of them leaves the listener and its connections alone.
//!
//! Whoever asks an oracle writes a PROXY header first: it carries the source address that `remoteIpBlocks` is matched
//! against, since a Unix socket has none. Without one Envoy closes the connection.

pub mod budget;
mod http;
mod inline;
mod tls;
mod told;

use std::path::Path;

use envoy_types::pb::envoy::config::core::v3::config_source::ConfigSourceSpecifier;
use envoy_types::pb::envoy::config::core::v3::{
    Address, AggregatedConfigSource, ApiVersion, ConfigSource, ExtensionConfigSource, Pipe,
    TypedExtensionConfig, address,
};
use envoy_types::pb::envoy::config::listener::v3::listener_filter::ConfigType;
use envoy_types::pb::envoy::config::listener::v3::{FilterChain, Listener, ListenerFilter};
use envoy_types::pb::envoy::extensions::filters::listener::proxy_protocol::v3::ProxyProtocol;
use envoy_types::pb::google::protobuf::{Any, Duration};
use envoy_types::util::pack_any;
use prost::{Message, Name};
use thyra_policy_compiler::tokens::Tokens;

pub use self::http::{HttpOptions, REASON_HEADER, http};
pub use self::inline::{Place, Shape, inline};
pub use self::tls::tls;
use crate::lower::{self, Chain, KeySets, StepKind};

/// Only the owner connects: Envoy's user, and root.
const SOCKET_MODE: u32 = 0o600;
/// How long a stream may take to say what it is.
const INSPECTION: Duration = Duration { seconds: 4, nanos: 0 };
/// How long a listener waits for its rules, and all others with it while Envoy starts; without them it refuses.
const RULES_TIMEOUT: Duration = Duration { seconds: 2, nanos: 0 };

/// The extension configurations of a listener's filters, by name.
#[must_use]
pub fn rules(listener: &str, reading: Reading, chain: &Chain) -> Vec<TypedExtensionConfig> {
    let steps = chain.steps.iter().enumerate();
    steps
        .map(|(index, step)| TypedExtensionConfig {
            name: rules_name(listener, index),
            typed_config: Some(match reading {
                Reading::Http => http::filter(step.rules.clone()),
                Reading::Stream => tls::filter(step.rules.clone()),
            }),
        })
        .collect()
}

/// The filter for tokens, by name.
#[must_use]
pub fn tokens(listener: &str, tokens: &Tokens, fetched: &KeySets) -> TypedExtensionConfig {
    TypedExtensionConfig {
        name: tokens_name(listener),
        typed_config: Some(packed(&lower::tokens(tokens, fetched))),
    }
}

/// How a stream is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reading {
    /// As HTTP: a request decides.
    Http,
    /// As anything else: the server name of its ClientHello decides.
    Stream,
}

/// Name of the rules of the filter at `index`.
#[must_use]
pub fn rules_name(listener: &str, index: usize) -> String {
    format!("{listener}/{index}")
}

/// Name of the filter for tokens.
#[must_use]
pub fn tokens_name(listener: &str) -> String {
    format!("{listener}/tokens")
}

/// Where a filter's rules come from: asked for by name over the same stream as the listeners.
fn discovered<T: Name>() -> ExtensionConfigSource {
    ExtensionConfigSource {
        config_source: Some(ConfigSource {
            resource_api_version: ApiVersion::V3.into(),
            initial_fetch_timeout: Some(RULES_TIMEOUT),
            config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
            ..ConfigSource::default()
        }),
        type_urls: vec![T::type_url()],
        ..ExtensionConfigSource::default()
    }
}

/// Names of the rules of the filters that have some.
fn names(listener: &str, shape: &[StepKind]) -> Vec<String> {
    let rules = shape.iter().filter(|kind| **kind != StepKind::Tokens);
    (0..rules.count())
        .map(|index| rules_name(listener, index))
        .collect()
}

fn on_socket(name: &str, socket: &Path, filters: Vec<ListenerFilter>, chain: FilterChain) -> Listener {
    let pipe = Pipe {
        path: socket.to_string_lossy().into_owned(),
        mode: SOCKET_MODE,
    };
    let mut listener_filters = vec![listener_filter(
        "envoy.filters.listener.proxy_protocol",
        &ProxyProtocol::default(),
    )];
    listener_filters.extend(filters);
    Listener {
        name: name.to_owned(),
        // All oracles count together: names come and go.
        stat_prefix: "oracle".to_owned(),
        address: Some(Address {
            address: Some(address::Address::Pipe(pipe)),
        }),
        listener_filters,
        listener_filters_timeout: Some(INSPECTION),
        filter_chains: vec![chain],
        ..Listener::default()
    }
}

fn listener_filter<T: Name + Message + Clone>(name: &str, config: &T) -> ListenerFilter {
    ListenerFilter {
        name: name.to_owned(),
        config_type: Some(ConfigType::TypedConfig(packed(config))),
        ..ListenerFilter::default()
    }
}

fn packed<T: Name + Message + Clone>(message: &T) -> Any {
    pack_any(message.clone())
}
