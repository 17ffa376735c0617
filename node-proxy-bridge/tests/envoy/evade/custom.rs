//! What an authorizer refuses never reaches the pod, and the pod hears the authorizer's word, not the client's.

use thyra_policy_compiler::authorizer::{Check, HttpCheck};

use super::super::authorizer::{Running, named, provider};
use super::super::custom::{ask as rule, asking, below, over_http, places};
use super::client::ask;
use super::door::{FULL, Guard, Node};
use super::pod::{fine, lines, text};

/// What a client may say to look as if it had been asked about, or as somebody else.
const FORGED: [&str; 4] = [
    "x-user: admin\r\n",
    "x-user: admin\r\nX-USER: root\r\n",
    "istio-ext-authz: allowed\r\nx-envoy-auth-partial-body: false\r\n",
    "custom0_shadow_engine_result: allowed\r\nx-envoy-original-path: /public\r\n",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_authorizer_refuses_never_reaches_the_pod() {
    let Some(mut node) = Node::start().await else {
        return;
    };
    let web = Running::http("web").await;
    node.places = places([&web]);
    let check = HttpCheck {
        to_upstream: vec!["x-user".to_owned()],
        ..over_http()
    };
    let provider = named("web", provider("web", Check::Http(check)));
    let residual = asking(vec![rule("ask", &below("/admin"), &provider)], &[]);
    let door = node.door(&residual, FULL, fine).await;
    let control = node.door(&residual, Guard::NoRules, fine).await;
    for forged in FORGED {
        let refused = format!("GET /admin HTTP/1.1\r\nHost: shop\r\nx-answer-web: no\r\n{forged}\r\n");
        assert_eq!(
            ask(&mut node.connect(&door), refused.as_bytes(), 1),
            [403],
            "{forged}"
        );
        assert_eq!(
            ask(&mut node.connect(&control), refused.as_bytes(), 1),
            [200],
            "{forged}"
        );
    }
    // One that it lets pass, and one behind it on the same connection.
    let head = "Host: shop\r\nx-user: admin\r\n";
    let both = format!(
        "GET /admin/1 HTTP/1.1\r\n{head}x-answer-web: yes\r\n\r\n\
         GET /admin/2 HTTP/1.1\r\n{head}x-answer-web: no\r\n\r\n"
    );
    assert_eq!(ask(&mut node.connect(&door), both.as_bytes(), 2), [200, 403]);
    assert_eq!(web.asked().len(), FORGED.len() + 2);
    let [reached, past] = node.finish([door, control]).await;
    let got = "GET /admin/1 HTTP/1.1\r\nhost: shop\r\nx-answer-web: yes\r\nx-user: of-web\r\n\r\n";
    assert_eq!(text(&reached), got);
    assert_eq!(lines(&past).len(), FORGED.len());
}
