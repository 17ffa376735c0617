//! Documents: every link leads to a file of the tree, and no text names a path of somebody's machine.

use std::path::{Component, Path, PathBuf};

use super::{Finding, Source};
use crate::tree::Tree;

/// Homes and workplaces, in halves so that this file doesn't find itself; nothing of the kind exists
/// elsewhere.
const MACHINE_PATHS: &[&str] = &[
    concat!("/ho", "me/"),
    concat!("/ro", "ot/"),
    concat!("/wo", "rk/"),
    concat!("/Use", "rs/"),
];

/// Every rule for all documents, and machine paths for every text file.
pub(super) fn check(tree: &Tree, sources: &[Source]) -> Vec<Finding> {
    let mut findings: Vec<_> = sources.iter().flat_map(machine_paths).collect();
    for source in sources.iter().filter(|source| source.is_markdown()) {
        findings.extend(links(tree.root(), source));
    }
    findings
}

fn machine_paths(source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in source.text.lines().enumerate() {
        for path in MACHINE_PATHS.iter().filter(|path| names_path(line, path)) {
            findings.push(Finding::new(
                &source.file,
                index + 1,
                format!("names `{path}…`, a path of one machine; drop it"),
            ));
        }
    }
    findings
}

/// At the start of a path only: `/var/root/` and `https://x/home/` are something else.
fn names_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        !line[..at].ends_with(|before: char| before.is_alphanumeric() || "._-~}>/".contains(before))
    })
}

fn links(root: &Path, source: &Source) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut in_code = false;
    for (index, line) in source.text.lines().enumerate() {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        if in_code {
            continue;
        }
        for target in targets(line) {
            if let Some(what) = broken(root, &source.file, target) {
                findings.push(Finding::new(&source.file, index + 1, what));
            }
        }
    }
    findings
}

/// What stands in `[text](here)`.
fn targets(line: &str) -> Vec<&str> {
    line.split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')').map(|(target, _)| target))
        .collect()
}

fn broken(root: &Path, file: &Path, target: &str) -> Option<String> {
    let path = target.split(['#', ' ']).next().unwrap_or_default();
    if path.is_empty() || path.contains("://") || path.starts_with("mailto:") {
        return None;
    }
    let folder = file.parent().unwrap_or(Path::new(""));
    let Some(inside) = normal(&folder.join(path)) else {
        return Some(format!("the link `{target}` leaves the tree"));
    };
    (!root.join(&inside).exists())
        .then(|| format!("the link `{target}` leads nowhere: no `{}`", inside.display()))
}

/// The path without `.` and `..`; `None` when it leaves the tree.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => normal.push(name),
            Component::CurDir => {}
            Component::ParentDir => {
                if !normal.pop() {
                    return None;
                }
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(normal)
}

#[cfg(test)]
mod tests {
    use super::{Path, Source, broken, links, machine_paths};
    use crate::tree::Tree;

    #[test]
    fn a_link_to_nothing_is_found() {
        let tree = Tree::find().expect("the tree is there");
        let from = Path::new("docs/design/x.md");
        assert_eq!(broken(tree.root(), from, "../../Cargo.toml#members"), None);
        assert_eq!(broken(tree.root(), from, "https://example.com/x"), None);
        assert_eq!(broken(tree.root(), from, "#heading"), None);
        assert!(
            broken(tree.root(), from, "absent.md").is_some_and(|what| what.contains("docs/design/absent.md"))
        );
        assert!(broken(tree.root(), from, "../../../x").is_some_and(|what| what.contains("leaves")));
    }

    #[test]
    fn links_in_code_blocks_are_not_links() {
        let text = "see [a](b.md) and\n```\n[c](d.md)\n```\n".to_owned();
        assert_eq!(
            links(
                Path::new("nowhere"),
                &Source {
                    file: "x.md".into(),
                    text
                }
            )
            .len(),
            1
        );
    }

    #[test]
    fn a_path_of_one_machine_is_found() {
        let text = |text: String| {
            machine_paths(&Source {
                file: "x.md".into(),
                text,
            })
            .len()
        };
        assert_eq!(text(format!("see `{}me/x`", "/ho")), 1);
        assert_eq!(text(format!("https://example.com{}me/x", "/ho")), 0);
    }
}
