//! `thyra-bench`: the figures that the project promises, as ratios in one run.
//!
//! Invariant: the exit code is 0 only when every promised figure was measured and keeps its goal.

mod added;
mod agent;
mod apply;
mod bpffs;
mod compile;
mod control_plane;
mod flood;
mod growth;
mod l7;
mod live;
mod load;
mod lookup;
mod lpm;
mod mesh;
mod netns;
mod nft;
mod pair;
mod policed;
mod progress;
mod propagation;
mod ratios;
mod redirect;
mod report;
mod stats;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};

use crate::policed::Policed;
use crate::progress::Steps;
use crate::report::{INFORMATION, PROMISES, Promise};
use crate::stats::Estimate;

/// Measures what policy costs, prints a table and writes the results as JSON.
#[derive(Debug, Parser)]
#[command(
    after_help = "Example: thyra-bench --short\nExit code: 0 when every figure keeps its goal, 1 otherwise."
)]
struct Arguments {
    /// Shorter slices and fewer changes, for CI; the number of pairs stays.
    #[arg(long)]
    short: bool,
    /// The agent to measure; by default the one beside this program.
    #[arg(long)]
    agent: Option<PathBuf>,
    /// The stock Envoy that judges L7, and that it is compared with; `make envoy` installs one.
    #[arg(long, default_value = "envoy")]
    envoy: PathBuf,
    /// Only one part, while working on it; the figures of the others are missing, which fails the run.
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Where the results go.
    #[arg(long, default_value = "target/bench/results.json")]
    results: PathBuf,
}

/// A part of the measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Ratios of live traffic to that without programs.
    Traffic,
    /// The same with `--local-redirect`.
    Redirect,
    /// Nanoseconds a packet, by test-run.
    Packets,
    /// From istiod's response to the kernel.
    Propagation,
    /// From a changed policy to the tables of a full node.
    Apply,
    /// The compiler alone.
    Compile,
    /// Verdicts that need L7, beside stock Envoys.
    L7,
}

/// How long things are measured.
struct Effort {
    slice: Duration,
    repeat: u32,
    changes: usize,
}

impl Effort {
    fn of(short: bool) -> Self {
        if short {
            Self {
                slice: Duration::from_millis(300),
                repeat: 100_000,
                changes: 100,
            }
        } else {
            Self {
                slice: Duration::from_secs(1),
                repeat: 1_000_000,
                changes: 400,
            }
        }
    }
}

type Found = Vec<(&'static str, Estimate)>;
/// A measurement that can fail by itself.
type Measurement<'a> = Box<dyn FnOnce() -> Result<Found> + Send + 'a>;

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let effort = Effort::of(arguments.short);
    let agent = match arguments.agent {
        Some(path) => path,
        None => std::env::current_exe()?.with_file_name("thyra-agent"),
    };
    let programs = l7::Programs {
        agent: &agent,
        envoy: &arguments.envoy,
    };
    let steps = Steps::new(all_steps(&effort));
    let picture = arguments.results.with_file_name("compile.svg");
    let mut found = Found::new();
    let wanted = |part| arguments.only.is_none_or(|only| only == part);
    // A part that fails leaves its figures missing, which fails the run; the other parts are still worth
    // having.
    std::thread::scope(|scope| {
        let mut parts: Vec<(&str, Measurement<'_>)> = Vec::new();
        if wanted(Part::Traffic) || wanted(Part::Packets) {
            let node = || on_policed_node(&wanted, &effort, &steps);
            parts.push(("traffic and packets", Box::new(node)));
        }
        if wanted(Part::Packets) {
            parts.push(("look-up", Box::new(|| lookup::measure(effort.repeat, &steps))));
        }
        if wanted(Part::Redirect) {
            parts.push(("redirect", Box::new(|| redirect::measure(effort.slice, &steps))));
        }
        if wanted(Part::Propagation) {
            let propagation = || propagation::measure(&agent, effort.changes, &steps);
            parts.push(("propagation", Box::new(propagation)));
        }
        if wanted(Part::Apply) {
            parts.push(("apply", Box::new(|| apply::measure(effort.changes, &steps))));
        }
        if wanted(Part::Compile) {
            let compile = || compile::measure(&picture, &steps);
            parts.push(("compile", Box::new(compile)));
        }
        if wanted(Part::L7) {
            let l7 = || l7::measure(programs, effort.slice, &steps);
            parts.push(("L7", Box::new(l7)));
        }
        for (name, part) in parts {
            // A thread of its own, since it moves into a network namespace.
            match scope.spawn(part).join() {
                Ok(Ok(figures)) => found.extend(figures),
                Ok(Err(error)) => eprintln!("{name}: {error:#}"),
                Err(_) => eprintln!("{name}: panicked"),
            }
        }
    });
    drop(steps);
    tell(&found, &arguments.results)
}

/// Prints the table and writes the results; whether every promise is kept.
fn tell(found: &Found, results: &Path) -> Result<ExitCode> {
    let commit = commit();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let line = |promise: &Promise| {
        let estimate = found
            .iter()
            .find(|(name, _)| *name == promise.name)
            .map(|(_, e)| *e);
        report::figure(promise, estimate, &commit, cpus)
    };
    let promised: Vec<_> = PROMISES.iter().map(line).collect();
    let all: Vec<_> = promised
        .iter()
        .cloned()
        .chain(INFORMATION.iter().map(line))
        .collect();
    print!("{}", report::table(&all));
    report::write(results, &all).with_context(|| format!("write `{}`", results.display()))?;
    Ok(if report::all_hold(&promised) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Steps of all parts together.
const fn all_steps(effort: &Effort) -> usize {
    ratios::steps()
        + redirect::steps()
        + live::steps()
        + added::steps()
        + lookup::steps()
        + propagation::steps(effort.changes)
        + apply::steps(effort.changes)
        + compile::steps()
        + l7::steps()
}

fn on_policed_node(wanted: &(dyn Fn(Part) -> bool + Sync), effort: &Effort, steps: &Steps) -> Result<Found> {
    let mut policed = Policed::new("policed", false)?;
    policed.attach()?;
    let mut found = Found::new();
    if wanted(Part::Traffic) {
        found.extend(ratios::measure(&mut policed, effort.slice, steps)?);
        found.extend(live::measure(&mut policed, effort.slice, steps)?);
    }
    if wanted(Part::Packets) {
        found.extend(added::measure(&policed, effort.repeat, steps)?);
    }
    Ok(found)
}

/// The commit that is measured, `unknown` outside a checkout.
fn commit() -> String {
    let output = Command::new("git")
        .args(["rev-parse", "--short", "HEAD"])
        .output();
    output.ok().filter(|o| o.status.success()).map_or_else(
        || "unknown".to_owned(),
        |o| String::from_utf8_lossy(&o.stdout).trim().to_owned(),
    )
}
