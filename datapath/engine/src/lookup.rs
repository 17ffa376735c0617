//! From a source address and a port to the cell: class, column, port class, row, cell.
//!
//! Invariant: a way that leads to a word nobody wrote ends in an all-zero cell, which drops; rows and columns
//! are stored plus one for that.

use thyra_datapath_abi::limits::BUCKETS;
use thyra_datapath_abi::{Cell, Control};

use crate::family::Address6;
use crate::tables::{Tables, number};

/// What the address tables say of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its class; 0 is the outsider that no block holds.
    pub class: u16,
    /// The local endpoint that owns the address, or 0.
    pub local: u16,
    /// Whether the address itself is in the tables (else only a block, or nothing).
    pub exact: bool,
}

const MASK: u32 = number(BUCKETS) - 1;
/// A 32-bit product's upper bits choose the bucket.
const SHIFT4: u32 = 32 - BUCKETS.trailing_zeros();
const SHIFT6: u32 = 64 - BUCKETS.trailing_zeros();
const _: () = assert!(BUCKETS.is_power_of_two());

/// The two buckets in which an IPv4 address may be.
#[must_use]
#[inline(always)]
pub fn buckets4(address: u32) -> (u32, u32) {
    let first = address.wrapping_mul(0x9e37_79b1) >> SHIFT4;
    let second = (address ^ 0x5bd1_e995).wrapping_mul(0x85eb_ca6b) >> SHIFT4;
    (first & MASK, second & MASK)
}

/// The two buckets in which an IPv6 address may be.
#[must_use]
#[inline(always)]
pub fn buckets6(address: Address6) -> (u32, u32) {
    let mixed =
        (address.high.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ address.low).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let second = (mixed ^ (mixed >> 32)).wrapping_mul(0x94d0_49bb_1331_11eb) >> SHIFT6;
    (bucket_number(mixed >> SHIFT6), bucket_number(second))
}

#[inline(always)]
fn bucket_number(bits: u64) -> u32 {
    let [a, b, c, d, ..] = bits.to_le_bytes();
    u32::from_le_bytes([a, b, c, d]) & MASK
}

/// Class and owner of an IPv4 source.
#[inline(always)]
pub fn source4<T: Tables + ?Sized>(tables: &T, address: u32) -> Source {
    let (first, second) = buckets4(address);
    for bucket in [first, second] {
        for slot in tables.bucket4(bucket) {
            if slot.address() == address && address != 0 {
                return Source {
                    class: slot.class(),
                    local: slot.local(),
                    exact: true,
                };
            }
        }
    }
    let class = if tables.control().has(Control::BLOCKS4) {
        tables.block4(address)
    } else {
        0
    };
    Source {
        class,
        local: 0,
        exact: false,
    }
}

/// Class and owner of an IPv6 source.
#[inline(always)]
pub fn source6<T: Tables + ?Sized>(tables: &T, address: Address6) -> Source {
    let (first, second) = buckets6(address);
    for bucket in [first, second] {
        for slot in tables.bucket6(bucket) {
            if slot.low == address.low && slot.high == address.high && address != Address6::default() {
                return Source {
                    class: slot.class(),
                    local: slot.local(),
                    exact: true,
                };
            }
        }
    }
    let class = if tables.control().has(Control::BLOCKS6) {
        tables.block6(address)
    } else {
        0
    };
    Source {
        class,
        local: 0,
        exact: false,
    }
}

/// The cell of (policy set, source class, destination port).
#[inline(always)]
pub fn cell<T: Tables + ?Sized>(tables: &T, set: u16, class: u16, port: [u8; 2]) -> Cell {
    let row = tables.row(set, tables.port_class(u16::from_be_bytes(port)));
    tables.cell(row, tables.column(class))
}
