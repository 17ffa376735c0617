//! What a compile has to say beside the tables: modes with their reasons, which policies act where, and what
//! is wrong.
//!
//! Invariant: nothing that is not enforced goes unnamed here.

use std::collections::BTreeMap;
use std::sync::Arc;

use thyra_datapath_abi::Mode;
use thyra_datapath_abi::tables::PolicyRef;

/// The kind of a policy object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PolicyKind {
    /// AuthorizationPolicy.
    Authorization,
    /// PeerAuthentication.
    PeerAuthentication,
    /// RequestAuthentication.
    RequestAuthentication,
}

impl PolicyKind {
    /// The kind as Kubernetes writes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Authorization => "AuthorizationPolicy",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::RequestAuthentication => "RequestAuthentication",
        }
    }
}

/// The last compile's report.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// By endpoint id.
    pub endpoints: BTreeMap<u16, EndpointReport>,
    /// By kind and name; every policy of the world is here.
    pub policies: BTreeMap<(PolicyKind, PolicyRef), PolicyReport>,
    /// What is wrong without being refused: contradicting addresses, Services that disagree, labels that
    /// can't be read.
    pub problems: Vec<String>,
}

impl Report {
    /// Sets what is wrong: each once, in order.
    pub(crate) fn set_problems(&mut self, mut problems: Vec<String>) {
        problems.sort();
        problems.dedup();
        self.problems = problems;
    }
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointReport {
    /// How its verdicts are carried out.
    pub mode: Mode,
    /// Where the mode comes from (`namespace label`, `ambient pod`, …).
    pub mode_reason: &'static str,
    /// AuthorizationPolicies that apply and are enforced or tried here (dry-run, CUSTOM), in deciding order.
    pub policies: Arc<[PolicyRef]>,
    /// PeerAuthentications that make up its mTLS mode: mesh, namespace, workload.
    pub peer_authentication: Vec<PolicyRef>,
    /// What selects it and is not enforced, with the reason.
    pub notes: Arc<[String]>,
}

/// One policy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyReport {
    /// Endpoints of this node that it applies to, ascending.
    pub endpoints: Vec<u16>,
    /// `enforced`, `no pod of this node`, `dry-run`, `not enforced here: …`, `not expressible: …`.
    pub status: String,
}
