//! What the files hold beside the policies.

use std::collections::BTreeSet;

use thyra_datapath_abi::tables::PolicyRef;

use crate::compile::selects;
use crate::manifest::object::{Pod, Service};
use crate::manifest::{Body, Manifests};
use crate::policy::{AuthorizationPolicy, Labels};
use crate::world::Mesh;

/// The cluster, as far as the files tell.
pub(super) struct Facts<'a> {
    /// The MeshConfig, where there is one.
    pub(super) mesh: Option<&'a Mesh>,
    pub(super) pods: Vec<&'a Pod>,
    pub(super) services: Vec<&'a Service>,
    pub(super) policies: Vec<&'a AuthorizationPolicy>,
    /// Namespaces that are there, or that something lives in.
    pub(super) namespaces: BTreeSet<&'a str>,
    /// Namespace and name of service accounts that are there, or that a pod uses.
    pub(super) accounts: BTreeSet<(&'a str, &'a str)>,
    /// The files hold namespaces, service accounts or pods: what they don't hold isn't there.
    pub(super) knows_names: bool,
    default: Mesh,
}

impl<'a> Facts<'a> {
    pub(super) fn of(manifests: &'a Manifests) -> Self {
        let mut facts = Self {
            mesh: None,
            pods: manifests.pods().collect(),
            services: manifests.services().collect(),
            policies: Vec::new(),
            namespaces: BTreeSet::new(),
            accounts: BTreeSet::new(),
            knows_names: false,
            default: Mesh::default(),
        };
        for object in &manifests.objects {
            match &object.body {
                Body::MeshConfig(mesh) => facts.mesh = Some(mesh),
                Body::Namespace(_) => {
                    facts.namespaces.insert(&object.name);
                    facts.knows_names = true;
                }
                Body::ServiceAccount => {
                    facts.accounts.insert((&object.namespace, &object.name));
                    facts.namespaces.insert(&object.namespace);
                    facts.knows_names = true;
                }
                Body::AuthorizationPolicy(policy) => facts.policies.push(policy),
                _ => {}
            }
        }
        for pod in &facts.pods {
            facts.accounts.insert((&pod.namespace, &pod.service_account));
            facts.namespaces.insert(&pod.namespace);
            facts.knows_names = true;
        }
        facts
    }

    fn root(&self) -> &str {
        &self.mesh.unwrap_or(&self.default).root_namespace
    }

    /// Where a policy applies, in words.
    pub(super) fn scope(&self, policy: &PolicyRef) -> String {
        if &*policy.namespace == self.root() {
            "of any namespace".to_owned()
        } else {
            format!("of namespace `{}`", policy.namespace)
        }
    }

    /// Whether a policy of one namespace applies wherever one of the other does.
    pub(super) fn reaches(&self, wide: &PolicyRef, narrow: &PolicyRef) -> bool {
        &*wide.namespace == self.root() || wide.namespace == narrow.namespace
    }

    /// The pods that a policy selects.
    pub(super) fn selected(
        &self,
        policy: &PolicyRef,
        selector: Option<&Labels>,
    ) -> impl Iterator<Item = &'a Pod> {
        let everywhere = &*policy.namespace == self.root();
        self.pods.iter().copied().filter(move |pod| {
            (everywhere || pod.namespace == *policy.namespace) && selects(selector, &pod.labels)
        })
    }

    /// The Services that send to a pod.
    pub(super) fn services_of(&self, pod: &Pod) -> impl Iterator<Item = &'a Service> {
        self.services
            .iter()
            .copied()
            .filter(move |service| service.selects(pod))
    }
}
