//! What a packet that is not TCP is called in the memories of datagrams and of the node's connections.
//!
//! Invariant: what the pod sends and what comes back have one name; a piece of a fragmented packet has one by its
//! direction, its sender and its identification.

use thyra_datapath_abi::datagram::{ECHO, FRAGMENT, INBOUND};

use crate::Family;
use crate::datagram_table::Touch;
use crate::flows::{Datagrams, FlowTable, Flows};
use crate::parse::non_tcp::{NonTcp, Shape};

/// The port that stands for none.
pub(super) const NO_PORT: [u8; 2] = [0; 2];

/// The name.
pub(super) struct Tuple<'a, F: Family> {
    endpoint: u16,
    from_pod: bool,
    pub(super) other: &'a NonTcp<F>,
}

impl<'a, F: Family> Tuple<'a, F> {
    #[inline(always)]
    pub(super) fn to_pod(endpoint: u16, other: &'a NonTcp<F>) -> Self {
        Self {
            endpoint,
            from_pod: false,
            other,
        }
    }

    #[inline(always)]
    pub(super) fn from_pod(endpoint: u16, other: &'a NonTcp<F>) -> Self {
        Self {
            endpoint,
            from_pod: true,
            other,
        }
    }

    #[inline(always)]
    pub(super) fn kind(&self) -> u32 {
        self.other.kind()
    }

    #[inline(always)]
    pub(super) fn remote(&self) -> F::Address {
        let packet = &self.other.parsed.packet;
        if self.from_pod {
            packet.destination
        } else {
            packet.source
        }
    }

    /// The pod's port as policy sees it.
    #[inline(always)]
    pub(super) fn judged(&self) -> [u8; 2] {
        let packet = &self.other.parsed.packet;
        match (self.kind(), self.from_pod) {
            (ECHO, _) => NO_PORT,
            (_, true) => packet.source_port,
            (_, false) => packet.destination_port,
        }
    }

    /// The pod's port, the other one; of a ping the identifier and zero.
    #[inline(always)]
    pub(super) fn ports(&self) -> ([u8; 2], [u8; 2]) {
        let packet = &self.other.parsed.packet;
        match (self.kind(), self.from_pod) {
            (ECHO, _) => (self.other.echo, NO_PORT),
            (_, true) => (packet.source_port, packet.destination_port),
            (_, false) => (packet.destination_port, packet.source_port),
        }
    }

    #[inline(always)]
    pub(super) fn datagram(&self) -> F::Datagram {
        let (local_port, remote_port) = self.ports();
        F::datagram(self.remote(), local_port, remote_port)
    }

    #[inline(always)]
    pub(super) fn fragments(&self) -> F::Datagram {
        F::fragments(
            self.remote(),
            self.other.id,
            self.other.parsed.protocol,
            self.from_pod,
        )
    }

    #[inline(always)]
    pub(super) fn flow(&self) -> F::Flow {
        let packet = &self.other.parsed.packet;
        let local = if self.from_pod {
            packet.source
        } else {
            packet.destination
        };
        let (local_port, remote_port) = self.ports();
        let flow = F::flow(self.endpoint, local, self.remote(), local_port, remote_port);
        F::with_protocol(flow, self.other.parsed.protocol)
    }

    /// Who began, none when nobody did.
    #[inline(always)]
    pub(super) fn began<N: Datagrams + ?Sized>(&self, node: &N, touch: Touch) -> Option<u32> {
        F::recall(node, self.endpoint, self.datagram(), self.kind(), touch)
    }

    /// The pod began.
    #[inline(always)]
    pub(super) fn note_own<N: Datagrams + ?Sized>(&self, node: &N, flags: u32) {
        // Where there is no room the answer is judged like anything else.
        let _room = F::note(node, self.endpoint, self.datagram(), self.kind() | flags);
    }

    /// The other side began. Not of a ping, whose answer can't be taken for anything else.
    #[inline(always)]
    pub(super) fn note_inbound<N: Datagrams + ?Sized>(&self, node: &N) -> bool {
        self.other.shape == Shape::Ports
            && F::note(node, self.endpoint, self.datagram(), self.kind() | INBOUND)
    }

    /// A datagram that passes whatever policy says.
    #[inline(always)]
    pub(super) fn received<N: Datagrams + ?Sized>(&self, node: &N) {
        if self.began(node, Touch::Received).is_none() {
            let _fresh = self.note_inbound(node);
        }
    }

    /// The later pieces of a packet pass that begins with this one.
    #[inline(always)]
    pub(super) fn note_piece<N: Datagrams + ?Sized>(&self, node: &N) {
        if self.other.is_first {
            let _room = F::note(node, self.endpoint, self.fragments(), FRAGMENT);
        }
    }

    #[inline(always)]
    pub(super) fn is_piece_of_passed<N: Datagrams + ?Sized>(&self, node: &N) -> bool {
        F::recall(node, self.endpoint, self.fragments(), FRAGMENT, Touch::Nothing).is_some()
    }

    #[inline(always)]
    pub(super) fn of_node<N: Flows + ?Sized>(&self, node: &N) -> Option<u32> {
        F::find(node, FlowTable::Host, &self.flow(), 0)
    }
}
