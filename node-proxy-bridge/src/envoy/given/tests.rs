//! Who is taken for an Envoy that is given, with this process or `sleep` in its part.

use envoy_types::pb::envoy::config::core::v3::BuildVersion;
use envoy_types::pb::envoy::service::accesslog::v3::StreamAccessLogsMessage;
use envoy_types::pb::envoy::service::accesslog::v3::access_log_service_client::AccessLogServiceClient;
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client as discovery;
use envoy_types::pb::envoy::r#type::v3::SemanticVersion;
use envoy_types::pb::google::protobuf::{Struct, Value as Field};
use tokio::net::UnixStream;
use tonic::Code;
use tonic::transport::Channel;

use super::*;
use crate::ads::AdsServer;

struct Place {
    folder: tempfile::TempDir,
    given: Arc<Given>,
}

/// This process plays the Envoy.
fn place(user: u32, enroll: impl Fn(u32) -> Result<bool, String> + Send + Sync + 'static) -> Place {
    let folder = tempfile::tempdir().unwrap();
    let config = GivenConfig {
        socket: folder.path().join("xds.sock"),
        node: "test".to_owned(),
        heap: 1 << 30,
        user,
        note: folder.path().join("envoy.json"),
    };
    let given = Given::new(config, Box::new(enroll));
    Place { folder, given }
}

fn own_user() -> u32 {
    rustix::process::getuid().as_raw()
}

/// What Envoy says first.
fn words(given: &Given, minor: u32) -> DeltaDiscoveryRequest {
    let mark = Field {
        kind: Some(Value::StringValue(given.config.mark())),
    };
    let build = BuildVersion {
        version: Some(SemanticVersion {
            major_number: 1,
            minor_number: minor,
            patch: 0,
        }),
        metadata: None,
    };
    DeltaDiscoveryRequest {
        type_url: Kind::Cluster.type_url().to_owned(),
        node: Some(Node {
            user_agent_name: "envoy".to_owned(),
            user_agent_version_type: Some(UserAgentVersionType::UserAgentBuildVersion(build)),
            metadata: Some(Struct {
                fields: [(MARK.to_owned(), mark)].into(),
            }),
            ..Node::default()
        }),
        ..DeltaDiscoveryRequest::default()
    }
}

async fn dial(place: &Place) -> Channel {
    let path = place.given.config.socket.clone();
    let connect = tower::service_fn(move |_| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
    });
    let endpoint = tonic::transport::Endpoint::from_static("http://thyra");
    endpoint.connect_with_connector(connect).await.unwrap()
}

/// Asks over the socket as Envoy does; the first answer's kind, or the refusal's words.
async fn ask(place: &Place, request: DeltaDiscoveryRequest) -> Result<String, String> {
    let channel = dial(place).await;
    let requests = tokio_stream::StreamExt::chain(tokio_stream::once(request), tokio_stream::pending());
    let mut client = discovery::AggregatedDiscoveryServiceClient::new(channel);
    let answers = client.delta_aggregated_resources(requests);
    let mut answers = answers
        .await
        .map_err(|status| status.message().to_owned())?
        .into_inner();
    match answers.message().await {
        Ok(Some(answer)) => Ok(answer.type_url),
        Ok(None) => Err("it ended".to_owned()),
        Err(status) => Err(status.message().to_owned()),
    }
}

/// Tells of streams and of requests as Envoy does; how either is taken.
async fn tell(place: &Place) -> [Code; 2] {
    let code = |told: Result<(), tonic::Status>| told.map_or_else(|status| status.code(), |()| Code::Ok);
    let channel = dial(place).await;
    let mut streams = AccessLogServiceClient::new(channel.clone());
    let message = tokio_stream::once(StreamAccessLogsMessage::default());
    let streams = streams.stream_access_logs(message).await.map(|_| ());
    let mut requests = tonic::client::Grpc::new(channel);
    requests.ready().await.unwrap();
    let path = "/opentelemetry.proto.collector.logs.v1.LogsService/Export";
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let requests = requests.unary(tonic::Request::new(()), path, codec).await;
    [code(streams), code(requests.map(|_| ()))]
}

#[tokio::test]
async fn nobody_but_the_envoy_at_work_tells_of_requests() {
    let place = place(own_user(), |_| Ok(false));
    let _server = AdsServer::start_for(Arc::clone(&place.given)).unwrap();
    assert_eq!(tell(&place).await, [Code::PermissionDenied; 2]);
    ask(&place, words(&place.given, 40)).await.unwrap();
    assert_eq!(tell(&place).await, [Code::Ok; 2]);
}

#[tokio::test]
async fn only_an_envoy_that_can_be_known_gets_a_configuration() {
    let fine = place(own_user(), |_| Ok(false));
    let given = Arc::clone(&fine.given);
    let _server = AdsServer::start_for(Arc::clone(&given)).unwrap();
    let refused = [
        (
            DeltaDiscoveryRequest {
                node: None,
                ..words(&given, 40)
            },
            "which Envoy it is",
        ),
        (words(&given, 39), "is Envoy 1.39.0, Thyra needs 1.40.0 or newer"),
        (
            {
                let mut other = words(&given, 40);
                other.node.as_mut().unwrap().metadata = None;
                other
            },
            "was not started with this agent's `bootstrap.json`",
        ),
    ];
    for (request, why) in refused {
        let said = ask(&fine, request).await.unwrap_err();
        assert!(said.contains(why), "{said}");
        assert!(matches!(&*given.state().borrow(), GivenState::Away(words) if words.contains(why)));
    }
    assert_eq!(
        ask(&fine, words(&given, 40)).await.unwrap(),
        Kind::Cluster.type_url()
    );
    let own = std::process::id();
    assert!(matches!(&*given.state().borrow(), GivenState::Here { pid, .. } if *pid == own));

    let other = place(own_user() + 1, |_| Ok(false));
    let error = other
        .given
        .admit(cred(&other).await, &words(&other.given, 40))
        .unwrap_err();
    assert!(matches!(error, NotEnvoy::User { .. }), "{error}");
    let shared = place(own_user(), |_| Err("others run there".to_owned()));
    let error = shared
        .given
        .admit(cred(&shared).await, &words(&shared.given, 40))
        .unwrap_err();
    assert!(error.to_string().ends_with("others run there"), "{error}");
    assert!(!shared.given.is_at_work(cred(&shared).await));
    assert_eq!(fine.given.admit(None, &words(&given, 40)), Err(NotEnvoy::Unseen));
}

/// What the kernel says of this process.
async fn cred(place: &Place) -> Option<UCred> {
    let path = place.folder.path().join("cred.sock");
    keep::remove(&path).unwrap();
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let stream = UnixStream::connect(&path).await.unwrap();
    let _accepted = listener.accept().await.unwrap();
    Some(stream.peer_cred().unwrap())
}

#[tokio::test]
async fn a_second_one_is_refused_until_the_first_has_ended() {
    let place = place(own_user(), |_| Ok(true));
    let given = &place.given;
    let mut first = std::process::Command::new("/bin/sleep")
        .arg("600")
        .spawn()
        .unwrap();
    let note = Note {
        pid: first.id(),
        started: left::started(first.id()).unwrap(),
        fingerprint: given.fingerprint().unwrap(),
    };
    keep::store(&given.config.note, &note).unwrap();
    given.resume().unwrap();
    let error = given.admit(cred(&place).await, &words(given, 40)).unwrap_err();
    assert!(
        matches!(error, NotEnvoy::Another { envoy, .. } if envoy == first.id()),
        "{error}"
    );
    assert!(!given.is_at_work(cred(&place).await));
    let mut state = given.state();
    first.kill().unwrap();
    first.wait().unwrap();
    state
        .wait_for(|state| matches!(state, GivenState::Away(_)))
        .await
        .unwrap();
    given.admit(cred(&place).await, &words(given, 40)).unwrap();
    assert!(given.is_at_work(cred(&place).await));
}

#[tokio::test]
async fn one_that_an_unknown_agent_told_is_ended() {
    for change in ["another build", "sockets unknown", "told by nobody known"] {
        let place = place(own_user(), move |_| Ok(change != "sockets unknown"));
        let given = &place.given;
        let mut envoy = std::process::Command::new("/bin/sleep")
            .arg("600")
            .spawn()
            .unwrap();
        let mut note = Note {
            pid: envoy.id(),
            started: left::started(envoy.id()).unwrap(),
            fingerprint: given.fingerprint().unwrap(),
        };
        if change == "told by nobody known" {
            let process = Process::of_other(note.pid).unwrap();
            given.admitted(process, AtWork { note, is_ours: false });
            let mut has = words(given, 40);
            given.hear(&has).unwrap();
            has.type_url = Kind::Listener.type_url().to_owned();
            has.initial_resource_versions = [("l21001".to_owned(), "1".to_owned())].into();
            let error = given.hear(&has).unwrap_err();
            assert!(matches!(error, NotEnvoy::Stranger { .. }), "{error}");
        } else {
            if change == "another build" {
                note.fingerprint = "other".to_owned();
            }
            keep::store(&given.config.note, &note).unwrap();
            given.resume().unwrap_err();
            end_noted(&given.config.note);
        }
        assert!(!envoy.wait().unwrap().success(), "{change}");
    }
}

#[test]
fn what_it_could_do_beyond_its_work_is_named() {
    let fine = "Uid:\t65532\t65532\t65532\t65532\nCapEff:\t0000000000200000\nNoNewPrivs:\t1\nSeccomp:\t2\n";
    assert!(looseness(fine).is_empty());
    let named = |from: &str, to: &str| looseness(&fine.replace(from, to)).join(", ");
    assert!(named("NoNewPrivs:\t1", "NoNewPrivs:\t0").contains("no_new_privs"));
    assert!(named("Seccomp:\t2", "Seccomp:\t0").contains("system calls"));
    assert!(named("200000", "200002").contains("more capabilities"));
    assert!(named("200000", "0").contains("lacks CAP_SYS_ADMIN"));
    assert!(named("Uid:\t65532", "Uid:\t0").contains("root"));
    assert_eq!(looseness("").len(), 5);
}
