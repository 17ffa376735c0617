//! Rules that never match, and rules whose traffic another policy denies.

use super::Check;
use super::cover::{self, Cover, is_never};
use crate::finding::Code;
use crate::parse::principal_parts;
use crate::policy::{AuthorizationPolicy, Condition, Field, PolicyAction, Rule, StringMatch};

impl Check<'_> {
    pub(super) fn rules(&mut self, policy: &AuthorizationPolicy) {
        for (index, rule) in policy.rules.iter().enumerate() {
            let path = format!("spec.rules[{index}]");
            self.never(&path, policy, rule);
            self.shadow(&path, policy, rule);
        }
    }

    /// What contradicts itself inside a rule.
    fn never(&mut self, path: &str, policy: &AuthorizationPolicy, rule: &Rule) {
        if policy.action == PolicyAction::Allow
            && let Some(unknown) = rule.unknown.first()
        {
            let text = format!(
                "this ALLOW rule never matches: {} can't be expressed; remove the condition",
                unknown.0
            );
            self.find(path, Code::NeverMatches, text);
        }
        for (at, source) in rule.from.iter().enumerate() {
            let path = format!("{path}.from[{at}].source");
            self.contradiction(&path, "principals", &source.principals);
            self.contradiction(&path, "namespaces", &source.namespaces);
            self.contradiction(&path, "serviceAccounts", &source.service_accounts);
            self.contradiction(&path, "trustDomains", &source.trust_domains);
            self.contradiction(&path, "ipBlocks", &source.ip_blocks);
            self.contradiction(&path, "remoteIpBlocks", &source.remote_ip_blocks);
            self.contradiction(&path, "requestPrincipals", &source.request_principals);
            if namespaces_refuse(&source.principals, &source.namespaces) {
                let text =
                    "no principal listed is of a namespace listed, and both must match; correct one of them";
                self.find(&path, Code::NeverMatches, text.into());
            }
        }
        for (at, operation) in rule.to.iter().enumerate() {
            let path = format!("{path}.to[{at}].operation");
            self.contradiction(&path, "ports", &operation.ports);
            self.contradiction(&path, "hosts", &operation.hosts);
            self.contradiction(&path, "methods", &operation.methods);
            self.contradiction(&path, "paths", &operation.paths);
        }
        self.conditions(path, rule);
    }

    fn conditions(&mut self, path: &str, rule: &Rule) {
        for (at, condition) in rule.when.iter().enumerate() {
            let path = format!("{path}.when[{at}]");
            match condition {
                Condition::SourceIp(f) | Condition::RemoteIp(f) | Condition::DestinationIp(f) => {
                    self.contradiction(&path, "values", f);
                }
                Condition::SourceNamespace(f)
                | Condition::SourcePrincipal(f)
                | Condition::SourceTrustDomain(f)
                | Condition::Sni(f)
                | Condition::Request { values: f, .. } => self.contradiction(&path, "values", f),
                Condition::SourceServiceAccount(f) => self.contradiction(&path, "values", f),
                Condition::DestinationPort(f) => {
                    self.contradiction(&path, "values", f);
                    self.other_ports(&path, rule, f);
                }
            }
        }
    }

    /// `destination.port` against the ports of all operations.
    fn other_ports(&mut self, path: &str, rule: &Rule, condition: &Field<u16>) {
        let refuses = |ports: &Field<u16>| {
            !ports.values.is_empty()
                && !condition.values.is_empty()
                && ports.values.iter().all(|port| !condition.values.contains(port))
        };
        if !rule.to.is_empty() && rule.to.iter().all(|operation| refuses(&operation.ports)) {
            let text =
                "no port listed here is one of the rule's `to`, and both must match; correct one of them";
            self.find(path, Code::NeverMatches, text.into());
        }
    }

    fn contradiction<T: Cover>(&mut self, path: &str, name: &str, field: &Field<T>) {
        if is_never(field) {
            let not = match name {
                "values" => "notValues".to_owned(),
                _ => format!("not{}{}", name[..1].to_uppercase(), &name[1..]),
            };
            let text = format!("`{not}` takes away all of `{name}`, so nothing matches; remove one of them");
            self.find(&format!("{path}.{name}"), Code::NeverMatches, text);
        }
    }

    /// A DENY policy that applies wherever this one does and denies all that the rule allows.
    fn shadow(&mut self, path: &str, policy: &AuthorizationPolicy, rule: &Rule) {
        if policy.action != PolicyAction::Allow {
            return;
        }
        let reaches = |deny: &&AuthorizationPolicy| {
            let selects = match (&deny.selector, &policy.selector) {
                (None, _) => true,
                (Some(wide), Some(narrow)) => wide.iter().all(|(key, value)| narrow.get(key) == Some(value)),
                (Some(wide), None) => wide.is_empty(),
            };
            deny.action == PolicyAction::Deny
                && !deny.dry_run
                && !deny.has_target_refs
                && selects
                && self.facts.reaches(&deny.reference, &policy.reference)
        };
        let shadow = self
            .facts
            .policies
            .iter()
            .copied()
            .filter(reaches)
            .find_map(|deny| {
                let index = deny.rules.iter().position(|wide| cover::rule(wide, rule))?;
                Some((deny, index))
            });
        if let Some((deny, index)) = shadow {
            let text = format!(
                "DENY {}/{}#{index} denies everything that this rule allows; narrow that, or remove this",
                deny.reference.namespace, deny.reference.name
            );
            self.find(path, Code::Shadowed, text);
        }
    }
}

/// Whether each principal names its namespace, and none of those is among the namespaces.
fn namespaces_refuse(principals: &Field<StringMatch>, namespaces: &Field<StringMatch>) -> bool {
    let namespace = |principal: &StringMatch| match principal {
        StringMatch::Exact(text) => principal_parts(text).map(|(_, namespace, _)| namespace.to_owned()),
        _ => None,
    };
    let refused = |principal: &StringMatch| {
        namespace(principal).is_some_and(|name| {
            let name = StringMatch::Exact(name);
            namespaces.values.iter().all(|value| value.excludes(&name))
        })
    };
    !principals.values.is_empty() && !namespaces.values.is_empty() && principals.values.iter().all(refused)
}
