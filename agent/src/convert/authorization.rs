//! istiod's L4 `Authorization` to the model; lossy at istiod, exact here as far as the model goes.
//!
//! Invariant: a rule that the model can't say is an unknown term: matched in DENY, not matched in ALLOW. A
//! match without fields is what istiod leaves of an L7 field: matched in DENY, false in ALLOW.

use std::sync::Arc;

use ipnet::IpNet;
use thyra_policy_compiler::policy::{
    AuthorizationPolicy, Condition, Field, L7Verdict, Labels, Operation, PolicyAction, Rule,
    ServiceAccountRef, Source, StringMatch, Unknown,
};
use thyra_proto::istio::security as wire;
use thyra_proto::istio::workload::Extension;
use wire::string_match::MatchType;

use super::workload::{address, port_number};
use super::{ConvertError, reference};

/// Value of the mark below.
pub const LISTED: &str = "listed";

/// The label that an endpoint gets for each policy that istiod lists for its workload; it can't be a pod's
/// own, which has at most one `/`.
#[must_use]
pub fn mark(policy: &str) -> String {
    format!("thyra.io/authorization/{policy}")
}

/// An `Authorization`; `unknown` are the paths of fields that its protobuf type doesn't know.
///
/// # Errors
/// Names the field whose value can't be read.
pub fn authorization(
    message: wire::Authorization,
    root: &str,
    version: String,
    unknown: &[String],
) -> Result<AuthorizationPolicy, ConvertError> {
    let wire::Authorization {
        name,
        namespace,
        scope,
        action,
        rules,
        dry_run,
        extensions,
    } = message;
    let key = format!("{namespace}/{name}");
    let policy = reference(&key)?;
    let out_of_range = |field: &str, n: i32| ConvertError::Number {
        field: field.into(),
        value: i64::from(n),
    };
    let selector = match wire::Scope::try_from(scope).map_err(|_| out_of_range("scope", scope))? {
        wire::Scope::Global if namespace != root => {
            return Err(ConvertError::Scope {
                namespace,
                root: root.into(),
            });
        }
        wire::Scope::Global | wire::Scope::Namespace => None,
        wire::Scope::WorkloadSelector => Some(Labels::from([(mark(&key), LISTED.to_owned())])),
    };
    let action = match wire::Action::try_from(action).map_err(|_| out_of_range("action", action))? {
        wire::Action::Allow => PolicyAction::Allow,
        wire::Action::Deny => PolicyAction::Deny,
    };
    let rules = rules
        .into_iter()
        .enumerate()
        .map(|(i, wire::Rule { clauses })| rule(i, clauses, action))
        .collect::<Result<_, _>>()?;
    let named = |e: &Extension| format!("extension `{}`", e.name);
    let unknown = unknown.iter().cloned().chain(extensions.iter().map(named));
    Ok(AuthorizationPolicy {
        reference: policy,
        version,
        action,
        provider: None,
        selector,
        has_target_refs: false,
        dry_run,
        // istiod's form has no annotations.
        l7_verdict: L7Verdict::Request,
        rules,
        unknown: unknown.map(|u| Unknown(Arc::from(u))).collect(),
    })
}

/// AND over clauses: one of several matches on the source becomes `from`, one of several on the port becomes
/// `to`, a clause with a single match becomes conditions.
fn rule(index: usize, clauses: Vec<wire::Clause>, action: PolicyAction) -> Result<Rule, ConvertError> {
    let mut rule = Rule::default();
    for (i, wire::Clause { matches }) in clauses.into_iter().enumerate() {
        let at = format!("rules[{index}].clauses[{i}]");
        if matches.is_empty() {
            continue;
        }
        let mut terms = matches
            .into_iter()
            .map(|m| term(&at, m))
            .collect::<Result<Vec<_>, _>>()?;
        let extended = terms.iter().any(|t| t.extended);
        let empty = terms.iter().any(Term::is_empty);
        if empty && action == PolicyAction::Deny {
            continue;
        }
        terms.retain(|t| !t.is_empty());
        match terms.as_slice() {
            _ if extended => rule.unknown.push(Unknown(Arc::from(format!("{at} extension")))),
            [] => rule
                .unknown
                .push(Unknown(Arc::from(format!("{at}: no field of it is L4")))),
            [only] => rule.when.extend(only.conditions()),
            several if rule.from.is_empty() && several.iter().all(Term::is_source) => {
                rule.from = several.iter().map(|t| t.source.clone()).collect();
            }
            several if rule.to.is_empty() && several.iter().all(Term::is_port) => {
                rule.to = several.iter().map(Term::operation).collect();
            }
            _ => rule
                .unknown
                .push(Unknown(Arc::from(format!("{at}: this combination of matches")))),
        }
    }
    Ok(rule)
}

/// One match.
struct Term {
    source: Source,
    destinations: Field<IpNet>,
    ports: Field<u16>,
    extended: bool,
}

impl Term {
    fn is_empty(&self) -> bool {
        self.source == Source::default()
            && self.destinations.is_empty()
            && self.ports.is_empty()
            && !self.extended
    }

    fn is_source(&self) -> bool {
        self.destinations.is_empty() && self.ports.is_empty()
    }

    fn is_port(&self) -> bool {
        self.source == Source::default() && self.destinations.is_empty()
    }

    fn operation(&self) -> Operation {
        Operation {
            ports: self.ports.clone(),
            ..Default::default()
        }
    }

    fn conditions(&self) -> Vec<Condition> {
        let s = &self.source;
        let mut all = Vec::new();
        let mut add = |has: bool, condition: Condition| {
            if has {
                all.push(condition);
            }
        };
        add(
            !s.namespaces.is_empty(),
            Condition::SourceNamespace(s.namespaces.clone()),
        );
        add(
            !s.principals.is_empty(),
            Condition::SourcePrincipal(s.principals.clone()),
        );
        add(
            !s.service_accounts.is_empty(),
            Condition::SourceServiceAccount(s.service_accounts.clone()),
        );
        add(!s.ip_blocks.is_empty(), Condition::SourceIp(s.ip_blocks.clone()));
        add(
            !self.destinations.is_empty(),
            Condition::DestinationIp(self.destinations.clone()),
        );
        add(
            !self.ports.is_empty(),
            Condition::DestinationPort(self.ports.clone()),
        );
        all
    }
}

fn term(at: &str, message: wire::Match) -> Result<Term, ConvertError> {
    let wire::Match {
        namespaces,
        not_namespaces,
        principals,
        not_principals,
        source_ips,
        not_source_ips,
        destination_ips,
        not_destination_ips,
        destination_ports,
        not_destination_ports,
        service_accounts,
        not_service_accounts,
        extensions,
    } = message;
    let ports = |list: Vec<u32>| {
        list.into_iter()
            .map(|p| port_number("destination_ports", p))
            .collect::<Result<_, _>>()
    };
    Ok(Term {
        source: Source {
            principals: Field {
                values: strings(at, principals)?,
                not_values: strings(at, not_principals)?,
            },
            namespaces: Field {
                values: strings(at, namespaces)?,
                not_values: strings(at, not_namespaces)?,
            },
            service_accounts: Field {
                values: service_accounts.into_iter().map(account).collect(),
                not_values: not_service_accounts.into_iter().map(account).collect(),
            },
            ip_blocks: Field {
                values: blocks(source_ips)?,
                not_values: blocks(not_source_ips)?,
            },
            ..Source::default()
        },
        destinations: Field {
            values: blocks(destination_ips)?,
            not_values: blocks(not_destination_ips)?,
        },
        ports: Field {
            values: ports(destination_ports)?,
            not_values: ports(not_destination_ports)?,
        },
        extended: !extensions.is_empty(),
    })
}

fn strings(at: &str, list: Vec<wire::StringMatch>) -> Result<Vec<StringMatch>, ConvertError> {
    list.into_iter()
        .map(|wire::StringMatch { match_type }| match match_type {
            Some(MatchType::Exact(s)) => Ok(StringMatch::Exact(s)),
            Some(MatchType::Prefix(s)) => Ok(StringMatch::Prefix(s)),
            Some(MatchType::Suffix(s)) => Ok(StringMatch::Suffix(s)),
            Some(MatchType::Presence(())) => Ok(StringMatch::Present),
            None => Err(ConvertError::Value {
                field: format!("{at}: string match"),
                error: thyra_policy_compiler::parse::ValueError::Empty,
            }),
        })
        .collect()
}

fn account(message: wire::ServiceAccountMatch) -> ServiceAccountRef {
    let wire::ServiceAccountMatch {
        namespace,
        service_account,
    } = message;
    ServiceAccountRef {
        namespace,
        name: service_account,
    }
}

fn blocks(list: Vec<wire::Address>) -> Result<Vec<IpNet>, ConvertError> {
    list.into_iter().map(block).collect()
}

/// An IPv4-mapped block is the IPv4 block below it.
fn block(
    wire::Address {
        address: bytes,
        length,
    }: wire::Address,
) -> Result<IpNet, ConvertError> {
    let ip = address("address", &bytes)?;
    let wrong = || ConvertError::Number {
        field: "length".into(),
        value: i64::from(length),
    };
    let mapped = bytes.len() == 16 && ip.is_ipv4();
    let length = if mapped {
        length.checked_sub(96).ok_or_else(wrong)?
    } else {
        length
    };
    let prefix = u8::try_from(length).map_err(|_| wrong())?;
    IpNet::new(ip, prefix).map(|net| net.trunc()).map_err(|_| wrong())
}
