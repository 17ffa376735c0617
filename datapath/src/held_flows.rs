//! The tables of the connections that are held or were, as far as user space cleans them.
//!
//! Invariant: an open connection's entry goes when it is over, its endpoint goes or its residual does; never to make
//! room. One that awaits its verdict goes too when nobody has given it for long, which ends it.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use thyra_datapath_abi::{Flow4, Flow6, FlowState, HeldFlow, HeldOpening, maps};

use crate::flow_maps::{KEY4, KEY6, Swept, is_finished};
use crate::host_flows::HostFlows;
use crate::memory::Memory;
use crate::open::{OpenError, Source};

const FLOW: usize = size_of::<HeldFlow>();
const OPENING: usize = size_of::<HeldOpening>();
/// So long a connection may stay unjudged, however little it says; the agent refuses one that it has bytes of earlier.
const AWAIT_LINGER: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub(crate) struct HeldFlows {
    pub(crate) flows4: HostFlows<KEY4, FLOW>,
    pub(crate) flows6: HostFlows<KEY6, FLOW>,
    /// Only keys are read here.
    opening4: HostFlows<KEY4, OPENING>,
    opening6: HostFlows<KEY6, OPENING>,
}

impl HeldFlows {
    /// `endpoint_at`: offset of the endpoint id in the keys of both families.
    pub(crate) fn open(source: &Source<'_>, endpoint_at: (usize, usize)) -> Result<Self, OpenError> {
        let (endpoint4, endpoint6) = endpoint_at;
        Ok(Self {
            flows4: HostFlows::new(source.map(maps::HELD_FLOWS4)?, endpoint4),
            flows6: HostFlows::new(source.map(maps::HELD_FLOWS6)?, endpoint6),
            opening4: HostFlows::new(source.map(maps::HELD_OPENING4)?, endpoint4),
            opening6: HostFlows::new(source.map(maps::HELD_OPENING6)?, endpoint6),
        })
    }

    /// Removes those that are over; what only began makes room by itself.
    pub(crate) fn sweep(&mut self, memory: &Memory, now_ns: u64, budget: usize) -> io::Result<Swept> {
        let gone = |endpoint| memory.give_back_l7(endpoint);
        let is_over = |value: &[u8; FLOW]| is_over(zerocopy::transmute!(*value), now_ns);
        Ok(self.flows4.sweep_if(budget, is_over, gone)? + self.flows6.sweep_if(budget, is_over, gone)?)
    }

    /// Forgets all of an endpoint.
    pub(crate) fn forget(&self, memory: &Memory, endpoint: u16) -> io::Result<()> {
        let gone = |endpoint| memory.give_back_l7(endpoint);
        self.opening4.forget(endpoint, |_| ())?;
        self.opening6.forget(endpoint, |_| ())?;
        self.flows4.forget(endpoint, gone)?;
        self.flows6.forget(endpoint, gone)
    }

    /// Forgets those of other residuals.
    pub(crate) fn keep(&self, memory: &Memory, residuals: &BTreeSet<u16>) -> io::Result<()> {
        let gone = |endpoint| memory.give_back_l7(endpoint);
        let unwanted = |state: FlowState| !residuals.contains(&state.tag());
        self.flows4.forget_if(unwanted, gone)?;
        self.flows6.forget_if(unwanted, gone)
    }

    /// Forgets those that `is_held` doesn't know: of the endpoint, the client's address, the pod's port and the
    /// residual's number.
    pub(crate) fn keep_if(
        &self,
        memory: &Memory,
        is_held: impl Fn(u16, IpAddr, u16, u16) -> bool,
    ) -> io::Result<()> {
        let gone = |endpoint| memory.give_back_l7(endpoint);
        let unwanted4 = |key: &[u8; KEY4], state: FlowState| {
            let flow: Flow4 = zerocopy::transmute!(*key);
            let (local, remote) = flow.ends();
            !is_held(flow.endpoint, (*remote.ip()).into(), local.port(), state.tag())
        };
        let unwanted6 = |key: &[u8; KEY6], state: FlowState| {
            let flow: Flow6 = zerocopy::transmute!(*key);
            let (local, remote) = flow.ends();
            !is_held(flow.endpoint, (*remote.ip()).into(), local.port(), state.tag())
        };
        self.flows4.forget_where(unwanted4, gone)?;
        self.flows6.forget_where(unwanted6, gone)
    }

    /// Entries of each family, as of the last whole walk.
    pub(crate) fn entries(&self) -> [usize; 2] {
        [self.flows4.entries(), self.flows6.entries()]
    }
}

fn is_over(flow: HeldFlow, now_ns: u64) -> bool {
    let waited = u128::from(flow.state.age_ns(now_ns)) >= AWAIT_LINGER.as_nanos();
    is_finished(flow.state, now_ns) || (!flow.is_open() && waited)
}

#[cfg(test)]
mod tests {
    use thyra_datapath_abi::Isns;

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn only_an_unjudged_connection_goes_for_its_age() {
        let begun = 7 * SECOND;
        let state = FlowState::live(FlowState::ANSWERED, 1, FlowState::tick(begun));
        let flow = HeldFlow::awaiting(state, Isns { client: 1, pod: 2 });
        let at = |seconds| begun + seconds * SECOND + FlowState::TICK_NS;
        assert!(!is_over(flow, at(9)) && is_over(flow, at(10)));
        let open = HeldFlow {
            opened: flow.isns,
            ..flow
        };
        assert!(!is_over(open, at(1_000_000)));
        let reset = HeldFlow {
            state: state.marked(FlowState::RESET, FlowState::tick(begun)),
            ..open
        };
        assert!(!is_over(reset, at(1)) && is_over(reset, at(2)));
    }
}
