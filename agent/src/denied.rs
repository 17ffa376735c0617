//! Refusals of one second, counted by what they have in common: endpoint, direction, kind of source, port, reason.
//!
//! Invariant: every refusal that was reported is in exactly one count.

use std::collections::BTreeMap;

use thyra_datapath_abi::{Event, EventKind};
use thyra_proto::thyra::v1 as api;

use crate::monitor::{Namer, address};

/// Kinds of refusals that are told apart in one second; those of more are only counted.
const MAX_KINDS: usize = 1_024;

/// What refusals have in common. Addresses and source ports are their senders' to choose; the class of a source is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    kind: u8,
    endpoint: u16,
    flags: u8,
    class: u32,
    destination_port: [u8; 2],
    protocol: u8,
    verdict: u16,
    reason: u8,
}

/// The refusals of a second that is not over.
#[derive(Debug, Default)]
pub struct Denied {
    kinds: BTreeMap<Kind, (Event, u64)>,
    others: u64,
}

/// The refusals of a second.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Second {
    /// The first of each kind with the count of all.
    pub events: Vec<api::MonitorEvent>,
    /// Those of further kinds.
    pub others: u64,
}

/// Whether an event of this kind tells of a packet that did not go on.
#[must_use]
pub fn is_refusal(event: &Event) -> bool {
    matches!(
        EventKind::from_number(event.kind),
        Some(EventKind::Deny | EventKind::Revoke | EventKind::Spoof | EventKind::Malformed)
    )
}

impl Denied {
    /// Counts the refusals of a batch.
    pub fn add(&mut self, batch: &[Event], namer: &Namer<'_>) {
        for event in batch.iter().filter(|event| is_refusal(event)) {
            let kind = Kind {
                kind: event.kind,
                endpoint: event.endpoint,
                flags: event.flags & (Event::FROM_POD | Event::HOST | Event::SELF),
                class: namer.snapshot.tables.class_of(address(event.source)),
                destination_port: event.destination_port,
                protocol: event.protocol,
                verdict: event.verdict,
                reason: event.reason,
            };
            let has_room = self.kinds.len() < MAX_KINDS;
            match self.kinds.get_mut(&kind) {
                Some((_, count)) => *count += 1,
                None if has_room => drop(self.kinds.insert(kind, (*event, 1))),
                None => self.others += 1,
            }
        }
    }

    /// What was counted since the last call.
    pub fn take(&mut self, namer: &Namer<'_>) -> Second {
        let kinds = std::mem::take(&mut self.kinds).into_values();
        let named = |(event, count): (Event, u64)| api::MonitorEvent {
            count,
            ..namer.name(&event)
        };
        Second {
            events: kinds.map(named).collect(),
            others: std::mem::take(&mut self.others),
        }
    }
}
