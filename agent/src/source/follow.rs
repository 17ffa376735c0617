//! One kind of Kubernetes object, listed and watched.
//!
//! Invariant: after each list what it doesn't hold is gone; between lists nothing is taken back.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::time::{Duration, Instant};

use futures::StreamExt;
use kube::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use serde::de::DeserializeOwned;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Feed;
use crate::api_server::ApiServer;
use crate::board::State;
use crate::chain::chain;
use crate::change::{Change, Topic};

/// Pause between tries to make a client.
const PAUSE: Duration = Duration::from_secs(5);

/// What the objects of a kind mean.
pub(super) trait Reading: Send {
    /// The objects.
    type Object: kube::Resource + Clone + Debug + DeserializeOwned + Send + 'static;
    /// What tells them apart.
    type Key: Ord + Clone + Send;

    /// What is told.
    fn topic(&self) -> Topic;
    /// The object's key.
    fn key(&self, object: &Self::Object) -> Self::Key;
    /// News of an object; with it what can't be read of the object, if so.
    fn set(&self, object: Self::Object) -> (Change, Option<String>);
    /// An object is gone.
    fn gone(&self, key: Self::Key) -> Change;
    /// Only these are left; none when that says nothing new.
    fn only(&self, keys: BTreeSet<Self::Key>) -> Option<Change>;
    /// How status calls an object.
    fn label(&self, key: &Self::Key) -> String;
}

/// A client, as soon as one can be had; none when stopped before.
pub(super) async fn client(
    server: &ApiServer,
    source: &'static str,
    feed: &Feed,
    stop: &CancellationToken,
) -> Option<kube::Client> {
    loop {
        match server.client().await {
            Ok(client) => return Some(client),
            Err(error) => {
                warn!(source, error = chain(&error), "no API server");
                feed.board.state(source, State::Connecting, chain(&error));
            }
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = stop.cancelled() => return None,
        }
    }
}

/// Follows a kind until `stop`.
pub(super) async fn follow<R: Reading>(
    source: &'static str,
    reading: R,
    api: Api<R::Object>,
    config: watcher::Config,
    feed: Feed,
    stop: CancellationToken,
) {
    let topic = reading.topic().name();
    let mut events = watcher(api, config).default_backoff().boxed();
    let mut follower = Follower {
        source,
        reading,
        feed,
        keys: BTreeSet::new(),
        listed: Vec::new(),
    };
    let mut troubled = false;
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = stop.cancelled() => return,
        };
        match event {
            None => return,
            Some(Err(error)) => {
                warn!(source, topic, error = chain(&error), "watch interrupted");
                follower
                    .feed
                    .board
                    .trouble(source, format!("{topic}: {}", chain(&error)));
                troubled = true;
            }
            Some(Ok(event)) => {
                follower.take(event, Instant::now());
                if std::mem::take(&mut troubled) {
                    info!(source, topic, "watch goes on");
                    follower.feed.board.recovered(source);
                }
            }
        }
    }
}

struct Follower<R: Reading> {
    source: &'static str,
    reading: R,
    feed: Feed,
    /// Objects that are there.
    keys: BTreeSet<R::Key>,
    /// Objects of a list that isn't complete yet.
    listed: Vec<R::Object>,
}

impl<R: Reading> Follower<R> {
    fn take(&mut self, event: Event<R::Object>, received: Instant) {
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(object) => self.listed.push(object),
            Event::InitDone => {
                let changes = self.whole();
                self.feed.news(changes, received);
                self.feed.board.ready(self.source, self.reading.topic().name());
            }
            Event::Apply(object) => {
                self.keys.insert(self.reading.key(&object));
                let change = self.read(object);
                self.feed.news(vec![change], received);
            }
            Event::Delete(object) => {
                let key = self.reading.key(&object);
                self.keys.remove(&key);
                self.feed.board.accept(self.source, &self.reading.label(&key));
                self.feed.news(vec![self.reading.gone(key)], received);
            }
        }
        self.feed.board.pushed(self.source);
        self.feed
            .board
            .resources(self.source, self.reading.topic().name(), self.keys.len());
    }

    fn read(&self, object: R::Object) -> Change {
        let label = self.reading.label(&self.reading.key(&object));
        let (change, fault) = self.reading.set(object);
        match fault {
            None => self.feed.board.accept(self.source, &label),
            Some(why) => {
                warn!(source = self.source, object = label, why, "object can't be read");
                self.feed.board.reject(self.source, &label, &why);
            }
        }
        change
    }

    /// A whole list: every object, then what is left of the kind, then that the topic was told.
    fn whole(&mut self) -> Vec<Change> {
        let objects = std::mem::take(&mut self.listed);
        let keys: BTreeSet<R::Key> = objects.iter().map(|o| self.reading.key(o)).collect();
        for gone in self.keys.difference(&keys) {
            self.feed.board.accept(self.source, &self.reading.label(gone));
        }
        let mut changes: Vec<Change> = objects.into_iter().map(|o| self.read(o)).collect();
        self.keys.clone_from(&keys);
        changes.extend(self.reading.only(keys));
        changes.push(Change::Ready(self.reading.topic()));
        changes
    }
}
