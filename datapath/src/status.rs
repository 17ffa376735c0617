//! What `thyra status` shows of the datapath.

use std::sync::atomic::Ordering;

use thyra_datapath_abi::{EndpointSets, Mode, Slot4, limits, maps};
use thyra_datapath_engine::Table;

use crate::bpffs::{BpffsError, Direction};
use crate::datapath::{Datapath, Origin};
use crate::direct::LocalRedirect;
use crate::hook::{self, Attachment, Hook, Order, Place};
use crate::interface::Interface;
use crate::memory::Memory;
use crate::object::built_by;
use crate::open::endpoint_numbers;

/// The datapath's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatapathStatus {
    /// Loaded, or picked up.
    pub origin: Origin,
    /// Generation of the live bank; 0 before the first commit.
    pub generation: u32,
    /// Where the programs are.
    pub hook: &'static str,
    /// Whether connections between pods of this node go straight from one into the other.
    pub local_redirect: LocalRedirect,
    /// Name of the layout of maps and records: 16 hex digits.
    pub layout: String,
    /// Which compiler built the programs.
    pub built_by: &'static str,
    /// Links that got this build's programs when they were picked up.
    pub replaced: usize,
    /// Attached endpoints, by id.
    pub endpoints: Vec<EndpointStatus>,
    /// Endpoints that are still under programs of an earlier build with another layout.
    pub older_endpoints: usize,
    /// How full each table is.
    pub fill: Vec<Fill>,
    /// What was found amiss and mended when the datapath was opened.
    pub notes: Vec<String>,
}

/// An attached endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointStatus {
    /// Its id.
    pub id: u16,
    /// The pod's uid; none when the state folder was lost.
    pub uid: Option<String>,
    /// Index of the host interface.
    pub ifindex: u32,
    /// Name of the host interface; none when it is gone.
    pub interface: Option<String>,
    /// Mode in the live tables; none when they have no place for it: it refuses everything.
    pub mode: Option<Mode>,
    /// What keeps it from being enforced whole; empty when all is well.
    pub problems: Vec<String>,
    /// Why its packets never go straight to another pod of the node, where `Config::local_redirect` wants them to.
    pub through_the_stack: Option<String>,
}

/// How full a table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fill {
    /// The table, as people call it.
    pub table: &'static str,
    /// Entries in use.
    pub used: usize,
    /// Entries at most.
    pub limit: usize,
}

/// What the pins say is attached.
type Pinned = Result<Vec<Attachment>, BpffsError>;

impl Datapath {
    /// The state now, from the kernel.
    #[must_use]
    pub fn status(&self) -> DatapathStatus {
        let attached = endpoint_numbers().filter(|id| self.memory.record(*id).ifindex != 0);
        let pinned = hook::attachments(&self.pins);
        let endpoints: Vec<_> = attached.map(|id| self.endpoint_status(id, &pinned)).collect();
        let fill = self.fill(endpoints.len());
        DatapathStatus {
            origin: self.origin,
            generation: self.generation(),
            local_redirect: self.local_redirect.clone(),
            hook: match self.hook {
                Hook::Tcx if self.config.place == Place::Pod => "tcx at the pod's own end of the veth",
                Hook::Tcx if self.config.order == Order::Last => {
                    "tcx at the host end of the veth, after others"
                }
                Hook::Tcx => "tcx at the host end of the veth",
                Hook::Clsact => "clsact at the host end of the veth",
            },
            layout: self.layout.clone(),
            built_by: built_by(),
            replaced: self.replaced,
            older_endpoints: self.older_endpoints(),
            endpoints,
            fill,
            notes: self.notes.clone(),
        }
    }

    fn endpoint_status(&self, id: u16, pinned: &Pinned) -> EndpointStatus {
        let ifindex = self.memory.record(id).ifindex;
        // An interface that can't be asked for is shown like one that is gone; the problem says so.
        let interface = Interface::by_index(ifindex).ok().flatten();
        let sets = self.memory.sets(id);
        let mut problems = Vec::new();
        match &interface {
            Some(interface) => problems.extend(
                Direction::BOTH
                    .into_iter()
                    .filter_map(|direction| self.hook_problem(id, direction, interface, pinned)),
            ),
            None => problems.push(format!("interface {ifindex} is gone")),
        }
        if self.config.place == Place::Pod && self.inside(id).is_none() {
            problems.push(
                "`to_pod` is not inside the pod: packets that skip the host end of its veth are NOT ENFORCED"
                    .to_owned(),
            );
        }
        if let Some(missed) = self.coverage.missed(id) {
            problems.push(format!(
                "NOT ENFORCED: {missed} packets reached the pod past `to_pod` between the last two checks"
            ));
        }
        if self.memory.endpoint_at(ifindex) != id {
            problems.push(format!("interface {ifindex} does not lead to this endpoint"));
        }
        EndpointStatus {
            id,
            uid: self.ids.uid(id).map(str::to_owned),
            ifindex,
            interface: interface.map(|interface| interface.name),
            mode: sets.is_placed().then(|| sets.mode()),
            problems,
            through_the_stack: self.through_the_stack.get(&id).cloned(),
        }
    }

    fn hook_problem(
        &self,
        id: u16,
        direction: Direction,
        interface: &Interface,
        pinned: &Pinned,
    ) -> Option<String> {
        let role = self.role(id, direction);
        let program = role.program();
        let attached = match pinned {
            Ok(all) => all.iter().find(|a| a.endpoint == id && a.direction == direction),
            Err(e) => return Some(format!("the pins can't be listed: {e}")),
        };
        let Some(attached) = attached else {
            return Some(format!("`{program}` is not attached"));
        };
        match attached.look() {
            Ok(found) if found.ifindex == interface.index => {}
            Ok(found) if found.ifindex == 0 => {
                return Some(format!("`{program}` was taken off the interface"));
            }
            Ok(_) => return Some(format!("`{program}` is at another interface")),
            Err(e) => return Some(format!("`{program}` is not attached: {e}")),
        }
        if attached.hook() == Hook::Tcx && self.config.order == Order::Last {
            return None;
        }
        match self.programs.is_first((attached.hook(), role), interface) {
            Ok(true) => None,
            Ok(false) => Some(format!(
                "another program runs before `{program}` and may hide packets from it"
            )),
            Err(e) => Some(format!(
                "the programs at `{}` can't be listed: {e}",
                interface.name
            )),
        }
    }

    fn fill(&self, endpoints: usize) -> Vec<Fill> {
        let bank = Bank {
            memory: &self.memory,
            number: self.memory.control().bank(),
        };
        let fill = |table, used, limit| Fill { table, used, limit };
        let blocks = |read: Result<usize, aya::maps::MapError>| read.unwrap_or(0);
        let blocks4 = blocks(self.memory.blocks4.read(bank.number).map(|entries| entries.len()));
        let blocks6 = blocks(self.memory.blocks6.read(bank.number).map(|entries| entries.len()));
        let mut tables = vec![
            fill("endpoints", endpoints, limits::MAX_ENDPOINTS - 1),
            fill("addresses", bank.addresses(), limits::MAX_ADDRESSES),
            fill("blocks4", blocks4, limits::MAX_BLOCKS),
            fill("blocks6", blocks6, limits::MAX_BLOCKS),
            fill("classes", bank.classes(), limits::MAX_CLASSES),
            fill(
                "columns",
                bank.highest16(Table::ClassColumn),
                limits::MAX_COLUMNS - 1,
            ),
            fill("rows", bank.highest16(Table::Sets), limits::MAX_ROWS - 1),
            fill("sets", bank.sets(), limits::MAX_SETS),
            fill("port classes", bank.port_classes(), limits::MAX_PORT_CLASSES),
            fill("verdicts", self.names.live().len(), limits::MAX_VERDICTS - 1),
        ];
        for (name, used) in self.flows.fill() {
            let limit = match name {
                maps::OUTBOUND4 | maps::OUTBOUND6 => limits::MAX_OUTBOUND,
                maps::DATAGRAMS4 | maps::DATAGRAMS6 => limits::MAX_DATAGRAMS,
                _ => limits::MAX_HOST_FLOWS,
            };
            tables.push(fill(name, used, limit));
        }
        tables
    }
}

/// The live bank, for counting.
struct Bank<'a> {
    memory: &'a Memory,
    number: u32,
}

impl Bank<'_> {
    fn words(&self, table: Table) -> impl Iterator<Item = u64> {
        self.memory
            .bank(table, self.number)
            .iter()
            .map(|word| word.load(Ordering::Relaxed))
    }

    /// The highest entry of a u16 table.
    fn highest16(&self, table: Table) -> usize {
        let entries = |word: u64| [word, word >> 16, word >> 32, word >> 48].map(|bits| bits & 0xffff);
        let highest = self
            .words(table)
            .filter(|word| *word != 0)
            .flat_map(entries)
            .max();
        usize::try_from(highest.unwrap_or(0)).unwrap_or(usize::MAX)
    }

    fn addresses(&self) -> usize {
        let four = self
            .words(Table::Sources4)
            .filter(|slot| Slot4(*slot).address() != 0)
            .count();
        let words: Vec<u64> = self.words(Table::Sources6).collect();
        four + words
            .chunks_exact(3)
            .filter(|slot| slot[0] != 0 || slot[1] != 0)
            .count()
    }

    /// Classes have a column each, and columns are stored plus one.
    fn classes(&self) -> usize {
        let entries = |word: u64| [word, word >> 16, word >> 32, word >> 48].map(|bits| bits & 0xffff);
        self.words(Table::ClassColumn)
            .flat_map(entries)
            .filter(|column| *column != 0)
            .count()
    }

    fn sets(&self) -> usize {
        let placed = self
            .words(Table::EndpointSets)
            .map(EndpointSets)
            .filter(|sets| sets.is_placed());
        placed
            .map(|sets| usize::from(sets.set4().max(sets.set6())) + 1)
            .max()
            .unwrap_or(0)
    }

    fn port_classes(&self) -> usize {
        if self.memory.control().generation() == 0 {
            0
        } else {
            self.highest16(Table::PortClass) + 1
        }
    }
}
