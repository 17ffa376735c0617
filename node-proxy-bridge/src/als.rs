//! What Envoy says of each request, and of each other stream, that went through a listener inside a pod or that was
//! held until an oracle had judged it.
//!
//! Invariant: a record is Envoy's own word; what it doesn't say is not made up. Who listens hears of each record, or of
//! how many it missed.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::{Address, Metadata, address, socket_address};
use envoy_types::pb::envoy::data::accesslog::v3::{AccessLogCommon, TcpAccessLogEntry};
use envoy_types::pb::envoy::service::accesslog::v3::access_log_service_server::AccessLogService;
use envoy_types::pb::envoy::service::accesslog::v3::stream_access_logs_message::LogEntries;
use envoy_types::pb::envoy::service::accesslog::v3::{StreamAccessLogsMessage, StreamAccessLogsResponse};
use envoy_types::pb::google::protobuf::value::Kind;
use thyra_datapath_abi::tables::{PolicyRef, RuleRef};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;

use crate::lower::custom::{NETWORK_RBAC, index_of};

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
/// The metadata of a filter with rules: the last one that let it through.
pub(crate) const EFFECTIVE: &str = "enforced_effective_policy_id";
/// What a refusal by RBAC is called, before the policy in brackets.
const DENIED: &str = "rbac_access_denied_matched_policy";
/// What a refusal of a token is called, before the cause in braces (`jwt_authn/filter.cc`).
const BAD_TOKEN: &str = "jwt_authn_access_denied";
/// What a refusal by an authorizer is called (`ext_authz/ext_authz.h`).
const UNAUTHORIZED: &str = "ext_authz_denied";
/// What the failure of a check is called that lets nobody pass.
const UNCHECKED: &str = "ext_authz_error";
/// Batches that a listener may fall behind; each is at most what Envoy sends at once (`listener::told`).
const BACKLOG: usize = 128;

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
        /// The name in its ClientHello, empty where it has none; none where nobody read one: it is HTTP, or was not
        /// judged.
        server_name: Option<String>,
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

/// Records that Envoy sent together.
#[derive(Debug)]
struct Batch {
    /// How many were sent before them.
    first: u64,
    records: Vec<Arc<Record>>,
}

impl Batch {
    /// How many were sent with them.
    fn next(&self) -> u64 {
        let count = u64::try_from(self.records.len()).unwrap_or(u64::MAX);
        self.first.saturating_add(count)
    }
}

/// The sink.
#[derive(Clone, Debug)]
pub struct Records {
    batches: broadcast::Sender<Arc<Batch>>,
    /// How many were sent. Who has it sends: batches come in the order of their numbers.
    sent: Arc<Mutex<u64>>,
}

impl Default for Records {
    fn default() -> Self {
        Self {
            batches: broadcast::channel(BACKLOG).0,
            sent: Arc::default(),
        }
    }
}

impl Records {
    /// Records from now on.
    #[must_use]
    pub fn listen(&self) -> Listener {
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        Listener {
            batches: self.batches.subscribe(),
            next: *sent,
        }
    }

    /// Tells listeners of records that came together. What could not be read is missed, too.
    pub(crate) fn tell(&self, records: impl Iterator<Item = Option<Record>>) {
        let (mut read, mut unread) = (Vec::new(), 0);
        for record in records {
            match record {
                Some(record) => read.push(Arc::new(record)),
                None => unread += 1,
            }
        }
        if unread > 0 {
            debug!(unread, "envoy tells of requests or streams in another form");
        }
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let batch = Batch {
            first: sent.saturating_add(unread),
            records: read,
        };
        *sent = batch.next();
        // Without a listener there is nobody to tell.
        drop(self.batches.send(Arc::new(batch)));
    }
}

/// Who hears of records.
#[derive(Debug)]
pub struct Listener {
    batches: broadcast::Receiver<Arc<Batch>>,
    /// How many were sent before the next one.
    next: u64,
}

/// What a listener hears at once.
#[derive(Debug)]
pub struct Heard {
    /// Records that came before these and went by too fast.
    pub missed: u64,
    batch: Arc<Batch>,
}

impl Heard {
    /// In the order in which Envoy sent them.
    #[must_use]
    pub fn records(&self) -> &[Arc<Record>] {
        &self.batch.records
    }
}

impl Listener {
    /// Waits for records; none when there will be no more. Nothing is lost when the wait is given up.
    pub async fn recv(&mut self) -> Option<Heard> {
        loop {
            match self.batches.recv().await {
                Ok(batch) => {
                    let missed = batch.first.saturating_sub(self.next);
                    self.next = batch.next();
                    return Some(Heard { missed, batch });
                }
                // The number of the next batch says how many records that was.
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return None,
            }
        }
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
            // Requests come another way (`otlp`).
            let Some(LogEntries::TcpLogs(logs)) = message.log_entries else {
                continue;
            };
            let entries = logs.log_entry.iter().filter(|entry| !is_unjudged(entry));
            self.tell(entries.map(stream_of));
        }
        Ok(Response::new(StreamAccessLogsResponse {}))
    }
}

/// Whether it is a question to an oracle by who went away before the answer.
fn is_unjudged(entry: &TcpAccessLogEntry) -> bool {
    let Some(common) = &entry.common_properties else {
        return false;
    };
    let tag = |name: &str| common.custom_tags.get(name);
    let is_refused = tag(ENDED_BY).is_some_and(|words| words.starts_with(DENIED));
    let result = common
        .metadata
        .as_ref()
        .and_then(|metadata| text(metadata, TOLD_RESULT));
    tag(HELD).is_some() && !is_refused && result.is_none()
}

/// None where the addresses are missing.
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
    let (client, metadata) = (
        common.downstream_direct_remote_address.as_ref()?,
        common.metadata.as_ref(),
    );
    let decided = decision(
        details,
        !common.upstream_cluster.is_empty(),
        || effective(metadata?),
        || asking(metadata?),
    );
    record(common, client, what, decided)
}

/// The same of what an oracle was asked. It is asked for the client, whose address it was told. It leads nowhere: what
/// is not refused may pass.
fn held_of(common: &AccessLogCommon) -> Option<Record> {
    let tag = |name: &str| common.custom_tags.get(name).map_or("", String::as_str);
    let what = What::Held {
        server_name: Some(tag(SERVER_NAME).to_owned()),
    };
    let metadata = common.metadata.as_ref();
    let decided = decision(tag(ENDED_BY), true, || effective(metadata?), || asking(metadata?));
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

/// What became of it, by Envoy's words for an end; `passed`: it was on its way to the pod. `by` is the rule that let it
/// through, `asking` the one that had the last authorizer asked.
pub(crate) fn decision(
    details: &str,
    passed: bool,
    by: impl FnOnce() -> Option<RuleRef>,
    asking: impl FnOnce() -> Option<RuleRef>,
) -> Decision {
    if let Some(policy) = details.strip_prefix(DENIED) {
        let policy = policy.trim_start_matches('[').trim_end_matches(']');
        return Decision::Denied(rule(policy));
    }
    if let Some(why) = details.strip_prefix(BAD_TOKEN) {
        let why = why.trim_start_matches('{').trim_end_matches('}');
        return Decision::BadToken(why.replace('_', " "));
    }
    if details.starts_with(UNAUTHORIZED) {
        return Decision::Unauthorized(asking());
    }
    if details.starts_with(UNCHECKED) {
        return Decision::Unchecked(asking());
    }
    if passed {
        Decision::Allowed(by())
    } else {
        Decision::Refused
    }
}

/// The rule that made the last authorizer be asked: it is the one that refused.
fn asking(metadata: &Metadata) -> Option<RuleRef> {
    let fields = &metadata.filter_metadata.get(NETWORK_RBAC)?.fields;
    let asked = fields
        .iter()
        .filter_map(|(name, value)| Some((index_of(name)?, value)));
    let (_, value) = asked.max_by_key(|(index, _)| *index)?;
    match value.kind.as_ref()? {
        Kind::StringValue(name) => rule(name),
        _ => None,
    }
}

/// The last rule that let it through.
fn effective(metadata: &Metadata) -> Option<RuleRef> {
    rule(text(metadata, EFFECTIVE).or_else(|| text(metadata, TOLD_RULE))?)
}

/// What the filter with rules wrote into the metadata.
fn text<'a>(metadata: &'a Metadata, field: &str) -> Option<&'a str> {
    let fields = &metadata.filter_metadata.get(NETWORK_RBAC)?.fields;
    match fields.get(field)?.kind.as_ref()? {
        Kind::StringValue(text) => Some(text),
        _ => None,
    }
}

/// `00002:shop/read#0`, as `lower` names policies; none of `none`.
pub(crate) fn rule(name: &str) -> Option<RuleRef> {
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

#[cfg(test)]
mod tests {
    use envoy_types::pb::google::protobuf::{Struct, Value};

    use super::*;

    #[test]
    fn a_refused_token_is_told_with_envoys_reason() {
        let decided = |details| decision(details, false, || None, || None);
        assert_eq!(
            decided("jwt_authn_access_denied{Jwt_is_expired}"),
            Decision::BadToken("Jwt is expired".to_owned())
        );
        assert_eq!(decided("direct_response"), Decision::Refused);
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
        let metadata = Metadata {
            filter_metadata: [(NETWORK_RBAC.to_owned(), asked)].into(),
            ..Metadata::default()
        };
        assert_eq!(asking(&metadata), rule("00001:shop/ten#0"));
        assert_eq!(effective(&metadata), rule("00000:shop/read#0"));
    }

    fn record(number: u64) -> Record {
        let end = SocketAddr::from(([10, 0, 0, 1], 80));
        Record {
            client: end,
            pod: end,
            what: What::Stream {
                server_name: String::new(),
                received: number,
                sent: 0,
            },
            took: Duration::ZERO,
            decision: Decision::Refused,
        }
    }

    #[tokio::test]
    async fn a_listener_that_is_too_slow_hears_how_many_records_it_missed() {
        let records = Records::default();
        records.tell([Some(record(0))].into_iter());
        let mut listener = records.listen();
        for batch in 0..u64::try_from(BACKLOG).unwrap() + 2 {
            records.tell(
                [2 * batch, 2 * batch + 1]
                    .into_iter()
                    .map(|number| Some(record(number))),
            );
        }
        let heard = listener.recv().await.unwrap();
        assert_eq!(
            heard.missed, 4,
            "two batches of two, and none of before it listened"
        );
        assert_eq!(*heard.records()[0], record(4));
        assert_eq!(listener.recv().await.unwrap().missed, 0);
    }

    #[tokio::test]
    async fn a_record_that_can_not_be_read_is_missed_and_not_forgotten() {
        let records = Records::default();
        let mut listener = records.listen();
        records.tell([None, Some(record(1)), None].into_iter());
        records.tell([Some(record(2))].into_iter());
        let heard = listener.recv().await.unwrap();
        assert_eq!((heard.missed, heard.records().len()), (2, 1));
        assert_eq!(listener.recv().await.unwrap().missed, 0);
    }

    #[test]
    fn a_held_stream_is_told_only_where_it_was_judged_and_allowed_only_where_not_refused() {
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
            let judged = (!is_unjudged(&entry)).then(|| stream_of(&entry).expect("addresses"));
            judged.map(|record| (record.client.to_string(), record.decision))
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
