//! Builds BPF objects for build scripts: the shipped one's, and that of the benchmarks' baseline.
//!
//! Three ways: `THYRA_BPF_OBJECT=<path>` takes a prebuilt object (as the shipped one), `THYRA_BPF=stub` builds without
//! (an empty file, for checks and docs), else it is built here. `BPF_TOOLCHAIN` picks the compiler: `nightly` (rustup,
//! with rust-src), `system` (the distribution's cargo, rustc and library source) or a toolchain that rustup knows;
//! unset, the first of `nightly` and `system` that has the library source.
//!
//! Invariant: nothing of the outer build's compiler, flags or target directory reaches the inner one.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const TARGET: &str = "bpfel-unknown-none";
/// The outer build's settings that would break the inner one.
const FOREIGN: &[&str] = &[
    "CARGO",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
    "RUSTC",
    "RUSTC_LINKER",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTDOC",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

/// What is read from the environment.
const VARIABLES: [&str; 4] = ["BPF_TOOLCHAIN", "THYRA_BPF", "THYRA_BPF_OBJECT", "PATH"];

/// What to build: a package's only program.
pub(crate) struct Program<'a> {
    /// What it is built from, beside the build script's folder.
    pub(crate) sources: &'a [&'a str],
    /// Package.
    pub(crate) package: &'a str,
    /// Its program.
    pub(crate) name: &'a str,
    /// The object's file name in `OUT_DIR`.
    pub(crate) object: &'a str,
    /// Which environment variable may name a prebuilt one.
    pub(crate) prebuilt: Option<&'a str>,
}

impl Program<'_> {
    fn prebuilt(&self) -> Option<PathBuf> {
        let path = env::var_os(self.prebuilt?)?;
        (!path.is_empty()).then(|| PathBuf::from(path))
    }
}

/// All that a build script does. `built`: told what built the object, for people.
pub(crate) fn main(program: &Program<'_>, built: impl FnOnce(&str)) -> ExitCode {
    for name in VARIABLES {
        println!("cargo:rerun-if-env-changed={name}");
    }
    for path in program.sources {
        println!("cargo:rerun-if-changed={}", root().join(path).display());
    }
    match provide(program) {
        Ok(by) => {
            built(&by);
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

/// The folder of the package that the script belongs to.
fn root() -> PathBuf {
    env::var_os("CARGO_MANIFEST_DIR")
        .map(PathBuf::from)
        .unwrap_or_default()
}

/// Puts the object at its place; what built it.
fn provide(program: &Program<'_>) -> Result<String, String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    let object = out.join(program.object);
    if let Some(path) = program.prebuilt() {
        println!("cargo:rerun-if-changed={}", path.display());
        copy(&path, &object)?;
        return Ok(format!("prebuilt object {}", path.display()));
    }
    match env::var("THYRA_BPF").as_deref() {
        Ok("stub") => {
            std::fs::write(&object, []).map_err(|e| format!("write `{}`: {e}", object.display()))?;
            println!("cargo:warning=built without BPF programs (THYRA_BPF=stub)");
            return Ok("nothing (THYRA_BPF=stub)".to_owned());
        }
        Ok(other) if !other.is_empty() => {
            return Err(format!("`THYRA_BPF={other}`: the only value is `stub`"));
        }
        _ => {}
    }
    let toolchain = Toolchain::pick()?;
    let built = build(program, &out, &toolchain)?;
    copy(&built, &object)?;
    Ok(toolchain.name)
}

/// A cargo and rustc that can build `core` for the BPF target.
struct Toolchain {
    /// What a person reads.
    name: String,
    /// The first words of its `cargo` command line.
    cargo: Vec<String>,
    /// Its compiler, where cargo would not find it by itself.
    rustc: Option<String>,
}

impl Toolchain {
    fn pick() -> Result<Self, String> {
        match env::var("BPF_TOOLCHAIN").ok().filter(|t| !t.is_empty()).as_deref() {
            Some("system") => Self::system(),
            Some(name) => Self::rustup(name),
            None => Self::rustup("nightly").or_else(|nightly| {
                Self::system().map_err(|system| {
                    format!(
                        "no toolchain can build the BPF programs: {nightly}; {system}; install one of them, or set \
                         `THYRA_BPF=stub` to build without"
                    )
                })
            }),
        }
    }

    fn system() -> Result<Self, String> {
        let version = library("/usr/bin/rustc", &[]).map_err(|e| {
            format!("`system`: {e} (Debian: `apt-get install rustc-web cargo-web rust-web-src`)")
        })?;
        if !Path::new("/usr/bin/cargo").exists() {
            return Err("`system`: no `/usr/bin/cargo` (Debian: `apt-get install cargo-web`)".to_owned());
        }
        Ok(Self {
            name: format!("system {version}"),
            cargo: vec!["/usr/bin/cargo".to_owned()],
            rustc: Some("/usr/bin/rustc".to_owned()),
        })
    }

    fn rustup(toolchain: &str) -> Result<Self, String> {
        let version = library("rustup", &["run", toolchain, "rustc"]).map_err(|e| {
            format!("`{toolchain}`: {e} (`rustup toolchain install {toolchain} -c rust-src`)")
        })?;
        Ok(Self {
            name: format!("{toolchain} {version}"),
            cargo: ["rustup", "run", toolchain, "cargo"].map(str::to_owned).to_vec(),
            rustc: None,
        })
    }
}

/// The version of a compiler that has the library source beside it.
fn library(program: &str, words: &[&str]) -> Result<String, String> {
    let run = |last: &[&str]| {
        let mut command = Command::new(program);
        FOREIGN.iter().for_each(|name| {
            command.env_remove(name);
        });
        let output = command
            .args(words)
            .args(last)
            .output()
            .map_err(|e| format!("`{program}` does not run: {e}"))?;
        if !output.status.success() {
            return Err(format!("`{program} {}` fails", words.join(" ")));
        }
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let source = PathBuf::from(run(&["--print", "sysroot"])?).join("lib/rustlib/src/rust/library/core");
    if !source.exists() {
        return Err("its library source is missing".to_owned());
    }
    run(&["--version"])
}

fn build(what: &Program<'_>, out: &Path, toolchain: &Toolchain) -> Result<PathBuf, String> {
    let (program, words) = toolchain.cargo.split_first().ok_or("a toolchain has a cargo")?;
    let target_dir = out.join("bpf");
    let arch = env::var("CARGO_CFG_TARGET_ARCH").map_err(|_| "cargo sets CARGO_CFG_TARGET_ARCH")?;
    let flags = [
        &format!("--cfg=bpf_target_arch=\"{arch}\""),
        "-Cdebuginfo=2",
        "-Clink-arg=--btf",
        // Atomic operations that return a value, 32-bit compare and jump.
        "-Ctarget-cpu=v3",
    ];
    let mut command = Command::new(program);
    FOREIGN.iter().for_each(|name| {
        command.env_remove(name);
    });
    if let Some(rustc) = &toolchain.rustc {
        command.env("RUSTC", rustc);
    }
    command
        .args(words)
        .args([
            "build",
            "--locked",
            "--release",
            "--package",
            what.package,
            "--bins",
        ])
        .args(["--target", TARGET, "-Zbuild-std=core", "--target-dir"])
        .arg(&target_dir)
        .current_dir(root())
        .env("PATH", search_path())
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        // A stable compiler takes nightly options only so; a nightly one doesn't mind.
        .env("RUSTC_BOOTSTRAP", "1");
    let status = command
        .status()
        .map_err(|e| format!("`{program}` does not run: {e}"))?;
    if !status.success() {
        return Err(format!(
            "the BPF programs don't build with {} (is `bpf-linker` 0.13 installed? see above)",
            toolchain.name
        ));
    }
    Ok(target_dir.join(TARGET).join("release").join(what.name))
}

/// `PATH` with cargo's own program folder, where `bpf-linker` is installed, at its end.
fn search_path() -> std::ffi::OsString {
    let path = env::var_os("PATH").unwrap_or_default();
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
    let folders = env::split_paths(&path).chain(home.map(|home| home.join("bin")));
    env::join_paths(folders).unwrap_or(path)
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    // Removed first: a copy of a read-only object can't be overwritten.
    if let Err(e) = std::fs::remove_file(to)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        return Err(format!("remove `{}`: {e}", to.display()));
    }
    std::fs::copy(from, to)
        .map(drop)
        .map_err(|e| format!("copy `{}`: {e}", from.display()))
}
