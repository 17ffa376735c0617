//! What Envoy says of each stream that is not HTTP and went through a listener inside a pod, or that was held until an
//! oracle had judged it.
//!
//! Invariant: what Envoy doesn't say is not made up.

use std::net::SocketAddr;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::{Address, Metadata, address, socket_address};
use envoy_types::pb::envoy::data::accesslog::v3::{AccessLogCommon, TcpAccessLogEntry};
use envoy_types::pb::envoy::service::accesslog::v3::access_log_service_server::AccessLogService;
use envoy_types::pb::envoy::service::accesslog::v3::stream_access_logs_message::LogEntries;
use envoy_types::pb::envoy::service::accesslog::v3::{StreamAccessLogsMessage, StreamAccessLogsResponse};
use envoy_types::pb::google::protobuf::value::Kind;
use thyra_datapath_abi::tables::RuleRef;
use tonic::{Request, Response, Status, Streaming};

use crate::lower::custom::{NETWORK_RBAC, index_of};
use crate::records::{DENIED, Decision, Record, Records, UNAUTHORIZED, UNCHECKED, What, decision, rule};

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
}
