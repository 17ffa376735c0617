//! Every manifest under testdata/lab is read without error, and makes a world.

use std::path::{Path, PathBuf};

use thyra_policy_compiler::manifest::{self, Manifests};
use thyra_policy_compiler::world::NodeOptions;

fn entries(of: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(of).unwrap_or_else(|error| panic!("{}: {error}", of.display()));
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry of the folder").path())
        .collect();
    paths.sort();
    paths
}

fn read(path: &Path) -> Manifests {
    let read = manifest::read_dir(path).unwrap_or_else(|errors| panic!("{errors:#?}"));
    assert!(!read.objects.is_empty(), "{}", path.display());
    read
}

#[test]
fn the_labs_manifests_are_good() {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/lab");
    let scenarios: Vec<PathBuf> = entries(&lab).into_iter().filter(|path| path.is_dir()).collect();
    assert!(!scenarios.is_empty(), "no scenarios in {}", lab.display());
    for scenario in scenarios {
        let before = read(&scenario.join("manifests"));
        let world = manifest::world(&before, NodeOptions::default());
        world.unwrap_or_else(|error| panic!("{}: {error}", scenario.display()));
        // What is applied later is read file by file: two of them may hold versions of one object.
        let later = scenario.join("later");
        let files = if later.is_dir() {
            entries(&later)
        } else {
            Vec::new()
        };
        for file in files {
            let mut after = before.clone();
            after.apply(read(&file));
            let world = manifest::world(&after, NodeOptions::default());
            world.unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        }
    }
}

#[test]
fn each_mistake_has_its_place_and_its_mend() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/policy-errors");
    for file in entries(&folder) {
        let text =
            std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let want = text.lines().next().and_then(|line| line.strip_prefix("# error "));
        let want = want.unwrap_or_else(|| panic!("{}: the first line must be `# error …`", file.display()));
        let errors = manifest::read_dir(&file).map(|_| ()).expect_err("a mistake");
        assert_eq!(errors[0].to_string(), format!("{}:{want}", file.display()));
        assert_eq!(errors.len(), 1, "{errors:#?}");
    }
}
