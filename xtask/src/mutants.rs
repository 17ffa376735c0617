//! `make mutants`: seeded mistakes of the compiler, each of which the tests must catch.
//!
//! Invariant: the tree itself is never touched; a mutant that no longer applies or compiles is a failure, as one that
//! survives.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{child, tree::Tree, verb::Call};

/// Where the mutants are, one patch each.
const FOLDER: &str = "policy-compiler/tests/mutants";
/// The tests that are to catch them.
const TESTS: &[&str] = &[
    "--lib",
    "--test",
    "agreement",
    "--test",
    "statements",
    "--test",
    "short_way",
];
/// Random worlds for each; a mistake shows in far fewer.
const WORLDS: &str = "200";

/// Runs all mutants, or those whose names hold one of the arguments.
pub(crate) fn run(call: &Call<'_>) -> Result<ExitCode> {
    let place = call.tree.target().join("mutants");
    let copy = place.join("tree");
    copy_tree(call.tree, &copy)?;
    let mutants = mutants(call)?;
    ensure!(!mutants.is_empty(), "no mutant in `{FOLDER}` has such a name");
    let healthy = caught(&copy, &place)?;
    ensure!(
        healthy.is_empty(),
        "without a mutant these tests fail: {}",
        healthy.join(", ")
    );
    let mut survivors = 0;
    for (at, mutant) in mutants.iter().enumerate() {
        let name = mutant
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        apply(&copy, mutant, false)?;
        let tests = caught(&copy, &place);
        apply(&copy, mutant, true)?;
        let tests = tests.with_context(|| format!("mutant `{name}`"))?;
        let told = if tests.is_empty() {
            survivors += 1;
            "SURVIVES".to_owned()
        } else {
            tests.join(", ")
        };
        println!("[{:>2}/{}] {name:<44} {told}", at + 1, mutants.len());
    }
    println!(
        "mutants: {} of {} caught",
        mutants.len() - survivors,
        mutants.len()
    );
    Ok(if survivors == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn mutants(call: &Call<'_>) -> Result<Vec<PathBuf>> {
    let folder = call.tree.root().join(FOLDER);
    let mut found = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("read `{}`", folder.display()))? {
        let path = entry?.path();
        let name = path.to_string_lossy().into_owned();
        if name.ends_with(".patch")
            && (call.args.is_empty() || call.args.iter().any(|arg| name.contains(arg)))
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Copies what differs, so that the next run builds little.
fn copy_tree(tree: &Tree, copy: &Path) -> Result<()> {
    for file in tree.files()? {
        let (from, to) = (tree.root().join(&file), copy.join(&file));
        let content = fs::read(&from).with_context(|| format!("read `{}`", from.display()))?;
        if fs::read(&to).is_ok_and(|known| known == content) {
            continue;
        }
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&to, content).with_context(|| format!("write `{}`", to.display()))?;
    }
    Ok(())
}

/// Puts a mistake into the copy, or takes it out again.
fn apply(copy: &Path, patch: &Path, reverse: bool) -> Result<()> {
    let mut git = Command::new("git");
    // The copy lies in a repository that must not take part.
    git.current_dir(copy)
        .env("GIT_CEILING_DIRECTORIES", copy.parent().unwrap_or(copy));
    git.arg("apply");
    if reverse {
        git.arg("--reverse");
    }
    let output = git.arg(patch).output().context("can't start `git`")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` does not apply any more: {}", patch.display(), said.trim());
    }
    Ok(())
}

/// Names of the tests that fail in the copy.
fn caught(copy: &Path, place: &Path) -> Result<Vec<String>> {
    let cargo = || {
        let mut cargo = Tree::at(copy).cargo();
        cargo
            .env("CARGO_TARGET_DIR", place.join("target"))
            .env("THYRA_PROP_CASES", WORLDS)
            // What a mistake leaves unused is no news.
            .env("RUSTFLAGS", "-Awarnings")
            .args(["test", "-q", "-p", "thyra-policy-compiler"])
            .args(TESTS);
        cargo
    };
    child::check(cargo().arg("--no-run")).context("it does not compile")?;
    let output = cargo()
        .args(["--no-fail-fast", "--", "--format", "pretty"])
        .output()
        .context("can't start cargo")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let failed = text.lines().filter_map(|line| {
        let name = line.strip_prefix("test ")?.strip_suffix(" ... FAILED")?;
        Some(name.to_owned())
    });
    let failed: Vec<String> = failed.collect();
    ensure!(
        output.status.success() || !failed.is_empty(),
        "the tests did not run: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(failed)
}
