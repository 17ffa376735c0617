//! How each source stands, for status and metrics.
//!
//! Invariant: written by sources only; a rejected resource stays listed until it is good or gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use thyra_proto::thyra::v1 as api;

/// The state of a source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    /// Nothing was heard yet.
    #[default]
    Connecting,
    /// Connected; not everything was told.
    Syncing,
    /// Everything was told.
    Synced,
    /// Not connected; what was held stays.
    Stale,
    /// The other side refuses this source.
    Refused,
    /// Ended.
    Stopped,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Syncing => "syncing",
            Self::Synced => "synced",
            Self::Stale => "stale",
            Self::Refused => "refused",
            Self::Stopped => "stopped",
        }
    }
}

#[derive(Clone, Debug, Default)]
struct Entry {
    state: State,
    detail: String,
    last_push: u64,
    resources: BTreeMap<String, usize>,
    ready: BTreeMap<String, bool>,
    rejected: BTreeMap<String, String>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Board {
    sources: Mutex<BTreeMap<&'static str, Entry>>,
    peers: Mutex<BTreeMap<String, api::XdsPeer>>,
}

impl Board {
    fn with(&self, source: &'static str, change: impl FnOnce(&mut Entry)) {
        change(
            self.sources
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .entry(source)
                .or_default(),
        );
    }

    /// A source that is waited for, with what it must tell.
    pub fn expect(&self, source: &'static str, topics: &[&str]) {
        self.with(source, |e| {
            e.ready = topics.iter().map(|t| ((*t).to_owned(), false)).collect()
        });
    }

    /// State and a sentence about it.
    pub fn state(&self, source: &'static str, state: State, detail: impl Into<String>) {
        let detail = detail.into();
        self.with(source, |e| (e.state, e.detail) = (state, detail));
    }

    /// It is interrupted; what was held stays.
    pub fn trouble(&self, source: &'static str, detail: String) {
        self.with(source, |e| {
            e.state = if e.ready.values().any(|r| *r) {
                State::Stale
            } else {
                State::Connecting
            };
            e.detail = detail;
        });
    }

    /// The interruption is over.
    pub fn recovered(&self, source: &'static str) {
        self.with(source, |e| {
            e.state = if e.ready.values().all(|r| *r) {
                State::Synced
            } else {
                State::Syncing
            };
            e.detail.clear();
        });
    }

    /// Something arrived just now.
    pub fn pushed(&self, source: &'static str) {
        self.with(source, |e| e.last_push = unix_now());
    }

    /// How many resources of a topic it has told.
    pub fn resources(&self, source: &'static str, topic: &str, number: usize) {
        self.with(source, |e| {
            e.resources.insert(topic.to_owned(), number);
        });
    }

    /// A topic was told whole.
    pub fn ready(&self, source: &'static str, topic: &str) {
        self.with(source, |e| {
            e.ready.insert(topic.to_owned(), true);
            if e.ready.values().all(|r| *r) {
                e.state = State::Synced;
                e.detail.clear();
            }
        });
    }

    /// A resource that is refused.
    pub fn reject(&self, source: &'static str, name: &str, error: &str) {
        self.with(source, |e| {
            drop(e.rejected.insert(name.to_owned(), error.to_owned()))
        });
    }

    /// A resource that is good, or gone.
    pub fn accept(&self, source: &'static str, name: &str) {
        self.with(source, |e| drop(e.rejected.remove(name)));
    }

    /// Of the rejected resources only these are left.
    pub fn only_rejected(&self, source: &'static str, left: &BTreeSet<String>) {
        self.with(source, |e| e.rejected.retain(|name, _| left.contains(name)));
    }

    /// The certificate that a stream's other side showed.
    pub fn peer(&self, peer: api::XdsPeer) {
        self.peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(peer.stream.clone(), peer);
    }

    /// All certificates.
    #[must_use]
    pub fn peers(&self) -> Vec<api::XdsPeer> {
        self.peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    /// The state of one source.
    #[must_use]
    pub fn state_of(&self, source: &'static str) -> State {
        let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.get(source).map_or(State::Connecting, |e| e.state)
    }

    /// All sources, by name.
    #[must_use]
    pub fn all(&self) -> Vec<api::SourceStatus> {
        let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let status = |(name, e): (&&'static str, &Entry)| api::SourceStatus {
            name: (*name).to_owned(),
            state: e.state.word().to_owned(),
            detail: e.detail.clone(),
            last_push_unix: e.last_push,
            resources: u64::try_from(e.resources.values().sum::<usize>()).unwrap_or(u64::MAX),
            rejected: u64::try_from(e.rejected.len()).unwrap_or(u64::MAX),
            ready: e.ready.clone().into_iter().collect(),
            rejections: e
                .rejected
                .iter()
                .map(|(name, error)| format!("{name}: {error}"))
                .collect(),
        };
        sources.iter().map(status).collect()
    }
}

/// Seconds since the epoch.
#[must_use]
pub fn unix_now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}
