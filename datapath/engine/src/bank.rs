//! The exact content of one bank, built from the compiler's tables.
//!
//! Invariant: an image is whole or it is not built; what does not fit is named (`Overflow`). Equal tables
//! give equal images, and a small change of the tables changes few words, since every address takes the first
//! of its two buckets that has room.

mod sources;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use thyra_datapath_abi::limits::{
    MAX_BLOCKS, MAX_CLASSES, MAX_COLUMNS, MAX_ENDPOINTS, MAX_PORT_CLASSES, MAX_ROWS, MAX_SETS,
};
use thyra_datapath_abi::source::{Block4, Block6};
use thyra_datapath_abi::tables::Tables;
use thyra_datapath_abi::{Cell, Control, EndpointSets};

use self::sources::{sources4, sources6};
use crate::Table;

/// Something does not fit into the maps.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Overflow {
    /// More than the limit.
    #[error("{needed} {what} do not fit into the table `{map}`, which holds {limit}")]
    Count {
        /// What there is too much of.
        what: &'static str,
        /// Name of the map.
        map: &'static str,
        /// How many there are.
        needed: usize,
        /// How many fit.
        limit: usize,
    },
    /// The two buckets of an address, and all that could be moved out of them, are taken.
    #[error("no room for the address `{address}` in the table `{map}`")]
    Address {
        /// The address.
        address: IpAddr,
        /// Name of the map.
        map: &'static str,
    },
    /// A number that leads nowhere: the tables contradict themselves.
    #[error("{what} {number} is out of range in the compiled tables")]
    Range {
        /// What is numbered.
        what: &'static str,
        /// The number.
        number: usize,
    },
}

/// The content of one bank. Words beyond the end of a vector are zero. A copy shares all of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BankImage {
    words: BTreeMap<&'static str, Arc<Vec<u64>>>,
    blocks4: Arc<BTreeMap<([u8; 4], u8), u16>>,
    blocks6: Arc<BTreeMap<([u8; 16], u8), u16>>,
}

impl BankImage {
    /// Lays out `tables`; `verdict_id` gives the stable id of the verdict with an index, never 0.
    ///
    /// # Errors
    /// What does not fit, by name.
    pub fn build(tables: &Tables, verdict_id: &dyn Fn(usize) -> u16) -> Result<Self, Overflow> {
        Self::build_after(None, tables, verdict_id)
    }

    /// The same; what did not change since the image `before`, made of the tables beside it, is shared with it.
    ///
    /// # Errors
    /// What does not fit, by name.
    pub fn build_after(
        before: Option<(&Tables, &Self)>,
        tables: &Tables,
        verdict_id: &dyn Fn(usize) -> u16,
    ) -> Result<Self, Overflow> {
        check_counts(tables)?;
        let since = |same: fn(&Tables, &Tables) -> bool| {
            let same = before.filter(|(before, _)| same(before, tables));
            same.map(|(_, image)| image)
        };
        let mut image = Self::default();
        image.put(Table::EndpointSets, None, || endpoint_sets(tables))?;
        image.put(Table::Sources4, since(same_addresses), || sources4(tables))?;
        image.put(Table::Sources6, since(same_addresses), || sources6(tables))?;
        image.put(Table::ClassColumn, since(same_columns), || class_column(tables))?;
        image.put(Table::PortClass, since(same_ports), || port_class(tables))?;
        image.put(Table::Sets, since(same_sets), || sets(tables))?;
        image.put(Table::Rows, None, || rows(tables, verdict_id))?;
        match since(same_blocks) {
            Some(known) => {
                image.blocks4 = Arc::clone(&known.blocks4);
                image.blocks6 = Arc::clone(&known.blocks6);
            }
            None => image.put_blocks(tables)?,
        }
        Ok(image)
    }

    /// The words of one table of the bank; what lies beyond their end, up to `Table::words`, is zero.
    #[must_use]
    pub fn words(&self, table: Table) -> &[u64] {
        self.words.get(table.name()).map_or(&[], |words| words.as_slice())
    }

    /// Whether a table of both is one and the same memory, without a look at it.
    #[must_use]
    pub fn shares(&self, other: &Self, table: Table) -> bool {
        let of = |image: &Self| image.words.get(table.name()).map(Arc::as_ptr);
        of(self).is_some() && of(self) == of(other)
    }

    /// Whether the blocks of both are one and the same memory.
    #[must_use]
    pub fn shares_blocks(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.blocks4, &other.blocks4) && Arc::ptr_eq(&self.blocks6, &other.blocks6)
    }

    /// Keys and classes of the IPv4 blocks, as they are in the map for `bank`.
    pub fn blocks4(&self, bank: u32) -> impl Iterator<Item = (Block4, u32)> + '_ {
        self.blocks4.iter().map(move |(&(address, prefix), &class)| {
            (
                Block4 {
                    prefix_len: 32 + u32::from(prefix),
                    bank,
                    address,
                },
                u32::from(class),
            )
        })
    }

    /// The same for IPv6.
    pub fn blocks6(&self, bank: u32) -> impl Iterator<Item = (Block6, u32)> + '_ {
        self.blocks6.iter().map(move |(&(address, prefix), &class)| {
            (
                Block6 {
                    prefix_len: 32 + u32::from(prefix),
                    bank,
                    address,
                },
                u32::from(class),
            )
        })
    }

    /// The flags of `Control` that follow from the content.
    #[must_use]
    pub fn flags(&self) -> u64 {
        let four = if self.blocks4.is_empty() {
            0
        } else {
            Control::BLOCKS4
        };
        let six = if self.blocks6.is_empty() {
            0
        } else {
            Control::BLOCKS6
        };
        four | six
    }

    /// An image with this content, as it was read from the maps.
    #[must_use]
    pub fn of(
        words: impl Iterator<Item = (Table, Vec<u64>)>,
        blocks4: impl Iterator<Item = (([u8; 4], u8), u16)>,
        blocks6: impl Iterator<Item = (([u8; 16], u8), u16)>,
    ) -> Self {
        Self {
            words: words
                .map(|(table, words)| (table.name(), Arc::new(words)))
                .collect(),
            blocks4: Arc::new(blocks4.collect()),
            blocks6: Arc::new(blocks6.collect()),
        }
    }

    /// Entry `index` of a u16 table; zero where nothing was written.
    pub(crate) fn entry(&self, table: Table, index: usize) -> u16 {
        let word = self.words(table).get(index / 4).copied().unwrap_or(0);
        let [low, high, ..] = (word >> (index % 4 * 16)).to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    /// The `N` words of a bucket; none where nothing was written.
    pub(crate) fn bucket<const N: usize>(&self, table: Table, index: u32) -> Option<&[u64; N]> {
        let first = usize::try_from(index).ok()?.checked_mul(N)?;
        self.words(table).get(first..)?.first_chunk()
    }

    /// Class of the longest IPv4 block that holds `address`.
    pub(crate) fn class4(&self, address: [u8; 4]) -> Option<u16> {
        longest(&self.blocks4, &address)
    }

    /// The same for IPv6.
    pub(crate) fn class6(&self, address: [u8; 16]) -> Option<u16> {
        longest(&self.blocks6, &address)
    }

    /// Takes a table from the image that has it already, or makes it.
    fn put(
        &mut self,
        table: Table,
        known: Option<&Self>,
        make: impl FnOnce() -> Result<Vec<u64>, Overflow>,
    ) -> Result<(), Overflow> {
        let known = known.and_then(|image| image.words.get(table.name())).cloned();
        let words = match known {
            Some(words) => words,
            None => Arc::new(make()?),
        };
        self.words.insert(table.name(), words);
        Ok(())
    }

    fn put_blocks(&mut self, tables: &Tables) -> Result<(), Overflow> {
        let (mut blocks4, mut blocks6) = (BTreeMap::new(), BTreeMap::new());
        for block in tables.blocks.iter() {
            let class = kernel_class(block.class, tables)?;
            match block.network {
                IpAddr::V4(network) => drop(blocks4.insert((network.octets(), block.prefix), class)),
                IpAddr::V6(network) => drop(blocks6.insert((network.octets(), block.prefix), class)),
            }
        }
        at_most("CIDR blocks", "BLOCKS4", blocks4.len(), MAX_BLOCKS)?;
        at_most("CIDR blocks", "BLOCKS6", blocks6.len(), MAX_BLOCKS)?;
        (self.blocks4, self.blocks6) = (blocks4.into(), blocks6.into());
        Ok(())
    }
}

/// What the trie answers: masking the address prefix by prefix keeps a look-up independent of the block count.
fn longest<const A: usize>(blocks: &BTreeMap<([u8; A], u8), u16>, address: &[u8; A]) -> Option<u16> {
    let bits = u8::try_from(A * 8).ok()?;
    (0..=bits)
        .rev()
        .find_map(|prefix| blocks.get(&(masked(address, prefix), prefix)))
        .copied()
}

/// The first `prefix` bits of an address, zeros after them.
fn masked<const A: usize>(address: &[u8; A], prefix: u8) -> [u8; A] {
    let mut masked = *address;
    for (byte, first) in masked.iter_mut().zip((0_u8..=u8::MAX).step_by(8)) {
        let kept = u32::from(prefix.saturating_sub(first).min(8));
        *byte &= u8::MAX.checked_shl(8 - kept).unwrap_or(0);
    }
    masked
}

// What each table is made of, beside its own part: everything that its makers look at. Equal parts of two tables are
// mostly one (`Arc`), which is seen without a look inside.

fn same_addresses(before: &Tables, after: &Tables) -> bool {
    before.classes.len() == after.classes.len() && before.addresses == after.addresses
}

fn same_blocks(before: &Tables, after: &Tables) -> bool {
    before.classes.len() == after.classes.len() && before.blocks == after.blocks
}

fn same_columns(before: &Tables, after: &Tables) -> bool {
    before.columns == after.columns && before.class_column == after.class_column
}

fn same_ports(before: &Tables, after: &Tables) -> bool {
    before.port_classes == after.port_classes && before.port_runs == after.port_runs
}

fn same_sets(before: &Tables, after: &Tables) -> bool {
    before.port_classes == after.port_classes
        && before.rows.len() == after.rows.len()
        && before.sets == after.sets
}

fn check_counts(tables: &Tables) -> Result<(), Overflow> {
    at_most(
        "source classes",
        "CLASS_COLUMN",
        tables.classes.len(),
        MAX_CLASSES,
    )?;
    at_most("columns", "ROWS", usize::from(tables.columns), MAX_COLUMNS - 1)?;
    at_most("rows", "ROWS", tables.rows.len(), MAX_ROWS - 1)?;
    at_most("policy sets", "SETS", tables.sets.len(), MAX_SETS)?;
    at_most(
        "port classes",
        "SETS",
        usize::from(tables.port_classes),
        MAX_PORT_CLASSES,
    )
}

fn at_most(what: &'static str, map: &'static str, needed: usize, limit: usize) -> Result<(), Overflow> {
    if needed > limit {
        Err(Overflow::Count {
            what,
            map,
            needed,
            limit,
        })
    } else {
        Ok(())
    }
}

fn in_range(what: &'static str, number: u16, count: usize) -> Result<(), Overflow> {
    let number = usize::from(number);
    if number >= count {
        Err(Overflow::Range { what, number })
    } else {
        Ok(())
    }
}

/// A class as the kernel names it.
fn kernel_class(class: u32, tables: &Tables) -> Result<u16, Overflow> {
    let number = usize::try_from(class).unwrap_or(usize::MAX);
    let known = u16::try_from(class)
        .ok()
        .filter(|_| number < tables.classes.len());
    known.ok_or(Overflow::Range {
        what: "class",
        number,
    })
}

/// A u16 table in 64-bit words: four entries to a word, the first in the lowest bits.
fn pack(entries: &[u16]) -> Vec<u64> {
    let word = |four: &[u16]| {
        four.iter()
            .rev()
            .fold(0, |word, &entry| word << 16 | u64::from(entry))
    };
    entries.chunks(4).map(word).collect()
}

fn endpoint_sets(tables: &Tables) -> Result<Vec<u64>, Overflow> {
    let mut words = vec![0; MAX_ENDPOINTS];
    for endpoint in tables.endpoints.iter() {
        in_range("policy set", endpoint.set4, tables.sets.len())?;
        in_range("policy set", endpoint.set6, tables.sets.len())?;
        let number = usize::from(endpoint.endpoint);
        match words.get_mut(number).filter(|_| number != 0) {
            Some(word) => *word = EndpointSets::new(endpoint.set4, endpoint.set6, endpoint.mode).0,
            None => {
                return Err(Overflow::Range {
                    what: "endpoint",
                    number,
                });
            }
        }
    }
    Ok(words)
}

fn class_column(tables: &Tables) -> Result<Vec<u64>, Overflow> {
    let column = |&column: &u16| in_range("column", column, usize::from(tables.columns)).map(|()| column + 1);
    Ok(pack(
        &tables
            .class_column
            .iter()
            .map(column)
            .collect::<Result<Vec<_>, _>>()?,
    ))
}

fn port_class(tables: &Tables) -> Result<Vec<u64>, Overflow> {
    let mut ports = vec![0; 65_536];
    for (i, &(first, class)) in tables.port_runs.iter().enumerate() {
        in_range("port class", class, usize::from(tables.port_classes))?;
        let after = tables
            .port_runs
            .get(i + 1)
            .map_or(ports.len(), |&(next, _)| usize::from(next));
        match ports.get_mut(usize::from(first)..after) {
            Some(run) => run.fill(class),
            None => {
                return Err(Overflow::Range {
                    what: "port run",
                    number: i,
                });
            }
        }
    }
    Ok(pack(&ports))
}

fn sets(tables: &Tables) -> Result<Vec<u64>, Overflow> {
    let mut words = Vec::with_capacity(tables.sets.len() * MAX_PORT_CLASSES / 4);
    for (i, set) in tables.sets.iter().enumerate() {
        if set.len() != usize::from(tables.port_classes) {
            return Err(Overflow::Range {
                what: "length of policy set",
                number: i,
            });
        }
        let mut entries = vec![0; MAX_PORT_CLASSES];
        for (entry, &row) in entries.iter_mut().zip(set) {
            in_range("row", row, tables.rows.len())?;
            *entry = row + 1;
        }
        words.extend(pack(&entries));
    }
    Ok(words)
}

fn rows(tables: &Tables, verdict_id: &dyn Fn(usize) -> u16) -> Result<Vec<u64>, Overflow> {
    let cell = |(i, verdict): (usize, &thyra_datapath_abi::tables::Verdict)| {
        let id = verdict_id(i);
        Cell::new(verdict.cell_action(), id)
            .filter(|_| id != 0)
            .ok_or(Overflow::Range {
                what: "verdict id",
                number: usize::from(id),
            })
    };
    let cells = tables
        .verdicts
        .iter()
        .enumerate()
        .map(cell)
        .collect::<Result<Vec<_>, _>>()?;
    // Row 0 stays unwritten.
    let mut words = vec![0; MAX_COLUMNS / 4];
    for (i, row) in tables.rows.iter().enumerate() {
        if row.len() != usize::from(tables.columns) {
            return Err(Overflow::Range {
                what: "length of row",
                number: i,
            });
        }
        let mut entries = vec![0; MAX_COLUMNS];
        for (entry, &verdict) in entries.iter_mut().skip(1).zip(row) {
            in_range("verdict", verdict, cells.len())?;
            *entry = cells[usize::from(verdict)].0;
        }
        words.extend(pack(&entries));
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_block_wins() {
        let blocks = [
            (([0; 4], 0), 1),
            (([10, 0, 0, 0], 8), 2),
            (([10, 0, 0, 9], 32), 3),
        ]
        .into();
        assert_eq!(longest(&blocks, &[10, 0, 0, 9]), Some(3));
        assert_eq!(longest(&blocks, &[10, 0, 0, 8]), Some(2));
        assert_eq!(longest(&blocks, &[11, 0, 0, 8]), Some(1));
        assert_eq!(longest::<4>(&BTreeMap::new(), &[11, 0, 0, 8]), None);
    }

    #[test]
    fn a_mask_keeps_the_upper_bits() {
        assert_eq!(masked(&[255; 4], 12), [255, 240, 0, 0]);
        assert_eq!(masked(&[255; 4], 0), [0; 4]);
        assert_eq!(masked(&[255; 16], 128), [255; 16]);
    }
}
