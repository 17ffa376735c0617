//! The figures, as a table for people and as `target/bench/results.json` for machines.
//!
//! Invariant: every promised figure is listed; one that could not be measured is a failure, never left out.

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;

use crate::stats::Estimate;

/// Which side of the goal is good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    /// At least the goal.
    AtLeast,
    /// At most the goal.
    AtMost,
}

/// A promised figure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Promise {
    /// Fixed name.
    pub(crate) name: &'static str,
    /// Unit of value and goal.
    pub(crate) unit: &'static str,
    /// Direction of the goal.
    pub(crate) op: Op,
    /// The goal.
    pub(crate) goal: f64,
    /// What it is compared with.
    pub(crate) baseline: &'static str,
}

/// Every figure that a run owes, in the order of the table.
pub(crate) const PROMISES: &[Promise] = &[
    at_least("rr_ratio", 0.97, "no program"),
    at_least("crr_ratio", 0.97, "no program"),
    at_least("stream_ratio", 0.97, "no program"),
    at_least("rr_vs_nft", 1.0, "nftables with conntrack"),
    at_least("crr_vs_nft", 1.0, "nftables with conntrack"),
    at_least("stream_vs_nft", 1.0, "nftables with conntrack"),
    at_least("rr_vs_lpm", 1.0, "an LPM trie and hash tables"),
    at_least("crr_vs_lpm", 1.0, "an LPM trie and hash tables"),
    at_least("stream_vs_lpm", 1.0, "an LPM trie and hash tables"),
    at_least("flood_established", 0.98, "a flooded pod without policy"),
    at_least("flood_new", 0.95, "a flooded pod without policy"),
    at_most("added_ns_inbound", "ns/packet", 10.0, "an empty program"),
    at_most("added_ns_inbound_100k", "ns/packet", 25.0, "an empty program"),
    at_most("added_ns_own", "ns/packet", 35.0, "an empty program"),
    at_most("added_ns_reply", "ns/packet", 35.0, "an empty program"),
    at_most("live_ns_per_packet", "ns/packet", 15.0, "an empty program"),
    at_most("new_flow_ratio", "ratio", 1.2, "one flow"),
    at_most("map_mib", "MiB", 64.0, "none"),
    at_most("agent_rss_mib", "MiB", 60.0, "none"),
    at_most("apply_p99_ms", "ms", 5.0, "none"),
    at_most("apply_split_p99_ms", "ms", 30.0, "none"),
    at_most("propagation_p99_ms", "ms", 20.0, "none"),
    at_most("compile_full_ms", "ms", 1_000.0, "none"),
    at_most("compile_peak_mib", "MiB", 200.0, "none"),
    at_most("compile_policy_ms", "ms", 3.0, "none"),
    at_least("inline_rps_ratio", 0.95, "Envoy as a reverse proxy"),
    at_least("l4_beside_l7_ratio", 0.97, "no program"),
    at_least("hold_rps_ratio", 0.95, "no program"),
    at_most("hold_first_us", "µs", 200.0, "no program"),
    at_least("p99_pair_mtls_vs_l4", 4.0, "two sidecars with mTLS, ÷ ours"),
    at_least("p99_pair_vs_l4", 3.0, "two sidecars, ÷ ours"),
    at_least("p99_pair_vs_hold", 2.5, "two sidecars, ÷ ours"),
    at_least("p99_pair_vs_inline", 1.5, "two sidecars, ÷ ours"),
    at_most("envoy_idle_mb", "MB", 80.0, "none"),
    at_most("envoy_100_pods_mb", "MB", 10.0, "Envoy with two pods"),
    at_most("listener_active_ms", "ms", 50.0, "none"),
];

/// Figures that are printed without a goal of this list's own.
pub(crate) const INFORMATION: &[Promise] = &[
    at_least("crr_watched_ratio", 0.95, "no program"),
    at_least("rr_redirect", 1.10, "no program"),
    at_least("crr_redirect", 1.05, "no program"),
    at_least("stream_redirect", 1.05, "no program"),
    at_most("apply_words", "words", 64.0, "none"),
    at_most("added_ns_syn_in", "ns/packet", 150.0, "an empty program"),
    at_most("added_ns_syn_own", "ns/packet", 300.0, "an empty program"),
    at_most("added_ns_fin_in", "ns/packet", 50.0, "an empty program"),
    at_most("added_ns_fin_own", "ns/packet", 100.0, "an empty program"),
    at_most("compile_added_us", "µs", 100.0, "none"),
    at_most("compile_removed_us", "µs", 100.0, "none"),
    at_most("propagation_split_p99_ms", "ms", 40.0, "none"),
];

const fn at_least(name: &'static str, goal: f64, baseline: &'static str) -> Promise {
    Promise {
        name,
        unit: "ratio",
        op: Op::AtLeast,
        goal,
        baseline,
    }
}

const fn at_most(name: &'static str, unit: &'static str, goal: f64, baseline: &'static str) -> Promise {
    Promise {
        name,
        unit,
        op: Op::AtMost,
        goal,
        baseline,
    }
}

/// One line of the results.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figure {
    name: &'static str,
    value: Option<f64>,
    unit: &'static str,
    op: &'static str,
    goal: f64,
    ok: bool,
    baseline: &'static str,
    n: usize,
    ci95: Option<[f64; 2]>,
    commit: String,
    cpus: usize,
}

/// Whether an estimate keeps its promise: by the worse end of its interval.
#[must_use]
pub(crate) fn holds(promise: &Promise, estimate: Option<&Estimate>) -> bool {
    estimate.is_some_and(|e| match promise.op {
        Op::AtLeast => e.low >= promise.goal,
        Op::AtMost => e.high <= promise.goal,
    })
}

/// The line for a promise.
#[must_use]
pub(crate) fn figure(promise: &Promise, estimate: Option<Estimate>, commit: &str, cpus: usize) -> Figure {
    Figure {
        name: promise.name,
        value: estimate.map(|e| e.value),
        unit: promise.unit,
        op: match promise.op {
            Op::AtLeast => ">=",
            Op::AtMost => "<=",
        },
        goal: promise.goal,
        ok: holds(promise, estimate.as_ref()),
        baseline: promise.baseline,
        n: estimate.map_or(0, |e| e.n),
        ci95: estimate.map(|e| [e.low, e.high]),
        commit: commit.to_owned(),
        cpus,
    }
}

/// The table.
#[must_use]
pub(crate) fn table(figures: &[Figure]) -> String {
    let mut text = format!(
        "{:<26} {:>10}  {:<22} {:>9}  {:>4}  ok\n",
        "figure", "value", "95 %", "goal", "n"
    );
    for f in figures {
        let value = f
            .value
            .map_or_else(|| "missing".to_owned(), |v| format!("{v:.3}"));
        let interval = f
            .ci95
            .map_or_else(String::new, |[low, high]| format!("{low:.3} to {high:.3}"));
        let goal = format!("{} {}", f.op, f.goal);
        let ok = if f.ok { "yes" } else { "NO" };
        writeln!(
            text,
            "{:<26} {value:>10}  {interval:<22} {goal:>9}  {:>4}  {ok}  {}",
            f.name, f.n, f.unit
        )
        .expect("a String takes every write");
    }
    text
}

/// Writes the figures as JSON; the folder is made where missing.
///
/// # Errors
/// When the folder or the file can't be written.
pub(crate) fn write(path: &Path, figures: &[Figure]) -> anyhow::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, serde_json::to_string_pretty(figures)? + "\n")?;
    Ok(())
}

/// Whether all figures keep their promise.
#[must_use]
pub(crate) fn all_hold(figures: &[Figure]) -> bool {
    figures.iter().all(|f| f.ok)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(low: f64, value: f64, high: f64) -> Estimate {
        Estimate {
            value,
            low,
            high,
            n: 15,
        }
    }

    #[test]
    fn the_worse_end_of_the_interval_decides() {
        let ratio = at_least("r", 0.95, "x");
        assert!(holds(&ratio, Some(&estimate(0.95, 0.97, 0.99))));
        assert!(!holds(&ratio, Some(&estimate(0.94, 0.97, 0.99))));
        let time = at_most("t", "ns", 15.0, "x");
        assert!(holds(&time, Some(&estimate(9.0, 10.0, 15.0))));
        assert!(!holds(&time, Some(&estimate(9.0, 10.0, 15.1))));
    }

    #[test]
    fn a_missing_figure_is_listed_and_fails() {
        let line = figure(&PROMISES[0], None, "abc", 2);
        assert!(!line.ok && line.value.is_none());
        assert!(table(&[line]).contains("missing"));
    }
}
