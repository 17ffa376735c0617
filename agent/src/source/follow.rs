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
    /// News of an object, or why it can't be read.
    ///
    /// # Errors
    /// What is wrong, and the change that stands for the object all the same.
    fn set(&self, object: Self::Object) -> Result<Change, (String, Change)>;
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
                warn!(source, error = &error as &dyn std::error::Error, "no API server");
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
    let mut events = watcher(api, config).default_backoff().boxed();
    let mut listed = Vec::new();
    let mut troubled = false;
    loop {
        let event = tokio::select! {
            event = events.next() => event,
            () = stop.cancelled() => return,
        };
        let received = Instant::now();
        match event {
            None => return,
            Some(Err(error)) => {
                let topic = reading.topic().name();
                warn!(
                    source,
                    topic,
                    error = &error as &dyn std::error::Error,
                    "watch interrupted"
                );
                feed.board.trouble(source, format!("{topic}: {}", chain(&error)));
                troubled = true;
                continue;
            }
            Some(Ok(Event::Init)) => listed.clear(),
            Some(Ok(Event::InitApply(object))) => listed.push(object),
            Some(Ok(Event::InitDone)) => {
                feed.news(
                    whole(source, &reading, std::mem::take(&mut listed), &feed),
                    received,
                );
                feed.board.ready(source, reading.topic().name());
            }
            Some(Ok(Event::Apply(object))) => {
                feed.news(vec![read(source, &reading, object, &feed)], received)
            }
            Some(Ok(Event::Delete(object))) => {
                let key = reading.key(&object);
                feed.board.accept(source, &reading.label(&key));
                feed.news(vec![reading.gone(key)], received);
            }
        }
        feed.board.pushed(source);
        if std::mem::take(&mut troubled) {
            info!(source, topic = reading.topic().name(), "watch goes on");
            feed.board.recovered(source);
        }
    }
}

fn read<R: Reading>(source: &'static str, reading: &R, object: R::Object, feed: &Feed) -> Change {
    let label = reading.label(&reading.key(&object));
    match reading.set(object) {
        Ok(change) => {
            feed.board.accept(source, &label);
            change
        }
        Err((why, change)) => {
            warn!(source, object = label, why, "object can't be read");
            feed.board.reject(source, &label, &why);
            change
        }
    }
}

/// A whole list: every object, then what is left of the kind, then that the topic was told.
fn whole<R: Reading>(source: &'static str, reading: &R, objects: Vec<R::Object>, feed: &Feed) -> Vec<Change> {
    let keys = objects.iter().map(|o| reading.key(o)).collect();
    let mut changes: Vec<Change> = objects
        .into_iter()
        .map(|o| read(source, reading, o, feed))
        .collect();
    changes.extend(reading.only(keys));
    changes.push(Change::Ready(reading.topic()));
    changes
}
