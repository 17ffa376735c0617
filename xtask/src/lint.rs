//! `make lint`: formatting, clippy and licences; a warning is a failure here.

use std::process::{Command, ExitCode};

use anyhow::Result;

use crate::{child, step::Tally, tree::Tree, verb::Call};

/// A lint: its name and what runs it.
pub(crate) type Lint = (&'static str, fn(&Tree) -> Tally);

/// Every lint, in order of cost.
pub(crate) const LINTS: &[Lint] = &[("rustfmt", rustfmt), ("clippy", clippy), ("cargo deny", deny)];

/// Runs every lint and says which failed.
pub(crate) fn run(call: &Call<'_>) -> Result<ExitCode> {
    let mut failed = 0;
    for (name, lint) in LINTS {
        println!("==> {name}");
        failed += lint(call.tree).failed;
    }
    println!("lint: {failed} failed");
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn rustfmt(tree: &Tree) -> Tally {
    outcome(tree.cargo().args(["fmt", "--all", "--check"]))
}

fn clippy(tree: &Tree) -> Tally {
    outcome(tree.cargo().args([
        "clippy",
        "-q",
        "--workspace",
        "--all-targets",
        "--",
        "-D",
        "warnings",
    ]))
}

fn outcome(command: &mut Command) -> Tally {
    let checked = child::check(command);
    if let Err(error) = &checked {
        println!("{error:#}");
    }
    Tally::of(checked.is_ok())
}

/// The tidy test checks licences and sources by itself; cargo-deny adds advisories where somebody installed
/// it.
fn deny(tree: &Tree) -> Tally {
    if !child::succeeds(tree.cargo().args(["deny", "--version"])) {
        println!("cargo-deny is not installed (cargo install cargo-deny): advisories are not checked;");
        println!("licences, sources and bans are, by the tidy test, from the same deny.toml");
        return Tally::default();
    }
    outcome(tree.cargo().args(["deny", "check"]))
}
