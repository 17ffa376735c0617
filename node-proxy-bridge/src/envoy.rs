//! The node's Envoy as a process: found, checked, started or taken over, watched, started again, stopped or left at
//! work.
//!
//! Invariant: only the process that was started here, or that `left` knows again, is ever signalled, by a descriptor.
//!
//! ```text
//! Starting ─ /ready says LIVE ─► Ready ─┐
//!    ▲                                  ├─ it ended ─► Waiting (backoff) ─► Starting
//!    └──────────────────────────────────┘
//!             stop() from anywhere ─► Stopped
//! ```

mod admin;
mod binary;
mod child;
mod given;
mod jail;
mod launch;
mod left;
mod process;

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use self::admin::{AdminError, is_ready};
pub use self::binary::{Binary, BinaryError, OLDEST, Version};
pub use self::given::{Given, GivenConfig, GivenState, NotEnvoy, end_noted};
pub use self::launch::{Launch, launch};
pub use self::left::{Left, end_strays};
use self::process::Process;
use crate::bootstrap::bootstrap;
use crate::keep;

/// Its bootstrap, in its folder.
const BOOTSTRAP: &str = "bootstrap.json";
/// How often a starting Envoy is asked whether it is ready.
const ASK_READY: Duration = Duration::from_millis(20);
/// How long it may take to become ready before it counts as hung and is started anew.
const START_LIMIT: Duration = Duration::from_secs(20);
/// What it gets to end by itself after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);
/// The first wait before it is started again, doubled up to the longest.
const FIRST_WAIT: Duration = Duration::from_millis(50);
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// An Envoy that was ready for so long was a good one: the next wait is the first again.
const GOOD: Duration = Duration::from_secs(30);

/// What Envoy may allocate where nobody says otherwise, bytes.
pub const DEFAULT_HEAP: u64 = 1 << 30;

/// How Envoy runs.
#[derive(Clone, Debug)]
pub struct EnvoyConfig {
    /// A checked binary.
    pub binary: Binary,
    /// Its folder: bootstrap, administration and xDS sockets.
    pub folder: PathBuf,
    /// Name of this node.
    pub node: String,
    /// Worker threads.
    pub concurrency: u16,
    /// What it may allocate, bytes: near it streams that hold much are reset, at it requests get 503.
    pub heap: u64,
    /// Uid and gid; none: those of this process. Changing them needs root.
    pub user: Option<(u32, u32)>,
    /// The control group that it runs in, and by which its sockets are known. With it Envoy listens inside of pods, for
    /// which it has CAP_SYS_ADMIN and no other capability.
    pub cgroup: Option<PathBuf>,
    /// Where it is noted which process it is, so that it outlives its supervisor; only root may write there. None: it
    /// ends with it.
    pub note: Option<PathBuf>,
}

impl EnvoyConfig {
    /// Where Envoy is told what to do.
    #[must_use]
    pub fn xds_socket(&self) -> PathBuf {
        self.folder.join("xds.sock")
    }

    /// Where Envoy is asked how it is.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        self.folder.join("admin.sock")
    }
}

/// Why there is no supervisor.
#[derive(Debug, thiserror::Error)]
pub enum EnvoyError {
    /// A file in its folder, or beside its note, can't be made.
    #[error("can't write `{}`", path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// What has become of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EnvoyState {
    /// It was started, or is about to be.
    Starting,
    /// It says that it is ready.
    Ready {
        /// Its process.
        pid: u32,
    },
    /// It ended, or could not be started; it is tried again.
    Waiting {
        /// What happened.
        why: String,
        /// For how long.
        wait: Duration,
    },
    /// It was told to.
    Stopped,
}

/// Keeps one Envoy running.
#[derive(Debug)]
pub struct Supervisor {
    state: watch::Receiver<EnvoyState>,
    stop: CancellationToken,
    task: JoinHandle<()>,
    lines: Option<JoinHandle<()>>,
    note: Option<PathBuf>,
}

impl Supervisor {
    /// Writes the bootstrap and starts Envoy; it is started again until `stop`.
    ///
    /// # Errors
    /// The bootstrap can't be written.
    pub fn start(config: EnvoyConfig) -> Result<Self, EnvoyError> {
        Self::over(config, None)
    }

    /// The same, with the Envoy that an earlier supervisor left.
    ///
    /// # Errors
    /// The bootstrap can't be written; that Envoy is left at work.
    pub fn take_over(config: EnvoyConfig, left: Left) -> Result<Self, EnvoyError> {
        Self::over(config, Some(left.0))
    }

    fn over(config: EnvoyConfig, left: Option<Process>) -> Result<Self, EnvoyError> {
        let path = config.folder.join(BOOTSTRAP);
        let (xds, admin) = (config.xds_socket(), config.admin_socket());
        let text = bootstrap(&config.node, &xds, &admin, config.heap).to_string();
        keep::replace(&path, text.as_bytes(), 0o644).map_err(|source| EnvoyError::Write { path, source })?;
        let note = config.note.clone();
        let lines = note.as_deref().map(|note| {
            left::lines(note).map_err(|source| EnvoyError::Write {
                path: note.to_owned(),
                source,
            })
        });
        let (reader, end) = lines.transpose()?.unzip();
        let (told, state) = watch::channel(EnvoyState::Starting);
        let stop = CancellationToken::new();
        let task = tokio::spawn(run(Job { config, end }, left, told, stop.clone()));
        let lines = reader.map(|reader| tokio::spawn(child::log(reader)));
        Ok(Self {
            state,
            stop,
            task,
            lines,
            note,
        })
    }

    /// What has become of it, and of every change.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<EnvoyState> {
        self.state.clone()
    }

    /// Ends it and waits for its end.
    pub async fn stop(mut self) {
        self.stop.cancel();
        if let Err(error) = (&mut self.task).await {
            warn!(%error, "envoy's supervisor broke");
        }
        let forgotten = self.note.as_deref().map(keep::remove);
        if let Some(Err(error)) = forgotten {
            warn!(%error, "what was noted of envoy stays");
        }
    }

    /// Leaves it at work, for the next supervisor; one without a note ends.
    pub async fn leave(mut self) {
        self.task.abort();
        // What it says then is that it was aborted.
        drop((&mut self.task).await);
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.task.abort();
        if let Some(lines) = &self.lines {
            lines.abort();
        }
    }
}

/// What is run, and where it writes its lines if it outlives this process.
struct Job {
    config: EnvoyConfig,
    end: Option<File>,
}

/// How a run of Envoy ended.
enum Ended {
    /// It was told to.
    Stopped,
    /// By itself, with what can be said of it; whether it had been a good one.
    Failed { why: String, good: bool },
}

async fn run(job: Job, mut left: Option<Process>, told: watch::Sender<EnvoyState>, stop: CancellationToken) {
    let mut wait = FIRST_WAIT;
    loop {
        told.send_replace(EnvoyState::Starting);
        match once(&job, left.take(), &told, &stop).await {
            Ended::Stopped => break,
            Ended::Failed { why, good } => {
                if good {
                    wait = FIRST_WAIT;
                }
                warn!(why, ?wait, "envoy ended; it is started again");
                told.send_replace(EnvoyState::Waiting { why, wait });
                tokio::select! {
                    () = stop.cancelled() => break,
                    () = sleep(wait) => {}
                }
                wait = (wait * 2).min(LONGEST_WAIT);
            }
        }
    }
    told.send_replace(EnvoyState::Stopped);
}

async fn once(
    Job { config, end }: &Job,
    left: Option<Process>,
    told: &watch::Sender<EnvoyState>,
    stop: &CancellationToken,
) -> Ended {
    let failed = |why: String| Ended::Failed { why, good: false };
    let started = left.map_or_else(|| child::spawn(config, end.as_ref()), Ok);
    let mut process = match started {
        Ok(process) => process,
        Err(error) => return failed(format!("can't start `{}`: {error}", config.binary.path.display())),
    };
    let pid = process.pid();
    info!(pid, version = %config.binary.version, other_system_calls = "EPERM", "envoy runs");
    let limit = Instant::now() + START_LIMIT;
    let admin = config.admin_socket();
    loop {
        tokio::select! {
            () = stop.cancelled() => return ended(&mut process).await,
            why = process.ended() => return failed(why),
            () = sleep_until(limit) => {
                ended(&mut process).await;
                return failed(format!("it was not ready after {} s", START_LIMIT.as_secs()));
            }
            ready = asked(&admin) => if ready { break },
        }
    }
    let since = Instant::now();
    info!(pid, "envoy is ready");
    told.send_replace(EnvoyState::Ready { pid });
    tokio::select! {
        () = stop.cancelled() => ended(&mut process).await,
        why = process.ended() => Ended::Failed { why, good: since.elapsed() > GOOD },
    }
}

async fn asked(admin: &std::path::Path) -> bool {
    sleep(ASK_READY).await;
    is_ready(admin).await.unwrap_or(false)
}

/// SIGTERM, and SIGKILL when that is not enough.
async fn ended(process: &mut Process) -> Ended {
    if let Err(error) = process.signal(Signal::TERM) {
        warn!(%error, "can't ask envoy to end");
    }
    if tokio::time::timeout(GRACE, process.ended()).await.is_err() {
        if let Err(error) = process.signal(Signal::KILL) {
            warn!(%error, "can't end envoy");
        }
        process.ended().await;
    }
    Ended::Stopped
}
