//! Choices drawn from bytes: a shorter or smaller byte string draws a simpler world, which is how proptest
//! shrinks one.

/// The bytes not drawn yet; after the last one every choice is the first.
pub(crate) struct Entropy<'a>(pub(crate) &'a [u8]);

impl Entropy<'_> {
    /// A number below `below`.
    pub(crate) fn below(&mut self, below: usize) -> usize {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        usize::from(*first) % below.max(1)
    }

    /// True in `percent` of a hundred cases; false when the bytes are out.
    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        let drawn = self.below(100);
        drawn >= 100 - percent.min(100)
    }

    /// One of `choices`.
    pub(crate) fn pick<T: Clone>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())].clone()
    }

    /// At most `most` of what `draw` draws.
    pub(crate) fn some<T>(&mut self, most: usize, mut draw: impl FnMut(&mut Self) -> T) -> Vec<T> {
        let count = self.below(most + 1);
        (0..count).map(|_| draw(self)).collect()
    }
}
