//! What people most often get wrong in policies that istiod accepts.
//!
//! Invariant: a finding names a place and a mend, and is never raised on a guess: what the files don't hold is said to
//! be unchecked instead.

mod cover;
mod facts;
mod names;
mod ports;
mod rules;

use std::collections::BTreeSet;

use thyra_datapath_abi::tables::PolicyRef;

use self::facts::Facts;
use crate::finding::{Code, Finding};
use crate::manifest::{Body, Location, Manifests, Object};
use crate::policy::{AuthorizationPolicy, Labels, PeerAuthentication, PolicyAction};

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// In order of their places.
    pub findings: Vec<Finding>,
    /// What could not be checked, and which objects would be needed for it.
    pub unchecked: BTreeSet<&'static str>,
}

/// Looks at every policy of `manifests`, which were read without an error.
#[must_use]
pub fn validate(manifests: &Manifests) -> Report {
    let facts = Facts::of(manifests);
    let mut report = Report {
        findings: manifests.warnings.iter().cloned().map(Finding::from).collect(),
        unchecked: BTreeSet::new(),
    };
    for object in &manifests.objects {
        let mut check = Check {
            object,
            facts: &facts,
            report: &mut report,
        };
        match &object.body {
            Body::AuthorizationPolicy(policy) => check.authorization(policy),
            Body::PeerAuthentication(policy) => check.peer_authentication(policy),
            _ => {}
        }
    }
    report.findings.sort();
    report
}

/// The check of one policy.
struct Check<'a> {
    object: &'a Object,
    facts: &'a Facts<'a>,
    report: &'a mut Report,
}

impl Check<'_> {
    /// Something is amiss at a path of the policy.
    fn find(&mut self, path: &str, code: Code, text: String) {
        self.report.findings.push(Finding {
            at: Location {
                file: self.object.at.file.clone(),
                position: self.object.places.at(path),
            },
            code,
            object: format!("{}/{}", self.object.namespace, self.object.name),
            text,
        });
    }

    fn authorization(&mut self, policy: &AuthorizationPolicy) {
        if policy.has_target_refs {
            let text = "`targetRefs` are for waypoints and gateways: nothing is enforced here; use `selector` for pods";
            return self.find("spec", Code::TargetRefs, text.into());
        }
        self.effect(policy);
        self.selector(&policy.reference, policy.selector.as_ref());
        self.rules(policy);
        for (index, rule) in policy.rules.iter().enumerate() {
            let path = format!("spec.rules[{index}]");
            self.names(&path, rule);
            self.ports(&path, policy, rule);
        }
    }

    fn effect(&mut self, policy: &AuthorizationPolicy) {
        match policy.action {
            PolicyAction::Allow if policy.rules.is_empty() => {
                let text = "an ALLOW policy without rules allows nothing, and what no other policy allows is denied; \
                            write `rules: [{}]` to allow everything";
                self.find("spec", Code::AllowsNothing, text.into());
            }
            PolicyAction::Audit => {
                let text = "AUDIT never decides, and no audit plugin is served here; use ALLOW or DENY with the \
                            annotation `istio.io/dry-run` to see what a policy would do";
                self.find("spec.action", Code::Audit, text.into());
            }
            PolicyAction::Custom => self.provider(policy.provider.as_deref().unwrap_or_default()),
            PolicyAction::Allow | PolicyAction::Deny => {}
        }
    }

    fn provider(&mut self, provider: &str) {
        let Some(mesh) = self.facts.mesh else {
            self.report
                .unchecked
                .insert("extension providers: no MeshConfig (ConfigMap istio-system/istio) among the files");
            return;
        };
        let named = mesh.extension_providers.get(provider);
        if let Some(Err(why)) = named.map(|named| &named.authorizer) {
            let text = format!(
                "the extension provider `{provider}` can't be asked, so what the policy matches is denied: {why}"
            );
            self.find("spec.provider", Code::NoProvider, text);
        } else if named.is_none() {
            let text = format!(
                "the MeshConfig has no extension provider `{provider}`: every request that the policy matches is \
                 denied; add it to `extensionProviders`"
            );
            self.find("spec.provider", Code::NoProvider, text);
        }
    }

    fn selector(&mut self, policy: &PolicyRef, selector: Option<&Labels>) {
        let Some(selector) = selector else { return };
        if self.facts.pods.is_empty() {
            self.report
                .unchecked
                .insert("selectors and ports: no pods among the files");
        } else if self.facts.selected(policy, Some(selector)).next().is_none() {
            let labels: Vec<String> = selector
                .iter()
                .map(|(key, value)| format!("{key}={value}"))
                .collect();
            let text = format!(
                "no pod {} has the labels {}; correct the selector, or remove the policy",
                self.facts.scope(policy),
                labels.join(",")
            );
            self.find("spec.selector", Code::SelectsNothing, text);
        }
    }

    fn peer_authentication(&mut self, policy: &PeerAuthentication) {
        self.selector(&policy.reference, policy.selector.as_ref());
        for port in policy.ports.keys() {
            let path = format!("spec.portLevelMtls.{port}");
            self.pod_port(&path, (&policy.reference, policy.selector.as_ref()), *port);
        }
    }
}
