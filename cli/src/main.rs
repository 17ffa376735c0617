//! The `thyra` command: shows and explains what the agent enforces, and builds the lab.
//!
//! Invariant: this file only names the commands; each lives in a file of its own.

mod bpf;
mod client;
mod datapath;
mod dry_run;
mod endpoint;
mod flows;
mod histogram;
mod identity;
mod lab;
mod monitor;
mod output;
mod policy;
mod requests;
mod status;
mod verdict;
mod version;

use std::future::Future;
use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser};

use crate::client::Agent;
use crate::output::{Format, Output};

/// Istio identity policy at the door of every pod, enforced in the kernel.
#[derive(Parser)]
#[command(name = "thyra", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// The pods of this node, and what policy says of each
    Endpoint(Group<endpoint::Command>),
    /// Who is known, and at which addresses
    Identity(Group<identity::Command>),
    /// The policies that the agent holds; the check of files
    Policy(Group<policy::Command>),
    /// Whether this node enforces what it should; exit code 1 when not
    Status(Single<status::Args>),
    /// Events as they happen
    Monitor(Single<monitor::Args>),
    /// TCP connections and what was refused, with bytes, packets and latency; histograms by pair of identities
    Flows(Single<flows::Args>),
    /// What Envoy judged: requests by pair of identities and by rule, with their durations
    Requests(Single<requests::Args>),
    /// What policy says of a connection, from files or from the agent
    DryRun(Box<Single<dry_run::Args>>),
    /// What this machine can do, what is missing, and which flags the agent wants
    Preflight(Single<datapath::Preflight>),
    /// The programs and maps that are pinned on this machine
    Datapath(Group<datapath::Command>),
    /// What the kernel's maps hold beside the tables: connections that are judged once
    Bpf(Group<bpf::Command>),
    /// The streams to istiod
    Xds(Group<status::Xds>),
    /// A whole node on this machine, out of network namespaces
    Lab(lab::Args),
    /// Versions of command and agent
    Version(Single<Nothing>),
    /// The completion script of a shell
    #[command(after_help = "Example: source <(thyra completion bash)")]
    Completion {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// A command with commands of its own, and the options that they share.
#[derive(clap::Args)]
struct Group<C: clap::Subcommand> {
    #[command(flatten)]
    agent: Agent,
    #[command(flatten)]
    output: Output,
    #[command(subcommand)]
    command: C,
}

/// A command by itself.
#[derive(clap::Args)]
struct Single<A: clap::Args> {
    #[command(flatten)]
    agent: Agent,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    arguments: A,
}

/// A command without options of its own.
#[derive(clap::Args)]
struct Nothing {}

impl<C: clap::Subcommand> Group<C> {
    fn run<F: Future<Output = Result<ExitCode>>>(self, run: impl FnOnce(C, Agent, Format) -> F) -> ExitCode {
        finish(run(self.command, self.agent, self.output.output))
    }
}

impl<A: clap::Args> Single<A> {
    fn run<F: Future<Output = Result<ExitCode>>>(self, run: impl FnOnce(A, Agent, Format) -> F) -> ExitCode {
        finish(run(self.arguments, self.agent, self.output.output))
    }
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Endpoint(group) => group.run(endpoint::run),
        Command::Identity(group) => group.run(identity::run),
        Command::Policy(group) => group.run(policy::run),
        Command::Status(single) => single.run(status::run),
        Command::Flows(single) => single.run(flows::run),
        Command::Requests(single) => single.run(requests::run),
        Command::Monitor(single) => single.run(monitor::run),
        Command::DryRun(single) => single.run(dry_run::run),
        Command::Preflight(single) => single.run(datapath::preflight),
        Command::Datapath(group) => group.run(datapath::run),
        Command::Bpf(group) => group.run(bpf::run),
        Command::Xds(group) => group.run(status::xds),
        Command::Lab(args) => lab::main(args),
        Command::Version(single) => single.run(|Nothing {}, agent, format| version::run(agent, format)),
        Command::Completion { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "thyra", &mut std::io::stdout());
            ExitCode::SUCCESS
        }
    }
}

/// Runs a command to its end; an error goes to stderr with its causes.
fn finish(command: impl Future<Output = Result<ExitCode>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(command))
    {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
