//! A CIDR table: one LPM trie for both banks, told apart by the first 32 bits of the key.
//!
//! Invariant: only keys of the bank that is being written are touched.

use std::collections::BTreeMap;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Map, MapData, MapError};

/// A block's own part of the key: prefix length (32 bits of the bank included) and the address bytes.
pub(crate) type Entries<const A: usize> = BTreeMap<(u32, [u8; A]), u32>;

/// The trie; `A` is the size of an address, `K` of bank and address.
pub(crate) struct Blocks<const A: usize, const K: usize> {
    trie: LpmTrie<MapData, [u8; K], u32>,
    /// What each bank holds; none when it isn't known.
    banks: [Option<Entries<A>>; 2],
}

impl<const A: usize, const K: usize> Blocks<A, K> {
    pub(crate) fn new(map: MapData) -> Result<Self, MapError> {
        assert_eq!(A + 4, K, "bank and address");
        Ok(Self {
            trie: LpmTrie::try_from(Map::LpmTrie(map))?,
            banks: [None, None],
        })
    }

    /// What `bank` (0 or 1) holds, read from the kernel.
    pub(crate) fn read(&self, bank: u32) -> Result<Entries<A>, MapError> {
        let mut entries = Entries::new();
        for entry in self.trie.iter() {
            let (key, class) = entry?;
            let (of, address) = split(key.data());
            if of == bank {
                entries.insert((key.prefix_len(), address), class);
            }
        }
        Ok(entries)
    }

    /// Makes `bank` hold exactly `wanted`. Returns how many entries changed. After an error the bank holds
    /// something between; the next call starts from what the kernel has.
    pub(crate) fn write(&mut self, bank: u32, wanted: &Entries<A>) -> Result<usize, MapError> {
        let slot = usize::from(bank != 0);
        let held = match self.banks[slot].take() {
            Some(held) => held,
            None => self.read(bank)?,
        };
        let mut changes = 0;
        for ((prefix, address), _) in held.iter().filter(|(key, _)| !wanted.contains_key(key)) {
            self.trie.remove(&Key::new(*prefix, join(bank, address)))?;
            changes += 1;
        }
        for (key, class) in wanted.iter().filter(|(key, class)| held.get(key) != Some(class)) {
            self.trie.insert(&Key::new(key.0, join(bank, &key.1)), class, 0)?;
            changes += 1;
        }
        self.banks[slot] = Some(wanted.clone());
        Ok(changes)
    }
}

fn join<const A: usize, const K: usize>(bank: u32, address: &[u8; A]) -> [u8; K] {
    let mut key = [0; K];
    key[..4].copy_from_slice(&bank.to_ne_bytes());
    key[4..].copy_from_slice(address);
    key
}

fn split<const A: usize, const K: usize>(key: [u8; K]) -> (u32, [u8; A]) {
    let mut bank = [0; 4];
    bank.copy_from_slice(&key[..4]);
    let mut address = [0; A];
    address.copy_from_slice(&key[4..]);
    (u32::from_ne_bytes(bank), address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_splits_into_what_it_was_joined_from() {
        let key: [u8; 8] = join(1, &[10, 0, 0, 1]);
        assert_eq!(split::<4, 8>(key), (1, [10, 0, 0, 1]));
    }
}
