//! Policies in what is held.
//!
//! Invariant: a reference of one kind is either readable or unreadable, never both.

use std::collections::BTreeSet;
use std::sync::Arc;

use thyra_datapath_abi::tables::PolicyRef;
use thyra_policy_compiler::policy::{
    AuthorizationPolicy, PeerAuthentication, RequestAuthentication, Unknown,
};
use thyra_policy_compiler::report::PolicyKind;

use super::{Held, keep, put};

impl Held {
    pub(super) fn set_authorization(&mut self, policy: Arc<AuthorizationPolicy>) -> bool {
        let readable = self.forget_unreadable(PolicyKind::Authorization, &policy.reference);
        put(&mut self.world.authorization, policy.reference.clone(), policy) | readable
    }

    pub(super) fn set_peer(&mut self, policy: Arc<PeerAuthentication>) -> bool {
        let readable = self.forget_unreadable(PolicyKind::PeerAuthentication, &policy.reference);
        put(
            &mut self.world.peer_authentication,
            policy.reference.clone(),
            policy,
        ) | readable
    }

    pub(super) fn set_request(&mut self, policy: Arc<RequestAuthentication>) -> bool {
        let readable = self.forget_unreadable(PolicyKind::RequestAuthentication, &policy.reference);
        put(
            &mut self.world.request_authentication,
            policy.reference.clone(),
            policy,
        ) | readable
    }

    /// The old version of it goes: whether the first or the second version can't be read must not matter.
    pub(super) fn set_unreadable(&mut self, kind: PolicyKind, reference: PolicyRef, why: Arc<str>) -> bool {
        let held = self.forget(kind, &reference);
        if kind == PolicyKind::RequestAuthentication {
            // Whom it selects isn't known either: no token is taken by it wherever it may apply.
            let request = RequestAuthentication {
                reference: reference.clone(),
                version: String::new(),
                selector: None,
                has_target_refs: false,
                rules: Vec::new(),
                unknown: vec![Unknown(format!("the object ({why})").into())],
            };
            let world = &mut self.world.request_authentication;
            world.insert(reference.clone(), Arc::new(request));
        }
        let new = put(&mut self.unreadable, (kind, reference), why);
        self.derive_unreadable();
        held | new
    }

    pub(super) fn policy_gone(&mut self, kind: PolicyKind, reference: &PolicyRef) -> bool {
        let held = self.forget(kind, reference);
        self.forget_unreadable(kind, reference) | held
    }

    pub(super) fn only_policies(&mut self, kind: PolicyKind, left: &BTreeSet<PolicyRef>) -> bool {
        let before = self.unreadable.len();
        self.unreadable
            .retain(|(k, reference), _| *k != kind || left.contains(reference));
        let readable = self.unreadable.len() != before;
        self.derive_unreadable();
        let world = &mut self.world;
        readable
            | match kind {
                PolicyKind::Authorization => keep(&mut world.authorization, left),
                PolicyKind::PeerAuthentication => keep(&mut world.peer_authentication, left),
                PolicyKind::RequestAuthentication => keep(&mut world.request_authentication, left),
            }
    }

    fn forget(&mut self, kind: PolicyKind, reference: &PolicyRef) -> bool {
        let world = &mut self.world;
        match kind {
            PolicyKind::Authorization => world.authorization.remove(reference).is_some(),
            PolicyKind::PeerAuthentication => world.peer_authentication.remove(reference).is_some(),
            PolicyKind::RequestAuthentication => world.request_authentication.remove(reference).is_some(),
        }
    }

    fn forget_unreadable(&mut self, kind: PolicyKind, reference: &PolicyRef) -> bool {
        let was = self.unreadable.remove(&(kind, reference.clone())).is_some();
        if was {
            self.derive_unreadable();
        }
        was
    }

    /// A RequestAuthentication that can't be read takes no tokens (`set_unreadable`) and denies nothing else.
    fn derive_unreadable(&mut self) {
        let counts = self
            .unreadable
            .iter()
            .filter(|((kind, _), _)| *kind != PolicyKind::RequestAuthentication);
        self.world.unreadable = counts
            .map(|((_, reference), why)| (reference.clone(), why.clone()))
            .collect();
    }
}
