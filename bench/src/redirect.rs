//! Traffic between two pods with policy and `--local-redirect` ÷ between two others without any program.
//!
//! Invariant: as `ratios`: the two halves of a sample run back to back and take turns in going first.

use std::time::Duration;

use anyhow::Result;

use crate::load::{self, Kind};
use crate::pair::{CPU, Pair};
use crate::policed::Policed;
use crate::progress::Steps;
use crate::stats::{Estimate, bootstrap, median};

/// Samples of a ratio.
const SAMPLES: usize = 21;
const RATIOS: [(&str, Kind); 3] = [
    ("rr_redirect", Kind::RequestResponse),
    ("crr_redirect", Kind::ConnectRequestResponse),
    ("stream_redirect", Kind::Stream),
];

/// One ratio per kind of load, on a node of its own.
///
/// # Errors
/// When a connection that policy allows fails, or without root.
pub(crate) fn measure(span: Duration, steps: &Steps) -> Result<Vec<(&'static str, Estimate)>> {
    let mut policed = Policed::new("redirect", true)?;
    policed.attach()?;
    load::pin(CPU)?;
    let straight = Pair::new("with local redirect", &policed.node, 0, 1);
    let without = Pair::new("without policy", &policed.node, 2, 3);
    let _servers = [
        load::serve(&straight.server, CPU)?,
        load::serve(&without.server, CPU)?,
    ];
    straight.probe(&policed.node.pod(2))?;
    let mut found = Vec::new();
    for (name, kind) in RATIOS {
        let mut samples = Vec::with_capacity(SAMPLES);
        for turn in 0..SAMPLES {
            let mut rate = |pair: &Pair| {
                policed.collect()?;
                pair.rate(kind, span)
            };
            samples.push(if turn % 2 == 0 {
                rate(&straight)? / rate(&without)?
            } else {
                let without = rate(&without)?;
                rate(&straight)? / without
            });
            steps.step(name);
        }
        found.extend(bootstrap(&samples, median).map(|estimate| (name, estimate)));
    }
    Ok(found)
}

/// Number of steps that `measure` reports.
#[must_use]
pub(crate) const fn steps() -> usize {
    RATIOS.len() * SAMPLES
}
