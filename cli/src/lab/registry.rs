//! Where labs are written down, so that each is found again and removed whatever became of its process.
//!
//! Invariant: a lab's id is in the name of each namespace and is its folder's name; removing by id removes
//! all of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use thyra_datapath::EnvoyGroup;

use super::model::MAX_NODES;
use super::netns;

/// A folder a lab.
const ROOT: &str = "/run/thyra-lab";
/// An id is this long, and of these letters: none that look alike.
const ID_LENGTH: usize = 4;
const ID_LETTERS: &[u8] = b"abcdefghijkmnpqrstuvwxyz23456789";
/// How long a process may take to end when asked, or when killed.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is written about a lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) id: String,
    pub(crate) scenario: String,
    pub(crate) folder: PathBuf,
    pub(crate) control_plane: String,
    /// The process that runs it, and when that one was started (a number of /proc, so that a reused pid isn't
    /// mistaken).
    pub(crate) pid: i32,
    pub(crate) started: u64,
    /// Everything is up.
    pub(crate) ready: bool,
}

/// A lab's folder.
#[derive(Clone, Debug)]
pub(crate) struct RunDir {
    pub(crate) id: String,
    path: PathBuf,
}

impl RunDir {
    /// A folder with an id that no lab has.
    ///
    /// # Errors
    /// The folder can't be written.
    pub(crate) fn create() -> anyhow::Result<Self> {
        fs::create_dir_all(ROOT).with_context(|| format!("can't make `{ROOT}`"))?;
        loop {
            let id = random_id().context("the machine gives no random numbers")?;
            let path = Path::new(ROOT).join(&id);
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Self { id, path }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(|| format!("can't make `{}`", path.display())),
            }
        }
    }

    /// `None` if `id` has not the form of an id.
    pub(crate) fn parse(id: &str) -> Option<Self> {
        let is_id = id.len() == ID_LENGTH && id.bytes().all(|byte| ID_LETTERS.contains(&byte));
        is_id.then(|| Self::of(id))
    }

    pub(crate) fn of(id: &str) -> Self {
        Self {
            id: id.to_owned(),
            path: Path::new(ROOT).join(id),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Begins the name of each of the lab's namespaces.
    pub(crate) fn prefix(&self) -> String {
        format!("thyra-{}-", self.id)
    }

    /// Takes commands of a lab that stays up.
    pub(crate) fn control_socket(&self) -> PathBuf {
        self.path.join("control.sock")
    }

    /// A node's files: socket, state, bpffs, log.
    pub(crate) fn node(&self, node: usize) -> PathBuf {
        self.path.join(format!("n{node}"))
    }

    pub(crate) fn agent_socket(&self, node: usize) -> PathBuf {
        self.node(node).join("agent.sock")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("lab.log")
    }

    pub(crate) fn write(&self, record: &Record) -> anyhow::Result<()> {
        let path = self.path.join("lab.json");
        let fresh = self.path.join("lab.json.new");
        fs::write(&fresh, serde_json::to_vec_pretty(record)?)
            .and_then(|()| fs::rename(&fresh, &path))
            .with_context(|| format!("can't write `{}`", path.display()))
    }

    pub(crate) fn read(&self) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.path.join("lab.json")).ok()?).ok()
    }
}

/// Every lab that has a folder.
pub(crate) fn all() -> Vec<RunDir> {
    let Ok(entries) = fs::read_dir(ROOT) else {
        return Vec::new();
    };
    let mut ids: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| Path::new(ROOT).join(name).is_dir())
        .collect();
    ids.sort();
    ids.iter().map(|id| RunDir::of(id)).collect()
}

/// The agent sockets of all labs that run.
pub(crate) fn agent_sockets() -> Vec<PathBuf> {
    let nodes = |dir: RunDir| {
        let sockets = (0..MAX_NODES).map(move |node| dir.agent_socket(node));
        sockets.filter(|socket| socket.exists())
    };
    all().into_iter().flat_map(nodes).collect()
}

/// The lab called `name` (its id or its scenario), or the only one.
///
/// # Errors
/// None, or more than one; says which there are.
pub(crate) fn find(name: Option<&str>) -> anyhow::Result<RunDir> {
    let labs = all();
    let known = || {
        let names = labs.iter().map(|dir| match dir.read() {
            Some(record) => format!("{} ({})", dir.id, record.scenario),
            None => dir.id.clone(),
        });
        names.collect::<Vec<_>>().join(", ")
    };
    let matching: Vec<&RunDir> = labs
        .iter()
        .filter(|dir| {
            name.is_none_or(|name| dir.id == name || dir.read().is_some_and(|record| record.scenario == name))
        })
        .collect();
    match (matching.as_slice(), name) {
        ([one], _) => Ok((*one).clone()),
        ([], _) if labs.is_empty() => bail!("no lab runs; start one with `thyra lab up DIR`"),
        ([], name) => bail!("no lab `{}`; running are {}", name.unwrap_or_default(), known()),
        _ => bail!("more than one lab runs; name one of {}", known()),
    }
}

/// No folder speaks of such a lab.
pub(crate) fn is_unknown(name: &str) -> bool {
    all()
        .iter()
        .all(|dir| dir.id != name && dir.read().is_none_or(|record| record.scenario != name))
}

/// Removes the namespaces of a lab whose folder is gone; anything but an id has none.
///
/// # Errors
/// What could not be removed.
pub(crate) fn sweep(id: &str) -> anyhow::Result<()> {
    RunDir::parse(id).map_or(Ok(()), |dir| remove_namespaces(&dir.prefix()))
}

/// Removes all that a lab left: processes, namespaces, mounts, files. Nothing to remove is success.
///
/// # Errors
/// What could not be removed; the rest is gone all the same.
pub(crate) fn remove(dir: &RunDir) -> anyhow::Result<()> {
    let Ok(lock) = fs::File::open(dir.path()) else {
        return remove_namespaces(&dir.prefix());
    };
    // Two removers at once would fight over the same mounts.
    flock(&lock, FlockOperation::LockExclusive).context("can't lock the lab's folder")?;
    let namespaces = remove_namespaces(&dir.prefix());
    let groups = remove_envoys(dir);
    let mounts = unmount_below(dir.path());
    let files = match fs::remove_dir_all(dir.path()) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.with_context(|| format!("can't remove `{}`", dir.path().display())),
    };
    namespaces.and(groups).and(mounts).and(files)
}

/// Ends the process that runs the lab, politely first; then removes what it left.
///
/// # Errors
/// As `remove`.
pub(crate) fn stop(dir: &RunDir) -> anyhow::Result<()> {
    if let Some(record) = dir.read()
        && let Some(pid) = Pid::from_raw(record.pid)
        && start_time(record.pid) == Some(record.started)
        && record.pid != own_pid()
    {
        for signal in [Signal::TERM, Signal::KILL] {
            if kill_process(pid, signal).is_err() {
                break;
            }
            let gone = || start_time(record.pid) != Some(record.started);
            if wait_until(gone) {
                break;
            }
        }
    }
    remove(dir)
}

fn remove_namespaces(prefix: &str) -> anyhow::Result<()> {
    let names = netns::with_prefix(prefix).context("can't list network namespaces")?;
    for name in &names {
        for pid in netns::processes_in(name).unwrap_or_default() {
            // It may have ended by itself meanwhile.
            if let Some(pid) = Pid::from_raw(pid)
                && let Err(error) = kill_process(pid, Signal::KILL)
            {
                tracing::debug!(?pid, %error, "already gone");
            }
        }
    }
    for name in &names {
        wait_until(|| netns::processes_in(name).is_ok_and(|pids| pids.is_empty()));
        netns::delete(name)?;
    }
    Ok(())
}

/// An Envoy outlives its agent, and its control group every process.
fn remove_envoys(dir: &RunDir) -> anyhow::Result<()> {
    for node in (0..).take_while(|node| dir.node(*node).exists()) {
        let folder = dir.agent_socket(node).with_file_name("envoy");
        if let Some(group) = EnvoyGroup::find(&folder)? {
            group.empty()?;
            group.remove()?;
        }
    }
    Ok(())
}

fn unmount_below(path: &Path) -> anyhow::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("can't read the list of mounts")?;
    let below = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(1))
        .map(Path::new);
    for mount in below.filter(|mount| mount.starts_with(path)) {
        unmount(mount, UnmountFlags::DETACH)
            .with_context(|| format!("can't unmount `{}`", mount.display()))?;
    }
    Ok(())
}

fn wait_until(done: impl Fn() -> bool) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        if done() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

pub(crate) fn own_pid() -> i32 {
    rustix::process::getpid().as_raw_nonzero().get()
}

/// When a process was started, in ticks since boot; `None` if there is no live one.
pub(crate) fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

fn random_id() -> io::Result<String> {
    use std::io::Read;
    let mut bytes = [0; ID_LENGTH];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let letter = |byte: &u8| char::from(ID_LETTERS[usize::from(*byte) % ID_LETTERS.len()]);
    Ok(bytes.iter().map(letter).collect())
}

#[cfg(test)]
mod tests {
    use super::{RunDir, own_pid, random_id, start_time};

    #[test]
    fn a_process_is_known_by_its_start() {
        assert!(start_time(own_pid()).is_some_and(|time| time > 0));
        assert_eq!(start_time(i32::MAX), None);
        assert!(RunDir::parse(&random_id().expect("randomness")).is_some());
        assert!(RunDir::parse("..").is_none());
    }
}
