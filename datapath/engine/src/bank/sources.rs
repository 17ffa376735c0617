//! The tables of exact addresses: two buckets for each, the first of them that has room.
//!
//! Invariant: every address of the tables is in one of its two buckets, or it is named as what does not fit.

use std::net::IpAddr;

use thyra_datapath_abi::limits::{BUCKETS, SLOTS4, SLOTS6};
use thyra_datapath_abi::tables::Tables;
use thyra_datapath_abi::{Slot4, Slot6};

use super::{Overflow, kernel_class};
use crate::Table;
use crate::family::Address6;
use crate::lookup::{buckets4, buckets6};

/// How many times an insertion may move another address before the table counts as full.
const MAX_MOVES: usize = 512;

pub(super) fn sources4(tables: &Tables) -> Result<Vec<u64>, Overflow> {
    let mut buckets: Vec<[Slot4; SLOTS4]> = vec![[Slot4::default(); SLOTS4]; BUCKETS];
    for source in tables.addresses.iter() {
        let IpAddr::V4(address) = source.address else {
            continue;
        };
        let class = kernel_class(source.class, tables)?;
        let slot = Slot4::new(u32::from(address), class, source.local);
        place(&mut buckets, slot, |slot| buckets4(slot.address())).map_err(|_| Overflow::Address {
            address: source.address,
            map: Table::Sources4.name(),
        })?;
    }
    Ok(buckets.iter().flatten().map(|slot| slot.0).collect())
}

pub(super) fn sources6(tables: &Tables) -> Result<Vec<u64>, Overflow> {
    let mut buckets: Vec<[Slot6; SLOTS6]> = vec![[Slot6::default(); SLOTS6]; BUCKETS];
    for source in tables.addresses.iter() {
        let IpAddr::V6(address) = source.address else {
            continue;
        };
        let class = kernel_class(source.class, tables)?;
        let Address6 { high, low } = Address6::from_bytes(address.octets());
        let value = u64::from(class) | u64::from(source.local) << 16;
        place(&mut buckets, Slot6 { high, low, value }, |slot| {
            buckets6(Address6 {
                high: slot.high,
                low: slot.low,
            })
        })
        .map_err(|_| Overflow::Address {
            address: source.address,
            map: Table::Sources6.name(),
        })?;
    }
    Ok(buckets
        .iter()
        .flatten()
        .flat_map(|slot| [slot.high, slot.low, slot.value])
        .collect())
}

/// The table has no room for a slot.
struct Full;

/// Puts a slot into the first of its buckets with room, else moves others out of the way (cuckoo hashing).
fn place<S, const N: usize>(
    buckets: &mut [[S; N]],
    slot: S,
    choices: impl Fn(&S) -> (u32, u32),
) -> Result<(), Full>
where
    S: Copy + Default + PartialEq,
{
    let index = |bucket: u32| usize::try_from(bucket).map_err(|_| Full);
    let mut homeless = slot;
    let mut avoid = None;
    for round in 0..MAX_MOVES {
        let (first, second) = choices(&homeless);
        let (first, second) = (index(first)?, index(second)?);
        for bucket in [first, second] {
            let bucket = buckets.get_mut(bucket).ok_or(Full)?;
            if let Some(free) = bucket.iter_mut().find(|slot| **slot == S::default()) {
                *free = homeless;
                return Ok(());
            }
        }
        // Not back into the bucket that it was just thrown out of.
        let victim = if avoid == Some(second) { first } else { second };
        let bucket = buckets.get_mut(victim).ok_or(Full)?;
        std::mem::swap(&mut bucket[round % N], &mut homeless);
        avoid = Some(victim);
    }
    Err(Full)
}

const _: () =
    assert!(size_of::<[Slot4; SLOTS4]>() == SLOTS4 * 8 && size_of::<[Slot6; SLOTS6]>() == SLOTS6 * 24);
