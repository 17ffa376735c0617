//! The Unix socket of the admin API.
//!
//! Invariant: a socket that somebody answers on is never taken over, a file that isn't a socket never
//! removed; only root may connect.

use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

/// Why the socket can't be had.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another agent answers there.
    #[error("socket `{0}` is in use by a running agent; stop that one or give another `--socket`")]
    InUse(String),
    /// Something else is there.
    #[error("`{0}` exists and is not a socket; move it away or give another `--socket`")]
    NotASocket(String),
    /// The folder or the socket can't be made.
    #[error("can't make the socket `{path}`")]
    Make {
        /// Path.
        path: String,
        /// Cause.
        source: io::Error,
    },
}

/// A listening socket; its file goes away with it.
#[derive(Debug)]
pub struct Socket {
    path: PathBuf,
}

impl Drop for Socket {
    fn drop(&mut self) {
        // A file that is gone already is what was wanted.
        drop(std::fs::remove_file(&self.path));
    }
}

/// Makes the socket, its folder included; a stale file of an agent that died is replaced.
///
/// # Errors
/// Something else is at the path, or it can't be made.
pub async fn listen(path: &Path) -> Result<(UnixListener, Socket), SocketError> {
    let name = || path.display().to_string();
    let wrong = |source| SocketError::Make { path: name(), source };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(wrong)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => return Err(SocketError::NotASocket(name())),
        Ok(_) if UnixStream::connect(path).await.is_ok() => return Err(SocketError::InUse(name())),
        Ok(_) => std::fs::remove_file(path).map_err(wrong)?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).map_err(wrong)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(wrong)?;
    Ok((
        listener,
        Socket {
            path: path.to_owned(),
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_living_one_is_not() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("run").join("agent.sock");
        let (listener, socket) = listen(&path).await.expect("fresh");
        assert!(matches!(listen(&path).await, Err(SocketError::InUse(_))));
        drop(listener);
        std::mem::forget(socket);
        assert!(path.exists(), "as after a kill");
        let (_listener, socket) = listen(&path).await.expect("stale");
        drop(socket);
        assert!(!path.exists());
        std::fs::write(&path, "data").expect("written");
        assert!(matches!(listen(&path).await, Err(SocketError::NotASocket(_))));
        assert!(path.exists());
    }
}
