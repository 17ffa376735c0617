//! One datagram and its echo.
//!
//! Invariant: `deny` is an ICMP error about this datagram, `drop` is silence.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{Dial, Outcome, failed, of_error};

pub(super) async fn run(dial: &Dial<'_>) -> (Outcome, Option<SocketAddr>) {
    let any: IpAddr = if dial.to.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = match dial.netns.udp((any, 0).into()) {
        Ok(socket) => socket,
        Err(error) => return (failed(&error), None),
    };
    if let Err(error) = socket.connect(dial.to).await {
        return (of_error(&error), None);
    }
    let client = socket.local_addr().ok();
    if let Err(error) = socket.send(dial.token.as_bytes()).await {
        return (of_error(&error), client);
    }
    let mut buffer = [0; 2048];
    let outcome = match tokio::time::timeout(dial.timeout, socket.recv(&mut buffer)).await {
        Err(_) => Outcome::Drop,
        Ok(Ok(_)) => Outcome::Allow,
        Ok(Err(error)) => of_error(&error),
    };
    (outcome, client)
}
