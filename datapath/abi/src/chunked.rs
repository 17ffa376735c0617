//! A vector whose copies share what none of them has changed since.
//!
//! Invariant: every chunk but the last is full, so an index leads straight to its element.

use std::sync::Arc;

/// Elements of a chunk: what a change copies, and the inverse of what a copy of the whole counts.
const CHUNK: usize = 128;

/// A vector in chunks of 128 elements; a copy costs one count per chunk, a change copies one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunked<T> {
    chunks: Vec<Arc<Vec<T>>>,
}

impl<T> Chunked<T> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        let last = self.chunks.last().map_or(0, |chunk| chunk.len());
        self.chunks.len().saturating_sub(1) * CHUNK + last
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The element at `at`; none beyond the end.
    #[must_use]
    pub fn get(&self, at: usize) -> Option<&T> {
        self.chunks.get(at / CHUNK)?.get(at % CHUNK)
    }

    /// Elements in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &T> {
        self.chunks.iter().flat_map(|chunk| chunk.iter())
    }
}

impl<T: Clone> Chunked<T> {
    /// The element at `at`, to be changed; none beyond the end.
    pub fn get_mut(&mut self, at: usize) -> Option<&mut T> {
        let chunk = self.chunks.get_mut(at / CHUNK)?;
        Arc::make_mut(chunk).get_mut(at % CHUNK)
    }

    /// Adds an element at the end.
    pub fn push(&mut self, element: T) {
        match self.chunks.last_mut().filter(|chunk| chunk.len() < CHUNK) {
            Some(chunk) => Arc::make_mut(chunk).push(element),
            None => {
                let mut chunk = Vec::with_capacity(CHUNK);
                chunk.push(element);
                self.chunks.push(Arc::new(chunk));
            }
        }
    }
}

impl<T> Default for Chunked<T> {
    fn default() -> Self {
        Self { chunks: Vec::new() }
    }
}

impl<T: Clone> FromIterator<T> for Chunked<T> {
    fn from_iter<I: IntoIterator<Item = T>>(elements: I) -> Self {
        let mut chunked = Self::default();
        elements.into_iter().for_each(|element| chunked.push(element));
        chunked
    }
}

impl<T: Clone> From<Vec<T>> for Chunked<T> {
    fn from(elements: Vec<T>) -> Self {
        elements.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_vector_that_it_was_made_from() {
        for len in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK] {
            let plain: Vec<usize> = (0..len).collect();
            let chunked = Chunked::from(plain.clone());
            assert_eq!(chunked.len(), len);
            assert_eq!(chunked.is_empty(), len == 0);
            assert_eq!(chunked.iter().copied().collect::<Vec<_>>(), plain);
            assert!(chunked.iter().rev().eq(plain.iter().rev()));
            let each: Vec<Option<&usize>> = (0..=len).map(|at| chunked.get(at)).collect();
            let expected: Vec<Option<&usize>> = (0..=len).map(|at| plain.get(at)).collect();
            assert_eq!(each, expected);
        }
    }

    #[test]
    fn a_change_copies_its_chunk_and_no_other() {
        let before: Chunked<usize> = (0..10 * CHUNK).collect();
        let mut after = before.clone();
        if let Some(element) = after.get_mut(3 * CHUNK + 7) {
            *element = 0;
        }
        assert_eq!(before.get(3 * CHUNK + 7), Some(&(3 * CHUNK + 7)));
        assert_eq!(after.get(3 * CHUNK + 7), Some(&0));
        let pairs = before.chunks.iter().zip(&after.chunks);
        assert_eq!(pairs.filter(|(a, b)| !Arc::ptr_eq(a, b)).count(), 1);
        assert_eq!(after.get_mut(10 * CHUNK), None);
    }
}
