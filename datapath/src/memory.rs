//! The maps that user space writes: the state (control word, endpoint records) and the banks of policy tables.
//!
//! Invariant: outside `Datapath::commit` only the control word's bank is read and never written, except that
//! an endpoint that is detached loses its place in both banks by one store each.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::iter::repeat_n;
use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering};

use thyra_datapath_abi::{Control, EndpointRecord, EndpointSets, State, limits, maps};
use thyra_datapath_engine::{BANK_WORDS, Table};
use zerocopy::{FromBytes, IntoBytes};

use crate::blocks::Blocks;
use crate::mapping::Mapping;
use crate::open::{OpenError, Source};

const WORD: usize = size_of::<u64>();
/// 64-bit words of the state.
pub(crate) const STATE_WORDS: usize = size_of::<State>() / WORD;
const CONTROL: usize = offset_of!(State, control) / WORD;
const RECORDS: usize = offset_of!(State, endpoints) / WORD;
const RECORD_WORDS: usize = size_of::<EndpointRecord>() / WORD;
const FLOW_SEED: usize = offset_of!(State, flow_seed) / WORD;
const OUTBOUND_BUDGET: usize = offset_of!(State, outbound_budget) / WORD;
const L7_BUDGET: usize = offset_of!(State, l7_budget) / WORD;
const L7: usize = offset_of!(State, l7) / WORD;
const OUTBOUND: usize = offset_of!(State, outbound) / WORD;
/// Where the table of interfaces begins, in entries of 16 bits.
const INTERFACES: usize = offset_of!(State, ifindex) / size_of::<u16>();
const AGENT: usize = offset_of!(State, agent) / WORD;
const NETNS: usize = offset_of!(State, netns) / WORD;
/// Where the table of listeners begins, in entries of 16 bits.
const LISTENERS: usize = offset_of!(State, listeners) / size_of::<u16>();
const _: () = assert!(RECORD_WORDS * WORD == size_of::<EndpointRecord>());

/// The maps.
pub(crate) struct Memory {
    state: Mapping,
    banks: Mapping,
    /// By bank, in the order of `Table::ALL`: words from here on are known to be zero.
    extents: [[usize; Table::ALL.len()]; 2],
    pub(crate) blocks4: Blocks<4, 8>,
    pub(crate) blocks6: Blocks<16, 20>,
}

impl Memory {
    pub(crate) fn open(source: &Source<'_>) -> Result<Self, OpenError> {
        let blocks = |name: &'static str| source.map(name);
        let state = source.memory(maps::STATE, STATE_WORDS)?;
        if state.load(FLOW_SEED) == 0 {
            // Fresh maps: no program runs on them yet. A hasher's keys are the standard library's random numbers.
            state.store(FLOW_SEED, RandomState::new().build_hasher().finish() | 1);
        }
        state.store(OUTBOUND_BUDGET, limits::OUTBOUND_BUDGET);
        Ok(Self {
            state,
            banks: source.memory(maps::BANKS, 2 * BANK_WORDS)?,
            extents: [Table::ALL.map(Table::words); 2],
            blocks4: Blocks::new(blocks(maps::BLOCKS4)?).map_err(|e| OpenError::map(maps::BLOCKS4, e))?,
            blocks6: Blocks::new(blocks(maps::BLOCKS6)?).map_err(|e| OpenError::map(maps::BLOCKS6, e))?,
        })
    }

    pub(crate) fn control(&self) -> Control {
        Control(self.state.load(CONTROL))
    }

    /// Makes everything that was written before the live state.
    pub(crate) fn set_control(&self, control: Control) {
        self.state.publish(CONTROL, control.0);
    }

    /// What is mixed into the hash of a connection.
    pub(crate) fn flow_seed(&self) -> u64 {
        self.state.load(FLOW_SEED)
    }

    /// Connections that an endpoint may have opened.
    pub(crate) fn outbound_budget(&self) -> u64 {
        self.state.load(OUTBOUND_BUDGET)
    }

    /// How many it has, by endpoint id; the programs count too.
    pub(crate) fn outbound(&self) -> &[AtomicU64] {
        &self.state.words()[OUTBOUND..OUTBOUND + limits::MAX_ENDPOINTS]
    }

    /// Connections with Envoy that an endpoint may have.
    pub(crate) fn set_l7_budget(&self, budget: u64) {
        self.state.store(L7_BUDGET, budget);
    }

    /// An endpoint has one connection with Envoy less.
    pub(crate) fn give_back_l7(&self, endpoint: u16) {
        let count = &self.state.words()[L7 + usize::from(endpoint) % limits::MAX_ENDPOINTS];
        count.fetch_sub(1, Ordering::SeqCst);
    }

    /// The words of one bank of a table.
    pub(crate) fn bank(&self, table: Table, bank: u32) -> &[AtomicU64] {
        let first = if bank == 0 { 0 } else { BANK_WORDS } + table.start();
        &self.banks.words()[first..first + table.words()]
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
        self.extents[usize::from(bank != 0)][place(table)] = wanted.len();
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
        self.extents[usize::from(bank != 0)][place(table)]
    }

    pub(crate) fn record(&self, endpoint: u16) -> EndpointRecord {
        record(&self.state, endpoint)
    }

    /// Writes an endpoint's record, the word with its interface last.
    pub(crate) fn set_record(&self, endpoint: u16, record: &EndpointRecord) {
        let start = RECORDS + usize::from(endpoint) * RECORD_WORDS;
        for (i, bytes) in record.as_bytes().chunks_exact(8).enumerate().rev() {
            let word = u64::read_from_bytes(bytes).expect("a chunk of eight bytes");
            self.state.publish(start + i, word);
        }
    }

    /// The endpoint that an interface index leads to, whatever its record says; 0 for none.
    pub(crate) fn endpoint_at(&self, ifindex: u32) -> u16 {
        self.state.load16(INTERFACES + slot(ifindex))
    }

    pub(crate) fn set_endpoint_at(&self, ifindex: u32, endpoint: u16) {
        self.state.store16(INTERFACES + slot(ifindex), endpoint);
    }

    /// Cookie of the network namespace in which the endpoint's new connections are steered; 0 for none.
    pub(crate) fn netns(&self, endpoint: u16) -> u64 {
        self.state.load(NETNS + usize::from(endpoint))
    }

    pub(crate) fn set_netns(&self, endpoint: u16, cookie: u64) {
        self.state.publish(NETNS + usize::from(endpoint), cookie);
    }

    /// Who judges a verdict's residual: see `State::listeners`.
    pub(crate) fn listener(&self, verdict: u16) -> u16 {
        self.state
            .load16(LISTENERS + usize::from(verdict) % limits::MAX_VERDICTS)
    }

    /// Which interface leads to the agent; 0 for none.
    pub(crate) fn set_agent(&self, ifindex: u32) {
        self.state.publish(AGENT, u64::from(ifindex));
    }

    /// Says who judges a verdict's residual: see `State::listeners`.
    pub(crate) fn set_listener(&self, verdict: u16, port: u16) {
        self.state
            .store16(LISTENERS + usize::from(verdict) % limits::MAX_VERDICTS, port);
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
}

/// An endpoint's record in the state.
pub(crate) fn record(state: &Mapping, endpoint: u16) -> EndpointRecord {
    let mut record = EndpointRecord::default();
    let start = RECORDS + usize::from(endpoint) * RECORD_WORDS;
    for (i, bytes) in record.as_mut_bytes().chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&state.load(start + i).to_ne_bytes());
    }
    record
}

/// Where a table stands in `Table::ALL`.
fn place(table: Table) -> usize {
    Table::ALL
        .iter()
        .position(|other| *other == table)
        .expect("all tables are in `ALL`")
}

fn slot(ifindex: u32) -> usize {
    usize::try_from(ifindex).map_or(0, |i| i % limits::IFINDEX_SLOTS)
}
