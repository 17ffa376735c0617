//! Envoy's listeners for residuals: oracles on Unix sockets, which answer whether a stream may pass and have nothing
//! behind them, and listeners inside pods (`inline`), which go on to the pod.
//!
//! Invariant: a listener says what its filters are, never what their rules are; the rules come as extension
//! configurations (`rules`), so that a change of them leaves the listener and its connections alone.
//!
//! Whoever asks an oracle writes a PROXY header first: it carries the source address that `remoteIpBlocks` is matched
//! against, since a Unix socket has none. Without one Envoy closes the connection.

pub mod budget;
mod first;
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

pub use self::first::{ALLOWED, ALLOWED_HEADER};
pub use self::http::{HttpOptions, REASON_HEADER, http};
pub use self::inline::{Place, Shape, inline};
pub use self::tls::tls;
pub use self::told::{REDACTED, Redact};
use crate::hold::PATIENCE;
use crate::lower::{self, Chain, KeySets, Places, StepKind, custom};

/// Only the owner connects: Envoy's user, and root.
const SOCKET_MODE: u32 = 0o600;
/// How long a stream may take to say what it is.
const INSPECTION: Duration = Duration { seconds: 4, nanos: 0 };
/// The same where an oracle is asked: whoever asks gives up earlier, and tells why.
const ASKING: Duration = Duration { seconds: 6, nanos: 0 };
const _: () = assert!(ASKING.seconds.unsigned_abs() > PATIENCE.as_secs());
/// How long a listener waits for its rules, and all others with it while Envoy starts; without them it refuses.
const RULES_TIMEOUT: Duration = Duration { seconds: 2, nanos: 0 };

/// The extension configurations of a listener's filters, by name.
#[must_use]
pub fn rules(listener: &str, reading: Reading, chain: &Chain) -> Vec<TypedExtensionConfig> {
    let steps = chain.steps.iter().enumerate();
    let steps = steps.map(|(index, step)| TypedExtensionConfig {
        name: rules_name(listener, index),
        typed_config: Some(match reading {
            Reading::Http => http::filter(step.rules.clone()),
            Reading::Stream => tls::filter(step.rules.clone()),
        }),
    });
    let matching = chain.asks.iter().enumerate();
    let matching = matching.map(|(index, asks)| TypedExtensionConfig {
        name: matching_name(listener, index),
        typed_config: Some(match reading {
            Reading::Http => packed(&custom::requests(index, asks)),
            Reading::Stream => packed(&custom::streams(index, asks)),
        }),
    });
    steps.chain(matching).collect()
}

/// The filters that ask authorizers, each with whether its service is known.
#[must_use]
pub fn authorizers(
    listener: &str,
    reading: Reading,
    chain: &Chain,
    places: &Places,
) -> Vec<(TypedExtensionConfig, bool)> {
    let asks = chain.asks.iter().enumerate();
    asks.map(|(index, asks)| {
        let authorizer = &asks.authorizer;
        let known = places.contains_key(&authorizer.target);
        let filter = TypedExtensionConfig {
            name: authorizer_name(listener, index),
            typed_config: Some(match reading {
                Reading::Http => packed(&custom::of_requests(index, authorizer, known)),
                Reading::Stream => packed(&custom::of_streams(index, authorizer, known)),
            }),
        };
        (filter, known)
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

/// Name of the filter that finds what the authorizer at `index` is asked of.
#[must_use]
pub fn matching_name(listener: &str, index: usize) -> String {
    format!("{listener}/custom/{index}/rules")
}

/// Name of the filter that asks the authorizer at `index`.
#[must_use]
pub fn authorizer_name(listener: &str, index: usize) -> String {
    format!("{listener}/custom/{index}/authorizer")
}

/// Where a filter's rules come from: asked for by name over the same stream as the listeners.
fn discovered<T: Name>() -> ExtensionConfigSource {
    ExtensionConfigSource {
        config_source: Some(ads()),
        type_urls: vec![T::type_url()],
        ..ExtensionConfigSource::default()
    }
}

/// By the same stream as everything else.
pub(crate) fn ads() -> ConfigSource {
    ConfigSource {
        resource_api_version: ApiVersion::V3.into(),
        initial_fetch_timeout: Some(RULES_TIMEOUT),
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        ..ConfigSource::default()
    }
}

/// What a filter is, to Envoy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FilterKind {
    Tokens,
    Rules,
    Authorizer,
}

/// Names and kinds of the filters in the order in which they ask.
fn filters(listener: &str, shape: &[StepKind]) -> Vec<(String, FilterKind)> {
    let (mut asks, mut steps) = (0, 0);
    let mut filters = Vec::new();
    for kind in shape {
        match kind {
            StepKind::Tokens => filters.push((tokens_name(listener), FilterKind::Tokens)),
            StepKind::Ask => {
                filters.push((matching_name(listener, asks), FilterKind::Rules));
                filters.push((authorizer_name(listener, asks), FilterKind::Authorizer));
                asks += 1;
            }
            StepKind::Deny | StepKind::Allow => {
                filters.push((rules_name(listener, steps), FilterKind::Rules));
                steps += 1;
            }
        }
    }
    filters
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
        listener_filters_timeout: Some(ASKING),
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
