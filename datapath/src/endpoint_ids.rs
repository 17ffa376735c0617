//! Which endpoint id belongs to which pod uid.
//!
//! Invariant: an id is given out only when it is on disk, and never to two uids; a freed id is the last to be
//! given out again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thyra_datapath_abi::limits::MAX_ENDPOINTS;

use crate::state_file::{self, StateError};

const FILE: &str = "ids.json";

/// The reservations.
#[derive(Debug)]
pub(crate) struct EndpointIds {
    path: PathBuf,
    by_uid: BTreeMap<String, u16>,
    /// Attached under an id that nobody here knows the uid of (the state folder was lost).
    unnamed: BTreeSet<u16>,
    last: u16,
}

/// No id can be given.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// All ids are taken.
    #[error("this node already has {} endpoints, the most that it can hold", MAX_ENDPOINTS - 1)]
    Full,
    /// The reservation can't be kept.
    #[error(transparent)]
    State(#[from] StateError),
}

#[derive(Default, Serialize, Deserialize)]
struct File {
    endpoints: BTreeMap<String, u16>,
}

impl EndpointIds {
    /// Reads the reservations; `attached` are the ids that have pins.
    pub(crate) fn read(
        state_dir: &Path,
        attached: impl Iterator<Item = u16>,
        notes: &mut Vec<String>,
    ) -> Result<Self, StateError> {
        let path = state_dir.join(FILE);
        let by_uid = state_file::read_or_note::<File>(&path, notes)?
            .unwrap_or_default()
            .endpoints;
        let named: BTreeSet<u16> = by_uid.values().copied().collect();
        let unnamed = attached.filter(|id| !named.contains(id)).collect();
        Ok(Self {
            path,
            last: named.last().copied().unwrap_or(0),
            by_uid,
            unnamed,
        })
    }

    pub(crate) fn by_uid(&self) -> &BTreeMap<String, u16> {
        &self.by_uid
    }

    pub(crate) fn uid(&self, id: u16) -> Option<&str> {
        self.by_uid
            .iter()
            .find(|(_, held)| **held == id)
            .map(|(uid, _)| uid.as_str())
    }

    /// The id of `uid`, a fresh one if it has none.
    pub(crate) fn reserve(&mut self, uid: &str) -> Result<u16, ReserveError> {
        if let Some(id) = self.by_uid.get(uid) {
            return Ok(*id);
        }
        let taken: BTreeSet<u16> = self.by_uid.values().chain(&self.unnamed).copied().collect();
        let limit = u16::try_from(MAX_ENDPOINTS).map_err(|_| ReserveError::Full)?;
        let id = (self.last + 1..limit)
            .chain(1..=self.last.min(limit - 1))
            .find(|id| !taken.contains(id))
            .ok_or(ReserveError::Full)?;
        self.by_uid.insert(uid.to_owned(), id);
        if let Err(e) = self.save() {
            self.by_uid.remove(uid);
            return Err(e.into());
        }
        self.last = id;
        Ok(id)
    }

    /// Gives an id back. Should the disk refuse, the id merely stays reserved after a restart.
    pub(crate) fn release(&mut self, id: u16) -> Result<(), StateError> {
        let before = self.by_uid.len();
        self.by_uid.retain(|_, held| *held != id);
        self.unnamed.remove(&id);
        if self.by_uid.len() == before {
            Ok(())
        } else {
            self.save()
        }
    }

    fn save(&self) -> Result<(), StateError> {
        state_file::write(
            &self.path,
            &File {
                endpoints: self.by_uid.clone(),
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fresh(dir: &Path) -> EndpointIds {
        EndpointIds::read(dir, std::iter::empty(), &mut Vec::new()).unwrap()
    }

    #[test]
    fn an_id_survives_a_restart_and_stays_with_its_uid() {
        let dir = tempfile::tempdir().unwrap();
        let id = fresh(dir.path()).reserve("a").unwrap();
        let mut again = fresh(dir.path());
        assert_eq!(again.reserve("a").unwrap(), id);
        assert_ne!(again.reserve("b").unwrap(), id);
    }

    #[test]
    fn a_freed_id_is_the_last_to_return() {
        let dir = tempfile::tempdir().unwrap();
        let mut ids = fresh(dir.path());
        let first = ids.reserve("a").unwrap();
        ids.release(first).unwrap();
        assert_ne!(ids.reserve("b").unwrap(), first);
    }

    #[test]
    fn an_id_with_pins_but_without_a_name_is_not_given_out() {
        let dir = tempfile::tempdir().unwrap();
        let mut ids = EndpointIds::read(dir.path(), [1, 2].into_iter(), &mut Vec::new()).unwrap();
        assert_eq!(ids.reserve("a").unwrap(), 3);
    }

    #[test]
    fn the_256th_endpoint_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut ids = EndpointIds::read(dir.path(), 1..=254, &mut Vec::new()).unwrap();
        ids.reserve("a").unwrap();
        assert!(matches!(ids.reserve("b"), Err(ReserveError::Full)));
        assert_eq!(ids.reserve("a").unwrap(), 255);
    }

    #[test]
    fn a_disk_that_refuses_gives_no_id() {
        let dir = tempfile::tempdir().unwrap();
        let mut ids = fresh(dir.path());
        std::os::unix::fs::symlink("/dev/full", dir.path().join("ids.new")).unwrap();
        assert!(matches!(ids.reserve("a"), Err(ReserveError::State(_))));
        assert!(ids.by_uid().is_empty());
    }
}
