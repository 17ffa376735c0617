//! Opening the datapath: from nothing, or from what an earlier process left pinned.
//!
//! Invariant: what is pinned keeps judging packets the whole time; opening it writes no table, and an error
//! on a fresh start leaves no pin behind.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use aya::EbpfError;
use aya::maps::{MapData, MapError};
use aya::pin::PinError;
use aya::programs::ProgramError;
use thyra_datapath_abi::{Cell, limits, maps};
use thyra_datapath_engine::Table;
use tracing::warn;

use crate::bpffs::{self, BpffsError, Lock, Pins};
use crate::commit::Written;
use crate::counters::CounterMemory;
use crate::coverage::Coverage;
use crate::datapath::{Config, Datapath, Origin};
use crate::direct::{self, LocalRedirect};
use crate::endpoint_ids::EndpointIds;
use crate::flow_maps::FlowMaps;
use crate::grace::Grace;
use crate::hook::{self, Attachment, Hook};
use crate::inside;
use crate::mapping::Mapping;
use crate::memory::Memory;
use crate::object::ShippedObject;
use crate::preflight::{PreflightError, preflight};
use crate::programs::{self, HookError, Programs};
use crate::state_file::{self, StateError};
use crate::steering::Steering;
use crate::verdict_names::VerdictNames;

/// The datapath can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The machine lacks something.
    #[error(transparent)]
    Preflight(#[from] PreflightError),
    /// The folder for the pins can't be used.
    #[error(transparent)]
    Bpffs(#[from] BpffsError),
    /// The state folder can't be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The kernel has no memory for the maps.
    #[error(
        "no memory for the tables, they need {} MiB; free memory or raise the control group's limit",
        limits::map_bytes(2) >> 20
    )]
    NoMemory {
        /// Which map.
        #[source]
        source: EbpfError,
    },
    /// The maps could not be made.
    #[error("can't load the BPF object")]
    Load {
        /// Why not.
        #[source]
        source: EbpfError,
    },
    /// The object has no such program.
    #[error("the built-in BPF object has no program `{0}`; clean and build again")]
    ProgramMissing(&'static str),
    /// The kernel refused a program.
    #[error("can't load the program `{name}`")]
    Program {
        /// Which.
        name: &'static str,
        /// Why not; the verifier's log when it was the verifier.
        #[source]
        source: ProgramError,
    },
    /// Packets can't be judged inside pods with these options, or on this kernel.
    #[error("`--hook=pod` {0}")]
    Place(&'static str),
    /// Something could not be pinned.
    #[error("can't pin `{path}`")]
    Pin {
        /// Where.
        path: PathBuf,
        /// Why not.
        #[source]
        source: PinError,
    },
    /// Pods are under programs whose map is gone from the folder.
    #[error(
        "endpoints are attached but the pinned map `{missing}` is gone; \
         remove all pins with `thyra datapath detach` and start again"
    )]
    Incomplete {
        /// Path of the missing pin.
        missing: PathBuf,
    },
    /// A pinned map is not what its name says.
    #[error(
        "the pin `{pin}` is not the map that belongs there ({what}); \
         remove all pins with `thyra datapath detach` and start again"
    )]
    Layout {
        /// Path of the pin.
        pin: PathBuf,
        /// The difference.
        what: String,
    },
    /// A map can't be opened.
    #[error("can't open the map `{map}`")]
    Map {
        /// Which.
        map: &'static str,
        /// Why not.
        #[source]
        source: MapError,
    },
    /// A map's memory can't be reached.
    #[error("can't map the memory of `{map}`")]
    Memory {
        /// Which.
        map: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// A pinned link can't be read or given the new program.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// A pin with a link's name is no link.
    #[error("the pin `{pin}` is not a link; remove all pins with `thyra datapath detach` and start again")]
    Link {
        /// Path of the pin.
        pin: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The grace period needs a map of maps.
    #[error("can't make the map that grace periods wait on")]
    Grace(#[source] io::Error),
    /// Connections of a pod that is gone could not be removed.
    #[error("can't clean up after endpoint {endpoint}, whose interface is gone")]
    CleanUp {
        /// Its id.
        endpoint: u16,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl OpenError {
    pub(crate) fn map(map: &'static str, source: MapError) -> Self {
        Self::Map { map, source }
    }
}

/// Pinned maps, compared with what the object declares.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    pub(crate) pins: &'a Pins,
    pub(crate) object: &'a ShippedObject,
}

impl Source<'_> {
    pub(crate) fn map(&self, name: &'static str) -> Result<MapData, OpenError> {
        let pin = self.pins.map(name);
        let map = MapData::from_pin(&pin).map_err(|source| OpenError::Map { map: name, source })?;
        let found = map
            .info()
            .map_err(|source| OpenError::Map { map: name, source })?;
        let wanted = self.object.maps.iter().find(|map| map.name == name);
        let wanted = wanted.map(|map| [map.key_bytes, map.value_bytes, map.entries]);
        let found = [found.key_size(), found.value_size(), found.max_entries()];
        if wanted == Some(found) {
            Ok(map)
        } else {
            let what = format!(
                "key, value and entries are {found:?}, not {:?}",
                wanted.unwrap_or_default()
            );
            Err(OpenError::Layout { pin, what })
        }
    }

    /// The memory of an mmap-able map, `words` 64-bit words of it.
    pub(crate) fn memory(&self, name: &'static str, words: usize) -> Result<Mapping, OpenError> {
        let map = self.map(name)?;
        Mapping::new(map.fd().as_fd(), words).map_err(|source| OpenError::Memory { map: name, source })
    }

    /// A name for this set of maps that no other set ever has: the boot, and the kernel's id of one map.
    fn instance(&self) -> Result<String, OpenError> {
        let state = self.map(maps::STATE)?;
        let id = state.info().map_err(|e| OpenError::map(maps::STATE, e))?.id();
        // Without a boot id (no /proc) names are at worst not recognised after a restart of the machine,
        // when the maps are gone anyway.
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Ok(format!("{}/{id}", boot.trim()))
    }
}

impl Datapath {
    /// Picks up what is pinned below `config.bpffs`, or loads the programs afresh.
    ///
    /// Enforcement that an earlier process left goes on without a gap; its programs are replaced if this
    /// build has others. A process that works with the same folder is an error.
    pub fn open(config: Config) -> Result<Self, OpenError> {
        for check in preflight(&config.bpffs) {
            check.outcome?;
        }
        if let Some(why) = inside::unfit(&config) {
            return Err(OpenError::Place(why));
        }
        let object = ShippedObject::read().map_err(PreflightError::from)?;
        state_file::prepare(&config.state_dir)?;
        bpffs::prepare(&config.bpffs)?;
        let lock = Lock::take(&config.bpffs)?;
        let pins = Pins::new(&config.bpffs, &object.layout);
        let fresh = !pins.dir().exists();
        let opened = Self::open_pins(config, lock, &pins, &object);
        if opened.is_err() && fresh {
            // The error that matters is the first one.
            let _ = pins.remove();
        }
        opened
    }

    fn open_pins(config: Config, lock: Lock, pins: &Pins, object: &ShippedObject) -> Result<Self, OpenError> {
        let links = hook::attachments(pins)?;
        if !links.is_empty() {
            require_maps(pins, object)?;
        }
        std::fs::create_dir_all(pins.dir()).map_err(|e| BpffsError::io("make", pins.dir(), e))?;
        let (programs, local_redirect) = Programs::open(object, pins, (config.local_redirect, config.place))?;
        if let LocalRedirect::Refused(reason) = &local_redirect {
            warn!(
                reason,
                "local redirect is off: all connections go through the node's stack"
            );
        }
        let source = Source { pins, object };
        let memory = Memory::open(&source)?;
        memory.set_l7_budget(config.l7_connections);
        let mut notes = Vec::new();
        let attached = links.iter().map(|link| link.endpoint);
        let ids = EndpointIds::read(&config.state_dir, attached, &mut notes)?;
        let live = live_verdicts(&memory);
        let names = VerdictNames::read(&config.state_dir, source.instance()?, live, &mut notes)?;
        let counters = CounterMemory::open(&source)?;
        let mut grace = Grace::new().map_err(OpenError::Grace)?;
        grace.start();
        let origin = if memory.control().generation() == 0 && links.is_empty() {
            Origin::Loaded
        } else {
            Origin::PickedUp
        };
        let mut datapath = Self {
            flows: FlowMaps::open(&source, &memory)?,
            steering: Steering::default(),
            coverage: Coverage::default(),
            local_redirect,
            through_the_stack: BTreeMap::new(),
            older: older(&config.bpffs, pins)?,
            hook: config.hook.unwrap_or_else(Hook::newest),
            config,
            pins: pins.clone(),
            layout: object.layout.clone(),
            object: object.clone(),
            _lock: lock,
            memory,
            programs,
            counters,
            grace,
            written: Written::default(),
            names,
            ids,
            origin,
            replaced: 0,
            notes,
        };
        datapath.pick_up(&links)?;
        datapath.pick_up_inside()?;
        datapath.pick_up_steering()?;
        programs::retire(pins, &object.content)?;
        Ok(datapath)
    }

    /// Puts this build's programs into the links, and clears endpoints whose interface or link is gone.
    fn pick_up(&mut self, links: &[Attachment]) -> Result<(), OpenError> {
        let mut alive = BTreeSet::new();
        let mut went_straight = self.local_redirect == LocalRedirect::On;
        let before = direct::programs();
        for link in links {
            let found = link.look().map_err(|source| OpenError::Link {
                pin: link.path.clone(),
                source,
            })?;
            if found.ifindex == 0 {
                link.remove()?;
                continue;
            }
            alive.insert(link.endpoint);
            let pinned = link.pins(found.program).map_err(|source| OpenError::Link {
                pin: link.path.clone(),
                source,
            })?;
            went_straight &= before.contains(&found.program);
            let role = self.role(link.endpoint, link.direction);
            if found.program != self.programs.id(role) || !pinned {
                self.programs.replace((link, role), found.ifindex)?;
                self.replaced += 1;
            }
        }
        if !went_straight {
            // The programs before knew nothing of it, or these don't.
            self.flows.through_the_stack(&self.memory);
        }
        let attached = links.iter().map(|link| link.endpoint);
        let recorded = endpoint_numbers().filter(|id| self.memory.record(*id).ifindex != 0);
        let known: BTreeSet<u16> = attached.chain(recorded).collect();
        for endpoint in known.difference(&alive) {
            let uid = self.ids.uid(*endpoint).unwrap_or("unknown").to_owned();
            self.clear(*endpoint).map_err(|source| OpenError::CleanUp {
                endpoint: *endpoint,
                source,
            })?;
            self.notes.push(format!(
                "endpoint {endpoint} (pod `{uid}`) was cleaned up: its interface is gone"
            ));
        }
        Ok(())
    }
}

/// All endpoint ids.
pub(crate) fn endpoint_numbers() -> impl Iterator<Item = u16> {
    1..u16::try_from(limits::MAX_ENDPOINTS).unwrap_or(u16::MAX)
}

fn require_maps(pins: &Pins, object: &ShippedObject) -> Result<(), OpenError> {
    let missing = object
        .maps
        .iter()
        .map(|map| pins.map(&map.name))
        .find(|pin| !pin.exists());
    missing.map_or(Ok(()), |missing| Err(OpenError::Incomplete { missing }))
}

/// Layouts of other builds that still have links; those without are removed.
fn older(base: &Path, own: &Pins) -> Result<Vec<Pins>, BpffsError> {
    let mut older = Vec::new();
    for pins in bpffs::layouts(base)?
        .into_iter()
        .filter(|pins| pins.dir() != own.dir())
    {
        if hook::attachments(&pins)?.is_empty() {
            pins.remove()?;
        } else {
            older.push(pins);
        }
    }
    Ok(older)
}

/// Verdict ids in the cells of the live bank.
fn live_verdicts(memory: &Memory) -> BTreeSet<u16> {
    let control = memory.control();
    if control.generation() == 0 {
        return BTreeSet::new();
    }
    let words = memory.bank(Table::Rows, control.bank()).iter();
    let words = words
        .map(|word| word.load(std::sync::atomic::Ordering::Relaxed))
        .filter(|word| *word != 0);
    let mut seen = vec![false; limits::MAX_VERDICTS];
    for word in words {
        for cell in [word, word >> 16, word >> 32, word >> 48] {
            let [low, high, ..] = cell.to_le_bytes();
            seen[usize::from(Cell(u16::from_le_bytes([low, high])).verdict())] = true;
        }
    }
    let verdicts = 1..u16::try_from(limits::MAX_VERDICTS).unwrap_or(u16::MAX);
    verdicts.filter(|id| seen[usize::from(*id)]).collect()
}
