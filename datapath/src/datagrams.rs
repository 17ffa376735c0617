//! The tables of what is remembered of datagrams, in memory shared with the programs; who needs no entry any more
//! loses it to another by itself.
//!
//! Invariant: an endpoint's part is written only while no program runs for it.

use thyra_datapath_abi::datagram::{DatagramBucket4, DatagramBucket6};
use thyra_datapath_abi::limits::{DATAGRAM_BUCKETS, MAX_ENDPOINTS};
use thyra_datapath_abi::maps;
use thyra_datapath_engine::datagram_words::DatagramWords;

use crate::mapping::Mapping;
use crate::open::{OpenError, Source};

const BUCKETS: usize = MAX_ENDPOINTS * DATAGRAM_BUCKETS;
const WORDS4: usize = BUCKETS * size_of::<DatagramBucket4>() / size_of::<u64>();
const WORDS6: usize = BUCKETS * size_of::<DatagramBucket6>() / size_of::<u64>();

/// Both tables.
#[derive(Debug)]
pub(crate) struct DatagramMaps {
    v4: Mapping,
    v6: Mapping,
}

impl DatagramMaps {
    pub(crate) fn open(source: &Source<'_>) -> Result<Self, OpenError> {
        Ok(Self {
            v4: source.memory(maps::DATAGRAMS4, WORDS4)?,
            v6: source.memory(maps::DATAGRAMS6, WORDS6)?,
        })
    }

    /// Entries of each family, fresh or not.
    pub(crate) fn entries(&self) -> [usize; 2] {
        self.both().map(|table| table.count())
    }

    /// Forgets all datagrams of an endpoint.
    pub(crate) fn forget(&self, endpoint: u16) {
        for table in self.both() {
            table.clear(endpoint);
        }
    }

    /// Gives what is remembered of one endpoint to another id as well.
    pub(crate) fn copy(&self, from: u16, to: u16) {
        for table in self.both() {
            table.copy(from, to);
        }
    }

    fn both(&self) -> [DatagramWords<'_>; 2] {
        [&self.v4, &self.v6].map(|table| DatagramWords {
            buckets: table.words(),
            now_ns: 0,
        })
    }
}
