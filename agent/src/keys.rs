//! The key sets that RequestAuthentications name by URI: fetched, kept, fetched again.
//!
//! Invariant: only a good set replaces a good one, and a failure has a name. Without a set no token of its rule is
//! taken, so nothing here lets a request pass that policy wouldn't.

mod client;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thyra_node_proxy_bridge::lower::KeySets;
use thyra_policy_compiler::tokens::{Keys, Tokens, key_set};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tracing::{info, warn};

pub use self::client::{Client, FetchError};
use crate::chain::chain;

/// Between two fetches of a set (istiod's `PILOT_JWT_PUB_KEY_REFRESH_INTERVAL`).
const REFRESH: Duration = Duration::from_secs(20 * 60);
/// After a first failure; each further one doubles it.
const RETRY: Duration = Duration::from_secs(1);
/// The longest wait after a failure.
const MAX_RETRY: Duration = Duration::from_secs(60);
/// Most sets of one node.
const MAX_SETS: usize = 256;

/// Why a set isn't there, or no new one.
#[derive(Debug, thiserror::Error)]
enum KeyError {
    /// It can't be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// What was fetched is none.
    #[error("{0}")]
    NoSet(String),
    /// The issuer says of no set.
    #[error("the OpenID configuration has no `jwks_uri`")]
    NoUri,
    /// It took too long.
    #[error("no answer within {0:?}")]
    Slow(Duration),
    /// There are too many.
    #[error("there are {MAX_SETS} others already")]
    TooMany,
}

/// What is known.
#[derive(Debug, Default)]
struct Known {
    sets: KeySets,
    failures: BTreeMap<Keys, String>,
}

/// What the tasks share.
#[derive(Debug)]
struct Shared {
    known: Mutex<Known>,
    changes: watch::Sender<u64>,
}

/// Fetches what is wanted.
#[derive(Debug)]
pub struct Keyring {
    client: Client,
    runtime: Handle,
    refresh: Duration,
    shared: Arc<Shared>,
    tasks: BTreeMap<Keys, (Duration, JoinHandle<()>)>,
}

impl Keyring {
    /// Nothing is wanted yet.
    #[must_use]
    pub fn new(client: Client, runtime: Handle) -> Self {
        Self {
            client,
            runtime,
            refresh: REFRESH,
            shared: Arc::new(Shared {
                known: Mutex::default(),
                changes: watch::Sender::new(0),
            }),
            tasks: BTreeMap::new(),
        }
    }

    /// What is wanted from now on; what no longer is, is forgotten.
    pub fn want<'a>(&mut self, tokens: impl Iterator<Item = &'a Tokens>) {
        let mut wanted: BTreeMap<Keys, Duration> = BTreeMap::new();
        for rule in tokens.flat_map(|tokens| &tokens.rules) {
            if matches!(rule.keys, Keys::Uri(_) | Keys::Discovery(_)) {
                let longest = wanted.entry(rule.keys.clone()).or_default();
                *longest = rule.timeout.max(*longest);
            }
        }
        self.tasks.retain(|keys, (timeout, task)| {
            let stays = wanted.get(keys) == Some(timeout);
            if !stays {
                task.abort();
            }
            stays
        });
        let gone = {
            let known = self.shared.lock();
            let mut all = known.sets.keys().chain(known.failures.keys());
            all.any(|keys| !wanted.contains_key(keys))
        };
        if gone {
            self.shared.change(|known| {
                known.sets.retain(|keys, _| wanted.contains_key(keys));
                known.failures.retain(|keys, _| wanted.contains_key(keys));
            });
        }
        for (keys, timeout) in wanted {
            if self.tasks.contains_key(&keys) {
                continue;
            }
            if self.tasks.len() >= MAX_SETS {
                self.shared.failed(&keys, &KeyError::TooMany);
                continue;
            }
            let (client, shared) = (self.client.clone(), Arc::clone(&self.shared));
            let task = self
                .runtime
                .spawn(follow(client, shared, keys.clone(), [timeout, self.refresh]));
            self.tasks.insert(keys, (timeout, task));
        }
    }

    /// The sets that were fetched.
    #[must_use]
    pub fn sets(&self) -> KeySets {
        self.shared.lock().sets.clone()
    }

    /// What could not be fetched the last time, in words.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        let known = self.shared.lock();
        let told = known.failures.iter().map(|(keys, why)| {
            let rest = if known.sets.contains_key(keys) {
                "the last good set stays"
            } else {
                "tokens that need it are refused"
            };
            format!("{} can't be had: {why}; {rest}", words(keys))
        });
        told.collect()
    }

    /// A counter that moves with every change of the sets or failures.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.shared.changes.subscribe()
    }
}

impl Drop for Keyring {
    fn drop(&mut self) {
        for (_, task) in self.tasks.values() {
            task.abort();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Known> {
        // Each change is whole before anything can panic.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Known)) {
        change(&mut self.lock());
        self.changes.send_modify(|count| *count += 1);
    }

    fn fetched(&self, keys: &Keys, text: Arc<str>) {
        let same = {
            let known = self.lock();
            known.sets.get(keys) == Some(&text) && !known.failures.contains_key(keys)
        };
        if same {
            return;
        }
        info!(keys = words(keys), "key set fetched");
        self.change(|known| {
            known.failures.remove(keys);
            known.sets.insert(keys.clone(), text);
        });
    }

    fn failed(&self, keys: &Keys, error: &KeyError) {
        let why = chain(error);
        if self.lock().failures.get(keys) == Some(&why) {
            return;
        }
        warn!(keys = words(keys), why, "key set not fetched");
        self.change(|known| drop(known.failures.insert(keys.clone(), why)));
    }
}

fn words(keys: &Keys) -> String {
    match keys {
        Keys::Uri(uri) => format!("the key set at `{uri}`"),
        Keys::Discovery(issuer) => format!("the key set of issuer `{issuer}`"),
        Keys::Inline(_) | Keys::None(_) => "the key set".to_owned(),
    }
}

/// Until it is wanted no more.
async fn follow(client: Client, shared: Arc<Shared>, keys: Keys, [timeout, refresh]: [Duration; 2]) {
    let mut retry = RETRY;
    loop {
        let fetched = tokio::time::timeout(timeout, fetch(&client, &keys)).await;
        let wait = match fetched.unwrap_or(Err(KeyError::Slow(timeout))) {
            Ok(text) => {
                shared.fetched(&keys, text);
                retry = RETRY;
                refresh
            }
            Err(error) => {
                shared.failed(&keys, &error);
                let wait = retry;
                retry = (retry * 2).min(MAX_RETRY);
                wait
            }
        };
        tokio::time::sleep(wait).await;
    }
}

async fn fetch(client: &Client, keys: &Keys) -> Result<Arc<str>, KeyError> {
    let text = match keys {
        Keys::Uri(uri) => client.get(uri).await?,
        Keys::Discovery(issuer) => {
            // OpenID Connect Discovery 1.0, 4.
            let issuer = issuer.trim_end_matches('/');
            let told = client
                .get(&format!("{issuer}/.well-known/openid-configuration"))
                .await?;
            let told: Option<serde_json::Value> = serde_json::from_str(&told).ok();
            let uri = told.as_ref().and_then(|told| told.get("jwks_uri")?.as_str());
            client.get(uri.ok_or(KeyError::NoUri)?).await?
        }
        Keys::Inline(text) => return Ok(Arc::clone(text)),
        Keys::None(why) => return Err(KeyError::NoSet(why.to_string())),
    };
    key_set(&text).map_err(KeyError::NoSet)?;
    Ok(text.into())
}

#[cfg(test)]
mod tests;
