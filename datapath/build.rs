//! Puts the BPF object at `OUT_DIR/thyra.bpf.o` and says in `THYRA_BPF_BUILT_BY` where it came from (`build/bpf.rs`).

#[path = "build/bpf.rs"]
mod bpf;

use std::process::ExitCode;

fn main() -> ExitCode {
    let program = bpf::Program {
        sources: &[
            "build.rs",
            "build",
            "Cargo.toml",
            "abi",
            "engine/src",
            "engine/Cargo.toml",
            "ebpf",
        ],
        package: "thyra-datapath-ebpf",
        name: "thyra-ebpf",
        object: "thyra.bpf.o",
        prebuilt: Some("THYRA_BPF_OBJECT"),
    };
    bpf::main(&program, |by| println!("cargo:rustc-env=THYRA_BPF_BUILT_BY={by}"))
}
