//! What Envoy says of each request that went through a listener inside a pod.
//!
//! Invariant: a record is Envoy's own word; what it doesn't say is not made up.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3::{Address, Metadata, address, socket_address};
use envoy_types::pb::envoy::data::accesslog::v3::{AccessLogCommon, HttpAccessLogEntry};
use envoy_types::pb::envoy::service::accesslog::v3::access_log_service_server::AccessLogService;
use envoy_types::pb::envoy::service::accesslog::v3::stream_access_logs_message::LogEntries;
use envoy_types::pb::envoy::service::accesslog::v3::{StreamAccessLogsMessage, StreamAccessLogsResponse};
use envoy_types::pb::google::protobuf::value::Kind;
use thyra_datapath_abi::tables::{PolicyRef, RuleRef};
use tokio::sync::broadcast;
use tonic::{Request, Response, Status, Streaming};
use tracing::debug;

/// The RBAC filter's metadata.
const RBAC: &str = "envoy.filters.http.rbac";
/// What a refusal by RBAC is called, before the policy in brackets.
const DENIED: &str = "rbac_access_denied_matched_policy";
/// What a refusal of a token is called, before the cause in braces (`jwt_authn/filter.cc`).
const BAD_TOKEN: &str = "jwt_authn_access_denied";
/// Batches that a listener may fall behind.
const BACKLOG: usize = 1024;

/// What became of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// It went on to the pod; by this rule, where one was needed.
    Allowed(Option<RuleRef>),
    /// A rule refused it; none where no ALLOW rule held.
    Denied(Option<RuleRef>),
    /// Its token was not taken, in Envoy's words; 401.
    BadToken(String),
    /// Envoy answered it by itself: malformed, say.
    Refused,
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The client's end.
    pub client: SocketAddr,
    /// The pod's.
    pub pod: SocketAddr,
    /// `GET`.
    pub method: String,
    /// As the client wrote it, or as it was normalised.
    pub path: String,
    /// The status that the client got; 0 for none.
    pub status: u32,
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
            let Some(LogEntries::HttpLogs(logs)) = message.log_entries else {
                continue;
            };
            for entry in logs.log_entry {
                match record(&entry) {
                    // Without a listener there is nobody to tell.
                    Some(record) => drop(self.0.send(Arc::new(record))),
                    None => debug!("envoy logs a request without addresses"),
                }
            }
        }
        Ok(Response::new(StreamAccessLogsResponse {}))
    }
}

/// None where the addresses are missing.
fn record(entry: &HttpAccessLogEntry) -> Option<Record> {
    let common = entry.common_properties.as_ref()?;
    let request = entry.request.as_ref();
    let response = entry.response.as_ref();
    let details = response.map_or("", |response| response.response_code_details.as_str());
    Some(Record {
        client: socket(common.downstream_direct_remote_address.as_ref()?)?,
        pod: socket(common.downstream_local_address.as_ref()?)?,
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
        took: common.duration.map_or(Duration::ZERO, |took| {
            let seconds = u64::try_from(took.seconds).unwrap_or(0);
            Duration::new(seconds, u32::try_from(took.nanos).unwrap_or(0))
        }),
        decision: decision(common, details),
    })
}

fn decision(common: &AccessLogCommon, details: &str) -> Decision {
    if let Some(policy) = details.strip_prefix(DENIED) {
        let policy = policy.trim_start_matches('[').trim_end_matches(']');
        return Decision::Denied(rule(policy));
    }
    if let Some(why) = details.strip_prefix(BAD_TOKEN) {
        let why = why.trim_start_matches('{').trim_end_matches('}');
        return Decision::BadToken(why.replace('_', " "));
    }
    if common.upstream_cluster.is_empty() {
        return Decision::Refused;
    }
    let named = common.metadata.as_ref().and_then(effective);
    Decision::Allowed(named.and_then(rule))
}

/// The last rule that let it through.
fn effective(metadata: &Metadata) -> Option<&str> {
    let rbac = metadata.filter_metadata.get(RBAC)?;
    match rbac.fields.get("enforced_effective_policy_id")?.kind.as_ref()? {
        Kind::StringValue(name) => Some(name),
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
    use super::*;

    #[test]
    fn a_refused_token_is_told_with_envoys_reason() {
        let common = AccessLogCommon::default();
        let decided = decision(&common, "jwt_authn_access_denied{Jwt_is_expired}");
        assert_eq!(decided, Decision::BadToken("Jwt is expired".to_owned()));
        assert_eq!(decision(&common, "direct_response"), Decision::Refused);
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
