//! JSON files in the state folder, replaced whole.
//!
//! Invariant: a reader finds the old content or the new one, never a part; a failed write leaves the old one. Nobody
//! but the owner reads them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a state file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file can't be read.
    #[error("can't read `{file}`")]
    Read {
        /// Path.
        file: String,
        /// Cause.
        source: io::Error,
    },
    /// It was read and isn't ours.
    #[error("`{file}` is not a state file of this agent (move it away to start without it)")]
    Parse {
        /// Path.
        file: String,
        /// Cause.
        source: serde_json::Error,
    },
    /// It can't be written.
    #[error("can't write `{file}`; the old content stays")]
    Write {
        /// Path.
        file: String,
        /// Cause.
        source: io::Error,
    },
}

/// The stored value; none when the file doesn't exist.
///
/// # Errors
/// The file can't be read or parsed.
pub fn load<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    let file = path.display().to_string();
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(StateError::Read { file, source }),
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|source| StateError::Parse { file, source })
}

/// Replaces the file by `value`, durably.
///
/// # Errors
/// The folder can't be written; the old file stays.
pub fn store<T: Serialize>(path: &Path, value: &T) -> Result<(), StateError> {
    let wrong = |source| StateError::Write {
        file: path.display().to_string(),
        source,
    };
    let text = serde_json::to_vec_pretty(value).map_err(|e| wrong(io::Error::other(e)))?;
    let new = path.with_extension("json.new");
    let written = write_new(&new, &text).and_then(|()| fs::rename(&new, path));
    if let Err(source) = written {
        // The half-written file is of no use; if it can't be removed either, the next store overwrites it.
        drop(fs::remove_file(&new));
        return Err(wrong(source));
    }
    // The rename itself is durable once the folder is.
    path.parent()
        .map_or(Ok(()), |folder| File::open(folder)?.sync_all())
        .map_err(wrong)
}

fn write_new(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = options.open(path)?;
    file.write_all(text)?;
    file.sync_all()
}
