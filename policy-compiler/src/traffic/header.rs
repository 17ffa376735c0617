//! Headers as Envoy's RBAC sees them.
//!
//! Invariant: each fact here is one of Envoy 1.40, asked of the binary itself by `node-proxy-bridge/tests/envoy`.

use std::borrow::Cow;

use super::{PathNormalization, Request};

/// Headers of which Envoy keeps one: lines that are not empty are joined by a comma. All others are matched line by
/// line.
const JOINED: [&str; 20] = [
    "accept",
    "accept-encoding",
    "authorization",
    "cache-control",
    "content-type",
    "expect",
    "grpc-timeout",
    "origin",
    "referer",
    "user-agent",
    "via",
    "x-client-trace-id",
    "x-envoy-decorator-operation",
    "x-envoy-external-address",
    "x-envoy-original-path",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-proto",
    "x-request-id",
];
/// What a sidecar takes away before policies are asked: about the connection, or not a client's to say.
const TAKEN: [&str; 7] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "transfer-encoding",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-internal",
    "x-forwarded-client-cert",
];

impl Request {
    /// The values that a header is matched by, one after the other; none when it is absent. `:method`, `:path`,
    /// `:authority`, `:scheme` and `host` are the request's own.
    #[must_use]
    pub fn values(&self, name: &str, how: PathNormalization) -> Vec<Cow<'_, str>> {
        let name = name.to_ascii_lowercase();
        let name = name.as_str();
        match name {
            ":method" => return vec![self.method.as_str().into()],
            ":path" => return vec![self.path_and_query(how).into()],
            ":authority" | "host" => return vec![self.host().into()],
            ":scheme" => return vec!["http".into()],
            _ if TAKEN.contains(&name) => return Vec::new(),
            _ => {}
        }
        let named = name != "te" && name != "upgrade" && self.connection_names(name);
        let lines = self.headers.iter().filter(|(n, _)| n == name && !named);
        let values: Vec<&str> = lines.map(|(_, value)| value.as_str()).collect();
        match (name, values.as_slice()) {
            ("x-forwarded-proto", []) => vec!["http".into()],
            // Envoy makes one; its value can't be told, that it is there can.
            ("x-request-id", []) => vec!["".into()],
            ("te", _) => {
                let trailers = |line: &&str| line.split(',').any(|word| word.trim() == "trailers");
                values
                    .iter()
                    .any(trailers)
                    .then(|| "trailers".into())
                    .into_iter()
                    .collect()
            }
            ("upgrade", _) if !self.connection_names("upgrade") => Vec::new(),
            (_, [_, _, ..]) if JOINED.contains(&name) => {
                let said: Vec<&str> = values.into_iter().filter(|value| !value.is_empty()).collect();
                vec![said.join(",").into()]
            }
            _ => values.into_iter().map(Cow::from).collect(),
        }
    }

    /// Whether `Connection` names a header. It is taken away then (RFC 9110 7.6.1), but `Upgrade`, which says nothing
    /// without that (7.8).
    fn connection_names(&self, header: &str) -> bool {
        let mut lines = self.headers.iter().filter(|(name, _)| name == "connection");
        let is = |word: &str| word.trim().eq_ignore_ascii_case(header);
        lines.any(|(_, value)| value.split(',').any(is))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_matched_line_by_line_or_joined() {
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let request = Request {
            authority: "h:80".into(),
            target: "/a/../b?c".into(),
            headers: vec![
                header("x-a", "1"),
                header("x-a", ""),
                header("accept", "a"),
                header("accept", ""),
                header("accept", "b"),
                header("connection", "keep-alive, X-Hop"),
                header("x-hop", "1"),
                header("upgrade", "websocket"),
            ],
            ..Request::default()
        };
        let values = |name: &str| request.values(name, PathNormalization::Base);
        assert_eq!(values("X-A"), ["1", ""]);
        assert_eq!(values("Accept"), ["a,b"]);
        assert_eq!(values("Host"), ["h:80"]);
        assert_eq!(values(":path"), ["/b?c"]);
        assert_eq!(values("x-forwarded-proto"), ["http"]);
        assert_eq!(values("x-request-id"), [""]);
        for name in ["x-b", "x-hop", "connection", "upgrade", "te"] {
            assert!(values(name).is_empty(), "{name}");
        }
    }
}
