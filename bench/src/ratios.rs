//! Traffic between two pods with policy ÷ between two others, in interleaved pairs of slices.
//!
//! Invariant: the two halves of a sample run back to back and take turns in going first.

use std::time::Duration;

use anyhow::Result;

use crate::load::{self, Kind};
use crate::lpm::Lpm;
use crate::nft::Nft;
use crate::pair::{CPU, Pair};
use crate::policed::{ATTACKER, Policed};
use crate::progress::Steps;
use crate::stats::{Estimate, bootstrap, median};

/// The figure in which every allowed connection is reported.
const WATCHED: &str = "crr_watched_ratio";
/// Samples of a ratio; the goals ask for at least 15.
const SAMPLES: usize = 21;
/// The CPU that events are read on.
const READER_CPU: usize = 0;

/// A ratio to measure.
struct Ratio<'a> {
    name: &'static str,
    kind: Kind,
    with: &'a Pair,
    without: &'a Pair,
}

/// One ratio per kind of load and rival.
///
/// # Errors
/// When a connection that policy allows fails, or without root.
pub(crate) fn measure(
    policed: &mut Policed,
    span: Duration,
    steps: &Steps,
) -> Result<Vec<(&'static str, Estimate)>> {
    use Kind::{ConnectRequestResponse, RequestResponse, Stream};
    load::pin(READER_CPU)?;
    policed.read_events()?;
    load::pin(CPU)?;
    let (nft, lpm) = (Nft::new()?, Lpm::new()?);
    let with = Pair::new("with policy", &policed.node, 0, 1);
    let without = Pair::new("without policy", &policed.node, 2, 3);
    let (rules, trie, stranger) = (nft.pair(), lpm.pair(), policed.node.pod(2));
    let mut servers = Vec::new();
    for pair in [&with, &without, &rules, &trie] {
        servers.push(load::serve(&pair.server, CPU)?);
    }
    with.probe(&stranger)?;
    rules.probe(&nft.stranger())?;
    trie.probe(&lpm.stranger())?;
    let flooded = [&with, &without].map(|pair| pair.flooded(&policed.node, ATTACKER));
    let ratio = |name, kind, with, without| Ratio {
        name,
        kind,
        with,
        without,
    };
    let ratios: [_; COUNT] = [
        ratio("rr_ratio", RequestResponse, &with, &without),
        ratio("crr_ratio", ConnectRequestResponse, &with, &without),
        ratio(WATCHED, ConnectRequestResponse, &with, &without),
        ratio("stream_ratio", Stream, &with, &without),
        ratio("rr_vs_nft", RequestResponse, &with, &rules),
        ratio("crr_vs_nft", ConnectRequestResponse, &with, &rules),
        ratio("stream_vs_nft", Stream, &with, &rules),
        ratio("rr_vs_lpm", RequestResponse, &with, &trie),
        ratio("crr_vs_lpm", ConnectRequestResponse, &with, &trie),
        ratio("stream_vs_lpm", Stream, &with, &trie),
        ratio("flood_established", RequestResponse, &flooded[0], &flooded[1]),
        ratio("flood_new", ConnectRequestResponse, &flooded[0], &flooded[1]),
    ];
    let mut found = Vec::new();
    for ratio in ratios {
        policed.report_new(ratio.name == WATCHED);
        let mut samples = Vec::with_capacity(SAMPLES);
        for turn in 0..SAMPLES {
            samples.push(ratio.sample(policed, span, turn % 2 == 0)?);
            steps.step(ratio.name);
        }
        found.extend(bootstrap(&samples, median).map(|estimate| (ratio.name, estimate)));
    }
    Ok(found)
}

/// Ratios that are measured.
const COUNT: usize = 12;

/// Number of steps that `measure` reports.
#[must_use]
pub(crate) const fn steps() -> usize {
    COUNT * SAMPLES
}

impl Ratio<'_> {
    fn sample(&self, policed: &mut Policed, span: Duration, policy_first: bool) -> Result<f64> {
        let mut rate = |pair: &Pair| {
            policed.collect()?;
            pair.rate(self.kind, span)
        };
        if policy_first {
            let with = rate(self.with)?;
            Ok(with / rate(self.without)?)
        } else {
            let without = rate(self.without)?;
            Ok(rate(self.with)? / without)
        }
    }
}
