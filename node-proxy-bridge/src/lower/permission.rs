//! What is asked for: host, method, path and server name.

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::rbac::v3::permission::Rule;
use envoy_types::pb::envoy::extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig;
use envoy_types::pb::envoy::r#type::matcher::v3::PathMatcher;
use envoy_types::pb::envoy::r#type::matcher::v3::path_matcher;
use envoy_types::util::pack_any;
use thyra_policy_compiler::parse::string_match;
use thyra_policy_compiler::policy::StringMatch;
use thyra_policy_compiler::residual::Test;

use super::matcher::{header, text};
use super::tree::{Tree, field};
use super::{MAX_TEMPLATE, Why};

/// The extension that knows `*` and `**` as segments.
const URI_TEMPLATE: &str = "envoy.path.match.uri_template.uri_template_matcher";

pub(super) fn permission(test: &Test) -> Result<Vec<Tree<Rule>>, Why> {
    match test {
        Test::Host(hosts) => field(hosts, |value| {
            Ok(Tree::Leaf(Rule::Header(header(":authority", value, true)?)))
        }),
        Test::Method(methods) => field(methods, |value| {
            Ok(Tree::Leaf(Rule::Header(header(":method", value, false)?)))
        }),
        Test::Path(paths) => field(paths, |value| path(value)),
        Test::Sni(names) => field(names, |value| {
            Ok(Tree::Leaf(Rule::RequestedServerName(text(value)?)))
        }),
        Test::RequestPrincipal(_) | Test::RemoteBlock(_) | Test::RemoteIp(_) | Test::Key(..) => {
            Err(Why::Misplaced)
        }
    }
}

/// `url_path` and templates are matched without the query, after the connection manager's normalisation.
fn path(value: &str) -> Result<Tree<Rule>, Why> {
    if value.contains("{*}") || value.contains("{**}") {
        let template = UriTemplateMatchConfig {
            path_template: template(value)?,
        };
        return Ok(Tree::Leaf(Rule::UriTemplate(TypedExtensionConfig {
            name: URI_TEMPLATE.to_owned(),
            typed_config: Some(pack_any(template)),
        })));
    }
    // An empty value is not to be had from a policy; it is equal to no path.
    let value = string_match(value).unwrap_or(StringMatch::Exact(value.to_owned()));
    Ok(Tree::Leaf(Rule::UrlPath(PathMatcher {
        rule: Some(path_matcher::Rule::Path(text(&value)?)),
    })))
}

/// As Envoy writes it, once it is sure that Envoy takes it: an invalid one is not refused there but ends the process.
fn template(value: &str) -> Result<String, Why> {
    let written = value.replace("{**}", "**").replace("{*}", "*");
    let refused = || Why::Template(value.to_owned());
    let segments = value.strip_prefix('/').ok_or_else(refused)?;
    let segments = segments.strip_suffix('/').unwrap_or(segments);
    let mut rest_seen = false;
    for segment in segments.split('/') {
        let is_template = matches!(segment, "{*}" | "{**}");
        if (is_template && rest_seen) || !(is_template || is_literal(segment)) {
            return Err(refused());
        }
        rest_seen |= segment == "{**}";
    }
    if written.len() > MAX_TEMPLATE {
        return Err(refused());
    }
    Ok(written)
}

/// One or more of RFC 3986's `pchar`, without the `*` that Envoy would take for a template.
fn is_literal(segment: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~%!$&'()+,;:@=".contains(&byte);
    !segment.is_empty() && segment.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_template_that_would_end_envoy_is_never_sent() {
        for fine in ["/{*}", "/a/{**}", "/{**}/a/b", "/a/{*}/", "/{*}/%2f;x/{**}"] {
            assert!(template(fine).is_ok(), "{fine}");
        }
        let long = format!("/{{*}}/{}", "a".repeat(MAX_TEMPLATE));
        let fatal = [
            "{*}/a",
            "a/{*}",
            "//{*}",
            "/{*}//",
            "/{**}/{*}",
            "/{**}/{**}",
            "/a b/{*}",
            "/a*/{*}",
            &long,
        ];
        for value in fatal {
            assert_eq!(template(value), Err(Why::Template(value.to_owned())), "{value}");
        }
        assert_eq!(template("/a/{*}"), Ok("/a/*".to_owned()));
    }
}
