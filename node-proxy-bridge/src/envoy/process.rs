//! A process of Envoy's: started here, or by a supervisor before this one.
//!
//! Invariant: a signal reaches the process that was meant, since it goes by a descriptor of it and never by its number
//! (pidfd_open(2), Linux 5.3).

use std::io;
use std::os::fd::OwnedFd;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::unix::AsyncFd;
use tokio::process::Child;

/// See the module.
#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    /// Readable once it has ended.
    handle: AsyncFd<OwnedFd>,
    /// Of a child its end is told too.
    child: Option<Child>,
}

impl Process {
    /// One that was started here.
    ///
    /// # Errors
    /// It has ended and was waited for, or there are no descriptors left.
    pub(super) fn of_child(child: Child) -> io::Result<Self> {
        let pid = child.id().ok_or_else(|| io::Error::other("it ended at once"))?;
        Ok(Self {
            pid,
            handle: handle(pid)?,
            child: Some(child),
        })
    }

    /// One that runs already.
    ///
    /// # Errors
    /// There is none with this number.
    pub(super) fn of_other(pid: u32) -> io::Result<Self> {
        Ok(Self {
            pid,
            handle: handle(pid)?,
            child: None,
        })
    }

    /// Its number.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its end; what can be said of it.
    pub(super) async fn ended(&mut self) -> String {
        let ended = match &mut self.child {
            Some(child) => child.wait().await.map(|status| status.to_string()),
            None => self.handle.readable().await.map(|_| "it ended".to_owned()),
        };
        ended.unwrap_or_else(|error| format!("its end can't be seen: {error}"))
    }

    /// Sends a signal; nothing when it has ended already.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(self.handle.get_ref(), signal) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            sent => Ok(sent?),
        }
    }
}

#[expect(
    deprecated,
    reason = "what replaces it is unsafe for types that may change their descriptor; this one can't"
)]
fn handle(pid: u32) -> io::Result<AsyncFd<OwnedFd>> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::other("no number of a process"))?;
    AsyncFd::new(pidfd_open(pid, PidfdFlags::empty())?)
}
