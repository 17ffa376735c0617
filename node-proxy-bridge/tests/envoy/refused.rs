//! What Envoy refuses, or dies of, is told by name; everything beside it works on.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use envoy_types::pb::envoy::config::core::v3::TypedExtensionConfig;
use envoy_types::pb::envoy::config::rbac::v3::permission::Rule;
use envoy_types::pb::envoy::config::rbac::v3::principal::Identifier;
use envoy_types::pb::envoy::config::rbac::v3::{Permission, Policy, Principal, Rbac, rbac};
use envoy_types::pb::envoy::extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig;
use envoy_types::util::pack_any;
use thyra_node_proxy_bridge::ads::{AdsServer, Kind, Name, Outcome, Resource};
use thyra_node_proxy_bridge::bridge::Standing;
use thyra_node_proxy_bridge::envoy::{Binary, DEFAULT_HEAP, EnvoyConfig, Supervisor};
use thyra_node_proxy_bridge::listener::{HttpOptions, Reading, http, rules};
use thyra_node_proxy_bridge::lower::{Chain, Step, StepKind};
use thyra_policy_compiler::residual::Test;
use thyra_policy_compiler::traffic::PathNormalization;

use super::client::{ask, connect, http as bytes};
use super::named::{allowing, get, values};
use super::node::{LIMIT, Node, binary, wanted};

/// A rule that lets everything pass whose path meets `rule`.
fn chain(rule: Option<Rule>) -> Chain {
    let permissions = rule.map(|rule| Permission { rule: Some(rule) });
    let policy = Policy {
        permissions: permissions.into_iter().collect(),
        principals: vec![Principal {
            identifier: Some(Identifier::Any(true)),
        }],
        ..Policy::default()
    };
    Chain {
        tokens: None,
        asks: Vec::new(),
        steps: vec![Step {
            kind: StepKind::Allow,
            rules: Some(Rbac {
                action: rbac::Action::Allow.into(),
                policies: HashMap::from([("00000:shop/by-hand#0".to_owned(), policy)]),
                ..Rbac::default()
            }),
        }],
    }
}

fn template(path_template: &str) -> Rule {
    let path_template = path_template.to_owned();
    Rule::UriTemplate(TypedExtensionConfig {
        name: "envoy.path.match.uri_template.uri_template_matcher".to_owned(),
        typed_config: Some(pack_any(UriTemplateMatchConfig { path_template })),
    })
}

/// Listeners and rules by hand: what the lowering would never let through.
struct ByHand {
    server: AdsServer,
    supervisor: Supervisor,
    folder: tempfile::TempDir,
}

fn config(binary: &Binary, folder: &tempfile::TempDir) -> EnvoyConfig {
    EnvoyConfig {
        binary: binary.clone(),
        folder: folder.path().to_owned(),
        node: "test".to_owned(),
        concurrency: 1,
        heap: DEFAULT_HEAP,
        user: None,
        cgroup: None,
        note: None,
    }
}

impl ByHand {
    fn start(binary: &Binary) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = config(binary, &folder);
        let server = AdsServer::start(&config.xds_socket(), None).unwrap();
        let supervisor = Supervisor::start(config).unwrap();
        Self {
            server,
            supervisor,
            folder,
        }
    }

    fn put(&self, name: &str, version: &str, chain: &Chain) {
        let socket = self.folder.path().join(format!("{name}.sock"));
        let listener = http(name, &socket, &chain.shape(), &HttpOptions::default());
        let resource = |version: &str, body, needs| Resource {
            version: version.into(),
            body,
            needs,
        };
        self.server.with(|catalog| {
            let mut needs = Vec::new();
            for rules in rules(name, Reading::Http, chain) {
                let name: Name = (Kind::Extension, rules.name.as_str().into());
                needs.push(name.clone());
                catalog.put(name, resource(version, pack_any(rules), Vec::new()));
            }
            catalog.put(
                (Kind::Listener, name.into()),
                resource("1", pack_any(listener), needs),
            );
        });
    }

    async fn outcome(&self, name: &str) -> Outcome {
        let name: Name = (Kind::Extension, format!("{name}/0").into());
        let mut changes = self.server.changes();
        let settled = async {
            loop {
                match self.server.read(|catalog| catalog.outcome(&name).cloned()) {
                    Some(Outcome::Awaited) | None => changes.changed().await.unwrap(),
                    Some(outcome) => return outcome,
                }
            }
        };
        tokio::time::timeout(LIMIT, settled)
            .await
            .expect("envoy says its word")
    }

    async fn status(&self, name: &str, target: &str) -> u16 {
        let socket = self.folder.path().join(format!("{name}.sock"));
        let mut stream = connect(&socket, "10.0.0.2".parse().unwrap()).await;
        ask(&mut stream, &bytes(&get(target))).await.status
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_rules_leave_the_last_good_ones_also_to_an_envoy_that_starts_anew() {
    let Some(binary) = binary().await else { return };
    let mut node = ByHand::start(&binary);
    node.put("a", "1", &chain(Some(template("/a/*"))));
    assert_eq!(node.outcome("a").await, Outcome::Accepted);
    // A policy without permissions is none.
    node.put("a", "2", &chain(None));
    let outcome = node.outcome("a").await;
    assert!(
        matches!(&outcome, Outcome::Refused(words) if words.contains("Permissions")),
        "{outcome:?}"
    );
    assert_eq!(node.status("a", "/a/b").await, 200);
    node.supervisor.stop().await;
    node.supervisor = Supervisor::start(config(&binary, &node.folder)).unwrap();
    assert_eq!(node.status("a", "/a/b").await, 200);
    assert_eq!(node.status("a", "/b").await, 403);
    node.put("a", "3", &chain(Some(template("/b"))));
    assert_eq!(node.outcome("a").await, Outcome::Accepted);
    assert_eq!(node.status("a", "/b").await, 200);
    node.supervisor.stop().await;
}

/// Envoy 1.40 ends itself over a template that it can't parse, where it should refuse it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_that_end_envoy_are_found_out_and_offered_no_more() {
    let Some(binary) = binary().await else { return };
    let node = ByHand::start(&binary);
    node.put("good", "1", &chain(Some(template("/a/*"))));
    assert_eq!(node.outcome("good").await, Outcome::Accepted);
    let put = Instant::now();
    node.put("fatal", "1", &chain(Some(template("/**/**"))));
    node.put("beside", "1", &chain(Some(template("/c/*"))));
    let outcome = node.outcome("fatal").await;
    assert!(
        matches!(&outcome, Outcome::Refused(words) if words.contains("ended")),
        "{outcome:?}"
    );
    for (name, target) in [("good", "/a/b"), ("beside", "/c/d")] {
        assert_eq!(node.outcome(name).await, Outcome::Accepted, "{name}");
        assert_eq!(node.status(name, target).await, 200, "{name}");
    }
    println!(
        "rules that end envoy are found out and all others are back after {:?}",
        put.elapsed()
    );
    node.supervisor.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listener_that_can_not_be_made_is_refused_alone() {
    let Some(binary) = binary().await else { return };
    let mut node = Node::start(&binary, PathNormalization::Base, false).await;
    // A folder where the first listener's socket should be.
    std::fs::create_dir(node.folder.path().join("h0.sock")).unwrap();
    let path = |value: &str| allowing("path", vec![Test::Path(values(vec![value.into()]))]);
    let (first, second) = (path("/a"), path("/b"));
    let cells = [("1", &first), ("2", &second)].map(|(cell, residual)| wanted(cell, Reading::Http, residual));
    node.bridge.apply(&cells);
    let mut standings = Vec::new();
    for residual in [&first, &second] {
        let question = (Reading::Http, residual.address());
        standings.push(node.bridge.settled(&question, Duration::from_secs(5)).await);
    }
    let is_rejected = |s: &&Standing| matches!(s, Standing::Rejected(words) if words.contains("h0"));
    let is_active = |s: &&Standing| matches!(s, Standing::Active(_));
    assert_eq!(standings.iter().filter(is_rejected).count(), 1, "{standings:?}");
    assert_eq!(standings.iter().filter(is_active).count(), 1, "{standings:?}");
    node.supervisor.stop().await;
}
