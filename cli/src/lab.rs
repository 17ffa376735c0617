//! `thyra lab`: a whole node out of network namespaces, with its control plane, its agents and its probes.
//!
//! Invariant: the machine's own network is never touched, and whatever a lab made is found again and removed
//! by its id.

mod agent;
mod cluster;
mod command;
mod control_plane;
mod embedded;
mod model;
mod netns;
mod object;
mod probe;
mod process;
pub(crate) mod registry;
mod report;
mod running;
mod scenario;
mod server;
mod services;
mod supervisor;
mod topology;
mod verdict;
mod yaml;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

/// A whole node on this machine: pods, Services, control plane and agent, for trying policies without a
/// cluster.
///
/// Needs root. Exit codes: 0 everything as expected, 1 not, 2 a mistake in the input.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  thyra lab run testdata/lab/quickstart")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Bring a scenario up, run its probes, print what came of them, take it down
    Run(RunArgs),
    /// Bring a scenario up and leave it running
    Up(UpArgs),
    /// Apply manifests to a lab that runs; returns when they are enforced
    Apply(ChangeArgs),
    /// Delete what manifests name from a lab that runs; returns when that is enforced
    Delete(ChangeArgs),
    /// Run a command inside a pod, the node (`host`) or the world outside (`outside`)
    Exec(ExecArgs),
    /// Take a lab down, whatever became of its process
    Down(DownArgs),
    /// List the labs that run
    List,
    /// Keeps a lab up in the background
    #[command(hide = true)]
    Supervise(SuperviseArgs),
    /// Removes a lab when its process is gone
    #[command(hide = true)]
    Janitor { id: String },
}

/// What a lab is made of.
#[derive(clap::Args, Clone)]
struct Choices {
    /// Scenario folder: manifests/, scenario.yaml, probes.yaml
    folder: PathBuf,
    /// A production istiod and kube-apiserver instead of the embedded control plane (built by `make cluster`)
    #[arg(long)]
    istiod: bool,
    /// The network, Services and servers alone
    #[arg(long, hide = true, conflicts_with = "istiod")]
    no_agent: bool,
}

#[derive(clap::Args)]
struct RunArgs {
    #[command(flatten)]
    choices: Choices,
    /// How to print the results; json is alone on stdout
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

#[derive(clap::Args)]
struct UpArgs {
    #[command(flatten)]
    choices: Choices,
}

#[derive(clap::Args)]
struct SuperviseArgs {
    id: String,
    #[command(flatten)]
    choices: Choices,
}

#[derive(clap::Args)]
struct ChangeArgs {
    /// Manifest files; `-` is standard input
    #[arg(short = 'f', long = "file", required = true)]
    files: Vec<PathBuf>,
    /// Id or scenario of the lab, where more than one runs
    #[arg(long)]
    lab: Option<String>,
}

#[derive(clap::Args)]
struct ExecArgs {
    /// namespace/pod, host or outside
    place: String,
    /// Id or scenario of the lab, where more than one runs
    #[arg(long)]
    lab: Option<String>,
    /// What to run
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

#[derive(clap::Args)]
struct DownArgs {
    /// Id or scenario of the lab, where more than one runs
    name: Option<String>,
    /// Every lab
    #[arg(long, conflicts_with = "name")]
    all: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    Table,
    Json,
}

/// A mistake of the user's: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct BadInput(String);

pub(crate) fn main(args: Args) -> ExitCode {
    let done = match args.command {
        Command::Run(args) => command::run(&args.choices, args.output == Output::Json),
        Command::Up(args) => supervisor::up(&args.choices),
        Command::Apply(args) => supervisor::change(&args, false),
        Command::Delete(args) => supervisor::change(&args, true),
        Command::Exec(args) => command::exec(&args),
        Command::Down(args) => command::down(&args),
        Command::List => command::list(),
        Command::Supervise(args) => supervisor::supervise(&args.id, &args.choices),
        Command::Janitor { id } => command::janitor(&id),
    };
    match done {
        Ok(code) => code,
        Err(error) if error.is::<BadInput>() || error.is::<scenario::ScenarioError>() => {
            complain(&format!("{error:#}"));
            ExitCode::from(2)
        }
        Err(error) => {
            complain(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// What happens, on stderr; a closed one is nobody listening.
fn progress(text: &str) {
    complain(text);
}

fn complain(text: &str) {
    if writeln!(std::io::stderr(), "{text}").is_err() {
        tracing::debug!(text, "nobody listens on stderr");
    }
}
