//! A node with a pair of pods under policy by the real datapath, and a pair without any program beside it.
//!
//! Invariant: tables are the real compiler's, programs are the shipped object's; nothing is prepared by hand.

use std::net::IpAddr;

use anyhow::{Context, Result};
use thyra_datapath::abi::limits::L7_BUDGET;
use thyra_datapath::{Config, Datapath, Deny, EndpointSpec, HostTraffic, NonTcp, Order, Place};
use thyra_policy_compiler::compile::Compiler;

use crate::bpffs::Bpffs;
use crate::load;
use crate::mesh::{self, Size};
use crate::netns::{self, Node};

/// The mesh of the speed goals: 100 policies select both pods, the last decides, 10,000 identities.
pub(crate) const SIZE: Size = Size {
    endpoints: 2,
    identities: 10_000,
    policies: 100,
};

/// Pods of the node: two under policy, two that are not, and one more.
const PODS: usize = 5;
/// The last pod, which is under no policy and sends floods.
pub(crate) const ATTACKER: usize = 4;

/// The node, its tables committed: pods 0 and 1 are under policy once attached, the others never are.
pub(crate) struct Policed {
    // Fields are dropped in this order: the datapath before its file system, the namespaces last.
    datapath: Datapath,
    /// Where its maps and programs are pinned.
    pub(crate) bpffs: Bpffs,
    /// The namespaces.
    pub(crate) node: Node,
}

impl Policed {
    /// Makes it all, with or without `--local-redirect`. The calling thread is in the node's namespace afterwards.
    ///
    /// # Errors
    /// Without root, or when a part refuses.
    pub(crate) fn new(name: &str, local_redirect: bool) -> Result<Self> {
        let node = Node::new(name, PODS)?;
        netns::enter(&node.name())?;
        let bpffs = Bpffs::mount()?;
        let mut datapath = open(&bpffs, local_redirect)?;
        for pod in 0..SIZE.endpoints {
            let id = datapath.reserve(&uid(pod))?;
            anyhow::ensure!(
                id == pod + 1,
                "endpoint ids of a fresh datapath begin at 1, this one is {id}"
            );
        }
        let world = mesh::world(SIZE, &[load::RR_PORT, load::STREAM_PORT]);
        let tables = Compiler::new().compile(&world).context("compile the mesh")?;
        datapath.commit(&tables, 1).context("commit the mesh")?;
        Ok(Self {
            datapath,
            bpffs,
            node,
        })
    }

    /// Puts the programs at both pods.
    ///
    /// # Errors
    /// When an interface can't be attached.
    pub(crate) fn attach(&mut self) -> Result<()> {
        attach(&mut self.datapath, SIZE.endpoints)
    }

    /// Whether allowed connections are reported, as they are while somebody listens.
    pub(crate) fn report_new(&mut self, on: bool) {
        self.datapath.set_report_new(on);
    }

    /// Reads the events from now on, as the agent does; on the calling thread's CPUs, until the process ends.
    ///
    /// # Errors
    /// When the ring can't be opened.
    pub(crate) fn read_events(&self) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let mut reader = {
            let _context = runtime.enter();
            self.datapath.events()?
        };
        std::thread::spawn(move || runtime.block_on(async { while reader.next_batch().await.is_ok() {} }));
        Ok(())
    }

    /// Removes what is remembered of finished connections, as the agent does every second.
    ///
    /// # Errors
    /// When the maps can't be read.
    pub(crate) fn collect(&mut self) -> Result<()> {
        self.datapath
            .collect(Datapath::now_ns())
            .context("collect finished connections")?;
        Ok(())
    }
}

/// A datapath whose pins and state lie below `bpffs`.
///
/// # Errors
/// When it can't be opened.
pub(crate) fn open(bpffs: &Bpffs, local_redirect: bool) -> Result<Datapath> {
    Datapath::open(Config {
        bpffs: bpffs.path().join("thyra"),
        state_dir: bpffs.files().join("state"),
        deny: Deny::Reset,
        host_traffic: HostTraffic::Allow,
        non_tcp: NonTcp::Pass,
        l7_connections: L7_BUDGET,
        report_new: false,
        flow_log: None,
        hook: None,
        place: Place::Host,
        order: Order::First,
        local_redirect,
    })
    .context("open the datapath")
}

/// Puts the programs at the first `pods` pods.
///
/// # Errors
/// When an interface can't be attached.
pub(crate) fn attach(datapath: &mut Datapath, pods: u16) -> Result<()> {
    for pod in 0..pods {
        datapath.attach(&EndpointSpec {
            uid: uid(pod),
            host_interface: Node::interface(usize::from(pod)),
            addresses: vec![IpAddr::V4(Node::address(usize::from(pod)))],
            mac: None,
            held_back: false,
            netns: None,
        })?;
    }
    Ok(())
}

/// The uid of a pod.
#[must_use]
pub(crate) fn uid(pod: u16) -> String {
    format!("uid-{pod}")
}
