//! Dead files: a source file that no `mod`, path or `include!` names is compiled by nobody and rots.

use std::path::{Path, PathBuf};

use super::{Finding, Source};

/// Folders whose files are crate roots by cargo's own rules.
const ROOT_FOLDERS: &[&str] = &["tests", "benches", "examples", "bin", "fuzz_targets"];

/// Every Rust file that nothing names.
pub(super) fn check(sources: &[Source]) -> Vec<Finding> {
    let rust: Vec<_> = sources.iter().filter(|source| source.is_rust()).collect();
    let dead = rust
        .iter()
        .filter(|source| !is_crate_root(&source.file) && !is_named(source, &rust));
    dead.map(|source| Finding::new(&source.file, 0, "no `mod` names this file; name it or remove it"))
        .collect()
}

fn is_crate_root(file: &Path) -> bool {
    let name = file
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let folder = file
        .parent()
        .and_then(Path::file_name)
        .map(|name| name.to_string_lossy().into_owned());
    ["lib.rs", "main.rs", "build.rs"].contains(&name.as_str())
        || folder.is_some_and(|folder| ROOT_FOLDERS.contains(&folder.as_str()))
}

/// Named by its parent module, or by a string in any file beside or above it.
fn is_named(source: &Source, rust: &[&Source]) -> bool {
    let (Some(folder), Some(stem), Some(name)) = (
        source.file.parent(),
        source.file.file_stem(),
        source.file.file_name(),
    ) else {
        return false;
    };
    let (stem, name) = (stem.to_string_lossy(), name.to_string_lossy());
    let parents = parents_of(folder);
    rust.iter().any(|other| {
        let declares = parents.contains(&other.file) && other.text.lines().any(|line| declares(line, &stem));
        let beside = other.file.parent().is_some_and(|above| folder.starts_with(above));
        declares || (beside && other.file != source.file && names_in_string(&other.text, &name, &stem))
    })
}

/// `include!("x.rs")`, or `include_proto!("x")` and its kin.
fn names_in_string(text: &str, name: &str, stem: &str) -> bool {
    text.contains(&format!("{name}\"")) || text.contains(&format!("!(\"{stem}\")"))
}

/// The files that may hold the `mod` lines of a folder's files.
fn parents_of(folder: &Path) -> Vec<PathBuf> {
    let mut parents = vec![
        folder.join("lib.rs"),
        folder.join("main.rs"),
        folder.join("mod.rs"),
        folder.with_extension("rs"),
    ];
    // Inline modules: `mod a { mod b; }` in the parent's parent.
    parents.extend(folder.parent().map(|above| above.join("lib.rs")));
    parents
}

/// `pub(crate) mod name;` or `mod name;`.
fn declares(line: &str, name: &str) -> bool {
    let Some(words) = line.trim().strip_suffix(';') else {
        return false;
    };
    let mut words = words.split_whitespace().rev();
    words.next() == Some(name) && words.next() == Some("mod")
}

#[cfg(test)]
mod tests {
    use super::{Source, check};

    fn dead(files: &[(&str, &str)]) -> Vec<String> {
        let sources: Vec<_> = files
            .iter()
            .map(|(file, text)| Source {
                file: file.into(),
                text: (*text).to_owned(),
            })
            .collect();
        check(&sources)
            .into_iter()
            .map(|finding| finding.file.display().to_string())
            .collect()
    }

    #[test]
    fn a_file_that_no_mod_names_is_dead() {
        assert_eq!(
            dead(&[
                ("a/src/lib.rs", "pub(crate) mod b;"),
                ("a/src/b.rs", ""),
                ("a/src/c.rs", "")
            ]),
            ["a/src/c.rs"]
        );
        assert_eq!(
            dead(&[("a/src/lib.rs", "// mod b"), ("a/src/b.rs", "")]),
            ["a/src/b.rs"]
        );
    }

    #[test]
    fn children_are_named_by_their_own_parent() {
        let files = [
            ("a/src/lib.rs", "mod b;\nmod d;"),
            ("a/src/b.rs", "mod c;"),
            ("a/src/b/c.rs", ""),
            ("a/src/b/d.rs", ""),
        ];
        let found = dead(&files);
        assert!(!found.contains(&"a/src/b/c.rs".to_owned()), "{found:?}");
    }

    #[test]
    fn an_included_file_and_a_crate_root_are_alive() {
        let files = [
            ("a/src/lib.rs", "include!(\"generated/x.rs\");"),
            ("a/src/generated/x.rs", ""),
            ("a/tests/t.rs", ""),
        ];
        assert_eq!(dead(&files), [""; 0]);
    }
}
