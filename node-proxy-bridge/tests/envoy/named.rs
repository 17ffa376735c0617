//! What was found once, each by its name: Envoy and the host say the same of it.

use std::net::IpAddr;
use std::sync::Arc;

use serde_json::json;
use thyra_datapath_abi::tables::{PolicyRef, RuleRef};
use thyra_datapath_abi::{Action, Reason};
use thyra_node_proxy_bridge::listener::Reading;
use thyra_policy_compiler::policy::{Field, StringMatch};
use thyra_policy_compiler::residual::{Answer, Conditions, Decides, Residual, Rules, Test};
use thyra_policy_compiler::traffic::{PathNormalization, Request, Traffic};

use super::client;
use super::judged::Case;
use super::node::{Node, binary, wanted};
use super::token;

/// A residual that allows what meets `when`, and a stream that it is asked about.
struct Named {
    what: &'static str,
    when: Test,
    traffic: Traffic,
    source: &'static str,
    passes: bool,
}

pub(crate) fn rule(name: &str) -> RuleRef {
    RuleRef {
        policy: PolicyRef {
            namespace: "shop".into(),
            name: name.into(),
        },
        rule: Some(0),
    }
}

/// Allows what meets one of `when`: server names of a stream, all else of a request.
pub(crate) fn allowing(name: &str, when: Vec<Test>) -> Arc<Residual<RuleRef>> {
    let conditions = |test: &Test| match test {
        Test::Host(_) | Test::Method(_) | Test::Path(_) => Conditions {
            to: vec![vec![test.clone()]],
            ..Conditions::default()
        },
        _ => Conditions {
            when: vec![test.clone()],
            ..Conditions::default()
        },
    };
    let allow = when.iter().map(|test| (rule(name), Arc::new(conditions(test))));
    let answer = Answer::Rules(Arc::new(Rules {
        custom: Vec::new(),
        deny: Vec::new(),
        allow: allow.collect(),
        default_deny: true,
        decides: Decides::EachRequest,
    }));
    let nothing = Answer::Constant(Action::Deny, Reason::Policy, None);
    let is_http = when.iter().any(|test| !matches!(test, Test::Sni(_)));
    let (http, other) = if is_http {
        (token::checked(&answer), nothing)
    } else {
        (nothing, answer)
    };
    Arc::new(Residual { http, other })
}

pub(crate) fn values<T>(values: Vec<T>) -> Field<T> {
    Field {
        values,
        not_values: Vec::new(),
    }
}

fn exact(text: &str) -> Field<StringMatch> {
    values(vec![StringMatch::Exact(text.into())])
}

fn present() -> Field<StringMatch> {
    values(vec![StringMatch::Present])
}

fn not(field: Field<StringMatch>) -> Field<StringMatch> {
    Field {
        values: Vec::new(),
        not_values: field.values,
    }
}

fn header(name: &str, field: Field<StringMatch>) -> Test {
    Test::Key(format!("request.headers[{name}]").into(), field)
}

pub(crate) fn get(target: &str) -> Request {
    Request {
        method: "GET".into(),
        target: target.into(),
        authority: "shop.example".into(),
        ..Request::default()
    }
}

fn http(request: Request) -> Traffic {
    Traffic {
        http: Some(request),
        ..Traffic::default()
    }
}

fn with(headers: &[(&str, &str)]) -> Traffic {
    let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
    http(Request {
        headers: headers.collect(),
        ..get("/")
    })
}

fn hello(name: &str) -> Traffic {
    Traffic {
        sni: Some(name.into()),
        ..Traffic::default()
    }
}

fn claims(claims: serde_json::Value) -> Traffic {
    http(Request {
        claims: claims.as_object().cloned(),
        ..get("/")
    })
}

fn case(what: &'static str, when: Test, traffic: Traffic, passes: bool) -> Named {
    Named {
        what,
        when,
        traffic,
        source: "10.244.0.3",
        passes,
    }
}

fn lines() -> Vec<Named> {
    let a = |field| header("x-a", field);
    let two = [("x-a", "a"), ("x-a", "b")];
    let joined = [("accept", "a"), ("accept", "b")];
    let gaps = [("accept", ""), ("accept", "a"), ("accept", "")];
    let cookies = [("cookie", "a"), ("cookie", "b")];
    vec![
        case("one line of two is enough", a(exact("b")), with(&two), true),
        case("and enough to refuse", a(not(exact("b"))), with(&two), false),
        case("lines are not one text", a(exact("a,b")), with(&two), false),
        case(
            "accept is one text",
            header("accept", exact("a,b")),
            with(&joined),
            true,
        ),
        case(
            "accept has no lines",
            header("accept", exact("b")),
            with(&joined),
            false,
        ),
        case(
            "an empty line is not joined",
            header("accept", exact("a")),
            with(&gaps),
            true,
        ),
        case(
            "cookies are lines",
            header("cookie", exact("b")),
            with(&cookies),
            true,
        ),
        case(
            "an empty header is there",
            a(present()),
            with(&[("x-a", "")]),
            true,
        ),
        case("an absent header is not", a(present()), with(&[]), false),
        case(
            "names have no case",
            header("X-A", exact("a")),
            with(&[("x-a", "a")]),
            true,
        ),
        case("values have", a(exact("A")), with(&[("x-a", "a")]), false),
    ]
}

fn headers() -> Vec<Named> {
    let te = |value| with(&[("te", value)]);
    let trailers = || header("te", exact("trailers"));
    let websocket = || header("upgrade", exact("websocket"));
    let upgrade = [("upgrade", "websocket"), ("connection", "Upgrade")];
    let proto = |value| header("x-forwarded-proto", exact(value));
    let certificate = "x-forwarded-client-cert";
    let normal = header(":path", exact("/b?c=/../d"));
    vec![
        case("te says trailers", trailers(), te("gzip, trailers"), true),
        case("in lower case", trailers(), te("Trailers"), false),
        case("or nothing", header("te", exact("gzip")), te("gzip"), false),
        case(
            "upgrade alone is nothing",
            websocket(),
            with(&upgrade[..1]),
            false,
        ),
        case("an upgrade is seen", websocket(), with(&upgrade), true),
        case(
            "connection is not",
            header("connection", present()),
            with(&[("connection", "close")]),
            false,
        ),
        case(
            "nor a client's certificate",
            header(certificate, present()),
            with(&[(certificate, "By=x")]),
            false,
        ),
        case("the protocol is http", proto("http"), with(&[]), true),
        case(
            "or what the client says",
            proto("https"),
            with(&[("x-forwarded-proto", "https")]),
            true,
        ),
        case(
            "a request has an id",
            header("x-request-id", present()),
            with(&[]),
            true,
        ),
        case(
            "the scheme is http",
            header(":scheme", exact("http")),
            with(&[]),
            true,
        ),
        case(
            "host is the authority",
            header("host", exact("shop.example")),
            with(&[]),
            true,
        ),
        case(
            "the method is a header",
            header(":method", exact("GET")),
            with(&[]),
            true,
        ),
        case(
            "`:path` is normalised, its query is not",
            normal,
            http(get("/a/../b?c=/../d")),
            true,
        ),
    ]
}

fn targets() -> Vec<Named> {
    let path = |value: &str| Test::Path(values(vec![value.into()]));
    let host = |value: &str| Test::Host(exact(value));
    let at = |target| http(get(target));
    vec![
        case(
            "an absolute target's host goes first",
            host("h"),
            at("http://h/"),
            true,
        ),
        case(
            "and `Host` is nothing then",
            host("shop.example"),
            at("http://h/"),
            false,
        ),
        case(
            "user and password are no host",
            host("h:81"),
            at("http://u:p@h:81/"),
            true,
        ),
        case("hosts have no case", host("SHOP.Example"), at("/"), true),
        case("an absolute target has a path", path("/"), at("http://h"), true),
        case("parameters of dots go", path("/admin"), at("/a/..;x/admin"), true),
        case("also at the end", path("/"), at("/a/..;"), true),
        case(
            "but not of escaped dots",
            path("/a/..;x/b"),
            at("/a/%2e%2e;x/b"),
            true,
        ),
        case(
            "nor between backslashes",
            path("/a/..;x/b"),
            at("/a\\..;x\\b"),
            true,
        ),
        case("some bytes become escaped", path("/a%7Cb"), at("/a|b"), true),
        case(
            "unreserved bytes are decoded",
            path("/admin"),
            at("/%61dmin"),
            true,
        ),
        case("a slash is not", path("/a%2fb"), at("/a%2fb"), true),
        case("a fragment is refused", path("*"), at("/a#b"), false),
        case("a zero byte is refused", path("*"), at("/a%00b"), false),
        case("no path is refused", path("*"), at("*"), false),
        case("a segment is not empty", path("/a/{*}"), at("/a/"), false),
        case("a run of segments may be", path("/a/{**}"), at("/a/"), true),
        case("a segment has no slash", path("/a/{*}"), at("/a/b/c"), false),
        case("a template sees no query", path("/a/{*}"), at("/a/b?c/d"), true),
        case("a semicolon is a letter", path("/a/{*}"), at("/a/b;c"), true),
        case("a star in the middle is a star", path("/a*b"), at("/axb"), false),
        case(
            "methods are as written",
            Test::Method(exact("get")),
            at("/"),
            false,
        ),
    ]
}

fn clients() -> Vec<Named> {
    let remote = |block: &str| Test::RemoteIp(values(vec![block.parse().unwrap()]));
    let from = |list: &str| with(&[("x-forwarded-for", list)]);
    let two = [
        ("x-forwarded-for", "192.0.2.1"),
        ("x-forwarded-for", "198.51.100.7"),
    ];
    let pods = || remote("10.244.0.0/24");
    let list = "203.0.113.7, 192.0.2.1";
    vec![
        case(
            "without X-Forwarded-For it is the source",
            pods(),
            with(&[]),
            true,
        ),
        Named {
            source: "2001:db8::7",
            ..case("of IPv6 too", remote("2001:db8::/32"), with(&[]), true)
        },
        case(
            "the last address is the client",
            remote("192.0.2.1/32"),
            from(list),
            true,
        ),
        case("not the first", remote("203.0.113.7/32"), from(list), false),
        case("not the source", pods(), from("192.0.2.1"), false),
        case("the last line's", remote("198.51.100.7/32"), with(&two), true),
        case(
            "what is no address is nobody's",
            pods(),
            from("192.0.2.1, me"),
            true,
        ),
        case(
            "an address with a port is none",
            pods(),
            from("192.0.2.1:80"),
            true,
        ),
        case(
            "IPv4 as IPv6 is IPv4",
            remote("192.0.2.0/24"),
            from("::ffff:192.0.2.1"),
            true,
        ),
    ]
}

// long: a table, a case each
fn tokens() -> Vec<Named> {
    use StringMatch::{Exact, Prefix, Present, Suffix};
    let principal = |value| Test::RequestPrincipal(values(vec![value]));
    let claim = |path: &str, field| Test::Key(format!("request.auth.claims{path}").into(), field);
    let of = |issuer: &str, subject: &str| claims(json!({"iss": issuer, "sub": subject}));
    let also = |name: &str, value: serde_json::Value| claims(json!({"iss": "a", name: value}));
    vec![
        case(
            "issuer and subject",
            principal(Exact("a/b/s".into())),
            of("a/b", "s"),
            true,
        ),
        case(
            "`a/*` is one issuer",
            principal(Prefix("a/".into())),
            of("a/b", "s"),
            false,
        ),
        case(
            "`a/*` is any subject",
            principal(Prefix("a/".into())),
            of("a", "s"),
            true,
        ),
        case(
            "`a*` is many issuers",
            principal(Prefix("a".into())),
            of("a/b", "s"),
            true,
        ),
        case(
            "`*/s` is any issuer",
            principal(Suffix("/s".into())),
            of("a/b", "s"),
            true,
        ),
        case(
            "`*b/s` is an issuer's end",
            principal(Suffix("b/s".into())),
            of("a/b", "s"),
            true,
        ),
        case(
            "`*s` is a subject's end",
            principal(Suffix("s".into())),
            of("a", "xs"),
            true,
        ),
        case(
            "a subject is not cut",
            principal(Exact("a/b/s".into())),
            of("a", "b/s"),
            false,
        ),
        case("any token", principal(Present), of("a", "s"), true),
        case("no token", principal(Present), with(&[]), false),
        case(
            "no subject, no principal",
            principal(Present),
            claims(json!({"iss": "a"})),
            false,
        ),
        case(
            "scopes are a list",
            claim("[scope]", exact("r")),
            also("scope", json!("w r")),
            true,
        ),
        case(
            "other texts are not",
            claim("[g]", exact("r")),
            also("g", json!("w r")),
            false,
        ),
        case(
            "a claim in a claim",
            claim("[n][m]", exact("x")),
            also("n", json!({"m": ["x"]})),
            true,
        ),
        case(
            "a number is no text",
            claim("[n]", exact("7")),
            also("n", json!(7)),
            false,
        ),
        case(
            "a text may have lines",
            claim("[n]", present()),
            also("n", json!("x\ny")),
            true,
        ),
    ]
}

fn server_names() -> Vec<Named> {
    let domain = values(vec![StringMatch::Suffix(".example".into())]);
    let one = || exact("one.example");
    let none = Traffic::default();
    vec![
        case("a server name", Test::Sni(one()), hello("one.example"), true),
        case("another one", Test::Sni(one()), hello("two.example"), false),
        case("read in lower case", Test::Sni(one()), hello("One.EXAMPLE"), true),
        case(
            "so upper case matches none",
            Test::Sni(exact("One.example")),
            hello("One.example"),
            false,
        ),
        case("a domain", Test::Sni(domain), hello("one.example"), true),
        case("no TLS has no name", Test::Sni(present()), none.clone(), false),
        case("no name is not that one", Test::Sni(not(one())), none, true),
    ]
}

fn reading(named: &Named) -> Reading {
    match named.when {
        Test::Sni(_) => Reading::Stream,
        _ => Reading::Http,
    }
}

/// How Envoy disagrees with the host or with the case; what is malformed it refuses without asking a rule.
async fn wrong(node: &Node, named: &Named, residual: &Residual<RuleRef>) -> Option<String> {
    let oracle = node.oracle(&(reading(named), residual.address())).await;
    let case = Case {
        residual,
        traffic: named.traffic.clone(),
        source: named.source.parse::<IpAddr>().unwrap(),
        paths: PathNormalization::Base,
    };
    let request = case.traffic.http.as_ref();
    if let Some(request) = request.filter(|request| request.malformed(case.paths).is_some()) {
        let mut stream = client::connect(&oracle, case.source).await;
        let reply = client::ask(&mut stream, &client::http(request)).await;
        return (![400, 404].contains(&reply.status)).then(|| format!("{reply:?}"));
    }
    match case.compare(&oracle).await {
        Ok(passes) => (passes != named.passes).then(|| format!("both say {passes}")),
        Err(words) => Some(words),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_found_once_stays_found() {
    let Some(binary) = binary().await else { return };
    let mut node = Node::start(&binary, PathNormalization::Base, true).await;
    let groups = [lines(), headers(), targets(), clients(), tokens(), server_names()];
    let all: Vec<Named> = groups.into_iter().flatten().collect();
    let residuals: Vec<_> = all
        .iter()
        .map(|named| allowing("named", vec![named.when.clone()]))
        .collect();
    let pairs = || all.iter().zip(&residuals);
    let cells: Vec<_> = pairs()
        .map(|(named, residual)| wanted(named.what, reading(named), residual))
        .collect();
    node.bridge.apply(&cells);
    let mut faults = Vec::new();
    for (named, residual) in pairs() {
        if let Some(fault) = wrong(&node, named, residual).await {
            faults.push(format!("{}: {fault}", named.what));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    println!("{} named cases", all.len());
    node.supervisor.stop().await;
}

/// Paths with every byte, as it is and escaped, between letters and after dots.
fn paths_of_every_byte() -> Vec<String> {
    let mut targets = Vec::new();
    for byte in 0..=255_u8 {
        let letter = char::from(byte);
        targets.push(format!("/a%{byte:02x}/b"));
        targets.push(format!("/a/..%{byte:02X}/b"));
        if byte.is_ascii_graphic() {
            let some = [
                format!("/a{letter}b"),
                format!("/a/..{letter}b/c"),
                format!("/a/.{letter}"),
            ];
            targets.extend(some);
        }
    }
    targets
}

/// What the host makes of a path is what Envoy matches, and what the host calls malformed Envoy refuses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_byte_of_a_path_is_read_alike() {
    use PathNormalization::{Base, DecodeAndMergeSlashes, MergeSlashes, None};
    let Some(binary) = binary().await else { return };
    for paths in [None, Base, MergeSlashes, DecodeAndMergeSlashes] {
        let mut node = Node::start(&binary, paths, true).await;
        for some in paths_of_every_byte().chunks(64) {
            let read = |target: &String| get(target).path_and_query(paths);
            let residuals: Vec<_> = some
                .iter()
                .map(|target| allowing("bytes", vec![header(":path", exact(&read(target)))]))
                .collect();
            let pairs = || some.iter().zip(&residuals);
            let cells: Vec<_> = pairs()
                .map(|(target, residual)| wanted(target, Reading::Http, residual))
                .collect();
            node.bridge.apply(&cells);
            for (target, residual) in pairs() {
                let oracle = node.oracle(&(Reading::Http, residual.address())).await;
                let mut stream = client::connect(&oracle, "10.0.0.2".parse().unwrap()).await;
                let reply = client::ask(&mut stream, &client::http(&get(target))).await;
                let malformed = get(target).malformed(paths);
                let fine: &[u16] = if malformed.is_some() { &[400, 404] } else { &[200] };
                assert!(
                    fine.contains(&reply.status),
                    "{target} ({paths:?}): {reply:?}, read as {}, {malformed:?}",
                    read(target)
                );
            }
        }
        node.supervisor.stop().await;
    }
}
