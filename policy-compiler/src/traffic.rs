//! What flows on a connection, as far as verdicts read it: the parsed request, before anyone judges it.
//!
//! Invariant: nothing here knows a policy. What a stock sidecar does to a request before RBAC sees it (the path
//! without its query, normalised; the client by X-Forwarded-For) is done here, once.

mod header;
mod path;

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Map, Value};

/// The first bytes of a connection, understood.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Server name of the TLS ClientHello; none without TLS or without the extension.
    pub sni: Option<String>,
    /// The request; none where the stream is not HTTP.
    pub http: Option<Request>,
    /// What authorizers say of it, by provider; nothing is known of the others' answers.
    pub answers: BTreeMap<String, bool>,
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
    /// The authority that it is sent to: that of an absolute target goes before `Host` (RFC 9112 3.2.2).
    #[must_use]
    pub fn host(&self) -> &str {
        path::origin(&self.target).unwrap_or(&self.authority)
    }

    /// The path that policies are matched against: without query and fragment, normalised.
    #[must_use]
    pub fn path(&self, how: PathNormalization) -> String {
        let path = path::of(&self.target);
        let end = path.find(['?', '#']).unwrap_or(path.len());
        path::normalise(&path[..end], how)
    }

    /// What a header `:path` says: the path, normalised, and the query as it is.
    #[must_use]
    pub fn path_and_query(&self, how: PathNormalization) -> String {
        let path = path::of(&self.target);
        let query = path.find('?').map_or("", |at| &path[at..]);
        self.path(how) + query
    }

    /// Why a sidecar answers 400 or 404 before any policy is asked; none if it doesn't. Only what the parsed
    /// request still shows; broken framing is not seen here.
    #[must_use]
    pub fn malformed(&self, how: PathNormalization) -> Option<&'static str> {
        path::malformed(&self.target, how)
    }

    /// The client: the last address of `X-Forwarded-For` (no proxy in front is trusted by a sidecar's default),
    /// else the connection's source.
    #[must_use]
    pub fn client(&self, source: IpAddr) -> IpAddr {
        let forwarded = self
            .headers
            .iter()
            .rev()
            .find(|(name, _)| name == "x-forwarded-for");
        let last = forwarded.and_then(|(_, list)| list.rsplit(',').next());
        last.and_then(|text| text.trim().parse::<IpAddr>().ok())
            .map_or(source, |address| address.to_canonical())
    }

    /// Issuer and subject of the token.
    #[must_use]
    pub fn principal(&self) -> Option<(&str, &str)> {
        let claim = |name| self.claims.as_ref()?.get(name)?.as_str();
        Some((claim("iss")?, claim("sub")?))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_and_client_are_read_as_the_sidecar_reads_them() {
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
        assert_eq!(
            request.client("10.0.0.1".parse().unwrap()).to_string(),
            "198.51.100.7"
        );
        assert_eq!(request.principal(), Some(("i", "s")));
        assert_eq!(request.claim(&["scope"]), ["r", "w"]);
        assert_eq!(request.claim(&["groups"]), ["a", "b"]);
        assert_eq!(request.claim(&["n", "m"]), ["x y"]);
        assert!(request.claim(&["num"]).is_empty() && request.claim(&["absent"]).is_empty());
    }
}
