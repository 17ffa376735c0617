//! Whether a request meets conditions.
//!
//! Invariant: an attribute that the stream does not have is matched by nothing; a `not*` list then holds.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Conditions, Context, Test};
use crate::policy::{Field, StringMatch};
use crate::traffic::{PathNormalization, Request};

/// Characters of RFC 3986's `pchar` besides letters and digits, as Envoy's path templates take them.
const PATH_MARKS: &[u8] = b"-._~%!$&'()+,;:@=";

pub(super) fn hold(conditions: &Conditions, context: &Context<'_>) -> bool {
    let all = |tests: &[Test]| tests.iter().all(|test| holds(test, context));
    let one = |list: &[Vec<Test>]| list.is_empty() || list.iter().any(|tests| all(tests));
    one(&conditions.from) && one(&conditions.to) && all(&conditions.when)
}

fn holds(test: &Test, context: &Context<'_>) -> bool {
    let request = context.traffic.http.as_ref();
    match test {
        Test::Host(field) => asked(field, request.map(Request::host), |wanted, has| {
            text_ignoring_case(wanted, has)
        }),
        Test::Method(field) => asked(field, request.map(|r| r.method.as_str()), text),
        Test::Path(field) => {
            let path = request.map(|r| r.path(context.paths));
            asked(field, path.as_deref(), |wanted, has| path_is(wanted, has))
        }
        Test::RequestPrincipal(field) => {
            let principal = request.and_then(Request::principal);
            asked(field, principal.as_ref(), principal_is)
        }
        Test::RemoteBlock(field) | Test::RemoteIp(field) => {
            let client = request.map_or(context.source, |r| r.client(context.source));
            asked(field, Some(&client), |block: &IpNet, has: &IpAddr| {
                block.contains(has)
            })
        }
        // Envoy's inspector writes the name in lower case; a value in upper case matches nothing, as in a sidecar.
        Test::Sni(field) => {
            let name = context.traffic.sni.as_ref().map(|name| name.to_ascii_lowercase());
            asked(field, name.as_deref(), text)
        }
        Test::Key(key, field) => request.map_or_else(
            || field.values.is_empty(),
            |r| key_holds(key, field, r, context.paths),
        ),
    }
}

/// One of the values, none of the not-values, of an attribute that may be absent.
fn asked<T, V: ?Sized>(field: &Field<T>, has: Option<&V>, is: impl Fn(&T, &V) -> bool) -> bool {
    let any = |list: &[T]| has.is_some_and(|has| list.iter().any(|wanted| is(wanted, has)));
    (field.values.is_empty() || any(&field.values)) && !any(&field.not_values)
}

/// The same of one that may have several values.
fn asked_of_any(field: &Field<StringMatch>, has: &[&str]) -> bool {
    let any = |list: &[StringMatch]| list.iter().any(|wanted| has.iter().any(|has| text(wanted, has)));
    (field.values.is_empty() || any(&field.values)) && !any(&field.not_values)
}

fn key_holds(key: &str, field: &Field<StringMatch>, request: &Request, paths: PathNormalization) -> bool {
    match key {
        "request.auth.principal" => return asked(field, request.principal().as_ref(), principal_is),
        "request.auth.audiences" => return asked_of_any(field, &request.claim(&["aud"])),
        "request.auth.presenter" => return asked_of_any(field, &request.claim(&["azp"])),
        _ => {}
    }
    if let Some(path) = key.strip_prefix("request.auth.claims") {
        return asked_of_any(field, &request.claim(&names(path)));
    }
    let name = names(key.strip_prefix("request.headers").unwrap_or(key));
    let values = name
        .first()
        .map_or_else(Vec::new, |name| request.values(name, paths));
    // A header that is there and empty is present.
    let is = |wanted: &StringMatch, has: &str| *wanted == StringMatch::Present || text(wanted, has);
    let any = |list: &[StringMatch]| list.iter().any(|wanted| values.iter().any(|has| is(wanted, has)));
    (field.values.is_empty() || any(&field.values)) && !any(&field.not_values)
}

fn principal_is(wanted: &StringMatch, (issuer, subject): &(&str, &str)) -> bool {
    let (of_issuer, of_subject) = wanted.of_issuer_and_subject();
    text(&of_issuer, issuer) && text(&of_subject, subject)
}

/// `[a][b]` as its parts.
fn names(brackets: &str) -> Vec<&str> {
    let inner = brackets.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    inner.map_or_else(Vec::new, |inner| inner.split("][").collect())
}

fn text(wanted: &StringMatch, has: &str) -> bool {
    match wanted {
        StringMatch::Exact(text) | StringMatch::Glob(text) => has == text,
        StringMatch::Prefix(start) => has.starts_with(start.as_str()),
        StringMatch::Suffix(end) => has.ends_with(end.as_str()),
        StringMatch::Present => !has.is_empty(),
    }
}

fn text_ignoring_case(wanted: &StringMatch, has: &str) -> bool {
    let lower = |text: &String| text.to_ascii_lowercase();
    let wanted = match wanted {
        StringMatch::Exact(text) => StringMatch::Exact(lower(text)),
        StringMatch::Prefix(text) => StringMatch::Prefix(lower(text)),
        StringMatch::Suffix(text) => StringMatch::Suffix(lower(text)),
        StringMatch::Present => StringMatch::Present,
        StringMatch::Glob(text) => StringMatch::Glob(lower(text)),
    };
    text(&wanted, &has.to_ascii_lowercase())
}

fn path_is(wanted: &str, has: &str) -> bool {
    if wanted.contains("{*}") || wanted.contains("{**}") {
        return template(wanted, has);
    }
    if wanted == "*" {
        return !has.is_empty();
    }
    match (wanted.strip_prefix('*'), wanted.strip_suffix('*')) {
        (Some(end), _) => has.ends_with(end),
        (None, Some(start)) => has.starts_with(start),
        (None, None) => has == wanted,
    }
}

/// `{*}` is one segment that is not empty, `{**}` any run of segments; the whole path must be used up.
fn template(wanted: &str, has: &str) -> bool {
    let Some(at) = wanted.find("{*") else {
        return wanted == has;
    };
    let Some(has) = has.strip_prefix(&wanted[..at]) else {
        return false;
    };
    let (rest, many) = match wanted[at..].strip_prefix("{**}") {
        Some(rest) => (rest, true),
        None => (wanted[at..].strip_prefix("{*}").unwrap_or_default(), false),
    };
    let fits =
        |byte: &u8| byte.is_ascii_alphanumeric() || PATH_MARKS.contains(byte) || (many && *byte == b'/');
    let longest = has.bytes().take_while(|byte| fits(byte)).count();
    (usize::from(!many)..=longest).any(|taken| template(rest, &has[taken..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exact(texts: &[&str]) -> Vec<StringMatch> {
        texts
            .iter()
            .map(|text| StringMatch::Exact((*text).to_owned()))
            .collect()
    }

    #[test]
    fn one_value_of_a_list_is_enough_to_match_and_to_refuse() {
        type Texts = &'static [&'static str];
        let cases: [(Texts, Texts, Texts, bool); 8] = [
            (&["a"], &[], &["a", "b"], true),
            (&["a"], &[], &["b"], false),
            (&["a"], &[], &[], false),
            (&[], &["a"], &["a", "b"], false),
            (&[], &["a"], &["b"], true),
            (&[], &["a"], &[], true),
            (&["b"], &["a"], &["a", "b"], false),
            (&["b"], &["a"], &["b"], true),
        ];
        for (values, not_values, has, wanted) in cases {
            let field = Field {
                values: exact(values),
                not_values: exact(not_values),
            };
            assert_eq!(
                asked_of_any(&field, has),
                wanted,
                "{values:?} {not_values:?} {has:?}"
            );
        }
    }

    #[test]
    fn host_names_have_no_case() {
        for (wanted, has, fits) in [
            (StringMatch::Exact("Shop.Example".into()), "shop.EXAMPLE", true),
            (StringMatch::Suffix(".Example".into()), "a.exAmple", true),
            (StringMatch::Prefix("Shop.".into()), "sHop.x", true),
            (StringMatch::Exact("shop.example".into()), "shop.examples", false),
        ] {
            assert_eq!(text_ignoring_case(&wanted, has), fits, "{wanted:?} {has}");
        }
    }

    #[test]
    fn templates_use_up_the_whole_path() {
        for (wanted, has, fits) in [
            ("/a/{*}", "/a/b", true),
            ("/a/{*}", "/a/", false),
            ("/a/{*}", "/a/b/c", false),
            ("/a/{**}", "/a/b/c", true),
            ("/a/{**}", "/a/", true),
            ("/{*}/b", "/x/b", true),
            ("/{*}/b", "/x/y/b", false),
            ("/{**}/b", "/x/y/b", true),
        ] {
            assert_eq!(template(wanted, has), fits, "{wanted} {has}");
        }
    }
}
