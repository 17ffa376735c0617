//! An Envoy that somebody else runs: who may be it, and what becomes of it.
//!
//! Invariant: what asks for a configuration gets one only if it runs as Envoy's user, says that it is new enough and
//! was started with this bootstrap, and is alone in its control group, whose sockets the kernel then knows; and only
//! one process at a time. One that was told something by an agent that this one doesn't continue is ended, so that
//! nothing judges by what nobody knows. Whoever runs it starts it again.
//!
//! ```text
//! Away ─ admitted ─► Here ─ its process ended ─► Away
//! ```

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::config::core::v3::node::UserAgentVersionType;
use envoy_types::pb::envoy::service::discovery::v3::DeltaDiscoveryRequest;
use envoy_types::pb::google::protobuf::value::Kind as Value;
use rustix::process::Signal;
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio::net::unix::UCred;
use tokio::sync::watch;
use tracing::{info, warn};

use super::left::{self, Note};
use super::process::Process;
use super::{BOOTSTRAP, EnvoyError, OLDEST, Version};
use crate::ads::{Kind, hex};
use crate::bootstrap::bootstrap;
use crate::keep;

/// Under this name its bootstrap says which one it is, in the metadata of its node.
const MARK: &str = "thyra";
/// CAP_SYS_ADMIN (capability.h).
const SYS_ADMIN: u64 = 1 << 21;

/// How it is to be run.
#[derive(Clone, Debug)]
pub struct GivenConfig {
    /// Where it asks. It must find this folder at the same path, and be able to write there.
    pub socket: PathBuf,
    /// Name of this node.
    pub node: String,
    /// What it may allocate, bytes.
    pub heap: u64,
    /// The user that it runs as.
    pub user: u32,
    /// Where it is noted which process it is; only root may write there.
    pub note: PathBuf,
}

impl GivenConfig {
    /// The folder that it shares with the agent.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.socket.parent().unwrap_or(Path::new("/"))
    }

    fn bootstrap(&self) -> String {
        let (mut text, mark) = self.marked();
        if let Some(node) = text.get_mut("node") {
            node["metadata"] = json!({MARK: mark});
        }
        text.to_string()
    }

    fn mark(&self) -> String {
        self.marked().1
    }

    /// What it is to be told, and the mark by which that is known again.
    fn marked(&self) -> (serde_json::Value, String) {
        let admin = self.folder().join("admin.sock");
        let text = bootstrap(&self.node, &self.socket, &admin, self.heap);
        let mark = hex(&Sha256::digest(text.to_string()));
        (text, mark)
    }
}

/// Why a process isn't taken for Envoy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotEnvoy {
    /// It is in another process namespace.
    #[error("its process can't be seen from here; share the process namespace with the agent")]
    Unseen,
    /// It runs as somebody else.
    #[error("process {pid} runs as user {user} and not as {wanted} (`--envoy-user`)")]
    User {
        /// Which process.
        pid: u32,
        /// As whom.
        user: u32,
        /// As whom it should.
        wanted: u32,
    },
    /// It is no Envoy, or doesn't say so.
    #[error("process {pid} doesn't say which Envoy it is")]
    NoVersion {
        /// Which process.
        pid: u32,
    },
    /// It is too old.
    #[error("process {pid} is Envoy {version}, Thyra needs {OLDEST} or newer")]
    TooOld {
        /// Which process.
        pid: u32,
        /// What it is.
        version: Version,
    },
    /// It would not behave as it is to.
    #[error("process {pid} was not started with this agent's `{BOOTSTRAP}`; start it again")]
    Bootstrap {
        /// Which process.
        pid: u32,
    },
    /// One is enough.
    #[error("process {pid} is not the Envoy that is at work, which is {envoy}")]
    Another {
        /// Which process.
        pid: u32,
        /// The one at work.
        envoy: u32,
    },
    /// An agent told it what this one doesn't know.
    #[error("process {pid} was told by an agent that this one doesn't continue; it was ended")]
    Stranger {
        /// Which process.
        pid: u32,
    },
    /// Its sockets can't be known.
    #[error("process {pid}: {why}")]
    Sockets {
        /// Which process.
        pid: u32,
        /// Why not.
        why: String,
    },
    /// It ended meanwhile, or can't be looked at.
    #[error("process {pid} can't be watched: {why}")]
    Gone {
        /// Which process.
        pid: u32,
        /// What happened.
        why: String,
    },
}

/// What has become of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GivenState {
    /// Nobody is it, for this reason.
    Away(String),
    /// It is at work.
    Here {
        /// Its process.
        pid: u32,
        /// What it could do beyond what it needs, or can't do.
        loose: Vec<&'static str>,
    },
}

/// Makes the sockets of a process's control group known to the kernel, and says whether they were all the time; why
/// not, in words.
type Enroll = Box<dyn Fn(u32) -> Result<bool, String> + Send + Sync>;

/// See the module.
pub struct Given {
    config: GivenConfig,
    enroll: Enroll,
    at_work: Mutex<Option<AtWork>>,
    /// Of two that ask at a time the second one is judged after the first.
    door: Mutex<()>,
    state: watch::Sender<GivenState>,
}

#[derive(Clone, Debug)]
struct AtWork {
    note: Note,
    /// All that it has is from this agent, or from one that this one continues.
    is_ours: bool,
}

impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Given")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl Given {
    /// Nobody is it yet.
    #[must_use]
    pub fn new(config: GivenConfig, enroll: Enroll) -> Arc<Self> {
        let why = format!("none asks at `{}`", config.socket.display());
        Arc::new(Self {
            config,
            enroll,
            at_work: Mutex::default(),
            door: Mutex::default(),
            state: watch::Sender::new(GivenState::Away(why)),
        })
    }

    /// How it is to be run.
    #[must_use]
    pub fn config(&self) -> &GivenConfig {
        &self.config
    }

    /// What has become of it, and of every change.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<GivenState> {
        self.state.subscribe()
    }

    /// Goes on with the one that an earlier agent of this very build admitted, if it is still the same. Needs a tokio
    /// runtime.
    ///
    /// # Errors
    /// There is none, in words.
    pub fn resume(self: &Arc<Self>) -> Result<(), String> {
        let note: Note = match keep::load(&self.config.note) {
            Ok(Some(note)) => note,
            Ok(None) => return Err("none was left".to_owned()),
            Err(error) => return Err(format!("what was noted can't be read: {error}")),
        };
        if note.fingerprint != self.fingerprint()? {
            return Err("it was told by another build or with another configuration".to_owned());
        }
        let process = Process::of_other(note.pid).map_err(|error| format!("it has gone: {error}"))?;
        if !left::is_alive(note.pid, note.started) {
            return Err("it has ended".to_owned());
        }
        let user = left::user(note.pid).map_err(|error| format!("its user can't be read: {error}"))?;
        if user != self.config.user {
            return Err("it is another user's".to_owned());
        }
        if !(self.enroll)(note.pid)? {
            return Err("its sockets were not known all the time".to_owned());
        }
        info!(pid = note.pid, "envoy is at work");
        self.admitted(process, AtWork { note, is_ours: true });
        Ok(())
    }

    /// Writes what it is to be started with.
    ///
    /// # Errors
    /// That can't be written.
    pub fn want(&self) -> Result<(), EnvoyError> {
        let path = self.config.folder().join(BOOTSTRAP);
        keep::replace(&path, self.config.bootstrap().as_bytes(), 0o644)
            .map_err(|source| EnvoyError::Write { path, source })
    }

    /// Nobody is to start it until it is wanted.
    ///
    /// # Errors
    /// What it would be started with stays.
    pub fn unwant(&self) -> Result<(), EnvoyError> {
        let path = self.config.folder().join(BOOTSTRAP);
        keep::remove(&path).map_err(|source| EnvoyError::Write { path, source })
    }

    /// Whoever has just asked, with its first words. What is looked up may take its time: not for a task that others
    /// wait for.
    ///
    /// # Errors
    /// It isn't Envoy.
    pub(crate) fn admit(
        self: &Arc<Self>,
        peer: Option<UCred>,
        first: &DeltaDiscoveryRequest,
    ) -> Result<(), NotEnvoy> {
        let admitted = self.judge(peer, first);
        if let Err(why) = &admitted {
            let why = why.to_string();
            // An Envoy asks again every second.
            let news = self.state.send_if_modified(|state| match state {
                GivenState::Away(before) if *before != why => {
                    before.clone_from(&why);
                    true
                }
                _ => false,
            });
            if news || matches!(*self.state.borrow(), GivenState::Here { .. }) {
                warn!(why, "who asked for envoy's configuration gets none");
            }
        }
        admitted
    }

    /// Whether this is the one at work, for what it says of requests.
    pub(crate) fn is_at_work(&self, peer: Option<UCred>) -> bool {
        let pid = peer
            .and_then(|peer| peer.pid())
            .and_then(|pid| u32::try_from(pid).ok());
        let at_work = self.at_work();
        at_work.as_ref().is_some_and(|envoy| pid == Some(envoy.note.pid))
    }

    /// What the one at work says.
    ///
    /// # Errors
    /// It has what this agent didn't tell it, and was ended.
    pub(crate) fn hear(&self, request: &DeltaDiscoveryRequest) -> Result<(), NotEnvoy> {
        let mut at_work = self.at_work();
        let Some(envoy) = at_work.as_mut().filter(|envoy| !envoy.is_ours) else {
            return Ok(());
        };
        if !request.initial_resource_versions.is_empty() {
            let pid = envoy.note.pid;
            end(&envoy.note);
            return Err(NotEnvoy::Stranger { pid });
        }
        envoy.is_ours = request.type_url == Kind::Listener.type_url();
        Ok(())
    }

    fn judge(self: &Arc<Self>, peer: Option<UCred>, first: &DeltaDiscoveryRequest) -> Result<(), NotEnvoy> {
        let peer = peer.ok_or(NotEnvoy::Unseen)?;
        let pid = peer.pid().and_then(|pid| u32::try_from(pid).ok());
        // 0 stands for a process of another namespace (pid_namespaces(7)).
        let pid = pid.filter(|pid| *pid != 0).ok_or(NotEnvoy::Unseen)?;
        let (user, wanted) = (peer.uid(), self.config.user);
        if user != wanted {
            return Err(NotEnvoy::User { pid, user, wanted });
        }
        self.told_by(pid, first.node.as_ref())?;
        let _door = self.door.lock().unwrap_or_else(PoisonError::into_inner);
        let gone = |why: String| NotEnvoy::Gone { pid, why };
        let process = Process::of_other(pid).map_err(|error| gone(error.to_string()))?;
        let started = left::started(pid).map_err(|error| gone(error.to_string()))?;
        {
            let at_work = self.at_work();
            let alive = at_work
                .as_ref()
                .filter(|envoy| left::is_alive(envoy.note.pid, envoy.note.started));
            match alive.map(|envoy| (envoy.note.pid, envoy.note.started)) {
                Some(envoy) if envoy == (pid, started) => return Ok(()),
                Some((envoy, _)) => return Err(NotEnvoy::Another { pid, envoy }),
                None => {}
            }
        }
        let noted = keep::load::<Note>(&self.config.note).ok().flatten();
        if let Some(note) = noted.filter(|note| (note.pid, note.started) == (pid, started)) {
            end(&note);
            return Err(NotEnvoy::Stranger { pid });
        }
        (self.enroll)(pid).map_err(|why| NotEnvoy::Sockets { pid, why })?;
        let fingerprint = self.fingerprint().map_err(gone)?;
        let note = Note {
            pid,
            started,
            fingerprint,
        };
        if !left::is_alive(pid, started) {
            return Err(gone("it ended".to_owned()));
        }
        // Before it is told anything: an agent that it was told by is known by this.
        keep::store(&self.config.note, &note).map_err(|error| gone(error.to_string()))?;
        self.admitted(process, AtWork { note, is_ours: false });
        Ok(())
    }

    fn told_by(&self, pid: u32, node: Option<&Node>) -> Result<(), NotEnvoy> {
        let node = node.ok_or(NotEnvoy::NoVersion { pid })?;
        let version = version(node).ok_or(NotEnvoy::NoVersion { pid })?;
        if version < OLDEST {
            return Err(NotEnvoy::TooOld { pid, version });
        }
        let mark = node.metadata.as_ref().and_then(|all| all.fields.get(MARK));
        let mark = mark.and_then(|value| value.kind.as_ref());
        match mark {
            Some(Value::StringValue(mark)) if *mark == self.config.mark() => Ok(()),
            _ => Err(NotEnvoy::Bootstrap { pid }),
        }
    }

    fn admitted(self: &Arc<Self>, mut process: Process, envoy: AtWork) {
        let Note { pid, started, .. } = envoy.note;
        *self.at_work() = Some(envoy);
        let loose = loose(pid);
        info!(pid, ?loose, "envoy is given");
        self.state.send_replace(GivenState::Here { pid, loose });
        let given = Arc::clone(self);
        tokio::spawn(async move {
            let why = process.ended().await;
            let mut at_work = given.at_work();
            let is_it = |envoy: &AtWork| (envoy.note.pid, envoy.note.started) == (pid, started);
            if at_work.as_ref().is_some_and(is_it) {
                *at_work = None;
                warn!(pid, why, "the envoy that was given ended");
                given
                    .state
                    .send_replace(GivenState::Away(format!("process {pid}: {why}")));
            }
        });
    }

    /// This build and what it is to be told that can't be told anew.
    fn fingerprint(&self) -> Result<String, String> {
        let unreadable = |error: std::io::Error| format!("this program can't be looked at: {error}");
        let own = left::file(Path::new("/proc/self/exe")).map_err(unreadable)?;
        Ok(hex(&Sha256::digest(format!(
            "{own}\n{}",
            self.config.bootstrap()
        ))))
    }

    /// A panic while it was held can't leave half a change.
    fn at_work(&self) -> MutexGuard<'_, Option<AtWork>> {
        self.at_work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the process that is noted in this file, where it still runs.
pub fn end_noted(file: &Path) {
    if let Ok(Some(note)) = keep::load::<Note>(file) {
        end(&note);
    }
}

fn end(note: &Note) {
    let Ok(process) = Process::of_other(note.pid) else {
        return;
    };
    // From here on its number can't become another's unnoticed.
    if !left::is_alive(note.pid, note.started) {
        return;
    }
    warn!(pid = note.pid, "an envoy that nobody can know again is ended");
    if let Err(error) = process.signal(Signal::KILL) {
        warn!(pid = note.pid, %error, "it can't be ended; it gets no connection");
    }
}

/// What Envoy says of itself.
fn version(node: &Node) -> Option<Version> {
    let Some(UserAgentVersionType::UserAgentBuildVersion(build)) = &node.user_agent_version_type else {
        return None;
    };
    let version = build.version.as_ref()?;
    let part = |number: u32| u16::try_from(number).ok();
    (node.user_agent_name == "envoy").then_some(())?;
    Some(Version {
        major: part(version.major_number)?,
        minor: part(version.minor_number)?,
        patch: part(version.patch)?,
    })
}

/// What a process may do beyond what Envoy needs, or can't do, as far as the kernel tells others (proc_pid_status(5)).
fn loose(pid: u32) -> Vec<&'static str> {
    match fs::read_to_string(format!("/proc/{pid}/status")) {
        Ok(status) => looseness(&status),
        Err(_) => vec!["what it may do can't be read"],
    }
}

fn looseness(status: &str) -> Vec<&'static str> {
    let value = |name: &str| {
        let mut lines = status.lines().filter_map(|line| line.split_once(':'));
        lines.find(|(key, _)| *key == name).map(|(_, value)| value.trim())
    };
    let capabilities = value("CapEff").and_then(|set| u64::from_str_radix(set, 16).ok());
    let said = [
        (
            value("NoNewPrivs") != Some("1"),
            "it could gain privileges (no_new_privs is not set)",
        ),
        (
            value("Seccomp") != Some("2"),
            "no filter of system calls holds it",
        ),
        (
            capabilities.is_none_or(|set| set & !SYS_ADMIN != 0),
            "it has more capabilities than CAP_SYS_ADMIN",
        ),
        (
            capabilities.is_none_or(|set| set & SYS_ADMIN == 0),
            "it lacks CAP_SYS_ADMIN and can't listen in pods",
        ),
        (
            value("Uid").is_none_or(|all| all.split_whitespace().any(|id| id == "0")),
            "it runs as root",
        ),
    ];
    said.into_iter()
        .filter(|(is_so, _)| *is_so)
        .map(|(_, words)| words)
        .collect()
}

#[cfg(test)]
mod tests;
