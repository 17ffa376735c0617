//! Policies as the agent holds them, with what becomes of each here.
//!
//! Invariant: every policy that was told is listed, also those that can't be read.

use thyra_datapath_abi::tables::PolicyRef;
use thyra_policy_compiler::policy::{Labels, PolicyAction};
use thyra_policy_compiler::report::PolicyKind;
use thyra_proto::thyra::v1 as api;

use super::policy_json;
use crate::snapshot::Snapshot;

/// All policies, by kind and name.
#[must_use]
pub(super) fn list(snapshot: &Snapshot) -> api::ListPoliciesResponse {
    let world = &snapshot.held.world;
    let list = Listing { snapshot };
    let authorization = world.authorization.values().map(|p| {
        let mut entry = list.entry(PolicyKind::Authorization, &p.reference, p.selector.as_ref());
        entry.version.clone_from(&p.version);
        entry.action = action(p.action).to_owned();
        entry.dry_run = p.dry_run;
        entry.rules = u32::try_from(p.rules.len()).unwrap_or(u32::MAX);
        entry.json = policy_json::authorization(p).to_string();
        entry
    });
    let peer = world.peer_authentication.values().map(|p| {
        let mut entry = list.entry(PolicyKind::PeerAuthentication, &p.reference, p.selector.as_ref());
        entry.version.clone_from(&p.version);
        entry.action = policy_json::mode(p.mode).to_owned();
        entry.json = policy_json::peer(p).to_string();
        entry
    });
    let request = world.request_authentication.values().map(|p| {
        let mut entry = list.entry(
            PolicyKind::RequestAuthentication,
            &p.reference,
            p.selector.as_ref(),
        );
        entry.version.clone_from(&p.version);
        entry.rules = u32::try_from(p.rules.len()).unwrap_or(u32::MAX);
        entry.json = policy_json::request(p).to_string();
        entry
    });
    let unreadable = snapshot.held.unreadable.iter().map(|((kind, reference), why)| {
        let mut entry = list.entry(*kind, reference, None);
        entry.status = format!("refused: {why}");
        entry
    });
    let policies = authorization
        .chain(peer)
        .chain(request)
        .chain(unreadable)
        .collect();
    api::ListPoliciesResponse { policies }
}

struct Listing<'a> {
    snapshot: &'a Snapshot,
}

impl Listing<'_> {
    fn entry(&self, kind: PolicyKind, reference: &PolicyRef, selector: Option<&Labels>) -> api::Policy {
        let report = self.snapshot.report.policies.get(&(kind, reference.clone()));
        let root = *reference.namespace == *self.snapshot.held.world.mesh.root_namespace;
        let scope = match selector {
            Some(_) => "workload",
            None if root => "mesh",
            None => "namespace",
        };
        api::Policy {
            kind: kind.name().to_owned(),
            namespace: reference.namespace.to_string(),
            name: reference.name.to_string(),
            scope: scope.to_owned(),
            status: report.map_or_else(|| "not compiled yet".to_owned(), |r| r.status.clone()),
            endpoints: report.map_or_else(Vec::new, |r| r.endpoints.iter().map(|e| u32::from(*e)).collect()),
            generation: u64::from(self.snapshot.generation),
            ..api::Policy::default()
        }
    }
}

/// As in `spec.action`.
pub(super) fn action(action: PolicyAction) -> &'static str {
    match action {
        PolicyAction::Allow => "ALLOW",
        PolicyAction::Deny => "DENY",
        PolicyAction::Audit => "AUDIT",
        PolicyAction::Custom => "CUSTOM",
    }
}
