//! Which policies apply to an endpoint: scopes, selectors, and the three levels of PeerAuthentication.
//!
//! Invariant: policies come in deciding order (root namespace first, then name); one that selects the
//! endpoint and is not enforced leaves a note.

use std::collections::BTreeMap;
use std::sync::Arc;

use thyra_datapath_abi::tables::PolicyRef;

use crate::policy::{
    AuthorizationPolicy, Labels, MtlsMode, PeerAuthentication, PolicyAction, RequestAuthentication,
};
use crate::tokens::{JwtRule, Tokens};
use crate::world::{Endpoint, Workload, World};

/// What decides over one endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Scope {
    /// Indices into `Policies`, in deciding order.
    pub(crate) policies: Vec<usize>,
    /// STRICT ports.
    pub(crate) strict: Strict,
    /// Those of the three PeerAuthentications that exist: mesh, namespace, workload.
    pub(crate) peer_authentication: Vec<PolicyRef>,
    /// What its RequestAuthentications ask.
    pub(crate) tokens: Option<Arc<Tokens>>,
    pub(crate) notes: Vec<String>,
}

/// Why a port demands an identity.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Demand {
    pub(crate) policy: PolicyRef,
    /// It says STRICT in so many words, not by something that can't be read.
    pub(crate) plain: bool,
}

/// The ports that demand an identity.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Strict {
    everywhere: Option<Demand>,
    ports: BTreeMap<u16, Option<Demand>>,
}

impl Strict {
    /// `None` as port: any that is not named.
    pub(crate) fn at(&self, port: Option<u16>) -> Option<&Demand> {
        port.and_then(|port| self.ports.get(&port))
            .unwrap_or(&self.everywhere)
            .as_ref()
    }

    pub(crate) fn ports(&self) -> impl Iterator<Item = u16> + '_ {
        self.ports.keys().copied()
    }
}

/// A policy that takes part in verdicts, or one that could not be read.
#[derive(Clone, Debug)]
pub(crate) enum Acting {
    Policy(Arc<AuthorizationPolicy>),
    Unreadable(PolicyRef),
}

impl Acting {
    pub(crate) fn reference(&self) -> &PolicyRef {
        match self {
            Self::Policy(policy) => &policy.reference,
            Self::Unreadable(reference) => reference,
        }
    }
}

/// All policies that may take part, by name.
#[derive(Debug, Default)]
pub(crate) struct Policies {
    pub(crate) all: Vec<Acting>,
    by_namespace: BTreeMap<Arc<str>, Vec<usize>>,
}

impl Policies {
    pub(crate) fn of(world: &World) -> Self {
        let mut all: Vec<Acting> = world
            .authorization
            .values()
            .map(|policy| Acting::Policy(Arc::clone(policy)))
            .chain(world.unreadable.keys().cloned().map(Acting::Unreadable))
            .collect();
        all.sort_by_cached_key(|acting| (acting.reference().clone(), matches!(acting, Acting::Policy(_))));
        let mut by_namespace: BTreeMap<Arc<str>, Vec<usize>> = BTreeMap::new();
        for (at, acting) in all.iter().enumerate() {
            by_namespace
                .entry(Arc::clone(&acting.reference().namespace))
                .or_default()
                .push(at);
        }
        Self { all, by_namespace }
    }

    /// Those whose scope reaches `namespace`, in deciding order: root namespace first, then by name.
    fn candidates<'a>(&'a self, root: &'a str, namespace: &'a str) -> impl Iterator<Item = usize> + 'a {
        let of = |namespace: &str| self.by_namespace.get(namespace).map_or(&[][..], Vec::as_slice);
        let own = if root == namespace { &[][..] } else { of(namespace) };
        of(root).iter().chain(own).copied()
    }
}

pub(crate) fn scope(world: &World, policies: &Policies, endpoint: &Endpoint) -> Scope {
    let mut applied = Vec::new();
    let mut notes = Vec::new();
    for at in policies.candidates(&world.mesh.root_namespace, &endpoint.namespace) {
        let policy = match &policies.all[at] {
            Acting::Unreadable(_) => {
                applied.push(at);
                continue;
            }
            Acting::Policy(policy) => policy,
        };
        if policy.has_target_refs {
            notes.push(format!(
                "{}: not enforced here: targetRefs (a waypoint's or gateway's)",
                policy.reference
            ));
        } else if !selects(policy.selector.as_ref(), &endpoint.labels) {
        } else if policy.action == PolicyAction::Audit {
            notes.push(format!(
                "{}: not enforced here: AUDIT never changes a verdict",
                policy.reference
            ));
        } else {
            applied.push(at);
        }
    }
    let tokens = tokens(world, endpoint, &mut notes);
    let (strict, peer_authentication) = strict(world, endpoint, &mut notes);
    Scope {
        policies: applied,
        strict,
        peer_authentication,
        tokens: tokens.map(Arc::new),
        notes,
    }
}

/// The rules of all RequestAuthentications that select the pod, as istiod joins them: none comes before another.
fn tokens(world: &World, endpoint: &Endpoint, notes: &mut Vec<String>) -> Option<Tokens> {
    let root = world.mesh.root_namespace.as_str();
    let (mut policies, mut rules) = (Vec::new(), Vec::new());
    let reaches = |of: &RequestAuthentication, namespace: &str| {
        *of.reference.namespace == *namespace && selects(of.selector.as_ref(), &endpoint.labels)
    };
    let own = (endpoint.namespace != root).then_some(endpoint.namespace.as_str());
    for namespace in [root].into_iter().chain(own) {
        let all = world.request_authentication.values();
        for request in all.filter(|request| reaches(request, namespace)) {
            if request.has_target_refs {
                notes.push(format!(
                    "{}: RequestAuthentication not enforced here: targetRefs (a waypoint's or gateway's)",
                    request.reference
                ));
                continue;
            }
            let before = rules.len();
            rules.extend(request.rules.iter().cloned());
            rules.extend(request.unknown.first().map(|term| JwtRule::refusing(&*term.0)));
            if rules.len() > before {
                policies.push(request.reference.clone());
            }
        }
    }
    let tokens = Tokens::of(policies, rules)?;
    for issuer in tokens.repeated_issuers() {
        notes.push(format!(
            "issuer `{issuer}` has several jwtRules here: a token is taken if one of them takes it"
        ));
    }
    Some(tokens)
}

/// Policies that istiod lists for the pod's workload and that labels don't select here. Those that istiod
/// makes itself exist on the workload stream only.
pub(crate) fn cross_check(scope: &Scope, policies: &Policies, workload: &Workload) -> Vec<String> {
    let applied = |key: &str| {
        scope
            .policies
            .iter()
            .any(|at| policies.all[*at].reference().to_string() == key)
    };
    let listed = workload.authorization_policies.iter();
    listed
        .filter(|key| !key.contains("/istio_converted_") && !applied(key))
        .map(|key| format!("{key}: istiod lists it for this pod, what is held here doesn't select it"))
        .collect()
}

/// Whether a policy's selector, if it has one, selects a pod with these labels.
pub(crate) fn selects(selector: Option<&Labels>, labels: &Labels) -> bool {
    selector.is_none_or(|wanted| wanted.iter().all(|(key, value)| labels.get(key) == Some(value)))
}

/// The three levels, each by its oldest object; ports only from a workload's own.
fn strict(world: &World, endpoint: &Endpoint, notes: &mut Vec<String>) -> (Strict, Vec<PolicyRef>) {
    let root = world.mesh.root_namespace.as_str();
    let (mut mesh, mut namespace, mut workload) = (None, None, None);
    for policy in world.peer_authentication.values() {
        let of_root = *policy.reference.namespace == *root;
        let whole = policy.selector.as_ref().is_none_or(Labels::is_empty);
        if of_root && whole {
            oldest(&mut mesh, policy);
        } else if of_root {
            if selects(policy.selector.as_ref(), &endpoint.labels) {
                notes.push(format!(
                    "{}: PeerAuthentication not enforced: a selector in the root namespace has no effect \
                     in Istio",
                    policy.reference
                ));
            }
        } else if *policy.reference.namespace != *endpoint.namespace {
        } else if whole {
            oldest(&mut namespace, policy);
        } else if selects(policy.selector.as_ref(), &endpoint.labels) {
            oldest(&mut workload, policy);
        }
    }
    let mut strict = Strict::default();
    let levels: Vec<&Arc<PeerAuthentication>> = [mesh, namespace, workload].into_iter().flatten().collect();
    for policy in &levels {
        match policy.mode {
            _ if !policy.unknown.is_empty() => {
                strict.everywhere = Some(demand(policy, policy.mode == MtlsMode::Strict));
            }
            MtlsMode::Strict => strict.everywhere = Some(demand(policy, true)),
            MtlsMode::Permissive | MtlsMode::Disable => strict.everywhere = None,
            MtlsMode::Unset => {}
        }
    }
    if let Some(policy) = workload {
        for (port, mode) in &policy.ports {
            let demanded = match mode {
                MtlsMode::Unset => continue,
                MtlsMode::Strict => Some(demand(policy, true)),
                MtlsMode::Permissive | MtlsMode::Disable if policy.unknown.is_empty() => None,
                MtlsMode::Permissive | MtlsMode::Disable => Some(demand(policy, false)),
            };
            strict.ports.insert(*port, demanded);
        }
    }
    let references = levels.iter().map(|policy| policy.reference.clone()).collect();
    (strict, references)
}

fn demand(policy: &PeerAuthentication, plain: bool) -> Demand {
    Demand {
        policy: policy.reference.clone(),
        plain,
    }
}

fn oldest<'a>(best: &mut Option<&'a Arc<PeerAuthentication>>, policy: &'a Arc<PeerAuthentication>) {
    let age = |policy: &PeerAuthentication| (policy.created, policy.reference.name.clone());
    if best.is_none_or(|best| age(policy) < age(best)) {
        *best = Some(policy);
    }
}
