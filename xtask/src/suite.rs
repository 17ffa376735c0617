//! `make test`: every step in order, each on its own feet: one that fails or can't run never hides the ones
//! after it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use crate::{
    bench,
    child::{self, End},
    cluster, contained, demo, envoy, go, kernel, lint, setup,
    step::{Report, Tally},
    tree::Tree,
    verb::Call,
};

/// The longest that all unit and integration tests may take, their build included.
const TESTS_LIMIT: Duration = Duration::from_secs(45 * 60);
/// The longest that one scenario may take; most need seconds.
const SCENARIO_LIMIT: Duration = Duration::from_secs(5 * 60);
/// The longest that the short benchmark may take.
const BENCH_LIMIT: Duration = Duration::from_secs(20 * 60);
/// Where the scenarios are, relative to the root.
const SCENARIOS: &str = "testdata/lab";

/// How many scenarios run at once; each is a node of its own, so they don't meet, but timings suffer from
/// company.
const SCENARIOS_AT_ONCE: usize = 1;
/// The step with the agent as in its container.
const CONTAINED: &str = "lab, contained";
/// The last run's table, under cargo's target folder.
const SUMMARY: &str = "test/summary.txt";

/// What the lab's manifests are fed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ControlPlane {
    Embedded,
    Istiod,
}

/// Runs every step (or those whose name holds one of the arguments), prints the table and, last, `N passed, N
/// failed`.
pub(crate) fn run(call: &Call<'_>) -> Result<ExitCode> {
    let tree = call.tree;
    let mut report = Report::new(on_ci(), call.args);
    report.step("setup", || setup::install().map(|()| Tally::default()));
    report.step("cluster", || build_cluster(tree));
    report.step("envoy", install_envoy);
    for (name, lint) in lint::LINTS {
        report.step(name, || Ok(lint(tree)));
    }
    report.step("tests", || {
        cargo_tests(tree.cargo().args(["test", "--workspace", "--no-fail-fast"]))
    });
    report.step("tests, clsact", || {
        let live = ["test", "-p", "thyra-datapath", "--test", "live"];
        cargo_tests(tree.cargo().args(live).env("THYRA_LIVE_HOOK", "clsact"))
    });
    report.step("tests, pod", || {
        let live = ["test", "-p", "thyra-datapath", "--test", "live"];
        cargo_tests(tree.cargo().args(live).env("THYRA_LIVE_HOOK", "pod"))
    });
    report.step("build", || demo::build(tree).map(|()| Tally::of(true)));
    match scenarios(tree) {
        Ok(scenarios) => {
            let work: Vec<_> = runs(&scenarios).collect();
            let mut names = work.iter().map(|(name, _)| name.as_str()).chain([CONTAINED]);
            // Who asks for a scenario alone means the tree as it is now.
            if !report.selects("build") && names.any(|name| report.selects(name)) {
                demo::build(tree)?;
            }
            report.steps(SCENARIOS_AT_ONCE, &work, |(scenario, plane)| {
                lab(tree, scenario, *plane, |_| ())
            });
            report.step(CONTAINED, || contained::tests(tree));
        }
        Err(error) => report.step("lab", || Err(error)),
    }
    report.step("kernel 6.1", || kernel::tests(tree));
    report.step("bench", || short_bench(tree));
    write_summary(tree, &report)?;
    println!("\n{report}");
    Ok(if report.total().failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Kept for who comes after the output scrolled away; CI shows its last line again.
fn write_summary(tree: &Tree, report: &Report) -> Result<()> {
    let file = tree.target().join(SUMMARY);
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder).with_context(|| format!("can't make `{}`", folder.display()))?;
    }
    fs::write(&file, format!("{report}\n")).with_context(|| format!("can't write `{}`", file.display()))
}

/// Each scenario on the embedded control plane first, which fails faster, then on the real one.
fn runs(scenarios: &[PathBuf]) -> impl Iterator<Item = (String, (PathBuf, ControlPlane))> {
    [ControlPlane::Embedded, ControlPlane::Istiod]
        .into_iter()
        .flat_map(move |plane| {
            scenarios.iter().map(move |scenario| {
                let name = format!("lab {}, {}", name_of(scenario), plane.name());
                (name, (scenario.clone(), plane))
            })
        })
}

impl ControlPlane {
    fn name(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Istiod => "istiod",
        }
    }
}

/// CI systems set `CI`; empty and `false` mean no.
fn on_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| !value.is_empty() && value != "false" && value != "0")
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn build_cluster(tree: &Tree) -> Result<Tally> {
    if let Err(error) = go::obtainable() {
        return Ok(Tally::skip(format!("{error:#}")));
    }
    cluster::build(tree).map(|_| Tally::default())
}

fn install_envoy() -> Result<Tally> {
    if let Err(error) = envoy::obtainable() {
        return Ok(Tally::skip(format!("{error:#}")));
    }
    envoy::install().map(|_| Tally::default())
}

/// Unit, property, golden, tidy and BPF test-run: all that cargo runs.
fn cargo_tests(cargo: &mut Command) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut ignored = 0;
    let end = child::stream(cargo, TESTS_LIMIT, |line| {
        println!("{line}");
        if let Some(result) = TestResult::parse(line) {
            tally.add(Tally::counts(result.passed, result.failed));
            ignored += result.ignored;
        }
    })?;
    if ignored > 0 {
        println!("{ignored} tests are marked ignored and did not run");
    }
    if !is_root() {
        tally
            .skipped
            .push("the tests that load programs into the kernel need root".to_owned());
    }
    match end {
        End::TimedOut => bail!("still running after {} s; ended", TESTS_LIMIT.as_secs()),
        End::Failure(status) if tally.failed == 0 => bail!("no test failed, but cargo did: {status}"),
        End::Failure(_) | End::Success => Ok(tally),
    }
}

/// What the test harness says at the end of each binary.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct TestResult {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    ignored: u64,
}

impl TestResult {
    /// Reads `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; …`.
    pub(crate) fn parse(line: &str) -> Option<Self> {
        let counts = line.strip_prefix("test result: ")?.split_once(". ")?.1;
        let count = |what: &str| {
            counts
                .split(';')
                .find_map(|part| part.trim().strip_suffix(what)?.trim().parse().ok())
        };
        Some(Self {
            passed: count("passed")?,
            failed: count("failed")?,
            ignored: count("ignored")?,
        })
    }
}

/// Every folder of testdata/lab, sorted.
fn scenarios(tree: &Tree) -> Result<Vec<PathBuf>> {
    let folder = tree.root().join(SCENARIOS);
    let entries = fs::read_dir(&folder).with_context(|| format!("can't list `{}`", folder.display()))?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(Path::new(SCENARIOS).join(entry.file_name()));
        }
    }
    if found.is_empty() {
        bail!("no scenario in `{}`", folder.display());
    }
    found.sort();
    Ok(found)
}

fn name_of(scenario: &Path) -> String {
    scenario
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// One scenario on one control plane; its probes are the checks. `with` may give the command more.
pub(crate) fn lab(
    tree: &Tree,
    scenario: &Path,
    control_plane: ControlPlane,
    with: impl FnOnce(&mut Command),
) -> Result<Tally> {
    if !is_root() {
        return Ok(Tally::skip("the lab needs root".to_owned()));
    }
    if control_plane == ControlPlane::Istiod
        && let Err(error) = go::obtainable()
    {
        return Ok(Tally::skip(format!("{error:#}")));
    }
    let mut thyra = demo::thyra(tree);
    thyra.args(["lab", "run"]).arg(scenario).args(["-o", "json"]);
    if control_plane == ControlPlane::Istiod {
        thyra.arg("--istiod");
    }
    with(&mut thyra);
    let mut json = String::new();
    let end = child::stream(&mut thyra, SCENARIO_LIMIT, |line| {
        json.push_str(line);
        json.push('\n');
    })?;
    if end == End::TimedOut {
        bail!("still running after {} s; ended", SCENARIO_LIMIT.as_secs());
    }
    let result: Value = serde_json::from_str(&json)
        .with_context(|| format!("`{}` gave no result: {end:?}", child::shown(&thyra)))?;
    let tally = read_result(&result)?;
    if matches!(end, End::Failure(_)) && tally.failed == 0 {
        bail!("every probe is as expected, but the lab ended with {end:?}");
    }
    Ok(tally)
}

/// Counts a scenario's probes and prints those that are not as expected.
fn read_result(result: &Value) -> Result<Tally> {
    let count = |key: &str| {
        result[key]
            .as_u64()
            .with_context(|| format!("the lab's result has no number `{key}`"))
    };
    let tally = Tally::counts(count("passed")?, count("failed")?);
    for probe in result["probes"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|probe| probe["ok"] != true)
    {
        println!("not as expected: {probe}");
    }
    println!("{} passed, {} failed", tally.passed, tally.failed);
    Ok(tally)
}

fn short_bench(tree: &Tree) -> Result<Tally> {
    if !is_root() {
        return Ok(Tally::skip("the benchmarks need root".to_owned()));
    }
    child::check(&mut bench::build(tree))?;
    let end = child::stream(bench::command(tree)?.arg("--short"), BENCH_LIMIT, |line| {
        println!("{line}")
    })?;
    let faults = bench::faults(tree)?;
    for fault in &faults {
        println!("{fault}");
    }
    let failed = faults
        .iter()
        .filter(|fault| matches!(fault, bench::Fault::Missing(_)))
        .fold(0, |count, _| count + 1);
    if faults.is_empty() && end != End::Success {
        bail!("every figure is good, but the benchmarks ended with {end:?}");
    }
    Ok(Tally::counts(bench::figures() - failed, failed))
}

#[cfg(test)]
mod tests {
    use super::{TestResult, read_result};
    use crate::step::Tally;
    use serde_json::json;

    #[test]
    fn the_harness_is_read_in_success_and_failure() {
        let line =
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.10s";
        assert_eq!(
            TestResult::parse(line),
            Some(TestResult {
                passed: 12,
                failed: 0,
                ignored: 1
            })
        );
        let line = "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(
            TestResult::parse(line),
            Some(TestResult {
                passed: 3,
                failed: 2,
                ignored: 0
            })
        );
        assert_eq!(TestResult::parse("test a_result ... ok"), None);
    }

    #[test]
    fn a_scenario_without_counts_is_no_success() {
        let result = json!({"passed": 4, "failed": 1, "probes": [{"index": 0, "ok": false}]});
        assert_eq!(read_result(&result).expect("it has counts"), Tally::counts(4, 1));
        assert!(read_result(&json!({"probes": []})).is_err());
    }
}
