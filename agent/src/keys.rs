//! The key sets that RequestAuthentications name by URI: fetched, kept, fetched again.
//!
//! Invariant: only a good set replaces a good one, and a failure has a name. Without a set no token of its rule is
//! taken, so nothing here lets a request pass that policy wouldn't. A set of before a restart is used until it is a day
//! old.

mod client;
mod stored;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thyra_node_proxy_bridge::lower::KeySets;
use thyra_policy_compiler::tokens::{Keys, Tokens, key_set};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::{info, warn};

pub use self::client::{Client, FetchError};
use self::stored::Store;
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
    store: Option<Store>,
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
    /// Nothing is wanted yet; sets are stored in the agent's state folder, where there is one.
    #[must_use]
    pub fn new(client: Client, runtime: Handle, state: Option<&Path>) -> Self {
        let store = state.and_then(|state| match Store::open(state) {
            Ok(store) => Some(store),
            Err(error) => {
                warn!(state = %state.display(), %error, "key sets are not stored");
                None
            }
        });
        Self {
            client,
            runtime,
            refresh: REFRESH,
            shared: Arc::new(Shared {
                known: Mutex::default(),
                changes: watch::Sender::new(0),
                store,
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
            if !wanted.contains_key(keys)
                && let Some(store) = &self.shared.store
            {
                store.remove(keys);
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
            // Before Envoy is told of the rule.
            let old_at = self.shared.take_stored(&keys);
            let times = [timeout, self.refresh];
            let task = self
                .runtime
                .spawn(follow(client, shared, keys.clone(), times, old_at));
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

    /// Uses what is stored of a set that isn't there; until when it may be used.
    fn take_stored(&self, keys: &Keys) -> Option<Instant> {
        let (text, left) = self.store.as_ref()?.load(keys)?;
        if self.lock().sets.contains_key(keys) {
            // It is the same one, or a later one that could not be stored.
            return Some(Instant::now() + left);
        }
        info!(keys = words(keys), left = ?left, "a stored key set is used until it is fetched");
        self.change(|known| drop(known.sets.insert(keys.clone(), text)));
        Some(Instant::now() + left)
    }

    /// A stored set has grown too old.
    fn aged(&self, keys: &Keys) {
        warn!(
            keys = words(keys),
            "the stored key set is too old; it is used no more"
        );
        self.change(|known| drop(known.sets.remove(keys)));
    }

    fn fetched(&self, keys: &Keys, text: Arc<str>) {
        if let Some(store) = &self.store {
            store.put(keys, &text);
        }
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

/// Until it is wanted no more; a stored set is used until `old_at`.
async fn follow(
    client: Client,
    shared: Arc<Shared>,
    keys: Keys,
    [timeout, refresh]: [Duration; 2],
    mut old_at: Option<Instant>,
) {
    let mut retry = RETRY;
    loop {
        let fetched = tokio::time::timeout(timeout, fetch(&client, &keys)).await;
        let wait = match fetched.unwrap_or(Err(KeyError::Slow(timeout))) {
            Ok(text) => {
                shared.fetched(&keys, text);
                old_at = None;
                retry = RETRY;
                refresh
            }
            Err(error) => {
                shared.failed(&keys, &error);
                if old_at.take_if(|at| *at <= Instant::now()).is_some() {
                    shared.aged(&keys);
                }
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
