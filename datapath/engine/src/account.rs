//! Counters and events: what is written about a packet, once it is decided.
//!
//! Invariant: each packet is counted once at its endpoint, whatever is in it (user space compares that with what the
//! interface has received), and once under its verdict or its reason; an
//! allowed answer of the pod is counted at the endpoint alone.

use thyra_datapath_abi::{Control, Event, EventKind, Reason};

use crate::decide::{Act, Arrival, Outcome};
use crate::packet::{Kind, Parsed};
use crate::{Family, reset};

/// A program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// `maps::TO_POD`.
    ToPod,
    /// `maps::FROM_POD`.
    FromPod,
}

/// Whoever holds the counters and the event ring.
pub trait Counters {
    /// A packet was judged by this verdict.
    fn verdict(&self, verdict: u16, bytes: u32, connection: bool);
    /// A packet ended for this reason.
    fn reason(&self, reason: Reason, bytes: u32);
    /// A packet of the endpoint went on, or did not.
    fn endpoint(&self, endpoint: u16, direction: Direction, passed: bool);
    /// Reports an event, complete but for `time_ns`; what is lost is counted by the holder.
    fn report(&self, kind: EventKind, event: Event);
}

/// What is done in the end: a packet that no segment can take the place of is dropped.
#[inline(always)]
pub fn feasible<F: Family>(outcome: &Outcome, parsed: &Parsed<F>) -> Act {
    match (outcome.act, parsed) {
        (act @ (Act::Pass | Act::Drop), _) => act,
        // What is held has the shape of `hold`'s step, where nothing else takes the packet's place.
        (Act::Divert, _) => Act::Divert,
        // Of a shape that Envoy's flows don't have.
        (Act::Ask | Act::Hold, _) => Act::Drop,
        (act, parsed) if parsed.kind == Kind::Tcp && reset::fits(&parsed.packet) => act,
        _ => Act::Drop,
    }
}

/// Whether the packet goes on with an answer to a connection that the flow log takes.
#[must_use]
#[inline(always)]
pub fn is_logged_answer<F: Family>(act: Act, parsed: &Parsed<F>, control: Control) -> bool {
    let packet = &parsed.packet;
    act == Act::Pass && parsed.kind == Kind::Tcp && packet.is_answer() && control.logs(packet.answered())
}

/// Writes what is to be counted and reported: what was decided, else that a SYN was answered (`is_logged_answer`).
#[inline(always)]
pub fn account<F: Family, C: Counters + ?Sized>(
    counters: &C,
    outcome: &Outcome,
    act: Act,
    parsed: &Parsed<F>,
    is_answer: bool,
    (arrival, bytes, generation): (&Arrival, u32, u32),
) {
    let direction = if outcome.flags & Event::FROM_POD == 0 {
        Direction::ToPod
    } else {
        Direction::FromPod
    };
    counters.endpoint(outcome.endpoint, direction, act == Act::Pass);
    if outcome.verdict != 0 {
        let connection = parsed.kind == Kind::Tcp && parsed.packet.is_syn();
        counters.verdict(outcome.verdict, bytes, connection);
    } else if let Some(reason) = outcome.reason {
        counters.reason(reason, bytes);
    }
    let is_answer = is_answer && outcome.event.is_none();
    let reported = if is_answer {
        Some(EventKind::Answered)
    } else {
        outcome.event
    };
    let Some(kind) = reported else {
        return;
    };
    let sequence = if is_answer {
        parsed.packet.answered()
    } else {
        parsed.packet.sequence
    };
    let event = event(kind, outcome, act, parsed, (arrival, bytes, generation));
    counters.report(kind, Event { sequence, ..event });
}

#[inline(always)]
fn event<F: Family>(
    kind: EventKind,
    outcome: &Outcome,
    act: Act,
    parsed: &Parsed<F>,
    (arrival, length, generation): (&Arrival, u32, u32),
) -> Event {
    let answered = if matches!(act, Act::Refuse | Act::Revoke) {
        Event::RESET_SENT
    } else {
        0
    };
    let packet = &parsed.packet;
    let known = !matches!(parsed.kind, Kind::Invalid | Kind::Unsupported);
    Event {
        generation,
        ifindex: arrival.ifindex,
        length,
        endpoint: outcome.endpoint,
        verdict: outcome.verdict,
        kind: kind_number(kind),
        reason: reason_number(outcome.reason),
        flags: outcome.flags | answered,
        source: if known { F::mapped(packet.source) } else { [0; 16] },
        destination: if known {
            F::mapped(packet.destination)
        } else {
            [0; 16]
        },
        source_port: packet.source_port,
        destination_port: packet.destination_port,
        tcp_flags: packet.flags,
        family: if known { F::VERSION } else { 0 },
        protocol: parsed.protocol,
        ..Event::default()
    }
}

#[expect(
    clippy::as_conversions,
    reason = "a fieldless repr(u8) enum has no other way to its number"
)]
#[inline(always)]
fn kind_number(kind: EventKind) -> u8 {
    kind as u8
}

/// The stable number of a reason; 0 for none.
#[expect(
    clippy::as_conversions,
    reason = "a fieldless repr(u8) enum has no other way to its number"
)]
#[must_use]
#[inline(always)]
pub fn reason_number(reason: Option<Reason>) -> u8 {
    match reason {
        Some(reason) => reason as u8,
        None => 0,
    }
}
