//! The live bank as the kernel's maps hold it, judged by the same code as in the kernel.
//!
//! Invariant: a copy; what is committed later doesn't show. It is read from the maps, never from what the
//! agent believes to have written.

use std::net::IpAddr;
use std::sync::atomic::Ordering;

use aya::maps::MapError;
use thyra_datapath_abi::source::{Block4, Block6};
use thyra_datapath_abi::{Action, Control, EndpointRecord, Mode, Slot4, Slot6, limits};
use thyra_datapath_engine::family::Address6;
use thyra_datapath_engine::{Table, Tables, lookup, tables};

use crate::blocks::Entries;
use crate::memory::Memory;
use crate::open::endpoint_numbers;

/// A copy of the live bank.
#[derive(Clone, Debug)]
pub struct KernelView {
    /// As in the kernel, but for bank 0: the copy has one bank.
    control: Control,
    records: Vec<EndpointRecord>,
    /// In the order of `Table::BANKED`; the source tables are left empty, they are below.
    words: Vec<Vec<u64>>,
    sources4: Vec<[Slot4; limits::SLOTS4]>,
    sources6: Vec<[Slot6; limits::SLOTS6]>,
    blocks4: Entries<4>,
    blocks6: Entries<16>,
}

/// What the kernel's tables say about a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// What happens to it in mode `Enforce`.
    pub action: Action,
    /// Why: a verdict id, 0 for none.
    pub verdict: u16,
    /// Class of the source.
    pub class: u16,
    /// Local endpoint that owns the source address, 0 for none.
    pub local: u16,
    /// How the endpoint's verdicts are carried out.
    pub mode: Mode,
}

impl KernelView {
    pub(crate) fn read(memory: &Memory) -> Result<Self, MapError> {
        let live = memory.control();
        let copy = |table: Table| -> Vec<u64> {
            memory
                .bank(table, live.bank())
                .iter()
                .map(|word| word.load(Ordering::Relaxed))
                .collect()
        };
        let mut view = Self {
            control: Control(live.0 & !Control::new(0, 1, 0).0),
            records: std::iter::once(0)
                .chain(endpoint_numbers())
                .map(|id| memory.record(id))
                .collect(),
            words: Vec::new(),
            sources4: slots4(&copy(Table::Sources4)),
            sources6: slots6(&copy(Table::Sources6)),
            blocks4: memory.blocks4.read(live.bank())?,
            blocks6: memory.blocks6.read(live.bank())?,
        };
        for table in Table::BANKED {
            let elsewhere = matches!(table, Table::Sources4 | Table::Sources6);
            view.words.push(if elsewhere { Vec::new() } else { copy(table) });
        }
        Ok(view)
    }

    /// Generation of the copied bank.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.control.generation()
    }

    /// The interface side of an endpoint; none when it is not attached.
    #[must_use]
    pub fn record(&self, endpoint: u16) -> Option<&EndpointRecord> {
        Tables::record(self, endpoint).filter(|record| record.ifindex != 0)
    }

    /// What happens to a new connection from `source` to a port of an endpoint, of the family of `source`.
    /// None when the tables have no place for the endpoint: it refuses everything.
    #[must_use]
    pub fn evaluate(&self, endpoint: u16, source: IpAddr, port: u16) -> Option<Sighting> {
        let sets = tables::endpoint_sets(self, self.control, endpoint);
        if !sets.is_placed() {
            return None;
        }
        let (set, source) = match source.to_canonical() {
            IpAddr::V4(v4) => (sets.set4(), lookup::source4(self, self.control, u32::from(v4))),
            IpAddr::V6(v6) => (
                sets.set6(),
                lookup::source6(self, self.control, Address6::from_bytes(v6.octets())),
            ),
        };
        let cell = lookup::cell(self, self.control, set, source.class, port.to_be_bytes());
        Some(Sighting {
            action: cell.action(),
            verdict: cell.verdict(),
            class: source.class,
            local: source.local,
            mode: sets.mode(),
        })
    }
}

impl Tables for KernelView {
    fn control(&self) -> Control {
        self.control
    }

    fn record(&self, endpoint: u16) -> Option<&EndpointRecord> {
        self.records.get(usize::from(endpoint))
    }

    fn word(&self, table: Table, index: u32) -> u64 {
        let place = Table::BANKED
            .iter()
            .position(|t| *t == table)
            .zip(usize::try_from(index).ok());
        place
            .and_then(|(table, index)| self.words[table].get(index))
            .copied()
            .unwrap_or(0)
    }

    fn bucket4(&self, index: u32) -> Option<&[Slot4; limits::SLOTS4]> {
        self.sources4.get(usize::try_from(index).ok()?)
    }

    fn bucket6(&self, index: u32) -> Option<&[Slot6; limits::SLOTS6]> {
        self.sources6.get(usize::try_from(index).ok()?)
    }

    fn block4(&self, key: &Block4) -> Option<u32> {
        longest(&self.blocks4, key.address)
    }

    fn block6(&self, key: &Block6) -> Option<u32> {
        longest(&self.blocks6, key.address)
    }
}

/// What the trie answers: the class of the longest block that holds `address`.
fn longest<const A: usize>(blocks: &Entries<A>, address: [u8; A]) -> Option<u32> {
    let bits = u32::try_from(A * 8).ok()?;
    (0..=bits)
        .rev()
        .find_map(|prefix| blocks.get(&(32 + prefix, masked(address, prefix))))
        .copied()
}

fn masked<const A: usize>(mut address: [u8; A], prefix: u32) -> [u8; A] {
    for (byte, first) in address.iter_mut().zip((0_u32..).step_by(8)) {
        let kept = prefix.saturating_sub(first).min(8);
        *byte &= u8::MAX.checked_shl(8 - kept).unwrap_or(0);
    }
    address
}

fn slots4(words: &[u64]) -> Vec<[Slot4; limits::SLOTS4]> {
    let bucket = |words: &[u64]| std::array::from_fn(|i| Slot4(words[i]));
    words.chunks_exact(limits::SLOTS4).map(bucket).collect()
}

fn slots6(words: &[u64]) -> Vec<[Slot6; limits::SLOTS6]> {
    let slot = |words: &[u64]| Slot6 {
        high: words[0],
        low: words[1],
        value: words[2],
    };
    let bucket = |words: &[u64]| std::array::from_fn(|i| slot(&words[3 * i..]));
    words.chunks_exact(3 * limits::SLOTS6).map(bucket).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_block_wins() {
        let blocks = [
            ((32, [0; 4]), 1),
            ((40, [10, 0, 0, 0]), 2),
            ((64, [10, 0, 0, 9]), 3),
        ]
        .into();
        assert_eq!(longest(&blocks, [10, 0, 0, 9]), Some(3));
        assert_eq!(longest(&blocks, [10, 0, 0, 8]), Some(2));
        assert_eq!(longest(&blocks, [11, 0, 0, 8]), Some(1));
        assert_eq!(longest(&Entries::new(), [11, 0, 0, 8]), None);
    }

    #[test]
    fn a_mask_keeps_the_upper_bits() {
        assert_eq!(masked([255; 4], 12), [255, 240, 0, 0]);
        assert_eq!(masked([255; 4], 0), [0; 4]);
        assert_eq!(masked([255; 4], 32), [255; 4]);
    }
}
