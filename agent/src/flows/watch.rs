//! The sockets of this node's pods, watched for the flow log.
//!
//! Invariant: a pod whose sockets can't be watched is noted with the reason and tried again; the others are watched.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinSet, spawn_blocking};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::Flows;
use crate::chain::chain;
use crate::monitor::{Namer, now};
use crate::plane::{PlaneError, Sockets};
use crate::registration::Registration;
use crate::snapshot::Snapshot;
use crate::store::{SharedPlane, lock};

/// How old the traffic of an open connection may be.
const PERIOD: Duration = Duration::from_secs(5);
/// The events of a connection that has just ended are read by then.
const SETTLE: Duration = Duration::from_millis(200);

/// What every watch needs.
#[derive(Clone)]
struct Watcher {
    flows: Arc<Flows>,
    plane: SharedPlane,
    snapshot: watch::Receiver<Arc<Snapshot>>,
}

/// Watches the sockets of all endpoints until `stop`.
pub async fn follow(
    flows: Arc<Flows>,
    plane: SharedPlane,
    mut snapshot: watch::Receiver<Arc<Snapshot>>,
    stop: CancellationToken,
) {
    let watcher = Watcher {
        flows,
        plane,
        snapshot: snapshot.clone(),
    };
    let mut watched: BTreeMap<u16, (String, CancellationToken)> = BTreeMap::new();
    let mut tasks = JoinSet::new();
    loop {
        let known = Arc::clone(&snapshot.borrow_and_update().held);
        watched.retain(|id, (netns, ends)| {
            let stays = known.registrations.get(id).is_some_and(|r| r.netns == *netns);
            if !stays {
                ends.cancel();
                watcher.flows.gone(*id, now());
            }
            stays
        });
        for (id, registration) in known.registrations.iter() {
            if watched.contains_key(id) {
                continue;
            }
            let ends = stop.child_token();
            watched.insert(*id, (registration.netns.clone(), ends.clone()));
            tasks.spawn(watcher.clone().run(*id, registration.clone(), ends));
        }
        while tasks.try_join_next().is_some() {}
        tokio::select! {
            changed = snapshot.changed() => if changed.is_err() { return },
            () = stop.cancelled() => return,
        }
    }
}

impl Watcher {
    /// Watches one endpoint until `ends`.
    async fn run(self, id: u16, registration: Registration, ends: CancellationToken) {
        loop {
            let why = match self.open(id, &registration).await {
                Ok(sockets) => {
                    self.flows.note(id, None);
                    self.watch(id, sockets, &ends).await
                }
                Err(error) => chain(&error),
            };
            if ends.is_cancelled() {
                return;
            }
            debug!(endpoint = id, why, "sockets are not watched");
            self.flows.note(id, Some(why));
            tokio::select! {
                () = tokio::time::sleep(PERIOD) => {}
                () = ends.cancelled() => return,
            }
        }
    }

    async fn open(&self, id: u16, registration: &Registration) -> Result<Box<dyn Sockets>, PlaneError> {
        let (plane, registration) = (self.plane.clone(), registration.clone());
        let opened = spawn_blocking(move || {
            let plane = lock::read(&plane);
            let sockets = plane.sockets(&registration)?;
            // After the watch has begun: none ends between unseen.
            Ok((sockets, plane.connections(id, &registration)?))
        });
        let opened = opened
            .await
            .unwrap_or_else(|e| Err(PlaneError::Failed(e.to_string())));
        let (sockets, connections) = opened?;
        let snapshot = Arc::clone(&self.snapshot.borrow());
        let namer = Namer {
            snapshot: &snapshot,
            plane: &self.plane,
        };
        self.flows.before(id, &connections, &namer);
        Ok(sockets)
    }

    /// Why it ended.
    async fn watch(&self, id: u16, mut sockets: Box<dyn Sockets>, ends: &CancellationToken) -> String {
        let mut timer = tokio::time::interval(PERIOD);
        loop {
            let batch = tokio::select! {
                batch = sockets.next_batch() => Some(batch),
                _ = timer.tick() => None,
                () = ends.cancelled() => return String::new(),
            };
            let is_overrun = match batch {
                Some(Ok(batch)) => {
                    let ended = now();
                    tokio::time::sleep(SETTLE).await;
                    self.flows.over(id, &batch.sockets, ended);
                    batch.overrun
                }
                Some(Err(error)) => return chain(&error),
                None => true,
            };
            if is_overrun {
                let asked = spawn_blocking(move || (sockets.held(), sockets));
                let Ok((held, back)) = asked.await else {
                    return "the thread that asked has died".to_owned();
                };
                sockets = back;
                match held {
                    Ok(held) => self.flows.held(id, &held, now()),
                    Err(error) => return chain(&error),
                }
            }
        }
    }
}
