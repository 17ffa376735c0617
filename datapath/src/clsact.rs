//! Filters of clsact qdiscs, for kernels without tcx.
//!
//! Invariant: a filter is ours by its place and its name together; no other is ever replaced or removed, and no qdisc.

use std::io;

use aya::programs::links::Link as _;
use aya::programs::tc::{SchedClassifierLink, TcHandle, qdisc_add_clsact};
use netlink_sys::protocols::NETLINK_ROUTE;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::bpffs::Direction;
use crate::hook::attach_type;
use crate::interface::Interface;
use crate::netlink;
use crate::programs::Variant;

/// The first place of a clsact qdisc.
pub(crate) const PRIORITY: u16 = 1;
/// Ours among the filters of that priority ("Th").
pub(crate) const HANDLE: TcHandle = TcHandle::new(0, 0x5468);

/// <https://github.com/torvalds/linux/blob/v6.6/include/uapi/linux/rtnetlink.h>.
const RTM_GETLINK: u16 = 18;
const RTM_GETQDISC: u16 = 38;
const RTM_GETTFILTER: u16 = 46;
/// The one place that clsact and ingress qdiscs share: `TC_H_CLSACT` and `TC_H_INGRESS`.
const QDISC_PARENT: u32 = 0xffff_fff1;
const CLSACT_INGRESS: u32 = 0xffff_fff2;
const CLSACT_EGRESS: u32 = 0xffff_fff3;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_ID: u16 = 11;

/// A filter of a clsact qdisc.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Filter {
    priority: u16,
    handle: u32,
    /// Id of its program; 0 for a filter that is none of BPF.
    program: u32,
    /// Its program's name, as far as the filter tells.
    name: String,
    /// Whether that is the name of our program of its direction.
    named: bool,
}

/// `struct tcmsg`.
#[repr(C)]
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct TcMessage {
    family: u32,
    ifindex: u32,
    handle: u32,
    parent: u32,
    info: u32,
}

/// `struct ifinfomsg`.
#[repr(C)]
#[derive(Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct LinkHeader {
    family: u16,
    kind: u16,
    index: u32,
    flags: u32,
    change: u32,
}

/// Our filter at an interface, as aya names it. Dropped, it would be taken away: forget it or detach it.
pub(crate) fn filter(interface: &Interface, direction: Direction) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(&interface.name, attach_type(direction), PRIORITY, HANDLE, None)
}

/// The program of our filter at an interface, if there is one.
pub(crate) fn ours(ifindex: u32, direction: Direction) -> io::Result<Option<u32>> {
    let found = filters(ifindex, direction)?.into_iter().find(is_ours);
    Ok(found.map(|filter| filter.program))
}

/// Whether our filter comes before all others there.
pub(crate) fn is_first(ifindex: u32, direction: Direction) -> io::Result<bool> {
    Ok(filters(ifindex, direction)?.first().is_some_and(is_ours))
}

/// Removes our filter from an interface; one that is gone already is fine.
pub(crate) fn remove(ifindex: u32, direction: Direction) -> io::Result<()> {
    if ours(ifindex, direction)?.is_none() {
        return Ok(());
    }
    let Some(interface) = Interface::by_index(ifindex)? else {
        return Ok(());
    };
    filter(&interface, direction)?.detach().map_err(io::Error::other)
}

/// Removes our filters from all interfaces of this network namespace, also those that no pin names.
pub(crate) fn remove_everywhere() -> io::Result<()> {
    for ifindex in interfaces()? {
        for direction in Direction::BOTH {
            remove(ifindex, direction)?;
        }
    }
    Ok(())
}

/// Indices of all interfaces of this network namespace.
pub(crate) fn interfaces() -> io::Result<Vec<u32>> {
    let mut interfaces = Vec::new();
    netlink::dump(NETLINK_ROUTE, RTM_GETLINK, &LinkHeader::default(), &mut |body| {
        let (link, _) = LinkHeader::read_from_prefix(body).map_err(|_| netlink::cut_short())?;
        interfaces.push(link.index);
        Ok(())
    })?;
    Ok(interfaces)
}

/// Names of the programs in filters of others at an interface.
pub(crate) fn others(ifindex: u32, direction: Direction) -> io::Result<Vec<String>> {
    let found = filters(ifindex, direction)?.into_iter();
    let others = found.filter(|filter| filter.program != 0 && !is_ours(filter));
    Ok(others.map(|filter| filter.name).collect())
}

/// Makes the qdisc unless there is one.
///
/// # Errors
/// It can't be made, or a qdisc of another kind has its place.
pub(crate) fn prepare(interface: &Interface) -> io::Result<()> {
    let refused = match qdisc_add_clsact(&interface.name) {
        Ok(()) => return Ok(()),
        Err(refused) => refused,
    };
    match qdisc(interface.index)?.as_deref() {
        Some("clsact") => Ok(()),
        Some(other) => Err(io::Error::other(format!(
            "`{}` has a qdisc of kind `{other}`, which has no place for packets to the pod; \
             remove it: `tc qdisc del dev {} {other}`",
            interface.name, interface.name
        ))),
        None => Err(io::Error::other(refused)),
    }
}

/// Kind of the qdisc in the place of a clsact one.
fn qdisc(ifindex: u32) -> io::Result<Option<String>> {
    let mut kind = None;
    netlink::dump(NETLINK_ROUTE, RTM_GETQDISC, &TcMessage::default(), &mut |body| {
        let (message, attributes) = TcMessage::read_from_prefix(body).map_err(|_| netlink::cut_short())?;
        if message.ifindex == ifindex && message.parent == QDISC_PARENT {
            kind = netlink::attribute(attributes, TCA_KIND)?.map(text);
        }
        Ok(())
    })?;
    Ok(kind)
}

/// The filters of a direction in the order in which they run; none where there is no qdisc or no interface.
fn filters(ifindex: u32, direction: Direction) -> io::Result<Vec<Filter>> {
    let message = TcMessage {
        ifindex,
        parent: match direction {
            Direction::To => CLSACT_EGRESS,
            Direction::From => CLSACT_INGRESS,
        },
        ..TcMessage::default()
    };
    let mut found = Vec::new();
    netlink::dump(NETLINK_ROUTE, RTM_GETTFILTER, &message, &mut |body| {
        let (message, attributes) = TcMessage::read_from_prefix(body).map_err(|_| netlink::cut_short())?;
        // A classifier announces itself once without a filter.
        if message.handle != 0 {
            found.push(read(message, attributes, direction)?);
        }
        Ok(())
    })?;
    Ok(found)
}

fn read(message: TcMessage, attributes: &[u8], direction: Direction) -> io::Result<Filter> {
    let options = netlink::attribute(attributes, TCA_OPTIONS)?.unwrap_or_default();
    let program = match netlink::attribute(options, TCA_BPF_ID)? {
        Some(id) => u32::read_from_bytes(id).map_err(|_| netlink::cut_short())?,
        None => 0,
    };
    let name = netlink::attribute(options, TCA_BPF_NAME)?
        .map(text)
        .unwrap_or_default();
    Ok(Filter {
        priority: u16::try_from(message.info >> 16).unwrap_or(0),
        handle: message.handle,
        program,
        named: Variant::ALL
            .iter()
            .any(|variant| variant.program(direction) == name),
        name,
    })
}

fn is_ours(filter: &Filter) -> bool {
    filter.priority == PRIORITY && filter.handle == u32::from(HANDLE) && filter.named
}

/// A string attribute without what ends it.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}
