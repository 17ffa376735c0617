//! What the shipped programs cost per packet: BPF test-run minus an empty program, nanoseconds.
//!
//! Invariant: the pinned programs run on the live tables of a whole mesh; the empty program runs right before
//! and after, on the same packet, so that a frequency change of the machine cancels out.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, ensure};
use aya::programs::tc::SchedClassifier;
use aya::programs::{TestRun, TestRunOptions};
use thyra_datapath::abi::maps;

use crate::load;
use crate::mesh;
use crate::netns::Node;
use crate::policed::{Policed, SIZE};
use crate::progress::Steps;
use crate::stats::{Estimate, bootstrap, median};

/// Sources, or remote addresses, that a figure is drawn from.
const DRAWN: u32 = 63;
/// Flows of a sample of `new_flow_ratio`.
const FLOWS: u32 = 1000;
const FIN: u8 = 1;
const SYN: u8 = 2;
pub(crate) const ACK: u8 = 16;
/// `TCX_NEXT`, as test-run shows it.
const NEXT: u32 = u32::MAX;

struct Programs {
    to_pod: SchedClassifier,
    from_pod: SchedClassifier,
    empty: SchedClassifier,
    repeat: u32,
}

/// The three figures; the programs must be attached.
///
/// # Errors
/// When a packet that policy allows is refused, or test-run fails.
pub(crate) fn measure(
    policed: &Policed,
    repeat: u32,
    steps: &Steps,
) -> Result<Vec<(&'static str, Estimate)>> {
    load::pin(1)?;
    let mut ebpf = aya::Ebpf::load(thyra_datapath::object()).context("load the shipped object")?;
    let empty: &mut SchedClassifier = ebpf
        .program_mut("empty")
        .context("the object has no empty program")?
        .try_into()?;
    empty.load()?;
    let programs = Programs {
        to_pod: SchedClassifier::from_pin(policed.bpffs.find(maps::TO_POD)?)?,
        from_pod: SchedClassifier::from_pin(policed.bpffs.find(maps::FROM_POD)?)?,
        empty: SchedClassifier::from_program_info(empty.info()?, "empty".into())?,
        repeat,
    };
    let (client, server) = (interface(0)?, interface(1)?);
    let mut found = Vec::new();
    let inbound = samples(|draw| {
        let packet = packet((allowed(draw), 40_000), (Node::address(1), load::RR_PORT), ACK);
        programs.added(&programs.to_pod, &packet, (server, client))
    })?;
    found.extend(estimate("added_ns_inbound", &inbound));
    steps.step("added_ns_inbound");
    let remote = |draw: u32| (Ipv4Addr::new(198, 51, 100, u8::try_from(draw).unwrap_or(0)), 443);
    let own = samples(|draw| {
        let local = (Node::address(0), 50_000);
        programs.run(
            &programs.from_pod,
            &packet(local, remote(draw), SYN),
            (client, client),
            1,
        )?;
        programs.added(
            &programs.from_pod,
            &packet(local, remote(draw), ACK),
            (client, client),
        )
    })?;
    found.extend(estimate("added_ns_own", &own));
    steps.step("added_ns_own");
    let reply = samples(|draw| {
        let packet = packet(remote(draw), (Node::address(0), 50_000), ACK);
        programs.added(&programs.to_pod, &packet, (client, server + 1000))
    })?;
    found.extend(estimate("added_ns_reply", &reply));
    steps.step("added_ns_reply");
    found.extend(new_flows(&programs, (server, client))?.map(|e| ("new_flow_ratio", e)));
    steps.step("new_flow_ratio");
    for (name, flags, inbound) in ENDS {
        let ends = samples(|draw| {
            let (program, bytes, interfaces) = if inbound {
                let (from, to) = ((allowed(draw), 40_000), (Node::address(1), load::RR_PORT));
                (&programs.to_pod, packet(from, to, flags), (server, client))
            } else {
                let (from, to) = ((Node::address(0), 50_000), remote(draw));
                (&programs.from_pod, packet(from, to, flags), (client, client))
            };
            programs.added(program, &bytes, interfaces)
        })?;
        found.extend(estimate(name, &ends));
        steps.step(name);
    }
    Ok(found)
}

/// Nanoseconds of a packet when each is another flow's of one source ÷ when all are one flow's. Each run is one packet,
/// since a test-run repeats its own.
fn new_flows(programs: &Programs, interfaces: (u32, u32)) -> Result<Option<Estimate>> {
    let one = |draw: u32, flow: u32| {
        let source = (allowed(draw), u16::try_from(1024 + flow).unwrap_or(u16::MAX));
        let packet = packet(source, (Node::address(1), load::RR_PORT), ACK);
        programs.run(&programs.to_pod, &packet, interfaces, 1)
    };
    let ratio = |draw| {
        let mean = |flows: bool| -> Result<f64> {
            let mut sum = 0.0;
            for flow in 0..FLOWS {
                sum += one(draw, if flows { flow } else { 0 })?;
            }
            Ok(sum / f64::from(FLOWS))
        };
        // A round before either: the syscall's own path is warm.
        mean(false)?;
        let warm = mean(false)?;
        Ok(mean(true)? / warm)
    };
    Ok(bootstrap(&samples(ratio)?, median))
}

/// Packets with which a connection begins and ends: figure, TCP flags, whether it goes to the pod.
const ENDS: [(&str, u8, bool); 4] = [
    ("added_ns_syn_in", SYN, true),
    ("added_ns_syn_own", SYN, false),
    ("added_ns_fin_in", FIN | ACK, true),
    ("added_ns_fin_own", FIN | ACK, false),
];

/// Number of steps that `measure` reports.
#[must_use]
pub(crate) const fn steps() -> usize {
    4 + ENDS.len()
}

impl Programs {
    /// Nanoseconds of `program` on `packet`, less those of the empty program around it.
    fn added(&self, program: &SchedClassifier, packet: &[u8], interfaces: (u32, u32)) -> Result<f64> {
        let before = self.run(&self.empty, packet, interfaces, self.repeat)?;
        let with = self.run(program, packet, interfaces, self.repeat)?;
        let after = self.run(&self.empty, packet, interfaces, self.repeat)?;
        Ok(with - f64::midpoint(before, after))
    }

    fn run(
        &self,
        program: &SchedClassifier,
        packet: &[u8],
        interfaces: (u32, u32),
        repeat: u32,
    ) -> Result<f64> {
        run(program, packet, interfaces, repeat)
    }
}

/// Nanoseconds of a run of a program on a packet, at the interface and from the one of the indices.
///
/// # Errors
/// When the packet isn't allowed.
pub(crate) fn run(
    program: &SchedClassifier,
    packet: &[u8],
    (ifindex, ingress): (u32, u32),
    repeat: u32,
) -> Result<f64> {
    let context = context(ifindex, ingress);
    let options = TestRunOptions {
        data_in: Some(packet),
        ctx_in: Some(&context),
        repeat,
        ..TestRunOptions::new()
    };
    let result = program.test_run(options).context("test-run")?;
    ensure!(
        result.return_value == NEXT,
        "a packet that policy allows ended with {}",
        result.return_value
    );
    Ok(result.duration.as_secs_f64() * 1e9)
}

fn samples(one: impl Fn(u32) -> Result<f64>) -> Result<Vec<f64>> {
    (0..DRAWN).map(one).collect()
}

fn estimate(name: &'static str, samples: &[f64]) -> Option<(&'static str, Estimate)> {
    bootstrap(samples, median).map(|e| (name, e))
}

/// An address that the policies allow, far from the ones drawn before it.
fn allowed(draw: u32) -> Ipv4Addr {
    let spread = u32::from(SIZE.endpoints) + (draw * 157) % (SIZE.identities - u32::from(SIZE.endpoints));
    mesh::address(spread, SIZE.endpoints)
}

/// Index of a pod's host interface, in the network namespace that the calling thread is in.
///
/// # Errors
/// When there is none.
pub(crate) fn interface(pod: usize) -> Result<u32> {
    let name = Node::interface(pod);
    rustix_index(&name).with_context(|| format!("interface `{name}`"))
}

/// Read through `ip`, which sees the namespace that this thread is in (sysfs would show the machine's).
fn rustix_index(name: &str) -> Result<u32> {
    let output = std::process::Command::new("ip")
        .args(["-o", "link", "show", name])
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let number = text.split(':').next().unwrap_or_default().trim();
    number.parse().with_context(|| format!("no index in `{text}`"))
}

/// A `__sk_buff` with the two interface indices set; the rest is zero (offsets of the kernel's UAPI).
fn context(ifindex: u32, ingress: u32) -> [u8; 192] {
    let mut context = [0; 192];
    context[36..40].copy_from_slice(&ingress.to_ne_bytes());
    context[40..44].copy_from_slice(&ifindex.to_ne_bytes());
    context
}

/// An Ethernet frame with IPv4 and TCP and 64 bytes of payload.
pub(crate) fn packet(
    (source, sport): (Ipv4Addr, u16),
    (destination, dport): (Ipv4Addr, u16),
    flags: u8,
) -> Vec<u8> {
    debug_assert!(!IpAddr::V4(source).is_unspecified());
    let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    bytes.extend([0x45, 0, 0, 104, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    bytes.extend(source.octets());
    bytes.extend(destination.octets());
    bytes.extend(sport.to_be_bytes());
    bytes.extend(dport.to_be_bytes());
    bytes.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 255, 255, 0, 0, 0, 0]);
    bytes.extend([0; 64]);
    bytes
}
