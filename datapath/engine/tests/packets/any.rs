//! Frames that nobody wrote: those of the cases, changed at random.
//!
//! Invariant: the same seed gives the same frames.

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

/// Bytes that mean something somewhere: lengths, protocols, versions, options, flags.
const TELLING: [u8; 20] = [
    0, 1, 2, 4, 5, 6, 17, 0x11, 0x14, 0x2c, 0x3a, 0x3c, 0x40, 0x45, 0x46, 0x4f, 0x60, 0x80, 0x81, 0xff,
];
/// Beyond the headers there is little to break.
const HEADERS: usize = 90;
/// What `eth_type_trans` needs.
const SHORTEST: usize = 14;

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(crate) fn below(&mut self, below: usize) -> usize {
        let below = u64::try_from(below.max(1)).unwrap();
        usize::try_from(self.next() % below).unwrap()
    }

    fn byte(&mut self) -> u8 {
        if self.below(2) == 0 {
            TELLING[self.below(TELLING.len())]
        } else {
            self.next().to_le_bytes()[0]
        }
    }

    /// A frame with one to four changes, some of them with a part of `other`.
    pub(crate) fn changed(&mut self, frame: &[u8], other: &[u8]) -> Vec<u8> {
        let mut bytes = frame.to_vec();
        for _ in 0..=self.below(4) {
            self.change(&mut bytes, other);
        }
        bytes
    }

    fn change(&mut self, bytes: &mut Vec<u8>, other: &[u8]) {
        let at = SHORTEST - 2 + self.below(bytes.len().min(HEADERS) - (SHORTEST - 2));
        match self.below(8) {
            0 => bytes[at] ^= 1 << self.below(8),
            1 | 2 => bytes[at] = self.byte(),
            3 => bytes.truncate((at + 1).max(SHORTEST)),
            4 => {
                let more = self.below(60);
                let byte = self.byte();
                bytes.extend(std::iter::repeat_n(byte, more));
            }
            5 => {
                let byte = self.byte();
                bytes.insert(at, byte);
            }
            6 if bytes.len() > SHORTEST => drop(bytes.remove(at)),
            _ => {
                let end = (at + 1 + self.below(20)).min(other.len()).min(bytes.len());
                if at < end {
                    bytes[at..end].copy_from_slice(&other[at..end]);
                }
            }
        }
    }
}

/// `THYRA_PACKETS`, or `usual`.
pub(crate) fn wanted(usual: usize) -> usize {
    std::env::var("THYRA_PACKETS").map_or(usual, |text| text.parse().expect("`THYRA_PACKETS` is a number"))
}
