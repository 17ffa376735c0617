//! A step of `make test`: what it counted, how long it took; a step that could not run is never silently
//! fine.

use std::{
    fmt,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

/// Passed and failed checks, and why some did not run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    /// One reason for each thing that could not run.
    pub(crate) skipped: Vec<String>,
}

impl Tally {
    pub(crate) fn counts(passed: u64, failed: u64) -> Self {
        Self {
            passed,
            failed,
            skipped: Vec::new(),
        }
    }

    pub(crate) fn of(ok: bool) -> Self {
        if ok {
            Self::counts(1, 0)
        } else {
            Self::counts(0, 1)
        }
    }

    pub(crate) fn skip(reason: String) -> Self {
        Self {
            skipped: vec![reason],
            ..Self::default()
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped.extend(other.skipped);
    }
}

/// A named tally and how long it took.
struct Step {
    name: String,
    tally: Tally,
    took: Duration,
}

/// All steps of one run.
pub(crate) struct Report {
    steps: Vec<Step>,
    /// On CI a check that could not run counts as failed: nobody reads a skip there.
    strict: bool,
    /// Steps whose name holds one of these run; all, when there are none.
    only: Vec<String>,
}

impl Report {
    pub(crate) fn new(strict: bool, only: &[String]) -> Self {
        Self {
            steps: Vec::new(),
            strict,
            only: only.to_vec(),
        }
    }

    pub(crate) fn selects(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|part| name.contains(part.as_str()))
    }

    /// Runs one step; an error in it is a failed check, and the next step runs all the same.
    pub(crate) fn step(&mut self, name: &str, run: impl FnOnce() -> Result<Tally>) {
        if self.selects(name) {
            let step = Step::run(name, self.strict, run);
            self.steps.push(step);
        }
    }

    /// Runs independent steps, some at once; they are reported in the order given.
    pub(crate) fn steps<T: Sync>(
        &mut self,
        at_once: usize,
        work: &[(String, T)],
        run: impl Fn(&T) -> Result<Tally> + Sync,
    ) {
        let work: Vec<_> = work.iter().filter(|(name, _)| self.selects(name)).collect();
        let waiting = Mutex::new(work.iter().enumerate());
        let done = Mutex::new(Vec::new());
        let strict = self.strict;
        thread::scope(|scope| {
            for _ in 0..at_once {
                scope.spawn(|| {
                    loop {
                        let next = waiting.lock().ok().and_then(|mut waiting| waiting.next());
                        let Some((index, (name, item))) = next else { return };
                        let step = Step::run(name, strict, || run(item));
                        if let Ok(mut done) = done.lock() {
                            done.push((index, step));
                        }
                    }
                });
            }
        });
        let mut done = done.into_inner().unwrap_or_default();
        done.sort_by_key(|(index, _)| *index);
        // A step that vanished with its thread is a failure, not a gap.
        for (index, (name, _)) in work.iter().enumerate() {
            if !done.iter().any(|(found, _)| *found == index) {
                let tally = Tally::of(false);
                let took = Duration::ZERO;
                done.push((
                    index,
                    Step {
                        name: name.clone(),
                        tally,
                        took,
                    },
                ));
            }
        }
        self.steps.extend(done.into_iter().map(|(_, step)| step));
    }

    /// Passed and failed over all steps.
    pub(crate) fn total(&self) -> Tally {
        let mut total = Tally::default();
        for step in &self.steps {
            total.add(step.tally.clone());
        }
        total
    }
}

impl Step {
    fn run(name: &str, strict: bool, run: impl FnOnce() -> Result<Tally>) -> Self {
        println!("\n==> {name}");
        let started = Instant::now();
        let mut tally = run().unwrap_or_else(|error| {
            println!("FAILED {name}: {error:#}");
            Tally::of(false)
        });
        for reason in &tally.skipped {
            println!("SKIPPED {name}: {reason}");
            tally.failed += u64::from(strict);
        }
        let took = started.elapsed();
        println!(
            "{name}: {} passed, {} failed, {:.1} s",
            tally.passed,
            tally.failed,
            took.as_secs_f64()
        );
        Self {
            name: name.to_owned(),
            tally,
            took,
        }
    }
}

impl fmt::Display for Report {
    /// The table of steps; its last line is `N passed, N failed` alone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self
            .steps
            .iter()
            .map(|step| step.name.chars().count())
            .max()
            .unwrap_or(0);
        writeln!(
            f,
            "{:<width$} {:>7} {:>7} {:>7} {:>8}",
            "step", "passed", "failed", "skipped", "time"
        )?;
        for step in &self.steps {
            let Tally {
                passed,
                failed,
                skipped,
            } = &step.tally;
            let (skipped, took) = (skipped.len(), step.took.as_secs_f64());
            writeln!(
                f,
                "{:<width$} {passed:>7} {failed:>7} {skipped:>7} {took:>6.1} s",
                step.name
            )?;
        }
        for step in &self.steps {
            for reason in &step.tally.skipped {
                writeln!(f, "SKIPPED {}: {reason}", step.name)?;
            }
        }
        let total = self.total();
        write!(f, "\n{} passed, {} failed", total.passed, total.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::{Report, Tally};
    use anyhow::bail;

    #[test]
    fn the_last_line_is_the_sum() {
        let mut report = Report::new(false, &[]);
        report.step("one", || Ok(Tally::counts(3, 0)));
        report.step("two", || bail!("broke"));
        report.step("three", || Ok(Tally::of(true)));
        assert_eq!(report.to_string().lines().last(), Some("4 passed, 1 failed"));
    }

    #[test]
    fn steps_at_once_are_reported_in_order_and_none_is_lost() {
        let mut report = Report::new(false, &[]);
        let work: Vec<_> = (0..20_u64)
            .map(|index| (format!("step {index}"), index))
            .collect();
        report.steps(4, &work, |index| {
            if *index == 7 {
                bail!("broke")
            } else {
                Ok(Tally::counts(*index, 0))
            }
        });
        assert_eq!(report.total(), Tally::counts(190 - 7, 1));
        let shown = report.to_string();
        assert!(shown.find("step 3 ").expect("it ran") < shown.find("step 12 ").expect("it ran"));
    }

    #[test]
    fn only_the_steps_asked_for_run() {
        let mut report = Report::new(true, &["lab".to_owned()]);
        report.step("setup", || bail!("ran"));
        report.steps(2, &[("lab a".to_owned(), 1), ("bench".to_owned(), 2)], |index| {
            Ok(Tally::counts(*index, 0))
        });
        assert_eq!(report.total(), Tally::counts(1, 0));
    }

    #[test]
    fn a_skip_fails_on_ci_and_is_shown_elsewhere() {
        for (strict, failed) in [(true, 1), (false, 0)] {
            let mut report = Report::new(strict, &[]);
            report.step("lab", || Ok(Tally::skip("no root".to_owned())));
            assert_eq!(report.total().failed, failed);
            assert!(report.to_string().contains("SKIPPED lab: no root"));
        }
    }
}
