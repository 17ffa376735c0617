//! A packet after parsing: the fields that decide, in the units that the tables use.

use crate::Family;

/// FIN.
pub const FIN: u8 = 1;
/// SYN.
pub const SYN: u8 = 2;
/// RST.
pub const RST: u8 = 4;
/// ACK.
pub const ACK: u8 = 16;

/// A TCP packet whose headers are complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<F: Family> {
    /// Source address.
    pub source: F::Address,
    /// Destination address.
    pub destination: F::Address,
    /// Source port, network byte order.
    pub source_port: [u8; 2],
    /// Destination port, network byte order.
    pub destination_port: [u8; 2],
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgment number; means something only with `ACK`.
    pub acknowledgment: u32,
    /// TCP flags, the lower eight bits.
    pub flags: u8,
    /// Offset of the IP header, bytes.
    pub l3: u32,
    /// Offset of the TCP header, bytes.
    pub l4: u32,
    /// Bytes after the TCP header.
    pub payload: u32,
}

impl<F: Family> Packet<F> {
    /// Opens a connection.
    #[must_use]
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }

    /// Begins, answers or ends a connection: what the memory of connections wants to know.
    #[must_use]
    #[inline(always)]
    pub fn changes_state(&self) -> bool {
        self.flags & (FIN | SYN | RST) != 0
    }

    /// Sequence numbers that the packet takes up (RFC 9293 SEG.LEN).
    #[must_use]
    #[inline(always)]
    pub fn segment_length(&self) -> u32 {
        self.payload
            .wrapping_add(u32::from(self.flags & SYN != 0))
            .wrapping_add(u32::from(self.flags & FIN != 0))
    }

    /// The connection of `endpoint` that the packet belongs to, when it goes to the pod.
    #[inline(always)]
    pub fn flow_to_pod(&self, endpoint: u16) -> F::Flow {
        F::flow(
            endpoint,
            self.destination,
            self.source,
            self.destination_port,
            self.source_port,
        )
    }

    /// The same, when it comes from the pod.
    #[inline(always)]
    pub fn flow_from_pod(&self, endpoint: u16) -> F::Flow {
        F::flow(
            endpoint,
            self.source,
            self.destination,
            self.source_port,
            self.destination_port,
        )
    }
}

/// An IP packet without TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<F: Family> {
    /// Source address.
    pub source: F::Address,
    /// Destination address.
    pub destination: F::Address,
    /// IP protocol number.
    pub protocol: u8,
    /// Source and destination port of an unfragmented UDP packet, else zero.
    pub ports: [u8; 4],
}

/// What an IP packet turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed<F: Family> {
    /// TCP with complete headers.
    Tcp(Packet<F>),
    /// IP without TCP.
    Other(Datagram<F>),
    /// A fragment that belongs, or may belong, to a TCP packet; it carries no ports to judge.
    Fragment(Datagram<F>),
    /// Can't be judged.
    Bad(thyra_datapath_abi::Reason),
}
