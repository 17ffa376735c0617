//! Small files that the next process reads: gone with the machine, whole after any end of this one.
//!
//! Invariant: a reader finds the old content or the new one, never a part; only the owner reads or writes it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, chown};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::process::geteuid;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// What was stored; none without a file.
pub(crate) fn load<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Replaces the file. Not made durable: it means nothing after the machine has ended.
pub(crate) fn store<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    replace(path, &serde_json::to_vec(value)?, 0o600)
}

/// Replaces a file that others may read, in a folder that others may write to: nothing that they put there is followed.
pub(crate) fn replace(path: &Path, text: &[u8], mode: u32) -> io::Result<()> {
    let new = path.with_extension("new");
    remove(&new)?;
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(mode);
    options.open(&new)?.write_all(text)?;
    fs::rename(&new, path)
}

/// Gives a socket that this process has just made to its owner (uid and gid), in a folder that others may write to:
/// what they put in its place stays as it is.
///
/// # Errors
/// It isn't there any more, or something else is.
pub(crate) fn give(socket: &Path, mode: u32, owner: Option<(u32, u32)>) -> io::Result<()> {
    // What lies there now; all else is done to that.
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let held = rustix::fs::open(socket, flags, Mode::empty())?;
    let found = rustix::fs::fstat(&held)?;
    let is_socket = FileType::from_raw_mode(found.st_mode) == FileType::Socket;
    if !is_socket || found.st_nlink != 1 || found.st_uid != geteuid().as_raw() {
        return Err(io::Error::other("something else lies where the socket was made"));
    }
    let held = format!("/proc/self/fd/{}", held.as_raw_fd());
    fs::set_permissions(&held, fs::Permissions::from_mode(mode))?;
    owner.map_or(Ok(()), |(uid, gid)| chown(&held, Some(uid), Some(gid)))
}

/// Takes the file away; none is fine.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, symlink};
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_socket_is_given_and_what_stands_in_its_place_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let mode = |name: &str| fs::metadata(at(name)).unwrap().mode() & 0o777;
        let _socket = UnixListener::bind(at("socket")).unwrap();
        give(&at("socket"), 0o600, None).unwrap();
        assert_eq!(mode("socket"), 0o600);

        fs::write(at("file"), "").unwrap();
        fs::set_permissions(at("file"), fs::Permissions::from_mode(0o640)).unwrap();
        symlink(at("file"), at("link")).unwrap();
        symlink(at("socket"), at("other")).unwrap();
        fs::hard_link(at("socket"), at("second")).unwrap();
        for name in ["file", "link", "other", "second", "none"] {
            give(&at(name), 0o666, None).expect_err(name);
        }
        assert_eq!((mode("file"), mode("socket")), (0o640, 0o600));
    }
}
