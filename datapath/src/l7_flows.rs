//! The tables of the connections that Envoy's listeners in pods have.
//!
//! Invariant: an entry goes when its connection is over, its endpoint goes or its listener does; never to make room.

use std::collections::BTreeSet;
use std::io;

use thyra_datapath_abi::{FlowState, maps};

use crate::flow_maps::{KEY4, KEY6, Swept};
use crate::host_flows::HostFlows;
use crate::memory::Memory;
use crate::open::{OpenError, Source};

#[derive(Debug)]
pub(crate) struct L7Flows {
    accepted4: HostFlows<KEY4>,
    accepted6: HostFlows<KEY6>,
    /// Their values are of the same size; only keys are read here.
    opening4: HostFlows<KEY4>,
    opening6: HostFlows<KEY6>,
}

impl L7Flows {
    /// `endpoint_at`: offset of the endpoint id in the keys of both families.
    pub(crate) fn open(source: &Source<'_>, endpoint_at: (usize, usize)) -> Result<Self, OpenError> {
        let (endpoint4, endpoint6) = endpoint_at;
        Ok(Self {
            accepted4: HostFlows::new(source.map(maps::L7_FLOWS4)?, endpoint4),
            accepted6: HostFlows::new(source.map(maps::L7_FLOWS6)?, endpoint6),
            opening4: HostFlows::new(source.map(maps::L7_OPENING4)?, endpoint4),
            opening6: HostFlows::new(source.map(maps::L7_OPENING6)?, endpoint6),
        })
    }

    /// Removes those that are over; what only began makes room by itself.
    pub(crate) fn sweep(&mut self, memory: &Memory, now_ns: u64, budget: usize) -> io::Result<Swept> {
        let gone = |endpoint| memory.give_back_l7(endpoint);
        Ok(self.accepted4.sweep(now_ns, budget, gone)? + self.accepted6.sweep(now_ns, budget, gone)?)
    }

    /// Forgets all of an endpoint.
    pub(crate) fn forget(&self, memory: &Memory, endpoint: u16) -> io::Result<()> {
        let gone = |endpoint| memory.give_back_l7(endpoint);
        self.opening4.forget(endpoint, |_| ())?;
        self.opening6.forget(endpoint, |_| ())?;
        self.accepted4.forget(endpoint, gone)?;
        self.accepted6.forget(endpoint, gone)
    }

    /// Forgets those of listeners on other ports; what only began does not outlive its SYN's timer.
    pub(crate) fn keep(&self, memory: &Memory, ports: &BTreeSet<u16>) -> io::Result<()> {
        let gone = |endpoint| memory.give_back_l7(endpoint);
        let unwanted = |state: FlowState| !ports.contains(&state.tag());
        self.accepted4.forget_if(unwanted, gone)?;
        self.accepted6.forget_if(unwanted, gone)
    }

    /// Entries of each family, as of the last whole walk.
    pub(crate) fn entries(&self) -> [usize; 2] {
        [self.accepted4.entries(), self.accepted6.entries()]
    }
}
