//! Whole streams against a server in this process, over TLS and plain.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;
use thyra_xds_client::backoff::Pace;
use thyra_xds_client::{
    ClientConfig, Kind, NodeIdentity, Push, Rejected, Server, Sink, StreamKind, StreamState, run,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::istiod::{Authority, Istiod, PATIENCE};
use crate::wire::{empty_policy, garbage, mesh, response, workload};

const NAME: &str = "istiod.istio-system.svc";

/// Hands everything to the test and refuses the names it was told to refuse.
struct Recorder {
    pushes: mpsc::UnboundedSender<Push>,
    states: mpsc::UnboundedSender<StreamState>,
    refuse: Vec<&'static str>,
}

impl Sink for Recorder {
    fn apply(&mut self, push: Push) -> Vec<Rejected> {
        let refused = push
            .resources
            .iter()
            .filter(|named| self.refuse.contains(&named.name.as_str()));
        let refused = refused.map(|named| Rejected {
            name: named.name.clone(),
            error: "unwanted".into(),
        });
        let refused = refused.collect();
        let _ = self.pushes.send(push);
        refused
    }

    fn state(&mut self, _stream: StreamKind, state: StreamState) {
        let _ = self.states.send(state);
    }
}

/// A running stream.
struct Client {
    pushes: mpsc::UnboundedReceiver<Push>,
    states: mpsc::UnboundedReceiver<StreamState>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Client {
    fn start(stream: StreamKind, server: Server, refuse: &[&'static str]) -> Self {
        let (push, pushes) = mpsc::unbounded_channel();
        let (state, states) = mpsc::unbounded_channel();
        let stop = CancellationToken::new();
        let node = NodeIdentity {
            address: "10.0.0.1".parse().unwrap(),
            pod: "thyra-a".into(),
            namespace: "istio-system".into(),
            node: "node-a".into(),
            cluster_id: "Kubernetes".into(),
            domain: "cluster.local".into(),
        };
        let pace = Pace {
            refused: Duration::from_millis(50),
            ..Pace::default()
        };
        let config = ClientConfig {
            stream,
            server,
            node,
            lossy: false,
            pace,
        };
        let sink = Recorder {
            pushes: push,
            states: state,
            refuse: refuse.to_vec(),
        };
        let task = tokio::spawn(run(config, sink, stop.clone()));
        Self {
            pushes,
            states,
            stop,
            task,
        }
    }

    async fn push(&mut self) -> Push {
        timeout(PATIENCE, self.pushes.recv())
            .await
            .expect("no push came")
            .unwrap()
    }

    /// Reads states until one is as wanted.
    async fn until(&mut self, wanted: impl Fn(&StreamState) -> bool) -> StreamState {
        loop {
            let state = timeout(PATIENCE, self.states.recv())
                .await
                .expect("the state never came")
                .unwrap();
            if wanted(&state) {
                return state;
            }
        }
    }

    async fn failure(&mut self) -> String {
        match self
            .until(|state| matches!(state, StreamState::Disconnected { .. }))
            .await
        {
            StreamState::Disconnected { error, .. } => error,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.stop.cancel();
        self.task.abort();
    }
}

/// The files that a client reads.
struct Files {
    folder: TempDir,
}

impl Files {
    fn new(authority: &Authority, token: &str) -> Self {
        let files = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        fs::write(files.root(), &authority.root).unwrap();
        fs::write(files.token(), token).unwrap();
        files
    }
    fn root(&self) -> PathBuf {
        self.folder.path().join("root.pem")
    }
    fn token(&self) -> PathBuf {
        self.folder.path().join("token")
    }
    fn server(&self, istiod: &Istiod, name: &str) -> Server {
        let address = format!("https://{}", istiod.address);
        Server::new(&address, Some(name.into()), Some(self.root()), Some(self.token())).unwrap()
    }
}

fn plain(istiod: &Istiod) -> Server {
    Server::new(&format!("http://{}", istiod.address), None, None, None).unwrap()
}

fn names(push: &Push) -> Vec<&str> {
    push.resources.iter().map(|named| named.name.as_str()).collect()
}

#[tokio::test]
async fn over_tls_a_push_is_applied_and_acknowledged() {
    let authority = Authority::new(NAME);
    let files = Files::new(&authority, "secret\n");
    let mut istiod = Istiod::start(Some(&authority)).await;
    let mut client = Client::start(StreamKind::Workloads, files.server(&istiod, NAME), &[]);

    let mut session = istiod.session().await;
    assert_eq!(session.metadata.get("authorization").unwrap(), "Bearer secret");
    assert_eq!(session.metadata.get("clusterid").unwrap(), "Kubernetes");
    let first = session.request().await.unwrap();
    assert!(
        first
            .node
            .unwrap()
            .id
            .starts_with("ztunnel~10.0.0.1~thyra-a.istio-system~")
    );
    assert_eq!(first.type_url, Kind::Address.type_url());

    session.send(response(Kind::Address, "n1", vec![workload("a", "1")], &[]));
    let push = client.push().await;
    assert_eq!((names(&push), push.initial), (vec!["a"], true));
    let ack = session.request().await.unwrap();
    assert_eq!((ack.response_nonce.as_str(), ack.error_detail), ("n1", None));

    let synced = client
        .until(|state| matches!(state, StreamState::Synced { .. }))
        .await;
    let StreamState::Synced { peer } = synced else {
        panic!("{synced:?}")
    };
    assert!(peer.sans.contains(&NAME.to_owned()), "{peer:?}");
    assert_eq!(
        peer.spiffe_ids().collect::<Vec<_>>(),
        ["spiffe://cluster.local/ns/istio-system/sa/istiod"]
    );
    assert!(!peer.not_after.is_empty());
}

#[tokio::test]
async fn the_token_is_read_anew_for_each_stream() {
    let authority = Authority::new(NAME);
    let files = Files::new(&authority, "old");
    let mut istiod = Istiod::start(Some(&authority)).await;
    let _client = Client::start(StreamKind::Workloads, files.server(&istiod, NAME), &[]);
    let session = istiod.session().await;
    assert_eq!(session.metadata.get("authorization").unwrap(), "Bearer old");
    fs::write(files.token(), "new\r\n").unwrap();
    session.fail(Status::unavailable("rotating"));
    assert_eq!(
        istiod.session().await.metadata.get("authorization").unwrap(),
        "Bearer new"
    );
}

#[tokio::test]
async fn the_root_is_read_anew_for_each_connection() {
    let (authority, stranger) = (Authority::new(NAME), Authority::new(NAME));
    let files = Files::new(&stranger, "token");
    let mut istiod = Istiod::start(Some(&authority)).await;
    let mut client = Client::start(StreamKind::Workloads, files.server(&istiod, NAME), &[]);
    let error = client.failure().await;
    assert!(error.contains("handshake"), "{error}");
    fs::write(files.root(), &authority.root).unwrap();
    istiod.session().await;
}

#[tokio::test]
async fn a_server_of_another_name_is_refused_before_it_sees_the_token() {
    let authority = Authority::new("somebody.else.svc");
    let files = Files::new(&authority, "token");
    let mut istiod = Istiod::start(Some(&authority)).await;
    let mut client = Client::start(StreamKind::Workloads, files.server(&istiod, NAME), &[]);
    let error = client.failure().await;
    assert!(error.contains(NAME), "{error}");
    // The control: the same server, asked for by its own name.
    let _client = Client::start(
        StreamKind::Workloads,
        files.server(&istiod, "somebody.else.svc"),
        &[],
    );
    istiod.session().await;
}

#[tokio::test]
async fn files_that_cannot_be_read_are_named() {
    let authority = Authority::new(NAME);
    let istiod = Istiod::start(Some(&authority)).await;
    let breaks: [fn(&Files) -> PathBuf; 5] = [
        |files| spoil(files.token(), None),
        |files| spoil(files.token(), Some("\n")),
        |files| spoil(files.token(), Some("two\nlines")),
        |files| spoil(files.root(), None),
        |files| spoil(files.root(), Some("no pem")),
    ];
    for break_it in breaks {
        let files = Files::new(&authority, "token");
        let path = break_it(&files).display().to_string();
        let mut client = Client::start(StreamKind::Workloads, files.server(&istiod, NAME), &[]);
        let error = client.failure().await;
        assert!(error.contains(&path), "{error}");
    }
}

/// Writes nonsense to a file, or removes it.
fn spoil(path: PathBuf, content: Option<&str>) -> PathBuf {
    match content {
        Some(content) => fs::write(&path, content).unwrap(),
        None => fs::remove_file(&path).unwrap(),
    }
    path
}

#[tokio::test]
async fn a_deletion_during_an_outage_arrives() {
    let mut istiod = Istiod::start(None).await;
    let mut client = Client::start(StreamKind::Workloads, plain(&istiod), &[]);
    let mut session = istiod.session().await;
    assert!(
        session
            .request()
            .await
            .unwrap()
            .initial_resource_versions
            .is_empty()
    );
    session.send(response(
        Kind::Address,
        "n1",
        vec![workload("a", "1"), workload("b", "1")],
        &[],
    ));
    assert_eq!(names(&client.push().await), ["a", "b"]);
    assert!(session.request().await.is_some());
    drop(session);

    let mut session = istiod.session().await;
    let again = session.request().await.unwrap();
    assert!(again.node.is_some());
    let held: Vec<_> = again
        .initial_resource_versions
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(held, ["a", "b"]);
    session.send(response(Kind::Address, "m1", vec![], &["b"]));
    let push = client.push().await;
    assert_eq!(
        (push.initial, push.resources.len(), push.removed),
        (true, 0, vec!["b".to_owned()])
    );
    drop(session);

    let again = istiod.session().await.request().await.unwrap();
    assert_eq!(again.initial_resource_versions.keys().collect::<Vec<_>>(), ["a"]);
}

#[tokio::test]
async fn a_nack_names_each_refused_resource_and_the_stream_goes_on() {
    let mut istiod = Istiod::start(None).await;
    let mut client = Client::start(StreamKind::Workloads, plain(&istiod), &["b"]);
    let mut session = istiod.session().await;
    session.request().await;
    let all = vec![
        workload("a", "1"),
        workload("b", "1"),
        garbage(Kind::Address, "c"),
    ];
    session.send(response(Kind::Address, "n1", all, &[]));
    let push = client.push().await;
    assert_eq!(names(&push), ["a", "b"]);
    assert_eq!(push.undecodable.len(), 1);
    assert_eq!(push.undecodable[0].name, "c");
    let nack = session.request().await.unwrap();
    assert_eq!(nack.response_nonce, "n1");
    let message = nack.error_detail.unwrap().message;
    assert!(
        message.contains("`b`: unwanted") && message.contains("`c`: malformed"),
        "{message}"
    );
    assert!(!message.contains("`a`"), "{message}");

    session.send(response(Kind::Address, "n2", vec![workload("d", "1")], &[]));
    assert_eq!(names(&client.push().await), ["d"]);
    assert!(session.request().await.unwrap().error_detail.is_none());
    drop(session);
    let again = istiod.session().await.request().await.unwrap();
    assert_eq!(
        again.initial_resource_versions.keys().collect::<Vec<_>>(),
        ["a", "d"]
    );
}

#[tokio::test]
async fn a_refused_config_stream_is_retried_and_leaves_the_workload_stream_alone() {
    let mut istiod = Istiod::start(None).await;
    let mut workloads = Client::start(StreamKind::Workloads, plain(&istiod), &[]);
    let mut session = istiod.session().await;
    session.request().await;
    session.send(response(Kind::Address, "n1", vec![workload("a", "1")], &[]));
    workloads.push().await;
    session.request().await;
    workloads
        .until(|state| matches!(state, StreamState::Synced { .. }))
        .await;

    let mut config = Client::start(StreamKind::Config, plain(&istiod), &[]);
    for status in [
        Status::unauthenticated("who?"),
        Status::permission_denied("not you"),
    ] {
        let mut refused = istiod.session().await;
        assert!(
            refused
                .request()
                .await
                .unwrap()
                .node
                .unwrap()
                .id
                .starts_with("router~")
        );
        let (code, message) = (status.code(), status.message().to_owned());
        refused.fail(status);
        let state = config
            .until(|state| matches!(state, StreamState::Refused { .. }))
            .await;
        let StreamState::Refused { error, .. } = state else {
            panic!("{state:?}")
        };
        assert!(error.contains(&message), "{code}: {error}");
    }
    assert!(
        workloads.states.try_recv().is_err(),
        "the workload stream noticed"
    );
    session.send(response(Kind::Address, "n2", vec![workload("b", "1")], &[]));
    assert_eq!(names(&workloads.push().await), ["b"]);
    assert_eq!(session.request().await.unwrap().response_nonce, "n2");
}

#[tokio::test]
async fn the_config_stream_is_synced_when_every_kind_was_answered() {
    let mut istiod = Istiod::start(None).await;
    let mut client = Client::start(StreamKind::Config, plain(&istiod), &[]);
    let mut session = istiod.session().await;
    let kinds = StreamKind::Config.kinds(false);
    for (index, kind) in kinds.iter().enumerate() {
        let request = session.request().await.unwrap();
        assert_eq!(
            (request.type_url.as_str(), request.node.is_some()),
            (kind.type_url(), index == 0)
        );
    }
    for kind in &kinds {
        let resources = match kind {
            Kind::AuthorizationPolicy => vec![empty_policy("ns/a", "1")],
            Kind::MeshConfig => vec![mesh("td")],
            _ => vec![],
        };
        session.send(response(*kind, "n", resources, &[]));
        let push = client.push().await;
        assert_eq!((push.type_url.as_str(), push.initial), (kind.type_url(), true));
        let state = client
            .until(|state| match state {
                StreamState::Syncing { ready, .. } => ready[kind],
                StreamState::Synced { .. } => true,
                _ => false,
            })
            .await;
        assert_eq!(
            matches!(state, StreamState::Synced { .. }),
            *kind == Kind::MeshConfig
        );
    }
    // A push that changes nothing is acknowledged and not given to the sink.
    for kind in &kinds {
        assert!(session.request().await.is_some(), "{kind}");
    }
    session.send(response(
        Kind::AuthorizationPolicy,
        "n9",
        vec![empty_policy("ns/a", "1")],
        &[],
    ));
    assert_eq!(session.request().await.unwrap().response_nonce, "n9");
    assert!(client.pushes.try_recv().is_err());
}

#[tokio::test]
async fn an_end_before_the_first_response_is_an_error() {
    let mut istiod = Istiod::start(None).await;
    let mut client = Client::start(StreamKind::Workloads, plain(&istiod), &[]);
    let mut session = istiod.session().await;
    session.request().await;
    drop(session);
    let error = client.failure().await;
    assert!(error.contains("before it answered"), "{error}");
}

#[tokio::test]
async fn a_server_that_is_away_is_waited_for() {
    let istiod = Istiod::start(None).await;
    let server = plain(&istiod);
    let address = istiod.stop().await;
    let mut client = Client::start(StreamKind::Workloads, server, &[]);
    let error = client.failure().await;
    assert!(error.contains("connect to"), "{error}");
    let attempt = client
        .until(|state| matches!(state, StreamState::Connecting { attempt: 2.. }))
        .await;
    assert!(matches!(attempt, StreamState::Connecting { .. }));
    let mut istiod = Istiod::restart(address).await;
    istiod.session().await;
}

#[tokio::test]
async fn a_whole_mesh_fits_in_one_message() {
    let mut istiod = Istiod::start(None).await;
    let mut client = Client::start(StreamKind::Workloads, plain(&istiod), &[]);
    let mut session = istiod.session().await;
    session.request().await;
    let long = "x".repeat(1000);
    let many: Vec<_> = (0..10_000)
        .map(|n| workload(&format!("{long}{n}"), "1"))
        .collect();
    session.send(response(Kind::Address, "n1", many, &[]));
    assert_eq!(client.push().await.resources.len(), 10_000);
    assert!(session.request().await.unwrap().error_detail.is_none());
}

#[tokio::test]
async fn a_stopped_stream_says_so_and_the_server_sees_it_go() {
    let mut istiod = Istiod::start(None).await;
    let mut client = Client::start(StreamKind::Workloads, plain(&istiod), &[]);
    let mut session = istiod.session().await;
    session.request().await;
    session.send(response(Kind::Address, "n1", vec![], &[]));
    client.push().await;
    session.request().await;
    client.stop.cancel();
    client.until(|state| *state == StreamState::Stopped).await;
    assert!(session.request().await.is_none());
}
