//! Which reading of the stream a connection is judged by: what its port declares, and what its first bytes are.
//!
//! Invariant: without a byte, what both readings don't agree about is left to L7.

use thyra_datapath_abi::tables::RuleRef;
use thyra_datapath_abi::{Action, Reason};

use super::destination::{Protocol, is_own_proxy, protocols, request_authentications};
use super::rule::{Facts, Reading};
use super::source::{self, Origin, Who};
use super::{Ask, Court, Looked, Ruling};
use crate::traffic::Traffic;

/// The field that waits for tokens.
const TOKENS: &str = "jwtRules";

impl Court<'_> {
    /// The stricter of what the Services in front of the port make of it.
    pub(super) fn rule(&self, dry: bool, trace: &mut Vec<Looked>) -> Ruling {
        let mut strictest: Option<Ruling> = None;
        // HTTP first: of two rulings alike its own stays.
        for protocol in protocols(self.world, self.endpoint, self.connection.port) {
            let ruling = self.read(protocol, dry, trace);
            if strictest
                .as_ref()
                .is_none_or(|known| ruling.rank() > known.rank())
            {
                strictest = Some(ruling);
            }
        }
        strictest.unwrap_or_else(|| Ruling::new(Action::Deny, Reason::Policy, None))
    }

    fn read(&self, protocol: Protocol, dry: bool, trace: &mut Vec<Looked>) -> Ruling {
        let who = match source::origin(self.world, self.connection.source.to_canonical()) {
            Origin::Nobody => Who::Nobody,
            Origin::Is(identity) => Who::Is(identity),
            Origin::Awaited => {
                // Whether it is held back is decided before a byte is seen.
                let before = Court {
                    traffic: None,
                    ..*self
                };
                let kindest = before.settle(protocol, Who::Kindest, dry, &mut Vec::new());
                let harshest = before.settle(protocol, Who::Harshest, dry, &mut Vec::new());
                match (kindest.rank(), harshest.rank()) {
                    (3, _) => Who::Kindest,
                    (kind, harsh) if kind == harsh => Who::Harshest,
                    _ => return Ruling::new(Action::Hold, Reason::IdentityPending, None),
                }
            }
        };
        self.settle(protocol, who, dry, trace)
    }

    fn settle(&self, protocol: Protocol, who: Who<'_>, dry: bool, trace: &mut Vec<Looked>) -> Ruling {
        if is_own_proxy(self.endpoint) {
            let before = Court {
                traffic: None,
                ..*self
            };
            let ruling = before.by_bytes(protocol, who, dry, &mut Vec::new());
            if ruling.rank() == 2 {
                return Ruling {
                    action: Action::Allow,
                    reason: Reason::NotEnforced,
                    ..ruling
                };
            }
        }
        self.by_bytes(protocol, who, dry, trace)
    }

    /// By the reading that the protocol and the first bytes make the right one.
    fn by_bytes(&self, protocol: Protocol, who: Who<'_>, dry: bool, trace: &mut Vec<Looked>) -> Ruling {
        let facts = |reading| Facts {
            who,
            source: self.connection.source.to_canonical(),
            destination: self.connection.destination.to_canonical(),
            port: self.connection.port,
            mesh: &self.world.mesh,
            reading,
            traffic: self.traffic,
        };
        match (protocol, self.traffic) {
            (Protocol::Tcp, _) => self.order(&facts(Reading::Tcp), dry, trace),
            (Protocol::Http, Some(Traffic { http: None, .. })) => {
                Ruling::new(Action::Deny, Reason::NotHttp, None)
            }
            (Protocol::Undeclared, Some(Traffic { http: None, .. })) => {
                self.order(&facts(Reading::Tcp), dry, trace)
            }
            (Protocol::Http | Protocol::Undeclared, Some(_)) => self.order(&facts(Reading::Http), dry, trace),
            (Protocol::Http, None) => self.authenticated(self.order(&facts(Reading::Http), dry, trace)),
            (Protocol::Undeclared, None) => {
                let tcp = self.order(&facts(Reading::Tcp), dry, &mut Vec::new());
                let http = self.authenticated(self.order(&facts(Reading::Http), dry, trace));
                self.undeclared(tcp, http)
            }
        }
    }

    /// Whatever else allows a request, an invalid token of it is refused: that needs its bytes.
    fn authenticated(&self, ruling: Ruling) -> Ruling {
        let asked = request_authentications(self.world, self.endpoint);
        if is_own_proxy(self.endpoint) || asked.is_empty() || !matches!(ruling.rank(), 0 | 2) {
            return ruling;
        }
        let asks = asked.into_iter().map(|asked| Ask {
            rule: RuleRef {
                policy: asked.reference.clone(),
                rule: None,
            },
            field: TOKENS.into(),
            tried: false,
        });
        let reason = if ruling.rank() == 0 {
            Reason::NeedsL7
        } else {
            ruling.reason
        };
        Ruling {
            asks: ruling.asks.into_iter().chain(asks).collect(),
            ..Ruling::new(Action::Deny, reason, None)
        }
    }

    /// Both readings are possible: where they don't agree without a byte, the bytes decide.
    fn undeclared(&self, tcp: Ruling, http: Ruling) -> Ruling {
        if tcp.rank() != 2 && tcp.rank() == http.rank() {
            return http;
        }
        let mut asks = Vec::new();
        if tcp.rank() != 2 && http.rank() != 2 {
            let rule = tcp.rule.clone().or(http.rule.clone());
            asks.extend(rule.map(|rule| {
                Ask {
                    tried: self
                        .world
                        .authorization
                        .get(&rule.policy)
                        .is_some_and(|policy| policy.dry_run),
                    rule,
                    field: "protocol".into(),
                }
            }));
        }
        for ask in http.asks.into_iter().chain(tcp.asks) {
            if !asks.contains(&ask) {
                asks.push(ask);
            }
        }
        // Tokens are named after all rules.
        asks.sort_by_key(|ask| &*ask.field == TOKENS);
        let custom = [tcp.reason, http.reason].contains(&Reason::NeedsCustom);
        let reason = if custom {
            Reason::NeedsCustom
        } else {
            Reason::NeedsL7
        };
        Ruling {
            asks,
            ..Ruling::new(Action::Deny, reason, None)
        }
    }
}
