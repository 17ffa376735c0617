//! The rules of the tree that no compiler checks; each finding names file, line and the mend.
//!
//! A rule is a pure function from what was read to findings, so that each has a control: bad input that it
//! must find.

mod docs;
mod layers;
mod licences;
mod manifests;
mod modules;
mod source;

use std::{fmt, path::Path, path::PathBuf};

use anyhow::Result;

use crate::tree::Tree;

/// One broken rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Relative to the root.
    pub file: PathBuf,
    /// From 1; 0 means the file as a whole.
    pub line: usize,
    /// What is wrong and how to mend it.
    pub what: String,
}

impl Finding {
    fn new(file: &Path, line: usize, what: impl Into<String>) -> Self {
        Self {
            file: file.to_path_buf(),
            line,
            what: what.into(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, line, what } = self;
        write!(f, "{}:{line}: {what}", file.display())
    }
}

/// A text file of the tree.
pub struct Source {
    /// Relative to the root.
    pub file: PathBuf,
    /// The whole text.
    pub text: String,
}

impl Source {
    fn is_rust(&self) -> bool {
        self.file.extension().is_some_and(|extension| extension == "rs")
    }

    fn is_markdown(&self) -> bool {
        self.file.extension().is_some_and(|extension| extension == "md")
    }

    /// Written by a generator, which says so in the first lines or by the folder's name.
    fn is_generated(&self) -> bool {
        let in_folder = self.file.components().any(|part| part.as_os_str() == "generated");
        in_folder || self.text.lines().take(5).any(|line| line.contains("@generated"))
    }

    /// An integration test, benchmark or example: lengths are its own affair.
    fn is_test(&self) -> bool {
        let folders = ["tests", "benches", "examples"];
        let in_folder = self
            .file
            .components()
            .any(|part| folders.iter().any(|name| part.as_os_str() == *name));
        in_folder || self.file.file_name().is_some_and(|name| name == "tests.rs")
    }
}

/// A family of rules over the whole tree.
pub type Rule = fn(&Tree, &[Source]) -> Result<Vec<Finding>>;

/// Every family by the claim it makes.
pub const RULES: &[(&str, Rule)] = &[
    ("arrows between crates only point down", |tree, sources| {
        Ok(layers::check(&manifests::read(tree)?, sources))
    }),
    (
        "every manifest inherits the lints and names its licence",
        |tree, _| Ok(manifests::check(tree, &manifests::read(tree)?)),
    ),
    ("every dependency's licence is allowed", |tree, _| {
        licences::check(tree)
    }),
    ("source files keep the house style", |_, sources| {
        Ok(sources.iter().flat_map(source::check).collect())
    }),
    ("no source file is dead", |_, sources| Ok(modules::check(sources))),
    ("documents name only what exists", |tree, sources| {
        Ok(docs::check(tree, sources))
    }),
];

/// Every finding of every rule, sorted.
///
/// # Errors
/// Something that can't be read at all.
pub fn check(tree: &Tree) -> Result<Vec<Finding>> {
    let sources = sources(tree)?;
    let mut findings = Vec::new();
    for (_, rule) in RULES {
        findings.extend(rule(tree, &sources)?);
    }
    findings.sort();
    Ok(findings)
}

/// Every text file of the tree.
///
/// # Errors
/// A file that can't be read.
pub fn sources(tree: &Tree) -> Result<Vec<Source>> {
    let mut sources = Vec::new();
    for file in tree.files()? {
        if let Some(text) = tree.text(&file)? {
            sources.push(Source { file, text });
        }
    }
    Ok(sources)
}
