//! The node's Envoy as a child process: found, checked, started, watched, started again, stopped.
//!
//! Invariant: only the process that was started here is ever signalled, and only while it is not yet reaped, so
//! its number can't have gone to another one.
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
mod jail;

use std::path::PathBuf;
use std::time::Duration;

use tokio::process::Child;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use self::admin::{AdminError, is_ready};
pub use self::binary::{Binary, BinaryError, OLDEST, Version};
use crate::bootstrap::bootstrap;

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
    /// A file in its folder can't be written.
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
}

impl Supervisor {
    /// Writes the bootstrap and starts Envoy; it is started again until `stop`.
    ///
    /// # Errors
    /// The bootstrap can't be written.
    pub fn start(config: EnvoyConfig) -> Result<Self, EnvoyError> {
        let path = config.folder.join("bootstrap.json");
        let (xds, admin) = (config.xds_socket(), config.admin_socket());
        let text = bootstrap(&config.node, &xds, &admin, config.heap).to_string();
        std::fs::write(&path, text).map_err(|source| EnvoyError::Write { path, source })?;
        let (told, state) = watch::channel(EnvoyState::Starting);
        let stop = CancellationToken::new();
        let task = tokio::spawn(run(config, told, stop.clone()));
        Ok(Self { state, stop, task })
    }

    /// What has become of it, and of every change.
    #[must_use]
    pub fn state(&self) -> watch::Receiver<EnvoyState> {
        self.state.clone()
    }

    /// Ends it and waits for its end.
    pub async fn stop(self) {
        self.stop.cancel();
        if let Err(error) = self.task.await {
            warn!(%error, "envoy's supervisor broke");
        }
    }
}

/// How a run of Envoy ended.
enum Ended {
    /// It was told to.
    Stopped,
    /// By itself, with what can be said of it; whether it had been a good one.
    Failed { why: String, good: bool },
}

async fn run(config: EnvoyConfig, told: watch::Sender<EnvoyState>, stop: CancellationToken) {
    let mut wait = FIRST_WAIT;
    loop {
        told.send_replace(EnvoyState::Starting);
        match once(&config, &told, &stop).await {
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

async fn once(config: &EnvoyConfig, told: &watch::Sender<EnvoyState>, stop: &CancellationToken) -> Ended {
    let failed = |why: String| Ended::Failed { why, good: false };
    let mut child = match child::spawn(config) {
        Ok(child) => child,
        Err(error) => return failed(format!("can't start `{}`: {error}", config.binary.path.display())),
    };
    let Some(pid) = child.id() else {
        return failed("it ended at once".to_owned());
    };
    info!(pid, version = %config.binary.version, other_system_calls = "EPERM", "envoy started");
    let limit = Instant::now() + START_LIMIT;
    let admin = config.admin_socket();
    loop {
        tokio::select! {
            () = stop.cancelled() => return end(&mut child).await,
            status = child.wait() => return failed(words(status)),
            () = sleep_until(limit) => {
                end(&mut child).await;
                return failed(format!("it was not ready after {} s", START_LIMIT.as_secs()));
            }
            ready = asked(&admin) => if ready { break },
        }
    }
    let since = Instant::now();
    info!(pid, "envoy is ready");
    told.send_replace(EnvoyState::Ready { pid });
    tokio::select! {
        () = stop.cancelled() => end(&mut child).await,
        status = child.wait() => Ended::Failed { why: words(status), good: since.elapsed() > GOOD },
    }
}

async fn asked(admin: &std::path::Path) -> bool {
    sleep(ASK_READY).await;
    is_ready(admin).await.unwrap_or(false)
}

fn words(status: std::io::Result<std::process::ExitStatus>) -> String {
    match status {
        Ok(status) => status.to_string(),
        Err(error) => format!("its end can't be read: {error}"),
    }
}

/// SIGTERM, and SIGKILL when that is not enough.
async fn end(child: &mut Child) -> Ended {
    if let Err(error) = child::terminate(child) {
        warn!(%error, "can't ask envoy to end");
    }
    if tokio::time::timeout(GRACE, child.wait()).await.is_err()
        && let Err(error) = child.kill().await
    {
        warn!(%error, "can't end envoy");
    }
    Ended::Stopped
}
