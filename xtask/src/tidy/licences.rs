//! Licences and origins of everything that is linked in, judged by deny.toml without needing cargo-deny
//! itself.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;
use toml::Table;

use super::Finding;
use crate::{child, tree::Tree};

const RULES: &str = "deny.toml";
/// The only origin besides the workspace itself.
const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";

/// What deny.toml allows.
struct Allowed {
    licences: Vec<String>,
    /// Licences that single crates may have besides.
    exceptions: Vec<(String, String)>,
    banned: Vec<String>,
}

/// Every dependency with a licence, origin or name that deny.toml doesn't allow.
pub(super) fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let text = tree.text(Path::new(RULES))?.context("deny.toml is not UTF-8")?;
    let allowed = Allowed::parse(&text)?;
    let metadata = child::output(
        tree.cargo()
            .args(["metadata", "--format-version", "1", "--locked"]),
    )
    .or_else(|_| child::output(tree.cargo().args(["metadata", "--format-version", "1"])))?;
    let metadata: Value = serde_json::from_str(&metadata).context("cargo metadata wrote no JSON")?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata lists no packages")?;
    let faults = packages.iter().filter_map(|package| fault(package, &allowed));
    Ok(faults
        .map(|what| Finding::new(Path::new("Cargo.lock"), 0, what))
        .collect())
}

impl Allowed {
    fn parse(text: &str) -> Result<Self> {
        let table: Table = text.parse().context("deny.toml is no TOML")?;
        let licences = table.get("licenses").context("deny.toml has no `licenses`")?;
        let strings = |value: Option<&toml::Value>| -> Vec<String> {
            let list = value.and_then(toml::Value::as_array).into_iter().flatten();
            list.filter_map(toml::Value::as_str).map(str::to_owned).collect()
        };
        let names = |value: &toml::Value| {
            ["crate", "name"]
                .iter()
                .find_map(|key| Some(value.get(key)?.as_str()?.to_owned()))
        };
        let mut exceptions = Vec::new();
        for exception in licences
            .get("exceptions")
            .and_then(toml::Value::as_array)
            .into_iter()
            .flatten()
        {
            let name = names(exception).context("an exception in deny.toml names no crate")?;
            exceptions.extend(
                strings(exception.get("allow"))
                    .into_iter()
                    .map(|licence| (name.clone(), licence)),
            );
        }
        let banned = table.get("bans").and_then(|bans| bans.get("deny")?.as_array());
        let banned = banned.into_iter().flatten().filter_map(names).collect();
        Ok(Self {
            licences: strings(licences.get("allow")),
            exceptions,
            banned,
        })
    }

    fn allows(&self, name: &str, licence: &str) -> bool {
        let excepted = |(of, what): &(String, String)| of == name && what == licence;
        self.licences.iter().any(|allowed| allowed == licence) || self.exceptions.iter().any(excepted)
    }
}

/// What is wrong with one package of `cargo metadata`.
fn fault(package: &Value, allowed: &Allowed) -> Option<String> {
    let name = package["name"].as_str().unwrap_or_default();
    let version = package["version"].as_str().unwrap_or_default();
    if allowed.banned.iter().any(|banned| banned == name) {
        return Some(format!("`{name}` is banned by {RULES}"));
    }
    // Without a source it is a member, whose licence the manifests' rule checks.
    let source = package["source"].as_str()?;
    if source != CRATES_IO {
        return Some(format!(
            "`{name}` {version} comes from `{source}`; only crates.io is allowed"
        ));
    }
    let Some(expression) = package["license"].as_str() else {
        return Some(format!("`{name}` {version} names no licence"));
    };
    let fits = satisfied(expression, &|licence| allowed.allows(name, licence));
    (!fits).then(|| format!("`{name}` {version} has the licence `{expression}`, which {RULES} doesn't allow"))
}

/// Evaluates an SPDX expression; `/` is the old way to write OR. What can't be read is not satisfied.
fn satisfied(expression: &str, allows: &dyn Fn(&str) -> bool) -> bool {
    let spaced = expression
        .replace('/', " OR ")
        .replace('(', " ( ")
        .replace(')', " ) ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    any_of(&words, &mut at, allows) == Some(true) && at == words.len()
}

fn any_of(words: &[&str], at: &mut usize, allows: &dyn Fn(&str) -> bool) -> Option<bool> {
    let mut any = all_of(words, at, allows)?;
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        any |= all_of(words, at, allows)?;
    }
    Some(any)
}

fn all_of(words: &[&str], at: &mut usize, allows: &dyn Fn(&str) -> bool) -> Option<bool> {
    let mut all = single(words, at, allows)?;
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        all &= single(words, at, allows)?;
    }
    Some(all)
}

fn single(words: &[&str], at: &mut usize, allows: &dyn Fn(&str) -> bool) -> Option<bool> {
    let word = *words.get(*at)?;
    *at += 1;
    if word == "(" {
        let inner = any_of(words, at, allows)?;
        let closed = words.get(*at) == Some(&")");
        *at += 1;
        return closed.then_some(inner);
    }
    if words.get(*at) == Some(&"WITH") {
        let with = format!("{word} WITH {}", words.get(*at + 1)?);
        *at += 2;
        return Some(allows(&with));
    }
    Some(allows(word))
}

#[cfg(test)]
mod tests {
    use super::{Allowed, CRATES_IO, fault, satisfied};
    use serde_json::json;

    #[test]
    fn expressions_are_read_as_spdx_means_them() {
        let allows = |licence: &str| ["MIT", "Apache-2.0", "BSD-3-Clause"].contains(&licence);
        for good in [
            "MIT",
            "MIT/GPL-3.0",
            "GPL-3.0 OR MIT",
            "(MIT OR GPL-3.0) AND BSD-3-Clause",
        ] {
            assert!(satisfied(good, &allows), "{good}");
        }
        for bad in [
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "Apache-2.0 WITH LLVM-exception",
            "(MIT",
            "",
            "MIT MIT",
        ] {
            assert!(!satisfied(bad, &allows), "{bad}");
        }
    }

    #[test]
    fn a_foreign_origin_a_ban_and_a_missing_licence_are_found() {
        let allowed = Allowed::parse("[licenses]\nallow = [\"MIT\"]\n[bans]\ndeny = [{ crate = \"bad\" }]\n");
        let allowed = allowed.expect("the test's TOML is good");
        let package = |name: &str, source: &str, licence: Option<&str>| {
            fault(
                &json!({"name": name, "version": "1.0.0", "source": source, "license": licence}),
                &allowed,
            )
        };
        assert_eq!(package("good", CRATES_IO, Some("MIT")), None);
        assert!(package("good", "git+https://example.com", Some("MIT")).is_some());
        assert!(package("good", CRATES_IO, None).is_some());
        assert!(package("good", CRATES_IO, Some("GPL-3.0")).is_some());
        assert!(package("bad", CRATES_IO, Some("MIT")).is_some());
    }
}
