//! Paths as Envoy's connection manager leaves them.
//!
//! Invariant: each fact here is one of Envoy 1.40, asked of the binary itself by `node-proxy-bridge/tests/envoy`.

use super::PathNormalization;

/// What a normalised path holds only as percent and digits.
const ESCAPED: &[u8] = b"\"<>^`{|}";

/// The absolute form's authority, without user and password; none of another form (RFC 9112 3.2.2).
pub(super) fn origin(target: &str) -> Option<&str> {
    let rest = absolute(target)?;
    let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
    Some(authority.rsplit_once('@').map_or(authority, |(_, host)| host))
}

/// The target without scheme and authority; the absolute form's path is at least `/`.
pub(super) fn of(target: &str) -> &str {
    let Some(rest) = absolute(target) else {
        return target;
    };
    rest.find(['/', '?', '#']).map_or("/", |at| &rest[at..])
}

fn absolute(target: &str) -> Option<&str> {
    ["http://", "https://"].into_iter().find_map(|scheme| {
        let start = target.get(..scheme.len())?;
        start
            .eq_ignore_ascii_case(scheme)
            .then(|| &target[scheme.len()..])
    })
}

/// Why Envoy answers 400 or 404 to such a target.
pub(super) fn malformed(target: &str, how: PathNormalization) -> Option<&'static str> {
    let path = of(target);
    if !path.starts_with('/') {
        return Some("the target is no path");
    }
    if path.contains('#') {
        return Some("the path has a fragment");
    }
    if target.bytes().any(|byte| !byte.is_ascii_graphic()) {
        return Some("the target holds a byte that a URI can't have");
    }
    let before_query = path.split('?').next().unwrap_or(path);
    if how != PathNormalization::None && before_query.contains("%00") {
        return Some("the path has a zero byte");
    }
    None
}

pub(super) fn normalise(path: &str, how: PathNormalization) -> String {
    if how == PathNormalization::None || !path.starts_with('/') {
        return path.to_owned();
    }
    let decoded = if how == PathNormalization::DecodeAndMergeSlashes {
        decode(path, |byte| matches!(byte, b'/' | b'\\'))
    } else {
        path.to_owned()
    };
    let unreserved = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
    let bare = without_parameters(&decoded);
    let plain = escape(&without_dots(&decode(&bare, unreserved).replace('\\', "/")));
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

/// `/a/..;x/b` as `/a/../b`: applications that drop `;x` would go up there. Only segments that are written as dots
/// and only between `/`; parameters of other segments stay.
fn without_parameters(path: &str) -> String {
    let bare = |segment| match str::split_once(segment, ';') {
        Some((dots @ ("." | ".."), _)) => dots,
        _ => segment,
    };
    path.split('/').map(bare).collect::<Vec<_>>().join("/")
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

fn escape(path: &str) -> String {
    let mut out = String::with_capacity(path.len());
    for letter in path.chars() {
        match u8::try_from(letter) {
            Ok(byte) if ESCAPED.contains(&byte) => out.push_str(&format!("%{byte:02X}")),
            _ => out.push(letter),
        }
    }
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
    use crate::traffic::Request;

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
            ("/a/..;x/b", "/a/..;x/b", "/b", "/b", "/b"),
            ("/a/..;", "/a/..;", "/", "/", "/"),
            ("/a/.;x", "/a/.;x", "/a/", "/a/", "/a/"),
            (
                "/a/%2e%2e;x/b",
                "/a/%2e%2e;x/b",
                "/a/..;x/b",
                "/a/..;x/b",
                "/a/..;x/b",
            ),
            (
                "/a\\..;x\\b",
                "/a\\..;x\\b",
                "/a/..;x/b",
                "/a/..;x/b",
                "/a/..;x/b",
            ),
            ("/a/..;%2fb", "/a/..;%2fb", "/", "/", "/b"),
            ("/a/b;x/c", "/a/b;x/c", "/a/b;x/c", "/a/b;x/c", "/a/b;x/c"),
            ("//../b", "//../b", "/b", "/b", "/b"),
            ("/a|<b", "/a|<b", "/a%7C%3Cb", "/a%7C%3Cb", "/a%7C%3Cb"),
            ("http://h:80/p/../q#f", "/p/../q", "/q", "/q", "/q"),
            ("HTTP://h", "/", "/", "/", "/"),
        ] {
            use PathNormalization::{Base, DecodeAndMergeSlashes, MergeSlashes, None};
            let all = [None, Base, MergeSlashes, DecodeAndMergeSlashes].map(|how| path(target, how));
            assert_eq!(all, [none, base, merge, decode], "{target}");
        }
    }

    #[test]
    fn an_absolute_targets_authority_is_its_own() {
        for (target, host, path) in [
            ("http://h/x?y", Some("h"), "/x?y"),
            ("HTTPS://u:p@H:81", Some("H:81"), "/"),
            ("/a?b=http://c", None, "/a?b=http://c"),
        ] {
            assert_eq!((origin(target), of(target)), (host, path), "{target}");
        }
    }

    #[test]
    fn what_envoy_refuses_is_told_from_what_it_matches() {
        use PathNormalization::{Base, None};
        for target in ["*", "x", "/a#b", "/a b", "/\u{e9}", "http://h?x"] {
            assert!(malformed(target, None).is_some(), "{target}");
        }
        for target in ["/", "/a?b", "http://h", "/%zz"] {
            assert_eq!(malformed(target, Base), Option::None, "{target}");
        }
        assert!(malformed("/%00", Base).is_some() && malformed("/%00", None).is_none());
        assert!(malformed("/?%00", Base).is_none());
    }
}
