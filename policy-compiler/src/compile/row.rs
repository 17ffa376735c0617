//! One row: for one port of one destination, the outcome of every slot, by Istio's order over partly
//! evaluated rules.
//!
//! Invariant: each slot gets exactly one outcome, and of several rules that match the first in deciding order
//! names it.

use std::collections::BTreeSet;
use std::sync::Arc;

use thyra_datapath_abi::{Action, Reason};

use super::bits::Bits;
use super::rule::Judged;
use super::scope::Demand;
use super::slot::Slots;

/// Number of a rule in this compile: policies in deciding order, then rules.
pub(crate) type RuleId = usize;

/// An outcome in numbers; becomes a `Verdict` once for all cells that share it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Outcome {
    NoPolicy,
    Allow(RuleId),
    NotEnforced,
    /// A sidecar or gateway answers what L7 must.
    OwnProxy(Because),
    Exempt,
    BootstrapAllow,
    Hold,
    NeedsL7(Because),
    NeedsCustom(Because),
    Deny(RuleId),
    NotExpressible(RuleId),
    NoMatch,
    /// Index into the compile's demands.
    Strict(usize),
    /// A PeerAuthentication that could not be read whole; index into the compile's demands.
    StrictUnread(usize),
    Bootstrap,
}

/// Rules and fields, DENY before ALLOW, each in deciding order.
pub(crate) type Because = Arc<[(RuleId, Arc<str>)]>;

impl Outcome {
    pub(crate) fn action(&self) -> Action {
        match self {
            Self::NoPolicy
            | Self::Allow(_)
            | Self::NotEnforced
            | Self::OwnProxy(_)
            | Self::Exempt
            | Self::BootstrapAllow => Action::Allow,
            Self::Hold => Action::Hold,
            _ => Action::Deny,
        }
    }

    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::NoPolicy => Reason::NoPolicy,
            Self::Allow(_) => Reason::PolicyAllow,
            Self::NotEnforced | Self::OwnProxy(_) => Reason::NotEnforced,
            Self::Exempt => Reason::ExemptPort,
            Self::BootstrapAllow => Reason::BootstrapAllow,
            Self::Hold => Reason::IdentityPending,
            Self::NeedsL7(_) => Reason::NeedsL7,
            Self::NeedsCustom(_) => Reason::NeedsCustom,
            Self::Deny(_) => Reason::PolicyDeny,
            Self::NotExpressible(_) | Self::StrictUnread(_) => Reason::NotExpressible,
            Self::NoMatch => Reason::Policy,
            Self::Strict(_) => Reason::StrictMtls,
            Self::Bootstrap => Reason::Bootstrap,
        }
    }

    fn severity(&self) -> Severity {
        match (self.action(), self) {
            (Action::Allow, _) => Severity::Allow,
            (Action::Hold, _) => Severity::Hold,
            (_, Self::NeedsL7(_) | Self::NeedsCustom(_)) => Severity::L7,
            _ => Severity::Deny,
        }
    }

    /// Whether two outcomes end alike for the connection, whatever their cause.
    pub(crate) fn ends_like(&self, other: &Self) -> bool {
        self.severity() == other.severity()
    }

    /// Of two Services' readings of a port the stricter one; of two alike the HTTP one.
    pub(crate) fn stricter(tcp: Self, http: Self) -> Self {
        if tcp.severity() > http.severity() {
            tcp
        } else {
            http
        }
    }

    /// For a source whose identity isn't here yet, from the kindest and the harshest one it may have.
    fn pending(kind: Self, harsh: Self) -> Self {
        match (kind.severity(), harsh.severity()) {
            (Severity::Deny, _) => kind,
            (a, b) if a == b => harsh,
            _ => Self::Hold,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Severity {
    Allow,
    Hold,
    L7,
    Deny,
}

/// A rule at this port, by what its policy does.
#[derive(Debug)]
pub(crate) struct Entry<'a> {
    pub(crate) id: RuleId,
    pub(crate) judged: &'a Judged,
}

/// Everything that applies at one port.
#[derive(Debug, Default)]
pub(crate) struct Docket<'a> {
    pub(crate) custom: Vec<Entry<'a>>,
    pub(crate) deny: Vec<Entry<'a>>,
    pub(crate) allow: Vec<Entry<'a>>,
    /// Some ALLOW policy applies, even one without rules.
    pub(crate) default_deny: bool,
    /// Sources without identity are refused: index of the demand, and the demand.
    pub(crate) strict: Option<(usize, &'a Demand)>,
    pub(crate) own_proxy: bool,
}

/// A row under construction.
struct Row {
    outcomes: Vec<Outcome>,
    open: Bits,
}

impl Row {
    fn settle(&mut self, slots: &Bits, outcome: &Outcome) {
        for slot in slots.iter() {
            self.outcomes[slot] = outcome.clone();
        }
        self.open.remove(slots);
    }
}

/// The outcome of each column candidate.
pub(crate) fn judge(
    docket: &Docket<'_>,
    slots: &Slots,
    custom_field: &dyn Fn(RuleId) -> Arc<str>,
) -> Vec<Outcome> {
    let mut row = Row {
        outcomes: vec![Outcome::NoMatch; slots.len()],
        open: Bits::full(slots.len()),
    };
    if let Some((demand, said)) = docket.strict {
        let refused = slots.nobody.clone();
        row.settle(&refused, &strict_outcome(demand, said));
    }
    for entry in &docket.deny {
        let hit = row.open.both(&entry.judged.broadly.sure);
        let plain = hit.both(&entry.judged.strictly.sure);
        row.settle(&plain, &Outcome::Deny(entry.id));
        row.settle(&hit.without(&plain), &Outcome::NotExpressible(entry.id));
    }
    let mut may_deny = Bits::empty(slots.len());
    for entry in &docket.deny {
        may_deny.add(&entry.judged.broadly.may);
    }
    let (allowed, may_allow) = allow(docket, slots, &mut row);
    // Only what is still open can be allowed at all: by a rule, for want of one, or by what L7 says.
    let mut may_ask = Bits::empty(slots.len());
    for entry in &docket.custom {
        may_ask.add(&entry.judged.broadly.may);
    }
    let custom = row.open.both(&may_ask);
    let l7 = may_deny.both(&row.open);
    let mut asking = row.open.both(&may_allow);
    asking.add(&l7);
    asking.add(&custom);
    for (part, because) in parts(docket, &asking, &custom, &may_allow, custom_field) {
        let of_custom = part.both(&custom);
        row.settle(&of_custom, &Outcome::NeedsCustom(Arc::clone(&because)));
        row.settle(&part.without(&of_custom), &Outcome::NeedsL7(because));
    }
    for slot in row.open.clone().iter() {
        row.outcomes[slot] = allowed[slot].clone();
    }
    if docket.own_proxy {
        for outcome in &mut row.outcomes {
            if let Outcome::NeedsL7(because) | Outcome::NeedsCustom(because) = outcome {
                *outcome = Outcome::OwnProxy(Arc::clone(because));
            }
        }
    }
    fold_pending(row.outcomes, slots)
}

fn strict_outcome(demand: usize, said: &Demand) -> Outcome {
    if said.plain {
        Outcome::Strict(demand)
    } else {
        Outcome::StrictUnread(demand)
    }
}

/// Settles what no ALLOW rule can match; says what the rest is allowed by and what only L7 can allow.
fn allow(docket: &Docket<'_>, slots: &Slots, row: &mut Row) -> (Vec<Outcome>, Bits) {
    let mut allowed = vec![Outcome::NoPolicy; slots.len()];
    if !docket.default_deny {
        return (allowed, Bits::empty(slots.len()));
    }
    let mut unmatched = row.open.clone();
    for entry in &docket.allow {
        let hit = unmatched.both(&entry.judged.strictly.sure);
        for slot in hit.iter() {
            allowed[slot] = Outcome::Allow(entry.id);
        }
        unmatched.remove(&hit);
    }
    let mut may_allow = Bits::empty(slots.len());
    for entry in &docket.allow {
        may_allow.add(&entry.judged.strictly.may);
    }
    may_allow.keep(&unmatched);
    let mut refused = unmatched.without(&may_allow);
    for entry in &docket.allow {
        let hit = refused.both(&entry.judged.broadly.may);
        row.settle(&hit, &Outcome::NotExpressible(entry.id));
        refused.remove(&hit);
    }
    row.settle(&refused, &Outcome::NoMatch);
    (allowed, may_allow)
}

/// Slots and what they ask for so far.
type Part = (Bits, Vec<(RuleId, Arc<str>)>);

/// Parts the asking slots by what they ask for.
fn parts(
    docket: &Docket<'_>,
    asking: &Bits,
    custom: &Bits,
    may_allow: &Bits,
    custom_field: &dyn Fn(RuleId) -> Arc<str>,
) -> Vec<(Bits, Because)> {
    if asking.is_empty() {
        return Vec::new();
    }
    let mut asked: Vec<(Bits, (RuleId, Arc<str>))> = Vec::new();
    for entry in &docket.custom {
        let slots = entry.judged.broadly.may.both(custom);
        asked.push((slots, (entry.id, custom_field(entry.id))));
    }
    for entry in &docket.deny {
        for (slots, field) in &entry.judged.asks {
            asked.push((slots.both(asking), (entry.id, Arc::clone(field))));
        }
    }
    for entry in &docket.allow {
        for (slots, field) in &entry.judged.asks {
            asked.push((slots.both(may_allow), (entry.id, Arc::clone(field))));
        }
    }
    let mut parts: Vec<Part> = vec![(asking.clone(), Vec::new())];
    for (slots, because) in asked.iter().filter(|(slots, _)| !slots.is_empty()) {
        let mut next = Vec::with_capacity(parts.len() + 1);
        for (part, mut named) in parts {
            let (inside, outside) = (part.both(slots), part.without(slots));
            if !outside.is_empty() {
                next.push((outside, named.clone()));
            }
            if !inside.is_empty() {
                named.push(because.clone());
                next.push((inside, named));
            }
        }
        parts = next;
    }
    parts
        .into_iter()
        .map(|(slots, named)| {
            let mut seen = BTreeSet::new();
            let unique: Vec<_> = named
                .into_iter()
                .filter(|because| seen.insert(because.clone()))
                .collect();
            (slots, unique.into())
        })
        .collect()
}

fn fold_pending(mut outcomes: Vec<Outcome>, slots: &Slots) -> Vec<Outcome> {
    let harsh = outcomes.split_off(slots.list.len());
    for (at, harsh) in slots.pending.iter().zip(harsh) {
        outcomes[*at] = Outcome::pending(outcomes[*at].clone(), harsh);
    }
    outcomes
}
