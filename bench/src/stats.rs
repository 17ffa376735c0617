//! Estimates with their 95 % interval.
//!
//! Invariant: a figure is judged by the end of its interval that is worse for us, never by its middle.

/// A central value and its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Estimate {
    /// Mean or median, as the maker says.
    pub(crate) value: f64,
    /// Lower end.
    pub(crate) low: f64,
    /// Upper end.
    pub(crate) high: f64,
    /// Number of samples.
    pub(crate) n: usize,
}

/// Resamples drawn for a bootstrap interval.
const RESAMPLES: usize = 4_000;

/// Median of `samples`; none when there are none.
#[must_use]
pub(crate) fn median(samples: &[f64]) -> Option<f64> {
    quantile(samples, 0.5)
}

/// The `q`-quantile (0 to 1) by the nearest rank; none when there are no samples.
#[must_use]
pub(crate) fn quantile(samples: &[f64], q: f64) -> Option<f64> {
    let mut sorted: Vec<f64> = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().checked_sub(1)?;
    let rank = (0..=last)
        .find(|i| ratio(i + 1, sorted.len()) >= q)
        .unwrap_or(last);
    Some(sorted[rank])
}

/// The `statistic` of `samples` with a bootstrap interval (percentile method, fixed seed).
#[must_use]
pub(crate) fn bootstrap(samples: &[f64], statistic: impl Fn(&[f64]) -> Option<f64>) -> Option<Estimate> {
    let value = statistic(samples)?;
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut drawn = Vec::with_capacity(RESAMPLES);
    let mut resample = vec![0.0; samples.len()];
    for _ in 0..RESAMPLES {
        for slot in &mut resample {
            *slot = samples[random.below(samples.len())];
        }
        drawn.push(statistic(&resample)?);
    }
    Some(Estimate {
        value,
        low: quantile(&drawn, 0.025)?,
        high: quantile(&drawn, 0.975)?,
        n: samples.len(),
    })
}

fn ratio(a: usize, b: usize) -> f64 {
    let exact = |n: usize| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
    exact(a) / exact(b)
}

/// xorshift64*: good enough to draw resamples, and the same on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let mixed = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(mixed).unwrap_or(0) % limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_by_nearest_rank() {
        let samples: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(quantile(&samples, 0.99), Some(99.0));
        assert_eq!(quantile(&samples, 0.5), Some(50.0));
        assert_eq!(quantile(&[], 0.5), None);
    }

    #[test]
    fn an_interval_holds_its_value_and_narrows_with_agreement() {
        let agree = bootstrap(&[1.0; 15], median).unwrap();
        assert_eq!((agree.low, agree.value, agree.high), (1.0, 1.0, 1.0));
        let spread: Vec<f64> = (0..15).map(|i| 0.9 + f64::from(i) * 0.01).collect();
        let wide = bootstrap(&spread, median).unwrap();
        assert!(wide.low < wide.value && wide.value < wide.high);
    }
}
