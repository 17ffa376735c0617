//! The flow log: TCP connections with what went over them and how long they took to be answered, and what was refused.
//!
//! A connection begins with the event of its SYN and is answered with that of the SYN-ACK; what went over it and that
//! it ended come from the pod's own stack (`watch`). No packet between is looked at.
//!
//! Invariant: a flow carries the identities that its addresses had when it began. What is not known is absent, never
//! zero; what had to make room is counted.

pub mod pairs;
mod record;
pub mod watch;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use thyra_datapath::{Connection, Held};
use thyra_datapath_abi::{Control, Event, EventKind};
use thyra_proto::thyra::v1 as api;
use tokio::sync::broadcast;

use self::pairs::{Counted, Pairs};
use crate::config::FlowLogChoice;
use crate::monitor::Namer;

/// Connections that are known at once; the oldest one makes room.
const MAX_OPEN: usize = 8_192;
/// Flows that ended, and refusals, that are kept.
const MAX_RECENT: usize = 4_096;
/// Flows that a watcher may fall behind.
const BACKLOG: usize = 1_024;
/// A connection that its pod's stack doesn't hold is over, unless it has just begun.
const OPENING: Duration = Duration::from_secs(2);

/// A connection of one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    endpoint: u16,
    local: SocketAddr,
    remote: SocketAddr,
}

/// A connection that is not over.
#[derive(Debug)]
struct Open {
    key: Key,
    flow: api::Flow,
    /// Of the SYN; none where nobody saw it.
    sequence: Option<u32>,
    /// Kernel's clock, nanoseconds.
    began_ns: u64,
}

#[derive(Debug, Default)]
struct Log {
    /// By order of arrival.
    open: BTreeMap<u64, Open>,
    numbers: HashMap<Key, u64>,
    next: u64,
    recent: VecDeque<api::Flow>,
    pairs: Pairs,
    forgotten: u64,
    notes: BTreeMap<u16, String>,
}

/// The log, of this run of the agent.
#[derive(Debug)]
pub struct Flows {
    choice: FlowLogChoice,
    /// One of two to this number of connections is logged.
    sampling: u8,
    log: Mutex<Log>,
    ended: broadcast::Sender<api::Flow>,
}

/// When something happened, on both clocks.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Milliseconds since the epoch.
    pub unix_ms: u64,
    /// The kernel's clock, nanoseconds.
    pub boot_ns: u64,
}

impl Flows {
    /// An empty log.
    #[must_use]
    pub fn new(choice: FlowLogChoice, sampling: u8) -> Self {
        Self {
            choice,
            sampling,
            log: Mutex::default(),
            ended: broadcast::channel(BACKLOG).0,
        }
    }

    /// What is to be logged.
    #[must_use]
    pub fn choice(&self) -> FlowLogChoice {
        self.choice
    }

    /// What the programs are to report for it, as `Datapath::set_flow_log` takes it.
    #[must_use]
    pub fn reports(&self) -> Option<u8> {
        (self.choice == FlowLogChoice::All).then_some(self.sampling)
    }

    /// Flows as they end.
    #[must_use]
    pub fn listen(&self) -> broadcast::Receiver<api::Flow> {
        self.ended.subscribe()
    }

    /// Takes what concerns connections out of a batch of events.
    pub fn seen(&self, batch: &[Event], namer: &Namer<'_>, now: Now) {
        let Some(sampling) = self.reports() else {
            return;
        };
        let control = Control(Control::flow_log(sampling));
        for event in batch.iter().filter(|e| control.logs(e.sequence)) {
            let (Some(key), Some(kind)) = (record::key(event), EventKind::from_number(event.kind)) else {
                continue;
            };
            match kind {
                EventKind::New | EventKind::Outbound | EventKind::Audit => self.with(|log| {
                    if !log.is_repeated(&key, event.sequence) {
                        log.over(&key, None, now, &self.ended);
                        let flow = record::begun(event, namer);
                        log.insert(key, flow, Some(event.sequence), event.time_ns);
                    }
                }),
                EventKind::Answered => self.with(|log| log.answered(&key, event)),
                _ => {}
            }
        }
    }

    /// Connections that an endpoint had before anybody looked. A sampled log can't tell whether it would have taken
    /// them.
    pub fn before(&self, endpoint: u16, connections: &[Connection], namer: &Namer<'_>) {
        if self.sampling != 0 {
            return;
        }
        for connection in connections {
            let key = Key::new(endpoint, connection);
            self.with(|log| {
                if !log.numbers.contains_key(&key) {
                    log.insert(key, record::found(endpoint, connection, namer), None, 0);
                }
            });
        }
    }

    /// Sockets of an endpoint that ended.
    pub fn over(&self, endpoint: u16, sockets: &[Held], now: Now) {
        self.with(|log| {
            for held in sockets {
                log.over(
                    &Key::new(endpoint, &held.connection),
                    Some(held),
                    now,
                    &self.ended,
                );
            }
        });
    }

    /// All connections that an endpoint holds: the others are over.
    pub fn held(&self, endpoint: u16, sockets: &[Held], now: Now) {
        let held: HashMap<Key, &Held> = sockets
            .iter()
            .map(|held| (Key::new(endpoint, &held.connection), held))
            .collect();
        self.with(|log| {
            let mut gone = Vec::new();
            for open in log.open.values_mut().filter(|open| open.key.endpoint == endpoint) {
                match held.get(&open.key) {
                    Some(held) => record::traffic(&mut open.flow, held),
                    None if now.is_past(open.began_ns) => gone.push(open.key),
                    None => {}
                }
            }
            for key in gone {
                log.over(&key, None, now, &self.ended);
            }
        });
    }

    /// The endpoint has gone, and its sockets with it.
    pub fn gone(&self, endpoint: u16, now: Now) {
        self.note(endpoint, None);
        let later = Now {
            boot_ns: u64::MAX,
            ..now
        };
        self.held(endpoint, &[], later);
    }

    /// Why nothing is known of an endpoint's sockets, if so.
    pub fn note(&self, endpoint: u16, why: Option<String>) {
        self.with(|log| match why {
            Some(why) => drop(log.notes.insert(endpoint, why)),
            None => drop(log.notes.remove(&endpoint)),
        });
    }

    /// Refusals of one kind in one second.
    pub fn denied(&self, events: &[api::MonitorEvent], namer: &Namer<'_>) {
        if self.choice == FlowLogChoice::Off {
            return;
        }
        self.with(|log| {
            for event in events {
                let flow = record::denied(event, namer);
                log.pairs.denied(&flow);
                log.keep(flow, &self.ended);
            }
        });
    }

    /// Flows that are kept: those that ended and what was refused, then those that are open, each oldest first.
    #[must_use]
    pub fn list(&self, wanted: &dyn Fn(&api::Flow) -> bool) -> Vec<api::Flow> {
        self.with(|log| {
            let open = log.open.values().map(|open| &open.flow);
            log.recent
                .iter()
                .chain(open)
                .filter(|flow| wanted(flow))
                .cloned()
                .collect()
        })
    }

    /// A copy of the counters.
    #[must_use]
    pub fn counted(&self) -> Counted {
        self.with(|log| log.pairs.counted().clone())
    }

    /// How it stands; the lost events are the kernel's to tell.
    #[must_use]
    pub fn standing(&self) -> api::FlowLog {
        self.with(|log| api::FlowLog {
            logged: self.choice.name().to_owned(),
            sample: 1 << self.sampling,
            forgotten: log.forgotten,
            lost_events: 0,
            notes: log
                .notes
                .iter()
                .map(|(id, why)| format!("endpoint {id}: {why}"))
                .collect(),
        })
    }

    fn with<T>(&self, work: impl FnOnce(&mut Log) -> T) -> T {
        // The log is whole after each change.
        work(&mut self.log.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Log {
    /// Whether the SYN was sent again before it was answered: the first one counts.
    fn is_repeated(&self, key: &Key, sequence: u32) -> bool {
        let open = self.numbers.get(key).and_then(|number| self.open.get(number));
        open.is_some_and(|open| open.sequence == Some(sequence))
    }

    fn insert(&mut self, key: Key, flow: api::Flow, sequence: Option<u32>, began_ns: u64) {
        if self.open.len() >= MAX_OPEN
            && let Some((_, oldest)) = self.open.pop_first()
        {
            self.numbers.remove(&oldest.key);
            self.forgotten += 1;
        }
        if sequence.is_some() {
            self.pairs.opened(&flow);
        }
        let open = Open {
            key,
            flow,
            sequence,
            began_ns,
        };
        self.numbers.insert(key, self.next);
        self.open.insert(self.next, open);
        self.next += 1;
    }

    fn answered(&mut self, key: &Key, event: &Event) {
        let open = self.numbers.get(key).and_then(|number| self.open.get_mut(number));
        let Some(open) = open.filter(|open| open.sequence == Some(event.sequence)) else {
            return;
        };
        // The first answer counts.
        if open.flow.connect_us.is_none() {
            let took = Duration::from_nanos(event.time_ns.saturating_sub(open.began_ns));
            open.flow.connect_us = u64::try_from(took.as_micros()).ok();
            self.pairs.answered(&open.flow, took);
        }
    }

    /// A connection is over; what went over it, where that is known.
    fn over(&mut self, key: &Key, held: Option<&Held>, now: Now, ended: &broadcast::Sender<api::Flow>) {
        let Some(open) = self
            .numbers
            .remove(key)
            .and_then(|number| self.open.remove(&number))
        else {
            return;
        };
        let mut flow = open.flow;
        if let Some(held) = held {
            record::traffic(&mut flow, held);
        }
        flow.state = record::CLOSED.to_owned();
        flow.end_unix_ms = Some(now.unix_ms.max(flow.start_unix_ms));
        self.pairs.closed(&flow);
        self.keep(flow, ended);
    }

    fn keep(&mut self, flow: api::Flow, ended: &broadcast::Sender<api::Flow>) {
        if self.recent.len() >= MAX_RECENT {
            self.recent.pop_front();
            self.forgotten += 1;
        }
        self.recent.push_back(flow.clone());
        // Without a listener there is nobody to tell.
        drop(ended.send(flow));
    }
}

impl Key {
    fn new(endpoint: u16, connection: &Connection) -> Self {
        Self {
            endpoint,
            local: connection.local,
            remote: connection.remote,
        }
    }
}

impl Now {
    /// Whether a connection that began then must be in its pod's stack by now.
    fn is_past(self, began_ns: u64) -> bool {
        Duration::from_nanos(self.boot_ns.saturating_sub(began_ns)) > OPENING
    }
}
