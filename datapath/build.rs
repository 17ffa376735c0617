//! Puts the BPF object at `OUT_DIR/thyra.bpf.o` and says in `THYRA_BPF_BUILT_BY` where it came from (`build/bpf.rs`).

#[path = "build/bpf.rs"]
mod bpf;

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    for name in bpf::VARIABLES {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let root = manifest_dir();
    for path in [
        "build.rs",
        "build",
        "Cargo.toml",
        "abi",
        "engine/src",
        "engine/Cargo.toml",
        "ebpf",
    ] {
        println!("cargo:rerun-if-changed={}", root.join(path).display());
    }
    let program = bpf::Program {
        root: &root,
        package: "thyra-datapath-ebpf",
        name: "thyra-ebpf",
        object: "thyra.bpf.o",
        prebuilt: Some("THYRA_BPF_OBJECT"),
    };
    match bpf::provide(&program) {
        Ok(built_by) => {
            println!("cargo:rustc-env=THYRA_BPF_BUILT_BY={built_by}");
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}

fn manifest_dir() -> PathBuf {
    env::var_os("CARGO_MANIFEST_DIR")
        .map(PathBuf::from)
        .unwrap_or_default()
}
