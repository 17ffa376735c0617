//! Policy sets: the rows of one kind of destination, one for every port that something names and one for the
//! rest.
//!
//! Invariant: equal causes are worked out once: a rule at a port, a row of rules, a set of rows.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use super::block::Blocks;
use super::prepared::PreparedPolicy;
use super::protocol::{Declared, Protocols};
use super::row::{Docket, Entry, Outcome, RuleId, judge, settle};
use super::rule::{Judged, Read, Reading};
use super::scope::{Demand, Strict};
use super::slot::{Side, Slots};
use crate::authorizer::Provider;
use crate::tokens::Tokens;

/// Everything that a policy set depends on; destinations with equal profiles share it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Profile {
    /// Every port and source alike: not enrolled, or nothing was synced yet.
    Constant(Outcome),
    Judged {
        policies: Vec<usize>,
        strict: Strict,
        own_proxy: bool,
        tokens: Option<Arc<Tokens>>,
        exempt: BTreeSet<u16>,
        protocols: Protocols,
        /// Set only where a policy asks for it.
        destination: Option<IpAddr>,
    },
}

/// An outcome, and the one that dry-run policies would have made of it where that ends otherwise.
pub(crate) type Decided = (Outcome, Option<Outcome>);

/// The rows of a policy set.
#[derive(Debug)]
pub(crate) struct Set {
    pub(crate) other: Rc<Vec<Decided>>,
    pub(crate) ports: BTreeMap<u16, Rc<Vec<Decided>>>,
}

/// Works out sets; lives for one compile.
pub(crate) struct Sets<'a> {
    slots: &'a Slots,
    policies: &'a [Option<Arc<PreparedPolicy>>],
    /// First rule id of each policy.
    first_rule: Vec<RuleId>,
    /// By rule id: as TCP, as HTTP.
    rules: Vec<[Rule<'a>; 2]>,
    judged: Vec<Rc<Judged>>,
    rows: HashMap<RowKey, Rc<Vec<Outcome>>>,
    /// STRICT demands met so far.
    pub(crate) demands: Vec<Demand>,
    /// By rule id: whom it asks of streams that are not HTTP, and of requests.
    custom: HashMap<RuleId, [Arc<Provider>; 2]>,
    naming: bool,
}

/// A rule under one reading, with what was already worked out of it.
struct Rule<'a> {
    read: Read<'a>,
    ports: BTreeSet<u16>,
    asks_destination: bool,
    at: HashMap<(Option<u16>, Option<IpAddr>), usize>,
}

#[derive(PartialEq, Eq, Hash)]
struct RowKey {
    judged: Vec<(RuleId, usize)>,
    default_deny: bool,
    strict: Option<usize>,
    /// Read as another stream than HTTP, where that makes a difference for whom a rule asks.
    streams: bool,
}

/// Where a row is for.
struct Spot<'a> {
    policies: &'a [usize],
    strict: Option<usize>,
    own_proxy: bool,
    tokens: Option<&'a Arc<Tokens>>,
    port: Option<u16>,
    destination: Option<IpAddr>,
}

impl<'a> Sets<'a> {
    /// `policies`: by index of `Policies`; `None` for those that apply nowhere here.
    pub(crate) fn new(
        slots: &'a Slots,
        blocks: &'a Blocks,
        policies: &'a [Option<Arc<PreparedPolicy>>],
        providers: &HashMap<usize, Arc<Provider>>,
        naming: bool,
    ) -> Self {
        let mut first_rule = Vec::with_capacity(policies.len());
        let mut rules = Vec::new();
        let mut custom = HashMap::new();
        for (at, policy) in policies.iter().enumerate() {
            first_rule.push(rules.len());
            let Some(policy) = policy else { continue };
            for rule in &policy.rules {
                let read = |reading| Rule {
                    read: Read::new(rule, policy.side, reading, slots, blocks),
                    ports: rule.ports().collect(),
                    asks_destination: rule.asks_destination(),
                    at: HashMap::new(),
                };
                if let Some(provider) = providers.get(&at) {
                    custom.insert(rules.len(), [provider.of_streams(), Arc::clone(provider)]);
                }
                rules.push([read(Reading::Tcp), read(Reading::Http)]);
            }
        }
        Self {
            slots,
            policies,
            first_rule,
            rules,
            judged: Vec::new(),
            rows: HashMap::new(),
            demands: Vec::new(),
            custom,
            naming,
        }
    }

    pub(crate) fn set(&mut self, profile: &Profile) -> Set {
        let Profile::Judged {
            policies,
            strict,
            own_proxy,
            tokens,
            exempt,
            protocols,
            destination,
        } = profile
        else {
            return self.constant(profile);
        };
        let all = self.policies;
        let mut ports: BTreeSet<u16> = strict.ports().chain(exempt.iter().copied()).collect();
        ports.extend(protocols.keys());
        for policy in policies.iter().filter_map(|at| all[*at].as_ref()) {
            ports.extend(policy.ports());
        }
        let exempted = Rc::new(vec![(Outcome::Exempt, None); self.slots.list.len()]);
        let mut row = |port: Option<u16>| {
            if port.is_some_and(|port| exempt.contains(&port)) {
                return Rc::clone(&exempted);
            }
            let demand = strict.at(port).map(|demand| self.demand(demand));
            let spot = Spot {
                policies,
                strict: demand,
                own_proxy: *own_proxy,
                tokens: tokens.as_ref(),
                port,
                destination: *destination,
            };
            let declared = port.and_then(|port| protocols.get(&port)).copied();
            Rc::new(self.decide(&spot, declared.unwrap_or(Declared::NOTHING)))
        };
        Set {
            other: row(None),
            ports: ports.into_iter().map(|port| (port, row(Some(port)))).collect(),
        }
    }

    fn constant(&self, profile: &Profile) -> Set {
        let outcome = match profile {
            Profile::Constant(outcome) => outcome.clone(),
            Profile::Judged { .. } => Outcome::NoMatch,
        };
        Set {
            other: Rc::new(vec![(outcome, None); self.slots.list.len()]),
            ports: BTreeMap::new(),
        }
    }

    fn decide(&mut self, spot: &Spot<'_>, declared: Declared) -> Vec<Decided> {
        let real = self.outcomes(spot, declared, false);
        let dry = spot
            .policies
            .iter()
            .any(|at| self.policies[*at].as_ref().is_some_and(|policy| policy.dry_run));
        if !dry {
            return real.into_iter().map(|outcome| (outcome, None)).collect();
        }
        let tried = self.outcomes(spot, declared, true);
        real.into_iter()
            .zip(tried)
            .map(|(real, tried)| {
                let would = (!real.ends_like(&tried)).then_some(tried);
                (real, would)
            })
            .collect()
    }

    fn outcomes(&mut self, spot: &Spot<'_>, declared: Declared, dry: bool) -> Vec<Outcome> {
        let settle = |outcomes| settle(outcomes, spot.own_proxy, self.slots);
        let tcp = self.row(spot, Reading::Tcp, dry);
        if !declared.http && !declared.unknown {
            return settle(tcp.to_vec());
        }
        let mut http = self.row(spot, Reading::Http, dry);
        // A proxy of the pod's own checks tokens itself.
        if let Some(tokens) = spot.tokens.filter(|_| !spot.own_proxy) {
            let outcomes = http.iter().cloned();
            http = Rc::new(outcomes.map(|outcome| outcome.authenticated(tokens)).collect());
        }
        let bytes_decide = if declared.http {
            http.iter().cloned().map(Outcome::declared_http).collect()
        } else if Rc::ptr_eq(&tcp, &http) {
            http.to_vec()
        } else {
            let both = tcp.iter().zip(http.iter());
            both.map(|(tcp, http)| Outcome::undeclared(tcp, http, self.naming))
                .collect()
        };
        let bytes_decide = settle(bytes_decide);
        if !declared.tcp {
            return bytes_decide;
        }
        let both = settle(tcp.to_vec()).into_iter().zip(bytes_decide);
        both.map(|(tcp, http)| Outcome::stricter(tcp, http, declared.http))
            .collect()
    }

    fn row(&mut self, spot: &Spot<'_>, reading: Reading, dry: bool) -> Rc<Vec<Outcome>> {
        let mut judged: Vec<(RuleId, usize)> = Vec::new();
        let mut default_deny = false;
        for at in spot.policies {
            let Some(policy) = &self.policies[*at] else {
                continue;
            };
            if policy.dry_run && !dry {
                continue;
            }
            default_deny |= policy.side == Side::Allow;
            let first = self.first_rule[*at];
            let (side, count) = (policy.side, policy.rules.len());
            for rule in first..first + count {
                judged.push((rule, self.judged_at(rule, side, reading, spot)));
            }
        }
        let differs = |(rule, _): &(RuleId, usize)| {
            self.custom
                .get(rule)
                .is_some_and(|[streams, requests]| streams != requests)
        };
        let streams = reading == Reading::Tcp && judged.iter().any(differs);
        let key = RowKey {
            judged,
            default_deny,
            strict: spot.strict,
            streams,
        };
        if let Some(known) = self.rows.get(&key) {
            return Rc::clone(known);
        }
        let row = Rc::new(self.judge(spot, &key));
        self.rows.insert(key, Rc::clone(&row));
        row
    }

    /// Index of the rule's judgement there.
    fn judged_at(&mut self, id: RuleId, side: Side, reading: Reading, spot: &Spot<'_>) -> usize {
        let next = self.judged.len();
        let [tcp, http] = &mut self.rules[id];
        let rule = match reading {
            // A rule without HTTP fields reads alike both ways.
            Reading::Tcp if tcp.read.depends_on_reading() => tcp,
            Reading::Tcp | Reading::Http => http,
        };
        let port = spot.port.filter(|port| rule.ports.contains(port));
        let destination = spot.destination.filter(|_| rule.asks_destination);
        *rule.at.entry((port, destination)).or_insert_with(|| {
            let judged = rule.read.at(side, port, destination, self.slots);
            self.judged.push(Rc::new(judged));
            next
        })
    }

    fn judge(&self, spot: &Spot<'_>, key: &RowKey) -> Vec<Outcome> {
        let mut docket = Docket {
            default_deny: key.default_deny,
            strict: spot.strict.map(|at| (at, &self.demands[at])),
            naming: self.naming,
            ..Docket::default()
        };
        for (id, judged) in &key.judged {
            let at = self.first_rule.partition_point(|first| first <= id) - 1;
            let entry = Entry {
                id: *id,
                judged: &self.judged[*judged],
                by_connection: self.policies[at]
                    .as_ref()
                    .is_some_and(|policy| policy.by_connection),
            };
            match &self.policies[at] {
                Some(policy) if policy.custom => {
                    let [streams, requests] = &self.custom[id];
                    let provider = if key.streams { streams } else { requests };
                    docket.custom.push((entry, Arc::clone(provider)));
                }
                Some(policy) if policy.side == Side::Deny => docket.deny.push(entry),
                _ => docket.allow.push(entry),
            }
        }
        judge(&docket, self.slots)
    }

    fn demand(&mut self, demand: &Demand) -> usize {
        self.demands
            .iter()
            .position(|known| known == demand)
            .unwrap_or_else(|| {
                self.demands.push(demand.clone());
                self.demands.len() - 1
            })
    }
}
