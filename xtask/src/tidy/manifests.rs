//! The workspace's manifests: each member inherits the lint table (or lifts `unsafe_code` where it may) and
//! names its licence.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use toml::{Table, Value};

use super::Finding;
use crate::tree::Tree;

/// The only members with lint tables of their own: loading programs and being one can't be done without
/// `unsafe`.
const MAY_BE_UNSAFE: &[&str] = &["datapath", "datapath/ebpf", "bench/ebpf"];
/// Linked into both sides, so free for both.
const BOTH_SIDES: &[&str] = &["datapath/abi", "datapath/engine"];

/// A member's manifest.
pub(super) struct Manifest {
    /// The member's folder, as the workspace names it.
    pub(super) member: String,
    pub(super) table: Table,
}

impl Manifest {
    pub(super) fn file(&self) -> PathBuf {
        Path::new(&self.member).join("Cargo.toml")
    }

    /// The package's name.
    pub(super) fn name(&self) -> &str {
        self.package("name").unwrap_or_default()
    }

    /// The names in all tables of a kind, `[target.….KIND]` too.
    pub(super) fn dependencies(&self, kind: &str) -> Vec<&str> {
        let targets = self.table.get("target").and_then(Value::as_table);
        let of_targets = targets
            .into_iter()
            .flat_map(|targets| targets.values())
            .filter_map(Value::as_table);
        let tables = std::iter::once(&self.table).chain(of_targets);
        tables
            .filter_map(|table| table.get(kind)?.as_table())
            .flat_map(Table::keys)
            .map(String::as_str)
            .collect()
    }

    fn package(&self, key: &str) -> Option<&str> {
        self.table.get("package")?.get(key)?.as_str()
    }
}

/// Every member's manifest, in the workspace's order.
pub(super) fn read(tree: &Tree) -> Result<Vec<Manifest>> {
    let root = parse(tree, Path::new("Cargo.toml"))?;
    let members = root
        .get("workspace")
        .and_then(|workspace| workspace.get("members"))
        .and_then(Value::as_array);
    let members = members.context("the root manifest lists no members")?;
    members
        .iter()
        .map(|member| {
            let member = member.as_str().context("a member is not a string")?.to_owned();
            let table = parse(tree, &Path::new(&member).join("Cargo.toml"))?;
            Ok(Manifest { member, table })
        })
        .collect()
}

/// Lints and licences of all members.
pub(super) fn check(tree: &Tree, manifests: &[Manifest]) -> Vec<Finding> {
    let mut findings: Vec<_> = manifests.iter().flat_map(member).collect();
    for licence in ["LICENSE-APACHE", "LICENSE-BSD-2-CLAUSE", "LICENSE-GPL-2.0"] {
        if !tree.root().join(licence).is_file() {
            findings.push(Finding::new(
                Path::new(licence),
                0,
                "the licence's text is missing; add it",
            ));
        }
    }
    findings
}

fn parse(tree: &Tree, file: &Path) -> Result<Table> {
    let text = tree
        .text(file)?
        .with_context(|| format!("`{}` is not UTF-8", file.display()))?;
    text.parse()
        .with_context(|| format!("`{}` is no TOML", file.display()))
}

fn member(manifest: &Manifest) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |what: String| findings.push(Finding::new(&manifest.file(), 0, what));
    let lints = manifest.table.get("lints");
    let inherits = lints
        .and_then(|lints| lints.get("workspace"))
        .and_then(Value::as_bool)
        == Some(true);
    let lifts = lints.and_then(|lints| lints.get("rust")?.get("unsafe_code")) == Some(&Value::from("allow"));
    let may_be_unsafe = MAY_BE_UNSAFE.contains(&manifest.member.as_str());
    if may_be_unsafe && !inherits && !lifts {
        find("its own lint table must say `unsafe_code = \"allow\"` and why".to_owned());
    }
    if !may_be_unsafe && !inherits {
        find("doesn't inherit the lints; add `[lints]` with `workspace = true`".to_owned());
    }
    let wanted = licence_of(&manifest.member);
    match manifest.package("license") {
        Some(licence) if licence == wanted => {}
        Some(licence) => find(format!("the licence is `{licence}`, should be `{wanted}`")),
        None => find(format!("no licence; add `license = \"{wanted}\"`")),
    }
    if manifest.package("description").is_none() {
        find("no description; add one line".to_owned());
    }
    findings
}

fn licence_of(member: &str) -> &'static str {
    if member.ends_with("/ebpf") {
        "GPL-2.0-only OR BSD-2-Clause"
    } else if BOTH_SIDES.contains(&member) {
        "Apache-2.0 OR BSD-2-Clause"
    } else {
        "Apache-2.0"
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::{Manifest, member};

    pub(in crate::tidy) fn manifest(member: &str, text: &str) -> Manifest {
        Manifest {
            member: member.to_owned(),
            table: text.parse().expect("the test's TOML is good"),
        }
    }

    #[test]
    fn a_member_without_the_lint_table_is_found() {
        let good =
            "[package]\nname = 'a'\ndescription = 'd'\nlicense = 'Apache-2.0'\n[lints]\nworkspace = true\n";
        assert_eq!(member(&manifest("proto", good)), []);
        let bare = good.replace("workspace = true", "");
        assert!(member(&manifest("proto", &bare))[0].what.contains("inherit"));
        assert!(
            member(&manifest("datapath", &bare))[0]
                .what
                .contains("unsafe_code")
        );
    }

    #[test]
    fn a_wrong_licence_is_found() {
        let text =
            "[package]\nname = \"a\"\ndescription = \"d\"\nlicense = \"MIT\"\n[lints]\nworkspace = true\n";
        assert!(
            member(&manifest("datapath/abi", text))[0]
                .what
                .contains("Apache-2.0 OR BSD-2-Clause")
        );
    }

    #[test]
    fn dependencies_of_targets_count() {
        let of_target = "[target.'cfg(unix)'.dependencies]\nb = '1'\n";
        let text = &format!("[dependencies]\na = '1'\n{of_target}[dev-dependencies]\nc = '1'\n");
        assert_eq!(manifest("x", text).dependencies("dependencies"), ["a", "b"]);
    }
}
