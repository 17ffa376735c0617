//! CUSTOM: whom the rules that match ask, and what is known of the answers.
//!
//! Invariant: who can't be asked says no, and so does one who said no; only an answer that isn't known is asked for.

use std::sync::Arc;

use thyra_datapath_abi::Reason;
use thyra_datapath_abi::tables::RuleRef;

use super::rule::{Facts, Reading, Truth};
use super::{Ask, Court, Named, Party, ask};
use crate::authorizer::Check;

/// What the CUSTOM rules have come to.
#[derive(Default)]
pub(super) struct Custom {
    /// A rule that matches and asks nobody.
    mute: Option<RuleRef>,
    /// A rule that matches and whose authorizer said no.
    refused: Option<RuleRef>,
    /// What is still to be asked, of others or of the request.
    pub(super) asks: Vec<Ask>,
}

impl Custom {
    /// A rule and whether it matches.
    pub(super) fn hear(
        &mut self,
        court: &Court<'_>,
        party: &Party<'_>,
        rule: &Named<'_>,
        truth: &Truth,
        facts: &Facts<'_>,
    ) {
        let name = party
            .body
            .and_then(|policy| policy.provider.clone())
            .unwrap_or_default();
        let why = cannot_be_asked(court, &name, facts.reading);
        let answer = facts.traffic.and_then(|traffic| traffic.answers.get(&name));
        let first = |place: &mut Option<RuleRef>| {
            place.get_or_insert_with(|| rule.reference.clone());
        };
        match (truth, &why, answer) {
            (Truth::No(_), _, _) | (Truth::Yes, None, Some(true)) => {}
            (Truth::Yes, Some(_), _) => first(&mut self.mute),
            (Truth::Yes, None, Some(false)) => first(&mut self.refused),
            (Truth::Yes, None, None) | (Truth::Ask(_), _, _) => {
                let field = match why {
                    None => format!("provider {name}"),
                    Some(why) => format!("provider {name} ({why})"),
                };
                self.asks.push(ask(party, rule, field.into()));
            }
        }
    }

    /// Why what is allowed otherwise is denied, and by which rule.
    pub(super) fn refusal(&self) -> Option<(Reason, RuleRef)> {
        let mute = self.mute.clone().map(|rule| (Reason::NoAuthorizer, rule));
        mute.or_else(|| self.refused.clone().map(|rule| (Reason::Unauthorized, rule)))
    }
}

/// Why the provider gives no answer about such a stream; none if it does.
fn cannot_be_asked(court: &Court<'_>, name: &str, reading: Reading) -> Option<Arc<str>> {
    let Some(provider) = court.world.mesh.extension_providers.get(name) else {
        return Some("not in the mesh config".into());
    };
    match &provider.authorizer {
        Err(why) => Some(Arc::clone(why)),
        Ok(authorizer) if reading == Reading::Tcp && matches!(authorizer.check, Check::Http(_)) => {
            Some("it can be asked of HTTP requests only".into())
        }
        Ok(_) => None,
    }
}
