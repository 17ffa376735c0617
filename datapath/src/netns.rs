//! Looking at something inside another network namespace.
//!
//! Invariant: the caller's thread stays where it is.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// What `look` finds in the namespace. A thread of its own enters it, since a thread can't always go back.
///
/// # Errors
/// The namespace can't be entered (CAP_SYS_ADMIN), or `look` fails.
pub(crate) fn inside<T: Send + 'static>(
    netns: File,
    look: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let enter = move || {
        move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
        look()
    };
    let thread = std::thread::Builder::new().name("netns".into()).spawn(enter)?;
    let ended = thread.join();
    ended.unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace has died")))
}
