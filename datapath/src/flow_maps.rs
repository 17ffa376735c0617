//! The tables of remembered connections together, and when a connection may go.
//!
//! Invariant: a connection that may still carry a packet stays.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::mem::offset_of;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use thyra_datapath_abi::{Flow4, Flow6, FlowState, HeldFlow, maps};

use crate::datagrams::DatagramMaps;
use crate::held_flows::HeldFlows;
use crate::host_flows::HostFlows;
use crate::l7_flows::L7Flows;
use crate::memory::Memory;
use crate::open::{OpenError, Source};
use crate::outbound::Outbound;
use crate::sockets::Connection;

/// Entries of a table of the node's connections that one collection looks at.
const BUDGET: usize = 16_384;

/// After a reset, stragglers may still arrive.
const RESET_LINGER: Duration = Duration::from_secs(2);
/// After both sides have closed, the last ACK may still be asked for again; a FIN that comes later is
/// answered with a reset, which hurts nobody. Kept short, since each entry takes the place of a new
/// connection.
const CLOSED_LINGER: Duration = Duration::from_secs(2);
/// Linux gives up on a SYN after 127 s (`tcp_syn_retries` = 6).
const UNANSWERED_LINGER: Duration = Duration::from_secs(130);

pub(crate) const KEY4: usize = size_of::<Flow4>();
pub(crate) const KEY6: usize = size_of::<Flow6>();
/// Keys and values.
pub(crate) type HeldEntries<const K: usize> = Vec<([u8; K], [u8; size_of::<HeldFlow>()])>;

#[derive(Debug)]
pub(crate) struct FlowMaps {
    outbound: Outbound,
    datagrams: DatagramMaps,
    host4: HostFlows<KEY4>,
    host6: HostFlows<KEY6>,
    l7: L7Flows,
    held: HeldFlows,
}

/// What one `Datapath::collect` did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CollectReport {
    /// Entries that were looked at.
    pub looked_at: usize,
    /// Finished connections that were removed.
    pub removed: usize,
}

/// The same of one table.
pub(crate) type Swept = CollectReport;

impl std::ops::Add for CollectReport {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            looked_at: self.looked_at + other.looked_at,
            removed: self.removed + other.removed,
        }
    }
}

impl FlowMaps {
    pub(crate) fn open(source: &Source<'_>, memory: &Memory) -> Result<Self, OpenError> {
        let (endpoint4, endpoint6) = (offset_of!(Flow4, endpoint), offset_of!(Flow6, endpoint));
        Ok(Self {
            outbound: Outbound::open(source, memory)?,
            datagrams: DatagramMaps::open(source)?,
            host4: HostFlows::new(source.map(maps::HOST_FLOWS4)?, endpoint4),
            host6: HostFlows::new(source.map(maps::HOST_FLOWS6)?, endpoint6),
            l7: L7Flows::open(source, (endpoint4, endpoint6))?,
            held: HeldFlows::open(source, (endpoint4, endpoint6))?,
        })
    }

    /// Removes finished connections; of the node's, each call goes on where the last one stopped.
    pub(crate) fn collect(&mut self, memory: &Memory, now_ns: u64) -> io::Result<CollectReport> {
        Ok(self.outbound.sweep(memory, now_ns)
            + self.host4.sweep(now_ns, BUDGET, |_| ())?
            + self.host6.sweep(now_ns, BUDGET, |_| ())?
            + self.l7.sweep(memory, now_ns, BUDGET)?
            + self.held.sweep(memory, now_ns, BUDGET)?)
    }

    /// Forgets all connections of an endpoint.
    pub(crate) fn forget(&self, memory: &Memory, endpoint: u16) -> io::Result<()> {
        self.outbound.forget(memory, endpoint);
        self.datagrams.forget(endpoint);
        self.host4.forget(endpoint, |_| ())?;
        self.host6.forget(endpoint, |_| ())?;
        self.held.forget(memory, endpoint)?;
        self.l7.forget(memory, endpoint)
    }

    /// Forgets the connections of an endpoint that Envoy has.
    pub(crate) fn forget_l7(&self, memory: &Memory, endpoint: u16) -> io::Result<()> {
        self.l7.forget(memory, endpoint)
    }

    /// Forgets all connections that listeners other than these have.
    pub(crate) fn keep_listeners(&self, memory: &Memory, ports: &BTreeSet<u16>) -> io::Result<()> {
        self.l7.keep(memory, ports)
    }

    /// Forgets all connections that are held, or were, for other residuals than those with these numbers.
    pub(crate) fn keep_held(&self, memory: &Memory, residuals: &BTreeSet<u16>) -> io::Result<()> {
        self.held.keep(memory, residuals)
    }

    /// Forgets all connections that are held, or were, and that `is_held` doesn't know.
    pub(crate) fn keep_held_if(
        &self,
        memory: &Memory,
        is_held: impl Fn(u16, IpAddr, u16, u16) -> bool,
    ) -> io::Result<()> {
        self.held.keep_if(memory, is_held)
    }

    /// All connections that are held, or were, by family.
    pub(crate) fn held(&self) -> io::Result<(HeldEntries<KEY4>, HeldEntries<KEY6>)> {
        Ok((self.held.flows4.all()?, self.held.flows6.all()?))
    }

    /// Connections that went straight from pod to pod go through the stack from now on.
    pub(crate) fn through_the_stack(&self, memory: &Memory) {
        self.outbound.through_the_stack(memory);
    }

    /// Remembers connections that a pod opened before its endpoint was attached. Returns whether all had room.
    pub(crate) fn seed(&self, memory: &Memory, endpoint: u16, opened: &[Connection]) -> bool {
        self.outbound.seed(memory, endpoint, opened)
    }

    /// Both ends, the pod's first, of the TCP connections that the node made to an endpoint.
    pub(crate) fn of_the_node(&self, endpoint: u16) -> io::Result<HashSet<(SocketAddr, SocketAddr)>> {
        let four = self.host4.of(endpoint)?.into_iter().filter_map(|(key, _)| {
            let flow: Flow4 = zerocopy::transmute!(key);
            let (local, remote) = flow.ends();
            (flow.protocol == 0).then(|| (local.into(), remote.into()))
        });
        let six = self.host6.of(endpoint)?.into_iter().filter_map(|(key, _)| {
            let flow: Flow6 = zerocopy::transmute!(key);
            let (local, remote) = flow.ends();
            (flow.protocol == 0).then(|| (local.into(), remote.into()))
        });
        Ok(four.chain(six).collect())
    }

    /// Gives the connections of one endpoint to another id as well.
    pub(crate) fn copy(&self, memory: &Memory, from: u16, to: u16) -> io::Result<()> {
        if !self.outbound.copy(memory, from, to) {
            return Err(io::Error::other("the table of the pods' own connections is full"));
        }
        self.datagrams.copy(from, to);
        self.host4.copy(from, to)?;
        self.host6.copy(from, to)
    }

    /// Name and entries of each table, as of the last whole walk.
    pub(crate) fn fill(&self) -> [(&'static str, usize); 10] {
        let [outbound4, outbound6] = self.outbound.entries();
        let [datagrams4, datagrams6] = self.datagrams.entries();
        let [l7_4, l7_6] = self.l7.entries();
        let [held4, held6] = self.held.entries();
        [
            (maps::OUTBOUND4, outbound4),
            (maps::OUTBOUND6, outbound6),
            (maps::DATAGRAMS4, datagrams4),
            (maps::DATAGRAMS6, datagrams6),
            (maps::HOST_FLOWS4, self.host4.entries()),
            (maps::HOST_FLOWS6, self.host6.entries()),
            (maps::L7_FLOWS4, l7_4),
            (maps::L7_FLOWS6, l7_6),
            (maps::HELD_FLOWS4, held4),
            (maps::HELD_FLOWS6, held6),
        ]
    }
}

/// Whether nothing can come any more on a connection in this state.
pub(crate) fn is_finished(state: FlowState, now_ns: u64) -> bool {
    let both_fins = FlowState::LOCAL_FIN | FlowState::REMOTE_FIN;
    let linger = if state.has(FlowState::RESET) {
        RESET_LINGER
    } else if state.has(both_fins) {
        CLOSED_LINGER
    } else if !state.has(FlowState::ANSWERED) {
        UNANSWERED_LINGER
    } else {
        return false;
    };
    u128::from(state.age_ns(now_ns)) >= linger.as_nanos()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn finished(flags: u32, age_seconds: u64) -> bool {
        let begun = 7 * SECOND;
        // Ages are whole ticks.
        let now = begun + age_seconds * SECOND + FlowState::TICK_NS;
        is_finished(FlowState::live(flags, 0, FlowState::tick(begun)), now)
    }

    #[test]
    fn an_established_connection_stays_however_old() {
        assert!(!finished(FlowState::ANSWERED, 1_000_000));
        assert!(
            !finished(FlowState::ANSWERED | FlowState::LOCAL_FIN, 1_000_000),
            "half closed"
        );
    }

    #[test]
    fn a_reset_connection_goes_after_two_seconds() {
        assert!(!finished(FlowState::ANSWERED | FlowState::RESET, 1));
        assert!(finished(FlowState::ANSWERED | FlowState::RESET, 2));
    }

    #[test]
    fn a_connection_closed_by_both_goes_after_two_seconds() {
        let closed = FlowState::ANSWERED | FlowState::LOCAL_FIN | FlowState::REMOTE_FIN;
        assert!(!finished(closed, 1));
        assert!(finished(closed, 2));
    }

    #[test]
    fn an_unanswered_syn_goes_after_the_last_retry() {
        assert!(!finished(0, 129));
        assert!(finished(0, 130));
    }

    #[test]
    fn a_clock_behind_the_entry_removes_nothing() {
        let state = FlowState::live(FlowState::RESET, 0, FlowState::tick(10 * SECOND));
        assert!(!is_finished(state, 0));
    }
}
