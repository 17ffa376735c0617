//! Which identities a field of a policy holds: string patterns, service accounts, trust domain aliases.
//!
//! Invariant: a test is the whole field (values and not-values); a source without identity fails every
//! positive part and passes every negative one.

use std::collections::HashSet;

use super::identity::{Identities, Identity};
use crate::policy::{Field, ServiceAccountRef, StringMatch};
use crate::world::Mesh;

/// The trust domain that stands for the mesh's own one in a policy, whatever that is called.
const LOCAL_TRUST_DOMAIN: &str = "cluster.local";
/// `<trust domain>/ns/<namespace>/sa/<service account>`: only such values have a trust domain that aliases
/// replace.
const PRINCIPAL_PARTS: usize = 5;

/// What of the identity is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Text {
    Principal,
    Namespace,
    TrustDomain,
}

/// A field about the source's identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum IdentityTest {
    Text {
        of: Text,
        values: Vec<StringMatch>,
        not_values: Vec<StringMatch>,
    },
    ServiceAccount {
        values: Vec<ServiceAccountRef>,
        not_values: Vec<ServiceAccountRef>,
    },
}

impl IdentityTest {
    pub(crate) fn principals(field: &Field<StringMatch>, mesh: &Mesh) -> Self {
        Self::Text {
            of: Text::Principal,
            values: with_aliases(&field.values, mesh, principal_aliases),
            not_values: with_aliases(&field.not_values, mesh, principal_aliases),
        }
    }

    pub(crate) fn namespaces(field: &Field<StringMatch>) -> Self {
        Self::Text {
            of: Text::Namespace,
            values: field.values.clone(),
            not_values: field.not_values.clone(),
        }
    }

    pub(crate) fn trust_domains(field: &Field<StringMatch>, mesh: &Mesh) -> Self {
        Self::Text {
            of: Text::TrustDomain,
            values: with_aliases(&field.values, mesh, trust_domain_aliases),
            not_values: with_aliases(&field.not_values, mesh, trust_domain_aliases),
        }
    }

    pub(crate) fn service_accounts(field: &Field<ServiceAccountRef>) -> Self {
        Self::ServiceAccount {
            values: field.values.clone(),
            not_values: field.not_values.clone(),
        }
    }

    /// The answer for a source without identity.
    pub(crate) fn holds_unknown(&self) -> bool {
        match self {
            Self::Text { values, .. } => values.is_empty(),
            Self::ServiceAccount { values, .. } => values.is_empty(),
        }
    }

    /// Calls `hit` with each identity from `from` on that the test holds.
    pub(crate) fn scan(&self, identities: &Identities, from: usize, mut hit: impl FnMut(usize)) {
        match self {
            Self::Text {
                of,
                values,
                not_values,
            } => {
                let (values, not_values) = (Patterns::new(values), Patterns::new(not_values));
                if let Some(exact) = values.only_exact().filter(|_| *of == Text::Principal) {
                    let found = exact.filter(|text| !not_values.hold(text));
                    found
                        .flat_map(|text| identities.with_principal(text))
                        .filter(|number| **number >= from)
                        .for_each(|number| hit(*number));
                    return;
                }
                for number in from..identities.len() {
                    let text = of.of(identities, number);
                    if (values.is_empty() || values.hold(text)) && !not_values.hold(text) {
                        hit(number);
                    }
                }
            }
            Self::ServiceAccount { values, not_values } => {
                let (values, not_values) = (accounts(values), accounts(not_values));
                for number in from..identities.len() {
                    let account = account(identities.get(number));
                    if (values.is_empty() || values.contains(&account)) && !not_values.contains(&account) {
                        hit(number);
                    }
                }
            }
        }
    }
}

impl Text {
    fn of(self, identities: &Identities, number: usize) -> &str {
        match self {
            Self::Principal => identities.principal(number),
            Self::Namespace => &identities.get(number).namespace,
            Self::TrustDomain => &identities.get(number).trust_domain,
        }
    }
}

/// Exact values are looked up, the rest is tried one by one.
struct Patterns<'a> {
    exact: HashSet<&'a str>,
    others: Vec<&'a StringMatch>,
}

impl<'a> Patterns<'a> {
    fn new(values: &'a [StringMatch]) -> Self {
        let mut patterns = Self {
            exact: HashSet::new(),
            others: Vec::new(),
        };
        for value in values {
            match value {
                StringMatch::Exact(text) => {
                    patterns.exact.insert(text);
                }
                other => patterns.others.push(other),
            }
        }
        patterns
    }

    fn is_empty(&self) -> bool {
        self.exact.is_empty() && self.others.is_empty()
    }

    /// The values, if all are exact and there are some: they can be looked up.
    fn only_exact(&self) -> Option<impl Iterator<Item = &'a str> + '_> {
        (self.others.is_empty() && !self.exact.is_empty()).then(|| self.exact.iter().copied())
    }

    fn hold(&self, text: &str) -> bool {
        self.exact.contains(text) || self.others.iter().any(|pattern| holds(pattern, text))
    }
}

fn account(identity: &Identity) -> (&str, &str) {
    (&identity.namespace, &identity.service_account)
}

fn accounts(values: &[ServiceAccountRef]) -> HashSet<(&str, &str)> {
    values
        .iter()
        .map(|v| (v.namespace.as_str(), v.name.as_str()))
        .collect()
}

fn holds(pattern: &StringMatch, text: &str) -> bool {
    match pattern {
        StringMatch::Exact(value) => text == value,
        StringMatch::Prefix(value) => text.starts_with(value.as_str()),
        StringMatch::Suffix(value) => text.ends_with(value.as_str()),
        StringMatch::Present => true,
        StringMatch::Glob(value) => glob(value, text),
    }
}

/// `*` is any run of characters. Greedy from the left is exact: between two stars the earliest place leaves
/// most room.
fn glob(pattern: &str, text: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(mut text) = text.strip_prefix(head) else {
        return false;
    };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let tail = parts.pop().unwrap_or("");
    for part in parts {
        let Some(at) = text.find(part) else {
            return false;
        };
        text = &text[at + part.len()..];
    }
    text.ends_with(tail)
}

fn with_aliases(
    values: &[StringMatch],
    mesh: &Mesh,
    aliases: fn(&StringMatch, &Mesh) -> Option<Vec<StringMatch>>,
) -> Vec<StringMatch> {
    let mut all = Vec::with_capacity(values.len());
    for value in values {
        match aliases(value, mesh) {
            Some(more) => all.extend(more),
            None => all.push(value.clone()),
        }
    }
    all
}

/// As sidecars do: a five-part value in a trust domain of this mesh is written out for the trust domain and
/// all aliases.
fn principal_aliases(value: &StringMatch, mesh: &Mesh) -> Option<Vec<StringMatch>> {
    let written = written(value)?;
    let (trust_domain, rest) = written.split_once('/')?;
    if written.split('/').count() != PRINCIPAL_PARTS || trust_domain == "*" {
        return None;
    }
    let domains = replacements(trust_domain, mesh)?;
    Some(
        domains
            .into_iter()
            .map(|domain| pattern(&format!("{domain}/{rest}")))
            .collect(),
    )
}

fn trust_domain_aliases(value: &StringMatch, mesh: &Mesh) -> Option<Vec<StringMatch>> {
    let written = written(value)?;
    Some(
        replacements(&written, mesh)?
            .iter()
            .map(|domain| pattern(domain))
            .collect(),
    )
}

/// What a policy's trust domain stands for; `None` when it isn't one of this mesh. One with a `*` stays as it
/// is beside the aliases that it doesn't hold.
fn replacements(trust_domain: &str, mesh: &Mesh) -> Option<Vec<String>> {
    let asked = pattern(trust_domain);
    let own = || std::iter::once(&mesh.trust_domain).chain(&mesh.trust_domain_aliases);
    if trust_domain != LOCAL_TRUST_DOMAIN && !own().any(|domain| holds(&asked, domain)) {
        return None;
    }
    Some(
        own()
            .map(|domain| {
                if holds(&asked, domain) {
                    trust_domain.to_owned()
                } else {
                    domain.clone()
                }
            })
            .collect(),
    )
}

/// The value as it stood in the policy; `None` for those that name no trust domain.
fn written(value: &StringMatch) -> Option<String> {
    match value {
        StringMatch::Exact(text) => Some(text.clone()),
        StringMatch::Prefix(text) => Some(format!("{text}*")),
        StringMatch::Suffix(text) => Some(format!("*{text}")),
        StringMatch::Present | StringMatch::Glob(_) => None,
    }
}

fn pattern(written: &str) -> StringMatch {
    if written == "*" {
        StringMatch::Present
    } else if let Some(text) = written.strip_prefix('*') {
        StringMatch::Suffix(text.to_owned())
    } else if let Some(text) = written.strip_suffix('*') {
        StringMatch::Prefix(text.to_owned())
    } else {
        StringMatch::Exact(written.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::glob;

    #[test]
    fn a_star_is_any_run_of_characters() {
        for (pattern, text, wanted) in [
            ("a*b", "ab", true),
            ("a*b", "axxb", true),
            ("a*b", "axxbc", false),
            ("a*b*", "axbx", true),
            ("*a*a*", "a", false),
            ("*a*a*", "xaya", true),
            ("ab*ba", "aba", false),
            ("*", "", true),
            ("**", "x", true),
            ("plain", "plain", true),
            ("plain", "plainer", false),
        ] {
            assert_eq!(glob(pattern, text), wanted, "{pattern} on {text}");
        }
    }
}
