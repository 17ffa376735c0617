//! `to_pod` at the pod's own end of its veth (`Place::Pod`). Interface indices repeat between network namespaces, so
//! each pod has an instance of a small program, which is given the index of its veth's host end when it is loaded and
//! goes on to one that all share.
//!
//! Invariant: `origin` takes the place of `to_pod` at the host end only once the pod's end is judged, and gives it back
//! before the pod's end is left: at each moment at least one of both judges what comes to the pod.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::{Map, MapData, ProgramArray};
use aya::programs::{Program, SchedClassifier, TcAttachType};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo};
use thyra_datapath_abi::{EndpointRecord, maps};

use crate::bpffs::{self, BpffsError, Direction, Pin};
use crate::datapath::{Config, Datapath};
use crate::direct::attributes;
use crate::hook::{self, Hook, Order, Place, Role};
use crate::interface::Interface;
use crate::netns;
use crate::open::OpenError;
use crate::programs;
use crate::sys;

/// What comes to the pod can't be judged inside it.
#[derive(Debug, thiserror::Error)]
pub enum InsideError {
    /// Nobody said where it is.
    #[error(
        "the endpoint has no network namespace (`netns`), which `--hook=pod` enters; name it, or use `--hook=host`"
    )]
    NoNamespace,
    /// Not a veth: a netkit, for one, can run its programs before any of ours.
    #[error("`{0}` is no veth whose far end is in another network namespace, which `--hook=pod` needs")]
    NoVeth(String),
    /// The interface can't be asked for.
    #[error("can't look up the far end of `{name}`")]
    Interface {
        /// Its name.
        name: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The instance can't be loaded.
    #[error(transparent)]
    Load(Box<OpenError>),
    /// Not in that namespace.
    #[error("can't attach `{}` in the network namespace `{netns}`", maps::TO_POD_ENTRY)]
    Attach {
        /// Its file.
        netns: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Why the node's options don't allow `Place::Pod`; nothing where they do.
pub(crate) fn unfit(config: &Config) -> Option<&'static str> {
    if config.place == Place::Host {
        None
    } else if config.hook.unwrap_or_else(Hook::newest) != Hook::Tcx || Hook::newest() != Hook::Tcx {
        Some(
            "needs tcx links (Linux 6.6, `--attach=tcx`): a filter inside a pod could be removed by the pod itself",
        )
    } else if config.order == Order::Last {
        Some("can't be used with `--attach=tcx-last`: programs before ours would take the pods' packets away")
    } else if config.local_redirect {
        Some("can't be used with `--local-redirect`, which judges at the host ends")
    } else {
        None
    }
}

impl Datapath {
    /// What the program of a direction does at the host end.
    pub(crate) fn role(&self, id: u16, direction: Direction) -> Role {
        match direction {
            Direction::From => Role::From,
            Direction::To if self.config.place == Place::Pod && self.inside(id).is_some() => Role::Origin,
            Direction::To => Role::To,
        }
    }

    /// At which end of the endpoint's veth what comes to it is judged now.
    #[must_use]
    pub fn place_of(&self, id: u16) -> Place {
        if self.inside(id).is_some() {
            Place::Pod
        } else {
            Place::Host
        }
    }

    /// Index of the pod's own interface, in the pod's network namespace, where what comes to the pod is judged.
    pub(crate) fn inside(&self, id: u16) -> Option<u32> {
        let found = sys::link_info(&self.pins.inside(id)).ok()?;
        (found.ifindex != 0).then_some(found.ifindex)
    }

    /// Judges what comes to the pod inside its network namespace from now on. Idempotent.
    pub(crate) fn begin_inside(
        &mut self,
        id: u16,
        interface: &Interface,
        netns: Option<&Path>,
    ) -> Result<(), InsideError> {
        let pod_end = far_end(interface)?;
        if self.inside(id) == Some(pod_end) {
            return Ok(());
        }
        let netns = netns.ok_or(InsideError::NoNamespace)?;
        let failed = |source| InsideError::Attach {
            netns: netns.to_owned(),
            source,
        };
        let pin = self.pins.inside(id);
        bpffs::unlink(&pin).map_err(|e| failed(io::Error::other(e)))?;
        let mut instance = self.instance(interface.index)?;
        let file = File::open(netns).map_err(failed)?;
        let host_end = interface.index;
        netns::inside(file, move || {
            let own = own_end(pod_end, host_end)?;
            let program = entry(&mut instance).map_err(io::Error::other)?;
            let at = (maps::TO_POD_ENTRY, TcAttachType::Ingress);
            programs::link(program, &own, at, Order::First, &pin).map_err(io::Error::other)
        })
        .map_err(failed)
    }

    /// Judges it at the host end alone, where `to_pod` is by now. What isn't inside is fine.
    pub(crate) fn end_inside(&mut self, id: u16) -> Result<(), BpffsError> {
        bpffs::unlink(&self.pins.inside(id))?;
        let mut record = self.memory.record(id);
        if record.flags & EndpointRecord::AT_POD != 0 {
            record.flags &= !EndpointRecord::AT_POD;
            self.memory.set_record(id, &record);
        }
        Ok(())
    }

    /// After a start: links inside pods run this build's program; those that nothing needs any more are removed.
    pub(crate) fn pick_up_inside(&mut self) -> Result<(), OpenError> {
        for (pin, path) in self.pins.list()? {
            let Pin::Inside(id) = pin else {
                continue;
            };
            let found = sys::link_info(&path).map_err(|source| OpenError::Link {
                pin: path.clone(),
                source,
            })?;
            let ifindex = self.memory.record(id).ifindex;
            if found.ifindex == 0 || ifindex == 0 {
                self.end_inside(id)?;
            } else if self.config.place == Place::Pod {
                let mut instance = programs::load_for(&self.object, &self.pins, ifindex)?;
                programs::relink(entry(&mut instance)?, &path)?;
            } else if self.judges_at_host(id)? {
                self.end_inside(id)?;
            }
        }
        Ok(())
    }

    /// Whether a program judges at the host end what comes to the pod, once this build's are there.
    fn judges_at_host(&self, id: u16) -> Result<bool, BpffsError> {
        let attached = hook::of_endpoint(&self.pins, id)?;
        let judges = |a: &hook::Attachment| {
            a.direction == Direction::To && a.look().is_ok_and(|found| found.ifindex != 0)
        };
        Ok(attached.iter().any(judges))
    }

    fn instance(&self, ifindex: u32) -> Result<Ebpf, InsideError> {
        programs::load_for(&self.object, &self.pins, ifindex).map_err(|e| InsideError::Load(Box::new(e)))
    }
}

/// All entries go on to this program from now on.
pub(crate) fn enter(program: &SchedClassifier, pin: &Path) -> Result<(), OpenError> {
    let refused = |source| OpenError::Map {
        map: maps::INSIDE,
        source,
    };
    let map = MapData::from_pin(pin).map_err(refused)?;
    let mut entries = ProgramArray::try_from(Map::ProgramArray(map)).map_err(refused)?;
    let name = maps::TO_POD_INSIDE;
    let program = program
        .fd()
        .map_err(|source| OpenError::Program { name, source })?;
    entries.set(0, program, 0).map_err(refused)
}

/// The instance's program, loaded.
fn entry(instance: &mut Ebpf) -> Result<&mut SchedClassifier, OpenError> {
    let name = maps::TO_POD_ENTRY;
    match instance.program_mut(name) {
        Some(Program::SchedClassifier(program)) => {
            program
                .load()
                .map_err(|source| OpenError::Program { name, source })?;
            Ok(program)
        }
        _ => Err(OpenError::ProgramMissing(name)),
    }
}

/// Index of the far end of a veth, in its own network namespace.
fn far_end(interface: &Interface) -> Result<u32, InsideError> {
    let near = attributes(interface.index, None).map_err(|source| InsideError::Interface {
        name: interface.name.clone(),
        source,
    })?;
    let is_elsewhere = near.iter().any(|a| matches!(a, LinkAttribute::LinkNetNsId(_)));
    peer(&near)
        .filter(|_| is_elsewhere)
        .ok_or_else(|| InsideError::NoVeth(interface.name.clone()))
}

/// The other end of what is a veth.
fn peer(attributes: &[LinkAttribute]) -> Option<u32> {
    let is_veth = attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Veth)),
        _ => false,
    });
    let other = attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    });
    other.filter(|_| is_veth)
}

/// The interface of this thread's network namespace, which must be the other end of `host_end`.
fn own_end(index: u32, host_end: u32) -> io::Result<Interface> {
    let is_other_end = peer(&attributes(index, None)?) == Some(host_end);
    let found = Interface::by_index(index)?.filter(|_| is_other_end);
    found.ok_or_else(|| {
        io::Error::other(format!(
            "interface {index} there is not the far end of interface {host_end}: is it the pod's namespace?"
        ))
    })
}
