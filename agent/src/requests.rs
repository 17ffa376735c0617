//! How many requests and other streams Envoy judged, by rule; requests by pair of identities too, with how long they
//! took.
//!
//! Invariant: a request is counted once, under the identities that its addresses had when it was told; what went by
//! uncounted is counted as that.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use thyra_datapath_abi::tables::RuleRef;
use thyra_node_proxy_bridge::records::{Decision, Record, Records, What};
use thyra_proto::thyra::v1 as api;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::by_pair::{Histogram, OTHERS, UNKNOWN, told_apart};
use crate::monitor::Hub;
use crate::snapshot::Snapshot;

/// Upper ends of the histogram's buckets, seconds; one more bucket takes the rest.
pub const BOUNDS: [f64; 14] = [
    0.000_25, 0.000_5, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 4.096,
];
/// What counts as denied where one number says it.
const DENIED: [Outcome; 4] = [
    Outcome::Denied,
    Outcome::Unauthenticated,
    Outcome::Unauthorized,
    Outcome::Unchecked,
];

/// What became of a request, in a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// It went on to the pod.
    Allowed,
    /// Policy refused it.
    Denied,
    /// Its token is not valid.
    Unauthenticated,
    /// An external authorizer refused it.
    Unauthorized,
    /// No external authorizer could be asked about it.
    Unchecked,
    /// Envoy refused it by itself, or it was held and nobody could be asked.
    Refused,
}

impl Outcome {
    /// The word for it.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Allowed => "allow",
            Self::Denied => "deny",
            Self::Unauthenticated => "unauthenticated",
            Self::Unauthorized => "unauthorized",
            Self::Unchecked => "unchecked",
            Self::Refused => "refused",
        }
    }
}

/// The requests of one pair.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pair {
    /// By outcome.
    pub outcomes: BTreeMap<Outcome, u64>,
    /// By duration, by `BOUNDS`.
    pub durations: Histogram<{ BOUNDS.len() + 1 }>,
}

/// All that was counted.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    /// By the principals of source and destination.
    pub pairs: BTreeMap<(Arc<str>, Arc<str>), Pair>,
    /// Requests and streams by the rule that decided; none where no rule did.
    pub rules: BTreeMap<(Option<RuleRef>, Outcome), u64>,
    /// Requests that went by too fast.
    pub missed: u64,
}

/// The counters, of this run of the agent.
#[derive(Debug, Default)]
pub struct Requests(Mutex<Counted>);

impl Requests {
    /// Counts what Envoy says, and passes it on, until `stop`.
    pub async fn follow(
        self: Arc<Self>,
        records: Records,
        snapshot: watch::Receiver<Arc<Snapshot>>,
        hub: Hub,
        stop: CancellationToken,
    ) {
        let mut records = records.listen();
        loop {
            let heard = tokio::select! {
                heard = records.recv() => heard,
                () = stop.cancelled() => return,
            };
            let Some(heard) = heard else { return };
            if heard.missed > 0 {
                self.with(|counted| counted.missed += heard.missed);
                hub.agent(format!("{} requests went by too fast to be told", heard.missed));
            }
            let snapshot = Arc::clone(&snapshot.borrow());
            for record in heard.records() {
                self.add(record, &|address| principal(&snapshot, address));
            }
            if hub.listeners() > 0 {
                heard
                    .records()
                    .iter()
                    .for_each(|record| hub.judged(Arc::clone(record)));
            }
        }
    }

    /// A copy of the counters.
    #[must_use]
    pub fn counted(&self) -> Counted {
        self.with(|counted| counted.clone())
    }

    fn add(&self, record: &Record, principal: &dyn Fn(IpAddr) -> Arc<str>) {
        let (outcome, rule) = match &record.decision {
            Decision::Allowed(rule) => (Outcome::Allowed, rule.clone()),
            Decision::Denied(rule) => (Outcome::Denied, rule.clone()),
            Decision::BadToken(_) => (Outcome::Unauthenticated, None),
            Decision::Unauthorized(rule) => (Outcome::Unauthorized, rule.clone()),
            Decision::Unchecked(rule) => (Outcome::Unchecked, rule.clone()),
            Decision::Refused | Decision::Unjudged(_) => (Outcome::Refused, None),
        };
        let ends = (principal(record.client.ip()), principal(record.pod.ip()));
        self.with(|counted| {
            *counted.rules.entry((rule, outcome)).or_default() += 1;
            if matches!(record.what, What::Stream { .. } | What::Held { .. }) {
                // How long one lasts is its client's affair.
                return;
            }
            let ends = told_apart(&counted.pairs, ends, || (OTHERS.into(), OTHERS.into()));
            let pair = counted.pairs.entry(ends).or_default();
            *pair.outcomes.entry(outcome).or_default() += 1;
            pair.durations.add(&BOUNDS, record.took);
        });
    }

    /// Refused requests of one pair that took so many microseconds.
    #[cfg(test)]
    pub(crate) fn add_for_test(&self, micros: &[u64]) {
        for micros in micros {
            self.add(&tests::record(2, *micros, Decision::Refused), &|address| {
                if address == tests::POD { "b" } else { "a" }.into()
            });
        }
    }

    fn with<T>(&self, work: impl FnOnce(&mut Counted) -> T) -> T {
        // Counters are whole after each addition.
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Pair {
    fn of(&self, outcome: Outcome) -> u64 {
        self.outcomes.get(&outcome).copied().unwrap_or(0)
    }
}

impl Counted {
    /// As the admin API tells it.
    #[must_use]
    pub fn to_api(&self) -> api::ListRequestsResponse {
        let pair = |((source, destination), pair): (&(Arc<str>, Arc<str>), &Pair)| api::RequestPair {
            source: source.to_string(),
            destination: destination.to_string(),
            allowed: pair.of(Outcome::Allowed),
            denied: DENIED.iter().map(|outcome| pair.of(*outcome)).sum(),
            refused: pair.of(Outcome::Refused),
            buckets: pair.durations.buckets.to_vec(),
            seconds: pair.durations.took.as_secs_f64(),
        };
        let rule = |((rule, outcome), requests): (&(Option<RuleRef>, Outcome), &u64)| api::RequestRule {
            policy: rule.as_ref().map(|r| r.policy.to_string()).unwrap_or_default(),
            rule: rule.as_ref().and_then(|r| r.rule),
            action: outcome.text().to_owned(),
            requests: *requests,
        };
        api::ListRequestsResponse {
            pairs: self.pairs.iter().map(pair).collect(),
            rules: self.rules.iter().map(rule).collect(),
            bounds: BOUNDS.to_vec(),
            missed: self.missed,
        }
    }
}

fn principal(snapshot: &Snapshot, address: IpAddr) -> Arc<str> {
    let class = snapshot.class(address);
    let known = class.and_then(|class| class.principal.clone());
    known.unwrap_or_else(|| UNKNOWN.into())
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};
    use std::time::Duration;

    use super::*;
    use crate::by_pair::MAX_PAIRS;

    pub(super) const POD: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));

    pub(super) fn record(client: u8, micros: u64, decision: Decision) -> Record {
        let end = |last, port| SocketAddr::from((Ipv4Addr::new(10, 0, 0, last), port));
        Record {
            client: end(client, 40_000),
            pod: end(1, 80),
            what: What::Request {
                method: "GET".to_owned(),
                path: "/".to_owned(),
                status: 200,
            },
            took: Duration::from_micros(micros),
            decision,
        }
    }

    fn by_address(address: IpAddr) -> Arc<str> {
        address.to_string().into()
    }

    #[test]
    fn a_request_is_counted_under_its_pair_its_rule_and_its_duration() {
        let requests = Requests::default();
        for (micros, decision) in [
            (250, Decision::Allowed(None)),
            (251, Decision::Denied(None)),
            (1_000, Decision::BadToken("Jwt is expired".into())),
            (1_000, Decision::Unauthorized(None)),
            (1_000, Decision::Unchecked(None)),
            (9_000_000, Decision::Refused),
        ] {
            requests.add(&record(2, micros, decision), &by_address);
        }
        let counted = requests.counted();
        let pair = &counted.pairs[&("10.0.0.2".into(), "10.0.0.1".into())];
        assert_eq!(
            (pair.durations.buckets[0], pair.durations.buckets[1]),
            (1, 1),
            "bounds are inclusive"
        );
        assert_eq!(pair.durations.buckets[BOUNDS.len()], 1, "and the rest");
        assert_eq!(pair.durations.total(), 6);
        assert_eq!(pair.durations.took, Duration::from_micros(9_003_501));
        assert_eq!(counted.rules[&(None, Outcome::Denied)], 1);
        let told = counted.to_api();
        let pair = &told.pairs[0];
        assert_eq!((pair.allowed, pair.denied, pair.refused), (1, 4, 1));
    }

    #[test]
    fn pairs_beyond_the_limit_are_counted_together() {
        let requests = Requests::default();
        let numbered = |number: usize| move |_: IpAddr| Arc::from(number.to_string());
        for number in 0..MAX_PAIRS + 5 {
            requests.add(&record(2, 1, Decision::Refused), &numbered(number));
        }
        requests.add(&record(2, 1, Decision::Refused), &numbered(0));
        let counted = requests.counted();
        assert_eq!(counted.pairs.len(), MAX_PAIRS + 1);
        assert_eq!(
            counted.pairs[&(OTHERS.into(), OTHERS.into())].durations.total(),
            5
        );
        assert_eq!(counted.pairs[&("0".into(), "0".into())].durations.total(), 2);
    }
}
