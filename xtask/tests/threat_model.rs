//! Every claim of docs/threat-model.md names what holds it, and that exists.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Folders without sources of tests.
const SKIPPED: [&str; 4] = ["target", ".git", "docs", "deploy"];

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        if SKIPPED.iter().any(|skipped| name == *skipped) {
            continue;
        }
        let path = entry.path();
        if entry.file_type().unwrap().is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|end| end == "rs" || end == "toml") {
            found.push(path);
        }
    }
}

/// Functions of tests and names of packet cases.
fn known(root: &Path) -> BTreeSet<String> {
    let mut paths = Vec::new();
    files(root, &mut paths);
    let mut names = BTreeSet::new();
    for path in paths {
        let text = std::fs::read_to_string(&path).unwrap();
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
                is_test = true;
            } else if let Some((_, rest)) = line.split_once("fn ")
                && let Some((name, _)) = rest.split_once('(')
            {
                if std::mem::take(&mut is_test) {
                    names.insert(name.to_owned());
                }
            } else if let Some(name) = line.strip_prefix("name = \"") {
                names.insert(name.trim_end_matches('"').to_owned());
            }
        }
    }
    let scenarios = std::fs::read_dir(root.join("testdata/lab")).unwrap();
    names.extend(scenarios.map(|folder| folder.unwrap().file_name().into_string().unwrap()));
    names
}

#[test]
fn each_claim_of_the_threat_model_names_what_holds_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = std::fs::read_to_string(root.join("docs/threat-model.md")).unwrap();
    let known = known(&root);
    let heads = ["| it tries", "| ---"];
    let rows = page
        .lines()
        .filter(|line| line.starts_with("| ") && !heads.iter().any(|head| line.starts_with(head)));
    let mut count = 0;
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        let names: Vec<&str> = cells.last().unwrap().split('`').skip(1).step_by(2).collect();
        assert!(cells.len() == 3 && !names.is_empty(), "nothing holds: {row}");
        for name in names {
            assert!(
                known.contains(name),
                "no test, scenario or packet is called `{name}`"
            );
            count += 1;
        }
    }
    assert!(count > 50, "{count} names");
}
