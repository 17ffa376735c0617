//! Does a request have what a field asks for? Every value becomes a regular expression, as Istio makes one for
//! Envoy, and is tried on every value that the attribute has.

use ipnet::IpNet;
use regex::Regex;
use serde_json::Value;

use super::rule::{Facts, Truth, address, field};
use crate::policy::{Field, StringMatch};
use crate::tokens::JwtRule;
use crate::traffic::{Request, Traffic};

/// What Envoy's templates take for a letter of a segment.
const SEGMENT: &str = "[a-zA-Z0-9\\-._~%!$&'()+,;:@=]";

pub(super) fn hosts(values: &Field<StringMatch>, request: &Request) -> Truth {
    let patterns = |value: &StringMatch| format!("(?i){}", pattern(value, ".+"));
    one("to.hosts", values, &[request.host().to_owned()], patterns)
}

pub(super) fn methods(values: &Field<StringMatch>, request: &Request) -> Truth {
    let method = std::slice::from_ref(&request.method);
    one("to.methods", values, method, |value| pattern(value, ".+"))
}

pub(super) fn paths(values: &Field<String>, request: &Request, facts: &Facts<'_>) -> Truth {
    let path = [request.path(facts.mesh.path_normalization)];
    one("to.paths", values, &path, |value| path_pattern(value))
}

pub(super) fn request_principals(values: &Field<StringMatch>, request: &Request) -> Truth {
    principal("from.requestPrincipals", values, request)
}

/// Issuer and subject with a byte between them that neither text has.
fn principal(name: &str, values: &Field<StringMatch>, request: &Request) -> Truth {
    let joined = request
        .principal()
        .map(|(issuer, subject)| format!("{issuer}\0{subject}"));
    let found: Vec<String> = joined.into_iter().collect();
    one(name, values, &found, principal_pattern)
}

/// Istio cuts the value as it is written at its last `/` and takes a part that is `*` for any text.
fn principal_pattern(value: &StringMatch) -> String {
    let quoted = |text: &str| regex::escape(text);
    let starts = |text: &str| {
        if text.is_empty() {
            ".+".to_owned()
        } else {
            format!("{}.*", quoted(text))
        }
    };
    let ends = |text: &str| {
        if text.is_empty() {
            ".+".to_owned()
        } else {
            format!(".*{}", quoted(text))
        }
    };
    let (issuer, subject) = match value {
        StringMatch::Present => (".+".to_owned(), ".+".to_owned()),
        StringMatch::Exact(text) | StringMatch::Glob(text) => match text.rsplit_once('/') {
            Some((issuer, subject)) => (quoted(issuer), quoted(subject)),
            None => (quoted(text), String::new()),
        },
        StringMatch::Prefix(text) => match text.rsplit_once('/') {
            Some((issuer, subject)) => (quoted(issuer), starts(subject)),
            None => (starts(text), ".+".to_owned()),
        },
        StringMatch::Suffix(text) => match text.rsplit_once('/') {
            Some((issuer, subject)) => (ends(issuer), quoted(subject)),
            None => (".+".to_owned(), ends(text)),
        },
    };
    format!("{issuer}\0{subject}")
}

pub(super) fn remote(name: &str, values: &Field<IpNet>, request: &Request, facts: &Facts<'_>) -> Truth {
    address(name, values, request.client(facts.source))
}

pub(super) fn sni(values: &Field<StringMatch>, traffic: &Traffic) -> Truth {
    let name: Vec<String> = traffic.sni.iter().map(|name| name.to_ascii_lowercase()).collect();
    one("when connection.sni", values, &name, |value| pattern(value, ".+"))
}

/// A condition's key other than SNI.
pub(super) fn key(key: &str, values: &Field<StringMatch>, request: &Request, facts: &Facts<'_>) -> Truth {
    let name = format!("when {key}");
    if let Some(header) = key.strip_prefix("request.headers[") {
        let found = request.values(header.trim_end_matches(']'), facts.mesh.path_normalization);
        let found: Vec<String> = found.into_iter().map(|value| value.into_owned()).collect();
        return one(&name, values, &found, |value| pattern(value, ".*"));
    }
    let found: Vec<String> = match key {
        "request.auth.principal" => return principal(&name, values, request),
        "request.auth.audiences" => claim(request, "aud"),
        "request.auth.presenter" => claim(request, "azp"),
        _ => claim(
            request,
            key.trim_start_matches("request.auth.claims[")
                .trim_end_matches(']'),
        ),
    };
    one(&name, values, &found, |value| pattern(value, ".+"))
}

/// The traffic with its claims as Envoy leaves them: a text that a rule of its issuer names as a list with spaces is
/// one.
pub(super) fn with_lists(rules: &[&JwtRule], traffic: &Traffic) -> Traffic {
    let mut traffic = traffic.clone();
    let claims = traffic.http.as_mut().and_then(|request| request.claims.as_mut());
    let Some(claims) = claims else { return traffic };
    let issuer = claims.get("iss").and_then(Value::as_str).unwrap_or("").to_owned();
    for rule in rules {
        if !rule.issuer.is_empty() && rule.issuer != issuer {
            continue;
        }
        for (name, value) in claims.iter_mut() {
            if let (true, Value::String(text)) = (rule.lists.contains(name), &*value) {
                *value = text.split(' ').filter(|word| !word.is_empty()).collect();
            }
        }
    }
    traffic
}

/// `a][b` is claim `b` inside claim `a`.
fn claim(request: &Request, path: &str) -> Vec<String> {
    let path: Vec<&str> = path.split("][").collect();
    request.claim(&path).into_iter().map(str::to_owned).collect()
}

fn one<T: std::fmt::Debug>(
    name: &str,
    values: &Field<T>,
    found: &[String],
    pattern: impl Fn(&T) -> String,
) -> Truth {
    field(name, values, &found, |value| {
        let regex = Regex::new(&format!("(?s)^(?:{})$", pattern(value))).expect("its parts are quoted");
        found.iter().any(|found| regex.is_match(found))
    })
}

fn pattern(value: &StringMatch, present: &str) -> String {
    match value {
        StringMatch::Exact(text) | StringMatch::Glob(text) => regex::escape(text),
        StringMatch::Prefix(text) => format!("{}.*", regex::escape(text)),
        StringMatch::Suffix(text) => format!(".*{}", regex::escape(text)),
        StringMatch::Present => present.to_owned(),
    }
}

fn path_pattern(value: &str) -> String {
    if value.contains("{*}") || value.contains("{**}") {
        let quoted = regex::escape(value);
        let many = quoted.replace(&regex::escape("{**}"), &format!("(?:{SEGMENT}|/)*"));
        return many.replace(&regex::escape("{*}"), &format!("{SEGMENT}+"));
    }
    match (value.strip_prefix('*'), value.strip_suffix('*')) {
        (Some(""), _) => ".+".to_owned(),
        (Some(end), _) => format!(".*{}", regex::escape(end)),
        (None, Some(start)) => format!("{}.*", regex::escape(start)),
        (None, None) => regex::escape(value),
    }
}
