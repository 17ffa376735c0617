//! What flows on a connection, as far as verdicts read it: the parsed request, before anyone judges it.
//!
//! Invariant: nothing here knows a policy. What a stock sidecar does to a request before RBAC sees it (the path
//! without its query, normalised; the client by X-Forwarded-For) is done here, once.

use std::borrow::Cow;
use std::net::IpAddr;

use serde_json::{Map, Value};

/// The first bytes of a connection, understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Server name of the TLS ClientHello; none without TLS or without the extension.
    pub sni: Option<String>,
    /// The request; none where the stream is not HTTP.
    pub http: Option<Request>,
}

/// An HTTP request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// As on the wire.
    pub method: String,
    /// The raw target: path and query, `*`, or the absolute form.
    pub target: String,
    /// `:authority` or `Host`.
    pub authority: String,
    /// Other headers in order; names in lower case.
    pub headers: Vec<(String, String)>,
    /// Claims of a token that was found valid.
    pub claims: Option<Map<String, Value>>,
}

/// How a path is normalised before it is matched (`MeshConfig.pathNormalization`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum PathNormalization {
    /// Not at all.
    None,
    /// RFC 3986 and `\` as `/`; Istio's default.
    #[default]
    Base,
    /// And `//` as `/`.
    MergeSlashes,
    /// And `%2F`, `%5C` decoded before.
    DecodeAndMergeSlashes,
}

impl Request {
    /// The value of a header: several are joined by commas; `:method`, `:path`, `:authority` and `host` are the
    /// request's own. None when it is absent.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<Cow<'_, str>> {
        let name = name.to_ascii_lowercase();
        match name.as_str() {
            ":method" => return Some(self.method.as_str().into()),
            ":path" => return Some(self.target.as_str().into()),
            ":authority" | "host" => return Some(self.authority.as_str().into()),
            _ => {}
        }
        let mut found = self
            .headers
            .iter()
            .filter(|(n, _)| *n == name)
            .map(|(_, v)| v.as_str());
        let first = found.next()?;
        let rest: Vec<&str> = found.collect();
        if rest.is_empty() {
            return Some(first.into());
        }
        Some(format!("{first},{}", rest.join(",")).into())
    }

    /// The path that policies are matched against: without query and fragment, normalised.
    #[must_use]
    pub fn path(&self, how: PathNormalization) -> String {
        let target = without_origin(&self.target);
        let end = target.find(['?', '#']).unwrap_or(target.len());
        normalise(&target[..end], how)
    }

    /// The client: the last address of `X-Forwarded-For` (no proxy in front is trusted by a sidecar's default),
    /// else the connection's source.
    #[must_use]
    pub fn client(&self, source: IpAddr) -> IpAddr {
        let forwarded = self.header("x-forwarded-for");
        let last = forwarded.as_deref().and_then(|list| list.rsplit(',').next());
        last.and_then(|text| text.trim().parse::<IpAddr>().ok())
            .map_or(source, |address| address.to_canonical())
    }

    /// `<iss>/<sub>` of the token.
    #[must_use]
    pub fn principal(&self) -> Option<String> {
        let claim = |name| self.claims.as_ref()?.get(name)?.as_str();
        Some(format!("{}/{}", claim("iss")?, claim("sub")?))
    }

    /// The values of a claim, by its path: a text is one value (`scope` and `permission` are lists with spaces),
    /// a list's texts are several; anything else has none.
    #[must_use]
    pub fn claim(&self, path: &[&str]) -> Vec<&str> {
        let Some((first, rest)) = path.split_first() else {
            return Vec::new();
        };
        let mut value = self.claims.as_ref().and_then(|claims| claims.get(*first));
        for name in rest {
            value = value.and_then(|value| value.get(name));
        }
        match value {
            Some(Value::String(text)) if matches!(path, ["scope" | "permission"]) => {
                text.split(' ').filter(|part| !part.is_empty()).collect()
            }
            Some(Value::String(text)) => vec![text],
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        }
    }
}

/// The absolute form's path (RFC 9112 3.2.2).
fn without_origin(target: &str) -> &str {
    for scheme in ["http://", "https://"] {
        if target
            .get(..scheme.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(scheme))
        {
            let rest = &target[scheme.len()..];
            return rest.find(['/', '?', '#']).map_or("/", |at| &rest[at..]);
        }
    }
    target
}

fn normalise(path: &str, how: PathNormalization) -> String {
    if how == PathNormalization::None || !path.starts_with('/') {
        return path.to_owned();
    }
    let decoded = if how == PathNormalization::DecodeAndMergeSlashes {
        decode(path, |byte| matches!(byte, b'/' | b'\\'))
    } else {
        path.to_owned()
    };
    let unreserved = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
    let plain = without_dots(&decode(&decoded, unreserved).replace('\\', "/"));
    if how < PathNormalization::MergeSlashes {
        return plain;
    }
    let mut merged = String::with_capacity(plain.len());
    for letter in plain.chars() {
        if letter != '/' || !merged.ends_with('/') {
            merged.push(letter);
        }
    }
    merged
}

/// Percent-encoded bytes that `wanted` names, decoded; others stay as they are written.
fn decode(path: &str, wanted: impl Fn(u8) -> bool) -> String {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find('%') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let byte = rest
            .get(1..3)
            .filter(|digits| digits.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok())
            .filter(|byte| byte.is_ascii() && wanted(*byte));
        match byte {
            Some(byte) => {
                out.push(char::from(byte));
                rest = &rest[3..];
            }
            None => {
                out.push('%');
                rest = &rest[1..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// RFC 3986 5.2.4: `.` and `..` segments, the root's own parent is the root.
fn without_dots(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut segments = path[1..].split('/').peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        match segment {
            "." if last => kept.push(""),
            "." => {}
            ".." => {
                kept.pop();
                if last {
                    kept.push("");
                }
            }
            _ => kept.push(segment),
        }
    }
    format!("/{}", kept.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(target: &str, how: PathNormalization) -> String {
        let request = Request {
            target: target.into(),
            ..Request::default()
        };
        request.path(how)
    }

    #[test]
    fn paths_are_normalised_as_envoy_does() {
        for (target, none, base, merge, decode) in [
            ("/a/b?c=/d", "/a/b", "/a/b", "/a/b", "/a/b"),
            ("/x/../admin", "/x/../admin", "/admin", "/admin", "/admin"),
            ("/x/%2e%2E/admin", "/x/%2e%2E/admin", "/admin", "/admin", "/admin"),
            ("/../../a", "/../../a", "/a", "/a", "/a"),
            ("/a/./b/.", "/a/./b/.", "/a/b/", "/a/b/", "/a/b/"),
            ("/a/..", "/a/..", "/", "/", "/"),
            ("//admin", "//admin", "//admin", "/admin", "/admin"),
            ("/a%2fb", "/a%2fb", "/a%2fb", "/a%2fb", "/a/b"),
            ("/a%5Cb", "/a%5Cb", "/a%5Cb", "/a%5Cb", "/a/b"),
            ("/a\\b", "/a\\b", "/a/b", "/a/b", "/a/b"),
            ("/%61dmin", "/%61dmin", "/admin", "/admin", "/admin"),
            ("/a%zz%2", "/a%zz%2", "/a%zz%2", "/a%zz%2", "/a%zz%2"),
            ("*", "*", "*", "*", "*"),
            ("http://h:80/p/../q#f", "/p/../q", "/q", "/q", "/q"),
            ("HTTP://h", "/", "/", "/", "/"),
        ] {
            use PathNormalization::{Base, DecodeAndMergeSlashes, MergeSlashes, None};
            let all = [None, Base, MergeSlashes, DecodeAndMergeSlashes].map(|how| path(target, how));
            assert_eq!(all, [none, base, merge, decode], "{target}");
        }
    }

    #[test]
    fn headers_claims_and_client_are_read_as_the_sidecar_reads_them() {
        let request = Request {
            authority: "h:80".into(),
            headers: vec![
                ("x-a".into(), "1".into()),
                ("x-forwarded-for".into(), "192.0.2.1, ::ffff:198.51.100.7".into()),
                ("x-a".into(), "2".into()),
            ],
            claims: serde_json::from_str(
                r#"{"iss":"i","sub":"s","scope":"r w","groups":["a","b"],"n":{"m":"x y"},"num":7}"#,
            )
            .unwrap(),
            ..Request::default()
        };
        assert_eq!(request.header("X-A").as_deref(), Some("1,2"));
        assert_eq!(request.header("Host").as_deref(), Some("h:80"));
        assert_eq!(request.header("x-b"), None);
        assert_eq!(
            request.client("10.0.0.1".parse().unwrap()).to_string(),
            "198.51.100.7"
        );
        assert_eq!(request.principal().as_deref(), Some("i/s"));
        assert_eq!(request.claim(&["scope"]), ["r", "w"]);
        assert_eq!(request.claim(&["groups"]), ["a", "b"]);
        assert_eq!(request.claim(&["n", "m"]), ["x y"]);
        assert!(request.claim(&["num"]).is_empty() && request.claim(&["absent"]).is_empty());
    }
}
