//! CUSTOM rules at a real Envoy: who is asked of what, what becomes of the answer, and of none.

use std::sync::Arc;
use std::time::Duration;

use thyra_datapath_abi::tables::RuleRef;
use thyra_datapath_abi::{Action, Reason};
use thyra_node_proxy_bridge::listener::Reading;
use thyra_node_proxy_bridge::lower::Places;
use thyra_policy_compiler::authorizer::{BodyInCheck, Check, HttpCheck, Provider};
use thyra_policy_compiler::policy::StringMatch;
use thyra_policy_compiler::residual::{Answer, Ask, Conditions, Decides, Residual, Rules, Test};
use thyra_policy_compiler::traffic::PathNormalization;

use super::authorizer::{Running, named, provider, target};
use super::client::{self, Answer as Reply};
use super::named::{rule, values};
use super::node::{Node, binary, wanted};

/// Of requests below this path.
pub(crate) fn below(path: &str) -> Arc<Conditions> {
    Arc::new(Conditions {
        to: vec![vec![Test::Path(values(vec![format!("{path}*")]))]],
        ..Conditions::default()
    })
}

pub(crate) fn ask(name: &str, conditions: &Arc<Conditions>, provider: &Arc<Provider>) -> Ask<RuleRef> {
    Ask {
        rule: rule(name),
        conditions: Arc::clone(conditions),
        provider: Arc::clone(provider),
    }
}

/// Allows what `deny` doesn't match and whom these let pass.
pub(crate) fn asking(custom: Vec<Ask<RuleRef>>, deny: &[Arc<Conditions>]) -> Arc<Residual<RuleRef>> {
    let deny = deny
        .iter()
        .map(|conditions| (rule("deny"), Arc::clone(conditions)));
    Arc::new(Residual {
        http: Answer::Rules(Arc::new(Rules {
            custom,
            deny: deny.collect(),
            allow: Vec::new(),
            default_deny: false,
            decides: Decides::EachRequest,
        })),
        other: Answer::Constant(Action::Deny, Reason::NotHttp, None),
    })
}

/// Over HTTP, with the header that tells it what to say.
pub(crate) fn over_http() -> HttpCheck {
    HttpCheck {
        request_headers: vec!["x-answer-*".to_owned(), "x-tell".to_owned()],
        ..HttpCheck::default()
    }
}

pub(crate) fn places<const N: usize>(running: [&Running; N]) -> Places {
    let places = running.map(|one| (target(one.name), vec![one.address]));
    places.into()
}

async fn start() -> Option<Node> {
    let binary = binary().await?;
    Some(Node::start(&binary, PathNormalization::Base, true).await)
}

/// What requests with these targets and lines get.
async fn replies(
    node: &mut Node,
    residual: &Arc<Residual<RuleRef>>,
    requests: &[(&str, &str)],
) -> Vec<Reply> {
    node.bridge
        .apply(&[wanted(&residual.address(), Reading::Http, residual)]);
    let oracle = node.oracle(&(Reading::Http, residual.address())).await;
    let mut replies = Vec::new();
    for (target, lines) in requests {
        let mut stream = client::connect(&oracle, "10.244.0.3".parse().unwrap()).await;
        let text = format!("GET {target} HTTP/1.1\r\nHost: shop.example\r\n{lines}\r\n");
        replies.push(
            client::exchange(&mut stream, text.as_bytes())
                .await
                .expect("an answer"),
        );
    }
    replies
}

fn statuses(replies: &[Reply]) -> Vec<u16> {
    replies.iter().map(Reply::status).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_rule_matches_is_asked_and_nothing_else() {
    let Some(mut node) = start().await else { return };
    let (web, ext) = (Running::http("web").await, Running::grpc("ext").await);
    node.bridge.set_places(places([&web, &ext]));
    for (running, check) in [(&web, Check::Http(over_http())), (&ext, Check::Grpc)] {
        let name = running.name;
        let provider = named(name, provider(name, check));
        let residual = asking(vec![ask("ask", &below("/admin"), &provider)], &[]);
        let [yes, no] = ["yes", "no"].map(|word| format!("x-answer-{name}: {word}\r\n"));
        let requests = [
            ("/admin/x?y=z", yes.as_str()),
            ("/admin", no.as_str()),
            ("/public", no.as_str()),
            ("/", ""),
        ];
        let replies = replies(&mut node, &residual, &requests).await;
        assert_eq!(statuses(&replies), [200, 403, 200, 200], "{name}");
        // Who refuses says why; the rule is named too.
        assert_eq!(replies[1].body, format!("{name} says so"));
        assert_eq!(replies[1].field("x-why").as_deref(), Some("because"));
        let paths: Vec<String> = running.asked().into_iter().map(|asked| asked.path).collect();
        assert_eq!(paths, ["/admin/x?y=z", "/admin"], "{name}");
    }
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deny_rule_holds_whatever_the_authorizer_says() {
    let Some(mut node) = start().await else { return };
    let web = Running::http("web").await;
    node.bridge.set_places(places([&web]));
    let provider = named("web", provider("web", Check::Http(over_http())));
    let residual = asking(vec![ask("ask", &below("/"), &provider)], &[below("/admin")]);
    let yes = "x-answer-web: yes\r\n";
    let found = replies(&mut node, &residual, &[("/admin", yes), ("/", yes)]).await;
    assert_eq!(statuses(&found), [403, 200]);
    assert_eq!(web.asked().len(), 2, "CUSTOM comes first");
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_of_several_providers_is_asked_of_its_own_and_all_must_agree() {
    let Some(mut node) = start().await else { return };
    let (web, ext) = (Running::http("web").await, Running::grpc("ext").await);
    node.bridge.set_places(places([&web, &ext]));
    let by_web = named("web", provider("web", Check::Http(over_http())));
    let by_ext = named("ext", provider("ext", Check::Grpc));
    let custom = vec![
        ask("one", &below("/both"), &by_web),
        ask("two", &below("/both"), &by_ext),
        ask("three", &below("/web"), &by_web),
        ask("four", &below("/ext"), &by_ext),
    ];
    let says = |web: &str, ext: &str| format!("x-answer-web: {web}\r\nx-answer-ext: {ext}\r\n");
    let cases = [
        ("/both", says("yes", "yes"), 200),
        ("/both", says("no", "yes"), 403),
        ("/both", says("yes", "no"), 403),
        ("/web", says("yes", "no"), 200),
        ("/web", says("no", "yes"), 403),
        ("/ext", says("no", "yes"), 200),
        ("/ext", says("yes", "no"), 403),
        ("/", says("no", "no"), 200),
    ];
    let requests: Vec<(&str, &str)> = cases
        .iter()
        .map(|(target, lines, _)| (*target, lines.as_str()))
        .collect();
    let found = statuses(&replies(&mut node, &asking(custom, &[]), &requests).await);
    let wanted: Vec<u16> = cases.iter().map(|(.., status)| *status).collect();
    assert_eq!(found, wanted);
    // In the order of their names: who is refused by the first isn't asked about again.
    assert_eq!((ext.asked().len(), web.asked().len()), (5, 4));
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_answer_nobody_passes_unless_the_provider_says_so() {
    let Some(mut node) = start().await else { return };
    let (web, ext) = (Running::http("web").await, Running::grpc("ext").await);
    let nobody = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let mut all = places([&web, &ext]);
    all.insert(target("gone"), vec![nobody]);
    all.insert(target("empty"), Vec::new());
    node.bridge.set_places(all);
    let kinds = |name: &str| match name {
        "ext" => vec![Check::Grpc],
        "web" => vec![Check::Http(over_http())],
        _ => vec![Check::Grpc, Check::Http(over_http())],
    };
    // The one that is nowhere is not known at all: closed, whatever the provider says.
    for (name, word, open) in [
        ("web", "broken", 200),
        ("ext", "broken", 200),
        ("web", "never", 200),
        ("ext", "never", 200),
        ("gone", "", 200),
        ("empty", "", 200),
        ("nowhere", "", 503),
    ] {
        for check in kinds(name) {
            for (fail_open, status) in [(false, 503), (true, open)] {
                let mut authorizer = provider(name, check.clone());
                authorizer.timeout = Duration::from_millis(300);
                authorizer.status_on_error = 503;
                authorizer.fail_open = fail_open;
                let residual = asking(vec![ask("ask", &below("/"), &named(name, authorizer))], &[]);
                let lines = format!("x-answer-{name}: {word}\r\n");
                let found = statuses(&replies(&mut node, &residual, &[("/", &lines)]).await);
                assert_eq!(found, [status], "{name} {word} {check:?} {fail_open}");
            }
        }
    }
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whom_nobody_can_ask_nobody_lets_pass() {
    let Some(mut node) = start().await else { return };
    let absent = Arc::new(Provider::absent("oppa"));
    let residual = asking(vec![ask("ask", &below("/admin"), &absent)], &[]);
    let found = replies(&mut node, &residual, &[("/admin", ""), ("/", "")]).await;
    assert_eq!(statuses(&found), [403, 200]);
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authorizer_gets_what_the_provider_names_of_a_request() {
    let Some(mut node) = start().await else { return };
    let (web, ext) = (Running::http("web").await, Running::grpc("ext").await);
    node.bridge.set_places(places([&web, &ext]));
    let body = BodyInCheck {
        max_bytes: 4,
        partial: true,
        as_bytes: false,
    };
    let check = HttpCheck {
        path_prefix: "/check".to_owned(),
        added_headers: [("x-added".to_owned(), "ours".to_owned())].into(),
        ..over_http()
    };
    for (running, check) in [(&web, Check::Http(check)), (&ext, Check::Grpc)] {
        let name = running.name;
        let mut authorizer = provider(name, check);
        authorizer.body = Some(body);
        let residual = asking(vec![ask("ask", &below("/"), &named(name, authorizer))], &[]);
        let lines = format!(
            "x-answer-{name}: yes\r\nx-tell: this\r\nx-keep: that\r\nx-added: theirs\r\ncontent-length: 6\r\n\r\nabcdef"
        );
        let text = format!("POST /a HTTP/1.1\r\nHost: shop.example\r\n{lines}");
        node.bridge
            .apply(&[wanted(&residual.address(), Reading::Http, &residual)]);
        let oracle = node.oracle(&(Reading::Http, residual.address())).await;
        let mut stream = client::connect(&oracle, "10.244.0.3".parse().unwrap()).await;
        let reply = client::exchange(&mut stream, text.as_bytes())
            .await
            .expect("an answer");
        assert_eq!(reply.status(), 200, "{name}: {reply:?} {:?}", running.asked());
        let asked = running.asked();
        let [asked] = asked.as_slice() else {
            panic!("{asked:?}")
        };
        assert_eq!(asked.body, "abcd", "{name}");
        assert_eq!(asked.header("x-tell"), Some("this"));
        if name == "web" {
            assert_eq!(asked.path, "/check/a");
            assert_eq!(asked.header("x-added"), Some("ours"));
            assert_eq!(asked.header("x-keep"), None);
        } else {
            assert_eq!(asked.header("x-keep"), Some("that"));
        }
    }
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_not_http_is_asked_over_grpc() {
    let Some(mut node) = start().await else { return };
    let ext = Running::grpc("ext").await;
    node.bridge.set_places(places([&ext]));
    let provider = named("ext", provider("ext", Check::Grpc));
    let names = |name: &str| Conditions {
        when: vec![Test::Sni(values(vec![StringMatch::Exact(name.to_owned())]))],
        ..Conditions::default()
    };
    let rules = Rules {
        custom: vec![ask("ask", &Arc::new(names("asked.example")), &provider)],
        deny: Vec::new(),
        allow: Vec::new(),
        default_deny: false,
        decides: Decides::EachRequest,
    };
    let residual = Arc::new(Residual {
        http: Answer::Constant(Action::Deny, Reason::NotHttp, None),
        other: Answer::Rules(Arc::new(rules)),
    });
    node.bridge
        .apply(&[wanted(&residual.address(), Reading::Stream, &residual)]);
    let oracle = node.oracle(&(Reading::Stream, residual.address())).await;
    for (name, port, passes, asked) in [
        ("asked.example", 40_000, true, 1),
        ("asked.example", 40_001, false, 1),
        ("other.example", 40_001, true, 0),
    ] {
        let source = "10.244.0.3".parse().unwrap();
        let mut stream = client::connect_from(&oracle, source, port).await;
        let hello = client::client_hello(Some(name));
        assert_eq!(client::passes(&mut stream, &hello).await, passes, "{name} {port}");
        assert_eq!(ext.asked().len(), asked, "{name} {port}");
    }
    node.supervisor.stop().await;
}
