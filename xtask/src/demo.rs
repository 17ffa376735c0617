//! `make demo`: from a fresh clone to Istio policies that decide in the kernel, in one command.

use std::{
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::Result;

use crate::{child, setup, tree::Tree, verb::Call};

/// The scenario that the demo shows, relative to the root.
const QUICKSTART: &str = "testdata/lab/quickstart";

/// Shown at the end; each works as it stands in the repository's root.
const TRY_NEXT: &str = "
Try next (as root, here in the repository):
  target/debug/thyra lab up testdata/lab/quickstart     # the same node, and it stays
  target/debug/thyra endpoint list                      # its pods, and whether they are enforced
  target/debug/thyra endpoint policy get shop/cart      # what the kernel holds for it, by rule
  target/debug/thyra lab exec shop/front -- curl -s http://10.244.0.3:8080/     # front may talk to cart
  target/debug/thyra lab exec ops/monitor -- curl -s http://10.244.0.3:8080/    # monitor may not
  target/debug/thyra lab down                           # gone without a trace
  target/debug/thyra lab run testdata/lab/bookinfo      # the mesh of Istio's own tutorial
  make test                                             # the proof, also against a production istiod
";

/// Installs, builds and runs the quickstart; the exit code is the scenario's.
pub(crate) fn run(call: &Call<'_>) -> Result<ExitCode> {
    let started = Instant::now();
    setup::install()?;
    build(call.tree)?;
    println!(
        "demo: ready after {:.0} s; running {QUICKSTART}\n",
        started.elapsed().as_secs_f64()
    );
    let mut lab = thyra(call.tree);
    lab.args(["lab", "run", QUICKSTART]).args(call.args);
    child::check(&mut lab)?;
    println!("{TRY_NEXT}");
    Ok(ExitCode::SUCCESS)
}

/// Builds the two programs that the lab runs.
pub(crate) fn build(tree: &Tree) -> Result<()> {
    println!("build: thyra and thyra-agent");
    child::check(
        tree.cargo()
            .args(["build", "-p", "thyra-cli", "-p", "thyra-agent"]),
    )
}

/// The built `thyra`, started in the root so that scenario paths are relative to it.
pub(crate) fn thyra(tree: &Tree) -> Command {
    let mut thyra = Command::new(tree.target().join("debug/thyra"));
    thyra.current_dir(tree.root());
    thyra
}
