//! Requests inside of requests: what a pod's server might read as two, Envoy reads as one and writes anew, or refuses.
//!
//! The control of every case is a door without a parser, behind which the pod gets all of its bytes.

use super::client::ask;
use super::door::{FULL, Guard, Node};
use super::pod::{fine, silent, text};
use super::policy::{FORMS, Form, declared, undeclared};

/// Bytes of a client, the answers to them (a 200 is the pod's), and all that reaches the pod.
struct Case {
    what: &'static str,
    bytes: String,
    answers: &'static [u16],
    reaches: String,
}

/// Nothing of it reaches the pod.
fn refused(what: &'static str, bytes: impl Into<String>, answers: &'static [u16]) -> Case {
    reaching(what, bytes, answers, "")
}

fn reaching(
    what: &'static str,
    bytes: impl Into<String>,
    answers: &'static [u16],
    reaches: impl Into<String>,
) -> Case {
    Case {
        what,
        bytes: bytes.into(),
        answers,
        reaches: reaches.into(),
    }
}

/// What every request needs to pass in either form of the policy.
const HEAD: &str = "Host: shop.example\r\nX-Role: user\r\n";
const PUBLIC: &str = "GET /public HTTP/1.1\r\nHost: shop.example\r\nX-Role: user\r\n\r\n";
const ADMIN: &str = "GET /admin HTTP/1.1\r\nHost: shop.example\r\nX-Role: user\r\n\r\n";
/// What the pod gets for `PUBLIC`.
const GOT: &str = "GET /public HTTP/1.1\r\nhost: shop.example\r\nx-role: user\r\n\r\n";

fn get(headers: &str) -> String {
    format!("GET /public HTTP/1.1\r\n{HEAD}{headers}\r\n")
}

/// An allowed request with these header lines, and then a body or what a server may take for the next request.
fn post(headers: &str, rest: &str) -> String {
    format!("POST /public HTTP/1.1\r\n{HEAD}{headers}\r\n{rest}")
}

fn chunked(body: &str) -> String {
    post("Transfer-Encoding: chunked\r\n", body)
}

/// `post` as the pod gets it.
fn posted(headers: &str, body: &str) -> String {
    format!("POST /public HTTP/1.1\r\nhost: shop.example\r\nx-role: user\r\n{headers}\r\n{body}")
}

/// A body of chunks, as Envoy writes it.
fn rewritten(body: &str) -> String {
    posted("transfer-encoding: chunked\r\n", body)
}

/// Each case has a pod of its own under each form of the policy, whose whole record is compared; and one behind a
/// door without a parser, which gets what was sent.
async fn as_said(cases: &[Case]) {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let mut faults = Vec::new();
    let (mut doors, mut expected) = (Vec::new(), Vec::new());
    for case in cases {
        for form in FORMS {
            let door = node.door(&declared(form), FULL, fine).await;
            let mut stream = node.connect(&door);
            // To an ALLOW that names paths a CONNECT has none; to a DENY too, and then it has no route.
            let connects = case.bytes.starts_with("CONNECT shop") && form == Form::Allow;
            let wanted: &[u16] = if connects { &[403] } else { case.answers };
            let answers = ask(&mut stream, case.bytes.as_bytes(), wanted.len());
            if answers != wanted {
                let what = case.what;
                faults.push(format!("{what} ({form:?}): {answers:?}, not {wanted:?}"));
            }
            doors.push(door);
            expected.push((case.what, case.reaches.clone()));
        }
        let open = node.door(&declared(FORMS[0]), Guard::NoParser, silent).await;
        let mut stream = node.connect(&open);
        ask(&mut stream, case.bytes.as_bytes(), 0);
        open.pod.wait(|bytes| bytes.len() >= case.bytes.len());
        doors.push(open);
        expected.push((case.what, text(&[case.bytes.as_bytes().to_vec()])));
    }
    for ((what, expected), record) in expected.into_iter().zip(node.finish_all(doors).await) {
        let reached = text(&record);
        if reached != expected {
            faults.push(format!("{what}: {reached:?} reached the pod, not {expected:?}"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    println!("{} cases, each in two forms and with its control", cases.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_behind_an_allowed_one_is_judged_by_itself() {
    let all = |parts: &[&str]| parts.concat();
    as_said(&[
        reaching("denied second", all(&[PUBLIC, ADMIN]), &[200, 403], GOT),
        reaching("denied first", all(&[ADMIN, PUBLIC]), &[403, 200], GOT),
        // Envoy answers no third one: it ends a connection behind a refusal that others wait for.
        reaching(
            "denied in the middle",
            all(&[PUBLIC, ADMIN, PUBLIC]),
            &[200, 403],
            GOT,
        ),
        reaching(
            "behind a body",
            post("Content-Length: 2\r\n", "ab") + ADMIN,
            &[200, 403],
            posted("content-length: 2\r\n", "ab"),
        ),
        reaching(
            "behind chunks",
            chunked("0\r\n\r\n") + ADMIN,
            &[200, 403],
            rewritten("0\r\n\r\n"),
        ),
        // A body is a body, whatever it looks like: it has the length that its head says, and the pod reads that head.
        reaching(
            "as the body of an allowed one",
            post("Content-Length: 59\r\n", ADMIN),
            &[200],
            posted("content-length: 59\r\n", ADMIN),
        ),
        reaching(
            "as HTTP/2 behind HTTP/1",
            all(&[PUBLIC, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]),
            &[200, 400],
            GOT,
        ),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_with_two_lengths_or_a_strange_one_is_refused() {
    let length = |said: &str| post(&format!("Content-Length: {said}\r\n"), ADMIN);
    as_said(&[
        refused(
            "length and chunks",
            post(
                "Content-Length: 64\r\nTransfer-Encoding: chunked\r\n",
                &format!("0\r\n\r\n{ADMIN}"),
            ),
            &[400],
        ),
        refused(
            "chunks and length",
            post(
                "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
                &format!("3b\r\n{ADMIN}\r\n0\r\n\r\n"),
            ),
            &[400],
        ),
        refused(
            "two lengths",
            post("Content-Length: 0\r\nContent-Length: 59\r\n", ADMIN),
            &[400],
        ),
        refused(
            "the same length twice",
            post("Content-Length: 59\r\nContent-Length: 59\r\n", ADMIN),
            &[400],
        ),
        refused("a list of lengths", length("0, 59"), &[400]),
        refused("a length with a sign", length("+0"), &[400]),
        refused("a negative length", length("-1"), &[400]),
        refused("a length in base 16", length("0x3b"), &[400]),
        refused("an empty length", length(""), &[400]),
        refused("a length beyond 64 bits", length("18446744073709551616"), &[400]),
        refused("a length that goes on", length("0 59"), &[400]),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_encoding_other_than_chunks_is_refused() {
    let coded = |said: &str| {
        post(
            &format!("Transfer-Encoding: {said}\r\n"),
            &format!("0\r\n\r\n{ADMIN}"),
        )
    };
    as_said(&[
        refused("identity", coded("identity"), &[501]),
        refused("almost chunked", coded("xchunked"), &[501]),
        refused("chunked first", coded("chunked, identity"), &[501]),
        refused("chunked last", coded("identity, chunked"), &[501]),
        refused("two lines", coded("chunked\r\nTransfer-Encoding: x"), &[501]),
        refused(
            "chunked twice",
            coded("chunked\r\nTransfer-Encoding: chunked"),
            &[501],
        ),
        refused("a byte in front", coded("\u{b}chunked"), &[400]),
        refused("in quotes", coded("\"chunked\""), &[501]),
        reaching(
            "in capitals",
            coded("CHUNKED"),
            &[200, 403],
            rewritten("0\r\n\r\n"),
        ),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_reach_the_pod_as_envoy_has_read_them() {
    let empty = || rewritten("0\r\n\r\n");
    as_said(&[
        reaching(
            "an extension",
            chunked(&format!("0;a=b\r\n\r\n{ADMIN}")),
            &[200, 403],
            empty(),
        ),
        reaching(
            "space behind the size",
            chunked(&format!("0 \r\n\r\n{ADMIN}")),
            &[200, 403],
            empty(),
        ),
        refused(
            "a line feed in an extension",
            chunked(&format!("2;\nxx\r\n3b\r\n0\r\n\r\n{ADMIN}\r\n0\r\n\r\n")),
            &[400],
        ),
        refused("a size in C", chunked(&format!("0x0\r\n\r\n{ADMIN}")), &[400]),
        refused(
            "a size with a sign",
            chunked(&format!("+0\r\n\r\n{ADMIN}")),
            &[400],
        ),
        refused(
            "space before the size",
            chunked(&format!(" 0\r\n\r\n{ADMIN}")),
            &[400],
        ),
        refused(
            "a size beyond 64 bits",
            chunked(&format!("10000000000000000\r\n\r\n{ADMIN}")),
            &[400],
        ),
        refused("no size", chunked(&format!(";a\r\n\r\n{ADMIN}")), &[400]),
        refused("line feeds alone", chunked(&format!("0\n\n{ADMIN}")), &[400]),
        // Envoy skips what is too much, and the pod never sees it.
        reaching(
            "more than the size",
            chunked(&format!("1\r\nab\r\n0\r\n\r\n{ADMIN}")),
            &[200, 403],
            rewritten("1\r\na\r\n0\r\n\r\n"),
        ),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn trailers_are_no_headers_and_go_nowhere() {
    let body = || rewritten("2\r\nab\r\n0\r\n\r\n");
    let trailing = |lines: &str| chunked(&format!("2\r\nab\r\n0\r\n{lines}\r\n"));
    as_said(&[
        reaching("a role", trailing("X-Role: admin\r\n"), &[200], body()),
        reaching("a host", trailing("Host: admin.example\r\n"), &[200], body()),
        refused("a path", trailing(":path: /admin\r\n"), &[400]),
        reaching(
            "a length",
            trailing("Content-Length: 59\r\n") + ADMIN,
            &[200, 403],
            body(),
        ),
        reaching(
            "a folded line",
            trailing("X-A: b\r\n c: d\r\n") + ADMIN,
            &[200, 403],
            body(),
        ),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lines_that_servers_read_differently_reach_the_pod_in_one_reading() {
    let line =
        |text: &str| format!("GET /public HTTP/1.1\r\nhost: shop.example\r\nx-role: user\r\n{text}\r\n");
    as_said(&[
        // RFC 9112 5.2 lets a proxy write a folded line as one.
        reaching(
            "a folded header",
            get("X-A: a\r\n X-Role: admin\r\n"),
            &[200],
            line("x-a: a X-Role: admin\r\n"),
        ),
        reaching(
            "a folded encoding",
            post("Transfer-Encoding:\r\n chunked\r\n", &format!("0\r\n\r\n{ADMIN}")),
            &[200, 403],
            rewritten("0\r\n\r\n"),
        ),
        refused(
            "a folded first header",
            format!("GET /public HTTP/1.1\r\n X-Role: admin\r\n{HEAD}\r\n"),
            &[400],
        ),
        refused("line feeds alone", ADMIN.replace("\r\n", "\n"), &[403]),
        reaching(
            "line feeds alone, allowed",
            PUBLIC.replace("\r\n", "\n"),
            &[200],
            GOT,
        ),
        refused(
            "a line feed between headers",
            get("X-A: a\nContent-Length : 5\r\n"),
            &[400],
        ),
        // Envoy drops a carriage return inside of a value.
        reaching(
            "a carriage return",
            get("X-A: a\rX-Role: admin\r\n"),
            &[200],
            line("x-a: aX-Role: admin\r\n"),
        ),
        refused(
            "space before a colon",
            post("Content-Length : 59\r\n", ADMIN),
            &[400],
        ),
        refused(
            "space before an encoding's",
            post("Transfer-Encoding : chunked\r\n", &format!("0\r\n\r\n{ADMIN}")),
            &[400],
        ),
        refused("a tab before a colon", get("X-Role\t: admin\r\n"), &[400]),
        refused("a zero byte", get("X-A: a\0X-Role: admin\r\n"), &[400]),
        refused("a bracket in a name", get("X(Role: admin\r\n"), &[400]),
        refused("no name", get(": admin\r\n"), &[400]),
        refused("no colon", get("X-Role\r\n"), &[400]),
    ])
    .await;
}

/// Request lines that are none, or hardly.
fn request_lines() -> Vec<(&'static str, String, &'static [u16])> {
    let line = |line: &str| format!("{line}\r\n{HEAD}\r\n");
    vec![
        ("HTTP/0.9", "GET /admin\r\n".to_owned(), &[426]),
        ("HTTP/1.0", line("GET /admin HTTP/1.0"), &[426]),
        ("HTTP/9.9", line("GET /admin HTTP/9.9"), &[426]),
        ("http/1.1", line("GET /admin http/1.1"), &[400]),
        ("empty lines in front", format!("\r\n\r\n{ADMIN}"), &[403]),
        ("a line feed in front", format!("\n{ADMIN}"), &[403]),
        ("space in front", format!(" {ADMIN}"), &[400]),
        (
            "a proxy's header in front",
            format!("PROXY TCP4 10.0.0.1 10.0.0.2 1 80\r\n{ADMIN}"),
            &[400],
        ),
        ("a method in small letters", line("get /admin HTTP/1.1"), &[400]),
        (
            "a method that nobody knows",
            line("ADMIN /admin HTTP/1.1"),
            &[400],
        ),
        ("tabs", line("GET\t/admin\tHTTP/1.1"), &[403]),
        ("two spaces", line("GET  /admin HTTP/1.1"), &[403]),
        ("two targets", line("GET /public /admin HTTP/1.1"), &[400]),
        ("space behind the version", line("GET /admin HTTP/1.1 "), &[403]),
        (
            "no host",
            "GET /public HTTP/1.1\r\nX-Role: user\r\n\r\n".to_owned(),
            &[400],
        ),
        ("no path", line("GET admin HTTP/1.1"), &[400]),
        ("a path of zero", line("GET /admin\0 HTTP/1.1"), &[400]),
        ("TRACE", line("TRACE /admin HTTP/1.1"), &[403]),
        (
            "a way through",
            line("CONNECT shop.example:80 HTTP/1.1") + ADMIN,
            &[404],
        ),
        (
            "a way through to a path",
            line("CONNECT /admin HTTP/1.1") + ADMIN,
            &[400],
        ),
        (
            "an answer before the body",
            line("POST /admin HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 4"),
            &[403],
        ),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_strange_request_line_opens_nothing() {
    let lines = request_lines().into_iter();
    let cases: Vec<_> = lines
        .map(|(what, bytes, answers)| refused(what, bytes, answers))
        .collect();
    as_said(&cases).await;
}

/// Where nobody says what a port speaks, what the inspector doesn't take for HTTP gets the TCP reading: denied too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_an_undeclared_port_what_is_hardly_http_reaches_nobody() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let mut doors = Vec::new();
    for form in FORMS {
        let door = node.door(&undeclared(form), FULL, fine).await;
        for (what, bytes, _) in request_lines() {
            let answers = ask(&mut node.connect(&door), bytes.as_bytes(), 1);
            assert!(!answers.contains(&200), "{what}: {answers:?}");
        }
        // The control: what is HTTP and allowed passes the same door.
        assert_eq!(ask(&mut node.connect(&door), PUBLIC.as_bytes(), 1), [200]);
        doors.push(door);
    }
    for record in node.finish_all(doors).await {
        assert_eq!(text(&record), GOT);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_head_without_end_is_refused() {
    let long = "a".repeat(100_000);
    let many = "X-A: a\r\n".repeat(200);
    as_said(&[
        refused("a header of 100 KB", get(&format!("X-A: {long}\r\n")), &[431]),
        refused(
            "a target of 100 KB",
            format!("GET /public/{long} HTTP/1.1\r\n{HEAD}\r\n"),
            &[431],
        ),
        refused("200 headers", get(&many), &[431]),
        refused(
            "a role behind them",
            get(&format!("{many}X-Role: admin\r\n")),
            &[431],
        ),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_to_another_protocol_is_no_way_around() {
    let upgrade = |target: &str, to: &str| {
        format!("GET {target} HTTP/1.1\r\n{HEAD}Connection: Upgrade, HTTP2-Settings\r\nUpgrade: {to}\r\n")
            + "HTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
    };
    as_said(&[
        // What is left of it is an ordinary request, and so is the next one.
        reaching("to h2c", upgrade("/public", "h2c") + ADMIN, &[200, 403], GOT),
        refused("to h2c on a denied path", upgrade("/admin", "h2c"), &[403]),
        refused("to what nobody speaks", upgrade("/public", "raw") + ADMIN, &[403]),
        refused("to TLS", upgrade("/public", "TLS/1.2") + ADMIN, &[403]),
        refused(
            "to WebSocket on a denied path",
            upgrade("/admin", "websocket") + PUBLIC,
            &[403],
        ),
    ])
    .await;
}
