//! A residual to Envoy's RBAC: the conditions of its rules, exactly or not at all.
//!
//! Invariant: a chain answers what `Residual::end` answers for every request, and its filters stand in the order
//! in which a sidecar has them: tokens, CUSTOM, DENY, ALLOW. What Envoy can't express is an error that names the rule
//! and the field, before anything is sent. How Istio lowers the same fields: `pilot/pkg/security/authz/model`
//! (model.go, generator.go) and `authz/matcher`, istio at 86c9f01.

mod claim;
pub(crate) mod custom;
mod matcher;
mod permission;
mod principal;
mod tokens;
mod tree;

use std::collections::HashMap;
use std::sync::Arc;

use envoy_types::pb::envoy::config::rbac::v3::{Permission, Policy, Principal, Rbac, rbac};
use serde::{Deserialize, Serialize};
use thyra_datapath_abi::tables::RuleRef;
use thyra_datapath_abi::{Action, Reason};
use thyra_policy_compiler::residual::{Answer, Ask, Conditions, Residual, Rules, Test};
use thyra_policy_compiler::tokens::{JWT_RULES, Tokens};

pub use self::custom::{Asks, Places};
use self::permission::permission;
use self::principal::principal;
pub use self::tokens::{KeySets, tokens};
use self::tree::Tree;

/// Most values in all rules of one residual; Envoy tries them one after the other for every request.
pub const MAX_VALUES: usize = 10_000;
/// Most filters of one chain: each pair of Services that disagree about a port doubles it.
pub const MAX_STEPS: usize = 16;
/// Most providers that one pod's rules ask; each adds two filters.
pub const MAX_PROVIDERS: usize = 16;
/// Most rules that ask about the tokens of one pod; Envoy tries each of them for every request.
pub const MAX_JWT_RULES: usize = 64;
/// Longest template, with `*` for `{*}` (`uri_template_match.proto`).
const MAX_TEMPLATE: usize = 256;
/// What every address of IPv4 has in front when it is written as one of IPv6.
const MAPPED_BITS: u8 = 96;

/// What a filter does: with a rule that holds, or before all rules with tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum StepKind {
    /// Refuses invalid tokens, and leaves the claims of valid ones to those after it.
    Tokens,
    /// Asks an authorizer of what a rule matches: two filters.
    Ask,
    /// Refuses what a rule matches.
    Deny,
    /// Refuses what no rule matches.
    Allow,
}

/// One RBAC filter.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// What it does.
    pub kind: StepKind,
    /// None lets everything pass.
    pub rules: Option<Rbac>,
}

/// Filters in order; a request passes if it passes all of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chain {
    /// What is asked of tokens, before all else.
    pub tokens: Option<Arc<Tokens>>,
    /// Whom it asks next, and of what.
    pub asks: Vec<Asks>,
    /// In the order in which they ask.
    pub steps: Vec<Step>,
}

/// Kinds of a chain's filters, and the providers that they ask.
pub type Guards = (Vec<StepKind>, Vec<Arc<str>>);

/// What Envoy can't be told.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}`{field}` can't be given to Envoy: {why}", in_front(.rule.as_ref()))]
pub struct NotExpressible {
    /// The rule, where one is to blame.
    pub rule: Option<RuleRef>,
    /// The field as policies name it.
    pub field: Arc<str>,
    /// Why not.
    pub why: Why,
}

/// Why a field has no form in Envoy's configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Why {
    /// That a provider is to be asked is said by the rules that ask it.
    #[error("it asks an authorizer that no rule names")]
    Custom,
    /// A source whose identity is awaited is held in the kernel, before there is a request.
    #[error("a source whose identity is awaited is held back in the kernel")]
    Hold,
    /// A test stands where policies have none of its kind.
    #[error("it stands where policies have no such field")]
    Misplaced,
    /// Wildcards inside of a value: only namespaces have them, which no residual asks for.
    #[error("`{0}` has wildcards inside")]
    Glob(String),
    /// No such key, or one with an empty name.
    #[error("the key is not known")]
    Key,
    /// A template that istiod takes and that Envoy 1.40 doesn't refuse but dies of (`std::terminate` while it reads
    /// the configuration): it never sees one.
    #[error(
        "`{0}` is no template for Envoy: it needs a leading `/`, no empty segment and at most {MAX_TEMPLATE} bytes"
    )]
    Template(String),
    /// A header's name that Envoy refuses.
    #[error("`{0}` is no header's name")]
    HeaderName(String),
    /// Too much of something.
    #[error("{count} {what} are too many, the limit is {limit}")]
    TooMany {
        /// What.
        what: &'static str,
        /// How many.
        count: usize,
        /// How many fit.
        limit: usize,
    },
}

/// The rule, as a sentence about it begins.
fn in_front(rule: Option<&RuleRef>) -> String {
    rule.map_or_else(String::new, |rule| format!("rule `{rule}`: "))
}

impl Why {
    fn of(self, rule: Option<&RuleRef>, field: &str) -> NotExpressible {
        NotExpressible {
            rule: rule.cloned(),
            field: field.into(),
            why: self,
        }
    }
}

impl Chain {
    /// The kinds of its filters: two chains of one shape can take each other's place in a running listener.
    #[must_use]
    pub fn shape(&self) -> Vec<StepKind> {
        let tokens = self.tokens.iter().map(|_| StepKind::Tokens);
        let asks = self.asks.iter().map(|_| StepKind::Ask);
        let steps = self.steps.iter().map(|step| step.kind);
        tokens.chain(asks).chain(steps).collect()
    }

    /// What a listener must be made anew for, and get another port, so that no connection of before goes on without
    /// one of its filters: their kinds, and whom they ask.
    #[must_use]
    pub fn guards(&self) -> Guards {
        let asked = self.asks.iter().map(|asks| Arc::clone(&asks.name));
        (self.shape(), asked.collect())
    }
}

/// What an HTTP request gets.
///
/// # Errors
/// What Envoy can't express.
pub fn http(residual: &Residual<RuleRef>) -> Result<Chain, NotExpressible> {
    chain(&residual.http)
}

/// What a stream that is not HTTP gets; of such a stream only the server name of its ClientHello can be asked.
///
/// # Errors
/// What Envoy can't express.
pub fn stream(residual: &Residual<RuleRef>) -> Result<Chain, NotExpressible> {
    chain(&residual.other)
}

/// Whether an answer asks for bytes at all.
#[must_use]
pub fn asks<R>(answer: &Answer<R>) -> bool {
    match answer {
        Answer::Constant(..) => false,
        Answer::Rules(_) => true,
        Answer::Stricter(a, b) => asks(a) || asks(b),
        Answer::Authenticated(..) => true,
    }
}

/// The rule that a policy of an RBAC filter stands for: `00002:shop/read#0` → `shop/read#0`.
#[must_use]
pub fn rule_of(policy: &str) -> Option<&str> {
    let (number, rule) = policy.split_once(':')?;
    number.parse::<usize>().ok().map(|_| rule)
}

fn chain(answer: &Answer<RuleRef>) -> Result<Chain, NotExpressible> {
    let mut chain = Chain::default();
    append(answer, &mut chain)?;
    let mut asking = Vec::new();
    collect(answer, &mut asking);
    let (asks, mute) = custom::sorted(asking.into_iter())?;
    chain.asks = asks;
    // Behind all other rules, which are named before it.
    if !mute.is_empty() {
        chain.steps.push(Step {
            kind: StepKind::Deny,
            rules: Some(rbac(rbac::Action::Deny, &mute)?),
        });
    }
    if chain.asks.len() > MAX_PROVIDERS {
        let why = Why::TooMany {
            what: "providers",
            count: chain.asks.len(),
            limit: MAX_PROVIDERS,
        };
        return Err(why.of(None, "provider"));
    }
    let tokens = chain.tokens.as_ref();
    if let Some(tokens) = tokens.filter(|tokens| tokens.rules.len() > MAX_JWT_RULES) {
        let why = Why::TooMany {
            what: "jwtRules",
            count: tokens.rules.len(),
            limit: MAX_JWT_RULES,
        };
        return Err(why.of(tokens.because().next().map(|(rule, _)| rule).as_ref(), JWT_RULES));
    }
    if chain.steps.len() > MAX_STEPS {
        let why = Why::TooMany {
            what: "filters",
            count: chain.steps.len(),
            limit: MAX_STEPS,
        };
        return Err(why.of(None, "services"));
    }
    Ok(chain)
}

/// All that asks a provider.
fn collect<'a>(answer: &'a Answer<RuleRef>, asking: &mut Vec<&'a Ask<RuleRef>>) {
    match answer {
        Answer::Constant(..) => {}
        Answer::Rules(rules) => asking.extend(&rules.custom),
        Answer::Stricter(a, b) => {
            collect(a, asking);
            collect(b, asking);
        }
        Answer::Authenticated(_, then) => collect(then, asking),
    }
}

fn append(answer: &Answer<RuleRef>, chain: &mut Chain) -> Result<(), NotExpressible> {
    match answer {
        Answer::Constant(action, reason, rule) => {
            if let Some(step) = constant(*action, *reason, rule.as_ref())? {
                chain.steps.push(step);
            }
        }
        Answer::Rules(of) => chain.steps.extend(rules(of)?),
        // Who passes both passes the stricter one; the first one that refuses names its rule.
        Answer::Stricter(a, b) => {
            append(a, chain)?;
            append(b, chain)?;
        }
        // A pod's tokens are asked for once, whichever reading asks.
        Answer::Authenticated(tokens, then) => {
            chain.tokens = Some(Arc::clone(tokens));
            append(then, chain)?;
        }
    }
    Ok(())
}

fn constant(action: Action, reason: Reason, rule: Option<&RuleRef>) -> Result<Option<Step>, NotExpressible> {
    match action {
        Action::Allow => Ok(None),
        Action::Hold => Err(Why::Hold.of(rule, "source")),
        Action::Proxy => Err(Why::Custom.of(rule, "action: CUSTOM")),
        Action::Deny | Action::Missing => Ok(Some(match rule {
            Some(rule) if matches!(reason, Reason::PolicyDeny | Reason::NoAuthorizer) => {
                let always = (rule.clone(), Arc::new(Conditions::default()));
                Step {
                    kind: StepKind::Deny,
                    rules: Some(rbac(rbac::Action::Deny, &[always])?),
                }
            }
            _ => Step {
                kind: StepKind::Allow,
                rules: Some(rbac(rbac::Action::Allow, &[])?),
            },
        })),
    }
}

/// Always both filters, so that rules that come and go leave the listener as it is.
fn rules(rules: &Rules<RuleRef>) -> Result<[Step; 2], NotExpressible> {
    let Rules {
        custom,
        deny,
        allow,
        default_deny,
        // Whatever it is for, it is one verdict.
        decides: _,
    } = rules;
    let of_custom = custom.iter().map(|ask| values(&ask.conditions));
    let count: usize = deny
        .iter()
        .chain(allow)
        .map(|(_, c)| values(c))
        .chain(of_custom)
        .sum();
    if count > MAX_VALUES {
        let why = Why::TooMany {
            what: "values",
            count,
            limit: MAX_VALUES,
        };
        let rule = deny.iter().chain(allow).max_by_key(|(_, c)| values(c));
        return Err(why.of(rule.map(|(rule, _)| rule), "rules"));
    }
    let allowing = default_deny
        .then(|| rbac(rbac::Action::Allow, allow))
        .transpose()?;
    Ok([
        Step {
            kind: StepKind::Deny,
            rules: Some(rbac(rbac::Action::Deny, deny)?),
        },
        Step {
            kind: StepKind::Allow,
            rules: allowing,
        },
    ])
}

fn values(conditions: &Conditions) -> usize {
    let lists = conditions.from.iter().chain(&conditions.to);
    lists.flatten().chain(&conditions.when).map(Test::count).sum()
}

/// Envoy tries policies in the order of their names (`rbac.proto`), so a number leads: the first rule that holds
/// is the one that is named, here as on the host.
fn rbac(action: rbac::Action, rules: &[(RuleRef, Arc<Conditions>)]) -> Result<Rbac, NotExpressible> {
    let mut policies = HashMap::new();
    for (number, (rule, conditions)) in rules.iter().enumerate() {
        policies.insert(format!("{number:05}:{rule}"), policy(rule, conditions)?);
    }
    Ok(Rbac {
        action: action.into(),
        policies,
        ..Rbac::default()
    })
}

/// `to` and the server name are permissions, `from` and all else principals, as in Istio.
fn policy(rule: &RuleRef, conditions: &Conditions) -> Result<Policy, NotExpressible> {
    let mut what = Vec::new();
    if !conditions.to.is_empty() {
        what.push(one_of(rule, &conditions.to, permission)?);
    }
    let mut who = Vec::new();
    if !conditions.from.is_empty() {
        who.push(one_of(rule, &conditions.from, principal)?);
    }
    for test in &conditions.when {
        if matches!(test, Test::Sni(_)) {
            what.extend(lowered(rule, test, permission)?);
        } else {
            who.extend(lowered(rule, test, principal)?);
        }
    }
    Ok(Policy {
        permissions: vec![Permission::from(Tree::All(what))],
        principals: vec![Principal::from(Tree::All(who))],
        ..Policy::default()
    })
}

type Lower<L> = fn(&Test) -> Result<Vec<Tree<L>>, Why>;

fn one_of<L>(rule: &RuleRef, list: &[Vec<Test>], lower: Lower<L>) -> Result<Tree<L>, NotExpressible> {
    let mut alternatives = Vec::with_capacity(list.len());
    for tests in list {
        let mut all = Vec::with_capacity(tests.len());
        for test in tests {
            all.extend(lowered(rule, test, lower)?);
        }
        alternatives.push(Tree::All(all));
    }
    Ok(Tree::One(alternatives))
}

fn lowered<L>(rule: &RuleRef, test: &Test, lower: Lower<L>) -> Result<Vec<Tree<L>>, NotExpressible> {
    lower(test).map_err(|why| {
        let names = test.names();
        why.of(Some(rule), names.first().map_or("rule", |name| name))
    })
}
