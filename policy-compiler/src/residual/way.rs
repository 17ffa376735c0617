//! Who is given the connections of a residual: Envoy, for each request, or the pod itself once the first bytes have
//! been judged.
//!
//! Invariant: held is only what is answered once for the whole connection, by its nature or because every policy that
//! has a say wants it so; whatever is in doubt goes through Envoy, request by request.

use std::sync::Arc;

use thyra_datapath_abi::{Action, Reason};

use super::{Answer, Conditions, Decides, Residual, Rules, Test};

/// Who is given a connection whose verdict needs L7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Envoy in its middle, which judges each request.
    Inline(Inline),
    /// The pod itself, once its ClientHello has been judged.
    HoldTls,
    /// The pod itself, once its first HTTP request has been judged.
    HoldHttp,
}

/// Why each request is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inline {
    /// Nobody wants anything else.
    Usual,
    /// Some policy that has a say doesn't want the first request to decide.
    NotAllAlike,
    /// Other streams than HTTP may pass, or two Services disagree about the port.
    Undeclared,
    /// Tokens are checked.
    Tokens,
    /// An authorizer is asked.
    Authorizer,
    /// The host is asked for, which a request of HTTP/2 can say twice: what Envoy drops the pod would get.
    Hosts,
}

impl Way {
    /// In words, with the reason.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Inline(why) => why.words(),
            Self::HoldTls => "hold: the server name is the same for the whole connection",
            Self::HoldHttp => {
                "hold: the first request decides for the connection (all its policies say `thyra.io/l7-verdict: \
                 connection`)"
            }
        }
    }
}

impl Inline {
    fn words(self) -> &'static str {
        match self {
            Self::Usual => "inline: each request is judged",
            Self::NotAllAlike => {
                "inline: each request is judged; not every policy here says `thyra.io/l7-verdict: connection`"
            }
            Self::Undeclared => {
                "inline: each request is judged; its policies say `thyra.io/l7-verdict: connection`, but the port \
                 isn't declared HTTP by every Service"
            }
            Self::Tokens => {
                "inline: each request is judged; its policies say `thyra.io/l7-verdict: connection`, but a \
                 RequestAuthentication checks tokens"
            }
            Self::Authorizer => {
                "inline: each request is judged; its policies say `thyra.io/l7-verdict: connection`, but an external \
                 authorizer is asked"
            }
            Self::Hosts => {
                "inline: each request is judged; its policies say `thyra.io/l7-verdict: connection`, but hosts are \
                 asked for, which HTTP/2 can say twice"
            }
        }
    }
}

impl<R: PartialEq> Residual<R> {
    /// The cheapest way that answers as its policies want it. What asks for nothing but the server name of the
    /// ClientHello, whatever else the stream turns out to be, is answered once for the connection; so is HTTP, on a
    /// port that is nothing else, where all of its policies want the first request to decide and its head says all.
    #[must_use]
    pub fn way(&self) -> Way {
        if self.http == self.other && self.other.asks_the_server_name_alone() {
            return Way::HoldTls;
        }
        match self.http.decides() {
            None | Some(Decides::EachRequest) => Way::Inline(Inline::Usual),
            Some(Decides::NotAllAlike) => Way::Inline(Inline::NotAllAlike),
            Some(Decides::FirstRequest) => self.needs_each_request().map_or(Way::HoldHttp, Way::Inline),
        }
    }

    /// Why the head of the first request is not enough.
    fn needs_each_request(&self) -> Option<Inline> {
        let rules = match &self.http {
            Answer::Rules(rules) => rules,
            Answer::Authenticated(..) => return Some(Inline::Tokens),
            Answer::Constant(..) | Answer::Stricter(..) => return Some(Inline::Undeclared),
        };
        if !matches!(&self.other, Answer::Constant(Action::Deny, Reason::NotHttp, _)) {
            return Some(Inline::Undeclared);
        }
        if !rules.custom.is_empty() {
            return Some(Inline::Authorizer);
        }
        rules.asks_hosts().then_some(Inline::Hosts)
    }
}

impl<R> Answer<R> {
    fn asks_the_server_name_alone(&self) -> bool {
        match self {
            Self::Constant(action, ..) => matches!(action, Action::Allow | Action::Deny),
            Self::Rules(rules) => {
                let mut tests = rules.tests();
                rules.custom.is_empty() && tests.all(|test| matches!(test, Test::Sni(_)))
            }
            Self::Stricter(a, b) => a.asks_the_server_name_alone() && b.asks_the_server_name_alone(),
            Self::Authenticated(..) => false,
        }
    }

    /// What the policies behind it want; none where a constant is.
    fn decides(&self) -> Option<Decides> {
        match self {
            Self::Constant(..) => None,
            Self::Rules(rules) => Some(rules.decides),
            Self::Authenticated(_, answer) => answer.decides(),
            Self::Stricter(a, b) => match (a.decides(), b.decides()) {
                (one, None) => one,
                (None, other) => other,
                (one, other) if one == other => one,
                _ => Some(Decides::NotAllAlike),
            },
        }
    }
}

impl<R> Rules<R> {
    /// Of DENY and ALLOW.
    fn tests(&self) -> impl Iterator<Item = &Test> {
        let rules = self.deny.iter().chain(&self.allow);
        rules.flat_map(|(_, conditions): &(R, Arc<Conditions>)| {
            let both = conditions.from.iter().chain(&conditions.to).flatten();
            both.chain(&conditions.when)
        })
    }

    fn asks_hosts(&self) -> bool {
        let is_host = |key: &str| {
            let name = key
                .strip_prefix("request.headers[")
                .and_then(|rest| rest.strip_suffix(']'));
            name.is_some_and(|name| {
                [":authority", "host"]
                    .iter()
                    .any(|host| name.eq_ignore_ascii_case(host))
            })
        };
        self.tests().any(|test| match test {
            Test::Host(_) => true,
            Test::Key(key, _) => is_host(key),
            Test::Method(_)
            | Test::Path(_)
            | Test::RequestPrincipal(_)
            | Test::RemoteBlock(_)
            | Test::RemoteIp(_)
            | Test::Sni(_) => false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::Ask;
    use super::*;
    use crate::authorizer::Provider;
    use crate::policy::{Field, StringMatch};
    use crate::tokens::Tokens;

    fn field() -> Field<StringMatch> {
        Field {
            values: vec![StringMatch::Exact("GET".into())],
            not_values: Vec::new(),
        }
    }

    fn rules(decides: Decides, tests: Vec<Test>) -> Rules<usize> {
        let conditions = Conditions {
            when: tests,
            ..Conditions::default()
        };
        Rules {
            custom: Vec::new(),
            deny: Vec::new(),
            allow: vec![(0, Arc::new(conditions))],
            default_deny: true,
            decides,
        }
    }

    fn by_method(decides: Decides) -> Answer<usize> {
        Answer::Rules(Arc::new(rules(decides, vec![Test::Method(field())])))
    }

    fn declared(http: Answer<usize>) -> Residual<usize> {
        let other = Answer::Constant(Action::Deny, Reason::NotHttp, None);
        Residual { http, other }
    }

    #[test]
    fn http_is_held_only_where_all_its_policies_want_the_first_request_to_decide() {
        let way = |decides| declared(by_method(decides)).way();
        assert_eq!(way(Decides::FirstRequest), Way::HoldHttp);
        assert_eq!(way(Decides::NotAllAlike), Way::Inline(Inline::NotAllAlike));
        assert_eq!(way(Decides::EachRequest), Way::Inline(Inline::Usual));
    }

    #[test]
    fn what_needs_more_than_the_head_of_the_first_request_is_judged_by_request() {
        let asked = || by_method(Decides::FirstRequest);
        let tokens = Answer::Authenticated(
            Arc::new(Tokens {
                policies: Vec::new(),
                rules: Vec::new(),
            }),
            Arc::new(asked()),
        );
        assert_eq!(declared(tokens).way(), Way::Inline(Inline::Tokens));
        let mut custom = rules(Decides::FirstRequest, vec![Test::Method(field())]);
        custom.custom.push(Ask {
            rule: 1,
            conditions: Arc::default(),
            provider: Arc::new(Provider {
                name: "words".into(),
                authorizer: Err("unknown".into()),
            }),
        });
        let custom = Answer::Rules(Arc::new(custom));
        assert_eq!(declared(custom).way(), Way::Inline(Inline::Authorizer));
        for test in [
            Test::Host(field()),
            Test::Key("request.headers[:authority]".into(), field()),
            Test::Key("request.headers[Host]".into(), field()),
        ] {
            let hosts = Answer::Rules(Arc::new(rules(Decides::FirstRequest, vec![test])));
            assert_eq!(declared(hosts).way(), Way::Inline(Inline::Hosts));
        }
        let header = Test::Key("request.headers[x-host]".into(), field());
        let header = Answer::Rules(Arc::new(rules(Decides::FirstRequest, vec![header])));
        assert_eq!(declared(header).way(), Way::HoldHttp);
    }

    #[test]
    fn a_port_that_may_carry_anything_else_is_judged_by_request() {
        let asked = || by_method(Decides::FirstRequest);
        let undeclared = Way::Inline(Inline::Undeclared);
        let others = [
            asked(),
            Answer::Constant(Action::Allow, Reason::PolicyAllow, Some(0)),
            Answer::Constant(Action::Deny, Reason::Policy, None),
        ];
        for other in others {
            assert_eq!(Residual { http: asked(), other }.way(), undeclared);
        }
        let both = Answer::Stricter(Arc::new(asked()), Arc::new(asked()));
        assert_eq!(declared(both).way(), undeclared);
        let denied = Answer::Constant(Action::Deny, Reason::PolicyDeny, None);
        let one = Answer::Stricter(Arc::new(asked()), Arc::new(denied));
        assert_eq!(declared(one).way(), undeclared);
    }

    #[test]
    fn server_names_are_held_without_being_asked_to() {
        let by_name = Answer::Rules(Arc::new(rules(Decides::EachRequest, vec![Test::Sni(field())])));
        let residual = Residual {
            http: by_name.clone(),
            other: by_name,
        };
        assert_eq!(residual.way(), Way::HoldTls);
    }
}
