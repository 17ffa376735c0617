//! HTTP/2 on a port of HTTP/1: requests that no library makes, and what is left of those that pass.

use std::io::Write as _;
use std::net::TcpStream;

use super::door::{FULL, Guard, Node};
use super::frames::{
    CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, Reply, block, count_headers, frame,
    opening, reply, request, requests,
};
use super::pod::silent;
use super::policy::{FORMS, Form, declared, undeclared};

const METHOD: (&str, &str) = (":method", "GET");
const SCHEME: (&str, &str) = (":scheme", "http");
const AUTHORITY: (&str, &str) = (":authority", "shop.example");
const PATH: (&str, &str) = (":path", "/public");
const ADMIN: (&str, &str) = (":path", "/admin");
const ROLE: (&str, &str) = ("x-role", "user");

fn at(path: &str) -> [(&str, &str); 5] {
    [METHOD, SCHEME, AUTHORITY, (":path", path), ROLE]
}

/// An allowed request with one field more.
fn with<'a>(name: &'a str, value: &'a str) -> [(&'a str, &'a str); 6] {
    [METHOD, SCHEME, AUTHORITY, PATH, ROLE, (name, value)]
}

struct Case {
    what: &'static str,
    bytes: Vec<u8>,
    reply: Reply,
}

/// Refused on the first stream.
fn refused(what: &'static str, fields: &[(&str, &str)], reply: Reply) -> Case {
    Case {
        what,
        bytes: [opening(), request(1, fields)].concat(),
        reply,
    }
}

/// Nothing of any case reaches the pod; behind a door without a parser all of it does.
async fn nothing_reaches_the_pod(form: Form, cases: &[Case]) {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let mut faults = Vec::new();
    let (mut doors, mut asked, mut expected) = (Vec::new(), Vec::new(), Vec::new());
    for case in cases {
        let door = node.door(&declared(form), FULL, silent).await;
        let mut stream = node.connect(&door);
        // Envoy may end it before all was said.
        let _said = stream.write_all(&case.bytes);
        asked.push(stream);
        doors.push(door);
        expected.push((case.what, Vec::new()));
        let open = node.door(&declared(form), Guard::NoParser, silent).await;
        let mut through = node.connect(&open);
        through.write_all(&case.bytes).unwrap();
        open.pod.wait(|got| got == case.bytes);
        doors.push(open);
        expected.push((case.what, vec![case.bytes.clone()]));
    }
    // Only now: Envoy leaves a connection that it refuses open for a second, so that its last words arrive.
    for (mut stream, case) in asked.into_iter().zip(cases) {
        let heard = reply(&mut stream, 1);
        if heard != case.reply {
            faults.push(format!("{}: {heard:?}, not {:?}", case.what, case.reply));
        }
    }
    for ((what, expected), record) in expected.into_iter().zip(node.finish_all(doors).await) {
        if record != expected {
            faults.push(format!(
                "{what}: {:?} reached the pod",
                String::from_utf8_lossy(&record.concat())
            ));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_denied_request_of_http2_reaches_nobody() {
    let denied = Reply::Status(403);
    let mut cases = vec![
        refused(
            "a method",
            &[(":method", "DELETE"), SCHEME, AUTHORITY, PATH, ROLE],
            denied,
        ),
        refused(
            "an authority",
            &[METHOD, SCHEME, (":authority", "admin.example"), PATH, ROLE],
            denied,
        ),
        refused(
            "a host alone",
            &[METHOD, SCHEME, PATH, ROLE, ("host", "admin.example")],
            denied,
        ),
        refused(
            "a role",
            &[METHOD, SCHEME, AUTHORITY, PATH, ("x-role", "admin")],
            denied,
        ),
    ];
    let disguised = [
        "/admin",
        "/admin?x",
        "/x/../admin",
        "/x\\..\\admin",
        "/%61dmin",
        "/x/%2e%2e/admin",
        "/admin/",
    ];
    cases.extend(disguised.map(|path| refused("a path", &at(path), denied)));
    nothing_reaches_the_pod(Form::Allow, &cases).await;
    // One line that is allowed is enough for an ALLOW.
    cases.push(refused("a second role", &with("x-role", "admin"), denied));
    nothing_reaches_the_pod(Form::Deny, &cases).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_of_http2_that_is_none_reaches_nobody() {
    // What CONNECT asks for has no path: a DENY of paths leaves it to the routes, where there is none.
    for (form, tunnel) in [(Form::Deny, 404), (Form::Allow, 403)] {
        nothing_reaches_the_pod(form, &malformed(Reply::Status(tunnel))).await;
    }
}

// long: a table, a case each
fn malformed(tunnel: Reply) -> Vec<Case> {
    use Reply::{Gone, Status};
    let injected = "/public HTTP/1.1\r\nhost: shop.example\r\n\r\nGET /admin";
    vec![
        refused("two paths", &[METHOD, SCHEME, AUTHORITY, PATH, ADMIN, ROLE], Gone),
        refused(
            "two paths, the other way",
            &[METHOD, SCHEME, AUTHORITY, ADMIN, PATH, ROLE],
            Gone,
        ),
        refused("no path", &[METHOD, SCHEME, AUTHORITY, ROLE], Gone),
        refused("an empty path", &at(""), Gone),
        refused("a path without a slash", &at("admin"), Gone),
        refused("a path with an authority", &at("http://shop.example/admin"), Gone),
        refused("a path with a fragment", &at("/public#/../admin"), Status(400)),
        refused(
            "a path behind a header",
            &[METHOD, SCHEME, AUTHORITY, ROLE, ADMIN],
            Gone,
        ),
        refused("a request in a path", &at(injected), Gone),
        refused("a zero in a path", &at("/public\0/admin"), Gone),
        refused(
            "two authorities",
            &[
                METHOD,
                SCHEME,
                AUTHORITY,
                (":authority", "admin.example"),
                PATH,
                ROLE,
            ],
            Gone,
        ),
        refused(
            "two methods",
            &[METHOD, (":method", "DELETE"), SCHEME, AUTHORITY, PATH, ROLE],
            Gone,
        ),
        refused(
            "a request in a method",
            &[
                (":method", "GET /admin HTTP/1.1\r\n"),
                SCHEME,
                AUTHORITY,
                PATH,
                ROLE,
            ],
            Gone,
        ),
        refused("a field that only proxies may make", &with(":admin", "yes"), Gone),
        refused(
            "an answer's field",
            &[METHOD, SCHEME, AUTHORITY, PATH, (":status", "200"), ROLE],
            Gone,
        ),
        refused("a name in capitals", &with("X-Role", "admin"), Gone),
        refused("a header in a value", &with("x-a", "a\r\nx-role: admin"), Gone),
        refused("a header in a name", &with("x-a: b\r\nx-role", "admin"), Gone),
        refused("a connection's own header", &with("connection", "x-role"), Gone),
        refused("an encoding", &with("transfer-encoding", "chunked"), Gone),
        refused("an upgrade", &with("upgrade", "websocket"), Gone),
        refused("a tunnel", &[(":method", "CONNECT"), AUTHORITY, ROLE], tunnel),
        refused(
            "a tunnel to a path",
            &[
                (":method", "CONNECT"),
                (":protocol", "websocket"),
                SCHEME,
                AUTHORITY,
                PATH,
                ROLE,
            ],
            Gone,
        ),
        Case {
            what: "a stream of the server's",
            bytes: [opening(), request(2, &at("/public"))].concat(),
            reply: Gone,
        },
        Case {
            what: "data before headers",
            bytes: [
                opening(),
                frame(DATA, END_STREAM, 1, b"GET /admin HTTP/1.1\r\n\r\n"),
            ]
            .concat(),
            reply: Gone,
        },
        Case {
            what: "HTTP/1 behind the preface",
            bytes: [PREFACE, b"GET /admin HTTP/1.1\r\nHost: shop.example\r\n\r\n"].concat(),
            reply: Gone,
        },
    ]
}

/// What passes reaches the pod as what was judged, and nothing beside it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_several_streams_only_the_allowed_ones_reach_the_pod() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let (mut doors, mut guards) = (Vec::new(), Vec::new());
    for form in FORMS {
        for (guard, residual) in [
            (FULL, declared(form)),
            (FULL, undeclared(form)),
            (Guard::NoRules, declared(form)),
        ] {
            let door = node.door(&residual, guard, silent).await;
            let mut stream = node.connect(&door);
            let mut bytes = opening();
            // The authority is judged, and no other one is left: RFC 9113 8.3.1.
            bytes.extend(request(1, &with("host", "admin.example")));
            bytes.extend(request(3, &at("/admin")));
            bytes.extend(request(5, &at("/public/x/../y")));
            stream.write_all(&bytes).unwrap();
            if guard == FULL {
                assert_eq!(reply(&mut stream, 3), Reply::Status(403));
            }
            // One at a time over each connection, until the pod says how many it takes.
            let passing = if guard == FULL { 2 } else { 3 };
            let blocks = |all: &[Vec<u8>]| all.iter().map(|one| count_headers(one)).sum::<usize>();
            door.pod.wait_until(|all| blocks(all) == passing);
            doors.push((door, stream));
            guards.push(guard);
        }
    }
    let (doors, _streams): (Vec<_>, Vec<_>) = doors.into_iter().unzip();
    for (record, guard) in node.finish_all(doors).await.into_iter().zip(guards) {
        let mut got = Vec::new();
        for connection in &record {
            got.extend(requests(connection).await);
        }
        got.sort();
        let role = || vec![("x-role".to_owned(), "user".to_owned())];
        let line = |path: &str| (format!("GET http://shop.example{path}"), role());
        let mut expected = vec![line("/public"), line("/public/y")];
        if guard == Guard::NoRules {
            expected.insert(0, line("/admin"));
        }
        assert_eq!(got, expected, "{guard:?}");
    }
}

/// The frame of a request as one of its first `cut` bytes, and what continues it.
fn continued(cut: usize) -> Vec<u8> {
    let all = block(&at("/admin"));
    let mut bytes = opening();
    bytes.extend(frame(HEADERS, END_STREAM, 1, &all[..cut]));
    bytes.extend(frame(CONTINUATION, END_HEADERS, 1, &all[cut..]));
    bytes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_of_http2_in_any_pieces_is_judged_as_a_whole() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let mut doors = Vec::new();
    for form in FORMS {
        let door = node.door(&undeclared(form), FULL, silent).await;
        for cut in 0..block(&at("/admin")).len() {
            let mut stream = node.connect(&door);
            stream.write_all(&continued(cut)).unwrap();
            assert_eq!(reply(&mut stream, 1), Reply::Status(403), "{cut}");
        }
        let whole = [opening(), request(1, &at("/admin"))].concat();
        let cuts = 1..whole.len();
        let mut streams: Vec<TcpStream> = cuts.clone().map(|_| node.connect(&door)).collect();
        for (stream, cut) in streams.iter_mut().zip(cuts.clone()) {
            stream.write_all(&whole[..cut]).unwrap();
        }
        // Whatever was sent before this, Envoy's one worker has read.
        let mut last = node.connect(&door);
        last.write_all(&whole).unwrap();
        assert_eq!(reply(&mut last, 1), Reply::Status(403));
        for (stream, cut) in streams.iter_mut().zip(cuts) {
            stream.write_all(&whole[cut..]).unwrap();
            assert_eq!(reply(stream, 1), Reply::Status(403), "{cut}");
        }
        doors.push(door);
    }
    // The control: without rules the same pieces make a request that reaches the pod.
    let open = node.door(&declared(Form::Deny), Guard::NoRules, silent).await;
    let mut stream = node.connect(&open);
    stream.write_all(&continued(7)).unwrap();
    open.pod.wait(|got| count_headers(got) == 1);
    doors.push(open);
    let records = node.finish_all(doors).await;
    assert!(records[0].is_empty() && records[1].is_empty(), "{records:?}");
    let got = requests(&records[2].concat()).await;
    assert_eq!(got[0].0, "GET http://shop.example/admin");
}
