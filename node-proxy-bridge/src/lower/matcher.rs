//! Texts, headers and addresses as Envoy's matchers.
//!
//! Invariant: a prefix or suffix is never empty and a regular expression never holds a policy's text.

use envoy_types::pb::envoy::config::core::v3::CidrRange;
use envoy_types::pb::envoy::config::route::v3::HeaderMatcher;
use envoy_types::pb::envoy::config::route::v3::header_matcher::HeaderMatchSpecifier;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{RegexMatcher, StringMatcher};
use envoy_types::pb::google::protobuf::UInt32Value;
use ipnet::{IpNet, Ipv6Net};
use thyra_policy_compiler::policy::StringMatch;

use super::{MAPPED_BITS, Why};

/// Something is there; `(?s)` since a claim may hold a line break, which RE2's dot doesn't match.
const PRESENT: &str = "(?s).+";

/// A text that is there and meets `value`.
pub(super) fn text(value: &StringMatch) -> Result<StringMatcher, Why> {
    let pattern = match value {
        StringMatch::Exact(text) => MatchPattern::Exact(text.clone()),
        // Envoy refuses an empty one; it matches any text that is there.
        StringMatch::Prefix(text) | StringMatch::Suffix(text) if text.is_empty() => regex("(?s).*"),
        StringMatch::Prefix(text) => MatchPattern::Prefix(text.clone()),
        StringMatch::Suffix(text) => MatchPattern::Suffix(text.clone()),
        StringMatch::Present => regex(PRESENT),
        StringMatch::Glob(text) => return Err(Why::Glob(text.clone())),
    };
    Ok(StringMatcher {
        ignore_case: false,
        match_pattern: Some(pattern),
    })
}

fn regex(text: &str) -> MatchPattern {
    MatchPattern::SafeRegex(RegexMatcher {
        regex: text.to_owned(),
        ..RegexMatcher::default()
    })
}

/// A header that is there and meets `value`; one that is there and empty is present.
pub(super) fn header(name: &str, value: &StringMatch, ignore_case: bool) -> Result<HeaderMatcher, Why> {
    let refused = |byte: u8| matches!(byte, b'\0' | b'\n' | b'\r');
    if name.is_empty() || name.bytes().any(refused) {
        return Err(Why::HeaderName(name.to_owned()));
    }
    let specifier = match value {
        StringMatch::Present => HeaderMatchSpecifier::PresentMatch(true),
        other => HeaderMatchSpecifier::StringMatch(StringMatcher {
            ignore_case,
            ..text(other)?
        }),
    };
    Ok(HeaderMatcher {
        name: name.to_owned(),
        header_match_specifier: Some(specifier),
        ..HeaderMatcher::default()
    })
}

/// A block, and for one of IPv4 the same block as IPv6 writes it: X-Forwarded-For is text, and Envoy doesn't take
/// `::ffff:192.0.2.1` for 192.0.2.1.
pub(super) fn blocks(block: &IpNet) -> Vec<CidrRange> {
    let range = |block: IpNet| CidrRange {
        address_prefix: block.network().to_string(),
        prefix_len: Some(UInt32Value {
            value: u32::from(block.prefix_len()),
        }),
    };
    let mapped = match block {
        IpNet::V4(v4) => {
            let address = v4.network().to_ipv6_mapped();
            Ipv6Net::new(address, MAPPED_BITS + v4.prefix_len()).ok()
        }
        IpNet::V6(_) => None,
    };
    let all = [Some(*block), mapped.map(IpNet::V6)];
    all.into_iter().flatten().map(range).collect()
}
