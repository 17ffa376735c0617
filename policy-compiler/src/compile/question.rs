//! What is asked of L7: the slots whose verdict depends on it, parted by the rules that have something to say
//! there.
//!
//! Invariant: parts don't overlap, and each carries every rule that may come before the one that decides.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::bits::Bits;
use super::row::{Docket, Needs, RuleId};
use super::rule::split;
use crate::residual::{Answer, Conditions, Residual, Rules};

/// A rule that has something to say where L7 is asked.
#[derive(Clone)]
pub(crate) struct Question {
    list: List,
    rule: RuleId,
    conditions: Arc<Conditions>,
    /// The fields that make the verdict depend on L7; empty where the rule only comes after that.
    names: Arc<[Arc<str>]>,
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
        rule: RuleId,
        (conditions, names): (&Arc<Conditions>, &Arc<[Arc<str>]>),
        slots: Bits,
    ) -> (Bits, Self) {
        let question = Self {
            list,
            rule,
            conditions: Arc::clone(conditions),
            names: Arc::clone(names),
        };
        (slots, question)
    }
}

/// Parts the asking slots by the rules that have something to say there.
pub(crate) fn questions(
    docket: &Docket<'_>,
    asking: &Bits,
    custom: &Bits,
    may_allow: &Bits,
    custom_field: &dyn Fn(RuleId) -> Arc<str>,
) -> Vec<(Bits, Vec<Question>)> {
    if asking.is_empty() {
        return Vec::new();
    }
    let always = Arc::default();
    let mut asked = Vec::new();
    for entry in &docket.custom {
        let names: Arc<[Arc<str>]> = Arc::new([custom_field(entry.id)]);
        let sure = entry.judged.broadly.sure.both(custom);
        asked.push(Question::new(List::Custom, entry.id, (&always, &names), sure));
        for ask in &entry.judged.asks {
            let slots = ask.slots.both(custom);
            asked.push(Question::new(
                List::Custom,
                entry.id,
                (&ask.conditions, &names),
                slots,
            ));
        }
    }
    let unnamed: Arc<[Arc<str>]> = Arc::new([]);
    for entry in &docket.deny {
        let sure = entry.judged.broadly.sure.both(asking);
        asked.push(Question::new(List::Deny, entry.id, (&always, &unnamed), sure));
        for ask in &entry.judged.asks {
            let what = (&ask.conditions, &ask.names);
            asked.push(Question::new(List::Deny, entry.id, what, ask.slots.both(asking)));
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
            asked.push(Question::new(List::Allow, entry.id, what, named.both(asking)));
            let what = (&ask.conditions, &unnamed);
            asked.push(Question::new(List::Allow, entry.id, what, other.both(&open)));
        }
        let sure = entry.judged.strictly.sure.both(&open);
        open.remove(&sure);
        asked.push(Question::new(List::Allow, entry.id, (&always, &unnamed), sure));
    }
    asked
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
        custom: list(List::Custom),
        deny: list(List::Deny),
        allow: list(List::Allow),
        default_deny,
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
