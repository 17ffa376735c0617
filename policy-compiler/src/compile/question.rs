//! What is asked of L7: the slots whose verdict depends on it, parted by the rules that have something to say
//! there.
//!
//! Invariant: parts don't overlap, and each carries every rule that may come before the one that decides.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::bits::Bits;
use super::row::{Docket, Entry, Needs, RuleId};
use super::rule::split;
use crate::authorizer::Provider;
use crate::residual::{Answer, Ask, Conditions, Decides, Residual, Rules};

/// A rule that has something to say where L7 is asked.
#[derive(Clone)]
pub(crate) struct Question {
    list: List,
    rule: RuleId,
    conditions: Arc<Conditions>,
    /// The fields that make the verdict depend on L7; empty where the rule only comes after that.
    names: Arc<[Arc<str>]>,
    /// Whom a rule of CUSTOM asks.
    provider: Option<Arc<Provider>>,
    /// Its policy wants the first request to decide for the connection.
    by_connection: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum List {
    Custom,
    Deny,
    Allow,
}

impl Question {
    fn new(
        list: List,
        entry: &Entry<'_>,
        (conditions, names): (&Arc<Conditions>, &Arc<[Arc<str>]>),
        slots: Bits,
    ) -> (Bits, Self) {
        let question = Self {
            list,
            rule: entry.id,
            by_connection: entry.by_connection,
            conditions: Arc::clone(conditions),
            names: Arc::clone(names),
            provider: None,
        };
        (slots, question)
    }

    fn of(provider: &Arc<Provider>, (slots, mut question): (Bits, Self)) -> (Bits, Self) {
        question.provider = Some(Arc::clone(provider));
        (slots, question)
    }
}

/// Parts the asking slots by the rules that have something to say there.
pub(crate) fn questions(
    docket: &Docket<'_>,
    asking: &Bits,
    custom: &Bits,
    may_allow: &Bits,
) -> Vec<(Bits, Vec<Question>)> {
    if asking.is_empty() {
        return Vec::new();
    }
    let always = Arc::default();
    let mut asked = Vec::new();
    for (entry, provider) in &docket.custom {
        let names: Arc<[Arc<str>]> = Arc::new([provider.field()]);
        let question = |conditions, slots: &Bits| {
            let slots = slots.both(custom);
            let question = Question::new(List::Custom, entry, (conditions, &names), slots);
            Question::of(provider, question)
        };
        asked.push(question(&always, &entry.judged.broadly.sure));
        for ask in &entry.judged.asks {
            asked.push(question(&ask.conditions, &ask.slots));
        }
    }
    let unnamed: Arc<[Arc<str>]> = Arc::new([]);
    for entry in &docket.deny {
        let sure = entry.judged.broadly.sure.both(asking);
        asked.push(Question::new(List::Deny, entry, (&always, &unnamed), sure));
        for ask in &entry.judged.asks {
            let what = (&ask.conditions, &ask.names);
            asked.push(Question::new(List::Deny, entry, what, ask.slots.both(asking)));
        }
    }
    asked.extend(allowing(docket, asking, may_allow));
    let whole = vec![(asking.clone(), Vec::new())];
    asked
        .into_iter()
        .fold(whole, |parts, (slots, question)| split(parts, &slots, question))
}

/// What the ALLOW rules ask, up to the first one that holds for sure.
fn allowing(docket: &Docket<'_>, asking: &Bits, may_allow: &Bits) -> Vec<(Bits, Question)> {
    let always = Arc::default();
    let unnamed: Arc<[Arc<str>]> = Arc::new([]);
    let mut asked = Vec::new();
    // Slots that no earlier rule allows for sure.
    let mut open = asking.clone();
    for entry in &docket.allow {
        for ask in &entry.judged.asks {
            let (named, other) = (ask.slots.both(may_allow), ask.slots.without(may_allow));
            let what = (&ask.conditions, &ask.names);
            asked.push(Question::new(List::Allow, entry, what, named.both(asking)));
            let what = (&ask.conditions, &unnamed);
            asked.push(Question::new(List::Allow, entry, what, other.both(&open)));
        }
        let sure = entry.judged.strictly.sure.both(&open);
        open.remove(&sure);
        asked.push(Question::new(List::Allow, entry, (&always, &unnamed), sure));
    }
    asked
}

/// A later rule that asks the same provider of the same never decides.
fn asks(questions: &[Question]) -> Vec<Ask<RuleId>> {
    let mut asks: Vec<Ask<RuleId>> = Vec::new();
    for question in questions {
        let Some(provider) = &question.provider else {
            continue;
        };
        let same =
            |known: &Ask<RuleId>| (&known.conditions, &known.provider) == (&question.conditions, provider);
        if !asks.iter().any(same) {
            asks.push(Ask {
                rule: question.rule,
                conditions: Arc::clone(&question.conditions),
                provider: Arc::clone(provider),
            });
        }
    }
    asks
}

/// What the policies want that have something to say, be it the same as others'.
fn decides(questions: &[Question]) -> Decides {
    let asking = questions.iter().filter(|question| question.by_connection).count();
    match asking {
        0 => Decides::EachRequest,
        all if all == questions.len() => Decides::FirstRequest,
        _ => Decides::NotAllAlike,
    }
}

pub(crate) fn needs(default_deny: bool, questions: &[Question]) -> Needs {
    let list = |list: List| {
        let mut rules: Vec<(RuleId, Arc<Conditions>)> = Vec::new();
        for question in questions.iter().filter(|question| question.list == list) {
            // A later rule that comes down to the same never decides.
            if rules.iter().all(|(_, known)| *known != question.conditions) {
                rules.push((question.rule, Arc::clone(&question.conditions)));
            }
        }
        rules
    };
    let rules = Arc::new(Rules {
        custom: asks(questions),
        deny: list(List::Deny),
        allow: list(List::Allow),
        default_deny,
        decides: decides(questions),
    });
    let mut seen = BTreeSet::new();
    let named = questions.iter().flat_map(|question| {
        let names = question.names.iter();
        names.map(|name| (question.rule, Arc::clone(name)))
    });
    Needs {
        residual: Residual {
            http: Answer::Rules(Arc::clone(&rules)),
            other: Answer::Rules(rules),
        },
        because: named.filter(|because| seen.insert(because.clone())).collect(),
    }
}
