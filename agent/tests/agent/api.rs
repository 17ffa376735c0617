//! A whole agent on the files source, asked over its socket.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use thyra_agent::registration::Registration;
use thyra_agent::{RunError, Settings, run_on};
use thyra_datapath::{Connection, Phase};
use thyra_proto::thyra::v1 as api;
use thyra_proto::thyra::v1::admin_service_client::AdminServiceClient;
use thyra_proto::thyra::v1::endpoint_service_client::EndpointServiceClient;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::plane::Remembering;
use crate::sample::pod;

const FRONT: &str = "10.0.1.2";
pub(crate) const MESH: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {thyra.io/mode: enforce}}
---
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, labels: {app: cart}}
spec:
  serviceAccountName: cart
  nodeName: n0
  containers: [{name: main, image: x, ports: [{containerPort: 8080, name: tcp-main}]}]
status: {podIPs: [{ip: 10.0.0.2}]}
---
apiVersion: v1
kind: Pod
metadata: {name: front, namespace: shop, labels: {app: front}}
spec: {serviceAccountName: front, nodeName: n1, containers: [{name: main, image: x}]}
status: {podIPs: [{ip: 10.0.1.2}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {selector: {app: cart}, clusterIP: 10.96.0.9, ports: [{name: tcp, port: 80, targetPort: 8080}]}
"#;

pub(crate) fn allow(version: &str, account: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: only, namespace: shop, resourceVersion: \"{version}\"}}\n\
         spec:\n  selector: {{matchLabels: {{app: cart}}}}\n  rules:\n  \
         - from: [{{source: {{principals: [cluster.local/ns/shop/sa/{account}]}}}}]\n"
    )
}

pub(crate) struct Agent {
    folder: tempfile::TempDir,
    pub(crate) plane: Remembering,
    stop: CancellationToken,
    task: JoinHandle<Result<(), RunError>>,
}

impl Agent {
    fn start(files: &[(&str, &str)]) -> Self {
        Self::on(Remembering::default(), files, |_| {})
    }

    /// On a datapath that remembers already, with settings of one's own.
    pub(crate) fn on(plane: Remembering, files: &[(&str, &str)], change: impl FnOnce(&mut Settings)) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let manifests = folder.path().join("manifests");
        std::fs::create_dir(&manifests).expect("made");
        for (name, text) in files {
            std::fs::write(manifests.join(name), text).expect("written");
        }
        plane.interface("veth-cart", 7);
        let stop = CancellationToken::new();
        let mut settings = settings(folder.path(), &manifests);
        change(&mut settings);
        let config = settings.resolve().expect("good");
        let task = tokio::spawn(run_on(
            Box::new(plane.clone()),
            config,
            stop.clone().cancelled_owned(),
        ));
        Self {
            folder,
            plane,
            stop,
            task,
        }
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.folder.path().join("manifests").join(name), text).expect("written");
    }

    pub(crate) async fn channel(&self) -> Channel {
        let path: PathBuf = self.folder.path().join("run/agent.sock");
        for _ in 0..200 {
            if path.exists() {
                let dial = move |_| {
                    let path = path.clone();
                    async move { UnixStream::connect(path).await.map(TokioIo::new) }
                };
                let endpoint = Endpoint::from_static("http://agent");
                return endpoint
                    .connect_with_connector(tower::service_fn(dial))
                    .await
                    .expect("connected");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the socket did not appear");
    }

    async fn add_cart(&self) -> api::AddResponse {
        self.add(pod("cart", "veth-cart", "10.0.0.2")).await
    }

    pub(crate) async fn add(&self, pod: Registration) -> api::AddResponse {
        let endpoint = Some(pod.to_api());
        let mut client = EndpointServiceClient::new(self.channel().await);
        client
            .add(api::AddRequest { endpoint })
            .await
            .expect("added")
            .into_inner()
    }

    pub(crate) async fn end(self) {
        self.stop.cancel();
        self.task.await.expect("no panic").expect("a graceful stop");
        assert!(!self.folder.path().join("run/agent.sock").exists());
        assert!(
            self.plane.with(|t| t.attached.len()) <= 1,
            "enforcement stays as it was"
        );
    }
}

fn settings(folder: &Path, manifests: &Path) -> Settings {
    use thyra_agent::config::{PolicySource, WorkloadSource};
    Settings {
        node: Some("n0".into()),
        socket: Some(folder.join("run/agent.sock")),
        state: Some(folder.join("state")),
        metrics: Some("off".into()),
        workload_source: Some(WorkloadSource::Files),
        policy_source: Some(PolicySource::Files),
        manifests: Some(manifests.to_owned()),
        ..Settings::default()
    }
}

pub(crate) fn version(version: &str) -> api::WaitEnforcedRequest {
    let object = api::ObjectVersion {
        kind: "AuthorizationPolicy".into(),
        namespace: "shop".into(),
        name: "only".into(),
        version: version.into(),
        ..api::ObjectVersion::default()
    };
    api::WaitEnforcedRequest {
        objects: vec![object],
        timeout_ms: 5_000,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_in_a_file_is_enforced_and_explained() {
    let agent = Agent::start(&[("mesh.yaml", MESH), ("policy.yaml", &allow("1", "front"))]);
    let mut admin = AdminServiceClient::new(agent.channel().await);
    assert_eq!(agent.add_cart().await.id, 1);
    admin.wait_enforced(version("1")).await.expect("enforced");
    let ask = |from: &str, to: &str, port| api::DryRunRequest {
        from: from.into(),
        to: to.into(),
        port,
        family: 4,
    };
    for (from, to, port, action) in [
        ("shop/front", "shop/cart", 8080, "allow"),
        ("outside", "shop/cart", 8080, "deny"),
        ("shop/sa/front", "service/shop/cart", 80, "allow"),
        ("10.0.0.2", "service/shop/cart", 80, "deny"),
    ] {
        let answer = admin
            .dry_run(ask(from, to, port))
            .await
            .expect("answered")
            .into_inner();
        let verdict = answer.verdicts[0].verdict.clone().expect("a verdict");
        assert_eq!(
            (verdict.action.as_str(), answer.verdicts[0].port),
            (action, 8080),
            "{from} to {to}"
        );
    }
    // The change, and the control: the same question has another answer now.
    agent.write("policy.yaml", &allow("2", "cart"));
    admin.wait_enforced(version("2")).await.expect("enforced");
    let answer = admin
        .dry_run(ask("shop/front", "shop/cart", 8080))
        .await
        .expect("answered")
        .into_inner();
    let verdict = answer.verdicts[0].verdict.clone().expect("a verdict");
    assert_eq!(
        (verdict.action.as_str(), verdict.reason.as_str()),
        ("deny", "no allow rule matched")
    );
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_cant_be_read_leaves_the_last_good_state_and_is_named() {
    let agent = Agent::start(&[("mesh.yaml", MESH), ("policy.yaml", &allow("1", "front"))]);
    let mut admin = AdminServiceClient::new(agent.channel().await);
    agent.add_cart().await;
    admin.wait_enforced(version("1")).await.expect("enforced");
    agent.write(
        "policy.yaml",
        &allow("2", "front").replace("selector:", "acton: DENY\n  selector:"),
    );
    let mut said = String::new();
    for _ in 0..300 {
        let status = admin
            .get_status(api::GetStatusRequest {})
            .await
            .expect("answered")
            .into_inner();
        said = status.sources.iter().flat_map(|s| s.rejections.clone()).collect();
        if !said.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(said.contains("policy.yaml") && said.contains("acton"), "{said}");
    let policies = admin
        .list_policies(api::ListPoliciesRequest {})
        .await
        .expect("answered")
        .into_inner()
        .policies;
    assert_eq!(
        (policies[0].version.as_str(), policies[0].endpoints.as_slice()),
        ("1", &[1][..])
    );
    assert!(policies[0].json.contains("cluster.local/ns/shop/sa/front"));
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wanted_and_kernel_stand_side_by_side_and_drift_is_seen() {
    let agent = Agent::start(&[("mesh.yaml", MESH), ("policy.yaml", &allow("1", "front"))]);
    let mut admin = AdminServiceClient::new(agent.channel().await);
    agent.add_cart().await;
    admin.wait_enforced(version("1")).await.expect("enforced");
    let ask = || api::GetEndpointPolicyRequest {
        endpoint: "shop/cart".into(),
    };
    let answer = admin
        .get_endpoint_policy(ask())
        .await
        .expect("answered")
        .into_inner();
    assert!(!answer.drift);
    let lines: Vec<_> = answer
        .entries
        .iter()
        .map(|e| (e.principal.as_str(), e.ports.as_str()))
        .collect();
    assert_eq!(
        lines.first().map(|l| l.0),
        Some("cluster.local/ns/shop/sa/front"),
        "{lines:?}"
    );
    assert_eq!(
        answer.entries.last().map(|e| e.blocks.clone()),
        Some(vec!["ANY".to_owned()]),
        "{lines:?}"
    );
    agent.plane.with(|t| {
        std::sync::Arc::make_mut(&mut t.tables.verdicts)
            .iter_mut()
            .for_each(|v| v.action = thyra_datapath_abi::Action::Allow)
    });
    let answer = admin
        .get_endpoint_policy(ask())
        .await
        .expect("answered")
        .into_inner();
    assert!(answer.drift && answer.entries.iter().any(|e| e.drift));
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn questions_that_cant_be_answered_say_why() {
    let agent = Agent::start(&[("mesh.yaml", MESH)]);
    let mut admin = AdminServiceClient::new(agent.channel().await);
    let mut endpoints = EndpointServiceClient::new(agent.channel().await);
    let none = admin
        .get_endpoint(api::GetEndpointRequest {
            endpoint: "shop/none".into(),
        })
        .await
        .expect_err("unknown");
    assert_eq!(none.code(), Code::NotFound);
    let empty = endpoints
        .add(api::AddRequest { endpoint: None })
        .await
        .expect_err("empty");
    assert_eq!(empty.code(), Code::InvalidArgument);
    let mut lost = pod("lost", "veth-lost", "10.0.0.8").to_api();
    let vanished = endpoints
        .add(api::AddRequest {
            endpoint: Some(lost.clone()),
        })
        .await
        .expect_err("no interface");
    assert_eq!(vanished.code(), Code::FailedPrecondition);
    lost.addresses = vec!["10.0.0.300".into()];
    let bad = endpoints
        .check(api::CheckRequest { endpoint: Some(lost) })
        .await
        .expect_err("bad address");
    assert!(bad.message().contains("10.0.0.300"), "{bad}");
    let kinds = api::MonitorRequest {
        kinds: vec!["l7".into()],
        ..api::MonitorRequest::default()
    };
    assert_eq!(
        admin.monitor(kinds).await.expect_err("no such kind").code(),
        Code::InvalidArgument
    );
    let mut late = version("1");
    late.timeout_ms = 50;
    let late = admin.wait_enforced(late).await.expect_err("never comes");
    assert_eq!(late.code(), Code::DeadlineExceeded);
    assert!(late.message().contains("shop/only"), "{late}");
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_agent_on_the_same_socket_is_refused() {
    let agent = Agent::start(&[("mesh.yaml", MESH)]);
    drop(agent.channel().await);
    let folder = agent.folder.path();
    let config = settings(folder, &folder.join("manifests"))
        .resolve()
        .expect("good");
    let second = run_on(Box::new(Remembering::default()), config, std::future::pending()).await;
    assert!(matches!(second, Err(RunError::Socket(_))), "{second:?}");
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn listeners_hear_what_the_agent_does() {
    let agent = Agent::start(&[("mesh.yaml", MESH)]);
    let mut admin = AdminServiceClient::new(agent.channel().await);
    let kinds = api::MonitorRequest {
        kinds: vec!["agent".into(), "request".into(), "stream".into()],
        ..api::MonitorRequest::default()
    };
    let mut events = admin.monitor(kinds).await.expect("listening").into_inner();
    agent.add_cart().await;
    let mut heard = Vec::new();
    while !heard.iter().any(|m: &String| m.contains("shop/cart")) {
        let next = tokio::time::timeout(Duration::from_secs(5), events.message())
            .await
            .expect("in time");
        heard.push(next.expect("no error").expect("an event").message);
    }
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn allowed_connections_are_reported_only_while_somebody_listens() {
    let agent = Agent::start(&[("mesh.yaml", MESH)]);
    let mut admin = AdminServiceClient::new(agent.channel().await);
    let reports = || agent.plane.with(|told| told.reports_new);
    assert!(!reports());
    let first = admin
        .monitor(api::MonitorRequest::default())
        .await
        .expect("listening");
    let second = admin
        .monitor(api::MonitorRequest::default())
        .await
        .expect("listening");
    assert!(reports(), "from the answer on");
    drop(first);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(reports(), "one is left");
    drop(second);
    let quiet = async {
        while reports() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), quiet)
        .await
        .expect("in time");
    agent.end().await;
}

/// A connection that `cart` holds: who opened it, and the other side's address.
fn held(accepted: bool, remote: &str) -> Connection {
    let (local, other) = if accepted { (8080, 40_000) } else { (40_000, 8080) };
    Connection {
        local: (Ipv4Addr::new(10, 0, 0, 2), local).into(),
        remote: SocketAddr::new(remote.parse().expect("an address"), other),
        accepted,
        phase: Phase::Open,
    }
}

fn change(apply: &str, delete: &str) -> api::DiffRequest {
    api::DiffRequest {
        apply: apply.to_owned(),
        delete: delete.to_owned(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_is_told_with_the_open_connections_that_it_would_cut() {
    let agent = Agent::start(&[("mesh.yaml", MESH), ("policy.yaml", &allow("1", "front"))]);
    let mut admin = AdminServiceClient::new(agent.channel().await);
    agent.add_cart().await;
    admin.wait_enforced(version("1")).await.expect("enforced");
    let before = agent.plane.with(|t| {
        // `front` holds one, `cart` itself opened another to it.
        t.connections
            .insert(1, vec![held(true, FRONT), held(false, FRONT)]);
        t.generation
    });
    let same = admin
        .diff(change(&allow("2", "front"), ""))
        .await
        .expect("answered")
        .into_inner();
    assert_eq!((same.changes.len(), same.connections.len()), (0, 0), "{same:?}");

    let told = admin
        .diff(change(&allow("2", "cart"), ""))
        .await
        .expect("answered")
        .into_inner();
    let changes: Vec<_> = told
        .changes
        .iter()
        .map(|c| {
            (
                c.endpoint.as_str(),
                c.before.as_str(),
                c.after.as_str(),
                c.sources.clone(),
            )
        })
        .collect();
    let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
    assert_eq!(
        changes,
        [
            ("shop/cart", "allow", "deny", names(&["shop/front"])),
            ("shop/cart", "deny", "allow", names(&["shop/cart"])),
        ]
    );
    let cut: Vec<_> = told
        .connections
        .iter()
        .map(|c| (c.from.as_str(), c.to.as_str(), c.after.as_str(), c.why.as_str()))
        .collect();
    assert_eq!(
        cut,
        [("shop/front", "shop/cart", "deny", "denied: no allow rule matched")]
    );

    let gone = admin
        .diff(change("", &allow("1", "front")))
        .await
        .expect("answered")
        .into_inner();
    assert!(
        gone.changes.iter().all(|c| c.after == "allow") && !gone.changes.is_empty(),
        "{gone:?}"
    );
    agent.plane.with(|t| {
        assert_eq!(t.generation, before, "nothing was enforced");
        t.connections.clear();
    });
    let blind = admin
        .diff(change(&allow("2", "cart"), ""))
        .await
        .expect("answered")
        .into_inner();
    assert!(blind.notes[0].contains("shop/cart"), "{blind:?}");

    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_with_a_mistake_is_refused_with_what_is_wrong() {
    let agent = Agent::start(&[("mesh.yaml", MESH), ("policy.yaml", &allow("1", "front"))]);
    let mut admin = AdminServiceClient::new(agent.channel().await);
    agent.add_cart().await;
    admin.wait_enforced(version("1")).await.expect("enforced");
    for (apply, delete, said) in [
        ("", "", "holds no policy"),
        ("kind: [", "", "apply"),
        (MESH, "", "is a"),
        (
            "",
            allow("1", "front").replace("name: ", "name: un").as_str(),
            "knows none",
        ),
    ] {
        let refused = admin.diff(change(apply, delete)).await.expect_err("refused");
        assert!(refused.message().contains(said), "{said}: {refused}");
    }
    agent.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_to_l7_is_told_in_words() {
    let only_get = allow("1", "front") + "    to: [{operation: {methods: [GET]}}]\n";
    let agent = Agent::start(&[("mesh.yaml", MESH), ("policy.yaml", &only_get)]);
    let mut admin = AdminServiceClient::new(agent.channel().await);
    agent.add_cart().await;
    admin.wait_enforced(version("1")).await.expect("enforced");
    let ask = api::GetEndpointPolicyRequest {
        endpoint: "shop/cart".into(),
    };
    let answer = admin
        .get_endpoint_policy(ask)
        .await
        .expect("answered")
        .into_inner();
    let wanted = answer.entries.iter().filter_map(|entry| entry.wanted.as_ref());
    let named: Vec<&str> = wanted
        .map(|verdict| verdict.residual.as_str())
        .filter(|address| !address.is_empty())
        .collect();
    let [residual] = answer.residuals.as_slice() else {
        panic!("one residual: {:?}", answer.residuals);
    };
    assert_eq!(named, [residual.address.as_str()]);
    assert_eq!(
        residual.http,
        ["allow by shop/only#0 if methods is GET", "else deny"]
    );
    assert_eq!(residual.other, ["deny: no allow rule matched"]);
    agent.end().await;
}
