//! A verdict as the admin API tells it.
//!
//! Invariant: policy and rule are those that decided, and nothing else.

use thyra_datapath_abi::Action;
use thyra_datapath_abi::tables::Verdict;
use thyra_proto::thyra::v1 as api;

use crate::word;

/// Who carries out a verdict that the tables have.
const KERNEL: &str = "kernel";
/// Who does so where the request decides.
pub const WITH_ENVOY: &str = "kernel+envoy";

/// The wire form.
#[must_use]
pub fn to_api(verdict: &Verdict) -> api::Verdict {
    let Verdict {
        action,
        reason,
        rule,
        because,
        residual,
        would,
    } = verdict;
    let would_rule = would.as_ref().and_then(|w| w.rule.as_ref());
    api::Verdict {
        action: word::action(*action).to_owned(),
        reason: reason.text().to_owned(),
        reason_number: u32::from(word::number(*reason)),
        policy: rule.as_ref().map(|r| r.policy.to_string()).unwrap_or_default(),
        rule: rule.as_ref().and_then(|r| r.rule),
        because: because
            .iter()
            .map(|(rule, field)| format!("{rule}: {field}"))
            .collect(),
        would_action: would.as_ref().map(|w| word::action(w.action).to_owned()),
        would_policy: would_rule.map(|r| r.policy.to_string()),
        would_rule: would_rule.and_then(|r| r.rule),
        enforced_by: KERNEL.to_owned(),
        residual: residual.as_deref().unwrap_or_default().to_owned(),
    }
}

/// A cell of the kernel whose verdict id has no name any more.
#[must_use]
pub fn unnamed(action: Action, id: u16) -> api::Verdict {
    api::Verdict {
        action: word::action(action).to_owned(),
        reason: format!("verdict id {id} has no name"),
        enforced_by: KERNEL.to_owned(),
        ..api::Verdict::default()
    }
}
