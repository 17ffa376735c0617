//! What a verdict of L7 is for, as policies are annotated.
//!
//! Invariant: a word that isn't one leaves each request its own verdict, which is the stricter.

use crate::policy::L7Verdict;

/// Name of the annotation.
pub const L7_VERDICT: &str = "thyra.io/l7-verdict";

/// Its value; absent is `request`.
#[must_use]
pub fn l7_verdict(annotation: Option<&str>) -> L7Verdict {
    match annotation {
        None | Some("request") => L7Verdict::Request,
        Some("connection") => L7Verdict::Connection,
        Some(other) => L7Verdict::Unread(other.into()),
    }
}

/// What is said of another word.
#[must_use]
pub(crate) fn unread(word: &str) -> String {
    format!("annotation `{L7_VERDICT}` is `request` or `connection`, not `{word}`; each request is judged")
}
