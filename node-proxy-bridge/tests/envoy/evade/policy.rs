//! The policies that nobody gets past, in two forms, and what the host says of a request under them.

use std::sync::Arc;

use thyra_datapath_abi::tables::{PolicyRef, RuleRef};
use thyra_datapath_abi::{Action, Reason};
use thyra_policy_compiler::policy::StringMatch;
use thyra_policy_compiler::residual::{Answer, Conditions, Context, Decides, Residual, Rules, Test};
use thyra_policy_compiler::traffic::{PathNormalization, Request, Traffic};

use super::super::named::values;

/// Whether a policy names what is refused or what is let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// DENY of `/admin` and below, of DELETE, of a role and of a host.
    Deny,
    /// ALLOW of `/public` and below with GET and POST, for a role and on a host, and of nothing else.
    Allow,
}

pub(super) const FORMS: [Form; 2] = [Form::Deny, Form::Allow];

fn rule(name: &str) -> RuleRef {
    RuleRef {
        policy: PolicyRef {
            namespace: "shop".into(),
            name: name.into(),
        },
        rule: Some(0),
    }
}

fn exact(texts: &[&str]) -> Vec<StringMatch> {
    texts
        .iter()
        .map(|text| StringMatch::Exact((*text).into()))
        .collect()
}

fn paths(texts: &[&str]) -> Test {
    Test::Path(values(texts.iter().map(|text| (*text).into()).collect()))
}

fn to(tests: Vec<Test>) -> Conditions {
    Conditions {
        to: vec![tests],
        ..Conditions::default()
    }
}

/// On a port that is declared HTTP.
pub(super) fn declared(form: Form) -> Residual<RuleRef> {
    let role = |role: &str| Test::Key("request.headers[x-role]".into(), values(exact(&[role])));
    let (deny, allow) = match form {
        Form::Deny => (
            vec![
                to(vec![paths(&["/admin", "/admin/*"])]),
                to(vec![Test::Method(values(exact(&["DELETE"])))]),
                to(vec![Test::Host(values(exact(&["admin.example"])))]),
                Conditions {
                    when: vec![role("admin")],
                    ..Conditions::default()
                },
            ],
            Vec::new(),
        ),
        Form::Allow => {
            let what = vec![
                paths(&["/public", "/public/*"]),
                Test::Method(values(exact(&["GET", "POST"]))),
                Test::Host(values(exact(&["shop.example"]))),
            ];
            let allow = Conditions {
                when: vec![role("user")],
                ..to(what)
            };
            (Vec::new(), vec![allow])
        }
    };
    let named = |all: Vec<Conditions>, name: &str| {
        let all = all.into_iter();
        all.map(|one| (rule(name), Arc::new(one))).collect()
    };
    Residual {
        http: Answer::Rules(Arc::new(Rules {
            custom: Vec::new(),
            deny: named(deny, "no-admin"),
            allow: named(allow, "public"),
            default_deny: form == Form::Allow,
            decides: Decides::EachRequest,
        })),
        other: Answer::Constant(Action::Deny, Reason::NotHttp, None),
    }
}

/// On a port that nobody declares: in the TCP reading a DENY matches without its HTTP fields and an ALLOW never does.
pub(super) fn undeclared(form: Form) -> Residual<RuleRef> {
    let other = match form {
        Form::Deny => Answer::Constant(Action::Deny, Reason::PolicyDeny, Some(rule("no-admin"))),
        Form::Allow => Answer::Constant(Action::Deny, Reason::Policy, None),
    };
    Residual {
        other,
        ..declared(form)
    }
}

/// Server names of a stream that is no HTTP; `/admin` is refused as ever.
pub(super) fn server_name(form: Form, name: &str) -> Residual<RuleRef> {
    let when = Conditions {
        when: vec![Test::Sni(values(exact(&[name])))],
        ..Conditions::default()
    };
    let one = vec![(rule("name"), Arc::new(when))];
    let (deny, allow) = match form {
        Form::Deny => (one, Vec::new()),
        Form::Allow => (Vec::new(), one),
    };
    Residual {
        other: Answer::Rules(Arc::new(Rules {
            custom: Vec::new(),
            deny,
            allow,
            default_deny: form == Form::Allow,
            decides: Decides::EachRequest,
        })),
        ..declared(form)
    }
}

/// What `thyra dry-run` says: whether the request passes; what is malformed never does.
pub(super) fn passes(residual: &Residual<RuleRef>, request: &Request, paths: PathNormalization) -> bool {
    let traffic = Traffic {
        http: Some(request.clone()),
        ..Traffic::default()
    };
    let ending = residual.end(&Context {
        traffic: &traffic,
        source: "127.0.0.1".parse().unwrap(),
        paths,
    });
    ending.action == Action::Allow && request.malformed(paths).is_none()
}
