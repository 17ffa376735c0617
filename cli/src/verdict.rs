//! A verdict as people and programs see it, from the agent's message or from the compiler's tables.
//!
//! Invariant: both ways give the same words.

use serde::Serialize;
use thyra_datapath_abi::Action;
use thyra_datapath_abi::tables;
use thyra_proto::thyra::v1;

/// A verdict.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Verdict {
    /// allow | deny | hold | proxy
    pub(crate) action: String,
    /// Text of the reason.
    pub(crate) reason: String,
    /// Its stable number.
    pub(crate) reason_number: u32,
    /// `ns/name`; null where no policy decided.
    pub(crate) policy: Option<String>,
    /// Index in `spec.rules` from 0; null where none decided.
    pub(crate) rule: Option<u32>,
    /// `ns/name#rule: field` of the rules that make it depend on L7.
    pub(crate) because: Vec<String>,
    /// Address of what is left to ask of L7; null where nothing is.
    pub(crate) residual: Option<String>,
    /// What dry-run policies would have done; null where they change nothing.
    pub(crate) would: Option<Would>,
    /// kernel | kernel+envoy
    pub(crate) enforced_by: String,
}

/// What dry-run policies would have done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Would {
    pub(crate) action: String,
    pub(crate) policy: Option<String>,
    pub(crate) rule: Option<u32>,
}

impl Verdict {
    /// `ns/name#rule`, or the reason in brackets where no rule decided.
    pub(crate) fn rule_text(&self) -> String {
        match (&self.policy, self.rule) {
            (Some(policy), Some(rule)) => format!("{policy}#{rule}"),
            (Some(policy), None) => policy.clone(),
            (None, _) => format!("({})", self.reason),
        }
    }

    /// One line: `allow by shop/allow-front#0`, `deny: needs L7 (shop/get-only#0: to.methods)`.
    pub(crate) fn sentence(&self) -> String {
        let mut text = self.action.clone();
        match &self.policy {
            Some(_) => text += &format!(" by {} ({})", self.rule_text(), self.reason),
            None => text += &format!(": {}", self.reason),
        }
        if !self.because.is_empty() {
            text += &format!(" ({})", self.because.join(", "));
        }
        if let Some(would) = &self.would {
            let by = would
                .policy
                .as_deref()
                .map(|p| format!(" by {p}"))
                .unwrap_or_default();
            text += &format!("; dry-run policies would {}{by}", would.action);
        }
        text
    }

    /// `Allow`, `Deny`, `L7`, `Hold`: the first column of a policy list.
    pub(crate) fn word(&self) -> &'static str {
        match self.action.as_str() {
            "allow" => "Allow",
            "hold" => "Hold",
            _ if !self.because.is_empty() => "L7",
            _ => "Deny",
        }
    }
}

impl From<&v1::Verdict> for Verdict {
    fn from(message: &v1::Verdict) -> Self {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let would = message.would_action.as_ref().map(|action| Would {
            action: action.clone(),
            policy: message.would_policy.as_deref().and_then(some),
            rule: message.would_rule,
        });
        Self {
            action: message.action.clone(),
            reason: message.reason.clone(),
            reason_number: message.reason_number,
            policy: some(&message.policy),
            rule: message.rule,
            because: message.because.clone(),
            residual: some(&message.residual),
            would,
            enforced_by: message.enforced_by.clone(),
        }
    }
}

impl From<&tables::Verdict> for Verdict {
    fn from(verdict: &tables::Verdict) -> Self {
        let policy = |rule: &Option<tables::RuleRef>| rule.as_ref().map(|r| r.policy.to_string());
        let index = |rule: &Option<tables::RuleRef>| rule.as_ref().and_then(|r| r.rule);
        Self {
            action: action(verdict.action).to_owned(),
            reason: verdict.reason.text().to_owned(),
            reason_number: verdict.reason.number().into(),
            policy: policy(&verdict.rule),
            rule: index(&verdict.rule),
            because: verdict
                .because
                .iter()
                .map(|(rule, field)| format!("{rule}: {field}"))
                .collect(),
            residual: verdict.residual.as_deref().map(str::to_owned),
            would: verdict.would.as_ref().map(|would| Would {
                action: action(would.action).to_owned(),
                policy: policy(&would.rule),
                rule: index(&would.rule),
            }),
            enforced_by: "kernel".to_owned(),
        }
    }
}

const fn action(action: Action) -> &'static str {
    match action {
        Action::Allow => "allow",
        Action::Deny | Action::Missing => "deny",
        Action::Hold => "hold",
        Action::Proxy => "proxy",
    }
}
