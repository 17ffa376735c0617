//! Where a program sits: in a tcx link, or on kernels without them as a filter of a clsact qdisc.
//!
//! Invariant: whatever is attached has a pin that names it, and stays when this process ends. A filter is replaced
//! by one kernel operation; a qdisc is made where there is none and never removed, since others may use it.

use std::io;
use std::path::PathBuf;

use aya::programs::{ProgramInfo, TcAttachType};
use rustix::system::uname;
use thyra_datapath_abi::maps;

use crate::bpffs::{self, BpffsError, Direction, Pin, Pins};
use crate::clsact;
use crate::preflight;
use crate::sys::{self, LinkInfo};

/// tcx came with 6.6: <https://github.com/torvalds/linux/commit/e420bed025071a623d2720a92bc2245c84757ecb>.
pub(crate) const TCX_KERNEL: (u32, u32) = (6, 6);

/// How programs are put at an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// A link: since Linux 6.6.
    Tcx,
    /// A filter of a clsact qdisc.
    Clsact,
}

/// Where our programs run among other tcx programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Before all others: nothing is hidden from them.
    #[default]
    First,
    /// After all that are there: what those let through and as they leave it.
    Last,
}

/// Where packets on their way to a pod are judged. What a pod sends is judged at the host end of its veth either way: a
/// pod that may open raw sockets gets around a program at its own egress (`PACKET_QDISC_BYPASS`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// At the host end of its veth.
    #[default]
    Host,
    /// At the pod's own end, which packets reach that skip the host end (`bpf_redirect_peer`).
    Pod,
}

/// What a program does, wherever it is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Judges what comes to the pod, at the host end.
    To,
    /// Judges what the pod sends.
    From,
    /// Notes where packets come from that are judged inside the pod.
    Origin,
}

impl Role {
    pub(crate) const fn direction(self) -> Direction {
        match self {
            Self::To | Self::Origin => Direction::To,
            Self::From => Direction::From,
        }
    }

    pub(crate) const fn program(self) -> &'static str {
        match self {
            Self::To => maps::TO_POD,
            Self::From => maps::FROM_POD,
            Self::Origin => maps::ORIGIN,
        }
    }
}

impl Hook {
    /// The best one that this kernel has.
    #[must_use]
    pub fn newest() -> Self {
        let found = preflight::release(&uname().release().to_string_lossy());
        if found.is_some_and(|version| version < TCX_KERNEL) {
            Self::Clsact
        } else {
            Self::Tcx
        }
    }
}

/// A program at an interface, by its pin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attachment {
    pub(crate) endpoint: u16,
    pub(crate) direction: Direction,
    /// The interface of a filter; a link knows its own.
    filter_at: Option<u32>,
    pub(crate) path: PathBuf,
}

/// All attachments among the pins.
pub(crate) fn attachments(pins: &Pins) -> Result<Vec<Attachment>, BpffsError> {
    let attachment = |(pin, path)| match pin {
        Pin::Link(endpoint, direction) => Some(Attachment {
            endpoint,
            direction,
            filter_at: None,
            path,
        }),
        Pin::Filter(endpoint, direction, ifindex) => Some(Attachment {
            endpoint,
            direction,
            filter_at: Some(ifindex),
            path,
        }),
        Pin::Steer(_) | Pin::Inside(_) | Pin::Envoy | Pin::Program { .. } | Pin::Map => None,
    };
    Ok(pins.list()?.into_iter().filter_map(attachment).collect())
}

/// The attachments of an endpoint.
pub(crate) fn of_endpoint(pins: &Pins, endpoint: u16) -> Result<Vec<Attachment>, BpffsError> {
    let mut found = attachments(pins)?;
    found.retain(|attachment| attachment.endpoint == endpoint);
    Ok(found)
}

impl Attachment {
    /// The one that an endpoint's program will have.
    pub(crate) fn new(hook: Hook, pins: &Pins, endpoint: u16, direction: Direction, ifindex: u32) -> Self {
        let (filter_at, path) = match hook {
            Hook::Tcx => (None, pins.link(endpoint, direction)),
            Hook::Clsact => (Some(ifindex), pins.filter(endpoint, direction, ifindex)),
        };
        Self {
            endpoint,
            direction,
            filter_at,
            path,
        }
    }

    pub(crate) fn hook(&self) -> Hook {
        self.filter_at.map_or(Hook::Tcx, |_| Hook::Clsact)
    }

    /// The interface of a filter.
    pub(crate) fn filter_at(&self) -> Option<u32> {
        self.filter_at
    }

    /// The program that runs there and the interface; 0 when it is gone, or the filter from it.
    ///
    /// # Errors
    /// The pin is not what its name says, or the kernel doesn't answer.
    pub(crate) fn look(&self) -> io::Result<LinkInfo> {
        let Some(ifindex) = self.filter_at else {
            return sys::link_info(&self.path);
        };
        let found = clsact::ours(ifindex, self.direction)?;
        Ok(LinkInfo {
            program: found.unwrap_or(0),
            ifindex: if found.is_some() { ifindex } else { 0 },
        })
    }

    /// Whether the pin holds what runs; a process that died while it replaced a filter's program may leave another.
    ///
    /// # Errors
    /// The kernel doesn't answer.
    pub(crate) fn pins(&self, program: u32) -> io::Result<bool> {
        if self.filter_at.is_none() {
            return Ok(true);
        }
        match ProgramInfo::from_pin(&self.path) {
            Ok(info) => Ok(info.id() == program),
            Err(error) if !self.path.exists() => {
                tracing::debug!(pin = %self.path.display(), %error, "no pin");
                Ok(false)
            }
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Takes the program off the interface and removes the pin; what is gone already is fine. A filter stays that
    /// another attachment names too, or that runs another program than the pinned one: another build's.
    pub(crate) fn remove(&self) -> Result<(), BpffsError> {
        let Some(ifindex) = self.filter_at else {
            return bpffs::unlink(&self.path);
        };
        let failed = |e| BpffsError::io("detach", &self.path, e);
        let running = self.look().map_err(failed)?;
        if running.ifindex != 0 && self.pins(running.program).map_err(failed)? && !self.is_shared()? {
            clsact::remove(ifindex, self.direction).map_err(failed)?;
        }
        bpffs::unpin(&self.path)
    }

    /// Whether another pin of the layout names the same filter, as one does that was adopted half-way.
    fn is_shared(&self) -> Result<bool, BpffsError> {
        let Some(layout) = self.path.parent() else {
            return Ok(false);
        };
        let same = |other: &Self| other.direction == self.direction && other.filter_at == self.filter_at;
        Ok(attachments(&Pins::at(layout))?
            .iter()
            .any(|other| other.path != self.path && same(other)))
    }

    /// The same attachment's pin under another endpoint's id.
    pub(crate) fn path_of(&self, pins: &Pins, endpoint: u16) -> PathBuf {
        match self.filter_at {
            None => pins.link(endpoint, self.direction),
            Some(ifindex) => pins.filter(endpoint, self.direction, ifindex),
        }
    }
}

pub(crate) const fn attach_type(direction: Direction) -> TcAttachType {
    match direction {
        Direction::To => TcAttachType::Egress,
        Direction::From => TcAttachType::Ingress,
    }
}
