//! Puts the baseline's BPF object at `OUT_DIR/lpm.bpf.o`.

#[path = "../datapath/build/bpf.rs"]
mod bpf;

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    for name in bpf::VARIABLES {
        println!("cargo:rerun-if-env-changed={name}");
    }
    let root = env::var_os("CARGO_MANIFEST_DIR")
        .map(PathBuf::from)
        .unwrap_or_default();
    for path in ["build.rs", "../datapath/build", "ebpf"] {
        println!("cargo:rerun-if-changed={}", root.join(path).display());
    }
    let program = bpf::Program {
        root: &root,
        package: "thyra-bench-ebpf",
        name: "thyra-bench-ebpf",
        object: "lpm.bpf.o",
        prebuilt: None,
    };
    match bpf::provide(&program) {
        Ok(_) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("error: {message}");
            ExitCode::FAILURE
        }
    }
}
