//! The maps that user space writes: control word, endpoint records, and the banks of policy tables.
//!
//! Invariant: outside `Datapath::commit` only the control word's bank is read and never written, except that
//! an endpoint that is detached loses its place in both banks by one store each.

use std::iter::repeat_n;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::MapData;
use thyra_datapath_abi::{Control, EndpointRecord, EndpointSets, limits, maps};
use thyra_datapath_engine::Table;
use zerocopy::{FromBytes, IntoBytes};

use crate::blocks::Blocks;
use crate::mapping::Mapping;
use crate::open::{OpenError, Source};

const RECORD_WORDS: usize = size_of::<EndpointRecord>() / size_of::<u64>();
const _: () = assert!(RECORD_WORDS * size_of::<u64>() == size_of::<EndpointRecord>());

/// The maps.
pub(crate) struct Memory {
    control: Mapping,
    ifindex: Mapping,
    endpoints: Mapping,
    /// In the order of `Table::BANKED`.
    banked: Vec<Mapping>,
    /// By bank and table: words from here on are known to be zero.
    extents: [[usize; Table::BANKED.len()]; 2],
    pub(crate) blocks4: Blocks<4, 8>,
    pub(crate) blocks6: Blocks<16, 20>,
}

impl Memory {
    pub(crate) fn open(source: &Source<'_>) -> Result<Self, OpenError> {
        let banked = Table::BANKED
            .iter()
            .map(|table| map_words(source, table.name(), 2 * table.words()))
            .collect::<Result<_, _>>()?;
        let blocks = |name: &'static str| source.map(name);
        Ok(Self {
            control: map_words(source, maps::CONTROL, 1)?,
            ifindex: map_words(source, maps::IFINDEX, Table::Ifindex.words())?,
            endpoints: map_words(source, maps::ENDPOINTS, limits::MAX_ENDPOINTS * RECORD_WORDS)?,
            banked,
            extents: [Table::BANKED.map(Table::words); 2],
            blocks4: Blocks::new(blocks(maps::BLOCKS4)?).map_err(|e| OpenError::map(maps::BLOCKS4, e))?,
            blocks6: Blocks::new(blocks(maps::BLOCKS6)?).map_err(|e| OpenError::map(maps::BLOCKS6, e))?,
        })
    }

    pub(crate) fn control(&self) -> Control {
        Control(self.control.load(0))
    }

    /// Makes everything that was written before the live state.
    pub(crate) fn set_control(&self, control: Control) {
        self.control.publish(0, control.0);
    }

    /// The words of one bank of a table.
    pub(crate) fn bank(&self, table: Table, bank: u32) -> &[AtomicU64] {
        let words = table.words();
        let start = if bank == 0 { 0 } else { words };
        &self.mapping(table).words()[start..start + words]
    }

    /// Makes a bank of a table hold `wanted` and zeros. Returns how many words changed.
    pub(crate) fn write(&mut self, table: Table, bank: u32, wanted: &[u64]) -> usize {
        let used = self.used(table, bank);
        let mut written = 0;
        let padded = wanted
            .iter()
            .copied()
            .chain(repeat_n(0, used.saturating_sub(wanted.len())));
        for (word, value) in self.bank(table, bank).iter().zip(padded) {
            if word.load(Ordering::Relaxed) != value {
                word.store(value, Ordering::Relaxed);
                written += 1;
            }
        }
        if let Some(i) = place(table) {
            self.extents[usize::from(bank != 0)][i] = wanted.len();
        }
        written
    }

    /// Whether a bank of a table holds `wanted` and zeros.
    pub(crate) fn holds(&self, table: Table, bank: u32, wanted: &[u64]) -> bool {
        let (head, tail) = self.bank(table, bank).split_at(wanted.len());
        let tail = &tail[..self.used(table, bank).saturating_sub(wanted.len())];
        head.iter()
            .zip(wanted)
            .all(|(word, wanted)| word.load(Ordering::Relaxed) == *wanted)
            && tail.iter().all(|word| word.load(Ordering::Relaxed) == 0)
    }

    /// How many words may be other than zero.
    fn used(&self, table: Table, bank: u32) -> usize {
        place(table).map_or(0, |i| self.extents[usize::from(bank != 0)][i])
    }

    pub(crate) fn record(&self, endpoint: u16) -> EndpointRecord {
        let mut record = EndpointRecord::default();
        let start = usize::from(endpoint) * RECORD_WORDS;
        for (i, bytes) in record.as_mut_bytes().chunks_exact_mut(8).enumerate() {
            bytes.copy_from_slice(&self.endpoints.load(start + i).to_ne_bytes());
        }
        record
    }

    /// Writes an endpoint's record, the word with its interface last.
    pub(crate) fn set_record(&self, endpoint: u16, record: &EndpointRecord) {
        let start = usize::from(endpoint) * RECORD_WORDS;
        for (i, bytes) in record.as_bytes().chunks_exact(8).enumerate().rev() {
            let word = u64::read_from_bytes(bytes).expect("a chunk of eight bytes");
            self.endpoints.publish(start + i, word);
        }
    }

    /// The endpoint that an interface index leads to, whatever its record says; 0 for none.
    pub(crate) fn endpoint_at(&self, ifindex: u32) -> u16 {
        self.ifindex.load16(slot(ifindex))
    }

    pub(crate) fn set_endpoint_at(&self, ifindex: u32, endpoint: u16) {
        self.ifindex.store16(slot(ifindex), endpoint);
    }

    pub(crate) fn sets(&self, endpoint: u16) -> EndpointSets {
        let word = &self.bank(Table::EndpointSets, self.control().bank())[usize::from(endpoint)];
        EndpointSets(word.load(Ordering::Relaxed))
    }

    /// Takes an endpoint's place in both banks; what its program still sees it drops.
    pub(crate) fn displace(&self, endpoint: u16) {
        for bank in [0, 1] {
            self.bank(Table::EndpointSets, bank)[usize::from(endpoint)].store(0, Ordering::Relaxed);
        }
    }

    fn mapping(&self, table: Table) -> &Mapping {
        match place(table) {
            Some(i) => &self.banked[i],
            None => &self.ifindex,
        }
    }
}

/// Where a table stands among the banked ones.
fn place(table: Table) -> Option<usize> {
    Table::BANKED.iter().position(|banked| *banked == table)
}

fn map_words(source: &Source<'_>, name: &'static str, words: usize) -> Result<Mapping, OpenError> {
    let map: MapData = source.map(name)?;
    Mapping::new(map.fd().as_fd(), words).map_err(|source| OpenError::Memory { map: name, source })
}

fn slot(ifindex: u32) -> usize {
    usize::try_from(ifindex).map_or(0, |i| i % limits::IFINDEX_SLOTS)
}
