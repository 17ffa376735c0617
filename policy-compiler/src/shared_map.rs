//! An ordered map in shared chunks: a copy shares them all, a change copies one, and two copies are compared
//! chunk by chunk.
//!
//! Invariant: every chunk holds entries, and an entry lies in the last chunk whose bound does not exceed its key.

use std::borrow::Borrow;
use std::collections::{BTreeMap, HashSet};
use std::ops::Bound;
use std::sync::Arc;

/// Entries of a chunk before it is split.
const CHUNK: usize = 128;

type Chunk<K, V> = Arc<BTreeMap<K, V>>;

/// See the module. Keys and values are cheap to clone: numbers, `Arc`s.
#[derive(Clone)]
pub struct SharedMap<K, V> {
    /// By bound.
    chunks: BTreeMap<K, Chunk<K, V>>,
    len: usize,
}

impl<K: Ord + Clone, V: Clone> SharedMap<K, V> {
    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The value of `key`.
    pub fn get<Q: Ord + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.chunk(key).and_then(|(_, chunk)| chunk.get(key))
    }

    /// The value of `key`, to change it.
    pub fn get_mut<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<&mut V>
    where
        K: Borrow<Q>,
    {
        let bound: K = self.chunk(key).map(|(bound, _)| bound.clone())?;
        Arc::make_mut(self.chunks.get_mut::<K>(&bound)?).get_mut(key)
    }

    /// Whether `key` has a value.
    pub fn contains_key<Q: Ord + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    /// Sets the value of `key`; the one it had.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let bound = match self.chunk(&key) {
            Some((bound, _)) => bound.clone(),
            None => {
                // Before all others: the first chunk begins here now.
                let first = self.chunks.pop_first().map(|(_, chunk)| chunk);
                self.chunks.insert(key.clone(), first.unwrap_or_default());
                key.clone()
            }
        };
        let chunk = Arc::make_mut(self.chunks.get_mut(&bound)?);
        let before = chunk.insert(key, value);
        self.len += usize::from(before.is_none());
        let middle = (chunk.len() > CHUNK).then(|| chunk.keys().nth(CHUNK / 2).cloned());
        if let Some(middle) = middle.flatten() {
            let upper = chunk.split_off(&middle);
            self.chunks.insert(middle, Arc::new(upper));
        }
        before
    }

    /// Takes the entry of `key` out; the value it had.
    pub fn remove<Q: Ord + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        let held = self.chunk(key).filter(|(_, chunk)| chunk.contains_key(key));
        let bound: K = held.map(|(bound, _)| bound.clone())?;
        let chunk = Arc::make_mut(self.chunks.get_mut::<K>(&bound)?);
        let before = chunk.remove(key);
        if chunk.is_empty() {
            self.chunks.remove::<K>(&bound);
        }
        self.len -= usize::from(before.is_some());
        before
    }

    /// Keeps the entries that `keep` holds for.
    pub fn retain(&mut self, mut keep: impl FnMut(&K, &V) -> bool) {
        let gone: Vec<K> = self
            .iter()
            .filter(|(key, value)| !keep(key, value))
            .map(|(key, _)| key.clone())
            .collect();
        for key in gone {
            self.remove(&key);
        }
    }

    /// Entries by key.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.chunks.values().flat_map(|chunk| chunk.iter())
    }

    /// Keys, ascending.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    /// Values by key.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    /// What `after` no longer holds and what it holds anew; an entry whose value is not the `same` is both.
    /// Costs a look at each chunk and at the entries of those that changed.
    pub fn differences(&self, after: &Self, same: impl Fn(&V, &V) -> bool) -> Differences<K, V> {
        let (old, new) = (self.pointers(), after.pointers());
        differences(self.outside(&new), after.outside(&old), same)
    }

    fn chunk<Q: Ord + ?Sized>(&self, key: &Q) -> Option<(&K, &Chunk<K, V>)>
    where
        K: Borrow<Q>,
    {
        let upto = (Bound::Unbounded, Bound::Included(key));
        self.chunks.range::<Q, _>(upto).next_back()
    }

    fn pointers(&self) -> HashSet<*const BTreeMap<K, V>> {
        self.chunks.values().map(Arc::as_ptr).collect()
    }

    /// Entries of the chunks that are not among `shared`.
    fn outside(&self, shared: &HashSet<*const BTreeMap<K, V>>) -> impl Iterator<Item = (&K, &V)> {
        let own = self.chunks.values();
        own.filter(|chunk| !shared.contains(&Arc::as_ptr(chunk)))
            .flat_map(|chunk| chunk.iter())
    }
}

/// Entries that went and that came, by key.
pub type Differences<K, V> = (Vec<(K, V)>, Vec<(K, V)>);

/// What `after` no longer holds and what it holds anew, both in order of keys.
pub fn differences<'a, K: Ord + Clone + 'a, V: Clone + 'a>(
    before: impl Iterator<Item = (&'a K, &'a V)>,
    after: impl Iterator<Item = (&'a K, &'a V)>,
    same: impl Fn(&V, &V) -> bool,
) -> Differences<K, V> {
    let (mut gone, mut come) = (Vec::new(), Vec::new());
    let (mut left, mut right) = (before.peekable(), after.peekable());
    loop {
        let order = match (left.peek(), right.peek()) {
            (None, None) => return (gone, come),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some((a, _)), Some((b, _))) => a.cmp(b),
        };
        let old = order.is_le().then(|| left.next()).flatten();
        let new = order.is_ge().then(|| right.next()).flatten();
        match (old, new) {
            (Some((_, old)), Some((_, new))) if same(old, new) => {}
            (old, new) => {
                gone.extend(old.map(|(key, value)| (key.clone(), value.clone())));
                come.extend(new.map(|(key, value)| (key.clone(), value.clone())));
            }
        }
    }
}

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        Self {
            chunks: BTreeMap::new(),
            len: 0,
        }
    }
}

impl<K: Ord + Clone + std::fmt::Debug, V: Clone + std::fmt::Debug> std::fmt::Debug for SharedMap<K, V> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K: Ord + Clone, V: Clone + PartialEq> PartialEq for SharedMap<K, V> {
    fn eq(&self, other: &Self) -> bool {
        self.len == other.len && self.iter().eq(other.iter())
    }
}

impl<K: Ord + Clone + Borrow<Q>, V: Clone, Q: Ord + ?Sized> std::ops::Index<&Q> for SharedMap<K, V> {
    type Output = V;

    /// # Panics
    /// When `key` has no value, as a `BTreeMap` does.
    #[expect(clippy::expect_used, reason = "what indexing means")]
    fn index(&self, key: &Q) -> &V {
        self.get(key).expect("no entry found for key")
    }
}

impl<K: Ord + Clone, V: Clone> FromIterator<(K, V)> for SharedMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let mut map = Self::default();
        map.extend(entries);
        map
    }
}

impl<K: Ord + Clone, V: Clone> Extend<(K, V)> for SharedMap<K, V> {
    fn extend<I: IntoIterator<Item = (K, V)>>(&mut self, entries: I) {
        for (key, value) in entries {
            self.insert(key, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pairs(map: &SharedMap<u16, u8>) -> Vec<(u16, u8)> {
        map.iter().map(|(key, value)| (*key, *value)).collect()
    }

    proptest! {
        #[test]
        fn it_is_the_map_that_the_same_changes_make_of_a_btree(
            changes in prop::collection::vec((0_u16..600, prop::option::weighted(0.6, any::<u8>())), 0..1500),
            cut in 0_usize..1500,
        ) {
            let mut shared = SharedMap::default();
            let mut plain = BTreeMap::new();
            let mut copies = None;
            for (at, (key, value)) in changes.into_iter().enumerate() {
                if at == cut {
                    copies = Some((shared.clone(), plain.clone()));
                }
                match value {
                    Some(value) => prop_assert_eq!(shared.insert(key, value), plain.insert(key, value)),
                    None => prop_assert_eq!(shared.remove(&key), plain.remove(&key)),
                }
                prop_assert_eq!(shared.get(&key), plain.get(&key));
            }
            prop_assert_eq!(shared.len(), plain.len());
            prop_assert_eq!(pairs(&shared), plain.clone().into_iter().collect::<Vec<_>>());
            if let Some((shared_before, plain_before)) = copies {
                prop_assert_eq!(pairs(&shared_before), plain_before.clone().into_iter().collect::<Vec<_>>());
                prop_assert_eq!(
                    shared_before.differences(&shared, |a, b| a == b),
                    differences(plain_before.iter(), plain.iter(), |a, b| a == b)
                );
            }
        }
    }

    #[test]
    fn a_changed_copy_shares_the_other_chunks() {
        let before: SharedMap<u32, u32> = (0..10_000).map(|n| (n, n)).collect();
        let mut after = before.clone();
        after.insert(5_000, 1);
        let own = after.outside(&before.pointers()).count();
        assert!((1..=CHUNK).contains(&own), "{own}");
        assert_eq!(
            before.differences(&after, |a, b| a == b),
            (vec![(5_000, 5_000)], vec![(5_000, 1)])
        );
    }
}
