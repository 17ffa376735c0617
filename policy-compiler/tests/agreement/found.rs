//! Random worlds, one after the other; what fails is made small, kept as a file, and tried first ever after.
//!
//! Invariant: a kept file is the entropy of one world under the name of the test that it failed.

use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressStyle};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseResult, TestError, TestRunner};

/// Bytes that make a world and what is asked of it.
const ENTROPY: std::ops::Range<usize> = 5000..10_000;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/policy/found")
}

/// Runs `check` on everything that was kept under `name`, then on so many random worlds.
pub(crate) fn run(name: &str, worlds: u32, check: impl Fn(&[u8]) -> TestCaseResult) {
    for (path, bytes) in kept(name) {
        if let Err(failure) = check(&bytes) {
            panic!("{}: {failure}", path.display());
        }
    }
    let mut runner = TestRunner::new(Config {
        cases: worlds,
        failure_persistence: None,
        max_shrink_iters: 4000,
        ..Config::default()
    });
    let bar = bar(name, worlds);
    let result = runner.run(&prop::collection::vec(any::<u8>(), ENTROPY), |bytes| {
        bar.inc(1);
        check(&bytes)
    });
    bar.finish_and_clear();
    match result {
        Ok(()) => {}
        Err(TestError::Fail(reason, bytes)) => {
            let path = keep(name, &bytes);
            panic!("{reason}\nkept as {}", path.display());
        }
        Err(TestError::Abort(reason)) => panic!("{reason}"),
    }
}

fn kept(name: &str) -> Vec<(PathBuf, Vec<u8>)> {
    // Nothing was ever found: there is no folder.
    let Ok(entries) = std::fs::read_dir(folder()) else {
        return Vec::new();
    };
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let of_test = |path: &PathBuf| {
        let file = path.file_name().unwrap().to_string_lossy();
        file.strip_prefix(name).is_some_and(|rest| rest.starts_with('-'))
    };
    let of_test = files.into_iter().filter(of_test);
    of_test
        .map(|path| {
            let bytes = std::fs::read(&path).unwrap();
            (path, bytes)
        })
        .collect()
}

/// Named by its content (FNV-1a), so that one mistake makes one file.
fn keep(name: &str, bytes: &[u8]) -> PathBuf {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let path = folder().join(format!("{name}-{hash:016x}"));
    // A tree that can't be written still fails by the reason.
    if std::fs::create_dir_all(folder()).is_ok() {
        let _full = std::fs::write(&path, bytes);
    }
    path
}

/// On long runs, to stderr.
fn bar(name: &str, worlds: u32) -> ProgressBar {
    if std::env::var_os("THYRA_PROP_PROGRESS").is_none() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} worlds, {eta} left: {msg}").unwrap();
    ProgressBar::new(u64::from(worlds))
        .with_style(style)
        .with_message(name.to_owned())
}
