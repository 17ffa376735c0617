//! A program of the control plane, inside a node.
//!
//! Invariant: what it says goes to a log of its own, and the end of that log is what an error shows.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, bail};

use crate::lab::netns::Netns;

const LOG_LINES: usize = 15;

pub(super) struct Process {
    name: String,
    log: PathBuf,
    child: Child,
}

impl Process {
    /// # Errors
    /// It can't be started.
    pub(super) fn start(
        netns: &Netns,
        folder: &Path,
        name: &str,
        binaries: &Path,
        flags: &[String],
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Self> {
        let suffix = netns.name().rsplit('-').next().unwrap_or_default();
        let log = folder.join(format!("{name}-{suffix}.log"));
        let out = fs::File::create(&log).with_context(|| format!("can't write `{}`", log.display()))?;
        let mut command = Command::new(binaries.join(name));
        command
            .args(flags)
            .envs(environment.iter().copied())
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(out.try_clone().context("can't share the log")?)
            .stderr(out)
            .process_group(0);
        let child = netns.spawn(&mut command).with_context(|| format!("can't start `{name}`"))?;
        Ok(Self { name: name.to_owned(), log, child })
    }

    /// # Errors
    /// It has ended.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        if let Some(status) = self.child.try_wait().context("can't ask for a process's state")? {
            bail!("`{}` ended ({status}):\n{}", self.name, self.last_words());
        }
        Ok(())
    }

    pub(super) fn last_words(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Its namespace's removal would end it as well; this way it is reaped.
        if let Err(error) = self.child.kill().and_then(|()| self.child.wait()) {
            tracing::debug!(name = self.name, %error, "already gone");
        }
    }
}
