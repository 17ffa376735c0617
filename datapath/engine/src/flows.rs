//! The memory of connections: those that pods opened and those that the node made.
//!
//! Invariant: an entry of `Outbound` is written only by a SYN of the pod itself, an entry of `Host` only by a
//! packet that the node (or, through its own Service, the pod) made.

use thyra_datapath_abi::datagram::{DATAGRAM4_WORDS, DATAGRAM6_WORDS};
use thyra_datapath_abi::{Flow4, Flow6};

use crate::datagram_table::Touch;

/// Which memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FlowTable {
    /// `maps::OUTBOUND4`, `OUTBOUND6`.
    Outbound,
    /// `maps::HOST_FLOWS4`, `HOST_FLOWS6`.
    Host,
}

/// The memory of connections of both families.
pub trait Flows {
    /// The flags of an entry before `mark` (bits of `FlowState`) was added to them; none when there is no
    /// entry.
    fn find4(&self, table: FlowTable, key: &Flow4, mark: u32) -> Option<u32>;
    /// The same for IPv6.
    fn find6(&self, table: FlowTable, key: &Flow6, mark: u32) -> Option<u32>;
    /// Writes an entry with `flags`, over an old one of the same key; false when the table is full, or the
    /// endpoint's budget is spent.
    fn open4(&self, table: FlowTable, key: &Flow4, flags: u32) -> bool;
    /// The same for IPv6.
    fn open6(&self, table: FlowTable, key: &Flow6, flags: u32) -> bool;
    /// Removes a connection that the node made, if there is one.
    fn forget4(&self, key: &Flow4);
    /// The same for IPv6.
    fn forget6(&self, key: &Flow6);
}

/// The memory of datagrams of both families; keys are the words of a `Datagram4` or `Datagram6`.
pub trait Datagrams {
    /// The flags of a fresh entry of this kind, none when there is no such entry.
    fn recall4(&self, endpoint: u16, key: [u64; DATAGRAM4_WORDS], kind: u32, touch: Touch) -> Option<u32>;
    /// The same for IPv6.
    fn recall6(&self, endpoint: u16, key: [u64; DATAGRAM6_WORDS], kind: u32, touch: Touch) -> Option<u32>;
    /// Writes a new entry, in the place of one that counts less; false when there is none such.
    fn note4(&self, endpoint: u16, key: [u64; DATAGRAM4_WORDS], flags: u32) -> bool;
    /// The same for IPv6.
    fn note6(&self, endpoint: u16, key: [u64; DATAGRAM6_WORDS], flags: u32) -> bool;
}
