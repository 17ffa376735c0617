//! A program that the lab keeps running inside a node: an agent, or a part of the control plane.
//!
//! Invariant: what it says goes to a log of its own, and the end of that log is what an error shows.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::netns::Netns;

const LOG_LINES: usize = 15;
const POLL: Duration = Duration::from_millis(20);

/// What to run, where.
#[derive(Clone, Debug)]
pub(crate) struct Spec {
    /// As messages call it.
    pub(crate) name: String,
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<OsString>,
    pub(crate) environment: &'static [(&'static str, &'static str)],
    pub(crate) folder: PathBuf,
    pub(crate) log: PathBuf,
    pub(crate) netns: Netns,
}

pub(crate) struct Process {
    spec: Spec,
    child: Child,
}

impl Spec {
    fn spawn(&self) -> anyhow::Result<Child> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("can't write `{}`", self.log.display()))?;
        let mut command = Command::new(&self.program);
        command
            .args(&self.arguments)
            .envs(self.environment.iter().copied())
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("can't share a log")?)
            .stderr(log)
            // Ctrl-C is the lab's to handle: it stops its programs in order.
            .process_group(0);
        self.netns
            .spawn(&mut command)
            .with_context(|| format!("can't start `{}`", self.program.display()))
    }
}

impl Process {
    /// # Errors
    /// It can't be started.
    pub(crate) fn start(spec: Spec) -> anyhow::Result<Self> {
        let child = spec.spawn()?;
        Ok(Self { spec, child })
    }

    /// # Errors
    /// It has ended; with the end of its log.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait().context("can't ask for a process's state")? {
            bail!("{} ended ({status}):\n{}", self.spec.name, self.last_words());
        }
        Ok(())
    }

    /// It has ended by itself with this code.
    pub(crate) fn ended_with(&mut self, code: i32) -> bool {
        matches!(self.child.try_wait(), Ok(Some(status)) if status.code() == Some(code))
    }

    /// Starts it again if it has ended, as a kubelet would; says how it had ended.
    ///
    /// # Errors
    /// It can't be started.
    pub(crate) fn revive(&mut self) -> anyhow::Result<Option<String>> {
        let Some(status) = self.child.try_wait().context("can't ask for a process's state")? else {
            return Ok(None);
        };
        self.child = self.spec.spawn()?;
        Ok(Some(format!(
            "{} ended ({status}) and was started again",
            self.spec.name
        )))
    }

    /// The end of its log.
    pub(crate) fn last_words(&self) -> String {
        end_of(&self.spec.log)
    }

    /// Asks it to end, and makes it end after `patience`.
    pub(crate) async fn stop(&mut self, patience: Duration) {
        let raw = i32::try_from(self.child.id()).ok();
        if let Some(pid) = raw.and_then(Pid::from_raw)
            && let Err(error) = kill_process(pid, Signal::TERM)
        {
            tracing::debug!(name = self.spec.name, %error, "already gone");
        }
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            tokio::time::sleep(POLL).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Its namespace's removal would end it as well; this way it is reaped.
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait().map(drop)) {
            tracing::debug!(name = self.spec.name, %error, "already gone");
        }
    }
}

fn end_of(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}
