//! The policy tables as the programs see them: words of mmap-able arrays, and the two CIDR tables.
//!
//! Invariant: how an entry is found in a word is said here alone; a holder of tables only gives out words.

use thyra_datapath_abi::source::{Block4, Block6};
use thyra_datapath_abi::{Control, EndpointRecord, EndpointSets, Slot4, Slot6, limits, maps};

/// A table made of 64-bit words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// `maps::IFINDEX`; belongs to no bank.
    Ifindex,
    /// `maps::ENDPOINT_SETS`.
    EndpointSets,
    /// `maps::SOURCES4`.
    Sources4,
    /// `maps::SOURCES6`.
    Sources6,
    /// `maps::CLASS_COLUMN`.
    ClassColumn,
    /// `maps::PORT_CLASS`.
    PortClass,
    /// `maps::SETS`.
    Sets,
    /// `maps::ROWS`.
    Rows,
}

impl Table {
    /// Those that exist once per bank, in the order in which they are read.
    pub const BANKED: [Self; 7] = [
        Self::EndpointSets,
        Self::Sources4,
        Self::Sources6,
        Self::ClassColumn,
        Self::PortClass,
        Self::Sets,
        Self::Rows,
    ];

    /// Name of its map.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ifindex => maps::IFINDEX,
            Self::EndpointSets => maps::ENDPOINT_SETS,
            Self::Sources4 => maps::SOURCES4,
            Self::Sources6 => maps::SOURCES6,
            Self::ClassColumn => maps::CLASS_COLUMN,
            Self::PortClass => maps::PORT_CLASS,
            Self::Sets => maps::SETS,
            Self::Rows => maps::ROWS,
        }
    }

    /// 64-bit words in one bank (in the whole map for `Ifindex`).
    #[must_use]
    #[inline(always)]
    pub const fn words(self) -> usize {
        match self {
            Self::Ifindex => limits::IFINDEX_SLOTS / 4,
            Self::EndpointSets => limits::MAX_ENDPOINTS,
            Self::Sources4 => limits::BUCKETS * limits::SLOTS4,
            Self::Sources6 => limits::BUCKETS * limits::SLOTS6 * 3,
            Self::ClassColumn => limits::MAX_CLASSES / 4,
            Self::PortClass => 65_536 / 4,
            Self::Sets => limits::MAX_SETS * limits::MAX_PORT_CLASSES / 4,
            Self::Rows => limits::MAX_ROWS * limits::MAX_COLUMNS / 4,
        }
    }
}

/// Whoever holds the tables: the kernel's maps, their mmap, or memory on the host.
///
/// `index` counts over both banks: bank 1 begins at `Table::words()` (at `limits::BUCKETS` for buckets).
pub trait Tables {
    /// The live control word.
    fn control(&self) -> Control;
    /// The interface side of an endpoint; none when the id is out of range.
    fn record(&self, endpoint: u16) -> Option<&EndpointRecord>;
    /// One word of a table other than `Sources4` and `Sources6`; zero when `index` is out of range.
    fn word(&self, table: Table, index: u32) -> u64;
    /// One bucket of `Sources4`.
    fn bucket4(&self, index: u32) -> Option<&[Slot4; limits::SLOTS4]>;
    /// One bucket of `Sources6`.
    fn bucket6(&self, index: u32) -> Option<&[Slot6; limits::SLOTS6]>;
    /// Class of the longest IPv4 block that holds the key's address.
    fn block4(&self, key: &Block4) -> Option<u32>;
    /// The same for IPv6.
    fn block6(&self, key: &Block6) -> Option<u32>;
}

/// Entry `index` of a u16 table that begins at word `base`.
#[inline(always)]
pub(crate) fn entry<T: Tables + ?Sized>(tables: &T, table: Table, base: u32, index: u32) -> u16 {
    let word = tables.word(table, base + (index >> 2));
    low16(word >> ((index & 3) * 16))
}

#[inline(always)]
pub(crate) fn low16(word: u64) -> u16 {
    let [a, b, ..] = word.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// A constant that is known to fit (each use is one of `limits`).
#[inline(always)]
pub(crate) const fn number(constant: usize) -> u32 {
    assert!(constant <= 0xffff_ffff, "a table has fewer words than that");
    #[expect(
        clippy::as_conversions,
        clippy::cast_possible_truncation,
        reason = "asserted above; const has no try_from"
    )]
    let number = constant as u32;
    number
}

/// First word of the live bank.
#[inline(always)]
pub(crate) fn bank_base(table: Table, control: Control) -> u32 {
    control.bank() * number(table.words())
}

/// The policy side of an endpoint, from the live bank.
#[inline(always)]
pub fn endpoint_sets<T: Tables + ?Sized>(tables: &T, control: Control, endpoint: u16) -> EndpointSets {
    let base = bank_base(Table::EndpointSets, control);
    EndpointSets(tables.word(Table::EndpointSets, base + u32::from(endpoint)))
}

/// The endpoint whose interface this is, with its record.
#[inline(always)]
pub fn endpoint_at<T: Tables + ?Sized>(tables: &T, ifindex: u32) -> Option<(u16, &EndpointRecord)> {
    let slot = ifindex % number(limits::IFINDEX_SLOTS);
    let endpoint = entry(tables, Table::Ifindex, 0, slot);
    let record = tables.record(endpoint)?;
    (endpoint != 0 && record.ifindex == ifindex).then_some((endpoint, record))
}
