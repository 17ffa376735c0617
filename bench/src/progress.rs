//! A progress bar on a terminal, nothing elsewhere.

use indicatif::{ProgressBar, ProgressStyle};

/// Steps of a long measurement.
pub(crate) struct Steps(ProgressBar);

impl Steps {
    /// A bar of `total` steps.
    #[must_use]
    pub(crate) fn new(total: usize) -> Self {
        let bar = ProgressBar::new(u64::try_from(total).unwrap_or(u64::MAX));
        if let Ok(style) = ProgressStyle::with_template("{bar:32} {pos}/{len} {msg}") {
            bar.set_style(style);
        }
        Self(bar)
    }

    /// One more step done, of this name.
    pub(crate) fn step(&self, name: &'static str) {
        self.0.set_message(name);
        self.0.inc(1);
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
