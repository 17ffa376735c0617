//! Policies made ready for evaluation, once for each object: identity tests interned, L7 fields as tests of a
//! residual.
//!
//! Invariant: every field of the model is taken over or named here (the structs are destructured whole), so
//! that a new field breaks the build instead of being no constraint.

use ipnet::IpNet;
use thyra_datapath_abi::tables::{PolicyRef, RuleRef};

use super::pattern::IdentityTest;
use super::slot::{Side, TestId, Tests};
use crate::policy::{
    AuthorizationPolicy, Condition, Field, L7Verdict, Operation, PolicyAction, Rule, Source, StringMatch,
};
use crate::residual::Test;
use crate::world::Mesh;

/// A rule with its identity tests interned; made once for each policy object.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) reference: RuleRef,
    /// The whole rule is unknown: its policy holds an unknown field, or could not be read.
    pub(crate) wholly_unknown: bool,
    pub(crate) unknown: bool,
    pub(crate) from: Vec<PreparedSource>,
    pub(crate) to: Vec<PreparedOperation>,
    pub(crate) when: Vec<PreparedCondition>,
}

#[derive(Debug)]
pub(crate) struct PreparedSource {
    pub(crate) tests: Vec<TestId>,
    pub(crate) ip: Field<IpNet>,
    pub(crate) remote_ip: Field<IpNet>,
    pub(crate) http: Vec<Test>,
    pub(crate) unknown: bool,
}

#[derive(Debug)]
pub(crate) struct PreparedOperation {
    pub(crate) ports: Field<u16>,
    /// It has HTTP fields, be they constant for every request.
    pub(crate) is_http: bool,
    /// No request meets it (`notMethods: ["*"]`).
    pub(crate) never_http: bool,
    /// What depends on the request.
    pub(crate) http: Vec<Test>,
    pub(crate) unknown: bool,
}

#[derive(Debug)]
pub(crate) enum PreparedCondition {
    Identity(TestId),
    Ip(Field<IpNet>),
    RemoteIp(Field<IpNet>),
    DestinationIp(Field<IpNet>),
    DestinationPort(Field<u16>),
    Sni(Test),
    Http(Test),
}

/// A prepared policy.
#[derive(Debug)]
pub(crate) struct PreparedPolicy {
    pub(crate) side: Side,
    pub(crate) custom: bool,
    pub(crate) dry_run: bool,
    /// The first request decides for its connection.
    pub(crate) by_connection: bool,
    pub(crate) rules: Vec<Prepared>,
}

impl PreparedPolicy {
    pub(crate) fn new(policy: &AuthorizationPolicy, mesh: &Mesh, tests: &mut Tests) -> Self {
        // Scope and name decide elsewhere.
        let AuthorizationPolicy {
            reference: policy_ref,
            version: _,
            action,
            provider: _,
            selector: _,
            has_target_refs: _,
            dry_run,
            l7_verdict,
            rules,
            unknown,
        } = policy;
        let broken = !unknown.is_empty();
        let reference = |rule| RuleRef {
            policy: policy_ref.clone(),
            rule,
        };
        let mut rules: Vec<Prepared> = rules
            .iter()
            .zip(0_u32..)
            .map(|(rule, index)| Prepared::new(reference(Some(index)), rule, broken, mesh, tests))
            .collect();
        if broken && rules.is_empty() {
            rules.push(Prepared::unreadable(reference(None)));
        }
        Self {
            side: if *action == PolicyAction::Allow {
                Side::Allow
            } else {
                Side::Deny
            },
            custom: *action == PolicyAction::Custom,
            dry_run: *dry_run,
            by_connection: *l7_verdict == L7Verdict::Connection,
            rules,
        }
    }

    /// A policy that could not be read counts as a DENY that holds everything.
    pub(crate) fn unreadable(policy: PolicyRef) -> Self {
        Self {
            side: Side::Deny,
            custom: false,
            dry_run: false,
            by_connection: false,
            rules: vec![Prepared::unreadable(RuleRef { policy, rule: None })],
        }
    }

    /// Every identity test in it.
    pub(crate) fn tests(&self) -> impl Iterator<Item = TestId> + '_ {
        self.rules.iter().flat_map(|rule| {
            let when = rule.when.iter().filter_map(|condition| match condition {
                PreparedCondition::Identity(test) => Some(*test),
                _ => None,
            });
            rule.from
                .iter()
                .flat_map(|source| source.tests.iter().copied())
                .chain(when)
        })
    }

    /// Every source block in it.
    pub(crate) fn blocks(&self) -> impl Iterator<Item = IpNet> + '_ {
        self.rules.iter().flat_map(|rule| {
            let from = rule
                .from
                .iter()
                .flat_map(|source| [&source.ip, &source.remote_ip]);
            let when = rule.when.iter().filter_map(|condition| match condition {
                PreparedCondition::Ip(field) | PreparedCondition::RemoteIp(field) => Some(field),
                _ => None,
            });
            from.chain(when)
                .flat_map(|field| field.values.iter().chain(&field.not_values))
                .map(IpNet::trunc)
        })
    }

    /// Every destination port in it.
    pub(crate) fn ports(&self) -> impl Iterator<Item = u16> + '_ {
        self.rules.iter().flat_map(Prepared::ports)
    }

    /// Whether the destination's own address matters.
    pub(crate) fn asks_destination(&self) -> bool {
        self.rules.iter().any(Prepared::asks_destination)
    }
}

impl Prepared {
    fn new(reference: RuleRef, rule: &Rule, broken: bool, mesh: &Mesh, tests: &mut Tests) -> Self {
        let Rule {
            from,
            to,
            when,
            unknown,
        } = rule;
        Self {
            reference,
            wholly_unknown: broken,
            unknown: !unknown.is_empty(),
            from: from
                .iter()
                .map(|source| PreparedSource::new(source, mesh, tests))
                .collect(),
            to: to.iter().map(PreparedOperation::new).collect(),
            when: when
                .iter()
                .filter_map(|condition| PreparedCondition::new(condition, mesh, tests))
                .collect(),
        }
    }

    /// Every destination port in it.
    pub(crate) fn ports(&self) -> impl Iterator<Item = u16> + '_ {
        let when = self.when.iter().filter_map(|condition| match condition {
            PreparedCondition::DestinationPort(field) => Some(field),
            _ => None,
        });
        let to = self.to.iter().map(|operation| &operation.ports);
        to.chain(when)
            .flat_map(|field| field.values.iter().chain(&field.not_values))
            .copied()
    }

    /// Whether the destination's own address matters.
    pub(crate) fn asks_destination(&self) -> bool {
        self.when
            .iter()
            .any(|condition| matches!(condition, PreparedCondition::DestinationIp(_)))
    }

    fn unreadable(reference: RuleRef) -> Self {
        Self {
            reference,
            wholly_unknown: true,
            unknown: true,
            from: Vec::new(),
            to: Vec::new(),
            when: Vec::new(),
        }
    }
}

impl PreparedSource {
    fn new(source: &Source, mesh: &Mesh, tests: &mut Tests) -> Self {
        let Source {
            principals,
            namespaces,
            service_accounts,
            trust_domains,
            ip_blocks,
            remote_ip_blocks,
            request_principals,
            unknown,
        } = source;
        let mut ids = Vec::new();
        if !principals.is_empty() {
            ids.push(tests.intern(IdentityTest::principals(principals, mesh)));
        }
        if !namespaces.is_empty() {
            ids.push(tests.intern(IdentityTest::namespaces(namespaces)));
        }
        if !service_accounts.is_empty() {
            ids.push(tests.intern(IdentityTest::service_accounts(service_accounts)));
        }
        if !trust_domains.is_empty() {
            ids.push(tests.intern(IdentityTest::trust_domains(trust_domains, mesh)));
        }
        Self {
            tests: ids,
            ip: ip_blocks.clone(),
            remote_ip: remote_ip_blocks.clone(),
            http: test(request_principals, Test::RequestPrincipal)
                .into_iter()
                .collect(),
            unknown: !unknown.is_empty(),
        }
    }
}

impl PreparedOperation {
    fn new(operation: &Operation) -> Self {
        let Operation {
            ports,
            hosts,
            methods,
            paths,
            unknown,
        } = operation;
        let any = |value: &StringMatch| *value == StringMatch::Present;
        // Every request has a host, a method and a path.
        let (hosts, no_host) = every(hosts, any);
        let (methods, no_method) = every(methods, any);
        let (paths, no_path) = every(paths, |path| path == "*");
        let tests = [
            test(&hosts, Test::Host),
            test(&methods, Test::Method),
            test(&paths, Test::Path),
        ];
        Self {
            ports: ports.clone(),
            is_http: !operation.hosts.is_empty()
                || !operation.methods.is_empty()
                || !operation.paths.is_empty(),
            never_http: no_host || no_method || no_path,
            http: tests.into_iter().flatten().collect(),
            unknown: !unknown.is_empty(),
        }
    }
}

impl PreparedCondition {
    /// `None` for a condition without values, which constrains nothing.
    fn new(condition: &Condition, mesh: &Mesh, tests: &mut Tests) -> Option<Self> {
        let mut identity =
            |empty: bool, test: IdentityTest| (!empty).then(|| Self::Identity(tests.intern(test)));
        match condition {
            Condition::SourceIp(field) => (!field.is_empty()).then(|| Self::Ip(field.clone())),
            Condition::RemoteIp(field) => (!field.is_empty()).then(|| Self::RemoteIp(field.clone())),
            Condition::SourceNamespace(field) => identity(field.is_empty(), IdentityTest::namespaces(field)),
            Condition::SourcePrincipal(field) => {
                identity(field.is_empty(), IdentityTest::principals(field, mesh))
            }
            Condition::SourceServiceAccount(field) => {
                identity(field.is_empty(), IdentityTest::service_accounts(field))
            }
            Condition::SourceTrustDomain(field) => {
                identity(field.is_empty(), IdentityTest::trust_domains(field, mesh))
            }
            Condition::DestinationIp(field) => {
                (!field.is_empty()).then(|| Self::DestinationIp(field.clone()))
            }
            Condition::DestinationPort(field) => {
                (!field.is_empty()).then(|| Self::DestinationPort(field.clone()))
            }
            Condition::Sni(field) => test(field, Test::Sni).map(Self::Sni),
            Condition::Request { key, values } => {
                test(values, |field| Test::Key(key.as_str().into(), field)).map(Self::Http)
            }
        }
    }
}

/// The test of a field; none where it is no constraint.
pub(super) fn test<T: Clone>(field: &Field<T>, test: impl FnOnce(Field<T>) -> Test) -> Option<Test> {
    (!field.is_empty()).then(|| test(field.clone()))
}

/// A field of an attribute that is never absent, without values that hold always; and whether it never holds.
fn every<T: Clone>(field: &Field<T>, is_any: impl Fn(&T) -> bool) -> (Field<T>, bool) {
    let mut field = field.clone();
    if field.values.iter().any(&is_any) {
        field.values.clear();
    }
    let never = field.not_values.iter().any(&is_any);
    (field, never)
}
