//! Where something stands in a file, and what is wrong with it.
//!
//! Invariant: every error names the file and, where the input is text, line and column from 1.

use std::fmt;
use std::sync::Arc;

use crate::finding::Code;

/// Line and column from 1, in characters; 0 and 0 for input that has no lines (objects from an API server).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    /// From 1.
    pub line: u32,
    /// From 1, in characters.
    pub column: u32,
}

/// A place in a file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    /// As the caller named it.
    pub file: Arc<str>,
    /// In it.
    pub position: Position,
}

impl Location {
    /// The place `position` of `file`.
    #[must_use]
    pub fn new(file: &Arc<str>, position: Position) -> Self {
        Self {
            file: file.clone(),
            position,
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Position { line, column } = self.position;
        if line == 0 {
            write!(f, "{}", self.file)
        } else {
            write!(f, "{}:{line}:{column}", self.file)
        }
    }
}

/// A mistake in a manifest: where, what, and how to mend it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
#[error("{at}: {text}")]
pub struct ManifestError {
    /// Where.
    pub at: Location,
    /// What kind of mistake.
    pub code: Code,
    /// What is wrong and what to do.
    pub text: String,
}
