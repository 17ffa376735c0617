//! The handle to the node's datapath.
//!
//! Invariant: one process at a time holds it (a lock on the folder of pins), so every map has one writer.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use aya::maps::{MapData, MapError};
use rustix::time::{ClockId, clock_gettime};
use thyra_datapath_abi::Control;
use thyra_datapath_abi::maps;
use thyra_datapath_abi::tables::Verdict;

use crate::bpffs::{self, BpffsError, Direction, Lock, Pins};
use crate::clsact;
use crate::commit::Written;
use crate::counters::{CounterMemory, Counters};
use crate::coverage::Coverage;
use crate::direct::LocalRedirect;
use crate::endpoint_ids::{EndpointIds, ReserveError};
use crate::envoy_group::EnvoyGroup;
use crate::events::EventReader;
use crate::flow_maps::{CollectReport, FlowMaps};
use crate::grace::Grace;
use crate::hook::{self, Hook, Order, Place};
use crate::memory::Memory;
use crate::object::ShippedObject;
use crate::open::endpoint_numbers;
use crate::programs::Programs;
use crate::sockets::{self, Connection};
use crate::steering::Steering;
use crate::sys;
use crate::verdict_names::VerdictNames;
use crate::view::KernelView;

/// How a refused connection is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Deny {
    /// With a TCP reset.
    #[default]
    Reset,
    /// Not at all.
    Drop,
}

/// What applies to connections made by the node itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostTraffic {
    /// They pass (probes and the like).
    #[default]
    Allow,
    /// They are judged like any other.
    Enforce,
}

/// What applies to packets of other protocols than TCP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NonTcp {
    /// They pass.
    #[default]
    Pass,
    /// They are judged by the same tables.
    Enforce,
}

/// What `Datapath::open` needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Folder on a BPF file system; pins lie in a folder below it that is named after the layout.
    pub bpffs: PathBuf,
    /// Folder for names and ids that outlive the process.
    pub state_dir: PathBuf,
    /// How a refused connection is answered; in force from the next commit on.
    pub deny: Deny,
    /// What applies to the node's own connections; in force from the next commit on.
    pub host_traffic: HostTraffic,
    /// What applies to other protocols than TCP; in force from the next commit on.
    pub non_tcp: NonTcp,
    /// Connections that one endpoint may have with Envoy, both families together
    /// (`limits::L7_BUDGET`).
    pub l7_connections: u64,
    /// Report allowed new connections as events; in force from the next commit on. `Datapath::set_report_new` changes
    /// it at once.
    pub report_new: bool,
    /// Report connections for the flow log, one of two to this number (`Control::flow_log`); in force from the next
    /// commit on. `Datapath::set_flow_log` changes it at once.
    pub flow_log: Option<u8>,
    /// How programs are put at interfaces; the best that this kernel has where nothing is said.
    pub hook: Option<Hook>,
    /// Where packets to pods are judged; endpoints that are attached go there when they are attached again.
    pub place: Place,
    /// Where among other programs; for tcx links that are made from now on.
    pub order: Order,
    /// Put connections between two pods of this node straight from one into the other, past the node's stack; for
    /// endpoints that are attached from now on. Turned off, connections that went so go through the stack.
    pub local_redirect: bool,
}

impl Config {
    /// The flags of the control word that say what is reported.
    pub(crate) fn reports(&self) -> u64 {
        let all = if self.report_new { Control::REPORT_NEW } else { 0 };
        all | self.flow_log.map_or(0, Control::flow_log)
    }
}

/// Whether `open` found a datapath at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Made by this process; nothing was enforced before.
    Loaded,
    /// Enforcement went on without this process.
    PickedUp,
}

/// The node's datapath; see the crate's documentation for the order of calls.
pub struct Datapath {
    pub(crate) config: Config,
    pub(crate) pins: Pins,
    pub(crate) hook: Hook,
    pub(crate) layout: String,
    /// What instances inside pods are loaded from.
    pub(crate) object: ShippedObject,
    /// Pins of other layouts that still hold endpoints.
    pub(crate) older: Vec<Pins>,
    pub(crate) _lock: Lock,
    pub(crate) memory: Memory,
    pub(crate) programs: Programs,
    pub(crate) counters: CounterMemory,
    pub(crate) flows: FlowMaps,
    pub(crate) steering: Steering,
    pub(crate) coverage: Coverage,
    pub(crate) local_redirect: LocalRedirect,
    /// Endpoints whose packets never go straight, with the reason.
    pub(crate) through_the_stack: BTreeMap<u16, String>,
    pub(crate) grace: Grace,
    pub(crate) written: Written,
    pub(crate) names: VerdictNames,
    pub(crate) ids: EndpointIds,
    pub(crate) origin: Origin,
    /// Links that got another program when they were picked up.
    pub(crate) replaced: usize,
    pub(crate) notes: Vec<String>,
}

/// The kernel's maps could not be read.
#[derive(Debug, thiserror::Error)]
#[error("can't read the map `{map}`")]
pub struct ReadError {
    map: &'static str,
    source: MapError,
}

impl std::fmt::Debug for Datapath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let control = self.memory.control();
        f.debug_struct("Datapath")
            .field("pins", &self.pins)
            .field("control", &control)
            .finish_non_exhaustive()
    }
}

impl Datapath {
    /// The id of a pod's endpoint, the same as long as it isn't detached, across restarts too.
    pub fn reserve(&mut self, uid: &str) -> Result<u16, ReserveError> {
        self.ids.reserve(uid)
    }

    /// All reservations: id by pod uid. An agent that no longer knows a uid detaches its id.
    #[must_use]
    pub fn reservations(&self) -> &BTreeMap<String, u16> {
        self.ids.by_uid()
    }

    /// Generation of the live bank; 0 before the first commit.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.memory.control().generation()
    }

    /// Endpoints that programs of another table layout still judge. Pins that can't be read count as one.
    #[must_use]
    pub fn older_endpoints(&self) -> usize {
        let attached = |pins| {
            let found = hook::attachments(pins).ok()?;
            Some(found.iter().filter(|a| a.direction == Direction::To).count())
        };
        self.older.iter().map(|pins| attached(pins).unwrap_or(1)).sum()
    }

    /// What a verdict id stands for; none when no name is known (the state folder was lost).
    #[must_use]
    pub fn verdict(&self, id: u16) -> Option<&Verdict> {
        self.names.get(id)
    }

    /// Whether allowed new connections are reported as events, from the next packet on: a report costs more than
    /// the packet, so it is for when somebody listens.
    pub fn set_report_new(&mut self, on: bool) {
        self.config.report_new = on;
        self.set_reports();
    }

    /// Which connections are reported for the flow log, from the next packet on: one of two to this number.
    pub fn set_flow_log(&mut self, sampling: Option<u8>) {
        self.config.flow_log = sampling;
        self.set_reports();
    }

    fn set_reports(&mut self) {
        let Control(word) = self.memory.control();
        let all = Control::REPORT_NEW | Control::flow_log(Control::MAX_SAMPLING);
        self.memory
            .set_control(Control(word & !all | self.config.reports()));
    }

    /// Events that were not written, since the maps were made: the ring was full, or the budget of refusals spent.
    #[must_use]
    pub fn lost_events(&self) -> u64 {
        self.counters.lost()
    }

    /// All counters, summed over the CPUs. They grow as long as the maps live, across restarts.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let attached = endpoint_numbers().filter(|id| self.memory.record(*id).ifindex != 0);
        self.counters.read(self.names.known(), attached)
    }

    /// The ring of events. There should be one reader; two would share the events. Needs a tokio runtime.
    pub fn events(&self) -> io::Result<EventReader> {
        let ring = MapData::from_pin(self.pins.map(maps::EVENTS)).map_err(io::Error::other)?;
        EventReader::new(ring)
    }

    /// The live bank as the kernel's maps hold it now.
    pub fn read_back(&self) -> Result<KernelView, ReadError> {
        KernelView::read(&self.memory).map_err(|source| ReadError {
            map: maps::BLOCKS4,
            source,
        })
    }

    /// The TCP connections of an endpoint that policy judges, as the stack in its network namespace holds them: those
    /// that the node itself made are left out.
    ///
    /// # Errors
    /// The namespace can't be entered, or a map can't be read.
    pub fn connections(
        &self,
        endpoint: u16,
        addresses: &[IpAddr],
        netns: &Path,
    ) -> io::Result<Vec<Connection>> {
        let mut found = sockets::connections(netns)?;
        let own = |c: &Connection| addresses.contains(&c.local.ip()) && c.local.ip() != c.remote.ip();
        found.retain(own);
        let of_the_node = self.flows.of_the_node(endpoint)?;
        found.retain(|c| !c.accepted || !of_the_node.contains(&(c.local, c.remote)));
        Ok(found)
    }

    /// Removes finished connections, up to a bound a call; call it every second with `now_ns()`.
    pub fn collect(&mut self, now_ns: u64) -> io::Result<CollectReport> {
        self.flows.collect(&self.memory, now_ns)
    }

    /// The programs' clock: nanoseconds since boot, time asleep left out.
    #[must_use]
    pub fn now_ns() -> u64 {
        let now = clock_gettime(ClockId::Monotonic);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
    }

    /// Removes everything that is pinned below `bpffs`: all enforcement ends. An agent at work is an error.
    pub fn cleanup(bpffs: &Path) -> Result<(), BpffsError> {
        if !bpffs.exists() {
            return Ok(());
        }
        let lock = Lock::take(bpffs)?;
        for pins in bpffs::layouts(bpffs)? {
            // Before the guards go: what Envoy holds is reset, nothing is let through instead.
            end_envoy(&pins)?;
            pins.remove()?;
        }
        clsact::remove_everywhere()
            .map_err(|e| BpffsError::io("remove the filters that belong to", bpffs, e))?;
        drop(lock);
        // Others may keep files beside ours; then the folder stays.
        let _ = std::fs::remove_dir(bpffs);
        Ok(())
    }
}

/// Ends the Envoy whose sockets are noted by these pins, and takes its control group away.
fn end_envoy(pins: &Pins) -> Result<(), BpffsError> {
    let pin = pins.envoy();
    let wrong = |source| BpffsError::io("end the envoy of", &pin, source);
    let number = match sys::link_cgroup(&pin) {
        Ok(number) => number,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(wrong(e)),
    };
    let other = |e| wrong(std::io::Error::other(e));
    let Some(group) = EnvoyGroup::numbered(number).map_err(other)? else {
        return Ok(());
    };
    group.empty().map_err(other)?;
    group.remove().map_err(other)
}
