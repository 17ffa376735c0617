//! The oracle: judges one connection on a world by the book, rule by rule; slow, and meant to be obviously
//! right.
//!
//! Invariant: nothing here is shared with the compiler but the parsed types, so that a mistake in one shows
//! as a difference.

mod bytes;
mod custom;
mod destination;
mod request;
mod rule;
mod source;
mod trace;

use std::net::IpAddr;
use std::sync::Arc;

use thyra_datapath_abi::tables::{PolicyRef, RuleRef, Verdict, Would};
use thyra_datapath_abi::{Action, Mode, Reason};

use self::custom::Custom;
use self::destination::{Demand, applies, demand, is_own_proxy, mode, request_authentications};
use self::rule::{Facts, Truth};
pub use self::trace::Looked;
use self::trace::note;
use crate::policy::{AuthorizationPolicy, PolicyAction, Rule};
use crate::residual::Ending;
use crate::tokens::JwtRule;
use crate::traffic::Traffic;
use crate::world::{Bootstrap, Endpoint, World};

/// A connection to a pod of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The packet's source.
    pub source: IpAddr,
    /// The pod.
    pub destination_endpoint: u16,
    /// The address of the pod that it is sent to.
    pub destination: IpAddr,
    /// The pod's port.
    pub port: u16,
}

/// The oracle's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// The verdict.
    pub verdict: Verdict,
    /// Every policy and rule that was looked at, in order.
    pub trace: Vec<Looked>,
}

/// A rule and the L7 field that it waits for; `tried` when its policy is dry-run.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ask {
    rule: RuleRef,
    field: Arc<str>,
    tried: bool,
}

/// A verdict before dry-run policies are compared.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ruling {
    action: Action,
    reason: Reason,
    rule: Option<RuleRef>,
    asks: Vec<Ask>,
}

impl Ruling {
    fn new(action: Action, reason: Reason, rule: Option<RuleRef>) -> Self {
        Self {
            action,
            reason,
            rule,
            asks: Vec::new(),
        }
    }

    /// 0 allowed, 1 held back, 2 for L7 or an authorizer to say, 3 denied.
    fn rank(&self) -> u8 {
        match (self.action, self.reason) {
            (Action::Allow, _) => 0,
            (Action::Hold, _) => 1,
            (_, Reason::NeedsL7 | Reason::NeedsCustom) => 2,
            _ => 3,
        }
    }
}

/// Judges `connection`.
#[must_use]
pub fn judge(world: &World, connection: &Connection) -> Judgement {
    let mut trace = Vec::new();
    let Some(endpoint) = world.endpoints.get(&connection.destination_endpoint) else {
        return plain(Action::Deny, Reason::EndpointUnknown, trace);
    };
    if mode(world, endpoint) == Mode::Off {
        return plain(Action::Allow, Reason::NotEnforced, trace);
    }
    if !world.synced {
        return match world.node.bootstrap {
            Bootstrap::Deny => plain(Action::Deny, Reason::Bootstrap, trace),
            Bootstrap::Allow => plain(Action::Allow, Reason::BootstrapAllow, trace),
        };
    }
    if is_own_proxy(endpoint) && destination::exempt(endpoint, connection.port) {
        return plain(Action::Allow, Reason::ExemptPort, trace);
    }
    let court = Court {
        world,
        endpoint,
        connection,
        traffic: None,
    };
    let real = court.rule(false, &mut trace);
    let tried = court.rule(true, &mut Vec::new());
    let would = (real.rank() != tried.rank()).then(|| Would {
        action: tried.action,
        reason: tried.reason,
        rule: tried
            .asks
            .iter()
            .find(|ask| ask.tried)
            .map(|ask| ask.rule.clone())
            .or(tried.rule),
    });
    Judgement {
        verdict: Verdict {
            action: real.action,
            reason: real.reason,
            rule: real.rule,
            because: real.asks.into_iter().map(|ask| (ask.rule, ask.field)).collect(),
            residual: None,
            would,
        },
        trace,
    }
}

fn plain(action: Action, reason: Reason, trace: Vec<Looked>) -> Judgement {
    Judgement {
        verdict: Verdict {
            action,
            reason,
            rule: None,
            because: Vec::new(),
            residual: None,
            would: None,
        },
        trace,
    }
}

/// Judges `connection` and the first bytes on it, for good; `trace` says what was looked at.
#[must_use]
pub fn judge_traffic(
    world: &World,
    connection: &Connection,
    traffic: &Traffic,
    trace: &mut Vec<Looked>,
) -> Ending<RuleRef> {
    last_word(world, connection, traffic, false, trace)
}

/// What would become of it with the dry-run policies in force.
#[must_use]
pub fn would(world: &World, connection: &Connection, traffic: &Traffic) -> Ending<RuleRef> {
    last_word(world, connection, traffic, true, &mut Vec::new())
}

fn last_word(
    world: &World,
    connection: &Connection,
    traffic: &Traffic,
    dry: bool,
    trace: &mut Vec<Looked>,
) -> Ending<RuleRef> {
    let kernel = judge(world, connection);
    let Some(endpoint) = world.endpoints.get(&connection.destination_endpoint) else {
        return ending(world, kernel.verdict.action, kernel.verdict.reason, None);
    };
    let judged = mode(world, endpoint) != Mode::Off && world.synced;
    if !judged || kernel.verdict.reason == Reason::ExemptPort {
        return ending(world, kernel.verdict.action, kernel.verdict.reason, None);
    }
    let asked = request_authentications(world, endpoint);
    let rules: Vec<&JwtRule> = asked.iter().flat_map(|asked| &asked.rules).collect();
    let traffic = request::with_lists(&rules, traffic);
    let court = Court {
        world,
        endpoint,
        connection,
        traffic: Some(&traffic),
    };
    let mut ruling = court.rule(dry, trace);
    if ruling.reason == Reason::NotHttp {
        // What is refused or held back without a byte never gets as far as the first one.
        let before = Court {
            traffic: None,
            ..court
        }
        .rule(dry, &mut Vec::new());
        if matches!(before.rank(), 1 | 3) {
            ruling = before;
        }
    }
    if ruling.reason == Reason::NeedsCustom {
        let rule = ruling.asks.into_iter().next().map(|ask| ask.rule);
        return ending(world, Action::Proxy, ruling.reason, rule);
    }
    ending(world, ruling.action, ruling.reason, ruling.rule)
}

/// A rule that is named for want of terms that could be expressed decided nothing if it is one of ALLOW.
fn ending(world: &World, action: Action, reason: Reason, rule: Option<RuleRef>) -> Ending<RuleRef> {
    let allows = |rule: &RuleRef| {
        let policy = world.authorization.get(&rule.policy);
        policy.is_some_and(|policy| policy.action == PolicyAction::Allow)
    };
    let unmatched = reason == Reason::NotExpressible && rule.as_ref().is_some_and(allows);
    Ending {
        action,
        reason,
        rule: rule.filter(|_| !unmatched),
    }
}

/// Where one connection is judged.
struct Court<'a> {
    world: &'a World,
    endpoint: &'a Endpoint,
    connection: &'a Connection,
    /// The first bytes; without them their part of the verdict is left open.
    traffic: Option<&'a Traffic>,
}

/// A policy before the court; without a body it could not be read.
struct Party<'a> {
    reference: &'a PolicyRef,
    body: Option<&'a AuthorizationPolicy>,
}

impl Court<'_> {
    /// Istio's order: mTLS, then CUSTOM, DENY, ALLOW; CUSTOM counts only where its answer could change
    /// something.
    fn order(&self, facts: &Facts<'_>, dry: bool, trace: &mut Vec<Looked>) -> Ruling {
        if facts.who.may_be_nobody()
            && let Some(demand) = demand(self.world, self.endpoint, facts.port)
        {
            return refuse_unknown(demand);
        }
        let parties = self.parties(dry, trace);
        let (mut custom, mut deny_asks) = (Custom::default(), Vec::new());
        let mut denied = None;
        for (party, action) in &parties {
            if *action == PolicyAction::Allow {
                continue;
            }
            for rule in rules(party) {
                // What can't be expressed counts as matched.
                let truth = truth(party, &rule, facts, true);
                note(trace, &rule, &truth);
                if *action == PolicyAction::Custom {
                    custom.hear(self, party, &rule, &truth, facts);
                    continue;
                }
                match truth {
                    Truth::No(_) => {}
                    Truth::Ask(fields) => {
                        deny_asks.extend(fields.into_iter().map(|field| ask(party, &rule, field)));
                    }
                    Truth::Yes if denied.is_none() => {
                        let sure = self::truth(party, &rule, facts, false) == Truth::Yes;
                        let reason = if sure {
                            Reason::PolicyDeny
                        } else {
                            Reason::NotExpressible
                        };
                        denied = Some(Ruling::new(Action::Deny, reason, Some(rule.reference.clone())));
                    }
                    Truth::Yes => {}
                }
            }
        }
        if let Some(denied) = denied {
            return denied;
        }
        let (mut ruling, allow_asks) = allow(&parties, facts, trace);
        if ruling.rank() == 3 {
            return ruling;
        }
        if let Some((reason, rule)) = custom.refusal() {
            return Ruling::new(Action::Deny, reason, Some(rule));
        }
        let reason = if !custom.asks.is_empty() {
            Reason::NeedsCustom
        } else if !deny_asks.is_empty() || !allow_asks.is_empty() {
            Reason::NeedsL7
        } else {
            return ruling;
        };
        ruling = Ruling::new(Action::Deny, reason, None);
        for ask in custom.asks.into_iter().chain(deny_asks).chain(allow_asks) {
            if !ruling.asks.contains(&ask) {
                ruling.asks.push(ask);
            }
        }
        ruling
    }

    /// The policies that apply, root namespace first, then by name.
    fn parties(&self, dry: bool, trace: &mut Vec<Looked>) -> Vec<(Party<'_>, PolicyAction)> {
        let mut parties = Vec::new();
        for reference in self.world.unreadable.keys() {
            if destination::in_scope(self.world, self.endpoint, &reference.namespace) {
                parties.push((
                    Party {
                        reference,
                        body: None,
                    },
                    PolicyAction::Deny,
                ));
            }
        }
        for policy in self.world.authorization.values() {
            let passed = if !applies(self.world, self.endpoint, policy) {
                Some("another namespace, other labels, or a targetRef")
            } else if policy.action == PolicyAction::Audit {
                Some("AUDIT never changes a verdict")
            } else if policy.dry_run && !dry {
                Some("dry-run")
            } else {
                None
            };
            match passed {
                Some(why) => trace.push(Looked {
                    policy: policy.reference.clone(),
                    rule: None,
                    outcome: "does not apply",
                    clause: why.to_owned(),
                }),
                None => parties.push((
                    Party {
                        reference: &policy.reference,
                        body: Some(policy),
                    },
                    policy.action,
                )),
            }
        }
        let root = self.world.mesh.root_namespace.as_str();
        parties.sort_by_key(|(party, _)| {
            let PolicyRef { namespace, name } = party.reference;
            (&**namespace != root, namespace, name, party.body.is_some())
        });
        parties
    }
}

fn refuse_unknown(demand: Demand) -> Ruling {
    let reason = if demand.readable {
        Reason::StrictMtls
    } else {
        Reason::NotExpressible
    };
    let rule = RuleRef {
        policy: demand.policy,
        rule: None,
    };
    Ruling::new(Action::Deny, reason, Some(rule))
}

/// What the ALLOW policies say; with what they ask of L7 where no rule matches for sure.
fn allow(
    parties: &[(Party<'_>, PolicyAction)],
    facts: &Facts<'_>,
    trace: &mut Vec<Looked>,
) -> (Ruling, Vec<Ask>) {
    let mut asks = Vec::new();
    let mut inexpressible = None;
    let mut any = false;
    for (party, _) in parties
        .iter()
        .filter(|(_, action)| *action == PolicyAction::Allow)
    {
        any = true;
        for rule in rules(party) {
            // What can't be expressed counts as not matched.
            let truth = truth(party, &rule, facts, false);
            note(trace, &rule, &truth);
            match truth {
                Truth::Yes => {
                    let rule = Some(rule.reference);
                    return (Ruling::new(Action::Allow, Reason::PolicyAllow, rule), Vec::new());
                }
                Truth::Ask(fields) => asks.extend(fields.into_iter().map(|field| ask(party, &rule, field))),
                Truth::No(_) => {
                    let otherwise = self::truth(party, &rule, facts, true);
                    if inexpressible.is_none() && !matches!(otherwise, Truth::No(_)) {
                        inexpressible = Some(rule.reference);
                    }
                }
            }
        }
    }
    if !any {
        return (Ruling::new(Action::Allow, Reason::NoPolicy, None), Vec::new());
    }
    if !asks.is_empty() {
        // Not the last word: the caller turns the questions into one.
        return (Ruling::new(Action::Allow, Reason::PolicyAllow, None), asks);
    }
    let ruling = match inexpressible {
        Some(rule) => Ruling::new(Action::Deny, Reason::NotExpressible, Some(rule)),
        None => Ruling::new(Action::Deny, Reason::Policy, None),
    };
    (ruling, Vec::new())
}

/// A rule with its name; a policy that can't be read at all, or whose rules can't, has one without a body.
struct Named<'a> {
    reference: RuleRef,
    body: Option<&'a Rule>,
}

fn rules<'a>(party: &Party<'a>) -> Vec<Named<'a>> {
    let named = |rule, body| Named {
        reference: RuleRef {
            policy: party.reference.clone(),
            rule,
        },
        body,
    };
    match party.body {
        None => vec![named(None, None)],
        Some(policy) if policy.rules.is_empty() && !policy.unknown.is_empty() => vec![named(None, None)],
        Some(policy) => policy
            .rules
            .iter()
            .enumerate()
            .map(|(index, rule)| named(u32::try_from(index).ok(), Some(rule)))
            .collect(),
    }
}

/// Does the rule match, if terms that can't be expressed count as `unknown`?
fn truth(party: &Party<'_>, rule: &Named<'_>, facts: &Facts<'_>, unknown: bool) -> Truth {
    let unreadable = || {
        if unknown {
            Truth::Yes
        } else {
            Truth::No("not expressible".to_owned())
        }
    };
    let (Some(policy), Some(body)) = (party.body, rule.body) else {
        return unreadable();
    };
    let action = policy.action;
    if let Some(never) = rule::never_in_tcp(body, action, facts.reading) {
        return never;
    }
    if !policy.unknown.is_empty() {
        return unreadable();
    }
    rule::matches(body, action, facts, unknown)
}

fn ask(party: &Party<'_>, rule: &Named<'_>, field: Arc<str>) -> Ask {
    Ask {
        rule: rule.reference.clone(),
        field,
        tried: party.body.is_some_and(|policy| policy.dry_run),
    }
}
