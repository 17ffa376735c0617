//! Each request is told with its verdict and its rule, and without what is to be left out.

use thyra_node_proxy_bridge::listener::{REDACTED, Redact};
use thyra_node_proxy_bridge::records::{Decision, Listener, Record, What};

use super::super::node::LIMIT;
use super::client::ask;
use super::door::{FULL, Node};
use super::pod::fine;
use super::policy::{Form, declared};

/// Method, path and status of a request, and what became of it.
fn said(record: &Record) -> (&str, &str, u32, String) {
    let What::Request { method, path, status } = &record.what else {
        panic!("{record:?}");
    };
    let decision = match &record.decision {
        Decision::Allowed(rule) => format!("allowed by {:?}", rule.as_ref().map(ToString::to_string)),
        Decision::Denied(rule) => format!("denied by {:?}", rule.as_ref().map(ToString::to_string)),
        other => format!("{other:?}"),
    };
    (method, path, *status, decision)
}

/// So many records, in the order in which they came.
async fn hear(listener: &mut Listener, count: usize) -> Vec<Record> {
    let mut heard = Vec::new();
    while heard.len() < count {
        let next = tokio::time::timeout(LIMIT, listener.recv());
        let next = next.await.expect("requests are told").expect("there is a server");
        assert_eq!(next.missed, 0);
        heard.extend(next.records().iter().map(|record| Record::clone(record)));
    }
    heard
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_request_is_told_without_what_is_to_be_left_out() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let whole = Redact {
        path: true,
        ..Redact::NOTHING
    };
    let mut listener = node.records().listen();
    for (redact, allowed, denied) in [
        (Redact::default(), "/public/a", "/admin/keys"),
        (
            Redact::NOTHING,
            "/public/a?token=secret",
            "/admin/keys?token=secret",
        ),
        (whole, REDACTED, REDACTED),
    ] {
        node.options.redact = redact;
        let door = node.door(&declared(Form::Deny), FULL, fine).await;
        let mut stream = node.connect(&door);
        let request = |path: &str| {
            format!("GET {path}?token=secret HTTP/1.1\r\nHost: shop.example\r\nX-Role: user\r\n\r\n")
        };
        assert_eq!(ask(&mut stream, request("/public/a").as_bytes(), 1), [200]);
        assert_eq!(ask(&mut stream, request("/admin/keys").as_bytes(), 1), [403]);
        let heard = hear(&mut listener, 2).await;
        assert_eq!(
            said(&heard[0]),
            ("GET", allowed, 200, "allowed by None".to_owned())
        );
        let by = r#"denied by Some("shop/no-admin#0")"#.to_owned();
        assert_eq!(said(&heard[1]), ("GET", denied, 403, by));
        for record in &heard {
            assert_eq!(record.client, stream.local_addr().unwrap());
            assert_eq!(record.pod, stream.peer_addr().unwrap());
            assert!(!record.took.is_zero());
        }
        drop(door);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_with_bytes_that_are_no_text_loses_no_other_record() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let mut listener = node.records().listen();
    let door = node.door(&declared(Form::Deny), FULL, fine).await;
    let strange = b"GET /public/\xff\xfe HTTP/1.1\r\nHost: shop.example\r\nX-Role: user\r\n\r\n";
    let refused = ask(&mut node.connect(&door), strange, 1);
    let plain = b"GET /public HTTP/1.1\r\nHost: shop.example\r\nX-Role: user\r\n\r\n";
    assert_eq!(ask(&mut node.connect(&door), plain, 1), [200]);
    let heard = hear(&mut listener, 2).await;
    assert_eq!(said(&heard[0]).2, u32::from(refused[0]));
    assert_eq!(said(&heard[1]).1, "/public");
}
