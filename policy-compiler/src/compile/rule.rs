//! A rule under one reading of the stream, partly evaluated: sets of slots where it holds, and what is left
//! to ask of L7.
//!
//! Invariant: `sure` ⊆ `may`. A term that can't be expressed is false in `strictly` and true in `broadly`, so
//! that an ALLOW decides by the first and a DENY by the second.

use std::net::IpAddr;
use std::sync::Arc;

use super::bits::Bits;
use super::block::Blocks;
use super::prepared::{Prepared, PreparedCondition, PreparedOperation, PreparedSource, test};
use super::slot::{Side, Slots};
use crate::policy::Field;
use crate::residual::{Conditions, Test};

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
    /// It reads differently where the stream is HTTP.
    by_reading: bool,
    /// The `when` conditions about the source.
    when: Bits,
    when_tests: Vec<Test>,
    sources: Vec<ReadSource>,
    strictly: Reach,
    broadly: Reach,
}

#[derive(Debug)]
struct ReadSource {
    holds: Bits,
    tests: Vec<Test>,
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
    /// Why `may` isn't `sure`, as the rule's side sees unknown terms: parts that don't overlap.
    pub(crate) asks: Vec<Asking>,
}

/// Slots where a rule comes down to the same conditions.
#[derive(Clone, Debug)]
pub(crate) struct Asking {
    pub(crate) slots: Bits,
    pub(crate) conditions: Arc<Conditions>,
    /// The fields, as the policy names them, in its order.
    pub(crate) names: Arc<[Arc<str>]>,
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
        let mut when_tests = Vec::new();
        let mut http = rule.from.iter().any(|source| !source.http.is_empty())
            || rule.to.iter().any(|operation| operation.is_http);
        let mut remote = rule.from.iter().any(|source| !source.remote_ip.is_empty());
        for condition in &rule.when {
            match condition {
                PreparedCondition::Identity(test) => when.keep(&slots.holds(*test, side)),
                PreparedCondition::Ip(field) => when.keep(&slots.held(blocks, field)),
                PreparedCondition::RemoteIp(field) => {
                    remote = true;
                    match reading {
                        Reading::Tcp => when.keep(&slots.held(blocks, field)),
                        Reading::Http => when_tests.extend(test(field, Test::RemoteIp)),
                    }
                }
                PreparedCondition::Sni(test) => when_tests.push(test.clone()),
                PreparedCondition::Http(test) => {
                    http = true;
                    if reading == Reading::Http {
                        when_tests.push(test.clone());
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
            by_reading: http || remote,
            rule,
            reading,
            when,
            when_tests,
            sources,
        }
    }

    /// Whether the rule reads differently where the stream is HTTP.
    pub(crate) fn depends_on_reading(&self) -> bool {
        self.by_reading
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
        judged.asks = self.asks(side, port, &judged);
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
            sure: if gate == Level::Yes && self.when_tests.is_empty() {
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
        let http = self.reading == Reading::Http;
        let here = held(&operation.ports, |value| Some(*value) == port);
        if !here || (operation.unknown && !unknown) || (http && operation.never_http) {
            Level::No
        } else if http && !operation.http.is_empty() {
            Level::L7
        } else {
            Level::Yes
        }
    }

    /// What keeps slots from being sure.
    fn asks(&self, side: Side, port: Option<u16>, judged: &Judged) -> Vec<Asking> {
        let unknown = side == Side::Deny;
        let (reach, from) = if unknown {
            (&judged.broadly, &self.broadly)
        } else {
            (&judged.strictly, &self.strictly)
        };
        let open = reach.may.without(&reach.sure);
        if open.is_empty() {
            return Vec::new();
        }
        let operations: Vec<&[Test]> = if self.to(unknown, port) == Level::L7 {
            let all = self.rule.to.iter();
            let asking = all.filter(|operation| self.operation(operation, unknown, port) == Level::L7);
            asking.map(|operation| operation.http.as_slice()).collect()
        } else {
            Vec::new()
        };
        let mut parts: Vec<(Bits, Vec<&[Test]>)> = vec![(open.clone(), Vec::new())];
        for source in self.sources.iter().filter(|source| unknown || !source.unknown) {
            // Where some source holds for sure, the others don't matter.
            let here = source.holds.both(&open).without(&from.sure);
            parts = split(parts, &here, source.tests.as_slice());
        }
        let asking = |(slots, sources): (Bits, Vec<&[Test]>)| self.asking(slots, &sources, &operations);
        parts.into_iter().map(asking).collect()
    }

    fn asking(&self, slots: Bits, sources: &[&[Test]], operations: &[&[Test]]) -> Asking {
        let tests = sources
            .iter()
            .chain(operations)
            .copied()
            .flatten()
            .chain(&self.when_tests);
        let owned = |list: &[&[Test]]| list.iter().map(|tests| tests.to_vec()).collect();
        let when = self.when_tests.clone();
        Asking {
            slots,
            names: tests.flat_map(Test::names).collect(),
            conditions: Arc::new(Conditions::canonical(owned(sources), owned(operations), when)),
        }
    }
}

/// Parts, divided by whether they are `inside`; what lies inside notes `mark`.
pub(crate) fn split<T: Clone>(parts: Vec<(Bits, Vec<T>)>, inside: &Bits, mark: T) -> Vec<(Bits, Vec<T>)> {
    if inside.is_empty() {
        return parts;
    }
    let mut next = Vec::with_capacity(parts.len() + 1);
    for (part, mut marks) in parts {
        let (within, without) = (part.both(inside), part.without(inside));
        if !without.is_empty() {
            next.push((without, marks.clone()));
        }
        if !within.is_empty() {
            marks.push(mark.clone());
            next.push((within, marks));
        }
    }
    next
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
        let mut tests = Vec::new();
        match reading {
            Reading::Tcp if !source.remote_ip.is_empty() => {
                holds.keep(&slots.held(blocks, &source.remote_ip))
            }
            Reading::Tcp => {}
            Reading::Http => {
                tests.extend(test(&source.remote_ip, Test::RemoteBlock));
                tests.extend(source.http.iter().cloned());
            }
        }
        Self {
            holds,
            tests,
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
        if source.tests.is_empty() {
            reach.sure.add(&source.holds);
        }
    }
    reach
}

fn held<T>(field: &Field<T>, matches: impl Fn(&T) -> bool) -> bool {
    (field.values.is_empty() || field.values.iter().any(&matches)) && !field.not_values.iter().any(&matches)
}
