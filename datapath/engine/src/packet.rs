//! A packet after parsing: the fields that decide, in the units that the tables use.

use thyra_datapath_abi::Reason;

use crate::Family;

/// IP protocol number of TCP.
pub const TCP: u8 = 6;
/// FIN.
pub const FIN: u8 = 1;
/// SYN.
pub const SYN: u8 = 2;
/// RST.
pub const RST: u8 = 4;
/// ACK.
pub const ACK: u8 = 16;
/// URG.
pub const URG: u8 = 32;

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
    /// Addresses alone.
    #[inline(always)]
    pub(crate) fn without_ports(source: F::Address, destination: F::Address) -> Self {
        let (source_port, destination_port) = ([0; 2], [0; 2]);
        let (sequence, acknowledgment, flags, l3, l4, payload) = (0, 0, 0, 0, 0, 0);
        Self {
            source,
            destination,
            source_port,
            destination_port,
            sequence,
            acknowledgment,
            flags,
            l3,
            l4,
            payload,
        }
    }

    /// Opens a connection.
    #[must_use]
    #[inline(always)]
    pub fn is_syn(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }

    /// Opens a connection, or answers that.
    #[must_use]
    #[inline(always)]
    pub fn has_syn(&self) -> bool {
        self.flags & SYN != 0
    }

    /// Answers a SYN.
    #[must_use]
    #[inline(always)]
    pub fn is_answer(&self) -> bool {
        self.flags & (SYN | ACK | RST) == SYN | ACK
    }

    /// The sequence number of the SYN that it answers (RFC 9293 3.5); means nothing of another packet.
    #[must_use]
    #[inline(always)]
    pub fn answered(&self) -> u32 {
        self.acknowledgment.wrapping_sub(1)
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

/// What an IP packet turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// TCP with complete headers.
    Tcp,
    /// IP without TCP.
    Other,
    /// A fragment that belongs, or may belong, to a TCP packet; it carries no ports to judge.
    Fragment,
    /// Can't be judged: truncated or lying headers.
    Invalid,
    /// Can't be judged: a shape that is not handled.
    Unsupported,
}

/// A packet after parsing.
///
/// Flat, not an enum with contents: every field is set whatever the kind. What an enum leaves unset the
/// compiler may copy around, and the verifier refuses a program that reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed<F: Family> {
    /// Which fields mean something.
    pub kind: Kind,
    /// IP protocol number; 0 when the kind is `Invalid` or `Unsupported`.
    pub protocol: u8,
    /// All of it when the kind is `Tcp`; the addresses (and the ports of UDP) when it is `Other` or
    /// `Fragment`.
    pub packet: Packet<F>,
}

impl<F: Family> Parsed<F> {
    /// A TCP packet.
    #[must_use]
    #[inline(always)]
    pub fn tcp(packet: Packet<F>) -> Self {
        Self {
            kind: Kind::Tcp,
            protocol: TCP,
            packet,
        }
    }

    /// Nothing but a kind.
    #[must_use]
    #[inline(always)]
    pub fn empty(kind: Kind) -> Self {
        let address = F::Address::default();
        Self {
            kind,
            protocol: 0,
            packet: Packet::without_ports(address, address),
        }
    }

    /// Why it can't be judged.
    #[must_use]
    #[inline(always)]
    pub fn reason(&self) -> Reason {
        match self.kind {
            Kind::Unsupported => Reason::UnsupportedShape,
            Kind::Fragment => Reason::Fragment,
            Kind::Tcp | Kind::Other | Kind::Invalid => Reason::InvalidPacket,
        }
    }

    /// Source and destination port, as on the wire.
    #[must_use]
    #[inline(always)]
    pub fn ports(&self) -> [u8; 4] {
        let ([s0, s1], [d0, d1]) = (self.packet.source_port, self.packet.destination_port);
        [s0, s1, d0, d1]
    }
}
