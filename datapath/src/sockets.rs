//! The TCP connections that a pod's own stack holds, as sock_diag(7) tells them.
//!
//! Invariant: a connection whose local port also listens was accepted, any other one was opened by the pod.
//!
//! Layouts: `struct inet_diag_req_v2` and `struct inet_diag_msg` of
//! <https://github.com/torvalds/linux/blob/v6.6/include/uapi/linux/inet_diag.h>.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::traffic::{self, Traffic};
use crate::{netlink, netns};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;

/// How far a connection has come, as the pod's stack sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Its SYN is not answered yet.
    Opening,
    /// Open both ways.
    Open,
    /// The pod has closed its side.
    LocalClosed,
    /// The other side has closed.
    RemoteClosed,
    /// Both have.
    Closed,
}

/// A TCP connection of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Connection {
    /// The pod's side; never v4-mapped.
    pub local: SocketAddr,
    /// The other side, as the pod dialled it: a Service's address, say.
    pub remote: SocketAddr,
    /// Whether the other side opened it.
    pub accepted: bool,
    /// How far it has come.
    pub phase: Phase,
}

/// A connection with what went over it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Held {
    /// The connection.
    pub connection: Connection,
    /// None where the kernel tells nothing of it: in TIME_WAIT, say.
    pub traffic: Option<Traffic>,
}

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct SocketId {
    source_port: [u8; 2],
    destination_port: [u8; 2],
    source: [u8; 16],
    destination: [u8; 16],
    interface: u32,
    cookie: [u32; 2],
}

#[repr(C)]
#[derive(IntoBytes, Immutable, KnownLayout)]
struct Request {
    family: u8,
    protocol: u8,
    extensions: u8,
    pad: u8,
    states: u32,
    id: SocketId,
}

/// `inet_diag_msg`.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct Answer {
    family: u8,
    state: u8,
    timer: u8,
    retransmits: u8,
    id: SocketId,
    expires: u32,
    receive_queue: u32,
    write_queue: u32,
    user: u32,
    inode: u32,
}

/// What one socket is.
enum Found {
    Listener(u16),
    Connection(Held),
}

/// The connections in the network namespace at `netns` (`/proc/PID/ns/net`, or a name's file).
///
/// # Errors
/// The namespace can't be entered (CAP_SYS_ADMIN), or the kernel doesn't answer.
pub(crate) fn connections(netns: &Path) -> io::Result<Vec<Connection>> {
    let here = || all(&Socket::new(NETLINK_SOCK_DIAG)?, 0);
    let found = netns::inside(File::open(netns)?, here)?;
    Ok(found.into_iter().map(|held| held.connection).collect())
}

/// The connections in the network namespace that the socket was made in, with their traffic.
///
/// # Errors
/// The kernel doesn't answer.
pub(crate) fn held(asked: &Socket) -> io::Result<Vec<Held>> {
    all(asked, traffic::WANTED)
}

/// The same with these attributes of each socket.
fn all(asked: &Socket, attributes: u8) -> io::Result<Vec<Held>> {
    let mut listening: HashSet<u16> = HashSet::new();
    let mut found = Vec::new();
    for family in [AF_INET, AF_INET6] {
        for socket in dump(asked, family, attributes)? {
            match socket {
                Found::Listener(port) => drop(listening.insert(port)),
                Found::Connection(held) => found.push(held),
            }
        }
    }
    for Held { connection, .. } in &mut found {
        connection.accepted = listening.contains(&connection.local.port());
    }
    Ok(found)
}

/// The connection that ended, as a destroy notification tells it; none of a socket without another side.
///
/// # Errors
/// It is cut short.
pub(crate) fn ended(body: &[u8]) -> io::Result<Option<Held>> {
    let (answer, attributes) = Answer::read_from_prefix(body).map_err(|_| netlink::cut_short())?;
    let found = read(&answer, attributes)?;
    Ok(match found {
        Some(Found::Connection(held)) => Some(held),
        Some(Found::Listener(_)) | None => None,
    })
}

/// All TCP sockets of a family.
fn dump(asked: &Socket, family: u8, attributes: u8) -> io::Result<Vec<Found>> {
    let request = Request {
        family,
        protocol: IPPROTO_TCP,
        extensions: attributes,
        pad: 0,
        states: u32::MAX,
        id: SocketId::new_zeroed(),
    };
    let mut found = Vec::new();
    netlink::dump_on(asked, SOCK_DIAG_BY_FAMILY, &request, &mut |body| {
        let (answer, attributes) = Answer::read_from_prefix(body).map_err(|_| netlink::cut_short())?;
        found.extend(read(&answer, attributes)?);
        Ok(())
    })?;
    Ok(found)
}

/// None for a socket without another side.
fn read(answer: &Answer, attributes: &[u8]) -> io::Result<Option<Found>> {
    let (Some(local), Some(remote)) = (
        address(answer.family, answer.id.source),
        address(answer.family, answer.id.destination),
    ) else {
        return Ok(None);
    };
    let local = SocketAddr::new(local, u16::from_be_bytes(answer.id.source_port));
    let remote = SocketAddr::new(remote, u16::from_be_bytes(answer.id.destination_port));
    // The TCP states of <https://github.com/torvalds/linux/blob/v6.6/include/net/tcp_states.h>.
    let phase = match answer.state {
        1 => Phase::Open,
        2 | 3 | 12 => Phase::Opening,
        4 | 5 => Phase::LocalClosed,
        8 => Phase::RemoteClosed,
        6 | 9 | 11 => Phase::Closed,
        // Of one that is destroyed.
        7 if remote.port() != 0 => Phase::Closed,
        10 => return Ok(Some(Found::Listener(local.port()))),
        _ => return Ok(None),
    };
    let connection = Connection {
        local,
        remote,
        accepted: false,
        phase,
    };
    let traffic = netlink::attribute(attributes, traffic::INFO)?.and_then(Traffic::read);
    Ok(Some(Found::Connection(Held { connection, traffic })))
}

fn address(family: u8, bytes: [u8; 16]) -> Option<IpAddr> {
    match family {
        AF_INET => bytes.first_chunk::<4>().map(|four| IpAddr::from(*four)),
        AF_INET6 => Some(IpAddr::from(bytes).to_canonical()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn both_ends_of_a_connection_are_told_apart() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let server = listener.accept().unwrap().0;
            let found = connections(Path::new("/proc/self/ns/net")).unwrap();
            for (stream, accepted) in [(&client, false), (&server, true)] {
                let wanted = Connection {
                    local: stream.local_addr().unwrap(),
                    remote: stream.peer_addr().unwrap(),
                    accepted,
                    phase: Phase::Open,
                };
                assert!(found.contains(&wanted), "{wanted:?}");
            }
        }
    }

    #[test]
    fn a_v4_connection_of_a_v6_socket_is_a_v4_connection() {
        let listener = TcpListener::bind("[::]:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let _client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let _server = listener.accept().unwrap().0;
        let found = connections(Path::new("/proc/self/ns/net")).unwrap();
        let local = SocketAddr::from(([127, 0, 0, 1], port));
        assert!(found.iter().any(|c| c.local == local && c.accepted));
    }

    #[test]
    fn a_namespace_that_is_not_there_is_an_error() {
        assert!(connections(Path::new("/proc/self/ns/none")).is_err());
    }
}
