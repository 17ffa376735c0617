//! The bytes of a connection that are held: the one copy that is judged and that the pod gets.
//!
//! Invariant: bytes come in order and each once; the first copy wins. Whoever sends other bytes in their place is
//! refused, so that what was judged is what the pod reads.

use std::ops::Range;

/// So many bytes of a connection are held; more are dropped and come again.
pub const MAX_BYTES: usize = 16 * 1024;

/// See the module.
#[derive(Debug)]
pub struct Custody {
    /// Sequence number of the first byte.
    base: u32,
    bytes: Vec<u8>,
    /// The client says no more.
    is_ended: bool,
    is_allowed: bool,
}

/// What becomes of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// Nothing: it comes too early, or is too much.
    Nothing,
    /// It is held already: its sender waits for somebody to say so, and goes on only then.
    Known,
    /// These bytes of the copy are new.
    More(Range<usize>),
    /// Other bytes than before, or some behind the end.
    Conflict,
    /// Judged already: these bytes of the copy go to the pod once more.
    Again(Range<usize>),
    /// Behind what was judged: it goes on as it is.
    Beyond,
}

impl Custody {
    /// Of a connection whose client began with this sequence number.
    #[must_use]
    pub fn new(client: u32) -> Self {
        Self {
            base: client.wrapping_add(1),
            bytes: Vec::new(),
            is_ended: false,
            is_allowed: false,
        }
    }

    /// Takes a segment.
    pub fn take(&mut self, sequence: u32, payload: &[u8], fin: bool) -> Taken {
        let Some((at, payload)) = self.place(sequence, payload) else {
            return Taken::Nothing;
        };
        let held = self.bytes.len();
        if self.is_allowed {
            let to = (at + payload.len()).min(held);
            return if at < held || (at == held && self.is_ended && fin) {
                Taken::Again(at.min(to)..to)
            } else {
                Taken::Beyond
            };
        }
        if at > held {
            return Taken::Nothing;
        }
        let known = (held - at).min(payload.len());
        let (again, new) = payload.split_at(known);
        if again != &self.bytes[at..at + known] || (self.is_ended && !new.is_empty()) {
            return Taken::Conflict;
        }
        if fin && at + payload.len() < held {
            return Taken::Conflict;
        }
        let taken = new.get(..MAX_BYTES - held).unwrap_or(new);
        if taken.is_empty() && !new.is_empty() {
            return Taken::Nothing;
        }
        self.bytes.extend_from_slice(taken);
        self.is_ended |= fin && taken.len() == new.len();
        if new.is_empty() {
            Taken::Known
        } else {
            Taken::More(held..self.bytes.len())
        }
    }

    /// Where in the copy a segment begins, without what lies before it; none where all of it does.
    fn place<'a>(&self, sequence: u32, payload: &'a [u8]) -> Option<(usize, &'a [u8])> {
        let ahead = sequence.wrapping_sub(self.base);
        if ahead < 1 << 31 {
            return Some((usize::try_from(ahead).ok()?, payload));
        }
        let before = usize::try_from(ahead.wrapping_neg()).ok()?;
        let rest = payload.get(before..)?;
        (!rest.is_empty()).then_some((0, rest))
    }

    /// It was allowed; the sequence number behind the last byte that was judged.
    pub fn allow(&mut self) -> u32 {
        self.is_allowed = true;
        self.sequence(self.bytes.len())
    }

    /// Whether it was.
    #[must_use]
    pub fn is_allowed(&self) -> bool {
        self.is_allowed
    }

    /// All that is held.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether the client has said all it has to say.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.is_ended
    }

    /// Sequence number of a byte of the copy.
    #[must_use]
    pub fn sequence(&self, at: usize) -> u32 {
        self.base.wrapping_add(u32::try_from(at).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: u32 = u32::MAX - 3;

    fn custody() -> Custody {
        Custody::new(CLIENT)
    }

    fn at(offset: u32) -> u32 {
        CLIENT.wrapping_add(1).wrapping_add(offset)
    }

    #[test]
    fn bytes_are_taken_in_order_and_over_the_end_of_the_numbers() {
        let mut held = custody();
        assert_eq!(held.take(at(0), b"abcd", false), Taken::More(0..4));
        assert_eq!(held.take(at(4), b"ef", false), Taken::More(4..6));
        assert_eq!(held.bytes(), b"abcdef");
        assert_eq!(held.allow(), at(6));
    }

    #[test]
    fn what_comes_too_early_is_dropped() {
        let mut held = custody();
        assert_eq!(held.take(at(4), b"ef", false), Taken::Nothing);
        assert_eq!(held.take(at(0), b"abcd", false), Taken::More(0..4));
        assert_eq!(held.bytes(), b"abcd");
    }

    #[test]
    fn the_same_bytes_again_are_no_conflict_and_what_follows_them_is_taken() {
        let mut held = custody();
        assert_eq!(held.take(at(0), b"abcd", false), Taken::More(0..4));
        assert_eq!(held.take(at(0), b"abcd", false), Taken::Known);
        assert_eq!(held.take(at(2), b"cdef", false), Taken::More(4..6));
        assert_eq!(
            held.take(CLIENT, b"?abcdefg", false),
            Taken::More(6..7),
            "a byte before the first"
        );
        assert_eq!(held.bytes(), b"abcdefg");
    }

    #[test]
    fn other_bytes_in_the_place_of_held_ones_are_a_conflict() {
        let mut held = custody();
        assert_eq!(held.take(at(0), b"abcd", false), Taken::More(0..4));
        for (sequence, other) in [(0, b"abcx"), (1, b"bcdx"), (3, b"xxxx")] {
            let mut held = custody();
            assert_eq!(held.take(at(0), b"abcd", false), Taken::More(0..4));
            let is_more = sequence == 1;
            let taken = held.take(at(sequence), other, false);
            assert_eq!(taken == Taken::Conflict, !is_more, "{sequence}: {taken:?}");
        }
    }

    #[test]
    fn bytes_behind_the_end_are_a_conflict() {
        let mut held = custody();
        assert_eq!(held.take(at(0), b"ab", true), Taken::More(0..2));
        assert_eq!(held.take(at(0), b"ab", true), Taken::Known);
        assert_eq!(held.take(at(2), b"c", false), Taken::Conflict);
        let mut held = custody();
        assert_eq!(held.take(at(0), b"abcd", false), Taken::More(0..4));
        assert_eq!(
            held.take(at(0), b"ab", true),
            Taken::Conflict,
            "an end before bytes that are held"
        );
    }

    #[test]
    fn too_many_bytes_are_dropped_and_conflict_with_nothing() {
        let mut held = custody();
        let all = vec![7; MAX_BYTES];
        assert_eq!(held.take(at(0), &all, false), Taken::More(0..MAX_BYTES));
        assert_eq!(held.take(at(16_384), b"x", false), Taken::Nothing);
        assert_eq!(held.bytes().len(), MAX_BYTES);
        let mut held = custody();
        assert_eq!(held.take(at(0), b"ab", false), Taken::More(0..2));
        assert_eq!(
            held.take(at(0), &[b"ab", &*all].concat(), true),
            Taken::More(2..MAX_BYTES)
        );
        assert!(!held.is_ended(), "its end is behind what was taken");
    }

    #[test]
    fn once_allowed_the_pod_gets_the_copy_whatever_is_sent_in_its_place() {
        let mut held = custody();
        assert_eq!(held.take(at(0), b"abcd", false), Taken::More(0..4));
        held.allow();
        assert_eq!(held.take(at(1), b"XXXXXX", false), Taken::Again(1..4));
        assert_eq!(held.take(at(0), b"X", false), Taken::Again(0..1));
        assert_eq!(held.take(at(4), b"more", false), Taken::Beyond);
        assert_eq!(held.take(at(9), b"more", false), Taken::Beyond);
        assert_eq!(held.bytes(), b"abcd");
    }
}
