//! Which addresses the agent, and what it starts in the node's network, may be sent to by an object that a tenant
//! writes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Where clouds tell machines of themselves, beside link-local addresses.
const METADATA: [IpAddr; 3] = [
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
];

/// Which addresses may be dialled.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reach {
    /// Those that others have: not the node's loopback, nor link-local ones, nor a cloud's for its machines.
    #[default]
    Others,
    /// All of them.
    Anywhere,
}

impl Reach {
    /// Whether an address may be dialled. One of IPv4 is the same written as one of IPv6.
    #[must_use]
    pub fn holds(self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        let beside = match address {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        let own = address.is_loopback() || address.is_unspecified() || address.is_multicast();
        self == Self::Anywhere || !(beside || own || METADATA.contains(&address))
    }
}

#[cfg(test)]
mod tests {
    use super::Reach;

    #[test]
    fn what_only_the_node_reaches_is_not_dialled_however_it_is_written() {
        for text in [
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "::ffff:127.0.0.1",
            "0.0.0.0",
            "::",
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "fe80::1",
            "fd00:ec2::254",
            "100.100.100.200",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
        ] {
            let address = text.parse().expect("an address");
            assert!(!Reach::Others.holds(address), "{text}");
            assert!(Reach::Anywhere.holds(address), "{text}");
        }
        for text in [
            "10.0.0.1",
            "10.0.0.7",
            "192.0.2.1",
            "203.0.113.7",
            "::ffff:10.0.0.1",
            "fd00::1",
            "fd00::7",
            "2001:db8::1",
            "2001:db8::7",
        ] {
            assert!(Reach::Others.holds(text.parse().expect("an address")), "{text}");
        }
    }
}
