//! An error with everything that caused it, as one line of text.
//!
//! Invariant: errors don't print their sources themselves, so nothing is said twice.

use std::error::Error;
use std::iter;

/// `error: its cause: the cause of that`.
pub(crate) fn chain(error: &dyn Error) -> String {
    let causes = iter::successors(error.source(), |&cause| cause.source());
    iter::once(error.to_string())
        .chain(causes.map(ToString::to_string))
        .collect::<Vec<_>>()
        .join(": ")
}
