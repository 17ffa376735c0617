//! The Go that builds the control plane: the machine's own when it is new enough, else one from the Go module
//! proxy.
//!
//! Nothing is installed beside the package manager and Go's own module cache, which checks what it fetches.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::child;

/// What the modules in testdata/cluster ask for.
const OLDEST: (u32, u32) = (1, 26);
/// Fetched when the machine's Go is older.
const TOOLCHAIN: &str = "golang.org/toolchain@v0.0.1-go1.26.8.linux-amd64";
/// Where Go's own installer puts it, for when PATH doesn't know.
const INSTALLED: &str = "/usr/local/go/bin/go";

/// A Go that is new enough, without installing anything.
pub(crate) fn find() -> Option<PathBuf> {
    let own = ["go", INSTALLED].into_iter().map(PathBuf::from);
    own.chain(fetched())
        .find(|go| version(go).is_some_and(|version| version >= OLDEST))
}

/// Whether `find_or_install` has a chance, and why not.
///
/// # Errors
/// What to install by hand.
pub(crate) fn obtainable() -> Result<()> {
    if find().is_some() || version(Path::new("go")).is_some() || can_install() {
        return Ok(());
    }
    bail!("building the control plane needs Go 1.26 or newer; install it from https://go.dev/dl")
}

/// A Go that is new enough; what is missing is installed, said line by line.
///
/// # Errors
/// No Go and no way to get one, with what to install by hand.
pub(crate) fn find_or_install() -> Result<PathBuf> {
    if let Some(go) = find() {
        return Ok(go);
    }
    obtainable()?;
    if version(Path::new("go")).is_none() {
        println!("go: apt-get install golang-go");
        let mut apt = Command::new("apt-get");
        apt.env("DEBIAN_FRONTEND", "noninteractive");
        child::check(apt.args([
            "install",
            "-y",
            "-q",
            "--no-install-recommends",
            "golang-go",
            "ca-certificates",
        ]))?;
    }
    println!("go: the machine's is too old for the control plane; fetching {TOOLCHAIN}");
    fetch()?;
    find().context("the fetched Go doesn't run; install Go 1.26 or newer from https://go.dev/dl")
}

fn can_install() -> bool {
    rustix::process::geteuid().is_root() && Path::new("/usr/bin/apt-get").exists()
}

/// Where `fetch` leaves the toolchain.
fn fetched() -> Option<PathBuf> {
    let cache = child::output(Command::new("go").args(["env", "GOMODCACHE"])).ok()?;
    Some(PathBuf::from(cache).join(TOOLCHAIN).join("bin/go"))
}

/// A toolchain is a module like any other, checked against the checksum database; only its execute bits are
/// missing.
fn fetch() -> Result<()> {
    let mut download = Command::new("go");
    download
        .args(["mod", "download", "-json", TOOLCHAIN])
        .env("GOFLAGS", "-mod=mod");
    let answer: Value = serde_json::from_str(&child::output(&mut download)?).context("go wrote no JSON")?;
    let folder = Path::new(
        answer["Dir"]
            .as_str()
            .context("go names no folder for the toolchain")?,
    );
    for programs in ["bin", "pkg/tool/linux_amd64"] {
        let entries = fs::read_dir(folder.join(programs));
        // From 1.25 on, most tools are built when they are first used.
        for entry in entries.into_iter().flatten() {
            fs::set_permissions(entry?.path(), fs::Permissions::from_mode(0o555))?;
        }
    }
    Ok(())
}

fn version(go: &Path) -> Option<(u32, u32)> {
    // `local`: what it is, not what it would fetch to please a go.mod.
    let text = child::output(
        Command::new(go)
            .args(["env", "GOVERSION"])
            .env("GOTOOLCHAIN", "local"),
    )
    .ok()?;
    parse(&text)
}

/// `go1.26.8` → (1, 26).
fn parse(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.strip_prefix("go")?.split(['.', '-', 'r', 'b', ' ']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::{OLDEST, parse};

    #[test]
    fn go_versions_are_compared_as_numbers() {
        assert_eq!(parse("go1.26.8"), Some(OLDEST));
        assert_eq!(parse("go1.27rc1"), Some((1, 27)));
        assert_eq!(parse("devel"), None);
        assert!(parse("go1.9").expect("a version") < OLDEST);
    }
}
