//! The four tables of remembered connections together.

use std::io;
use std::mem::offset_of;

use thyra_datapath_abi::{Flow4, Flow6, maps};

use crate::flows::{Flows, Swept};
use crate::open::{OpenError, Source};

/// Entries that one collection looks at, per table.
const BUDGET: usize = 16_384;

const KEY4: usize = size_of::<Flow4>();
const KEY6: usize = size_of::<Flow6>();

#[derive(Debug)]
pub(crate) struct FlowMaps {
    outbound4: Flows<KEY4>,
    outbound6: Flows<KEY6>,
    host4: Flows<KEY4>,
    host6: Flows<KEY6>,
}

/// What one `Datapath::collect` did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CollectReport {
    /// Entries that were looked at.
    pub looked_at: usize,
    /// Finished connections that were removed.
    pub removed: usize,
}

impl FlowMaps {
    pub(crate) fn open(source: &Source<'_>) -> Result<Self, OpenError> {
        let (endpoint4, endpoint6) = (offset_of!(Flow4, endpoint), offset_of!(Flow6, endpoint));
        Ok(Self {
            outbound4: Flows::new(source.map(maps::OUTBOUND4)?, endpoint4),
            outbound6: Flows::new(source.map(maps::OUTBOUND6)?, endpoint6),
            host4: Flows::new(source.map(maps::HOST_FLOWS4)?, endpoint4),
            host6: Flows::new(source.map(maps::HOST_FLOWS6)?, endpoint6),
        })
    }

    /// Removes finished connections; each call goes on where the last one stopped.
    pub(crate) fn collect(&mut self, now_ns: u64) -> io::Result<CollectReport> {
        let mut report = CollectReport::default();
        let mut add = |swept: Swept| {
            report.looked_at += swept.looked_at;
            report.removed += swept.removed;
        };
        add(self.outbound4.sweep(now_ns, BUDGET)?);
        add(self.outbound6.sweep(now_ns, BUDGET)?);
        add(self.host4.sweep(now_ns, BUDGET)?);
        add(self.host6.sweep(now_ns, BUDGET)?);
        Ok(report)
    }

    /// Forgets all connections of an endpoint.
    pub(crate) fn forget(&self, endpoint: u16) -> io::Result<usize> {
        let mut removed = self.outbound4.forget(endpoint)?;
        removed += self.outbound6.forget(endpoint)?;
        removed += self.host4.forget(endpoint)?;
        removed += self.host6.forget(endpoint)?;
        Ok(removed)
    }

    /// Gives the connections of one endpoint to another id as well.
    pub(crate) fn copy(&self, from: u16, to: u16) -> io::Result<()> {
        self.outbound4.copy(from, to)?;
        self.outbound6.copy(from, to)?;
        self.host4.copy(from, to)?;
        self.host6.copy(from, to)
    }

    /// Name and entries of each table, as of the last whole walk.
    pub(crate) fn fill(&self) -> [(&'static str, usize); 4] {
        [
            (maps::OUTBOUND4, self.outbound4.entries()),
            (maps::OUTBOUND6, self.outbound6.entries()),
            (maps::HOST_FLOWS4, self.host4.entries()),
            (maps::HOST_FLOWS6, self.host6.entries()),
        ]
    }
}
