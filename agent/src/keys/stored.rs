//! Fetched key sets in the state folder, so that a restarted agent takes tokens before it has asked anybody.
//!
//! Invariant: a stored set is used only for the very URI or issuer that it was fetched for, only if it is one, and no
//! longer than `MAX_AGE` after it was fetched.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use thyra_policy_compiler::tokens::{Keys, key_set};
use tracing::warn;

use super::words;
use crate::chain::chain;
use crate::state_file;

/// The oldest set that is used without having been fetched anew.
pub(super) const MAX_AGE: Duration = Duration::from_secs(24 * 60 * 60);
/// Name of the folder.
const FOLDER: &str = "keys";

/// A file's content.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    /// What it is the set of.
    of: String,
    /// Seconds since 1970.
    fetched: u64,
    set: String,
}

/// The folder.
#[derive(Clone, Debug)]
pub(super) struct Store(PathBuf);

impl Store {
    /// The one in the agent's state folder, made if need be; sets that are too old go.
    ///
    /// # Errors
    /// The folder can't be made or read.
    pub(super) fn open(state: &std::path::Path) -> io::Result<Self> {
        let folder = state.join(FOLDER);
        match DirBuilder::new().mode(0o700).create(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let age = entry.metadata()?.modified()?.elapsed();
            if age.is_ok_and(|age| age > MAX_AGE) {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(Self(folder))
    }

    /// The stored set and for how long it may be used; what is there and can't be used is named.
    pub(super) fn load(&self, keys: &Keys) -> Option<(Arc<str>, Duration)> {
        let file = self.file(keys);
        let stored: Stored = match state_file::load(&file) {
            Ok(stored) => stored?,
            Err(error) => {
                warn!(keys = words(keys), why = chain(&error), "stored key set not used");
                return None;
            }
        };
        match stored.usable(keys) {
            Ok(left) => Some((stored.set.into(), left)),
            Err(why) => {
                warn!(keys = words(keys), file = %file.display(), why, "stored key set not used");
                None
            }
        }
    }

    /// Stores a set that was fetched now; where that fails it is fetched again after a restart.
    pub(super) fn put(&self, keys: &Keys, set: &str) {
        let stored = Stored {
            of: words(keys),
            fetched: now(),
            set: set.to_owned(),
        };
        if let Err(error) = state_file::store(&self.file(keys), &stored) {
            warn!(keys = words(keys), why = chain(&error), "key set not stored");
        }
    }

    /// Nobody wants it any more.
    pub(super) fn remove(&self, keys: &Keys) {
        match fs::remove_file(self.file(keys)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                warn!(keys = words(keys), %error, "stored key set stays");
            }
            _ => {}
        }
    }

    pub(super) fn file(&self, keys: &Keys) -> PathBuf {
        let digest = Sha256::digest(words(keys));
        let name: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        self.0.join(format!("{name}.json"))
    }
}

impl Stored {
    fn usable(&self, keys: &Keys) -> Result<Duration, String> {
        if self.of != words(keys) {
            return Err(format!("it is {}", self.of));
        }
        key_set(&self.set)?;
        let age = now().checked_sub(self.fetched).map(Duration::from_secs);
        let age = age.ok_or("it was fetched in the future")?;
        MAX_AGE
            .checked_sub(age)
            .ok_or_else(|| format!("it is older than {} h", MAX_AGE.as_secs() / 3600))
    }
}

/// A clock before 1970 counts as 1970: then every stored set is one of the future.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}
