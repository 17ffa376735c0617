//! What is left of a verdict once the kernel has done its part: conditions on the request, for one destination,
//! port and kind of source.
//!
//! Invariant: a residual is canonical: equal questions have equal text and so one address, whatever rules, orders
//! and repetitions they came from. It is constant only behind a check of tokens; any other constant is a verdict of the
//! kernel.

mod matching;
mod way;
mod words;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use sha2::{Digest, Sha256};
use thyra_datapath_abi::tables::{RuleRef, Verdict};
use thyra_datapath_abi::{Action, Reason};

pub use self::way::{Inline, Way};
use crate::authorizer::Provider;
use crate::compile::Residuals;
use crate::policy::{Field, PolicyAction, StringMatch};
use crate::tokens::Tokens;
use crate::traffic::{PathNormalization, Traffic};
use crate::world::World;

/// A question to a request or a TLS ClientHello.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Test {
    /// `:authority`, case-insensitive.
    Host(Field<StringMatch>),
    /// `:method`.
    Method(Field<StringMatch>),
    /// The path without its query, normalised; templates as written.
    Path(Field<String>),
    /// `<iss>/<sub>`.
    RequestPrincipal(Field<StringMatch>),
    /// The client by X-Forwarded-For, from `remoteIpBlocks`.
    RemoteBlock(Field<IpNet>),
    /// The same, from a condition on `remote.ip`.
    RemoteIp(Field<IpNet>),
    /// Server name of the ClientHello.
    Sni(Field<StringMatch>),
    /// `request.headers[..]`, `request.auth.*`: the key as written.
    Key(Arc<str>, Field<StringMatch>),
}

/// What is left of a rule: one of `from`, one of `to` and all of `when`; an empty list is no constraint.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Conditions {
    /// Each: all of its tests.
    pub from: Vec<Vec<Test>>,
    /// Each: all of its tests.
    pub to: Vec<Vec<Test>>,
    /// All of them.
    pub when: Vec<Test>,
}

/// A rule of CUSTOM: whom it asks, of what.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ask<R> {
    /// The rule.
    pub rule: R,
    /// What it asks of.
    pub conditions: Arc<Conditions>,
    /// Who is asked.
    pub provider: Arc<Provider>,
}

/// What is left of the policies of a destination under one reading of the stream; `R` names a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rules<R> {
    /// Asked only where the verdict would be allow otherwise.
    pub custom: Vec<Ask<R>>,
    /// One that holds denies.
    pub deny: Vec<(R, Arc<Conditions>)>,
    /// One must hold, if `default_deny`.
    pub allow: Vec<(R, Arc<Conditions>)>,
    /// Some ALLOW policy applies.
    pub default_deny: bool,
    /// What the rules' policies want one verdict to be for.
    pub decides: Decides,
}

/// What a verdict is for, as the policies want it that have a say (`thyra.io/l7-verdict`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Decides {
    /// One request: no policy wants anything else.
    #[default]
    EachRequest,
    /// One request: not every policy wants the same.
    NotAllAlike,
    /// The connection whose first request it is: all policies want that.
    FirstRequest,
}

/// What a stream gets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Answer<R> {
    /// Whatever it says.
    Constant(Action, Reason, Option<R>),
    /// By what it says.
    Rules(Arc<Rules<R>>),
    /// The stricter of both: two Services disagree about the port.
    Stricter(Arc<Answer<R>>, Arc<Answer<R>>),
    /// The same, once the request's tokens have been checked: an invalid one is refused with 401, and `claims` of a
    /// `Request` are those of one that was taken. Of HTTP only.
    Authenticated(Arc<Tokens>, Arc<Answer<R>>),
}

/// A residual: one answer for HTTP, one for everything else.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Residual<R> {
    /// For an HTTP request.
    pub http: Answer<R>,
    /// For a stream that is not HTTP.
    pub other: Answer<R>,
}

/// The last word on a connection and its first request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ending<R> {
    /// Whether it passes; `Proxy` where an external authorizer has the last word.
    pub action: Action,
    /// Why.
    pub reason: Reason,
    /// The rule that decided; none where none did.
    pub rule: Option<R>,
}

/// A connection's side of a request.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The request and the ClientHello.
    pub traffic: &'a Traffic,
    /// The packet's source.
    pub source: IpAddr,
    /// The mesh's way with paths.
    pub paths: PathNormalization,
}

impl Test {
    /// How many values it has.
    #[must_use]
    pub fn count(&self) -> usize {
        match self {
            Self::Host(of)
            | Self::Method(of)
            | Self::RequestPrincipal(of)
            | Self::Sni(of)
            | Self::Key(_, of) => of.count(),
            Self::Path(of) => of.count(),
            Self::RemoteBlock(of) | Self::RemoteIp(of) => of.count(),
        }
    }

    /// As policies name it: `paths`, `notPaths`, `request.headers[x]`.
    #[must_use]
    pub fn names(&self) -> Vec<Arc<str>> {
        let both = |values: bool, not_values: bool, positive: &str, negative: &str| {
            let mut names: Vec<Arc<str>> = Vec::new();
            if values {
                names.push(positive.into());
            }
            if not_values {
                names.push(negative.into());
            }
            names
        };
        let of = |field: &Field<StringMatch>, positive: &str, negative: &str| {
            both(
                !field.values.is_empty(),
                !field.not_values.is_empty(),
                positive,
                negative,
            )
        };
        match self {
            Self::Host(field) => of(field, "hosts", "notHosts"),
            Self::Method(field) => of(field, "methods", "notMethods"),
            Self::Path(field) => both(
                !field.values.is_empty(),
                !field.not_values.is_empty(),
                "paths",
                "notPaths",
            ),
            Self::RequestPrincipal(field) => of(field, "requestPrincipals", "notRequestPrincipals"),
            Self::RemoteBlock(field) => both(
                !field.values.is_empty(),
                !field.not_values.is_empty(),
                "remoteIpBlocks",
                "notRemoteIpBlocks",
            ),
            Self::RemoteIp(_) => vec!["remote.ip".into()],
            Self::Sni(_) => vec!["connection.sni".into()],
            Self::Key(key, _) => vec![Arc::clone(key)],
        }
    }
}

impl Conditions {
    /// Sorted, without repetitions, without alternatives that another one implies; an alternative without tests
    /// makes its list no constraint.
    pub(crate) fn canonical(from: Vec<Vec<Test>>, to: Vec<Vec<Test>>, when: Vec<Test>) -> Self {
        Self {
            from: alternatives(from),
            to: alternatives(to),
            when: when.into_iter().collect::<BTreeSet<_>>().into_iter().collect(),
        }
    }
}

fn alternatives(list: Vec<Vec<Test>>) -> Vec<Vec<Test>> {
    let sets: BTreeSet<BTreeSet<Test>> = list
        .into_iter()
        .map(|tests| tests.into_iter().collect())
        .collect();
    if sets.contains(&BTreeSet::new()) {
        return Vec::new();
    }
    let implied = |set: &BTreeSet<Test>| sets.iter().any(|other| other != set && other.is_subset(set));
    let kept = sets.iter().filter(|set| !implied(set));
    kept.map(|set| set.iter().cloned().collect()).collect()
}

impl<R: Clone> Answer<R> {
    fn end(&self, context: &Context<'_>) -> Ending<R> {
        match self {
            Self::Constant(action, reason, rule) => Ending {
                action: *action,
                reason: *reason,
                rule: rule.clone(),
            },
            Self::Rules(rules) => rules.end(context),
            Self::Stricter(a, b) => {
                let (a, b) = (a.end(context), b.end(context));
                if rank(b.action) > rank(a.action) { b } else { a }
            }
            Self::Authenticated(tokens, answer) => {
                let traffic = tokens.seen_in(context.traffic);
                answer.end(&Context {
                    traffic: &traffic,
                    ..*context
                })
            }
        }
    }

    fn named<S: Clone>(&self, name: &impl Fn(&R) -> S) -> Answer<S> {
        match self {
            Self::Constant(action, reason, rule) => {
                Answer::Constant(*action, *reason, rule.as_ref().map(name))
            }
            Self::Rules(rules) => Answer::Rules(Arc::new(rules.named(name))),
            Self::Stricter(a, b) => Answer::Stricter(Arc::new(a.named(name)), Arc::new(b.named(name))),
            Self::Authenticated(tokens, answer) => {
                Answer::Authenticated(Arc::clone(tokens), Arc::new(answer.named(name)))
            }
        }
    }

    /// What is asked of tokens, where something is.
    #[must_use]
    pub fn tokens(&self) -> Option<&Arc<Tokens>> {
        match self {
            Self::Constant(..) | Self::Rules(_) => None,
            Self::Stricter(a, b) => a.tokens().or_else(|| b.tokens()),
            Self::Authenticated(tokens, _) => Some(tokens),
        }
    }
}

/// Allowed, held back, for an authorizer to say, refused.
fn rank(action: Action) -> u8 {
    match action {
        Action::Allow => 0,
        Action::Hold => 1,
        Action::Proxy => 2,
        Action::Deny | Action::Missing => 3,
    }
}

impl<R: Clone> Rules<R> {
    fn end(&self, context: &Context<'_>) -> Ending<R> {
        let first = |rules: &[(R, Arc<Conditions>)]| {
            let held = rules
                .iter()
                .find(|(_, conditions)| matching::hold(conditions, context));
            held.map(|(rule, _)| rule.clone())
        };
        let ending = |action, reason, rule| Ending { action, reason, rule };
        if let Some(rule) = first(&self.deny) {
            return ending(Action::Deny, Reason::PolicyDeny, Some(rule));
        }
        let allowed = first(&self.allow);
        if self.default_deny && allowed.is_none() {
            return ending(Action::Deny, Reason::Policy, None);
        }
        if let Some((action, reason, rule)) = self.authorized(context) {
            return ending(action, reason, Some(rule));
        }
        let reason = if self.default_deny {
            Reason::PolicyAllow
        } else {
            Reason::NoPolicy
        };
        ending(Action::Allow, reason, allowed)
    }

    /// What keeps an allowed request from passing: a provider that can't be asked, one that says no, one whose
    /// answer isn't known.
    fn authorized(&self, context: &Context<'_>) -> Option<(Action, Reason, R)> {
        let mut worst: Option<(u8, Action, Reason, R)> = None;
        for ask in &self.custom {
            if !matching::hold(&ask.conditions, context) {
                continue;
            }
            let answer = context.traffic.answers.get(&*ask.provider.name);
            let (rank, action, reason) = match (&ask.provider.authorizer, answer) {
                (Err(_), _) => (3, Action::Deny, Reason::NoAuthorizer),
                (Ok(_), Some(false)) => (2, Action::Deny, Reason::Unauthorized),
                (Ok(_), None) => (1, Action::Proxy, Reason::NeedsCustom),
                (Ok(_), Some(true)) => continue,
            };
            if worst.as_ref().is_none_or(|known| rank > known.0) {
                worst = Some((rank, action, reason, ask.rule.clone()));
            }
        }
        worst.map(|(_, action, reason, rule)| (action, reason, rule))
    }

    fn named<S>(&self, name: &impl Fn(&R) -> S) -> Rules<S> {
        let all = |rules: &[(R, Arc<Conditions>)]| {
            let named = rules
                .iter()
                .map(|(rule, conditions)| (name(rule), Arc::clone(conditions)));
            named.collect()
        };
        let asks = self.custom.iter().map(|ask| Ask {
            rule: name(&ask.rule),
            conditions: Arc::clone(&ask.conditions),
            provider: Arc::clone(&ask.provider),
        });
        Rules {
            custom: asks.collect(),
            deny: all(&self.deny),
            allow: all(&self.allow),
            default_deny: self.default_deny,
            decides: self.decides,
        }
    }
}

impl<R: Clone> Residual<R> {
    /// The last word on a connection whose first bytes are known.
    #[must_use]
    pub fn end(&self, context: &Context<'_>) -> Ending<R> {
        if context.traffic.http.is_some() {
            self.http.end(context)
        } else {
            self.other.end(context)
        }
    }

    pub(crate) fn named<S: Clone>(&self, name: &impl Fn(&R) -> S) -> Residual<S> {
        Residual {
            http: self.http.named(name),
            other: self.other.named(name),
        }
    }
}

impl Residual<RuleRef> {
    /// Its address: the first 128 bits of SHA-256 over its text, as hex digits. Equal residuals share it.
    #[must_use]
    pub fn address(&self) -> Arc<str> {
        let digest = Sha256::digest(format!("{self:?}"));
        let hex: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        hex.into()
    }
}

/// The last word where the kernel's cell is `verdict`: its own, or that of the residual that it names.
/// `declares_http`: a Service says that the port is HTTP, so other bytes are refused. None when the residual that
/// the verdict names is not there.
#[must_use]
pub fn end(
    world: &World,
    verdict: &Verdict,
    residuals: &Residuals,
    declares_http: bool,
    context: &Context<'_>,
) -> Option<Ending<RuleRef>> {
    let judged = matches!(verdict.reason, Reason::PolicyAllow | Reason::NoPolicy);
    let ending = match &verdict.residual {
        Some(address) => residuals.get(address)?.end(context),
        None if judged && declares_http && context.traffic.http.is_none() => Ending {
            action: Action::Deny,
            reason: Reason::NotHttp,
            rule: None,
        },
        None => Ending {
            action: verdict.action,
            reason: verdict.reason,
            rule: verdict.rule.clone(),
        },
    };
    // A rule of ALLOW that is named for want of terms that could be expressed decided nothing.
    let unmatched = |rule: &RuleRef| {
        let policy = world.authorization.get(&rule.policy);
        ending.reason == Reason::NotExpressible && policy.is_some_and(|p| p.action == PolicyAction::Allow)
    };
    Some(Ending {
        rule: ending.rule.clone().filter(|rule| !unmatched(rule)),
        ..ending
    })
}

/// The same last word with the cause that `Compiler::naming` gives it: of the rules that hold the first one. Not
/// for a source whose identity is awaited, which is judged as two, nor where two Services disagree about the port.
#[must_use]
pub fn named(ending: Ending<RuleRef>, by: Option<Ending<RuleRef>>) -> Ending<RuleRef> {
    // Where a proxy of the pod's own, an awaited identity or other bytes than HTTP come in, the naming tables
    // leave more open than there is.
    match by {
        Some(by)
            if by.action == ending.action && !matches!(by.reason, Reason::NotEnforced | Reason::NotHttp) =>
        {
            by
        }
        _ => ending,
    }
}
