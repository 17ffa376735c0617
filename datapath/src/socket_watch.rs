//! The TCP sockets of a pod as they end, with what went over them: sock_diag(7)'s destroy notifications (Linux 4.2:
//! `sock_diag_broadcast_destroy` of
//! <https://github.com/torvalds/linux/blob/v6.6/net/core/sock_diag.c>).
//!
//! Invariant: nothing is asked per packet: the kernel's own stack has counted. What the kernel could not deliver is
//! told, so that the reader asks for the sockets that are left.

use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Duration;

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sockets::{self, Held};
use crate::{netlink, netns};

/// `SKNLGRP_INET_TCP_DESTROY` and `SKNLGRP_INET6_TCP_DESTROY`.
const GROUPS: [u32; 2] = [1, 3];
/// Bytes that may wait for the reader: some thousand sockets.
const BACKLOG: usize = 1 << 20;
/// A notification is some 400 bytes.
const DATAGRAM: usize = 8_192;
/// Notifications in one batch at most.
const BATCH: usize = 1_024;
/// How long more are waited for, so that a busy pod costs a wake-up a batch.
const PERIOD: Duration = Duration::from_millis(20);

/// What ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndedSockets {
    /// The sockets, in the order in which they did. Who opened them is not told.
    pub sockets: Vec<Held>,
    /// More than the kernel could deliver.
    pub overrun: bool,
}

/// The watch of one pod.
pub struct SocketWatch {
    ended: AsyncFd<Socket>,
    asked: Socket,
    /// The last batch was full: more may be waiting.
    more: bool,
}

impl std::fmt::Debug for SocketWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SocketWatch")
    }
}

impl SocketWatch {
    /// Watches the network namespace at `netns` (`/proc/PID/ns/net`, or a name's file), from now on. Needs a tokio
    /// runtime.
    ///
    /// # Errors
    /// The namespace can't be entered (CAP_SYS_ADMIN), or the kernel tells nothing of sockets.
    pub fn open(netns: &Path) -> io::Result<Self> {
        let (ended, asked) = netns::inside(File::open(netns)?, || {
            let mut ended = Socket::new(NETLINK_SOCK_DIAG)?;
            ended.bind_auto()?;
            for group in GROUPS {
                ended.add_membership(group)?;
            }
            ended.set_rx_buf_sz(i32::try_from(BACKLOG).map_err(io::Error::other)?)?;
            ended.set_non_blocking(true)?;
            Ok((ended, Socket::new(NETLINK_SOCK_DIAG)?))
        })?;
        // SAFETY: the socket owns its descriptor and keeps it until it is dropped.
        let ended = unsafe { AsyncFd::register_with_interest(ended, Interest::READABLE) }?;
        Ok(Self {
            ended,
            asked,
            more: false,
        })
    }

    /// The sockets that end next, at least one unless there was an overrun. Cancel-safe: they are
    /// taken only when they are returned.
    ///
    /// # Errors
    /// The kernel's answer can't be read.
    pub async fn next_batch(&mut self) -> io::Result<EndedSockets> {
        loop {
            // Looking again at once would find a socket or two and burn a CPU on a steady trickle.
            if !std::mem::take(&mut self.more) {
                self.ended.readable().await?.clear_ready();
                tokio::time::sleep(PERIOD).await;
            }
            let batch = self.take()?;
            self.more = batch.sockets.len() == BATCH;
            if !batch.sockets.is_empty() || batch.overrun {
                return Ok(batch);
            }
        }
    }

    /// The connections that the pod holds now; those that are over but for a last wait have no traffic any more.
    ///
    /// # Errors
    /// The kernel doesn't answer.
    pub fn held(&self) -> io::Result<Vec<Held>> {
        sockets::held(&self.asked)
    }

    fn take(&mut self) -> io::Result<EndedSockets> {
        let mut batch = EndedSockets::default();
        while batch.sockets.len() < BATCH {
            let mut bytes = Vec::with_capacity(DATAGRAM);
            match self.ended.get_ref().recv_from(&mut bytes, 0) {
                Ok(_) => {
                    let read = &mut |body: &[u8]| {
                        batch.sockets.extend(sockets::ended(body)?);
                        Ok(())
                    };
                    netlink::messages(&bytes, read)?;
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => batch.overrun = true,
                Err(e) => return Err(e),
            }
        }
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// Ten bytes there, twenty back, and both ends closed; the client's address.
    fn talk(address: &str) -> SocketAddr {
        let listener = TcpListener::bind(address).unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut server = listener.accept().unwrap().0;
        let local = client.local_addr().unwrap();
        client.write_all(&[1; 10]).unwrap();
        server.read_exact(&mut [0; 10]).unwrap();
        server.write_all(&[2; 20]).unwrap();
        client.read_exact(&mut [0; 20]).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(server.read(&mut [0; 1]).unwrap(), 0);
        local
    }

    #[tokio::test]
    async fn a_socket_that_ends_is_told_with_what_went_over_it() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let mut watch = SocketWatch::open(Path::new("/proc/self/ns/net")).unwrap();
            let client = talk(address);
            let mut both = Vec::new();
            while both.len() < 2 {
                let batch = tokio::time::timeout(PATIENCE, watch.next_batch()).await.unwrap();
                let is_ours = |held: &Held| [held.connection.local, held.connection.remote].contains(&client);
                both.extend(batch.unwrap().sockets.into_iter().filter(is_ours));
            }
            both.sort_by_key(|held| held.connection.local != client);
            let [at_client, at_server] = [both[0].traffic.unwrap(), both[1].traffic.unwrap()];
            assert_eq!((at_client.bytes_sent, at_server.bytes_sent), (10, 20));
            // And the FIN.
            assert_eq!((at_client.bytes_received, at_server.bytes_received), (21, 11));
            assert!(
                at_client.packets_sent >= 3 && at_client.packets_received >= 3,
                "{at_client:?}"
            );
            assert!(at_client.min_rtt.is_some(), "{at_client:?}");
        }
    }

    #[tokio::test]
    async fn what_is_held_is_told_when_it_is_asked_for() {
        let watch = SocketWatch::open(Path::new("/proc/self/ns/net")).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut server = listener.accept().unwrap().0;
        client.write_all(&[1; 10]).unwrap();
        server.read_exact(&mut [0; 10]).unwrap();
        let held = watch.held().unwrap();
        let local = server.local_addr().unwrap();
        let at_server = held
            .iter()
            .find(|held| held.connection.local == local && held.connection.accepted);
        assert_eq!(at_server.unwrap().traffic.unwrap().bytes_received, 10);
    }
}
