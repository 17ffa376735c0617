//! An error as one line, for those on the other side of the socket.
//!
//! Invariant: no cause is lost, and none is said twice.

/// An error with its causes. Some libraries print their cause themselves.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let more = next.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = next.source();
    }
    text
}
