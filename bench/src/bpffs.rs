//! A BPF file system of this run's own, gone when dropped.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A mounted bpffs.
pub(crate) struct Bpffs {
    folder: tempfile::TempDir,
    mounted: PathBuf,
}

impl Bpffs {
    /// Mounts one below a temporary folder.
    ///
    /// # Errors
    /// Without root, or on a kernel without bpffs.
    pub(crate) fn mount() -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("thyra-bench-").tempdir()?;
        let mounted = folder.path().join("bpf");
        std::fs::create_dir(&mounted)?;
        let status = Command::new("mount")
            .args(["-t", "bpf", "bpf"])
            .arg(&mounted)
            .status()
            .context("run `mount`")?;
        if !status.success() {
            bail!(
                "a BPF file system can't be mounted at `{}`; is this root?",
                mounted.display()
            );
        }
        Ok(Self { folder, mounted })
    }

    /// The mount point.
    #[must_use]
    pub(crate) fn path(&self) -> &Path {
        &self.mounted
    }

    /// A folder for plain files beside it.
    #[must_use]
    pub(crate) fn files(&self) -> &Path {
        self.folder.path()
    }

    /// The pin whose file name holds `part`, anywhere below the mount point.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn find(&self, part: &str) -> Result<PathBuf> {
        find(&self.mounted, part)
            .with_context(|| format!("no pin named `…{part}…` below `{}`", self.mounted.display()))
    }
}

fn find(folder: &Path, part: &str) -> Option<PathBuf> {
    let entries: Vec<PathBuf> = std::fs::read_dir(folder)
        .ok()?
        .filter_map(|e| Some(e.ok()?.path()))
        .collect();
    let named = entries
        .iter()
        .find(|p| p.file_name().is_some_and(|n| n.to_string_lossy().contains(part)));
    named
        .cloned()
        .or_else(|| entries.iter().filter(|p| p.is_dir()).find_map(|p| find(p, part)))
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        // A lazy unmount can't fail for a reason that anything here could mend.
        drop(Command::new("umount").arg("-l").arg(&self.mounted).status());
    }
}
