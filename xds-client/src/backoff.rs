//! How long to wait before the next try.
//!
//! Invariant: a pure function of seed and attempt; every wait lies between nothing and the bound of its
//! attempt, so that the agents of a thousand nodes don't come back at once.

use std::time::Duration;

/// Bounds of the waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    /// Bound of the first wait; each further one doubles it.
    pub base: Duration,
    /// Bound that no wait exceeds.
    pub cap: Duration,
    /// Mean wait after the config stream was refused: half of it to one and a half.
    pub refused: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            base: Duration::from_millis(10),
            cap: Duration::from_secs(15),
            refused: Duration::from_secs(30),
        }
    }
}

impl Pace {
    /// The wait after `attempt` tries that failed (0: the first just did), with full jitter.
    #[must_use]
    pub fn delay(&self, seed: u64, attempt: u32) -> Duration {
        let factor = 1_u32.checked_shl(attempt).unwrap_or(u32::MAX);
        let bound = self.base.saturating_mul(factor).min(self.cap);
        share(bound, mix(seed, attempt))
    }

    /// The wait after a refusal that only somebody else's action can lift.
    #[must_use]
    pub fn after_refusal(&self, seed: u64, attempt: u32) -> Duration {
        self.refused / 2 + share(self.refused, mix(seed, attempt))
    }
}

/// The part of `bound` that `dice` names, of 2^32 equal ones.
fn share(bound: Duration, dice: u32) -> Duration {
    let nanos = bound.as_nanos().saturating_mul(u128::from(dice)) >> 32;
    // Never more than `bound`, which fits: 2^64 ns are 584 years.
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// Upper half of splitmix64, whose outputs are independent for neighbouring inputs.
fn mix(seed: u64, attempt: u32) -> u32 {
    let mut z = seed.wrapping_add(
        u64::from(attempt)
            .wrapping_add(1)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15),
    );
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^= z >> 31;
    u32::try_from(z >> 32).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_stay_under_a_doubling_bound_and_the_cap() {
        let pace = Pace::default();
        for seed in 0..500 {
            for attempt in 0..70 {
                let bound = Duration::from_millis(10 << attempt.min(11)).min(Duration::from_secs(15));
                assert!(
                    pace.delay(seed, attempt) <= bound,
                    "seed {seed}, attempt {attempt}"
                );
            }
        }
    }

    #[test]
    fn waits_are_spread_over_the_whole_range() {
        let pace = Pace::default();
        let waits: Vec<Duration> = (0..1000).map(|seed| pace.delay(seed, 40)).collect();
        let mean = waits.iter().sum::<Duration>() / 1000;
        assert!(waits.iter().min().unwrap() < &Duration::from_millis(300));
        assert!(waits.iter().max().unwrap() > &Duration::from_millis(14_700));
        assert!(
            mean > Duration::from_secs(7) && mean < Duration::from_secs(8),
            "mean {mean:?}"
        );
    }

    #[test]
    fn the_same_seed_waits_the_same() {
        let pace = Pace::default();
        assert_eq!(pace.delay(7, 3), pace.delay(7, 3));
        assert_ne!(pace.delay(7, 3), pace.delay(8, 3));
    }

    #[test]
    fn a_refusal_is_retried_slowly() {
        let pace = Pace::default();
        for seed in 0..500 {
            let wait = pace.after_refusal(seed, 0);
            assert!(
                wait >= Duration::from_secs(15) && wait <= Duration::from_secs(45),
                "{wait:?}"
            );
        }
    }
}
