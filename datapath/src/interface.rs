//! What the kernel says about a network interface of this namespace.
//!
//! Invariant: asked by netlink, which answers for the caller's own network namespace; `/sys/class/net` may
//! belong to another one.

use std::io;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// The bridge (or other master) that it is a port of; 0 for none.
    pub(crate) master: u32,
}

impl Interface {
    /// Looks up an interface by name; none when there is none.
    pub(crate) fn by_name(name: &str) -> io::Result<Option<Self>> {
        let mut wanted = LinkMessage::default();
        wanted.attributes.push(LinkAttribute::IfName(name.to_owned()));
        Ok(ask(wanted)?.map(read))
    }

    /// Looks up an interface by index; none when there is none.
    pub(crate) fn by_index(index: u32) -> io::Result<Option<Self>> {
        let mut wanted = LinkMessage::default();
        wanted.header.index = index;
        Ok(ask(wanted)?.map(read))
    }
}

/// What the kernel answers about an interface; none when there is none.
pub(crate) fn ask(wanted: LinkMessage) -> io::Result<Option<LinkMessage>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let mut request = NetlinkMessage::new(header, NetlinkPayload::from(RouteNetlinkMessage::GetLink(wanted)));
    request.finalize();
    let mut bytes = vec![0; request.buffer_len()];
    request.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link)),
        NetlinkPayload::Error(refusal) => {
            let refusal = refusal.to_io();
            if refusal.raw_os_error() == Some(libc::ENODEV) {
                Ok(None)
            } else {
                Err(refusal)
            }
        }
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "not an answer about an interface",
        )),
    }
}

fn read(link: LinkMessage) -> Interface {
    let mut interface = Interface {
        index: link.header.index,
        name: String::new(),
        master: 0,
    };
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => interface.name = name,
            LinkAttribute::Controller(index) => interface.master = index,
            _ => {}
        }
    }
    interface
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_found_both_ways() {
        let lo = Interface::by_name("lo").unwrap().unwrap();
        assert_eq!(lo.master, 0);
        assert_eq!(Interface::by_index(lo.index).unwrap(), Some(lo));
    }

    #[test]
    fn a_missing_interface_is_none() {
        assert_eq!(Interface::by_name("thyra-none").unwrap(), None);
        assert_eq!(Interface::by_index(0x7fff_fff0).unwrap(), None);
    }
}
