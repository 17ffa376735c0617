//! The report of a compile, but for its problems, which come together elsewhere.
//!
//! Invariant: every policy of the world has a line, enforced or not.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use thyra_datapath_abi::Mode;
use thyra_datapath_abi::tables::PolicyRef;

use super::Destination;
use super::scope::{Acting, Policies};
use crate::parse;
use crate::policy::{
    AuthorizationPolicy, L7Verdict, PeerAuthentication, PolicyAction, RequestAuthentication,
};
use crate::report::{EndpointReport, PolicyKind, PolicyReport, Report};
use crate::tokens::Keys;
use crate::world::World;

pub(super) fn report(
    world: &World,
    policies: &Policies,
    destinations: &[Destination<'_>],
    problems: &mut Vec<String>,
) -> Report {
    let mut report = Report::default();
    // Endpoints under the same policies share one list of them.
    let mut lists: FxHashMap<&[usize], Arc<[PolicyRef]>> = FxHashMap::default();
    let mut acting: Vec<Vec<u16>> = vec![Vec::new(); policies.all.len()];
    let mut peers: BTreeMap<&PolicyRef, Vec<u16>> = BTreeMap::new();
    let mut requests: BTreeMap<&PolicyRef, Vec<u16>> = BTreeMap::new();
    for destination in destinations {
        let id = destination.endpoint.id;
        if destination.enrolment.mode != Mode::Off {
            for at in &destination.scope.policies {
                acting[*at].push(id);
            }
            for reference in &destination.scope.peer_authentication {
                peers.entry(reference).or_default().push(id);
            }
            for reference in destination.scope.tokens.iter().flat_map(|t| &t.policies) {
                requests.entry(reference).or_default().push(id);
            }
        }
        let list = lists.entry(&destination.scope.policies).or_insert_with(|| {
            let named = destination.scope.policies.iter();
            named.map(|at| policies.all[*at].reference().clone()).collect()
        });
        report
            .endpoints
            .insert(id, endpoint(destination, Arc::clone(list)));
    }
    for (policy, endpoints) in policies.all.iter().zip(acting) {
        let status = match policy {
            Acting::Policy(policy) => authorization_status(policy, world, endpoints.is_empty(), problems),
            Acting::Unreadable(reference) => unreadable_status(world, reference),
        };
        let key = (PolicyKind::Authorization, policy.reference().clone());
        report
            .policies
            .entry(key)
            .and_modify(|known| known.status = format!("{}; {status}", known.status))
            .or_insert(PolicyReport { endpoints, status });
    }
    for policy in world.peer_authentication.values() {
        let endpoints = peers.remove(&policy.reference).unwrap_or_default();
        let status = peer_status(policy, world, endpoints.is_empty());
        report.policies.insert(
            (PolicyKind::PeerAuthentication, policy.reference.clone()),
            PolicyReport { endpoints, status },
        );
    }
    for policy in world.request_authentication.values() {
        let endpoints = requests.remove(&policy.reference).unwrap_or_default();
        let status = request_status(policy, endpoints.is_empty(), problems);
        report.policies.insert(
            (PolicyKind::RequestAuthentication, policy.reference.clone()),
            PolicyReport { endpoints, status },
        );
    }
    report
}

fn request_status(policy: &RequestAuthentication, nowhere: bool, problems: &mut Vec<String>) -> String {
    if policy.has_target_refs {
        return "not enforced here: targetRefs (a waypoint's or gateway's)".into();
    }
    if policy.rules.is_empty() && policy.unknown.is_empty() {
        return "it has no jwtRules: nothing is asked of tokens".into();
    }
    let mut refused: Vec<String> = policy
        .unknown
        .iter()
        .map(|term| format!("{} can't be carried out: no token is taken by it", term.0))
        .collect();
    for (index, rule) in policy.rules.iter().enumerate() {
        if let Keys::None(why) = &rule.keys {
            refused.push(format!(
                "spec.jwtRules[{index}]: {why}: tokens of issuer `{}` are refused",
                rule.issuer
            ));
        }
    }
    problems.extend(
        refused
            .iter()
            .map(|why| format!("RequestAuthentication {}: {why}", policy.reference)),
    );
    let mut status = standing(nowhere, "enforced").to_owned();
    for why in &refused {
        status += "; ";
        status += why;
    }
    status
}

fn endpoint(destination: &Destination<'_>, policies: Arc<[PolicyRef]>) -> EndpointReport {
    EndpointReport {
        mode: destination.enrolment.mode,
        mode_reason: destination.enrolment.reason,
        policies,
        peer_authentication: destination.scope.peer_authentication.clone(),
        notes: destination.scope.notes.iter().cloned().collect(),
    }
}

fn authorization_status(
    policy: &AuthorizationPolicy,
    world: &World,
    nowhere: bool,
    problems: &mut Vec<String>,
) -> String {
    if policy.has_target_refs {
        return "not enforced here: targetRefs (a waypoint's or gateway's)".into();
    }
    if policy.action == PolicyAction::Audit {
        return "not enforced here: AUDIT never changes a verdict".into();
    }
    let unknown = unknown_terms(policy);
    if !unknown.is_empty() {
        problems.push(format!(
            "policy {} holds terms that can't be expressed: {}",
            policy.reference,
            unknown.join(", ")
        ));
    }
    let mut status = standing(nowhere, if policy.dry_run { "dry-run" } else { "enforced" }).to_owned();
    if policy.action == PolicyAction::Custom {
        let provider = policy.provider.as_deref().unwrap_or("");
        match &world.mesh.provider(provider).authorizer {
            Ok(authorizer) => {
                status.push_str(&format!("; asks provider `{provider}` at {}", authorizer.target))
            }
            Err(why) => {
                let why = format!("provider `{provider}` can't be asked, what it matches is denied: {why}");
                problems.push(format!("policy {}: {why}", policy.reference));
                status.push_str(&format!("; {why}"));
            }
        }
    }
    match &policy.l7_verdict {
        L7Verdict::Request => {}
        L7Verdict::Connection => {
            status.push_str("; the first request decides for its connection where it can")
        }
        L7Verdict::Unread(word) => {
            let why = parse::unread(word);
            problems.push(format!("policy {}: {why}", policy.reference));
            status.push_str(&format!("; {why}"));
        }
    }
    if !unknown.is_empty() {
        status.push_str(&format!("; not expressible: {}", unknown.join(", ")));
    }
    status
}

fn unknown_terms(policy: &AuthorizationPolicy) -> Vec<&str> {
    let of_rules = policy.rules.iter().flat_map(|rule| {
        let from = rule.from.iter().flat_map(|source| &source.unknown);
        let to = rule.to.iter().flat_map(|operation| &operation.unknown);
        rule.unknown.iter().chain(from).chain(to)
    });
    policy
        .unknown
        .iter()
        .chain(of_rules)
        .map(|unknown| &*unknown.0)
        .collect()
}

fn unreadable_status(world: &World, reference: &PolicyRef) -> String {
    let why = world.unreadable.get(reference).map_or("", |why| &**why);
    format!("could not be read and counts as a DENY of everything in its scope: {why}")
}

fn peer_status(policy: &PeerAuthentication, world: &World, nowhere: bool) -> String {
    let of_root = *policy.reference.namespace == *world.mesh.root_namespace;
    let selects = policy.selector.as_ref().is_some_and(|labels| !labels.is_empty());
    if of_root && selects {
        "not enforced: a selector in the root namespace has no effect in Istio".into()
    } else {
        standing(nowhere, "enforced").into()
    }
}

/// What is `somewhere` where it applies to a pod.
fn standing(nowhere: bool, somewhere: &str) -> &str {
    if nowhere {
        "no enrolled pod of this node"
    } else {
        somewhere
    }
}
