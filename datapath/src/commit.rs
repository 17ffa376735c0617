//! Making a table state the one that judges packets.
//!
//! Invariant: nothing that a program can read is written before the last store; whatever fails on the way
//! leaves the live bank as it was.

use std::io;
use std::time::Duration;

use aya::maps::MapError;
use thyra_datapath_abi::tables::Tables;
use thyra_datapath_abi::{Control, maps};
use thyra_datapath_engine::{BankImage, Overflow, Table};

use crate::blocks::Entries;
use crate::datapath::{Datapath, Deny, HostTraffic, NonTcp};
use crate::state_file::StateError;
use crate::verdict_names::{Assignment, VerdictsFull};

/// What a commit did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommitReport {
    /// 64-bit words and CIDR entries that changed in the bank that was written.
    pub words_written: usize,
    /// How long the call waited for programs that could still read that bank.
    pub waited: Duration,
    /// Verdict id of each of the tables' verdicts, by index.
    pub verdict_ids: Vec<u16>,
}

/// The tables were not put in force; the last ones stay.
#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    /// Generation 0 means that nothing was committed.
    #[error("generation `0` can't be committed")]
    NoGeneration,
    /// A table is too small.
    #[error(transparent)]
    Overflow(#[from] Overflow),
    /// There are too many distinct verdicts.
    #[error(transparent)]
    VerdictsFull(#[from] VerdictsFull),
    /// The names of new verdicts can't be kept (a full disk).
    #[error(transparent)]
    State(#[from] StateError),
    /// A map can't be written.
    #[error("can't write the map `{map}`")]
    Map {
        /// Which.
        map: &'static str,
        /// Why not.
        #[source]
        source: MapError,
    },
    /// The wait for running programs failed.
    #[error("can't wait for the programs that still read the older tables")]
    Grace(#[source] io::Error),
}

/// What this process last put in force, and what it knows of the banks. Nobody else writes them (`Lock`), except that
/// an endpoint leaves its set: that table is always looked at.
#[derive(Default)]
pub(crate) struct Written {
    /// What the live bank's image was made of.
    tables: Option<Tables>,
    banks: [Option<BankImage>; 2],
}

impl Written {
    fn bank(&self, bank: u32) -> Option<&BankImage> {
        self.banks[usize::from(bank != 0)].as_ref()
    }

    /// The tables in force with their image.
    fn last(&self, live: u32) -> Option<(&Tables, &BankImage)> {
        self.tables.as_ref().zip(self.bank(live))
    }

    /// Whether `bank` is known to have a table of `image`.
    fn has(&self, bank: u32, image: &BankImage, table: Table) -> bool {
        table != Table::EndpointSets && self.bank(bank).is_some_and(|known| known.shares(image, table))
    }

    /// The same of its blocks.
    fn has_blocks(&self, bank: u32, image: &BankImage) -> bool {
        self.bank(bank).is_some_and(|known| known.shares_blocks(image))
    }

    /// From now on `bank` is live and holds what was made of `tables`.
    fn put(&mut self, bank: u32, tables: &Tables, image: BankImage) {
        self.banks[usize::from(bank != 0)] = Some(image);
        self.tables = Some(tables.clone());
    }

    fn forget(&mut self, bank: u32) {
        self.banks[usize::from(bank != 0)] = None;
    }
}

impl Datapath {
    /// Puts `tables` in force as `generation` (not 0): all of it by one store, or nothing.
    pub fn commit(&mut self, tables: &Tables, generation: u32) -> Result<CommitReport, CommitError> {
        if generation == 0 {
            return Err(CommitError::NoGeneration);
        }
        let assignment = self.names.assign(&tables.verdicts)?;
        // `build` asks for indices of `tables.verdicts` only; 0 is no verdict and refused there.
        let id = |index: usize| assignment.ids.get(index).copied().unwrap_or(0);
        let live = self.memory.control().bank();
        let wanted = BankImage::build_after(self.written.last(live), tables, &id)?;
        let flags = self.flags(&wanted);
        if assignment.fresh.is_empty() && self.is_live(&wanted, live)? {
            self.memory.set_control(Control::new(generation, live, flags));
            self.written.put(live, tables, wanted);
            return Ok(self.accept(assignment, 0, Duration::ZERO));
        }
        if !assignment.fresh.is_empty() {
            self.names.save(&assignment)?;
        }
        let waited = self.grace.wait().map_err(CommitError::Grace)?;
        // No program reads a fresh one yet.
        for (id, verdict) in &assignment.fresh {
            self.counters.reset_verdict(*id);
            self.memory.set_listener(*id, self.steering.listener_of(verdict));
        }
        let dead = 1 - live;
        let written = self.write_bank(&wanted, dead)?;
        self.memory.set_control(Control::new(generation, dead, flags));
        self.written.put(dead, tables, wanted);
        self.grace.start();
        Ok(self.accept(assignment, written, waited))
    }

    fn accept(&mut self, assignment: Assignment, words_written: usize, waited: Duration) -> CommitReport {
        let verdict_ids = assignment.ids.clone();
        self.names.accept(assignment);
        CommitReport {
            words_written,
            waited,
            verdict_ids,
        }
    }

    fn flags(&self, image: &BankImage) -> u64 {
        let mut flags = image.flags();
        if self.config.deny == Deny::Drop {
            flags |= Control::DENY_DROP;
        }
        if self.config.host_traffic == HostTraffic::Enforce {
            flags |= Control::ENFORCE_HOST;
        }
        if self.config.non_tcp == NonTcp::Enforce {
            flags |= Control::ENFORCE_NON_TCP;
        }
        flags | self.config.reports()
    }

    /// Whether the live bank is what is wanted already.
    fn is_live(&self, wanted: &BankImage, live: u32) -> Result<bool, CommitError> {
        let holds = |table| {
            self.written.has(live, wanted, table) || self.memory.holds(table, live, wanted.words(table))
        };
        if self.memory.control().generation() == 0 || !Table::ALL.into_iter().all(holds) {
            return Ok(false);
        }
        if self.written.has_blocks(live, wanted) {
            return Ok(true);
        }
        let held4 = self
            .memory
            .blocks4
            .read(live)
            .map_err(|source| CommitError::Map {
                map: maps::BLOCKS4,
                source,
            })?;
        let held6 = self
            .memory
            .blocks6
            .read(live)
            .map_err(|source| CommitError::Map {
                map: maps::BLOCKS6,
                source,
            })?;
        Ok(held4 == blocks4(wanted) && held6 == blocks6(wanted))
    }

    /// Makes a bank that no program reads hold what is wanted. Returns how many words and entries changed.
    fn write_bank(&mut self, wanted: &BankImage, bank: u32) -> Result<usize, CommitError> {
        let mut written = 0;
        for table in Table::ALL {
            if !self.written.has(bank, wanted, table) {
                written += self.memory.write(table, bank, wanted.words(table));
            }
        }
        if self.written.has_blocks(bank, wanted) {
            return Ok(written);
        }
        // What fails on the way leaves something between.
        self.written.forget(bank);
        let changed = self.memory.blocks4.write(bank, &blocks4(wanted));
        written += changed.map_err(|source| CommitError::Map {
            map: maps::BLOCKS4,
            source,
        })?;
        let changed = self.memory.blocks6.write(bank, &blocks6(wanted));
        written += changed.map_err(|source| CommitError::Map {
            map: maps::BLOCKS6,
            source,
        })?;
        Ok(written)
    }
}

fn blocks4(image: &BankImage) -> Entries<4> {
    let blocks = image.blocks4(0);
    blocks
        .map(|(key, class)| ((key.prefix_len, key.address), class))
        .collect()
}

fn blocks6(image: &BankImage) -> Entries<16> {
    let blocks = image.blocks6(0);
    blocks
        .map(|(key, class)| ((key.prefix_len, key.address), class))
        .collect()
}
