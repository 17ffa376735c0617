//! The control group of an Envoy that somebody else runs: what listens in it is that Envoy.
//!
//! Invariant: nothing but the one process runs in it or below it when it is found, so that no socket of anybody else's
//! is ever taken for Envoy's. It is only looked at: it is never emptied or removed, nor is anything moved.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use crate::envoy_group::{mounted_here, mounts, path_of};

/// Why a process has no control group by which its sockets could be known.
#[derive(Debug, thiserror::Error)]
pub enum GivenGroupError {
    /// It is in none that can be seen from here.
    #[error(
        "the control group of process {pid} can't be seen; mount the node's `/sys/fs/cgroup` into the agent's container"
    )]
    Unseen {
        /// Which process.
        pid: u32,
    },
    /// Whose sockets those of this group are can't be told.
    #[error("others than process {pid} run in its control group `{}`; give it one of its own", path.display())]
    Shared {
        /// Which process.
        pid: u32,
        /// Its group's folder.
        path: PathBuf,
    },
    /// The groups can't be read.
    #[error("can't read the control groups")]
    Read(#[from] io::Error),
}

/// See the module.
#[derive(Debug)]
pub struct GivenGroup {
    path: PathBuf,
    /// The file system, where it was mounted for this process alone.
    _mount: Option<OwnedFd>,
}

impl GivenGroup {
    /// The one that this process runs in alone. It is looked for wherever groups can be seen: how a process's own group
    /// is called depends on who asks (cgroup_namespaces(7)).
    ///
    /// # Errors
    /// There is none, or it has others in it.
    pub fn of(pid: u32) -> Result<Self, GivenGroupError> {
        for root in mounts(&fs::read_to_string("/proc/self/mounts")?) {
            if let Some(path) = find(&root, pid)? {
                return Self::alone(path, None, pid);
            }
        }
        let mount = mounted_here()?;
        match find(&path_of(&mount), pid)? {
            Some(path) => Self::alone(path, Some(mount), pid),
            None => Err(GivenGroupError::Unseen { pid }),
        }
    }

    fn alone(path: PathBuf, mount: Option<OwnedFd>, pid: u32) -> Result<Self, GivenGroupError> {
        // A process that this one can't see is written as 0, and is another one.
        let alone = processes(&path)? == [pid] && children(&path)?.is_empty();
        if !alone {
            return Err(GivenGroupError::Shared { pid, path });
        }
        Ok(Self { path, _mount: mount })
    }

    /// Its folder, for this process.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The folder of the group below `root` that has the process.
fn find(root: &Path, pid: u32) -> io::Result<Option<PathBuf>> {
    let mut rest = vec![root.to_owned()];
    while let Some(path) = rest.pop() {
        // Groups come and go, and threaded ones don't tell their processes (cgroups(7)).
        if processes(&path).is_ok_and(|all| all.contains(&pid)) {
            return Ok(Some(path));
        }
        match children(&path) {
            Ok(below) => rest.extend(below),
            Err(error) if path == root => return Err(error),
            Err(_) => {}
        }
    }
    Ok(None)
}

fn processes(path: &Path) -> io::Result<Vec<u32>> {
    let text = fs::read_to_string(path.join("cgroup.procs"))?;
    let numbers = text.lines().map(|line| line.parse().map_err(io::Error::other));
    numbers.collect()
}

fn children(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut below = Vec::new();
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            below.push(entry.path());
        }
    }
    Ok(below)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(root: &Path, name: &str, processes: &str) -> PathBuf {
        let path = root.join(name);
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("cgroup.procs"), processes).unwrap();
        path
    }

    #[test]
    fn a_group_is_found_wherever_it_is_and_has_to_be_the_processs_own() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::write(root.join("cgroup.procs"), "1\n").unwrap();
        group(root, "kubepods", "");
        let own = group(root, "kubepods/envoy", "42\n");
        group(root, "kubepods/other", "420\n");
        assert_eq!(find(root, 42).unwrap(), Some(own.clone()));
        assert_eq!(find(root, 7).unwrap(), None);
        let alone = |path: &Path| GivenGroup::alone(path.to_owned(), None, 42);
        assert_eq!(alone(&own).unwrap().path(), own);
        for others in ["42\n43\n", "0\n42\n", ""] {
            fs::write(own.join("cgroup.procs"), others).unwrap();
            let error = alone(&own).unwrap_err().to_string();
            assert!(error.contains("give it one of its own"), "{others:?}: {error}");
        }
        fs::write(own.join("cgroup.procs"), "42\n").unwrap();
        group(root, "kubepods/envoy/below", "");
        alone(&own).unwrap_err();
    }
}
