//! An endpoint as a destination: what decides over it, whoever comes.
//!
//! Invariant: two destinations with equal profiles have equal policy sets.

use std::net::IpAddr;
use std::sync::Arc;

use thyra_datapath_abi::Mode;

use super::enrol::Enrolment;
use super::prepared::PreparedPolicy;
use super::protocol::Protocols;
use super::row::Outcome;
use super::scope::Scope;
use super::set::Profile;
use crate::world::{Bootstrap, Endpoint, World};

/// An endpoint with everything that decides over it but the sources.
pub(super) struct Destination<'a> {
    pub(super) endpoint: &'a Endpoint,
    pub(super) enrolment: Enrolment,
    pub(super) scope: Scope,
    pub(super) protocols: Protocols,
}

impl Destination<'_> {
    /// `namespace/pod`.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.endpoint.namespace, self.endpoint.name)
    }

    /// Whether policies decide over it.
    pub(super) fn is_judged(&self, world: &World) -> bool {
        world.synced && self.enrolment.mode != Mode::Off
    }

    /// What its policy set of one family depends on.
    pub(super) fn profile(
        &self,
        world: &World,
        prepared: &[Option<Arc<PreparedPolicy>>],
        family: fn(&IpAddr) -> bool,
    ) -> Profile {
        if self.enrolment.mode == Mode::Off {
            return Profile::Constant(Outcome::NotEnforced);
        }
        if !world.synced {
            return Profile::Constant(match world.node.bootstrap {
                Bootstrap::Deny => Outcome::Bootstrap,
                Bootstrap::Allow => Outcome::BootstrapAllow,
            });
        }
        let asks = self
            .scope
            .policies
            .iter()
            .filter_map(|at| prepared[*at].as_ref())
            .any(|policy| policy.asks_destination());
        let address = || self.endpoint.addresses.iter().find(|address| family(address));
        Profile::Judged {
            policies: self.scope.policies.clone(),
            strict: self.scope.strict.clone(),
            own_proxy: self.enrolment.own_proxy,
            tokens: self.scope.tokens.clone(),
            exempt: self.enrolment.exempt.clone(),
            protocols: self.protocols.clone(),
            destination: if asks { address().copied() } else { None },
        }
    }
}
