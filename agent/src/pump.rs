//! From the kernel's ring to whoever wants to know: listeners, the flow log, the agent's own log.
//!
//! Invariant: the ring is read whoever listens; events that were lost are told as such.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::chain::chain;
use crate::config::FlowLogChoice;
use crate::denied::{Denied, Second};
use crate::flows::Flows;
use crate::monitor::{Hub, Namer, now};
use crate::plane::Events;
use crate::snapshot::Snapshot;
use crate::store::{SharedPlane, lock};

/// What is refused is told that often.
const SECOND: Duration = Duration::from_secs(1);
/// Lines of the agent's log a second.
const MAX_LINES: usize = 16;

/// See the module.
pub struct Pump {
    /// Listeners.
    pub hub: Hub,
    /// The flow log.
    pub flows: Arc<Flows>,
    /// Names of verdicts, and the count of lost events.
    pub plane: SharedPlane,
    /// Names of addresses.
    pub snapshot: watch::Receiver<Arc<Snapshot>>,
}

impl Pump {
    /// Reads the ring until `stop`.
    pub async fn run(self, mut events: Box<dyn Events>, stop: CancellationToken) {
        let mut second = tokio::time::interval(SECOND);
        second.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut denied = Denied::default();
        let mut lost = lock::read(&self.plane).lost();
        loop {
            let batch = tokio::select! {
                batch = events.next_batch() => batch,
                _ = second.tick() => {
                    self.end_second(&mut denied, &mut lost);
                    continue;
                }
                () = stop.cancelled() => return,
            };
            match batch {
                Ok(batch) if batch.is_empty() => {}
                Ok(batch) => {
                    let snapshot = Arc::clone(&self.snapshot.borrow());
                    let namer = self.namer(&snapshot);
                    denied.add(&batch, &namer);
                    self.flows.seen(&batch, &namer, now());
                    self.hub.kernel(batch);
                }
                Err(error) => {
                    warn!(error = chain(&error), "events can't be read any more");
                    return;
                }
            }
        }
    }

    fn end_second(&self, denied: &mut Denied, lost: &mut u64) {
        let before = std::mem::replace(lost, lock::read(&self.plane).lost());
        let more = lost.saturating_sub(before);
        if more > 0 {
            self.hub.lost(more);
        }
        let snapshot = Arc::clone(&self.snapshot.borrow());
        let namer = self.namer(&snapshot);
        let second = denied.take(&namer);
        if second == Second::default() {
            return;
        }
        self.flows.denied(&second.events, &namer);
        if self.flows.choice() != FlowLogChoice::Off {
            write(&second);
        }
        self.hub.denied(second);
    }

    fn namer<'a>(&'a self, snapshot: &'a Snapshot) -> Namer<'a> {
        Namer {
            snapshot,
            plane: &self.plane,
        }
    }
}

/// A line for each kind of refusal, most frequent first, as far as the log has room.
fn write(second: &Second) {
    let mut events: Vec<_> = second.events.iter().collect();
    events.sort_by_key(|event| std::cmp::Reverse(event.count));
    for event in events.iter().take(MAX_LINES) {
        let verdict = event.verdict.clone().unwrap_or_default();
        info!(
            kind = event.kind,
            count = event.count,
            reason = verdict.reason,
            policy = verdict.policy,
            rule = verdict.rule,
            endpoint = event.endpoint,
            source = event.source,
            source_workload = event.source_workload,
            source_principal = event.source_principal,
            destination = event.destination,
            destination_workload = event.destination_workload,
            port = event.destination_port,
            protocol = event.protocol,
            "refused"
        );
    }
    let unwritten = events
        .iter()
        .skip(MAX_LINES)
        .map(|event| event.count)
        .sum::<u64>()
        + second.others;
    if unwritten > 0 {
        info!(count = unwritten, "refused, of further kinds in the same second");
    }
}
