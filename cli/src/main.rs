//! The `thyra` command: shows and explains what the agent enforces, and builds the lab.
//!
//! Invariant: this file only names the commands; each lives in a file of its own.

mod lab;

use std::process::ExitCode;

use clap::Parser;

/// Istio identity policy at the door of every pod, enforced in the kernel.
#[derive(Parser)]
#[command(name = "thyra", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// A whole node on this machine, out of network namespaces.
    Lab(lab::Args),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Lab(args) => lab::main(args),
    }
}
