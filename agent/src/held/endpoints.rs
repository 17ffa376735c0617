//! The endpoints that follow from registrations, from this node's pods and from namespaces.
//!
//! Invariant: addresses are the registration's word always; the rest is the API server's where it tells the
//! pod.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use thyra_policy_compiler::policy::{AuthorizationPolicy, L7Verdict, Labels, PolicyAction, Rule, Unknown};
use thyra_policy_compiler::world::{Endpoint, Workload};

use super::{Held, put};
use crate::change::Topic;
use crate::convert::{self, authorization};
use crate::registration::Registration;

/// Marks the stand-in for a policy that a workload lists and that has not arrived.
const AWAITED_VERSION: &str = "thyra-awaited";

impl Held {
    /// The API server's namespaces where it is asked, else what registrations say.
    pub(super) fn derive_namespaces(&mut self) {
        let labels = if self.basis.awaited.contains(&Topic::Namespaces) {
            self.namespaces
                .iter()
                .map(|(name, n)| (name.clone(), n.labels.clone()))
                .collect()
        } else {
            let mut told: BTreeMap<String, Labels> = self
                .namespaces
                .iter()
                .map(|(name, n)| (name.clone(), n.labels.clone()))
                .collect();
            let registered = self.registrations.values();
            told.extend(registered.filter_map(|r| Some((r.namespace.clone(), r.namespace_labels()?))));
            told
        };
        self.world.namespaces = labels;
    }

    pub(super) fn derive_endpoints(&mut self) {
        self.world
            .endpoints
            .retain(|id, _| self.registrations.contains_key(id));
        let listed = if self.basis.listed_policies {
            self.listed()
        } else {
            BTreeMap::new()
        };
        for (id, registration) in &self.registrations {
            let mut endpoint = self.endpoint(*id, registration);
            if let Some(policies) = listed.get(id) {
                let marks = policies
                    .iter()
                    .map(|p| (authorization::mark(p), authorization::LISTED.to_owned()));
                endpoint.labels.extend(marks);
            }
            put(&mut self.world.endpoints, *id, Arc::new(endpoint));
        }
        if self.basis.listed_policies {
            self.derive_awaited(listed.values().flatten());
        }
    }

    fn endpoint(&self, id: u16, registration: &Registration) -> Endpoint {
        let pod = self
            .pods
            .get(&(registration.namespace.clone(), registration.name.clone()));
        let (labels, annotations, service_account, containers) = match pod {
            Some(p) => (&p.labels, &p.annotations, &p.service_account, &p.containers),
            None => {
                let r = registration;
                (&r.labels, &r.annotations, &r.service_account, &r.containers)
            }
        };
        Endpoint {
            id,
            uid: registration.uid.clone(),
            namespace: registration.namespace.clone(),
            name: registration.name.clone(),
            service_account: service_account.clone(),
            addresses: registration.addresses.clone(),
            labels: labels.clone(),
            annotations: annotations.clone(),
            containers: containers.clone(),
        }
    }

    /// The policies that istiod lists for the workload at each endpoint's address.
    fn listed(&self) -> BTreeMap<u16, Vec<String>> {
        let mut owners: BTreeMap<IpAddr, &Workload> = BTreeMap::new();
        for workload in self.world.workloads.values().filter(|w| !w.host_network) {
            owners.extend(workload.addresses.iter().map(|a| (*a, workload.as_ref())));
        }
        let list = |r: &Registration| {
            let workload = r.addresses.iter().find_map(|a| owners.get(a))?;
            Some(workload.authorization_policies.clone())
        };
        self.registrations
            .iter()
            .filter_map(|(id, r)| Some((*id, list(r)?)))
            .collect()
    }

    /// A policy that a workload lists and that has not arrived denies whatever reaches that workload.
    fn derive_awaited<'a>(&mut self, listed: impl Iterator<Item = &'a String>) {
        let world = &mut self.world;
        let wanted: BTreeMap<_, _> = listed
            .filter_map(|p| Some((convert::reference(p).ok()?, p)))
            .collect();
        world
            .authorization
            .retain(|r, p| p.version != AWAITED_VERSION || wanted.contains_key(r));
        for (reference, key) in wanted {
            let stand_in = || {
                Arc::new(AuthorizationPolicy {
                    reference: reference.clone(),
                    version: AWAITED_VERSION.into(),
                    action: PolicyAction::Deny,
                    provider: None,
                    selector: Some(Labels::from([(
                        authorization::mark(key),
                        authorization::LISTED.to_owned(),
                    )])),
                    has_target_refs: false,
                    dry_run: false,
                    l7_verdict: L7Verdict::Request,
                    rules: vec![Rule {
                        unknown: vec![not_arrived()],
                        ..Rule::default()
                    }],
                    unknown: Vec::new(),
                })
            };
            world
                .authorization
                .entry(reference.clone())
                .or_insert_with(stand_in);
        }
    }
}

fn not_arrived() -> Unknown {
    Unknown(Arc::from("listed by istiod, has not arrived"))
}
