//! The same policy by an LPM trie and hash tables: identity by address, then three probes (`bench/ebpf`).
//!
//! Invariant: a node of its own, and programs at the same hooks of the same pods as ours.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use aya::Ebpf;
use aya::maps::HashMap;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::programs::{SchedClassifier, TcAttachType};

use crate::added;
use crate::load;
use crate::mesh;
use crate::netns::{self, Node};
use crate::pair::Pair;
use crate::policed::SIZE;

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/lpm.bpf.o"));
const TCP: u8 = 6;

/// The node: its pods 0 and 1 are a client that may, and a server, both under policy; 2 is a stranger.
pub(crate) struct Lpm {
    // The programs go before the interfaces that they are at.
    _ebpf: Ebpf,
    node: Node,
}

impl Lpm {
    /// Makes it.
    ///
    /// # Errors
    /// Without root, or when a program can't be attached or a table is full.
    pub(crate) fn new() -> Result<Self> {
        let node = Node::new("lpm", 3)?;
        let name = node.name();
        let attached = std::thread::spawn(move || {
            netns::enter(&name)?;
            attach()
        });
        let ebpf = attached
            .join()
            .map_err(|_| anyhow::anyhow!("the baseline panicked"))??;
        Ok(Self { _ebpf: ebpf, node })
    }

    /// The pods that talk.
    #[must_use]
    pub(crate) fn pair(&self) -> Pair {
        Pair::new("with an LPM trie", &self.node, 0, 1)
    }

    /// A pod that policy refuses.
    #[must_use]
    pub(crate) fn stranger(&self) -> String {
        self.node.pod(2)
    }
}

/// The bench's own BPF object, its maps made and its programs not yet loaded.
///
/// # Errors
/// Without root, or when it was built without BPF programs.
pub(crate) fn object() -> Result<Ebpf> {
    Ebpf::load(OBJECT).context("load the bench's own BPF object")
}

fn attach() -> Result<Ebpf> {
    let mut ebpf = object()?;
    fill(&mut ebpf)?;
    for (name, hook) in [
        ("lpm_to_pod", TcAttachType::Egress),
        ("lpm_from_pod", TcAttachType::Ingress),
    ] {
        let program = ebpf
            .program_mut(name)
            .with_context(|| format!("the baseline has no `{name}`"))?;
        let program: &mut SchedClassifier = program.try_into()?;
        program.load().with_context(|| format!("load `{name}`"))?;
        for pod in 0..usize::from(SIZE.endpoints) {
            program.attach(&Node::interface(pod), hook)?;
        }
    }
    Ok(ebpf)
}

/// As the mesh has it: every identity but the server's own may come in to both pods, at both ports.
fn fill(ebpf: &mut Ebpf) -> Result<()> {
    let map = ebpf.map_mut("IDENTITIES").context("no table of identities")?;
    let mut identities: LpmTrie<_, u32, u32> = LpmTrie::try_from(map)?;
    for i in 0..SIZE.identities {
        let address = u32::from_ne_bytes(mesh::address(i, SIZE.endpoints).octets());
        identities.insert(&Key::new(Ipv4Addr::BITS, address), identity(i), 0)?;
    }
    let map = ebpf.map_mut("RULES").context("no table of rules")?;
    let mut rules: HashMap<_, [u8; 12], u8> = HashMap::try_from(map)?;
    for pod in 0..usize::from(SIZE.endpoints) {
        let interface = added::interface(pod)?;
        for i in (0..SIZE.identities).filter(|i| *i != 1) {
            for port in [load::RR_PORT, load::STREAM_PORT] {
                rules.insert(rule(interface, identity(i), port), 1, 0)?;
            }
        }
    }
    Ok(())
}

/// 0 is none.
const fn identity(workload: u32) -> u32 {
    workload + 1
}

/// A key of the table of rules, as the programs lay it out.
fn rule(interface: u32, identity: u32, port: u16) -> [u8; 12] {
    let mut key = [0; 12];
    key[..4].copy_from_slice(&interface.to_ne_bytes());
    key[4..8].copy_from_slice(&identity.to_ne_bytes());
    key[8..10].copy_from_slice(&port.to_be_bytes());
    key[10] = TCP;
    key
}
