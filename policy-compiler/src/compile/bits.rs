//! A set of small numbers below a fixed length, one bit each.
//!
//! Invariant: bits at and beyond the length are zero, so equality and emptiness are those of the words.

const WORD: usize = 64;

/// The set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Bits {
    words: Vec<u64>,
}

impl Bits {
    pub(crate) fn empty(length: usize) -> Self {
        Self {
            words: vec![0; length.div_ceil(WORD)],
        }
    }

    pub(crate) fn full(length: usize) -> Self {
        let mut bits = Self {
            words: vec![u64::MAX; length.div_ceil(WORD)],
        };
        let rest = length % WORD;
        if rest != 0
            && let Some(last) = bits.words.last_mut()
        {
            *last = (1 << rest) - 1;
        }
        bits
    }

    pub(crate) fn insert(&mut self, bit: usize) {
        self.words[bit / WORD] |= 1 << (bit % WORD);
    }

    /// Room for `length` bits; the new ones are zero.
    pub(crate) fn grow(&mut self, length: usize) {
        self.words.resize(length.div_ceil(WORD).max(self.words.len()), 0);
    }

    pub(crate) fn contains(&self, bit: usize) -> bool {
        self.words
            .get(bit / WORD)
            .is_some_and(|word| word & (1 << (bit % WORD)) != 0)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    pub(crate) fn keep(&mut self, other: &Self) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a &= b;
        }
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a |= b;
        }
    }

    pub(crate) fn remove(&mut self, other: &Self) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a &= !b;
        }
    }

    pub(crate) fn both(&self, other: &Self) -> Self {
        let mut bits = self.clone();
        bits.keep(other);
        bits
    }

    pub(crate) fn without(&self, other: &Self) -> Self {
        let mut bits = self.clone();
        bits.remove(other);
        bits
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.words.iter().enumerate().flat_map(|(at, word)| {
            std::iter::successors(Some(*word), |rest| Some(rest & rest.wrapping_sub(1)))
                .take_while(|rest| *rest != 0)
                .map(move |rest| at * WORD + usize::try_from(rest.trailing_zeros()).unwrap_or(0))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Bits;

    #[test]
    fn full_has_no_bit_beyond_its_length() {
        for length in [0, 1, 63, 64, 65, 130] {
            assert_eq!(
                Bits::full(length).iter().collect::<Vec<_>>(),
                (0..length).collect::<Vec<_>>()
            );
        }
    }

    #[test]
    fn operations_are_those_of_sets() {
        let (mut a, mut b) = (Bits::empty(130), Bits::empty(130));
        for bit in [0, 64, 129] {
            a.insert(bit);
        }
        b.insert(64);
        assert_eq!(a.both(&b), b);
        assert_eq!(a.without(&b).iter().collect::<Vec<_>>(), [0, 129]);
        assert!(b.without(&a).is_empty());
        assert!(!a.contains(1000));
    }
}
