//! What was looked at, in words.

use thyra_datapath_abi::tables::PolicyRef;

use super::Named;
use super::rule::Truth;

/// A policy, or a rule of it, that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Looked {
    /// The policy.
    pub policy: PolicyRef,
    /// The rule; none where the policy as a whole was passed over.
    pub rule: Option<u32>,
    /// `matched`, `not matched`, `needs L7`, `not expressible`, `does not apply`.
    pub outcome: &'static str,
    /// The clause that made it so, in words; empty where every clause matched.
    pub clause: String,
}

pub(super) fn note(trace: &mut Vec<Looked>, rule: &Named<'_>, truth: &Truth) {
    let (outcome, clause) = match truth {
        Truth::Yes if rule.body.is_none() => ("not expressible", String::new()),
        Truth::Yes => ("matched", String::new()),
        Truth::Ask(fields) => ("needs L7", fields.join(", ")),
        Truth::No(why) => ("not matched", why.clone()),
    };
    trace.push(Looked {
        policy: rule.reference.policy.clone(),
        rule: rule.reference.rule,
        outcome,
        clause,
    });
}
