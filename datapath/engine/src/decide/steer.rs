//! Which socket of the pod a new connection gets: the pod's own, a listener of Envoy, or none.
//!
//! This runs inside the pod's network namespace, after `to_pod` has let the packet in, for a packet that belongs to no
//! connection yet.
//!
//! Invariant: a connection whose verdict needs L7 gets Envoy's listener or nothing; whatever gets the pod's own is
//! forgotten as a steered one, so that no later verdict takes it for one.

use thyra_datapath_abi::held::is_held;
use thyra_datapath_abi::limits::{L7_FIRST_PORT, L7_PORTS};
use thyra_datapath_abi::{Action, Control, FlowState, Mode, Opening};

use crate::Family;
use crate::flows::{FlowTable, Flows};
use crate::lookup;
use crate::steered::Steered;
use crate::tables::Tables;

/// A connection that looks for its socket, seen from the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seeking<F: Family> {
    /// The pod's address.
    pub local: F::Address,
    /// The other side's.
    pub remote: F::Address,
    /// The pod's port, network byte order.
    pub local_port: [u8; 2],
    /// The other side's.
    pub remote_port: [u8; 2],
}

/// What it gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Steer {
    /// Whatever listens there in the pod.
    Own,
    /// The listener of the endpoint's Envoy on this port.
    Listener {
        /// Endpoint id.
        endpoint: u16,
        /// Its port.
        port: u16,
    },
    /// Nothing: as if nobody listened.
    Nothing,
}

/// Decides.
#[inline(always)]
pub fn steer<F: Family, N: Tables + Flows + Steered + ?Sized>(node: &N, seeking: &Seeking<F>) -> Steer {
    let port = u16::from_be_bytes(seeking.local_port);
    // Who reached Envoy's own port would reach it past this.
    if port.wrapping_sub(L7_FIRST_PORT) < L7_PORTS {
        return Steer::Nothing;
    }
    // Envoy's way to the pod, and the pod's own to itself: no such packet comes from outside.
    if seeking.local == seeking.remote {
        return Steer::Own;
    }
    let own = F::source(node, seeking.local);
    if !own.exact || own.local == 0 {
        // Loopback; `to_pod` lets nothing that needs L7 in to another address.
        return Steer::Own;
    }
    let key = F::flow(
        own.local,
        seeking.local,
        seeking.remote,
        seeking.local_port,
        seeking.remote_port,
    );
    let chosen = choose(node, own.local, seeking, &key);
    if !matches!(chosen, Steer::Listener { .. }) {
        F::leave(node, &key);
    }
    chosen
}

#[inline(always)]
fn choose<F: Family, N: Tables + Flows + Steered + ?Sized>(
    node: &N,
    endpoint: u16,
    seeking: &Seeking<F>,
    key: &F::Flow,
) -> Steer {
    let sets = node.sets(endpoint);
    if !sets.is_placed() {
        return Steer::Nothing;
    }
    if sets.mode() != Mode::Enforce {
        return Steer::Own;
    }
    if let Some(flags) = F::find(node, FlowTable::Host, key, 0)
        && (flags & FlowState::SELF != 0 || !node.control().has(Control::ENFORCE_HOST))
    {
        return Steer::Own;
    }
    let source = F::source(node, seeking.remote);
    let cell = lookup::cell(node, F::set(sets), source.class, seeking.local_port);
    match cell.action() {
        Action::Allow => Steer::Own,
        // What is held is the pod's own: `decide::hold` keeps its bytes back.
        Action::Proxy if is_held(node.listener(cell.verdict())) => Steer::Own,
        Action::Proxy => given::<F, N>(node, endpoint, node.listener(cell.verdict()), key),
        Action::Missing | Action::Deny | Action::Hold => Steer::Nothing,
    }
}

#[inline(always)]
fn given<F: Family, N: Steered + ?Sized>(node: &N, endpoint: u16, port: u16, key: &F::Flow) -> Steer {
    let opening = Opening {
        port,
        ..Opening::default()
    };
    // Of an earlier connection with the same ends.
    F::leave(node, key);
    if port != 0 && F::begin(node, key, opening) {
        Steer::Listener { endpoint, port }
    } else {
        Steer::Nothing
    }
}
