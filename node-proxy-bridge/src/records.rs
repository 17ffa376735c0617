//! What became of each request and stream that an Envoy judged, on its way from Envoy to who listens.
//!
//! Invariant: what Envoy doesn't say is not made up. Who listens hears of each record, or of how many it missed.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thyra_datapath_abi::tables::{PolicyRef, RuleRef};
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tracing::debug;

/// What a refusal by RBAC is called, before the policy in brackets.
pub(crate) const DENIED: &str = "rbac_access_denied_matched_policy";
/// What a refusal of a token is called, before the cause in braces (`jwt_authn/filter.cc`).
const BAD_TOKEN: &str = "jwt_authn_access_denied";
/// What a refusal by an authorizer is called (`ext_authz/ext_authz.h`).
pub(crate) const UNAUTHORIZED: &str = "ext_authz_denied";
/// What the failure of a check is called that lets nobody pass.
pub(crate) const UNCHECKED: &str = "ext_authz_error";
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

#[cfg(test)]
mod tests {
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
