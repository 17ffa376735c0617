//! What the programs report to user space, one record per event in the ring buffer `maps::EVENTS`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum EventKind {
    /// A new connection to a pod was allowed (its SYN passed).
    New = 1,
    /// A new connection to a pod was refused or dropped.
    Deny = 2,
    /// A packet of an established connection met a verdict that no longer allows it.
    Revoke = 3,
    /// A source address that is not the sender's own.
    Spoof = 4,
    /// A packet that can't be judged: malformed, or of a shape that is not handled.
    Malformed = 5,
    /// An endpoint in audit mode would have refused this.
    Audit = 6,
    /// A pod opened a connection of its own.
    Outbound = 7,
    /// A TCP connection that the flow log takes was answered: a SYN-ACK went on, to the pod or from it.
    Answered = 8,
}

impl EventKind {
    /// The kind with this number.
    #[must_use]
    pub const fn from_number(n: u8) -> Option<Self> {
        Some(match n {
            1 => Self::New,
            2 => Self::Deny,
            3 => Self::Revoke,
            4 => Self::Spoof,
            5 => Self::Malformed,
            6 => Self::Audit,
            7 => Self::Outbound,
            8 => Self::Answered,
            _ => return None,
        })
    }
}

/// One event. Addresses and ports as on the wire (network byte order, IPv4 as v4-mapped IPv6).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Event {
    /// Nanoseconds since boot, time asleep left out.
    pub time_ns: u64,
    /// Generation of the tables that judged the packet.
    pub generation: u32,
    /// Interface that the program is attached to.
    pub ifindex: u32,
    /// Bytes of the packet, headers included.
    pub length: u32,
    /// TCP sequence number, host byte order; of `Answered` that of the SYN.
    pub sequence: u32,
    /// Source address of the packet.
    pub source: [u8; 16],
    /// Destination address of the packet.
    pub destination: [u8; 16],
    /// Source port.
    pub source_port: [u8; 2],
    /// Destination port.
    pub destination_port: [u8; 2],
    /// Endpoint id; 0 when the interface is not known.
    pub endpoint: u16,
    /// Verdict id; 0 when no policy was asked.
    pub verdict: u16,
    /// `EventKind`.
    pub kind: u8,
    /// `Reason`; 0 for an allowed connection and where the verdict says why.
    pub reason: u8,
    /// TCP flags (lower 8 bits).
    pub tcp_flags: u8,
    /// `Event::*` bits.
    pub flags: u8,
    /// 4 or 6; 0 when the packet could not be parsed that far.
    pub family: u8,
    /// IP protocol number.
    pub protocol: u8,
    /// Explicit padding, zero.
    pub pad: [u8; 2],
}

impl Event {
    /// Seen at `from_pod` (else at `to_pod`).
    pub const FROM_POD: u8 = 1;
    /// The packet was made by the node itself.
    pub const HOST: u8 = 2;
    /// The endpoint talks to itself through its own Service.
    pub const SELF: u8 = 4;
    /// The refusal was answered with a reset.
    pub const RESET_SENT: u8 = 8;
}

const _: () = assert!(size_of::<Event>() == 72);
