//! Puts the baseline's BPF object at `OUT_DIR/lpm.bpf.o`.

#[path = "../datapath/build/bpf.rs"]
mod bpf;

use std::process::ExitCode;

fn main() -> ExitCode {
    let program = bpf::Program {
        sources: &["build.rs", "../datapath/build", "ebpf"],
        package: "thyra-bench-ebpf",
        name: "thyra-bench-ebpf",
        object: "lpm.bpf.o",
        prebuilt: None,
    };
    bpf::main(&program, |_| ())
}
