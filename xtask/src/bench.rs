//! `make bench`: runs the benchmarks and insists that every figure is there; a figure that is missing is a
//! failure.

use std::{fs, process::Command, process::ExitCode};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{child, envoy, setup, tree::Tree, verb::Call};

/// Where the benchmarks put their figures, under cargo's target folder.
const RESULTS: &str = "bench/results.json";
/// The figures that every run must give; later readers compare them by these names.
const FIGURES: &[&str] = &[
    "rr_ratio",
    "crr_ratio",
    "stream_ratio",
    "rr_vs_nft",
    "crr_vs_nft",
    "stream_vs_nft",
    "rr_vs_lpm",
    "crr_vs_lpm",
    "stream_vs_lpm",
    "flood_established",
    "flood_new",
    "added_ns_inbound",
    "added_ns_inbound_100k",
    "added_ns_own",
    "added_ns_reply",
    "live_ns_per_packet",
    "new_flow_ratio",
    "map_mib",
    "agent_rss_mib",
    "apply_p99_ms",
    "apply_split_p99_ms",
    "propagation_p99_ms",
    "compile_full_ms",
    "compile_peak_mib",
    "compile_policy_ms",
    "inline_rps_ratio",
    "l4_beside_l7_ratio",
    "hold_rps_ratio",
    "hold_first_us",
    "p99_pair_mtls_vs_l4",
    "p99_pair_vs_l4",
    "p99_pair_vs_hold",
    "p99_pair_vs_inline",
    "envoy_idle_mb",
    "envoy_100_pods_mb",
    "listener_active_ms",
];

/// Runs the benchmarks with the arguments given.
pub(crate) fn run(call: &Call<'_>) -> Result<ExitCode> {
    setup::install()?;
    child::check(&mut build(call.tree))?;
    child::check(command(call.tree)?.args(call.args))?;
    let faults = faults(call.tree)?;
    for fault in &faults {
        println!("bench: {fault}");
    }
    Ok(if faults.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Builds what is measured: optimised, since nobody ships the other.
pub(crate) fn build(tree: &Tree) -> Command {
    let mut cargo = tree.cargo();
    cargo.args([
        "build",
        "--release",
        "-p",
        "thyra-bench",
        "-p",
        "thyra-agent",
        "-p",
        "thyra-cli",
    ]);
    cargo
}

/// The benchmarks themselves, with the stock Envoy that tests have.
///
/// # Errors
/// There is no Envoy for this machine.
pub(crate) fn command(tree: &Tree) -> Result<Command> {
    let mut bench = Command::new(tree.target().join("release/thyra-bench"));
    bench
        .current_dir(tree.root())
        .arg("--envoy")
        .arg(envoy::install()?)
        .arg("--results")
        .arg(tree.target().join(RESULTS));
    Ok(bench)
}

/// A promised figure that is absent, or not what it should be, with the words for it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It was not measured.
    Missing(String),
    /// It was, and misses its goal: a machine with company may be to blame, so only `make bench` fails by it.
    Goal(String),
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing(text) | Self::Goal(text) => f.write_str(text),
        }
    }
}

/// What is wrong with the last run's figures.
///
/// # Errors
/// The results can't be read at all.
pub(crate) fn faults(tree: &Tree) -> Result<Vec<Fault>> {
    let file = tree.target().join(RESULTS);
    let text = fs::read(&file).with_context(|| format!("the benchmarks left no `{}`", file.display()))?;
    let results: Value =
        serde_json::from_slice(&text).with_context(|| format!("`{}` is no JSON", file.display()))?;
    Ok(FIGURES.iter().filter_map(|name| fault(&results, name)).collect())
}

/// How many figures a run must give.
pub(crate) fn figures() -> u64 {
    FIGURES.iter().fold(0, |count, _| count + 1)
}

fn fault(results: &Value, name: &str) -> Option<Fault> {
    let figure = results
        .as_array()
        .and_then(|list| list.iter().find(|figure| figure["name"] == *name));
    let Some(figure) = figure else {
        return Some(Fault::Missing(format!("`{name}` is missing")));
    };
    if !figure["value"].is_number() {
        return Some(Fault::Missing(format!("`{name}` has no value")));
    }
    if figure["ok"] != true {
        let (value, unit, goal) = (
            &figure["value"],
            figure["unit"].as_str().unwrap_or(""),
            &figure["goal"],
        );
        let ci95 = &figure["ci95"];
        let op = figure["op"].as_str().unwrap_or("");
        return Some(Fault::Goal(format!(
            "`{name}` is {value} {unit} (95 %: {ci95}), should be {op} {goal}"
        )));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{Fault, fault};
    use serde_json::json;

    #[test]
    fn a_missing_figure_is_a_fault() {
        for results in [json!([]), json!([{"name": "rr_ratio", "ok": true}])] {
            assert!(matches!(fault(&results, "rr_ratio"), Some(Fault::Missing(_))));
        }
    }

    #[test]
    fn only_a_figure_that_meets_its_goal_is_no_fault() {
        let figure =
            |ok| json!([{"name": "rr_ratio", "value": 0.9, "unit": "", "op": ">=", "goal": 0.95, "ok": ok}]);
        assert_eq!(fault(&figure(true), "rr_ratio"), None);
        let Some(Fault::Goal(said)) = fault(&figure(false), "rr_ratio") else {
            panic!("0.9 is under 0.95");
        };
        assert!(said.contains("0.9") && said.contains(">= 0.95"), "{said}");
    }
}
