//! Durations by bucket: their quantiles, and how they are drawn.
//!
//! Invariant: a quantile is the upper end of the bucket that holds it, never a guess inside it.

/// Widest bar, characters.
const BAR: u64 = 40;

/// What took longer than the bucket before, up to its end.
#[derive(Clone, Debug)]
pub(crate) struct Histogram {
    /// Upper ends, milliseconds (none for what lies beyond the last bound), and how many.
    pub(crate) buckets: Vec<(Option<f64>, u64)>,
    /// All together, seconds.
    seconds: f64,
}

impl Histogram {
    /// Of counts by bucket; the upper ends in seconds.
    pub(crate) fn new(counts: Vec<u64>, bounds: &[f64], seconds: f64) -> Self {
        let ends = bounds.iter().map(|bound| Some(bound * 1e3)).chain([None]);
        let buckets = ends.zip(counts).collect();
        Self { buckets, seconds }
    }

    pub(crate) fn total(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }

    /// Milliseconds.
    pub(crate) fn mean_ms(&self) -> f64 {
        self.seconds * 1e3 / f64::from(u32::try_from(self.total().max(1)).unwrap_or(u32::MAX))
    }

    /// The end of the bucket that holds the one at `percent` of all, milliseconds; none beyond the last bound.
    pub(crate) fn quantile_ms(&self, percent: u64) -> Option<f64> {
        let wanted = (self.total() * percent).div_ceil(100);
        let mut seen = 0;
        let holds = |(_, count): &&(Option<f64>, u64)| {
            seen += count;
            seen >= wanted
        };
        self.buckets.iter().find(holds).and_then(|(end, _)| *end)
    }

    /// A line for each bucket that holds any.
    pub(crate) fn bars(&self) -> String {
        let most = self
            .buckets
            .iter()
            .map(|(_, count)| *count)
            .max()
            .unwrap_or(0)
            .max(1);
        let filled = self.buckets.iter().filter(|(_, count)| *count > 0);
        let bar = |(end, count): &(Option<f64>, u64)| {
            let length = (count * BAR).div_ceil(most);
            let bar = "#".repeat(usize::try_from(length).unwrap_or(0));
            format!("{:>10} ms  {bar} {count}\n", upto(*end))
        };
        filled.map(bar).collect()
    }
}

/// The end of a bucket.
pub(crate) fn upto(end: Option<f64>) -> String {
    end.map_or_else(|| "more".to_owned(), |end| format!("<= {end}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_the_end_of_its_bucket() {
        let of = |counts: &[u64]| Histogram::new(counts.to_vec(), &[0.001, 0.002], 0.1);
        let one = of(&[98, 1, 1]);
        assert_eq!((one.quantile_ms(50), one.quantile_ms(99)), (Some(1.0), Some(2.0)));
        assert_eq!(of(&[1, 0, 99]).quantile_ms(50), None);
        assert!(
            (of(&[0, 0, 0]).mean_ms() - 100.0).abs() < f64::EPSILON,
            "no division by none"
        );
        assert_eq!(
            of(&[1, 0, 40]).bars(),
            format!(
                "{:>10} ms  # 1\n{:>10} ms  {} 40\n",
                "<= 1",
                "more",
                "#".repeat(40)
            )
        );
    }
}
