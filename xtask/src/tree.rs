//! The source tree: its root, its files and its cargo; build output and git's own folder are never part of
//! it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

/// Folders that hold no source, by name, at any depth.
const NOT_SOURCE: &[&str] = &["target", ".git", "node_modules"];

/// The repository's root folder and what can be asked about it.
pub struct Tree {
    root: PathBuf,
}

impl Tree {
    /// The tree that this program was compiled from.
    ///
    /// # Errors
    /// The folder is gone, for example because the tree moved after the build.
    pub fn find() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
        let root = manifest
            .parent()
            .context("xtask's manifest has no parent folder")?;
        ensure!(
            root.join("Cargo.toml").is_file(),
            "no workspace at `{}`; run cargo clean",
            root.display()
        );
        Ok(Self {
            root: root.to_path_buf(),
        })
    }

    /// A tree at another place: a copy, or one that a test made.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_path_buf(),
        }
    }

    /// The root folder, absolute.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Every source file, as paths relative to the root, sorted.
    ///
    /// # Errors
    /// A folder that can't be read.
    pub fn files(&self) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        self.collect(Path::new(""), &mut found)?;
        found.sort();
        Ok(found)
    }

    /// The text of a file named relative to the root; `None` when it isn't UTF-8.
    ///
    /// # Errors
    /// The file can't be read.
    pub fn text(&self, file: &Path) -> Result<Option<String>> {
        let bytes =
            fs::read(self.root.join(file)).with_context(|| format!("can't read `{}`", file.display()))?;
        Ok(String::from_utf8(bytes).ok())
    }

    /// cargo, started in the root.
    pub(crate) fn cargo(&self) -> Command {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.current_dir(&self.root);
        cargo
    }

    /// Where cargo puts what it builds.
    pub(crate) fn target(&self) -> PathBuf {
        std::env::var_os("CARGO_TARGET_DIR")
            .map_or_else(|| self.root.join("target"), |dir| self.root.join(dir))
    }

    fn collect(&self, folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
        let absolute = self.root.join(folder);
        let entries =
            fs::read_dir(&absolute).with_context(|| format!("can't list `{}`", absolute.display()))?;
        for entry in entries {
            let entry = entry?;
            let path = folder.join(entry.file_name());
            let kind = entry.file_type()?;
            if kind.is_file() {
                found.push(path);
            } else if kind.is_dir() && !NOT_SOURCE.iter().any(|name| entry.file_name() == *name) {
                self.collect(&path, found)?;
            }
        }
        Ok(())
    }
}
