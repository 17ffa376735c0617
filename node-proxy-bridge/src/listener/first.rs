//! The oracle for the first request of a connection whose bytes the pod gets as they are.
//!
//! Invariant: what is allowed needs no normalisation: the path that was judged is the one that the pod gets. Only the
//! answer to an allowed request carries the mark; the status doesn't say, since to gRPC a refusal is a 200 as well.

use envoy_types::pb::envoy::config::core::v3::header_value_option::HeaderAppendAction;
use envoy_types::pb::envoy::config::core::v3::{HeaderValue, HeaderValueOption};
use envoy_types::pb::envoy::config::rbac::v3::{
    Permission, Policy, Principal, Rbac, permission, principal, rbac,
};
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as manager_v3;
use envoy_types::pb::envoy::r#type::matcher::v3::path_matcher::Rule as PathRule;
use envoy_types::pb::envoy::r#type::matcher::v3::string_matcher::MatchPattern;
use envoy_types::pb::envoy::r#type::matcher::v3::{PathMatcher, RegexMatcher, StringMatcher};
use envoy_types::pb::google::protobuf::BoolValue;
use manager_v3::HttpConnectionManager;
use manager_v3::http_connection_manager::{PathWithEscapedSlashesAction, RouteSpecifier};
use manager_v3::http_filter::ConfigType;
use thyra_policy_compiler::traffic::PathNormalization;

use super::http;

/// The header of an answer to an allowed request.
pub const ALLOWED_HEADER: &str = "thyra-verdict";
/// Its value. HPACK leaves it as it is: most of its letters are longer in Huffman's code (RFC 7541 5.2, B).
pub const ALLOWED: &str = "<{|yes|}>";

/// What a path is made of (RFC 3986 3.3); other bytes are escaped when it is normalised
/// (`thyra_policy_compiler::traffic::path`). Expressions of RE2's, each of the whole path, and each small: Envoy takes
/// no program of more than 100 steps.
const PATH: &str = "/[A-Za-z0-9_~!$&'()*+,=:@\\-.;/%]*";
/// `.` or `..` for a segment, be it with parameters.
const DOTS: &str = ".*/\\.\\.?(?:[/;].*)?";
/// Escapes of bytes that need none, or zero.
const DECODED: &str = ".*%(?:00|2[DEde]|3[0-9]|4[1-9A-Fa-f]|5[0-9AFaf]|6[1-9A-Fa-f]|7[0-9AEae]).*";
/// A percent sign that escapes nothing.
const NO_ESCAPE: &str = ".*%(?:[^0-9A-Fa-f].*|.[^0-9A-Fa-f].*|.?)";
/// Slashes that are merged, or decoded.
const SLASHES: &str = ".*//.*";
const ESCAPED_SLASH: &str = ".*%(?:2[Ff]|5[Cc]).*";

/// Makes an oracle one of first requests.
pub(super) fn only(manager: &mut HttpConnectionManager, paths: PathNormalization) {
    manager.normalize_path = Some(BoolValue { value: false });
    manager.merge_slashes = false;
    manager.path_with_escaped_slashes_action = PathWithEscapedSlashesAction::KeepUnchanged.into();
    // Nobody waits for a `100 Continue` of Envoy's: the pod says its own.
    manager.proxy_100_continue = true;
    if paths != PathNormalization::None {
        let filter = ConfigType::TypedConfig(http::filter(Some(normal_paths_alone(paths))));
        let filter = http::named("thyra/normal-paths", filter);
        manager.http_filters.insert(0, filter);
    }
    if let Some(RouteSpecifier::RouteConfig(routes)) = &mut manager.route_specifier {
        let hosts = routes.virtual_hosts.iter_mut();
        for route in hosts.flat_map(|host| &mut host.routes) {
            route.response_headers_to_add.push(HeaderValueOption {
                header: Some(HeaderValue {
                    key: ALLOWED_HEADER.to_owned(),
                    value: ALLOWED.to_owned(),
                    ..HeaderValue::default()
                }),
                append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
                ..HeaderValueOption::default()
            });
        }
    }
}

/// Refuses what would be normalised.
fn normal_paths_alone(paths: PathNormalization) -> Rbac {
    let is_none = Permission {
        rule: Some(permission::Rule::NotRule(Box::new(is(PATH)))),
    };
    let mut changed = vec![is_none, is(DOTS), is(DECODED), is(NO_ESCAPE)];
    if paths >= PathNormalization::MergeSlashes {
        changed.push(is(SLASHES));
    }
    if paths == PathNormalization::DecodeAndMergeSlashes {
        changed.push(is(ESCAPED_SLASH));
    }
    let policy = Policy {
        // One of them is enough.
        permissions: changed,
        principals: vec![Principal {
            identifier: Some(principal::Identifier::Any(true)),
        }],
        ..Policy::default()
    };
    Rbac {
        action: rbac::Action::Deny.into(),
        policies: [("normal-paths".to_owned(), policy)].into_iter().collect(),
        ..Rbac::default()
    }
}

/// Whether all of the path, without its query, meets the expression.
fn is(regex: &str) -> Permission {
    let regex = RegexMatcher {
        regex: regex.to_owned(),
        ..RegexMatcher::default()
    };
    Permission {
        rule: Some(permission::Rule::UrlPath(PathMatcher {
            rule: Some(PathRule::Path(StringMatcher {
                ignore_case: false,
                match_pattern: Some(MatchPattern::SafeRegex(regex)),
            })),
        })),
    }
}
