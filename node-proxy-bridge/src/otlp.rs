//! What Envoy says of each request, as OpenTelemetry log records: one line of text for each, in the form of `format`.
//!
//! Invariant: what a client writes can't be read as another field. It comes last, and no header holds the end of a
//! line (RFC 9110, section 5.5; Envoy refuses one that does).
//!
//! ```text
//! client␊pod␊status␊microseconds␊milliseconds␊cluster␊details␊rule␊rules that ask, in order␊method␊path
//! ```

use std::convert::Infallible;
use std::fmt::Write as _;
use std::future::{Ready, ready};
use std::net::SocketAddr;
use std::str::FromStr;
use std::task::{Context, Poll};
use std::time::Duration;

use prost::bytes::Bytes;
use tonic::codegen::{Body, BoxFuture, Service, StdError, http};
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use crate::als::EFFECTIVE;
use crate::listener::Redact;
use crate::lower::custom::{HTTP_RBAC, matched_field};
use crate::records::{self, Record, Records, What};

/// What Envoy writes where it has nothing to say.
const NOTHING: &str = "-";
const FIELDS: usize = 11;
/// Bytes of a path that are told; the rest is cut off.
const MAX_PATH: usize = 4096;
/// Bytes that may come at once, several times what Envoy is asked to send (`listener::told`): it is not trusted with
/// more.
pub(crate) const MAX_BATCH: usize = 1 << 20;
/// Bytes of a method that are told.
const MAX_METHOD: usize = 64;

/// How Envoy writes a request down; `asks`: how many authorizers there are.
pub(crate) fn format(asks: usize, redact: Redact) -> String {
    let rule = |field: &str| format!("%DYNAMIC_METADATA({HTTP_RBAC}:{field})%");
    let asked: Vec<String> = (0..asks).map(|index| rule(&matched_field(index))).collect();
    let mut text =
        String::from("%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%\n%DOWNSTREAM_LOCAL_ADDRESS%\n%RESPONSE_CODE%\n");
    // The last byte of an answer that was cut off is never sent: then the other time holds.
    text.push_str("%COMMON_DURATION(DS_RX_BEG:DS_TX_END:us)%\n%DURATION%\n");
    text.push_str("%UPSTREAM_CLUSTER%\n%RESPONSE_CODE_DETAILS%\n");
    // Writing to a string never fails.
    writeln!(text, "{}\n{}", rule(EFFECTIVE), asked.join(" ")).ok();
    write!(
        text,
        "%REQ(:METHOD):{MAX_METHOD}%\n{}",
        redact.path_format(MAX_PATH)
    )
    .ok();
    text
}

/// None where it is in another form.
fn read(text: &[u8]) -> Option<Record> {
    let fields: Vec<&[u8]> = text.splitn(FIELDS, |byte| *byte == b'\n').collect();
    let fields: [&[u8]; FIELDS] = fields.try_into().ok()?;
    let [
        client,
        pod,
        status,
        micros,
        millis,
        cluster,
        details,
        rule,
        asked,
        method,
        path,
    ] = fields;
    let word = |field| std::str::from_utf8(field).unwrap_or_default();
    let took = match number(micros) {
        Some(micros) => Duration::from_micros(micros),
        None => Duration::from_millis(number(millis).unwrap_or(0)),
    };
    let last = || word(asked).split(' ').rev().find_map(records::rule);
    Some(Record {
        client: socket(client)?,
        pod: socket(pod)?,
        what: What::Request {
            method: String::from_utf8_lossy(method).into_owned(),
            path: String::from_utf8_lossy(path).into_owned(),
            status: number(status).unwrap_or(0),
        },
        took,
        decision: records::decision(
            word(details),
            word(cluster) != NOTHING,
            || records::rule(word(rule)),
            last,
        ),
    })
}

fn number<T: FromStr>(field: &[u8]) -> Option<T> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

fn socket(field: &[u8]) -> Option<SocketAddr> {
    let address: SocketAddr = number(field)?;
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}

/// `opentelemetry.proto.collector.logs.v1.ExportLogsServiceRequest`, as far as it is read.
#[derive(Clone, PartialEq, prost::Message)]
struct Export {
    #[prost(message, repeated, tag = "1")]
    resources: Vec<ResourceLogs>,
}

/// `opentelemetry.proto.logs.v1.ResourceLogs`.
#[derive(Clone, PartialEq, prost::Message)]
struct ResourceLogs {
    #[prost(message, repeated, tag = "2")]
    scopes: Vec<ScopeLogs>,
}

/// `opentelemetry.proto.logs.v1.ScopeLogs`.
#[derive(Clone, PartialEq, prost::Message)]
struct ScopeLogs {
    #[prost(message, repeated, tag = "2")]
    records: Vec<LogRecord>,
}

/// `opentelemetry.proto.logs.v1.LogRecord`.
#[derive(Clone, PartialEq, prost::Message)]
struct LogRecord {
    #[prost(message, optional, tag = "5")]
    body: Option<Line>,
}

/// `opentelemetry.proto.common.v1.AnyValue` with a string, as bytes: one that is no UTF-8 must not lose those that came
/// with it.
#[derive(Clone, PartialEq, prost::Message)]
struct Line {
    #[prost(bytes = "bytes", tag = "1")]
    text: Bytes,
}

/// `opentelemetry.proto.collector.logs.v1.LogsService`.
#[derive(Clone, Debug)]
pub(crate) struct Requests(Records);

impl Requests {
    /// Records of requests go to these.
    pub(crate) fn new(records: Records) -> Self {
        Self(records)
    }

    fn export(&self, export: &Export) {
        let scopes = export.resources.iter().flat_map(|resource| &resource.scopes);
        let records = scopes.flat_map(|scope| &scope.records);
        self.0
            .tell(records.map(|record| read(&record.body.as_ref()?.text)));
    }
}

impl NamedService for Requests {
    const NAME: &'static str = "opentelemetry.proto.collector.logs.v1.LogsService";
}

impl UnaryService<Export> for Requests {
    type Response = ();
    type Future = Ready<Result<Response<()>, Status>>;

    fn call(&mut self, request: Request<Export>) -> Self::Future {
        self.export(request.get_ref());
        ready(Ok(Response::new(())))
    }
}

impl<B> Service<http::Request<B>> for Requests
where
    B: Body + Send + 'static,
    B::Error: Into<StdError> + Send + 'static,
{
    type Response = http::Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let service = self.clone();
        Box::pin(async move {
            if request.uri().path() != "/opentelemetry.proto.collector.logs.v1.LogsService/Export" {
                return Ok(Status::unimplemented("only Export").into_http());
            }
            let mut grpc = Grpc::new(ProstCodec::default()).max_decoding_message_size(MAX_BATCH);
            Ok(grpc.unary(service, request).await)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::Decision;

    fn line(rest: &str) -> String {
        format!("10.0.0.2:40000\n[::ffff:10.0.0.1]:8080\n200\n1250\n1\npod\n{rest}")
    }

    #[test]
    fn a_line_is_read_as_envoy_writes_it() {
        let record = read(line("via_upstream\n00000:shop/read#1\n\nGET\n/a?b").as_bytes()).unwrap();
        assert_eq!(record.client, "10.0.0.2:40000".parse().unwrap());
        assert_eq!(record.pod, "10.0.0.1:8080".parse().unwrap());
        assert_eq!(record.took, Duration::from_micros(1250));
        assert_eq!(
            record.decision,
            Decision::Allowed(records::rule("00000:shop/read#1"))
        );
        let (method, path) = ("GET".to_owned(), "/a?b".to_owned());
        assert_eq!(
            record.what,
            What::Request {
                method,
                path,
                status: 200
            }
        );
    }

    #[test]
    fn a_request_without_an_answer_has_the_time_of_its_end_and_no_status() {
        let line = "10.0.0.2:1\n10.0.0.1:2\n0\n-\n7\n-\ndownstream_remote_disconnect\n-\n\nGET\n/";
        let record = read(line.as_bytes()).unwrap();
        assert_eq!(record.took, Duration::from_millis(7));
        assert_eq!(record.decision, Decision::Refused);
        assert!(matches!(record.what, What::Request { status: 0, .. }));
    }

    #[test]
    fn a_refusal_by_an_authorizer_names_the_rule_that_had_it_asked_last() {
        let told = line("ext_authz_denied\n00000:shop/read#0\n00000:shop/two#1 00001:shop/ten#0 -\nGET\n/");
        let named = records::rule("00001:shop/ten#0");
        assert_eq!(
            read(told.as_bytes()).unwrap().decision,
            Decision::Unauthorized(named)
        );
    }

    #[test]
    fn what_a_client_writes_is_no_other_field_and_need_not_be_text() {
        let told = line("via_upstream\n-\n\nGET\n/a\n10.9.9.9:1\n-");
        let Some(Record { client, what, .. }) = read(told.as_bytes()) else {
            panic!("it is a line");
        };
        assert_eq!(client, "10.0.0.2:40000".parse().unwrap());
        assert!(matches!(what, What::Request { path, .. } if path == "/a\n10.9.9.9:1\n-"));
        let strange = [line("via_upstream\n-\n\nGET\n/").as_bytes(), &[0xff]].concat();
        assert!(matches!(read(&strange).unwrap().what, What::Request { path, .. } if path == "/\u{fffd}"));
        assert_eq!(read(b"nothing of the kind"), None);
    }

    #[test]
    fn what_is_redacted_is_not_even_asked_for() {
        let text = |redact| format(1, redact);
        assert!(text(Redact::NOTHING).contains("%PATH(WQ"));
        assert!(text(Redact::default()).contains("%PATH(NQ"));
        let without = text(Redact {
            path: true,
            ..Redact::default()
        });
        assert!(
            !without.contains("PATH(") && !without.contains("PATH?"),
            "{without}"
        );
        assert_eq!(without.matches('\n').count(), FIELDS - 1);
    }
}
