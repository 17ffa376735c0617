//! Which endpoints take part in `Config::local_redirect`, and why others don't.
//!
//! Invariant: an endpoint takes part only when packets can be put into its pod: it is behind a veth whose far end is in
//! another network namespace that this one knows by a number.

use std::collections::BTreeSet;
use std::{fmt, io};

use aya::programs::{ProgramInfo, ProgramType, loaded_programs};
use aya::sys::{BpfHelper, is_helper_supported};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use thyra_datapath_abi::EndpointRecord;
use tracing::warn;

use crate::datapath::Datapath;
use crate::interface;
use crate::programs::is_direct;

/// Whether connections between pods of this node go straight from one into the other (`Config::local_redirect`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LocalRedirect {
    /// Nobody wants it.
    Off,
    /// They do, where both pods take part (`EndpointStatus::through_the_stack`).
    On,
    /// It is wanted and can't be, for this reason: all connections go through the stack.
    Refused(String),
}

impl fmt::Display for LocalRedirect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::On => f.write_str("on"),
            Self::Refused(why) => write!(f, "off: {why}"),
        }
    }
}

/// The pod's end of a veth.
struct FarEnd {
    netns: u16,
    mac: [u8; 6],
}

impl Datapath {
    /// Whether connections between pods of this node go straight, or why not.
    #[must_use]
    pub const fn local_redirect(&self) -> &LocalRedirect {
        &self.local_redirect
    }

    /// The same of one endpoint's connections with other pods that take part.
    #[must_use]
    pub fn local_redirect_of(&self, id: u16) -> LocalRedirect {
        if self.local_redirect != LocalRedirect::On {
            return self.local_redirect.clone();
        }
        match self.through_the_stack.get(&id) {
            Some(why) => LocalRedirect::Refused(why.clone()),
            None if self.memory.record(id).flags & EndpointRecord::DIRECT != 0 => LocalRedirect::On,
            None => LocalRedirect::Off,
        }
    }

    /// Notes in the record that packets may be put straight into the pod; says why where they may not.
    pub(crate) fn join(&mut self, id: u16, record: &mut EndpointRecord) {
        match far_end(record.ifindex) {
            Ok(far) => {
                record.flags |= EndpointRecord::DIRECT;
                record.netns = far.netns;
                record.mac = far.mac;
                self.through_the_stack.remove(&id);
            }
            Err(reason) => {
                let known = self.through_the_stack.insert(id, reason.clone());
                if known.as_ref() != Some(&reason) {
                    warn!(id, reason, "its packets go through the node's stack");
                }
            }
        }
    }
}

/// What its programs call that not every kernel has, with the first that does.
const HELPERS: [(BpfHelper, &str, &str); 2] = [
    (BpfHelper::BPF_FUNC_skc_lookup_tcp, "bpf_skc_lookup_tcp", "5.2"),
    (BpfHelper::BPF_FUNC_redirect_peer, "bpf_redirect_peer", "5.10"),
];
/// Whether conntrack takes up a connection in the middle: <https://docs.kernel.org/networking/nf_conntrack-sysctl.html>.
const LOOSE: &str = "/proc/sys/net/netfilter/nf_conntrack_tcp_loose";

/// What `thyra preflight` says of it.
pub(crate) fn preflight() -> String {
    for (helper, name, since) in HELPERS {
        match is_helper_supported(ProgramType::SchedClassifier, helper) {
            Ok(true) => {}
            Ok(false) => return format!("not possible: this kernel has no `{name}` ({since})"),
            Err(error) => return format!("not known: the kernel can't be asked for `{name}`: {error}"),
        }
    }
    let strict = std::fs::read_to_string(LOOSE).is_ok_and(|value| value.trim() == "0");
    let then = if strict {
        ", but whoever turns it off breaks the connections that it has: `nf_conntrack_tcp_loose` is 0"
    } else {
        ""
    };
    format!("possible between pods behind a veth: `--local-redirect`{then}")
}

/// The kernel's ids of all programs that put packets straight into pods.
pub(crate) fn programs() -> BTreeSet<u32> {
    let ours = |info: &ProgramInfo| info.name_as_str().is_some_and(is_direct);
    let found = loaded_programs().filter_map(Result::ok).filter(ours);
    found.map(|info| info.id()).collect()
}

/// The far end of an interface, or why packets can't be put there.
fn far_end(ifindex: u32) -> Result<FarEnd, String> {
    let unknown = |error: io::Error| format!("its interface can't be asked for: {error}");
    let near = attributes(ifindex, None).map_err(unknown)?;
    let is_veth = near.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Veth)),
        _ => false,
    });
    if !is_veth {
        return Err("its interface is no veth".to_owned());
    }
    let peer = near.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    });
    let namespace = near.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkNetNsId(id) => Some(*id),
        _ => None,
    });
    let (Some(peer), Some(namespace)) = (peer, namespace) else {
        return Err("the far end of its veth is in no other network namespace".to_owned());
    };
    let netns = u16::try_from(namespace)
        .map_err(|_| format!("its network namespace has the number {namespace}, which is too high"))?;
    let mac = attributes(peer, Some(namespace)).map_err(unknown)?;
    let mac = mac.into_iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(mac) => mac.try_into().ok(),
        _ => None,
    });
    let mac = mac.ok_or("the far end of its veth has no MAC")?;
    Ok(FarEnd { netns, mac })
}

/// What the kernel says of an interface, here or in another namespace; nothing of one that is gone.
pub(crate) fn attributes(ifindex: u32, namespace: Option<i32>) -> io::Result<Vec<LinkAttribute>> {
    let mut wanted = LinkMessage::default();
    wanted.header.index = ifindex;
    wanted.attributes.extend(namespace.map(LinkAttribute::IfNetnsId));
    Ok(interface::ask(wanted)?.map_or_else(Vec::new, |link| link.attributes))
}
