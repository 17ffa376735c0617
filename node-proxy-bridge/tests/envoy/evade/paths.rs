//! Targets, hosts, methods and headers in disguise: each gets what `thyra dry-run` says, in every way of a mesh with
//! paths, and the pod gets the path that was judged.

use std::collections::BTreeMap;

use thyra_policy_compiler::traffic::{PathNormalization, Request};

use super::super::client;
use super::client::ask;
use super::door::{Guard, Node};
use super::pod::{fine, lines, text};
use super::policy::{FORMS, Form, declared, passes};
use PathNormalization::{Base, DecodeAndMergeSlashes, MergeSlashes};

/// A target and whether it passes a DENY of `/admin` and below, and an ALLOW of `/public` and below; by Istio's
/// default (BASE).
const TARGETS: &[(&str, bool, bool)] = &[
    ("/public", true, true),
    ("/admin", false, false),
    ("/admin/", false, false),
    ("/admin?x", false, false),
    ("/admin?x=/public", false, false),
    ("/public?/../admin", true, true),
    // Segments of dots go.
    ("/x/../admin", false, false),
    ("/public/../admin", false, false),
    ("/./admin", false, false),
    ("/admin/.", false, false),
    ("/admin/..", true, false),
    ("/admin/../public", true, true),
    ("/../../admin", false, false),
    ("/x/..;/admin", false, false),
    // What is escaped without need is decoded, once.
    ("/%61dmin", false, false),
    ("/adm%69n", false, false),
    ("/%2e/admin", false, false),
    ("/x/%2e%2e/admin", false, false),
    ("/x/%2E%2e/admin", false, false),
    ("/x/.%2e/admin", false, false),
    ("/public/%2E./admin", false, false),
    ("/%2561dmin", true, false),
    ("/x/%252e%252e/admin", true, false),
    // BASE reads a backslash as a slash.
    ("/x\\..\\admin", false, false),
    ("/admin\\x", false, false),
    ("/public\\..\\admin", false, false),
    // A sidecar lets these pass by default, and so does Thyra: BASE merges no slashes and leaves %2F and %5C. A pod
    // that reads them otherwise needs `MERGE_SLASHES` or `DECODE_AND_MERGE_SLASHES`, or an ALLOW.
    ("//admin", true, false),
    ("/x/..//admin", true, false),
    ("/\\admin", true, false),
    ("/%2fadmin", true, false),
    ("/%2Fadmin", true, false),
    ("/x%2f..%2fadmin", true, false),
    ("/x%5c..%5cadmin", true, false),
    ("/admin%2f", true, false),
    // Below `/public` by the same reading.
    ("/public/..%2fadmin", true, true),
    ("/public//admin", true, true),
    // Other paths, by the letter.
    ("/ADMIN", true, false),
    ("/admin;x", true, false),
    ("/admin%20", true, false),
    ("/admin%3fx", true, false),
    ("/%41dmin", true, false),
    ("/%c0%ae%c0%ae/admin", true, false),
    // The absolute form: its own host and its own path.
    ("http://shop.example/admin", false, false),
    ("http://shop.example/x/../admin", false, false),
    ("HTTP://shop.example/admin", false, false),
    ("https://shop.example/admin", false, false),
    ("ftp://shop.example/admin", false, false),
    ("http://shop.example/public", true, true),
    ("http:///admin", false, false),
    ("http:/admin", false, false),
    ("//shop.example/admin", true, false),
    ("http://admin.example/public", false, false),
    ("http://shop.example@admin.example/public", false, false),
    ("http://shop.example", true, false),
    // Refused before any rule is asked.
    ("/admin#x", false, false),
    ("/public#/../admin", false, false),
    ("/public%00/admin", false, false),
    ("*", false, false),
];

fn request(target: &str) -> Request {
    Request {
        method: "GET".into(),
        target: target.into(),
        authority: "shop.example".into(),
        headers: vec![("x-role".to_owned(), "user".to_owned())],
        ..Request::default()
    }
}

fn with(headers: &[(&str, &str)]) -> Request {
    let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
    Request {
        headers: headers.collect(),
        ..request("/public")
    }
}

/// Every request on a connection of its own through one door; what the door did, by request, and the lines that
/// reached the pod.
struct Asked {
    passed: Vec<bool>,
    lines: Vec<String>,
}

async fn asked(requests: &[Request], form: Form, guards: &[Guard]) -> Option<Vec<Asked>> {
    let mut node = Node::start().await?;
    let (mut doors, mut passed) = (Vec::new(), Vec::new());
    for guard in guards {
        let door = node.door(&declared(form), *guard, fine).await;
        let through = requests.iter().map(|request| {
            let answers = ask(&mut node.connect(&door), &client::http(request), 1);
            assert!(
                [[200], [400], [403], [404]].contains(&[answers[0]]),
                "{request:?}: {answers:?}"
            );
            answers == [200]
        });
        passed.push(through.collect::<Vec<bool>>());
        doors.push(door);
    }
    let records = node.finish_all(doors).await;
    let both = passed.into_iter().zip(records);
    Some(
        both.map(|(passed, record)| Asked {
            passed,
            lines: lines(&record),
        })
        .collect(),
    )
}

/// What reaches the pod of the requests that pass, sorted.
fn expected<'a>(
    requests: impl Iterator<Item = (&'a Request, bool)>,
    paths: PathNormalization,
) -> Vec<String> {
    let lines = requests.filter(|(_, passes)| *passes).map(|(request, _)| {
        let path = request.path_and_query(paths);
        format!("{} {path} HTTP/1.1", request.method)
    });
    let mut lines: Vec<String> = lines.collect();
    lines.sort();
    lines
}

/// Compares every way with paths with the host, and the default with what the table says.
async fn agree(form: Form) {
    let requests: Vec<Request> = TARGETS.iter().map(|(target, ..)| request(target)).collect();
    let ways = [Base, PathNormalization::None, MergeSlashes, DecodeAndMergeSlashes];
    let Some(all) = asked(&requests, form, &ways.map(Guard::Full)).await else {
        return;
    };
    for (asked, paths) in all.iter().zip(ways) {
        let mut lines = Vec::new();
        for ((request, (target, deny, allow)), passed) in requests.iter().zip(TARGETS).zip(&asked.passed) {
            assert_eq!(
                *passed,
                passes(&declared(form), request, paths),
                "{target} ({paths:?}): dry-run"
            );
            if paths == Base {
                assert_eq!(
                    *passed,
                    [*deny, *allow][usize::from(form == Form::Allow)],
                    "{target}: the table"
                );
            }
            lines.push((request, *passed));
        }
        assert_eq!(asked.lines, expected(lines.into_iter(), paths), "{paths:?}");
    }
    // The control of normalisation: without it more gets past; the stricter ways let less pass.
    let count = |asked: &Asked| asked.passed.iter().filter(|passed| **passed).count();
    let counts: BTreeMap<_, _> = ways.into_iter().zip(all.iter().map(count)).collect();
    println!("{form:?}: {counts:?} of {} targets pass", TARGETS.len());
    assert!(counts[&PathNormalization::None] > counts[&Base], "{counts:?}");
    if form == Form::Deny {
        assert!(counts[&Base] > counts[&MergeSlashes], "{counts:?}");
        assert!(
            counts[&MergeSlashes] > counts[&DecodeAndMergeSlashes],
            "{counts:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_denied_path_in_disguise_gets_what_dry_run_says() {
    agree(Form::Deny).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_an_allowed_path_gets_past_however_it_is_written() {
    agree(Form::Allow).await;
}

/// Requests by what they hide, and whether they pass DENY and ALLOW.
fn disguised() -> Vec<(&'static str, Request, bool, bool)> {
    let method = |method: &str| Request {
        method: method.into(),
        ..request("/public")
    };
    let host = |authority: &str| Request {
        authority: authority.into(),
        ..request("/public")
    };
    vec![
        ("a denied method", method("DELETE"), false, false),
        ("another method", method("PATCH"), true, false),
        (
            "a method by a header",
            with(&[("x-role", "user"), ("x-http-method-override", "DELETE")]),
            true,
            true,
        ),
        (
            "a path by a header",
            with(&[("x-role", "user"), ("x-original-url", "/admin")]),
            true,
            true,
        ),
        ("a denied host", host("admin.example"), false, false),
        ("in capitals", host("ADMIN.Example"), false, false),
        // Exact values: with a port or a dot at the end it is another host, to a sidecar too.
        ("with a port", host("admin.example:80"), true, false),
        ("with a dot", host("admin.example."), true, false),
        (
            "a host by a header",
            with(&[("x-role", "user"), ("x-forwarded-host", "admin.example")]),
            true,
            true,
        ),
        ("a denied role", with(&[("x-role", "admin")]), false, false),
        ("its name in capitals", with(&[("X-ROLE", "admin")]), false, false),
        (
            "its name with a line for a hyphen",
            with(&[("x_role", "admin")]),
            true,
            false,
        ),
        (
            "space around it",
            with(&[("x-role", " \t admin \t")]),
            false,
            false,
        ),
        // One line is enough for either.
        (
            "behind another one",
            with(&[("x-role", "user"), ("x-role", "admin")]),
            false,
            true,
        ),
        (
            "before another one",
            with(&[("x-role", "admin"), ("x-role", "user")]),
            false,
            true,
        ),
        // Lines are matched as a whole, here as by a sidecar.
        ("in a list", with(&[("x-role", "user,admin")]), true, false),
        ("none", with(&[]), true, false),
    ]
}

/// Names in small letters and values without the space around them, as `thyra dry-run` reads them.
fn read(request: &Request) -> Request {
    let headers = request.headers.iter();
    Request {
        headers: headers
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect(),
        ..request.clone()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_denied_method_host_or_header_in_disguise_gets_what_dry_run_says() {
    let all = disguised();
    let requests: Vec<Request> = all.iter().map(|(_, request, ..)| request.clone()).collect();
    for form in FORMS {
        let guards = [Guard::Full(Base), Guard::NoRules];
        let Some(asked) = asked(&requests, form, &guards).await else {
            return;
        };
        for ((what, request, deny, allow), passed) in all.iter().zip(&asked[0].passed) {
            assert_eq!(
                *passed,
                [*deny, *allow][usize::from(form == Form::Allow)],
                "{what} ({form:?})"
            );
            assert_eq!(
                *passed,
                passes(&declared(form), &read(request), Base),
                "{what} ({form:?}): dry-run"
            );
        }
        let some = requests.iter().zip(asked[0].passed.iter().copied());
        assert_eq!(asked[0].lines, expected(some, Base), "{form:?}");
        // The control: without rules all of them reach the pod.
        assert_eq!(
            asked[1].lines,
            expected(requests.iter().map(|one| (one, true)), Base)
        );
    }
}

/// Envoy takes away what `Connection` names (RFC 9110 7.6.1) before it asks a rule: a DENY doesn't see it, nor does
/// the pod, and an ALLOW misses it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_header_that_connection_names_is_gone_for_the_rules_and_for_the_pod() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let mut doors = Vec::new();
    for (form, role, answer) in [(Form::Deny, "admin", 200), (Form::Allow, "user", 403)] {
        let door = node.door(&declared(form), Guard::Full(Base), fine).await;
        let request = with(&[("x-role", role), ("connection", "x-role")]);
        assert_eq!(passes(&declared(form), &request, Base), answer == 200, "{form:?}");
        let answers = ask(&mut node.connect(&door), &client::http(&request), 1);
        assert_eq!(answers, [answer], "{form:?}");
        doors.push(door);
    }
    let records = node.finish_all(doors).await;
    assert_eq!(
        text(&records[0]),
        "GET /public HTTP/1.1\r\nhost: shop.example\r\n\r\n"
    );
    assert!(records[1].is_empty(), "{:?}", text(&records[1]));
}
