//! Small JSON files in the state folder.
//!
//! Invariant: a file is the old one or the new one, whole, whenever this process dies. They are about pinned
//! maps, which a power cut takes too, so nothing waits for the disk: that would cost more than all the rest
//! of a policy change.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A file in the state folder could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file operation failed (a full disk, a folder that may not be written).
    #[error("can't {action} `{path}`")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The content is not what was written there.
    #[error("`{path}` is damaged")]
    Damaged {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

impl StateError {
    fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// Makes the state folder.
pub(crate) fn prepare(dir: &Path) -> Result<(), StateError> {
    std::fs::create_dir_all(dir).map_err(|e| StateError::io("make", dir, e))
}

/// Reads a file; none when there is none.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(StateError::io("read", path, e)),
    };
    let content = serde_json::from_slice(&bytes);
    content.map(Some).map_err(|source| StateError::Damaged {
        path: path.to_owned(),
        source,
    })
}

/// Reads a file; a damaged one counts as missing and is noted.
pub(crate) fn read_or_note<T: DeserializeOwned>(
    path: &Path,
    notes: &mut Vec<String>,
) -> Result<Option<T>, StateError> {
    match read(path) {
        Err(StateError::Damaged { path, source }) => {
            notes.push(format!(
                "`{}` is damaged and was ignored: {source}",
                path.display()
            ));
            Ok(None)
        }
        other => other,
    }
}

/// Replaces a file.
pub(crate) fn write<T: Serialize>(path: &Path, content: &T) -> Result<(), StateError> {
    let beside = path.with_extension("new");
    let written = write_whole(&beside, content).and_then(|()| std::fs::rename(&beside, path));
    written.map_err(|e| {
        // Half a file is of no use; the error that matters is the first one.
        let _ = std::fs::remove_file(&beside);
        StateError::io("write", path, e)
    })
}

fn write_whole<T: Serialize>(path: &Path, content: &T) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(&serde_json::to_vec(content)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_reads_back_and_a_missing_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        assert_eq!(read::<u32>(&path).unwrap(), None);
        write(&path, &7_u32).unwrap();
        assert_eq!(read::<u32>(&path).unwrap(), Some(7));
    }

    #[test]
    fn a_full_disk_keeps_the_old_file_and_leaves_nothing_beside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        write(&path, &7_u32).unwrap();
        std::os::unix::fs::symlink("/dev/full", dir.path().join("x.new")).unwrap();
        let refused = write(&path, &8_u32).unwrap_err();
        assert!(refused.to_string().contains("x.json"), "{refused}");
        assert_eq!(read::<u32>(&path).unwrap(), Some(7));
        assert!(!dir.path().join("x.new").exists());
    }

    #[test]
    fn a_damaged_file_is_named_and_counts_as_missing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        std::fs::write(&path, "{").unwrap();
        assert!(matches!(read::<u32>(&path), Err(StateError::Damaged { .. })));
        let mut notes = Vec::new();
        assert_eq!(read_or_note::<u32>(&path, &mut notes).unwrap(), None);
        assert!(notes[0].contains("x.json"), "{notes:?}");
    }
}
