//! What Envoy says of each request, and of each other stream, that went through a listener inside a pod or that was
//! held until an oracle had judged it.
//!
//! Invariant: a record is Envoy's own word; what it doesn't say is not made up.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::{Address, Metadata, address, socket_address};
use envoy_types::pb::envoy::data::accesslog::v3::{AccessLogCommon, HttpAccessLogEntry, TcpAccessLogEntry};
use envoy_types::pb::envoy::service::accesslog::v3::access_log_service_server::AccessLogService;
use envoy_types::pb::envoy::service::accesslog::v3::stream_access_logs_message::LogEntries;
use envoy_types::pb::envoy::service::accesslog::v3::{StreamAccessLogsMessage, StreamAccessLogsResponse};
use envoy_types::pb::google::protobuf::value::Kind;
use thyra_datapath_abi::tables::{PolicyRef, RuleRef};
use tokio::sync::broadcast;
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;

use crate::lower::custom::{HTTP_RBAC, NETWORK_RBAC, index_of};

/// The tag with a stream's server name.
pub(crate) const SERVER_NAME: &str = "server_name";
/// The tag with the reason for a stream's end, where it was refused.
pub(crate) const ENDED_BY: &str = "ended_by";
/// The tag with the same where an authorizer refused it.
pub(crate) const DETAILS: &str = "details";
/// The tag of what an oracle was asked about a stream that is held.
pub(crate) const HELD: &str = "held";
/// In front of what a stream's rules say of it beside what becomes of it.
pub(crate) const TOLD: &str = "told_";
/// The rule of a stream that let it through, in the metadata of its filters.
const TOLD_RULE: &str = "told_shadow_effective_policy_id";
/// That it was judged at all.
const TOLD_RESULT: &str = "told_shadow_engine_result";
/// What a refusal by RBAC is called, before the policy in brackets.
const DENIED: &str = "rbac_access_denied_matched_policy";
/// What a refusal of a token is called, before the cause in braces (`jwt_authn/filter.cc`).
const BAD_TOKEN: &str = "jwt_authn_access_denied";
/// What a refusal by an authorizer is called (`ext_authz/ext_authz.h`).
const UNAUTHORIZED: &str = "ext_authz_denied";
/// What the failure of a check is called that lets nobody pass.
const UNCHECKED: &str = "ext_authz_error";
/// Batches that a listener may fall behind.
const BACKLOG: usize = 1024;

/// What became of a request or stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It went on to the pod; by this rule, where one was needed.
    Allowed(Option<RuleRef>),
    /// A rule refused it; none where no ALLOW rule held.
    Denied(Option<RuleRef>),
    /// Its token was not taken, in Envoy's words; 401.
    BadToken(String),
    /// The authorizer of a CUSTOM rule refused it.
    Unauthorized(Option<RuleRef>),
    /// The authorizer of a CUSTOM rule could not be asked, or gave no answer.
    Unchecked(Option<RuleRef>),
    /// Envoy answered it by itself: malformed, say.
    Refused,
    /// It was held and is over without an answer of Envoy's, for this reason.
    Unjudged(&'static str),
}

/// What was judged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A request.
    Request {
        /// `GET`.
        method: String,
        /// As the client wrote it, or as it was normalised.
        path: String,
        /// The status that the client got; 0 for none.
        status: u32,
    },
    /// Any other stream, when it has ended.
    Stream {
        /// The name in its ClientHello; empty where it has none.
        server_name: String,
        /// Bytes from the client.
        received: u64,
        /// Bytes to the client.
        sent: u64,
    },
    /// A stream that was held, when its first bytes were judged.
    Held {
        /// The name in its ClientHello; empty where it has none, or was not judged.
        server_name: String,
    },
}

/// A request, or a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The client's end.
    pub client: SocketAddr,
    /// The pod's.
    pub pod: SocketAddr,
    /// What it was.
    pub what: What,
    /// From the first byte to the last.
    pub took: Duration,
    /// What became of it.
    pub decision: Decision,
}

/// The sink.
#[derive(Clone, Debug)]
pub struct Records(broadcast::Sender<Arc<Record>>);

impl Default for Records {
    fn default() -> Self {
        Self(broadcast::channel(BACKLOG).0)
    }
}

impl Records {
    /// Tells what Envoy doesn't.
    pub(crate) fn tell(&self, record: Record) {
        // Without a listener there is nobody to tell.
        drop(self.0.send(Arc::new(record)));
    }

    /// Records from now on.
    #[must_use]
    pub fn listen(&self) -> broadcast::Receiver<Arc<Record>> {
        self.0.subscribe()
    }
}

#[tonic::async_trait]
impl AccessLogService for Records {
    async fn stream_access_logs(
        &self,
        request: Request<Streaming<StreamAccessLogsMessage>>,
    ) -> Result<Response<StreamAccessLogsResponse>, Status> {
        let mut messages = request.into_inner();
        while let Some(message) = messages.message().await? {
            let records: Vec<Option<Record>> = match message.log_entries {
                Some(LogEntries::HttpLogs(logs)) => logs.log_entry.iter().map(request_of).collect(),
                Some(LogEntries::TcpLogs(logs)) => logs.log_entry.iter().map(stream_of).collect(),
                None => continue,
            };
            for record in records {
                match record {
                    Some(record) => self.tell(record),
                    None => debug!("envoy logs what has no addresses, or what it did not judge"),
                }
            }
        }
        Ok(Response::new(StreamAccessLogsResponse {}))
    }
}

/// None where the addresses are missing.
fn request_of(entry: &HttpAccessLogEntry) -> Option<Record> {
    let common = entry.common_properties.as_ref()?;
    let request = entry.request.as_ref();
    let response = entry.response.as_ref();
    let details = response.map_or("", |response| response.response_code_details.as_str());
    let what = What::Request {
        method: request.map_or_else(String::new, |request| method(request.request_method)),
        path: request.map_or_else(String::new, |request| {
            let original = &request.original_path;
            if original.is_empty() {
                &request.path
            } else {
                original
            }
            .clone()
        }),
        status: response
            .and_then(|response| response.response_code)
            .map_or(0, |code| code.value),
    };
    let client = common.downstream_direct_remote_address.as_ref()?;
    record(common, client, what, decision(common, details, HTTP_RBAC))
}

/// The same of a stream.
fn stream_of(entry: &TcpAccessLogEntry) -> Option<Record> {
    let common = entry.common_properties.as_ref()?;
    if common.custom_tags.contains_key(HELD) {
        return held_of(common);
    }
    let tag = |name: &str| common.custom_tags.get(name).map_or("", String::as_str);
    let bytes = entry.connection_properties.unwrap_or_default();
    let what = What::Stream {
        server_name: tag(SERVER_NAME).to_owned(),
        received: bytes.received_bytes,
        sent: bytes.sent_bytes,
    };
    let details = match tag(DETAILS) {
        told if told.starts_with(UNAUTHORIZED) || told.starts_with(UNCHECKED) => told,
        _ => tag(ENDED_BY),
    };
    let client = common.downstream_direct_remote_address.as_ref()?;
    record(common, client, what, decision(common, details, NETWORK_RBAC))
}

/// The same of what an oracle was asked; none where whoever asked went away before the answer. It is asked for the
/// client, whose address it was told.
fn held_of(common: &AccessLogCommon) -> Option<Record> {
    let tag = |name: &str| common.custom_tags.get(name).map_or("", String::as_str);
    let what = What::Held {
        server_name: tag(SERVER_NAME).to_owned(),
    };
    let decided = match decision(common, tag(ENDED_BY), NETWORK_RBAC) {
        // It leads nowhere: without a refusal, it is allowed if it was judged.
        Decision::Refused => {
            let metadata = common.metadata.as_ref()?;
            text(metadata, NETWORK_RBAC, TOLD_RESULT)?;
            Decision::Allowed(text(metadata, NETWORK_RBAC, TOLD_RULE).and_then(rule))
        }
        decided => decided,
    };
    record(common, common.downstream_remote_address.as_ref()?, what, decided)
}

fn record(common: &AccessLogCommon, client: &Address, what: What, decision: Decision) -> Option<Record> {
    Some(Record {
        client: socket(client)?,
        pod: socket(common.downstream_local_address.as_ref()?)?,
        what,
        took: common.duration.map_or(Duration::ZERO, |took| {
            let seconds = u64::try_from(took.seconds).unwrap_or(0);
            Duration::new(seconds, u32::try_from(took.nanos).unwrap_or(0))
        }),
        decision,
    })
}

/// `rbac`: whose metadata name the rule that let it through.
fn decision(common: &AccessLogCommon, details: &str, rbac: &str) -> Decision {
    if let Some(policy) = details.strip_prefix(DENIED) {
        let policy = policy.trim_start_matches('[').trim_end_matches(']');
        return Decision::Denied(rule(policy));
    }
    if let Some(why) = details.strip_prefix(BAD_TOKEN) {
        let why = why.trim_start_matches('{').trim_end_matches('}');
        return Decision::BadToken(why.replace('_', " "));
    }
    if details.starts_with(UNAUTHORIZED) {
        return Decision::Unauthorized(asking(common, rbac));
    }
    if details.starts_with(UNCHECKED) {
        return Decision::Unchecked(asking(common, rbac));
    }
    if common.upstream_cluster.is_empty() {
        return Decision::Refused;
    }
    let named = common.metadata.as_ref();
    let named = named.and_then(|metadata| effective(metadata, rbac));
    Decision::Allowed(named.and_then(rule))
}

/// The rule that made the last authorizer be asked: it is the one that refused.
fn asking(common: &AccessLogCommon, rbac: &str) -> Option<RuleRef> {
    let fields = &common.metadata.as_ref()?.filter_metadata.get(rbac)?.fields;
    let asked = fields
        .iter()
        .filter_map(|(name, value)| Some((index_of(name)?, value)));
    let (_, value) = asked.max_by_key(|(index, _)| *index)?;
    match value.kind.as_ref()? {
        Kind::StringValue(name) => rule(name),
        _ => None,
    }
}

/// The last rule that let it through: of a request, or of a stream.
fn effective<'a>(metadata: &'a Metadata, rbac: &str) -> Option<&'a str> {
    let enforced = text(metadata, rbac, "enforced_effective_policy_id");
    enforced.or_else(|| text(metadata, rbac, TOLD_RULE))
}

/// What a filter wrote into the metadata.
fn text<'a>(metadata: &'a Metadata, filter: &str, field: &str) -> Option<&'a str> {
    match metadata
        .filter_metadata
        .get(filter)?
        .fields
        .get(field)?
        .kind
        .as_ref()?
    {
        Kind::StringValue(text) => Some(text),
        _ => None,
    }
}

/// `00002:shop/read#0`, as `lower` names policies; none of `none`.
fn rule(name: &str) -> Option<RuleRef> {
    let (_, name) = name.split_once(':')?;
    let (policy, rule) = match name.split_once('#') {
        Some((policy, rule)) => (policy, Some(rule.parse().ok()?)),
        None => (name, None),
    };
    let (namespace, name) = policy.split_once('/')?;
    let policy = PolicyRef {
        namespace: namespace.into(),
        name: name.into(),
    };
    Some(RuleRef { policy, rule })
}

fn socket(address: &Address) -> Option<SocketAddr> {
    let Some(address::Address::SocketAddress(socket)) = &address.address else {
        return None;
    };
    let Some(socket_address::PortSpecifier::PortValue(port)) = socket.port_specifier else {
        return None;
    };
    let ip: std::net::IpAddr = socket.address.parse().ok()?;
    Some(SocketAddr::new(ip.to_canonical(), u16::try_from(port).ok()?))
}

fn method(number: i32) -> String {
    use envoy_types::pb::envoy::config::core::v3::RequestMethod;

    RequestMethod::try_from(number)
        .map_or("?", |method| method.as_str_name())
        .to_owned()
}

#[cfg(test)]
mod tests {
    use envoy_types::pb::google::protobuf::{Struct, Value};

    use super::*;

    #[test]
    fn a_refused_token_is_told_with_envoys_reason() {
        let common = AccessLogCommon::default();
        let decided = decision(&common, "jwt_authn_access_denied{Jwt_is_expired}", HTTP_RBAC);
        assert_eq!(decided, Decision::BadToken("Jwt is expired".to_owned()));
        assert_eq!(decision(&common, "direct_response", HTTP_RBAC), Decision::Refused);
    }

    #[test]
    fn a_refusal_by_an_authorizer_names_the_rule_that_had_it_asked_last() {
        let field = |text: &str| Value {
            kind: Some(Kind::StringValue(text.to_owned())),
        };
        let asked = Struct {
            fields: [
                ("custom2_shadow_effective_policy_id", "00000:shop/two#1"),
                ("custom10_shadow_effective_policy_id", "00001:shop/ten#0"),
                ("custom10_shadow_engine_result", "denied"),
                ("enforced_effective_policy_id", "00000:shop/read#0"),
            ]
            .map(|(name, text)| (name.to_owned(), field(text)))
            .into(),
        };
        let common = AccessLogCommon {
            metadata: Some(Metadata {
                filter_metadata: [(HTTP_RBAC.to_owned(), asked)].into(),
                ..Metadata::default()
            }),
            ..AccessLogCommon::default()
        };
        let named = rule("00001:shop/ten#0");
        assert_eq!(
            decision(&common, "ext_authz_denied", HTTP_RBAC),
            Decision::Unauthorized(named.clone())
        );
        assert_eq!(
            decision(&common, "ext_authz_error", HTTP_RBAC),
            Decision::Unchecked(named)
        );
    }

    #[test]
    fn a_held_stream_is_allowed_only_where_it_was_judged_and_not_refused() {
        let end = |address: &str| Address {
            address: Some(address::Address::SocketAddress(
                envoy_types::pb::envoy::config::core::v3::SocketAddress {
                    address: address.to_owned(),
                    port_specifier: Some(socket_address::PortSpecifier::PortValue(443)),
                    ..Default::default()
                },
            )),
        };
        let asked = |ended_by: &str, told: &[(&str, &str)]| {
            let field = |text: &str| Value {
                kind: Some(Kind::StringValue(text.to_owned())),
            };
            let fields = told.iter().map(|(name, text)| ((*name).to_owned(), field(text)));
            let told = Struct {
                fields: fields.collect(),
            };
            let tags = [(HELD, "yes"), (SERVER_NAME, "a.example"), (ENDED_BY, ended_by)];
            let common = AccessLogCommon {
                // Of the Unix socket; the client is the one that the oracle was told of.
                downstream_direct_remote_address: None,
                downstream_remote_address: Some(end("10.0.0.2")),
                downstream_local_address: Some(end("10.0.0.1")),
                custom_tags: tags.map(|(tag, text)| (tag.to_owned(), text.to_owned())).into(),
                metadata: Some(Metadata {
                    filter_metadata: [(NETWORK_RBAC.to_owned(), told)].into(),
                    ..Metadata::default()
                }),
                ..AccessLogCommon::default()
            };
            let entry = TcpAccessLogEntry {
                common_properties: Some(common),
                ..TcpAccessLogEntry::default()
            };
            stream_of(&entry).map(|record| (record.client.to_string(), record.decision))
        };
        let told = |decision| Some(("10.0.0.2:443".to_owned(), decision));
        let allowed = [(TOLD_RESULT, "allowed"), (TOLD_RULE, "00000:shop/by-name#1")];
        let by = rule("00000:shop/by-name#1");
        assert_eq!(asked("", &allowed), told(Decision::Allowed(by)));
        assert_eq!(asked("", &allowed[..1]), told(Decision::Allowed(None)));
        assert_eq!(asked("", &[]), None, "whoever asked went away");
        let refused = "rbac_access_denied_matched_policy[none]";
        assert_eq!(asked(refused, &allowed[..1]), told(Decision::Denied(None)));
    }

    #[test]
    fn a_rule_is_read_as_it_was_written() {
        assert_eq!(
            rule("00002:shop/read#0").map(|r| r.to_string()),
            Some("shop/read#0".into())
        );
        assert_eq!(
            rule("00002:shop/read").map(|r| r.to_string()),
            Some("shop/read".into())
        );
        assert_eq!(rule("none"), None);
    }
}
