//! Authorizers, over HTTP and over gRPC, that answer what the request tells them to, and keep what they were asked.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::{
    HeaderValue, HeaderValueOption, address, socket_address::PortSpecifier,
};
use envoy_types::pb::envoy::service::auth::v3::authorization_server::{Authorization, AuthorizationServer};
use envoy_types::pb::envoy::service::auth::v3::check_response::HttpResponse;
use envoy_types::pb::envoy::service::auth::v3::{
    CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse,
};
use envoy_types::pb::envoy::r#type::v3::HttpStatus;
use envoy_types::pb::google::rpc::Status as RpcStatus;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use thyra_policy_compiler::authorizer::{
    self, Authorizer, CHECK_TIMEOUT, Check, Provider, STATUS_ON_ERROR, Target,
};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;

/// `google.rpc.Code`.
const OK: i32 = 0;
const PERMISSION_DENIED: i32 = 7;

/// What an authorizer was asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) path: String,
    /// Names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Question {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut all = self.headers.iter();
        all.find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }
}

/// What it says, by the header `x-answer-<name>` of the request; a stream has none, there the client's port does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Word {
    Yes,
    No,
    /// It is broken: 503, or a status of gRPC that is no answer.
    Broken,
    Never,
}

impl Word {
    fn of(question: &Question, name: &str) -> Self {
        match question.header(&format!("x-answer-{name}")) {
            Some("yes") => Self::Yes,
            Some("broken") => Self::Broken,
            Some("never") => Self::Never,
            _ => Self::No,
        }
    }
}

/// It runs as long as its value.
pub(crate) struct Running {
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    asked: Arc<Mutex<Vec<Question>>>,
    task: JoinHandle<()>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
struct Service {
    name: &'static str,
    asked: Arc<Mutex<Vec<Question>>>,
}

impl Running {
    pub(crate) async fn http(name: &'static str) -> Self {
        Self::start(name, |listener, service| {
            tokio::spawn(serve_http(listener, service))
        })
        .await
    }

    pub(crate) async fn grpc(name: &'static str) -> Self {
        Self::start(name, |listener, service| {
            let server = tonic::transport::Server::builder().add_service(AuthorizationServer::new(service));
            tokio::spawn(async move {
                server
                    .serve_with_incoming(TcpListenerStream::new(listener))
                    .await
                    .unwrap();
            })
        })
        .await
    }

    async fn start(name: &'static str, serve: impl FnOnce(TcpListener, Service) -> JoinHandle<()>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let service = Service {
            name,
            asked: Arc::clone(&asked),
        };
        Self {
            name,
            address,
            asked,
            task: serve(listener, service),
        }
    }

    /// What it was asked since the last call.
    pub(crate) fn asked(&self) -> Vec<Question> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }
}

/// The service that stands for an authorizer of this name.
pub(crate) fn target(name: &str) -> Target {
    authorizer::target(&format!("auth/{name}.example"), 80).unwrap()
}

/// A provider of this name, by its defaults.
pub(crate) fn provider(name: &str, check: Check) -> Authorizer {
    Authorizer {
        target: target(name),
        check,
        timeout: CHECK_TIMEOUT,
        fail_open: false,
        status_on_error: STATUS_ON_ERROR,
        body: None,
    }
}

pub(crate) fn named(name: &str, authorizer: Authorizer) -> Arc<Provider> {
    let provider = Provider::new(name, Ok(authorizer));
    assert!(provider.authorizer.is_ok(), "{provider:?}");
    Arc::new(provider)
}

async fn serve_http(listener: TcpListener, service: Service) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let service = service.clone();
        tokio::spawn(async move {
            let answer = service_fn(move |request| over_http(service.clone(), request));
            let server = hyper::server::conn::http1::Builder::new();
            // Who is gone hears nothing.
            let _ended = server.serve_connection(TokioIo::new(stream), answer).await;
        });
    }
}

async fn over_http(
    service: Service,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let body = body
        .collect()
        .await
        .map_or_else(|_| Bytes::new(), |body| body.to_bytes());
    let headers = head.headers.iter().map(|(name, value)| {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        (name.to_string(), value)
    });
    let question = Question {
        path: head.uri.to_string(),
        headers: headers.collect(),
        body: String::from_utf8_lossy(&body).into_owned(),
    };
    let word = Word::of(&question, service.name);
    service.asked.lock().unwrap().push(question);
    if word == Word::Never {
        tokio::time::sleep(Duration::from_secs(3600)).await;
    }
    let status = match word {
        Word::Yes => 200,
        Word::Broken => 503,
        Word::No | Word::Never => 403,
    };
    let answer = Response::builder()
        .status(status)
        .header("x-user", format!("of-{}", service.name))
        .header("x-secret", "kept")
        .header("x-why", "because");
    Ok(answer
        .body(Full::from(format!("{} says so", service.name)))
        .unwrap())
}

#[tonic::async_trait]
impl Authorization for Service {
    async fn check(
        &self,
        request: tonic::Request<CheckRequest>,
    ) -> Result<tonic::Response<CheckResponse>, tonic::Status> {
        let attributes = request.into_inner().attributes.unwrap_or_default();
        let http = attributes.request.and_then(|request| request.http);
        let question = http.map_or_else(Question::default, |http| Question {
            path: http.path,
            headers: http.headers.into_iter().collect(),
            body: http.body,
        });
        let from = attributes.source.and_then(|source| source.address?.address);
        let odd = match from {
            Some(address::Address::SocketAddress(socket)) => {
                matches!(socket.port_specifier, Some(PortSpecifier::PortValue(port)) if port % 2 == 1)
            }
            _ => true,
        };
        let word = match (question.headers.is_empty(), odd) {
            (true, true) => Word::No,
            (true, false) => Word::Yes,
            (false, _) => Word::of(&question, self.name),
        };
        self.asked.lock().unwrap().push(question);
        match word {
            Word::Broken => return Err(tonic::Status::unavailable("broken")),
            Word::Never => tokio::time::sleep(Duration::from_secs(3600)).await,
            Word::Yes | Word::No => {}
        }
        Ok(tonic::Response::new(answer(self.name, word == Word::Yes)))
    }
}

fn answer(name: &str, yes: bool) -> CheckResponse {
    let header = |key: &str, value: String| HeaderValueOption {
        header: Some(HeaderValue {
            key: key.to_owned(),
            value,
            ..HeaderValue::default()
        }),
        ..HeaderValueOption::default()
    };
    let http = if yes {
        HttpResponse::OkResponse(OkHttpResponse {
            headers: vec![header("x-user", format!("of-{name}"))],
            ..OkHttpResponse::default()
        })
    } else {
        HttpResponse::DeniedResponse(DeniedHttpResponse {
            status: Some(HttpStatus { code: 403 }),
            headers: vec![header("x-why", "because".to_owned())],
            body: format!("{name} says so"),
        })
    };
    CheckResponse {
        status: Some(RpcStatus {
            code: if yes { OK } else { PERMISSION_DENIED },
            ..RpcStatus::default()
        }),
        http_response: Some(http),
        ..CheckResponse::default()
    }
}
