//! From a changed policy to the live tables of a full node, without the wire: compile and commit.
//!
//! Invariant: every change differs from the tables before it, and the commit returns when the kernel has them.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ipnet::{IpNet, Ipv4Net};
use thyra_datapath::Datapath;
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::policy::{Field, Source};
use thyra_policy_compiler::world::World;

use crate::bpffs::Bpffs;
use crate::load;
use crate::mesh::{self, Size};
use crate::netns::{self, Node};
use crate::policed;
use crate::progress::Steps;
use crate::stats::{Estimate, bootstrap, median, quantile};

const SIZE: Size = Size {
    endpoints: 250,
    identities: 10_000,
    policies: 100,
};

/// Between two changes, as an operator's would come: the grace period of the last one is over.
const PAUSE: Duration = Duration::from_millis(40);

/// A change of the last policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// Another identity may no longer come in.
    Identity,
    /// Another block may come in, which splits source classes.
    Split,
}

/// Milliseconds of `changes` changes of each kind, and words that were written for one.
///
/// # Errors
/// Without root, or when a commit fails.
pub(crate) fn measure(changes: usize, steps: &Steps) -> Result<Vec<(&'static str, Estimate)>> {
    // A network namespace of its own: clean-up looks at every interface.
    let node = Node::new("apply", 0)?;
    netns::enter(&node.name())?;
    let bpffs = Bpffs::mount()?;
    let mut datapath = policed::open(&bpffs, false)?;
    for pod in 0..SIZE.endpoints {
        datapath.reserve(&policed::uid(pod))?;
    }
    let mut world = mesh::world(SIZE, &[load::RR_PORT, load::STREAM_PORT]);
    let (mut compiler, mut generation) = (Compiler::new(), 1);
    apply(&mut datapath, &mut compiler, &world, generation)?;
    let mut found = Vec::new();
    for (name, change) in [
        ("apply_p99_ms", Change::Identity),
        ("apply_split_p99_ms", Change::Split),
    ] {
        let (mut times, mut words) = (Vec::new(), Vec::new());
        for turn in 0..changes {
            edit(&mut world, change, turn)?;
            generation += 1;
            std::thread::sleep(PAUSE);
            let started = Instant::now();
            let written = apply(&mut datapath, &mut compiler, &world, generation)
                .with_context(|| format!("{change:?}, turn {turn}"))?;
            times.push(started.elapsed().as_secs_f64() * 1e3);
            words.push(f64::from(u32::try_from(written)?));
            steps.step(name);
        }
        found.extend(bootstrap(&times, |s| quantile(s, 0.99)).map(|e| (name, e)));
        if change == Change::Identity {
            found.extend(bootstrap(&words, median).map(|e| ("apply_words", e)));
        }
    }
    Ok(found)
}

/// Number of steps that `measure` reports.
#[must_use]
pub(crate) const fn steps(changes: usize) -> usize {
    2 * changes
}

fn apply(datapath: &mut Datapath, compiler: &mut Compiler, world: &World, generation: u32) -> Result<usize> {
    let tables = compiler.compile(world).context("compile the mesh")?;
    let report = datapath.commit(&tables, generation).context("commit the mesh")?;
    ensure!(report.words_written > 0, "a change that changes nothing");
    Ok(report.words_written)
}

/// Changes the last policy, each turn to what it has not been in the two turns before: of two banks, one holds those.
fn edit(world: &mut World, change: Change, turn: usize) -> Result<()> {
    let ports = [load::RR_PORT, load::STREAM_PORT];
    let mut policy = mesh::policy(SIZE.policies - 1, SIZE, &ports);
    policy.version = format!("{change:?}-{turn}");
    let from = &mut policy.rules.first_mut().context("no rule")?.from;
    match change {
        Change::Identity => {
            let names = &mut from.first_mut().context("no source")?.principals.values;
            names.remove(turn % names.len());
        }
        Change::Split => {
            let length = 17 + u8::try_from(turn % 8)?;
            from.push(Source {
                ip_blocks: Field {
                    values: vec![IpNet::V4(Ipv4Net::new(Ipv4Addr::new(10, 32, 0, 0), length)?)],
                    not_values: Vec::new(),
                },
                ..Source::default()
            });
        }
    }
    world
        .authorization
        .insert(policy.reference.clone(), Arc::new(policy));
    Ok(())
}
