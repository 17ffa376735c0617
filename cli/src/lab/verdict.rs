//! The kernel's own word about a connection, or Envoy's about the request on it, taken from the agents' event streams.
//!
//! Invariant: a verdict is an event that an agent reported for these addresses and ports; nothing is computed
//! here.

use std::collections::VecDeque;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;
use thyra_proto::thyra::v1 as api;
use thyra_proto::thyra::v1::admin_service_client::AdminServiceClient;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tonic::transport::Channel;

/// Events kept; a scenario makes a few a probe.
const KEPT: usize = 20_000;
/// How long after a probe its event may still arrive.
const WAIT: Duration = Duration::from_millis(200);
/// Between attempts to reach an agent's stream.
const RETRY: Duration = Duration::from_millis(100);

/// As the report has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Verdict {
    pub(crate) action: String,
    pub(crate) policy: Option<String>,
    pub(crate) rule: Option<u32>,
    pub(crate) reason: String,
    pub(crate) enforced_by: String,
}

/// An event of a connection.
struct Found {
    verdict: Verdict,
    /// It went to Envoy, which has not said a word yet.
    is_opened: bool,
}

/// The connection that a verdict is looked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wanted {
    /// The client's end; its address may be open, its port is known.
    pub(crate) client: Option<SocketAddr>,
    /// Addresses that the client has.
    pub(crate) sources: Vec<IpAddr>,
    /// Where it may have ended: what was dialled, and each backend.
    pub(crate) ends: Vec<(IpAddr, u16)>,
    /// Addresses that a masqueraded client has.
    pub(crate) masks: Vec<IpAddr>,
    /// Events before this one are older than the connection.
    pub(crate) since: u64,
    /// Only what ended a connection.
    pub(crate) ended: bool,
}

/// Collects events of all agents.
pub(crate) struct Verdicts {
    shared: Arc<Shared>,
    /// Ends with the lab.
    _readers: JoinSet<()>,
}

#[derive(Default)]
struct Shared {
    events: Mutex<Events>,
    arrived: Notify,
}

#[derive(Default)]
struct Events {
    /// Number of the first one kept.
    first: u64,
    kept: VecDeque<api::MonitorEvent>,
}

impl Verdicts {
    /// Subscribes to every agent; returns when each stream is open.
    pub(crate) async fn subscribe(agents: Vec<AdminServiceClient<Channel>>) -> Self {
        let shared = Arc::new(Shared::default());
        let mut readers = JoinSet::new();
        let mut open = Vec::new();
        for agent in agents {
            let (sender, receiver) = tokio::sync::oneshot::channel();
            readers.spawn(read(agent, shared.clone(), sender));
            open.push(receiver);
        }
        for receiver in open {
            // A stream that never opens leaves verdicts null; the probes say so.
            if receiver.await.is_err() {
                tracing::warn!("an agent's event stream did not open");
            }
        }
        Self {
            shared,
            _readers: readers,
        }
    }

    /// Marks a moment: events from here on are younger.
    pub(crate) fn now(&self) -> u64 {
        let events = self.shared.events.lock().unwrap_or_else(PoisonError::into_inner);
        events
            .first
            .saturating_add(u64::try_from(events.kept.len()).unwrap_or(u64::MAX))
    }

    /// The first event of that connection, or of the request where the request decides; waits a little for it.
    pub(crate) async fn find(&self, wanted: &Wanted) -> Option<Verdict> {
        let deadline = tokio::time::Instant::now() + WAIT;
        loop {
            let arrived = self.shared.arrived.notified();
            if let Some(found) = self.look(wanted).filter(|found| !found.is_opened) {
                return Some(found.verdict);
            }
            if tokio::time::timeout_at(deadline, arrived).await.is_err() {
                return self.look(wanted).map(|found| found.verdict);
            }
        }
    }

    fn look(&self, wanted: &Wanted) -> Option<Found> {
        let events = self.shared.events.lock().unwrap_or_else(PoisonError::into_inner);
        let skip = usize::try_from(wanted.since.saturating_sub(events.first)).unwrap_or(usize::MAX);
        let young = || {
            events
                .kept
                .iter()
                .skip(skip)
                .filter(|event| wanted.kind_fits(event))
        };
        let first = |fits: &dyn Fn(&api::MonitorEvent) -> bool| {
            let envoys = |event: &&api::MonitorEvent| matches!(event.kind.as_str(), "request" | "stream");
            let request = young().find(|event| envoys(event) && fits(event));
            request.or_else(|| young().find(|event| fits(event)))
        };
        let own = first(&|event| wanted.is_own(event));
        let found = own.or_else(|| first(&|event| wanted.is_masqueraded(event)))?;
        let verdict = found.verdict.as_ref()?;
        Some(Found {
            verdict: show(verdict),
            is_opened: found.kind == "new" && !verdict.residual.is_empty(),
        })
    }
}

impl Wanted {
    fn kind_fits(&self, event: &api::MonitorEvent) -> bool {
        match event.kind.as_str() {
            "agent" | "outbound" => false,
            "new" | "audit" => !self.ended,
            _ => true,
        }
    }

    fn is_own(&self, event: &api::MonitorEvent) -> bool {
        let (source, destination) = ends_of(event);
        let (Some(source), Some(destination), Some(client)) = (source, destination, self.client) else {
            return false;
        };
        let forth = source.port() == client.port()
            && self.sources.contains(&source.ip())
            && self.ends.contains(&(destination.ip(), destination.port()));
        let back = destination.port() == client.port()
            && self.sources.contains(&destination.ip())
            && self.ends.contains(&(source.ip(), source.port()));
        forth || back
    }

    fn is_masqueraded(&self, event: &api::MonitorEvent) -> bool {
        let (Some(source), Some(destination)) = ends_of(event) else {
            return false;
        };
        self.masks.contains(&source.ip()) && self.ends.contains(&(destination.ip(), destination.port()))
    }
}

fn ends_of(event: &api::MonitorEvent) -> (Option<SocketAddr>, Option<SocketAddr>) {
    let end = |address: &str, port: u32| {
        let address: IpAddr = address.parse().ok()?;
        Some(SocketAddr::new(address, u16::try_from(port).ok()?))
    };
    (
        end(&event.source, event.source_port),
        end(&event.destination, event.destination_port),
    )
}

fn show(verdict: &api::Verdict) -> Verdict {
    Verdict {
        action: verdict.action.clone(),
        policy: Some(verdict.policy.clone()).filter(|policy| !policy.is_empty()),
        rule: verdict.rule,
        reason: verdict.reason.clone(),
        enforced_by: verdict.enforced_by.clone(),
    }
}

async fn read(
    mut agent: AdminServiceClient<Channel>,
    shared: Arc<Shared>,
    open: tokio::sync::oneshot::Sender<()>,
) {
    let mut open = Some(open);
    loop {
        if let Ok(stream) = agent.monitor(api::MonitorRequest::default()).await {
            // Nobody waits any more when the stream is opened again.
            if let Some(Err(())) = open.take().map(|open| open.send(())) {
                tracing::debug!("nobody waits for the event stream");
            }
            let mut stream = stream.into_inner();
            while let Ok(Some(event)) = stream.message().await {
                shared.add(event);
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

impl Shared {
    fn add(&self, event: api::MonitorEvent) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        if events.kept.len() == KEPT {
            events.kept.pop_front();
            events.first += 1;
        }
        events.kept.push_back(event);
        drop(events);
        self.arrived.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::{JoinSet, Shared, Verdicts, Wanted, api};

    fn event(kind: &str, source: &str, port: u32, reason: &str) -> api::MonitorEvent {
        api::MonitorEvent {
            kind: kind.into(),
            source: source.into(),
            source_port: port,
            destination: "10.244.0.3".into(),
            destination_port: 8080,
            verdict: Some(api::Verdict {
                reason: reason.into(),
                ..api::Verdict::default()
            }),
            ..api::MonitorEvent::default()
        }
    }

    fn wanted() -> Wanted {
        Wanted {
            client: Some("0.0.0.0:40000".parse().expect("an end")),
            sources: vec!["10.244.0.2".parse().expect("an address")],
            ends: vec![("10.244.0.3".parse().expect("an address"), 8080)],
            masks: vec!["10.244.0.1".parse().expect("an address")],
            ..Wanted::default()
        }
    }

    #[test]
    fn only_this_connections_event_counts() {
        let verdicts = Verdicts {
            shared: Shared::default().into(),
            _readers: JoinSet::new(),
        };
        verdicts
            .shared
            .add(event("drop", "10.244.0.2", 39_999, "another port"));
        verdicts
            .shared
            .add(event("outbound", "10.244.0.2", 40_000, "the client's own note"));
        assert!(verdicts.look(&wanted()).is_none());
        verdicts
            .shared
            .add(event("drop", "10.244.0.1", 1234, "masqueraded"));
        assert_eq!(
            verdicts.look(&wanted()).map(|found| found.verdict.reason),
            Some("masqueraded".into())
        );
        verdicts.shared.add(event("new", "10.244.0.2", 40_000, "own"));
        assert_eq!(
            verdicts.look(&wanted()).map(|found| found.verdict.reason),
            Some("own".into())
        );
        let late = Wanted {
            since: verdicts.now(),
            ..wanted()
        };
        assert!(verdicts.look(&late).is_none());
    }
}
