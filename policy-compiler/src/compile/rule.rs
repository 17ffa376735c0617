//! A rule under one reading of the stream, partly evaluated: sets of slots where it holds, and what is left
//! to ask of L7.
//!
//! Invariant: `sure` ⊆ `may`. A term that can't be expressed is false in `strictly` and true in `broadly`, so
//! that an ALLOW decides by the first and a DENY by the second.

use std::net::IpAddr;
use std::sync::Arc;

use super::bits::Bits;
use super::block::Blocks;
use super::prepared::{Names, Prepared, PreparedCondition, PreparedOperation, PreparedSource, names};
use super::slot::{Side, Slots};
use crate::policy::Field;

/// How the stream is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Reading {
    /// Not HTTP: HTTP fields match nothing in ALLOW and are ignored in DENY.
    Tcp,
    /// HTTP, or not known before its first bytes.
    Http,
}

/// How far a part of a rule that is the same for all sources holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Level {
    No,
    /// Only L7 can tell.
    L7,
    Yes,
}

/// A rule under one reading: what depends on the source is worked out, what depends on the port is not yet.
#[derive(Debug)]
pub(crate) struct Read<'a> {
    rule: &'a Prepared,
    reading: Reading,
    /// An ALLOW with an HTTP field where the stream is not HTTP.
    never: bool,
    /// The `when` conditions about the source.
    when: Bits,
    when_fields: Names,
    sources: Vec<ReadSource>,
    strictly: Reach,
    broadly: Reach,
}

#[derive(Debug)]
struct ReadSource {
    holds: Bits,
    fields: Names,
    unknown: bool,
}

/// Where a rule holds for sure and where it may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reach {
    pub(crate) sure: Bits,
    pub(crate) may: Bits,
}

impl Reach {
    fn constant(slots: &Slots, holds: bool) -> Self {
        let bits = if holds {
            Bits::full(slots.len())
        } else {
            Bits::empty(slots.len())
        };
        Self {
            sure: bits.clone(),
            may: bits,
        }
    }
}

/// A rule at one port of one destination.
#[derive(Debug)]
pub(crate) struct Judged {
    /// Unknown terms don't hold.
    pub(crate) strictly: Reach,
    /// Unknown terms hold.
    pub(crate) broadly: Reach,
    /// Why `may` isn't `sure`: slots with the fields that L7 must answer. Seen as the rule's side decides.
    pub(crate) asks: Vec<(Bits, Arc<str>)>,
}

impl<'a> Read<'a> {
    pub(crate) fn new(
        rule: &'a Prepared,
        side: Side,
        reading: Reading,
        slots: &Slots,
        blocks: &Blocks,
    ) -> Self {
        let mut when = Bits::full(slots.len());
        let mut when_fields: Names = Vec::new();
        let mut http = rule.from.iter().any(|source| !source.http.is_empty())
            || rule.to.iter().any(|operation| !operation.http.is_empty());
        for condition in &rule.when {
            match condition {
                PreparedCondition::Identity(test) => when.keep(&slots.holds(*test, side)),
                PreparedCondition::Ip(field) => when.keep(&slots.held(blocks, field)),
                PreparedCondition::RemoteIp(field) if reading == Reading::Tcp => {
                    when.keep(&slots.held(blocks, field));
                }
                PreparedCondition::RemoteIp(_) => when_fields.push("remote.ip".into()),
                PreparedCondition::Sni => when_fields.push("connection.sni".into()),
                PreparedCondition::Http(key) => {
                    http = true;
                    if reading == Reading::Http {
                        when_fields.push(Arc::clone(key));
                    }
                }
                PreparedCondition::DestinationIp(_) | PreparedCondition::DestinationPort(_) => {}
            }
        }
        let sources: Vec<ReadSource> = rule
            .from
            .iter()
            .map(|source| ReadSource::new(source, side, reading, slots, blocks))
            .collect();
        Self {
            strictly: reach(&sources, false, slots),
            broadly: reach(&sources, true, slots),
            never: http && reading == Reading::Tcp && side == Side::Allow,
            rule,
            reading,
            when,
            when_fields,
            sources,
        }
    }

    /// At `port` (`None`: any that no one names) of `destination`.
    pub(crate) fn at(
        &self,
        side: Side,
        port: Option<u16>,
        destination: Option<IpAddr>,
        slots: &Slots,
    ) -> Judged {
        if self.never || self.rule.wholly_unknown {
            return Judged {
                strictly: Reach::constant(slots, false),
                broadly: Reach::constant(slots, !self.never),
                asks: Vec::new(),
            };
        }
        let mut judged = Judged {
            strictly: self.reach_at(false, port, destination, slots),
            broadly: self.reach_at(true, port, destination, slots),
            asks: Vec::new(),
        };
        self.ask(side, port, &mut judged);
        judged
    }

    fn reach_at(
        &self,
        unknown: bool,
        port: Option<u16>,
        destination: Option<IpAddr>,
        slots: &Slots,
    ) -> Reach {
        let gate = self.gate(unknown, port, destination);
        let from = if unknown { &self.broadly } else { &self.strictly };
        Reach {
            sure: if gate == Level::Yes && self.when_fields.is_empty() {
                from.sure.both(&self.when)
            } else {
                Bits::empty(slots.len())
            },
            may: if gate == Level::No {
                Bits::empty(slots.len())
            } else {
                from.may.both(&self.when)
            },
        }
    }

    /// The part that is the same for all sources.
    fn gate(&self, unknown: bool, port: Option<u16>, destination: Option<IpAddr>) -> Level {
        let when = self.rule.when.iter().all(|condition| match condition {
            PreparedCondition::DestinationIp(field) => {
                held(field, |net| destination.is_some_and(|ip| net.contains(&ip)))
            }
            PreparedCondition::DestinationPort(field) => held(field, |value| Some(*value) == port),
            _ => true,
        });
        if !when || (self.rule.unknown && !unknown) {
            return Level::No;
        }
        self.to(unknown, port)
    }

    fn to(&self, unknown: bool, port: Option<u16>) -> Level {
        let operations = self.rule.to.iter();
        operations
            .map(|operation| self.operation(operation, unknown, port))
            .max()
            .unwrap_or(Level::Yes)
    }

    fn operation(&self, operation: &PreparedOperation, unknown: bool, port: Option<u16>) -> Level {
        if !held(&operation.ports, |value| Some(*value) == port) || (operation.unknown && !unknown) {
            Level::No
        } else if self.reading == Reading::Http && !operation.http.is_empty() {
            Level::L7
        } else {
            Level::Yes
        }
    }

    /// Notes the fields that keep slots from being sure, as the rule's side sees unknown terms.
    fn ask(&self, side: Side, port: Option<u16>, judged: &mut Judged) {
        let unknown = side == Side::Deny;
        let (reach, from) = if unknown {
            (&judged.broadly, &self.broadly)
        } else {
            (&judged.strictly, &self.strictly)
        };
        let open = reach.may.without(&reach.sure);
        if open.is_empty() {
            return;
        }
        let mut asks: Vec<(Bits, Arc<str>)> = Vec::new();
        for source in &self.sources {
            if source.unknown && !unknown {
                continue;
            }
            let here = source.holds.both(&open).without(&from.sure);
            asks.extend(source.fields.iter().map(|name| (here.clone(), Arc::clone(name))));
        }
        if self.to(unknown, port) == Level::L7 {
            let asking = self
                .rule
                .to
                .iter()
                .filter(|operation| self.operation(operation, unknown, port) == Level::L7);
            asks.extend(
                asking
                    .flat_map(|operation| &operation.http)
                    .map(|name| (open.clone(), Arc::clone(name))),
            );
        }
        asks.extend(
            self.when_fields
                .iter()
                .map(|name| (open.clone(), Arc::clone(name))),
        );
        asks.retain(|(bits, _)| !bits.is_empty());
        judged.asks = asks;
    }
}

impl ReadSource {
    fn new(source: &PreparedSource, side: Side, reading: Reading, slots: &Slots, blocks: &Blocks) -> Self {
        let mut holds = Bits::full(slots.len());
        for test in &source.tests {
            holds.keep(&slots.holds(*test, side));
        }
        if !source.ip.is_empty() {
            holds.keep(&slots.held(blocks, &source.ip));
        }
        let mut fields: Names = Vec::new();
        match reading {
            Reading::Tcp if !source.remote_ip.is_empty() => {
                holds.keep(&slots.held(blocks, &source.remote_ip))
            }
            Reading::Tcp => {}
            Reading::Http => {
                fields = names(&source.remote_ip, "remoteIpBlocks", "notRemoteIpBlocks");
                fields.extend(source.http.iter().cloned());
            }
        }
        Self {
            holds,
            fields,
            unknown: source.unknown,
        }
    }
}

/// OR over the sources; none at all is no constraint.
fn reach(sources: &[ReadSource], unknown: bool, slots: &Slots) -> Reach {
    if sources.is_empty() {
        return Reach::constant(slots, true);
    }
    let mut reach = Reach::constant(slots, false);
    for source in sources.iter().filter(|source| unknown || !source.unknown) {
        reach.may.add(&source.holds);
        if source.fields.is_empty() {
            reach.sure.add(&source.holds);
        }
    }
    reach
}

fn held<T>(field: &Field<T>, matches: impl Fn(&T) -> bool) -> bool {
    (field.values.is_empty() || field.values.iter().any(&matches)) && !field.not_values.iter().any(&matches)
}
