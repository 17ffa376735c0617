//! `make setup`: installs what building and running need, only what is missing, and says each step.
//!
//! It needs nothing but cargo, a C linker and apt: it runs before anything that needs the BPF toolchain is
//! compiled.

use std::{path::Path, process::Command, process::ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::{child, verb::Call};

/// Debian's packages and what each is for.
const PACKAGES: &[Package] = &[
    (
        "rustc-web",
        "a compiler with its library's source, for the BPF target",
    ),
    ("cargo-web", "the cargo that goes with it"),
    ("rust-web-src", "the source of `core`, built for the BPF target"),
    ("llvm-22-dev", "LLVM with the BPF back end, for bpf-linker"),
    ("libpolly-22-dev", "linked by LLVM's static libraries"),
    ("zlib1g-dev", "linked by LLVM's static libraries"),
    ("libzstd-dev", "linked by LLVM's static libraries"),
    ("nftables", "the lab's Services"),
    ("iproute2", "the lab's namespaces and veths"),
    ("conntrack", "looking at the node's connections"),
    ("curl", "the clients of the demo"),
    ("jq", "reading JSON results by hand"),
    ("make", "the verbs"),
    ("gcc", "the linker that cargo calls, and C in dependencies"),
];

/// Links the BPF programs; this version reads the bitcode of the compiler above.
const LINKER_VERSION: &str = "0.13.0";
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";
/// What the lint verb calls and a minimal toolchain lacks.
const COMPONENTS: &[Component] = &[
    Component {
        name: "clippy",
        subcommand: "clippy",
        package: "rust-web-clippy",
    },
    Component {
        name: "rustfmt",
        subcommand: "fmt",
        package: "rustfmt-web",
    },
];

/// A part of the Rust toolchain.
struct Component {
    /// rustup's name for it.
    name: &'static str,
    subcommand: &'static str,
    /// Debian's name for it, for machines without rustup.
    package: &'static str,
}

/// Installs what is missing.
pub(crate) fn run(_: &Call<'_>) -> Result<ExitCode> {
    install()?;
    Ok(ExitCode::SUCCESS)
}

/// Installs what is missing; one line when nothing is.
///
/// # Errors
/// A step that failed, or one that can't be done here, with what to do by hand.
pub(crate) fn install() -> Result<()> {
    let mut done = install_packages(PACKAGES)?;
    done |= install_components()?;
    done |= install_linker()?;
    println!("setup: {}", if done { "done" } else { "nothing is missing" });
    Ok(())
}

/// A Debian package and what it is for.
pub(crate) type Package = (&'static str, &'static str);

/// Installs what is missing of `packages`; whether anything was.
pub(crate) fn install_packages(packages: &'static [Package]) -> Result<bool> {
    if !Path::new("/usr/bin/dpkg-query").exists() {
        return on_another_distribution();
    }
    let missing: Vec<_> = missing_packages(packages)?;
    if missing.is_empty() {
        return Ok(false);
    }
    println!("setup: missing packages:");
    for (package, purpose) in &missing {
        println!("  {package:<16} {purpose}");
    }
    let names: Vec<_> = missing.iter().map(|(package, _)| *package).collect();
    if !rustix::process::geteuid().is_root() {
        bail!(
            "installing packages needs root; run as root: apt-get install {}",
            names.join(" ")
        );
    }
    println!("setup: apt-get update");
    child::check(apt().args(["update", "-q"]))?;
    println!("setup: apt-get install {}", names.join(" "));
    child::check(
        apt()
            .args(["install", "-y", "-q", "--no-install-recommends"])
            .args(&names),
    )
    .context("Debian 12 and newer have these packages; elsewhere install what they hold by hand")?;
    Ok(true)
}

fn apt() -> Command {
    let mut apt = Command::new("apt-get");
    apt.env("DEBIAN_FRONTEND", "noninteractive");
    apt
}

/// The packages that dpkg doesn't know as installed.
fn missing_packages(packages: &'static [Package]) -> Result<Vec<&'static Package>> {
    let mut query = Command::new("dpkg-query");
    query.args(["-W", "-f", "${Package} ${db:Status-Status}\n"]);
    let known = child::output(&mut query)?;
    let installed: Vec<_> = known
        .lines()
        .filter_map(|line| line.strip_suffix(" installed"))
        .collect();
    Ok(packages
        .iter()
        .filter(|(package, _)| !installed.contains(package))
        .collect())
}

/// Without dpkg nothing is installed for the user; what can be seen to be missing is named.
fn on_another_distribution() -> Result<bool> {
    let absent: Vec<_> = ["ip", "nft", "gcc"]
        .into_iter()
        .filter(|tool| !child::succeeds(Command::new("which").arg(tool)))
        .collect();
    println!("setup: not a Debian; install by hand, if missing, what these Debian packages hold:");
    for (package, purpose) in PACKAGES {
        println!("  {package:<16} {purpose}");
    }
    println!("setup: rustup's nightly with rust-src serves instead of the three rust packages");
    if !absent.is_empty() {
        bail!("missing here: {}", absent.join(", "));
    }
    Ok(false)
}

fn install_components() -> Result<bool> {
    let mut done = false;
    for component in COMPONENTS {
        let Component {
            name,
            subcommand,
            package,
        } = component;
        if child::succeeds(Command::new("cargo").args([*subcommand, "--version"])) {
            continue;
        }
        if child::succeeds(Command::new("rustup").arg("--version")) {
            println!("setup: rustup component add {name}");
            child::check(Command::new("rustup").args(["component", "add", name]))?;
        } else {
            println!("setup: apt-get install {package}");
            child::check(apt().args(["install", "-y", "-q", "--no-install-recommends", package]))
                .with_context(|| format!("install `{name}` the way this machine's Rust was installed"))?;
        }
        done = true;
    }
    Ok(done)
}

fn install_linker() -> Result<bool> {
    let version = child::output(Command::new("bpf-linker").arg("--version")).unwrap_or_default();
    if version.split_whitespace().last() == Some(LINKER_VERSION) {
        return Ok(false);
    }
    if !Path::new(LLVM_PREFIX).is_dir() {
        bail!("bpf-linker {LINKER_VERSION} needs LLVM 22 in `{LLVM_PREFIX}`; install it by hand");
    }
    let found = if version.is_empty() {
        "none here".to_owned()
    } else {
        format!("here is `{version}`")
    };
    println!("setup: cargo install bpf-linker {LINKER_VERSION} (about a minute; {found})");
    let mut install = Command::new("cargo");
    install.args([
        "install",
        "bpf-linker",
        "--version",
        LINKER_VERSION,
        "--locked",
        "--force",
    ]);
    install
        .args(["--no-default-features", "--features", "llvm-22"])
        .env("LLVM_PREFIX", LLVM_PREFIX);
    // The workspace's own target folder stays free of it.
    install.env_remove("CARGO_TARGET_DIR");
    child::check(&mut install)?;
    Ok(true)
}
