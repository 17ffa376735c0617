//! What judging a packet costs as a mesh grows: its source is drawn anew for every run, from all addresses there are.
//!
//! Invariant: the program that draws runs before the empty one, too, right before and after, on the same packet and the
//! same addresses, so that what is left is the look-up, its cache misses with it.

use std::time::Duration;

use anyhow::{Context, Result};
use aya::Ebpf;
use aya::maps::{Array, ProgramArray};
use aya::programs::SchedClassifier;
use thyra_datapath::Datapath;
use thyra_datapath::abi::maps;
use thyra_policy_compiler::compile::{Compiler, Limits};

use crate::added::{self, ACK};
use crate::bpffs::Bpffs;
use crate::load;
use crate::lpm;
use crate::mesh::{self, Size};
use crate::netns::{self, Node};
use crate::policed;
use crate::progress::Steps;
use crate::stats::{Estimate, bootstrap, median};

const SAMPLES: u32 = 15;
/// The most addresses, above the limit that ships (65,536): the compiler's is raised, the tables have the room.
const MOST: u32 = 100_000;
/// The figure of the last of them.
const FIGURE: &str = "added_ns_inbound_100k";
const BASE: Size = Size {
    endpoints: 2,
    identities: 1_000,
    policies: 10,
};

/// A mesh, by how much of what grows it has.
#[derive(Clone, Copy)]
struct Mesh {
    number: u32,
    size: Size,
    addresses: u32,
}

/// What grows, and the meshes, the smallest first.
type Dimension = (&'static str, [Mesh; 3]);

const DIMENSIONS: [Dimension; 4] = [
    (
        "identities",
        [identities(100), identities(1_000), identities(10_000)],
    ),
    (
        "addresses",
        [
            addresses(BASE, 1_000),
            addresses(BASE, 10_000),
            addresses(policed::SIZE, MOST),
        ],
    ),
    ("endpoints", [endpoints(2), endpoints(25), endpoints(250)]),
    ("policies", [policies(10), policies(100), policies(1_000)]),
];

const fn addresses(size: Size, addresses: u32) -> Mesh {
    Mesh {
        number: addresses,
        size,
        addresses,
    }
}

const fn identities(identities: u32) -> Mesh {
    addresses(Size { identities, ..BASE }, identities)
}

#[expect(clippy::as_conversions, reason = "wider, in a const context")]
const fn endpoints(endpoints: u16) -> Mesh {
    Mesh {
        number: endpoints as u32,
        size: Size { endpoints, ..BASE },
        addresses: BASE.identities,
    }
}

const fn policies(policies: u32) -> Mesh {
    Mesh {
        number: policies,
        size: Size { policies, ..BASE },
        addresses: BASE.identities,
    }
}

/// Prints the table and gives the figure, from test-runs of `repeat` packets each.
///
/// # Errors
/// When a mesh does not fit, or a packet that policy allows is refused.
pub(crate) fn measure(repeat: u32, steps: &Steps) -> Result<Vec<(&'static str, Estimate)>> {
    load::pin(1)?;
    let node = Node::new("lookup", 2)?;
    netns::enter(&node.name())?;
    let bpffs = Bpffs::mount()?;
    let mut datapath = policed::open(&bpffs, false)?;
    let last = DIMENSIONS.iter().flat_map(|(_, meshes)| meshes);
    let most = last.map(|mesh| mesh.size.endpoints).max().unwrap_or(0);
    for pod in 0..most {
        datapath.reserve(&policed::uid(pod))?;
    }
    let mut drawing = Drawing::new(&bpffs, repeat)?;
    let (mut found, mut generation) = (Vec::new(), 0);
    println!("{:<12} {:>8} {:>10}  95 %", "look-up", "size", "ns");
    for (dimension, meshes) in DIMENSIONS {
        for mesh in meshes {
            let number = mesh.number;
            generation += 1;
            commit(&mut datapath, mesh, generation).with_context(|| format!("{number} {dimension}"))?;
            if generation == 1 {
                policed::attach(&mut datapath, BASE.endpoints)?;
            }
            let estimate = drawing.measure(mesh)?;
            println!(
                "{dimension:<12} {number:>8} {:>10.1}  {:.1} to {:.1}",
                estimate.value, estimate.low, estimate.high
            );
            if number == MOST {
                found.push((FIGURE, estimate));
            }
            steps.step("look-up");
        }
    }
    Ok(found)
}

/// Number of steps that `measure` reports.
#[must_use]
pub(crate) const fn steps() -> usize {
    DIMENSIONS.len() * 3
}

fn commit(datapath: &mut Datapath, mesh: Mesh, generation: u32) -> Result<()> {
    let mut world = mesh::world(mesh.size, &[load::RR_PORT, load::STREAM_PORT]);
    mesh::add_replicas(&mut world, mesh.size, mesh.addresses);
    let limits = Limits {
        addresses: usize::try_from(MOST)?,
        ..Limits::KERNEL
    };
    let tables = Compiler::with_limits(limits).compile(&world)?;
    datapath.commit(&tables, generation)?;
    // What a commit leaves to be done after its grace period is over and done.
    std::thread::sleep(Duration::from_millis(100));
    Ok(())
}

/// The program that draws, and those that it goes on to.
struct Drawing {
    draw: SchedClassifier,
    to_pod: SchedClassifier,
    empty: SchedClassifier,
    ebpf: Ebpf,
    /// The shipped object's other programs and maps, which `empty` is from.
    _object: Ebpf,
    packet: Vec<u8>,
    interfaces: (u32, u32),
    repeat: u32,
}

impl Drawing {
    fn new(bpffs: &Bpffs, repeat: u32) -> Result<Self> {
        let mut ebpf = lpm::object()?;
        let mut object = Ebpf::load(thyra_datapath::object()).context("load the shipped object")?;
        let load = |ebpf: &mut Ebpf, name: &'static str| -> Result<SchedClassifier> {
            let program = ebpf
                .program_mut(name)
                .with_context(|| format!("no program `{name}`"))?;
            let program: &mut SchedClassifier = program.try_into()?;
            program.load().with_context(|| format!("load `{name}`"))?;
            Ok(SchedClassifier::from_program_info(program.info()?, name.into())?)
        };
        let server = (Node::address(1), load::RR_PORT);
        Ok(Self {
            draw: load(&mut ebpf, "draw")?,
            empty: load(&mut object, "empty")?,
            to_pod: SchedClassifier::from_pin(bpffs.find(maps::TO_POD)?)?,
            ebpf,
            _object: object,
            packet: added::packet((Node::address(0), 40_000), server, ACK),
            interfaces: (added::interface(1)?, added::interface(0)?),
            repeat,
        })
    }

    /// Nanoseconds of a packet on a mesh of this size, less those of the empty program around it.
    fn measure(&mut self, mesh: Mesh) -> Result<Estimate> {
        let map = self.ebpf.map_mut("SOURCES").context("no sources")?;
        let mut sources: Array<_, u32> = map.try_into()?;
        // The node's own pods come in by their own interfaces, and are no strangers.
        let strangers = u32::from(mesh.size.endpoints)..mesh.addresses;
        for (slot, i) in (0..).zip(strangers.clone()) {
            let address = mesh::address(i, mesh.size.endpoints).octets();
            sources.set(slot, u32::from_ne_bytes(address), 0)?;
        }
        let map = self.ebpf.map_mut("COUNT").context("no count of sources")?;
        let mut count: Array<_, u32> = map.try_into()?;
        count.set(0, strangers.end - strangers.start, 0)?;
        let mut samples = Vec::new();
        for _ in 0..SAMPLES {
            let before = self.run(false)?;
            let with = self.run(true)?;
            let after = self.run(false)?;
            samples.push(with - f64::midpoint(before, after));
        }
        bootstrap(&samples, median).context("no samples")
    }

    /// Nanoseconds of a run of what draws and of what it goes on to, which is ours or the empty one.
    fn run(&mut self, ours: bool) -> Result<f64> {
        let map = self.ebpf.map_mut("MEASURED").context("no place for a program")?;
        let mut measured: ProgramArray<_> = map.try_into()?;
        let program = if ours { &self.to_pod } else { &self.empty };
        measured.set(0, program.fd()?, 0)?;
        added::run(&self.draw, &self.packet, self.interfaces, self.repeat)
    }
}
