//! What the programs cost under live traffic, by the kernel's own count, and the memory of their maps.
//!
//! Invariant: the empty program runs at the same hooks under the same load, right before and after.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use aya::maps::MapData;
use aya::programs::TcAttachType;
use aya::programs::tc::SchedClassifier;
use aya::sys::{Stats, enable_stats};
use thyra_datapath::abi::maps;

use crate::load::{self, Kind};
use crate::netns::Node;
use crate::pair::{CPU, Pair};
use crate::policed::Policed;
use crate::progress::Steps;
use crate::stats::{Estimate, bootstrap, median};

const SAMPLES: usize = 15;
const MIB: f64 = 1024.0 * 1024.0;

/// Time and runs of some programs until now, as `/proc/self/fdinfo` tells them.
#[derive(Clone, Copy, Default)]
struct Run {
    nanoseconds: u64,
    count: u64,
}

/// `live_ns_per_packet` and `map_mib`; the programs must be attached and the servers of pods 1 and 3 be there.
///
/// # Errors
/// When the kernel keeps no statistics, or a program can't be attached.
pub(crate) fn measure(
    policed: &mut Policed,
    span: Duration,
    steps: &Steps,
) -> Result<Vec<(&'static str, Estimate)>> {
    load::pin(CPU)?;
    let pinned = |name| SchedClassifier::from_pin(policed.bpffs.find(name)?).context("open a pinned program");
    let ours = [pinned(maps::TO_POD)?, pinned(maps::FROM_POD)?];
    let mut ebpf = aya::Ebpf::load(thyra_datapath::object()).context("load the shipped object")?;
    let empty = attach_empty(&mut ebpf)?;
    let _counted = enable_stats(Stats::RunTime).context("switch the kernel's statistics on")?;
    let with = Pair::new("with policy", &policed.node, 0, 1);
    let without = Pair::new("with the empty program", &policed.node, 2, 3);
    let mut samples = Vec::with_capacity(SAMPLES);
    for _ in 0..SAMPLES {
        policed.collect()?;
        let before = nanoseconds(&without, span, || run(&[empty]))?;
        let added = nanoseconds(&with, span, || run(&ours.each_ref()))?;
        let after = nanoseconds(&without, span, || run(&[empty]))?;
        samples.push(added - f64::midpoint(before, after));
        steps.step("live_ns_per_packet");
    }
    let mut found = Vec::new();
    found.extend(bootstrap(&samples, median).map(|e| ("live_ns_per_packet", e)));
    found.extend(bootstrap(&[map_mib(policed)?], median).map(|e| ("map_mib", e)));
    Ok(found)
}

/// Number of steps that `measure` reports.
#[must_use]
pub(crate) const fn steps() -> usize {
    SAMPLES
}

/// Puts the empty program at every hook of the pods without policy, until `ebpf` is dropped.
fn attach_empty(ebpf: &mut aya::Ebpf) -> Result<&SchedClassifier> {
    let empty = ebpf
        .program_mut("empty")
        .context("the object has no empty program")?;
    let empty: &mut SchedClassifier = empty.try_into()?;
    empty.load()?;
    for pod in [2, 3] {
        for hook in [TcAttachType::Ingress, TcAttachType::Egress] {
            empty.attach(&Node::interface(pod), hook)?;
        }
    }
    Ok(empty)
}

/// Nanoseconds of a run of a program while a pair talks.
fn nanoseconds(pair: &Pair, span: Duration, now: impl Fn() -> Result<Run>) -> Result<f64> {
    let before = now()?;
    pair.rate(Kind::RequestResponse, span)?;
    let after = now()?;
    let count = after.count - before.count;
    ensure!(count > 1000, "{}: the programs ran {count} times only", pair.name);
    let exact = |n: u64| u32::try_from(n).map(f64::from);
    Ok(exact(after.nanoseconds - before.nanoseconds)? / exact(count)?)
}

fn run(programs: &[&SchedClassifier]) -> Result<Run> {
    let mut sum = Run::default();
    for program in programs {
        let info = fdinfo(program.fd()?)?;
        sum.nanoseconds += number(&info, "run_time_ns")?;
        sum.count += number(&info, "run_cnt")?;
    }
    Ok(sum)
}

/// What the pinned maps have locked, as the kernel accounts it.
fn map_mib(policed: &Policed) -> Result<f64> {
    let mut bytes = 0.0;
    for name in maps::ALL {
        let map = MapData::from_pin(policed.bpffs.find(name)?)?;
        bytes += f64::from(u32::try_from(number(&fdinfo(map.fd())?, "memlock")?)?);
    }
    Ok(bytes / MIB)
}

fn fdinfo(fd: impl AsFd) -> Result<String> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
    std::io::read_to_string(File::open(&path)?).with_context(|| format!("read `{path}`"))
}

fn number(info: &str, name: &str) -> Result<u64> {
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.with_context(|| format!("the kernel doesn't tell `{name}`"))?
        .trim()
        .parse()
        .with_context(|| format!("`{name}` is no number"))
}
