//! What happens to a packet, and why; pure but for the memory of connections.
//!
//! ```text
//! to_pod    own mark → endpoint → shape → not TCP → made by the node → own interface → spoofed → cell → own reply → L7
//! from_pod  own mark → endpoint → shape → source → not TCP → SYN → self → reverse cell → own connection → node's → L7
//! steer     Envoy's ports → self → address → the node's → cell
//! origin    own mark → endpoint → made by the node → own interface → spoofed
//! ```
//!
//! Invariant: the control word is read once per packet; nothing but an `Allow` cell, an exemption by origin,
//! a connection that the pod opened or one that Envoy has lets a packet of an enforced endpoint pass.

pub mod direct;
mod from_pod;
pub mod hold;
pub mod l7;
pub mod non_tcp;
pub mod origin;
pub mod steer;
mod to_pod;
mod tuple;
pub mod usual;

use thyra_datapath_abi::{Control, EndpointSets, EventKind, FlowState, Mode, Reason};

pub use self::from_pod::from_pod;
pub use self::to_pod::to_pod;
use crate::Family;
use crate::flows::{FlowTable, Flows};
use crate::packet::{FIN, Packet, RST, SYN};

/// What the kernel says about a packet, besides its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// The interface that the program is attached to.
    pub ifindex: u32,
    /// The interface that the packet came in by; 0 when none is known.
    pub ingress_ifindex: u32,
    /// Whether it belongs to a socket of this node.
    pub has_socket: bool,
    /// Whether it is looked at in the pod's own network namespace: there nothing is known of where it came from, and
    /// `origin` has asked that at the host end of the veth. `ifindex` is the host end's all the same, since interface
    /// indices repeat between namespaces. A constant of each program.
    pub at_pod: bool,
}

impl Arrival {
    /// Made by the node itself. The interface alone is not enough: the node loses it when it fragments a
    /// pod's IPv6 packet again or answers for it (SYNPROXY), but such packets have no socket.
    #[must_use]
    #[inline(always)]
    pub fn is_from_node(&self) -> bool {
        self.ingress_ifindex == 0 && self.has_socket
    }
}

/// What is to be done with the packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Act {
    /// On to the next program.
    Pass,
    /// Silently gone.
    Drop,
    /// A SYN: its sender gets a reset.
    Refuse,
    /// On if Envoy has the connection: `l7` says so.
    Ask,
    /// On, or to the agent, by what is known of the connection: `hold` says so.
    Hold,
    /// To the agent, which holds it.
    Divert,
    /// Of an established connection: its sender gets a reset, the far end a bare ACK whose answer will get
    /// one.
    Revoke,
}

/// A packet's end, with what is to be counted and reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Outcome {
    /// What is to be done.
    pub act: Act,
    /// Endpoint id; 0 when the interface is not known.
    pub endpoint: u16,
    /// Verdict id; 0 when no policy was asked, or when its counters are for the other direction alone.
    pub verdict: u16,
    /// Why, where no verdict says it.
    pub reason: Option<Reason>,
    /// What is reported.
    pub event: Option<EventKind>,
    /// `Event::*` bits.
    pub flags: u8,
}

impl Outcome {
    #[inline(always)]
    const fn new(act: Act, endpoint: u16) -> Self {
        Self {
            act,
            endpoint,
            verdict: 0,
            reason: None,
            event: None,
            flags: 0,
        }
    }
    #[inline(always)]
    const fn pass(endpoint: u16) -> Self {
        Self::new(Act::Pass, endpoint)
    }
    #[inline(always)]
    const fn drop(endpoint: u16, reason: Reason) -> Self {
        Self::new(Act::Drop, endpoint).because(reason)
    }
    #[inline(always)]
    const fn because(self, reason: Reason) -> Self {
        Self {
            reason: Some(reason),
            ..self
        }
    }
    #[inline(always)]
    const fn by(self, verdict: u16) -> Self {
        Self { verdict, ..self }
    }
    #[inline(always)]
    const fn event(self, event: EventKind) -> Self {
        Self {
            event: Some(event),
            ..self
        }
    }
    #[inline(always)]
    const fn event_if(self, condition: bool, event: EventKind) -> Self {
        if condition { self.event(event) } else { self }
    }
    #[inline(always)]
    const fn flags(self, flags: u8) -> Self {
        Self {
            flags: self.flags | flags,
            ..self
        }
    }
}

/// Who sent the packet, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Pod,
    Remote,
}

/// What the packet says about the state of its connection, as `FlowState` bits.
#[inline(always)]
fn progress(flags: u8, side: Side) -> u32 {
    let fin = match side {
        Side::Pod => FlowState::LOCAL_FIN,
        Side::Remote => FlowState::REMOTE_FIN,
    };
    let mut mark = 0;
    if flags & FIN != 0 {
        mark |= fin;
    }
    if flags & RST != 0 {
        mark |= FlowState::RESET;
    }
    if flags & SYN != 0 && matches!(side, Side::Remote) {
        mark |= FlowState::ANSWERED;
    }
    mark
}

/// Whether the packet belongs to a connection that the pod opened; its state is noted.
#[inline(always)]
fn is_own<F: Family, S: Flows + ?Sized>(flows: &S, key: &F::Flow, flags: u8, side: Side) -> bool {
    F::find(flows, FlowTable::Outbound, key, progress(flags, side)).is_some()
}

/// Notes the state of the pod's own connection, if the packet changes one.
#[inline(always)]
fn track<F: Family, S: Flows + ?Sized>(flows: &S, packet: &Packet<F>, key: &F::Flow, side: Side) {
    if packet.changes_state() && !packet.is_syn() {
        let _ = is_own::<F, S>(flows, key, packet.flags, side);
    }
}

/// How an established connection that is no longer allowed ends.
#[inline(always)]
fn revocation(control: Control, has_acknowledgment: bool) -> Act {
    // Without an acknowledgment number no reset can be exact.
    if control.has(Control::DENY_DROP) || !has_acknowledgment {
        Act::Drop
    } else {
        Act::Revoke
    }
}

/// A packet whose shape can't be judged, of an endpoint that may not be judged at all.
#[inline(always)]
fn unjudged(endpoint: u16, sets: EndpointSets, reason: Reason) -> Outcome {
    match sets.mode() {
        Mode::Off if sets.is_placed() => Outcome::pass(endpoint).because(Reason::NotEnforced),
        Mode::Audit => Outcome::pass(endpoint)
            .because(reason)
            .event(EventKind::Malformed),
        _ => Outcome::drop(endpoint, reason).event(EventKind::Malformed),
    }
}
