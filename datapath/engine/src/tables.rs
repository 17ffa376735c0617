//! The policy tables as the programs see them: the bank that was live when they were opened, and the state
//! beside it.
//!
//! Invariant: everything that is asked of one `Tables` comes from one bank. An index is brought into its table
//! by whoever holds it; what nobody wrote is zero, which never allows.

use core::mem::offset_of;

use thyra_datapath_abi::{Bank, Cell, Control, EndpointRecord, EndpointSets, Slot4, Slot6, limits};

use crate::family::Address6;

/// A table of a bank; user space writes it as 64-bit words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// `Bank::endpoint_sets`.
    EndpointSets,
    /// `Bank::sources4`.
    Sources4,
    /// `Bank::sources6`.
    Sources6,
    /// `Bank::class_column`.
    ClassColumn,
    /// `Bank::port_class`.
    PortClass,
    /// `Bank::sets`.
    Sets,
    /// `Bank::rows`.
    Rows,
}

const WORD: usize = size_of::<u64>();

impl Table {
    /// All of them, in the order in which they are read.
    pub const ALL: [Self; 7] = [
        Self::EndpointSets,
        Self::Sources4,
        Self::Sources6,
        Self::ClassColumn,
        Self::PortClass,
        Self::Sets,
        Self::Rows,
    ];

    /// What errors and status call it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::EndpointSets => "ENDPOINT_SETS",
            Self::Sources4 => "SOURCES4",
            Self::Sources6 => "SOURCES6",
            Self::ClassColumn => "CLASS_COLUMN",
            Self::PortClass => "PORT_CLASS",
            Self::Sets => "SETS",
            Self::Rows => "ROWS",
        }
    }

    /// Its first word in a bank.
    #[must_use]
    pub const fn start(self) -> usize {
        let bytes = match self {
            Self::EndpointSets => offset_of!(Bank, endpoint_sets),
            Self::Sources4 => offset_of!(Bank, sources4),
            Self::Sources6 => offset_of!(Bank, sources6),
            Self::ClassColumn => offset_of!(Bank, class_column),
            Self::PortClass => offset_of!(Bank, port_class),
            Self::Sets => offset_of!(Bank, sets),
            Self::Rows => offset_of!(Bank, rows),
        };
        bytes / WORD
    }

    /// Its 64-bit words in a bank.
    #[must_use]
    pub const fn words(self) -> usize {
        match self {
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

/// 64-bit words of a bank.
pub const BANK_WORDS: usize = size_of::<Bank>() / WORD;

const _: () = {
    let mut end = 0;
    let mut i = 0;
    while i < Table::ALL.len() {
        assert!(Table::ALL[i].start() == end, "the tables lie one after the other");
        end += Table::ALL[i].words();
        i += 1;
    }
    assert!(end == BANK_WORDS, "a bank is its tables");
};

/// Whoever holds the tables: the kernel's maps, a copy of them, or memory on the host.
pub trait Tables {
    /// The control word that says which bank this is.
    fn control(&self) -> Control;
    /// The endpoint id in a slot of the interface table; 0 for none.
    fn endpoint_in(&self, slot: u32) -> u16;
    /// The interface side of an endpoint.
    fn record(&self, endpoint: u16) -> &EndpointRecord;
    /// The policy side of an endpoint.
    fn sets(&self, endpoint: u16) -> EndpointSets;
    /// One bucket of the IPv4 sources.
    fn bucket4(&self, index: u32) -> &[Slot4; limits::SLOTS4];
    /// One bucket of the IPv6 sources.
    fn bucket6(&self, index: u32) -> &[Slot6; limits::SLOTS6];
    /// Class of the longest IPv4 block that holds the address; 0, the outsider's, when none does.
    fn block4(&self, address: u32) -> u16;
    /// The same for IPv6.
    fn block6(&self, address: Address6) -> u16;
    /// Column plus one of a source class.
    fn column(&self, class: u16) -> u16;
    /// Port class of a destination port.
    fn port_class(&self, port: u16) -> u16;
    /// Row plus one of a policy set and a port class.
    fn row(&self, set: u16, port_class: u16) -> u16;
    /// The cell of a row plus one and a column plus one.
    fn cell(&self, row: u16, column: u16) -> Cell;
}

/// The endpoint whose interface this is, with its record.
#[inline(always)]
pub fn endpoint_at<T: Tables + ?Sized>(tables: &T, ifindex: u32) -> Option<(u16, &EndpointRecord)> {
    let endpoint = tables.endpoint_in(ifindex % number(limits::IFINDEX_SLOTS));
    let record = tables.record(endpoint);
    (endpoint != 0 && record.ifindex == ifindex).then_some((endpoint, record))
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
