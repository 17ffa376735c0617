//! What compiling costs: a whole mesh, one change of it, and how that grows with each dimension.
//!
//! Invariant: a change is compiled by the compiler that compiled what it changes, as in the agent; all runs are on one
//! pinned CPU.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use thyra_datapath::abi::tables::PolicyRef;
use thyra_policy_compiler::compile::{Compiler, Limits};
use thyra_policy_compiler::policy::AuthorizationPolicy;
use thyra_policy_compiler::world::World;

use crate::growth::{self, Curve};
use crate::load;
use crate::mesh::{self, Size};
use crate::progress::Steps;
use crate::stats::{Estimate, bootstrap, median};

/// The mesh of the goals.
const SIZE: Size = Size {
    endpoints: 250,
    identities: 10_000,
    policies: 100,
};
const PORTS: [u16; 2] = [8080, 9090];
const FULL: usize = 15;
const CHANGES: usize = 101;

/// The dimensions that grow, and their values.
const DIMENSIONS: [(&str, &[u32]); 4] = [
    ("identities", &[100, 1_000, 10_000, 100_000]),
    ("policies", &[10, 100, 500, 2_000]),
    ("endpoints", &[10, 50, 100, 250]),
    ("CIDR blocks", &[10, 100, 1_000, 10_000]),
];

/// The figures; the curves go to `picture`.
///
/// # Errors
/// When a mesh does not fit, or the picture can't be written.
pub(crate) fn measure(picture: &Path, steps: &Steps) -> Result<Vec<(&'static str, Estimate)>> {
    load::pin(1)?;
    let mut found = Vec::new();
    let world = mesh::world(SIZE, &PORTS);
    let mut add = |name, samples: Vec<f64>| {
        found.extend(bootstrap(&samples, median).map(|estimate| (name, estimate)));
        steps.step(name);
    };
    forget_high_water()?;
    add("compile_full_ms", full(&world, FULL, Limits::KERNEL)?);
    // The whole process, mesh and all: what earlier parts have freed may be used again, so less would be a guess.
    add("compile_peak_mib", vec![high_water()?]);
    add("compile_policy_ms", change(&world, policy_changed, 1e3)?);
    add("compile_added_us", change(&world, workload_added, 1e6)?);
    add("compile_removed_us", change(&world, workload_removed, 1e6)?);
    let mut curves = Vec::new();
    for (name, values) in DIMENSIONS {
        curves.push(curve(name, values)?);
        steps.step("compile_growth");
    }
    print!("{}", growth::table(&curves));
    growth::draw(&curves, picture).with_context(|| format!("write `{}`", picture.display()))?;
    Ok(found)
}

/// Number of steps that `measure` reports.
#[must_use]
pub(crate) const fn steps() -> usize {
    5 + DIMENSIONS.len()
}

/// Milliseconds of compiles from nothing.
fn full(world: &World, runs: usize, limits: Limits) -> Result<Vec<f64>> {
    (0..runs)
        .map(|_| {
            let begun = Instant::now();
            let tables = Compiler::with_limits(limits).compile(world)?;
            let spent = begun.elapsed().as_secs_f64() * 1e3;
            drop(tables);
            Ok(spent)
        })
        .collect()
}

/// Times of compiles after one change each, in units of `scale` a second.
fn change(world: &World, edit: fn(&mut World, usize), scale: f64) -> Result<Vec<f64>> {
    let mut world = world.clone();
    let mut compiler = Compiler::new();
    // Whoever enforces tables holds them until the next ones are in force.
    let mut enforced = compiler.compile(&world)?;
    let mut samples = Vec::with_capacity(CHANGES);
    for round in 0..CHANGES {
        edit(&mut world, round);
        let begun = Instant::now();
        let tables = compiler.compile(&world)?;
        samples.push(begun.elapsed().as_secs_f64() * scale);
        drop(std::mem::replace(&mut enforced, tables));
    }
    Ok(samples)
}

/// One principal less.
fn policy_changed(world: &mut World, round: usize) {
    let number = round % world.authorization.len();
    let Some((reference, policy)) = world.authorization.iter().nth(number) else {
        return;
    };
    let (reference, mut policy): (PolicyRef, AuthorizationPolicy) = (reference.clone(), (**policy).clone());
    let sources = policy.rules.iter_mut().flat_map(|rule| &mut rule.from);
    for source in sources {
        source.principals.values.pop();
    }
    world.authorization.insert(reference, Arc::new(policy));
}

/// A second pod of an identity that is there.
fn workload_added(world: &mut World, round: usize) {
    let number = u32::try_from(round).unwrap_or(0);
    let Some(first) = world.workloads.values().nth(5_000) else {
        return;
    };
    let mut workload = (**first).clone();
    workload.uid = format!("Kubernetes//Pod/{}/more-{number}", mesh::NAMESPACE).into();
    workload.name = format!("more-{number}");
    workload.addresses = vec![IpAddr::V4(Ipv4Addr::from(0x0a60_0000 + number))];
    world.workloads.insert(workload.uid.clone(), Arc::new(workload));
}

/// A pod less.
fn workload_removed(world: &mut World, _: usize) {
    let Some(uid) = world.workloads.keys().nth(5_000).cloned() else {
        return;
    };
    world.workloads.remove(&uid);
}

/// How a full compile grows in one dimension, the others at a tenth of the goals' mesh; without the kernel's limits,
/// which the ends of the curves exceed.
fn curve(name: &'static str, values: &[u32]) -> Result<Curve> {
    let base = Size {
        endpoints: 25,
        identities: 1_000,
        policies: 10,
    };
    let mut points = BTreeMap::new();
    for value in values {
        let (size, blocks) = match name {
            "identities" => (
                Size {
                    identities: *value,
                    ..base
                },
                0,
            ),
            "policies" => (
                Size {
                    policies: *value,
                    identities: 4_000,
                    ..base
                },
                0,
            ),
            "endpoints" => (
                Size {
                    endpoints: u16::try_from(*value)?,
                    ..base
                },
                0,
            ),
            _ => (base, *value),
        };
        let mut world = mesh::world(size, &PORTS);
        mesh::add_blocks(&mut world, blocks);
        let mut samples = full(&world, 5, Limits::WIDEST)?;
        samples.sort_by(f64::total_cmp);
        let tables = Compiler::with_limits(Limits::WIDEST).compile(&world)?;
        points.insert(
            *value,
            (
                samples[samples.len() / 2],
                tables.sets.len(),
                tables.classes.len(),
            ),
        );
    }
    Ok(Curve { name, points })
}

/// Forgets what the process had at its highest (proc(5), `clear_refs`).
fn forget_high_water() -> Result<()> {
    std::fs::write("/proc/self/clear_refs", "5").context("reset the highest memory use")
}

/// Most memory that this process had since it was last forgotten, MiB.
fn high_water() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status").context("read this process's status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line
        .and_then(|line| line.split_whitespace().next())
        .context("no VmHWM")?;
    Ok(kib.parse::<f64>()? / 1024.0)
}
