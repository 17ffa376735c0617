//! A residual in words that a person reads.
//!
//! Invariant: lines come in the order in which they decide; all of them together say what `Residual::end` says.

use thyra_datapath_abi::Action;
use thyra_datapath_abi::tables::RuleRef;

use super::{Answer, Ask, Conditions, Residual, Rules, Test};
use crate::authorizer::Provider;
use crate::policy::{Field, StringMatch};
use crate::tokens::Tokens;

impl Residual<RuleRef> {
    /// What an HTTP request gets.
    #[must_use]
    pub fn http_words(&self) -> Vec<String> {
        answer(&self.http)
    }

    /// What a stream that is not HTTP gets.
    #[must_use]
    pub fn other_words(&self) -> Vec<String> {
        answer(&self.other)
    }
}

fn answer(answer_of: &Answer<RuleRef>) -> Vec<String> {
    match answer_of {
        Answer::Constant(action, reason, rule) => {
            let by = rule
                .as_ref()
                .map(|rule| format!(" by {rule}"))
                .unwrap_or_default();
            vec![format!("{}{by}: {}", action_word(*action), reason.text())]
        }
        Answer::Rules(rules_of) => rules(rules_of),
        Answer::Stricter(one, other) => {
            let mut lines = vec!["the stricter of:".to_owned()];
            lines.extend(answer(one).into_iter().map(|line| format!("  {line}")));
            lines.push("and:".to_owned());
            lines.extend(answer(other).into_iter().map(|line| format!("  {line}")));
            lines
        }
        Answer::Authenticated(tokens, then) => {
            let mut lines = vec![checked(tokens)];
            lines.extend(answer(then));
            lines
        }
    }
}

fn checked(tokens: &Tokens) -> String {
    let mut issuers: Vec<&str> = tokens.rules.iter().map(|rule| rule.issuer.as_str()).collect();
    issuers.dedup();
    let issuers: Vec<String> = issuers
        .into_iter()
        .map(|issuer| match issuer {
            "" => "any issuer".to_owned(),
            named => format!("`{named}`"),
        })
        .collect();
    format!("401 for a token that is no valid one of {}", issuers.join(" or "))
}

fn action_word(action: Action) -> &'static str {
    match action {
        Action::Allow => "allow",
        Action::Hold => "hold",
        Action::Proxy => "ask the authorizer",
        Action::Deny | Action::Missing => "deny",
    }
}

fn rules(rules: &Rules<RuleRef>) -> Vec<String> {
    let line = |what: &str, rule: &RuleRef, conditions: &Conditions| {
        let asked = asked(conditions);
        let asked = if asked.is_empty() {
            "always".to_owned()
        } else {
            format!("if {asked}")
        };
        format!("{what} by {rule} {asked}")
    };
    let custom = |ask: &Ask<RuleRef>| {
        let Provider { name, authorizer } = &*ask.provider;
        let what = match authorizer {
            Ok(authorizer) => format!(
                "what is allowed asks the authorizer `{name}` at {}",
                authorizer.target
            ),
            Err(why) => format!("what is allowed is denied for want of the authorizer `{name}` ({why})"),
        };
        line(&what, &ask.rule, &ask.conditions)
    };
    let all = |what: &'static str, rules: &[(RuleRef, std::sync::Arc<Conditions>)]| -> Vec<String> {
        rules
            .iter()
            .map(|(rule, conditions)| line(what, rule, conditions))
            .collect()
    };
    let mut lines = all("deny", &rules.deny);
    lines.extend(all("allow", &rules.allow));
    lines.push(
        if rules.default_deny {
            "else deny"
        } else {
            "else allow"
        }
        .to_owned(),
    );
    lines.extend(rules.custom.iter().map(custom));
    lines
}

fn asked(conditions: &Conditions) -> String {
    let lists = [&conditions.from, &conditions.to];
    let one_of = lists.into_iter().filter(|list| !list.is_empty()).map(|list| {
        let each: Vec<String> = list.iter().map(|tests| all_of(tests)).collect();
        if each.len() == 1 {
            each.concat()
        } else {
            format!("({})", each.join(" or "))
        }
    });
    let mut parts: Vec<String> = one_of.collect();
    if !conditions.when.is_empty() {
        parts.push(all_of(&conditions.when));
    }
    parts.join(" and ")
}

fn all_of(tests: &[Test]) -> String {
    let each: Vec<String> = tests.iter().map(test).collect();
    each.join(" and ")
}

fn test(test: &Test) -> String {
    match test {
        Test::Host(of) => field("hosts", of, pattern),
        Test::Method(of) => field("methods", of, pattern),
        Test::Path(of) => field("paths", of, Clone::clone),
        Test::RequestPrincipal(of) => field("requestPrincipals", of, pattern),
        Test::RemoteBlock(of) => field("remoteIpBlocks", of, ToString::to_string),
        Test::RemoteIp(of) => field("remote.ip", of, ToString::to_string),
        Test::Sni(of) => field("connection.sni", of, pattern),
        Test::Key(key, of) => field(key, of, pattern),
    }
}

/// `methods is GET | HEAD`, `paths is /a* and not /a/b`.
fn field<T>(name: &str, field: &Field<T>, text: impl Fn(&T) -> String) -> String {
    let list = |values: &[T]| values.iter().map(&text).collect::<Vec<_>>().join(" | ");
    let values = (!field.values.is_empty()).then(|| list(&field.values));
    let not_values = (!field.not_values.is_empty()).then(|| format!("not {}", list(&field.not_values)));
    let both: Vec<String> = values.into_iter().chain(not_values).collect();
    format!("{name} is {}", both.join(" and "))
}

/// As it stood in the policy.
fn pattern(value: &StringMatch) -> String {
    match value {
        StringMatch::Exact(text) | StringMatch::Glob(text) => text.clone(),
        StringMatch::Prefix(text) => format!("{text}*"),
        StringMatch::Suffix(text) => format!("*{text}"),
        StringMatch::Present => "*".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use thyra_datapath_abi::Reason;
    use thyra_datapath_abi::tables::PolicyRef;

    use super::super::Decides;
    use super::*;

    fn rule(name: &str) -> RuleRef {
        let policy = PolicyRef {
            namespace: "shop".into(),
            name: name.into(),
        };
        RuleRef {
            policy,
            rule: Some(0),
        }
    }

    fn values<T: Clone>(values: &[T], not_values: &[T]) -> Field<T> {
        Field {
            values: values.to_vec(),
            not_values: not_values.to_vec(),
        }
    }

    #[test]
    fn lines_come_in_the_order_in_which_they_decide() {
        let exact = |text: &str| StringMatch::Exact(text.into());
        let admin = Conditions {
            to: vec![vec![Test::Path(values(
                &["/admin*".into()],
                &["/admin/health".into()],
            ))]],
            ..Conditions::default()
        };
        let read = Conditions {
            from: vec![vec![Test::RequestPrincipal(values(&[StringMatch::Present], &[]))]],
            to: vec![
                vec![Test::Method(values(&[exact("GET"), exact("HEAD")], &[]))],
                vec![Test::Host(values(&[StringMatch::Suffix(".example".into())], &[]))],
            ],
            when: vec![Test::Key(
                "request.headers[x-a]".into(),
                values(&[], &[exact("1")]),
            )],
        };
        let residual = Residual {
            http: Answer::Rules(Arc::new(Rules {
                custom: vec![Ask {
                    rule: rule("ask"),
                    conditions: Arc::default(),
                    provider: Arc::new(Provider::absent("ext")),
                }],
                deny: vec![(rule("no-admin"), Arc::new(admin))],
                allow: vec![(rule("read"), Arc::new(read))],
                default_deny: true,
                decides: Decides::EachRequest,
            })),
            other: Answer::Constant(Action::Deny, Reason::PolicyDeny, Some(rule("no-admin"))),
        };
        let wanted = [
            "deny by shop/no-admin#0 if paths is /admin* and not /admin/health",
            "allow by shop/read#0 if requestPrincipals is * and (methods is GET | HEAD or hosts is *.example) \
             and request.headers[x-a] is not 1",
            "else deny",
            "what is allowed is denied for want of the authorizer `ext` (not in the mesh config) by shop/ask#0 always",
        ];
        assert_eq!(residual.http_words(), wanted);
        assert_eq!(residual.other_words(), ["deny by shop/no-admin#0: policy denied"]);
    }
}
