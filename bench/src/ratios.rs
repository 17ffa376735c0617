//! Traffic between two pods with policy ÷ between two pods without any program, in interleaved pairs.
//!
//! Invariant: the two halves of a pair differ in the programs alone (all pods are alike), run back to back,
//! and take turns in going first.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::load::{self, Kind};
use crate::netns::{self, Node};
use crate::policed::Policed;
use crate::progress::Steps;
use crate::stats::{Estimate, bootstrap, median};

/// The figure in which every allowed connection is reported.
const WATCHED: &str = "crr_watched_ratio";
/// Pairs of a ratio; the issue asks for at least 15.
const PAIRS: usize = 21;
/// The CPU that both pods and all their packets use.
const CPU: usize = 1;
/// The CPU that events are read on.
const READER_CPU: usize = 0;

/// One ratio per kind of load.
///
/// # Errors
/// When a connection that policy allows fails, or without root.
pub(crate) fn measure(
    policed: &mut Policed,
    span: Duration,
    steps: &Steps,
) -> Result<Vec<(&'static str, Estimate)>> {
    load::pin(READER_CPU)?;
    policed.read_events()?;
    load::pin(CPU)?;
    let _policed = load::serve(&policed.node.pod(1), CPU)?;
    let _plain = load::serve(&policed.node.pod(3), CPU)?;
    let kinds = [
        ("rr_ratio", Kind::RequestResponse),
        ("crr_ratio", Kind::ConnectRequestResponse),
        (WATCHED, Kind::ConnectRequestResponse),
        ("stream_ratio", Kind::Stream),
    ];
    let mut found = Vec::new();
    for (name, kind) in kinds {
        policed.report_new(name == WATCHED);
        let mut ratios = Vec::with_capacity(PAIRS);
        for pair in 0..PAIRS {
            ratios.push(ratio(policed, kind, span, pair % 2 == 0)?);
            steps.step(name);
        }
        if let Some(estimate) = bootstrap(&ratios, median) {
            found.push((name, estimate));
        }
    }
    Ok(found)
}

/// Number of steps that `measure` reports.
#[must_use]
pub(crate) const fn steps() -> usize {
    4 * PAIRS
}

fn ratio(policed: &mut Policed, kind: Kind, span: Duration, policy_first: bool) -> Result<f64> {
    let (with, without);
    if policy_first {
        with = rate(policed, kind, span, true)?;
        without = rate(policed, kind, span, false)?;
    } else {
        without = rate(policed, kind, span, false)?;
        with = rate(policed, kind, span, true)?;
    }
    Ok(with / without)
}

fn rate(policed: &mut Policed, kind: Kind, span: Duration, policy: bool) -> Result<f64> {
    let (client, server) = if policy { (0, 1) } else { (2, 3) };
    policed.collect()?;
    let client = policed.node.pod(client);
    let thread = std::thread::spawn(move || {
        load::pin(CPU)?;
        netns::enter(&client)?;
        // The first moments fill caches and the routes' own.
        load::run(kind, Node::address(server), span / 8)?;
        load::run(kind, Node::address(server), span)
    });
    let rate = thread
        .join()
        .map_err(|_| anyhow::anyhow!("the client panicked"))?;
    rate.with_context(|| format!("{kind:?} {} policy", if policy { "with" } else { "without" }))
}
