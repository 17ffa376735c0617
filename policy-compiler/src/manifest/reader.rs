//! What a reading collects: errors and warnings, or, from an API server, terms that can't be expressed.
//!
//! Invariant: a problem is never swallowed: strictly read it is an error, leniently read it is an unknown
//! term of the level it was found on.

use std::sync::Arc;

use super::error::{Location, ManifestError, Position};
use crate::finding::Code;
use crate::policy::Unknown;

/// Most errors that are listed for one file.
const MAX_ERRORS: usize = 50;

/// Longest text of an error, characters: it may quote a value of any length.
const MAX_TEXT: usize = 600;

/// How to take what can't be read in a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rigour {
    /// It is the user's mistake.
    Strict,
    /// The object is in force already: what can't be read is an unknown term.
    Lenient,
}

/// The place of problems while a file is read.
pub(super) struct Reader<'a> {
    pub file: &'a Arc<str>,
    pub rigour: Rigour,
    pub errors: Vec<ManifestError>,
    pub warnings: Vec<ManifestError>,
    unknown: Vec<Unknown>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(file: &'a Arc<str>, rigour: Rigour) -> Self {
        Self {
            file,
            rigour,
            errors: Vec::new(),
            warnings: Vec::new(),
            unknown: Vec::new(),
        }
    }

    /// A mistake, whatever the rigour.
    pub(super) fn error(&mut self, at: Position, text: impl Into<String>) {
        self.mistake(at, Code::BadValue, text);
    }

    /// A mistake of a kind of its own, whatever the rigour.
    pub(super) fn mistake(&mut self, at: Position, code: Code, text: impl Into<String>) {
        if self.errors.len() < MAX_ERRORS {
            self.errors.push(self.problem(at, code, text));
        }
    }

    fn problem(&self, at: Position, code: Code, text: impl Into<String>) -> ManifestError {
        ManifestError {
            at: Location::new(self.file, at),
            code,
            text: cut(text.into()),
        }
    }

    /// Worth a word, but istiod accepts it and so do we.
    pub(super) fn warning(&mut self, at: Position, code: Code, text: impl Into<String>) {
        if self.warnings.len() < MAX_ERRORS {
            self.warnings.push(self.problem(at, code, text));
        }
    }

    /// A part of a policy at `path` that can't be read.
    pub(super) fn unreadable(&mut self, at: Position, path: &str, text: impl Into<String>) {
        self.unreadable_as(Code::BadValue, at, path, text);
    }

    /// The same, as a mistake of a kind of its own.
    pub(super) fn unreadable_as(&mut self, code: Code, at: Position, path: &str, text: impl Into<String>) {
        match self.rigour {
            Rigour::Strict => self.mistake(at, code, text),
            Rigour::Lenient => self.unknown.push(Unknown(path.into())),
        }
    }

    /// The unknown terms since the last call.
    pub(super) fn take_unknown(&mut self) -> Vec<Unknown> {
        std::mem::take(&mut self.unknown)
    }
}

fn cut(text: String) -> String {
    match text.char_indices().nth(MAX_TEXT) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
