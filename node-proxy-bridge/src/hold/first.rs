//! The first HTTP request of a held connection and Envoy's answer to it.
//!
//! Invariant: allowed is only what Envoy answers with its mark to the very first request, and, in HTTP/1, what no two
//! readers can read in two ways: the pod gets the client's own bytes, and no request that Envoy has written anew.

use crate::listener::{ALLOWED, ALLOWED_HEADER};

/// How HTTP/2 begins (RFC 9113 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A frame's header (RFC 9113 4.1), and the types that matter here.
const FRAME: usize = 9;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const END_HEADERS: u8 = 4;
/// The answer is shorter than this, or none.
const MAX_ANSWER: usize = 64 * 1024;

/// Whether the first request of `said` was allowed by `heard`, which Envoy has answered so far; none as long as that is
/// not clear.
#[must_use]
pub fn allowed(said: &[u8], heard: &[u8]) -> Option<bool> {
    let answer = match said.strip_prefix(PREFACE) {
        Some(frames) => second_version(frames, heard),
        None => first_version(said, heard),
    };
    answer.or((heard.len() > MAX_ANSWER).then_some(false))
}

/// HTTP/2: streams are answered in the order of their requests, but one that its client resets is not answered at all.
fn second_version(said: &[u8], heard: &[u8]) -> Option<bool> {
    let first = frames(said).find(|frame| frame.kind == HEADERS)?.stream;
    let answer = frames(heard).find(|frame| matches!(frame.kind, HEADERS | RESET))?;
    let is_marked = answer
        .payload
        .windows(ALLOWED.len())
        .any(|piece| piece == ALLOWED.as_bytes());
    let is_whole = answer.kind == HEADERS && answer.flags & END_HEADERS != 0;
    Some(answer.stream == first && is_whole && is_marked)
}

struct Frame<'a> {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: &'a [u8],
}

/// The whole ones.
fn frames(bytes: &[u8]) -> impl Iterator<Item = Frame<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let (head, behind) = rest.split_at_checked(FRAME)?;
        let number = |at: usize| -> Option<u32> {
            let four = head.get(at..at + 4)?;
            Some(u32::from_be_bytes(four.try_into().ok()?))
        };
        let length = usize::try_from(number(0)? >> 8).ok()?;
        let (payload, after) = behind.split_at_checked(length)?;
        rest = after;
        Some(Frame {
            kind: *head.get(3)?,
            flags: *head.get(4)?,
            // The first bit means nothing.
            stream: number(5)? & (u32::MAX >> 1),
            payload,
        })
    })
}

fn first_version(said: &[u8], heard: &[u8]) -> Option<bool> {
    let head = head(heard)?;
    let (status, fields) = head.split_once("\r\n").unwrap_or((head, ""));
    let mark = format!("{ALLOWED_HEADER}: {ALLOWED}");
    let is_marked = fields.split("\r\n").any(|field| field == mark);
    Some(status.starts_with("HTTP/1.1 200 ") && is_marked && head_of(said).is_some_and(is_plain))
}

/// As far as the empty line, without it; none before it is there, or where it is no text.
fn head(bytes: &[u8]) -> Option<&str> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    std::str::from_utf8(bytes.get(..end)?).ok()
}

/// The same of a request, whose values may hold any byte.
fn head_of(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    bytes.get(..end)
}

/// Whether nobody can read another request in it than Envoy did: lines end with CRLF, names with their colon, nothing
/// is folded, and there is one target, one host and one length (RFC 9112 2.2, 3.2, 5, 6.3).
fn is_plain(head: &[u8]) -> bool {
    // What is no text is no name and no target either.
    let text = String::from_utf8_lossy(head);
    let mut lines = text.split("\r\n");
    let is_request = lines.next().is_some_and(is_request_line);
    let (mut hosts, mut lengths, mut codings) = (0, 0, 0);
    for line in lines {
        let Some((name, value)) = line.split_once(':') else {
            return false;
        };
        let value = value.trim_matches([' ', '\t']);
        if !is_token(name) || value.bytes().any(|byte| byte != b'\t' && byte.is_ascii_control()) {
            return false;
        }
        match name.to_ascii_lowercase().as_str() {
            "host" => hosts += 1,
            "content-length" if value.bytes().all(|digit| digit.is_ascii_digit()) => lengths += 1,
            "transfer-encoding" if value.eq_ignore_ascii_case("chunked") => codings += 1,
            "content-length" | "transfer-encoding" => return false,
            _ => {}
        }
    }
    is_request && hosts == 1 && lengths + codings <= 1
}

/// One method, one path, one version, with one space between.
fn is_request_line(line: &str) -> bool {
    let words: Vec<&str> = line.split(' ').collect();
    let [method, target, version] = words.as_slice() else {
        return false;
    };
    let is_target = target.starts_with('/') && target.bytes().all(|byte| byte.is_ascii_graphic());
    is_token(method) && is_target && *version == "HTTP/1.1"
}

/// A `token` (RFC 9110 5.6.2).
fn is_token(text: &str) -> bool {
    let is_part = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    !text.is_empty() && text.bytes().all(is_part)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "POST /a?b HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\n";

    fn yes() -> String {
        format!("HTTP/1.1 200 OK\r\n{ALLOWED_HEADER}: {ALLOWED}\r\n\r\n")
    }

    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).unwrap();
        let mut bytes = vec![0, 0, length, kind, flags, 0, 0, 0, stream];
        bytes.extend_from_slice(payload);
        bytes
    }

    #[test]
    fn only_a_marked_answer_allows() {
        let said = PLAIN.as_bytes();
        assert_eq!(allowed(said, yes().as_bytes()), Some(true));
        assert_eq!(allowed(said, &yes().as_bytes()[..30]), None);
        let unmarked = b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\n\r\n";
        assert_eq!(allowed(said, unmarked), Some(false), "a refusal to gRPC");
        let refused = format!("HTTP/1.1 403 Forbidden\r\n\r\n{}", yes());
        assert_eq!(
            allowed(said, refused.as_bytes()),
            Some(false),
            "the second is allowed"
        );
        let in_a_body = format!("HTTP/1.1 200 OK\r\n\r\n{ALLOWED_HEADER}: {ALLOWED}\r\n\r\n");
        assert_eq!(allowed(said, in_a_body.as_bytes()), Some(false));
        assert_eq!(allowed(said, &vec![0; MAX_ANSWER + 1]), Some(false));
    }

    #[test]
    fn a_head_that_two_readers_may_read_in_two_ways_is_refused() {
        let heads = [
            "POST /a?b HTTP/1.1\nHost: a\r\n\r\n",
            "\r\nPOST /a HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST  /a HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST /a b HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST\t/a HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST http://b/a HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST * HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST /a HTTP/1.0\r\nHost: a\r\n\r\n",
            "POST /a HTTP/1.1\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost : a\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: a\r\nX: a\rY: b\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: a\r\nX: a\nY: b\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: a\r\nX: a\0\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: a\r\nX\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            "POST /a HTTP/1.1\r\nHost: a\r\n",
        ];
        for head in heads {
            assert_eq!(
                allowed(head.as_bytes(), yes().as_bytes()),
                Some(false),
                "{head:?}"
            );
        }
        let usual =
            "GET / HTTP/1.1\r\nhost: a:80\r\nX-Name:\tgr\u{fc}n \r\nTransfer-Encoding: Chunked\r\n\r\n";
        assert_eq!(allowed(usual.as_bytes(), yes().as_bytes()), Some(true));
    }

    #[test]
    fn of_http2_the_first_streams_answer_counts_and_no_others() {
        let said = |streams: &[u8]| {
            let mut bytes = PREFACE.to_vec();
            bytes.extend(frame(4, 0, 0, b""));
            for stream in streams {
                bytes.extend(frame(HEADERS, END_HEADERS, *stream, b"\x82"));
            }
            bytes
        };
        let marked = |stream| frame(HEADERS, END_HEADERS, stream, ALLOWED.as_bytes());
        let settings = frame(4, 0, 0, b"");
        assert_eq!(allowed(&said(&[1]), &settings), None);
        let answer = [settings.clone(), marked(1)].concat();
        assert_eq!(allowed(&said(&[1]), &answer), Some(true));
        assert_eq!(allowed(&said(&[1]), &answer[..answer.len() - 1]), None);
        assert_eq!(
            allowed(&said(&[1, 3]), &marked(3)),
            Some(false),
            "the first was taken back by its client"
        );
        let refused = frame(HEADERS, END_HEADERS, 1, b"\x88");
        assert_eq!(
            allowed(&said(&[1, 3]), &[refused, marked(3)].concat()),
            Some(false)
        );
        let reset = frame(RESET, 0, 1, &[0; 4]);
        assert_eq!(allowed(&said(&[1]), &[reset, marked(1)].concat()), Some(false));
        let parts = frame(HEADERS, 0, 1, ALLOWED.as_bytes());
        assert_eq!(allowed(&said(&[1]), &parts), Some(false));
        assert_eq!(allowed(&said(&[]), &marked(1)), None, "nothing was asked");
    }
}
