//! Where a program sits: in a tcx link, or on kernels without them as a filter of a clsact qdisc.
//!
//! Invariant: whatever is attached has a pin that names it, and stays when this process ends. A filter is replaced
//! by one kernel operation; a qdisc is made where there is none and never removed, since others may use it.

use std::io;
use std::path::PathBuf;

use aya::programs::links::Link as _;
use aya::programs::tc::{SchedClassifierLink, TcHandle, qdisc_add_clsact};
use aya::programs::{ProgramInfo, TcAttachType};
use netlink_sys::protocols::NETLINK_ROUTE;
use rustix::system::uname;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::bpffs::{self, BpffsError, Direction, Pin, Pins};
use crate::interface::Interface;
use crate::netlink::{self, Header};
use crate::preflight;
use crate::sys::{self, LinkInfo};

/// The first place of a clsact qdisc.
pub(crate) const PRIORITY: u16 = 1;
/// Ours among the filters of that priority ("Th").
pub(crate) const HANDLE: TcHandle = TcHandle::new(0, 0x5468);

/// tcx came with 6.6: <https://github.com/torvalds/linux/commit/e420bed025071a623d2720a92bc2245c84757ecb>.
pub(crate) const TCX_KERNEL: (u32, u32) = (6, 6);
const RTM_GETTFILTER: u16 = 46;
const CLSACT_INGRESS: u32 = 0xffff_fff2;
const CLSACT_EGRESS: u32 = 0xffff_fff3;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_ID: u16 = 11;

/// How programs are put at an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// A link: since Linux 6.6.
    Tcx,
    /// A filter of a clsact qdisc.
    Clsact,
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

/// A filter of a clsact qdisc.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Filter {
    priority: u16,
    handle: u32,
    /// Id of its program; 0 for a filter that is none of BPF.
    program: u32,
}

/// `struct tcmsg`, <https://github.com/torvalds/linux/blob/v6.6/include/uapi/linux/rtnetlink.h>.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct TcMessage {
    family: u32,
    ifindex: u32,
    handle: u32,
    parent: u32,
    info: u32,
}

#[repr(C)]
#[derive(IntoBytes, Immutable, KnownLayout)]
struct Request {
    header: Header,
    message: TcMessage,
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
        Pin::Program { .. } | Pin::Map => None,
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

    /// The program that runs there and the interface; 0 when it is gone, or the filter from it.
    ///
    /// # Errors
    /// The pin is not what its name says, or the kernel doesn't answer.
    pub(crate) fn look(&self) -> io::Result<LinkInfo> {
        let Some(ifindex) = self.filter_at else {
            return sys::link_info(&self.path);
        };
        let found = ours(&filters(ifindex, self.direction)?);
        Ok(LinkInfo {
            program: found.unwrap_or(0),
            ifindex: if found.is_some() { ifindex } else { 0 },
        })
    }

    /// Whether the pin holds what runs; a process that died while it replaced a filter's program may leave another.
    pub(crate) fn pins(&self, program: u32) -> bool {
        self.filter_at.is_none() || self.pinned() == Some(program)
    }

    fn pinned(&self) -> Option<u32> {
        ProgramInfo::from_pin(&self.path).map(|info| info.id()).ok()
    }

    /// Takes the program off the interface and removes the pin; what is gone already is fine. A filter that runs
    /// another program than the pinned one is another build's, and stays.
    pub(crate) fn remove(&self) -> Result<(), BpffsError> {
        let Some(ifindex) = self.filter_at else {
            return bpffs::unlink(&self.path);
        };
        let failed = |e| BpffsError::io("detach", &self.path, e);
        let running = self.look().map_err(failed)?;
        if running.ifindex != 0
            && self.pins(running.program)
            && let Some(interface) = Interface::by_index(ifindex).map_err(failed)?
        {
            let filter = filter(&interface, self.direction).map_err(failed)?;
            filter.detach().map_err(|e| failed(io::Error::other(e)))?;
        }
        bpffs::unpin(&self.path)
    }

    /// The same attachment's pin under another endpoint's id.
    pub(crate) fn path_of(&self, pins: &Pins, endpoint: u16) -> PathBuf {
        match self.filter_at {
            None => pins.link(endpoint, self.direction),
            Some(ifindex) => pins.filter(endpoint, self.direction, ifindex),
        }
    }
}

/// Our filter at an interface, as aya names it. Dropped, it would be taken away: forget it or detach it.
pub(crate) fn filter(interface: &Interface, direction: Direction) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(&interface.name, attach_type(direction), PRIORITY, HANDLE, None)
}

/// Whether our filter is at an interface already.
pub(crate) fn has_filter(ifindex: u32, direction: Direction) -> io::Result<bool> {
    Ok(ours(&filters(ifindex, direction)?).is_some())
}

/// Whether our filter comes before all others there.
pub(crate) fn is_first(ifindex: u32, direction: Direction) -> io::Result<bool> {
    let first = filters(ifindex, direction)?.first().copied();
    Ok(first.is_some_and(|filter| is_ours(&filter)))
}

/// Makes the qdisc unless there is one.
pub(crate) fn prepare_clsact(interface: &str) -> io::Result<()> {
    let made = qdisc_add_clsact(interface);
    // Whatever the refusal says, a qdisc that answers is there.
    made.or_else(|refused| match Interface::by_name(interface)? {
        Some(found) if filters(found.index, Direction::To).is_ok() => Ok(()),
        _ => Err(io::Error::other(refused)),
    })
}

pub(crate) const fn attach_type(direction: Direction) -> TcAttachType {
    match direction {
        Direction::To => TcAttachType::Egress,
        Direction::From => TcAttachType::Ingress,
    }
}

fn is_ours(filter: &Filter) -> bool {
    filter.priority == PRIORITY && filter.handle == u32::from(HANDLE)
}

fn ours(filters: &[Filter]) -> Option<u32> {
    filters
        .iter()
        .find(|filter| is_ours(filter))
        .map(|filter| filter.program)
}

/// The filters of a direction in the order in which they run; none where there is no qdisc or no interface.
fn filters(ifindex: u32, direction: Direction) -> io::Result<Vec<Filter>> {
    let request = Request {
        header: Header::dump::<Request>(RTM_GETTFILTER)?,
        message: TcMessage {
            family: 0,
            ifindex,
            handle: 0,
            parent: match direction {
                Direction::To => CLSACT_EGRESS,
                Direction::From => CLSACT_INGRESS,
            },
            info: 0,
        },
    };
    let mut found = Vec::new();
    netlink::dump(NETLINK_ROUTE, request.as_bytes(), &mut |body| {
        let (message, attributes) = TcMessage::read_from_prefix(body).map_err(|_| netlink::cut_short())?;
        // A classifier announces itself once without a filter.
        if message.handle != 0 {
            found.push(Filter {
                priority: u16::try_from(message.info >> 16).unwrap_or(0),
                handle: message.handle,
                program: program(attributes)?,
            });
        }
        Ok(())
    })?;
    Ok(found)
}

fn program(attributes: &[u8]) -> io::Result<u32> {
    let Some(options) = netlink::attribute(attributes, TCA_OPTIONS)? else {
        return Ok(0);
    };
    match netlink::attribute(options, TCA_BPF_ID)? {
        Some(id) => u32::read_from_bytes(id).map_err(|_| netlink::cut_short()),
        None => Ok(0),
    }
}
