//! One row: for one port of one destination, the outcome of every slot, by Istio's order over partly
//! evaluated rules.
//!
//! Invariant: each slot gets exactly one outcome, and of several rules that match the first in deciding order
//! names it.

use std::sync::Arc;

use thyra_datapath_abi::{Action, Reason};

use super::bits::Bits;
use super::question::{needs, questions};
use super::rule::Judged;
use super::scope::Demand;
use super::slot::Slots;
use crate::authorizer::Provider;
use crate::residual::{Answer, Residual};
use crate::tokens::Tokens;

/// Number of a rule in this compile: policies in deciding order, then rules.
pub(crate) type RuleId = usize;

/// An outcome in numbers; becomes a `Verdict` once for all cells that share it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Outcome {
    NoPolicy,
    Allow(RuleId),
    NotEnforced,
    /// A sidecar or gateway answers what L7 must.
    OwnProxy(Arc<Needs>),
    Exempt,
    BootstrapAllow,
    Hold,
    NeedsL7(Arc<Needs>),
    NeedsCustom(Arc<Needs>),
    Deny(RuleId),
    NotExpressible(RuleId),
    /// A rule of CUSTOM whose provider can't be asked.
    NoAuthorizer(RuleId),
    NoMatch,
    /// Index into the compile's demands.
    Strict(usize),
    /// A PeerAuthentication that could not be read whole; index into the compile's demands.
    StrictUnread(usize),
    Bootstrap,
}

/// What only L7 can say.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Needs {
    pub(crate) residual: Residual<RuleId>,
    /// Rules and fields: CUSTOM, DENY, ALLOW, each in deciding order.
    pub(crate) because: Vec<(RuleId, Arc<str>)>,
}

/// Where two readings of one connection end differently and no field says so.
const PROTOCOL: &str = "protocol";

impl Outcome {
    fn asks(custom: bool, needs: Needs) -> Self {
        if custom {
            Self::NeedsCustom(Arc::new(needs))
        } else {
            Self::NeedsL7(Arc::new(needs))
        }
    }

    fn needs(&self) -> Option<&Needs> {
        match self {
            Self::NeedsL7(needs) | Self::NeedsCustom(needs) => Some(needs),
            _ => None,
        }
    }

    fn rule(&self) -> Option<RuleId> {
        match self {
            Self::Allow(rule) | Self::Deny(rule) | Self::NotExpressible(rule) | Self::NoAuthorizer(rule) => {
                Some(*rule)
            }
            _ => None,
        }
    }

    /// What an HTTP request, or another stream, gets by it.
    fn answer(&self, http: bool) -> Answer<RuleId> {
        match self.needs() {
            Some(needs) if http => needs.residual.http.clone(),
            Some(needs) => needs.residual.other.clone(),
            None => Answer::Constant(self.action(), self.reason(), self.rule()),
        }
    }

    /// Where HTTP is read and the pod's RequestAuthentications have rules: what is allowed without a byte waits for
    /// Envoy, which refuses invalid tokens; what is refused or held back stays so.
    pub(crate) fn authenticated(self, tokens: &Arc<Tokens>) -> Self {
        let checked = |answer| Answer::Authenticated(Arc::clone(tokens), Arc::new(answer));
        let because = match (&self, self.needs()) {
            (_, Some(needs)) => needs.because.clone(),
            (Self::NoPolicy | Self::Allow(_), None) => Vec::new(),
            _ => return self,
        };
        let residual = Residual {
            http: checked(self.answer(true)),
            other: self.answer(false),
        };
        Self::asks(matches!(self, Self::NeedsCustom(_)), Needs { residual, because })
    }

    /// On a port that declares HTTP, where other bytes are refused.
    pub(crate) fn declared_http(self) -> Self {
        match self.needs() {
            None => self,
            Some(needs) => {
                let residual = Residual {
                    http: needs.residual.http.clone(),
                    other: Answer::Constant(Action::Deny, Reason::NotHttp, None),
                };
                let because = needs.because.clone();
                Self::asks(matches!(self, Self::NeedsCustom(_)), Needs { residual, because })
            }
        }
    }

    /// On a port that declares nothing, where the first bytes decide which reading holds.
    /// `naming` keeps two causes of one end apart.
    pub(crate) fn undeclared(tcp: &Self, http: &Self, naming: bool) -> Self {
        let because = match (tcp.needs(), http.needs()) {
            (None, None) if tcp == http || (tcp.ends_like(http) && !naming) => return http.clone(),
            (None, None) => {
                let rule = tcp.rule().or_else(|| http.rule());
                rule.map(|rule| (rule, PROTOCOL.into())).into_iter().collect()
            }
            (tcp, http) => {
                let mut all = http.map_or_else(Vec::new, |needs| needs.because.clone());
                for because in tcp.into_iter().flat_map(|needs| &needs.because) {
                    if !all.contains(because) {
                        all.push(because.clone());
                    }
                }
                all
            }
        };
        let residual = Residual {
            http: http.answer(true),
            other: tcp.answer(false),
        };
        let custom = [tcp, http]
            .iter()
            .any(|side| matches!(side, Self::NeedsCustom(_)));
        Self::asks(custom, Needs { residual, because })
    }
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
            Self::NoAuthorizer(_) => Reason::NoAuthorizer,
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

    /// Of two Services' readings of a port the stricter one; of two alike the HTTP one, which `declared` may
    /// refuse other bytes.
    pub(crate) fn stricter(tcp: Self, http: Self, declared_http: bool) -> Self {
        let certain = tcp.needs().is_none() && http.needs().is_none();
        let refused = tcp.severity().max(http.severity()) > Severity::L7;
        if certain || refused {
            return if tcp.severity() > http.severity() {
                tcp
            } else {
                http
            };
        }
        let both = |a: Answer<RuleId>, b: Answer<RuleId>| Answer::Stricter(Arc::new(a), Arc::new(b));
        let refused = Answer::Constant(Action::Deny, Reason::NotHttp, None);
        // What is held back never gets as far as its bytes.
        let http_other = if declared_http && http.severity() != Severity::Hold {
            refused
        } else {
            http.answer(false)
        };
        let residual = Residual {
            http: both(http.answer(true), tcp.answer(true)),
            other: both(http_other, tcp.answer(false)),
        };
        let asking = if http.needs().is_some() { &http } else { &tcp };
        let because = asking
            .needs()
            .map_or_else(Vec::new, |needs| needs.because.clone());
        Self::asks(
            matches!(asking, Self::NeedsCustom(_)),
            Needs { residual, because },
        )
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
    /// Its policy wants the first request to decide for the connection.
    pub(crate) by_connection: bool,
}

/// Everything that applies at one port.
#[derive(Debug, Default)]
pub(crate) struct Docket<'a> {
    /// With whom each asks.
    pub(crate) custom: Vec<(Entry<'a>, Arc<Provider>)>,
    pub(crate) deny: Vec<Entry<'a>>,
    pub(crate) allow: Vec<Entry<'a>>,
    /// Some ALLOW policy applies, even one without rules.
    pub(crate) default_deny: bool,
    /// Sources without identity are refused: index of the demand, and the demand.
    pub(crate) strict: Option<(usize, &'a Demand)>,
    /// Leave open what is certain without L7, so that the residual names the first rule that holds.
    pub(crate) naming: bool,
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

/// The outcome of each slot, kindest identities of awaited ones first (`settle` folds them).
pub(crate) fn judge(docket: &Docket<'_>, slots: &Slots) -> Vec<Outcome> {
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
    let (allowed, may_allow) = allow(docket, slots, &mut row);
    for (entry, _) in docket
        .custom
        .iter()
        .filter(|(_, provider)| provider.authorizer.is_err())
    {
        let hit = row.open.both(&entry.judged.broadly.sure);
        row.settle(&hit, &Outcome::NoAuthorizer(entry.id));
    }
    // Only what is still open can be allowed at all: by a rule, for want of one, or by what L7 says.
    let custom = may(
        docket.custom.iter().map(|(entry, _)| entry),
        &row.open,
        slots.len(),
    );
    let mut asking = may(docket.deny.iter(), &row.open, slots.len());
    asking.add(&custom);
    asking.add(&row.open.both(&may_allow));
    for (part, questions) in questions(docket, &asking, &custom, &may_allow) {
        let needs = needs(docket.default_deny, &questions);
        row.settle(&part, &Outcome::asks(!part.both(&custom).is_empty(), needs));
    }
    for slot in row.open.clone().iter() {
        row.outcomes[slot] = allowed[slot].clone();
    }
    if docket.naming {
        name(docket, slots, &mut row);
    }
    row.outcomes
}

/// The slots that a rule may match.
fn may<'a>(entries: impl Iterator<Item = &'a Entry<'a>>, open: &Bits, slots: usize) -> Bits {
    let mut may = Bits::empty(slots);
    for entry in entries {
        may.add(&entry.judged.broadly.may);
    }
    may.both(open)
}

/// Puts a residual wherever a rule waits for L7, though the verdict may be certain without.
fn name(docket: &Docket<'_>, slots: &Slots, row: &mut Row) {
    let mut asking = Bits::empty(slots.len());
    let custom = docket.custom.iter().map(|(entry, _)| entry);
    for entry in custom.chain(&docket.deny).chain(&docket.allow) {
        for ask in &entry.judged.asks {
            asking.add(&ask.slots);
        }
    }
    if docket.strict.is_some() {
        asking.remove(&slots.nobody);
    }
    for (part, questions) in questions(docket, &asking, &asking, &asking) {
        row.settle(
            &part,
            &Outcome::asks(false, needs(docket.default_deny, &questions)),
        );
    }
}

/// The outcome of each column candidate: a pod's own proxy answers what L7 must; of an awaited source's two
/// outcomes one is left.
pub(crate) fn settle(mut outcomes: Vec<Outcome>, own_proxy: bool, slots: &Slots) -> Vec<Outcome> {
    if own_proxy {
        for outcome in &mut outcomes {
            if let Outcome::NeedsL7(needs) | Outcome::NeedsCustom(needs) = outcome {
                *outcome = Outcome::OwnProxy(Arc::clone(needs));
            }
        }
    }
    fold_pending(outcomes, slots)
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

fn fold_pending(mut outcomes: Vec<Outcome>, slots: &Slots) -> Vec<Outcome> {
    let harsh = outcomes.split_off(slots.list.len());
    for (at, harsh) in slots.pending.iter().zip(harsh) {
        outcomes[*at] = Outcome::pending(outcomes[*at].clone(), harsh);
    }
    outcomes
}
