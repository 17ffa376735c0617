//! Namespaces, service accounts and trust domains that aren't there.

use super::Check;
use crate::finding::Code;
use crate::parse::principal_parts;
use crate::policy::{Condition, Rule, ServiceAccountRef, StringMatch};

impl Check<'_> {
    pub(super) fn names(&mut self, path: &str, rule: &Rule) {
        for (at, source) in rule.from.iter().enumerate() {
            let path = format!("{path}.from[{at}].source");
            self.principals(&format!("{path}.principals"), &source.principals.values);
            self.principals(&format!("{path}.notPrincipals"), &source.principals.not_values);
            self.namespaces(&format!("{path}.namespaces"), &source.namespaces.values);
            self.namespaces(&format!("{path}.notNamespaces"), &source.namespaces.not_values);
            self.accounts(
                &format!("{path}.serviceAccounts"),
                &source.service_accounts.values,
            );
            self.accounts(
                &format!("{path}.notServiceAccounts"),
                &source.service_accounts.not_values,
            );
            self.trust_domains(&format!("{path}.trustDomains"), &source.trust_domains.values);
            self.trust_domains(
                &format!("{path}.notTrustDomains"),
                &source.trust_domains.not_values,
            );
        }
        for (at, condition) in rule.when.iter().enumerate() {
            let (values, not) = (
                format!("{path}.when[{at}].values"),
                format!("{path}.when[{at}].notValues"),
            );
            match condition {
                Condition::SourcePrincipal(field) => {
                    self.principals(&values, &field.values);
                    self.principals(&not, &field.not_values);
                }
                Condition::SourceNamespace(field) => {
                    self.namespaces(&values, &field.values);
                    self.namespaces(&not, &field.not_values);
                }
                Condition::SourceServiceAccount(field) => {
                    self.accounts(&values, &field.values);
                    self.accounts(&not, &field.not_values);
                }
                Condition::SourceTrustDomain(field) => {
                    self.trust_domains(&values, &field.values);
                    self.trust_domains(&not, &field.not_values);
                }
                _ => {}
            }
        }
    }

    fn principals(&mut self, path: &str, values: &[StringMatch]) {
        for (at, value) in values.iter().enumerate() {
            if let StringMatch::Exact(text) = value
                && let Some((domain, namespace, account)) = principal_parts(text)
            {
                let path = format!("{path}[{at}]");
                self.trust_domain(&path, domain);
                self.account(&path, namespace, account);
            }
        }
    }

    fn namespaces(&mut self, path: &str, values: &[StringMatch]) {
        for (at, value) in values.iter().enumerate() {
            if let StringMatch::Exact(name) = value {
                self.namespace(&format!("{path}[{at}]"), name);
            }
        }
    }

    fn accounts(&mut self, path: &str, values: &[ServiceAccountRef]) {
        for (at, value) in values.iter().enumerate() {
            self.account(&format!("{path}[{at}]"), &value.namespace, &value.name);
        }
    }

    fn trust_domains(&mut self, path: &str, values: &[StringMatch]) {
        for (at, value) in values.iter().enumerate() {
            if let StringMatch::Exact(domain) = value {
                self.trust_domain(&format!("{path}[{at}]"), domain);
            }
        }
    }

    /// Whether the namespace is there; `true` also where the files can't tell.
    fn namespace(&mut self, path: &str, name: &str) -> bool {
        if !self.facts.knows_names {
            let text = "namespaces and service accounts: no Namespace, ServiceAccount or pod among the files";
            self.report.unchecked.insert(text);
            return true;
        }
        let known = self.facts.namespaces.contains(name);
        if !known {
            let text =
                format!("there is no namespace `{name}` among the files; correct the name, or create it");
            self.find(path, Code::UnknownNamespace, text);
        }
        known
    }

    fn account(&mut self, path: &str, namespace: &str, name: &str) {
        // Kubernetes makes `default` in every namespace.
        if self.namespace(path, namespace)
            && self.facts.knows_names
            && name != "default"
            && !self.facts.accounts.contains(&(namespace, name))
        {
            let text = format!(
                "namespace `{namespace}` has no service account `{name}`, and no pod uses it; correct the name, or \
                 create it"
            );
            self.find(path, Code::UnknownServiceAccount, text);
        }
    }

    fn trust_domain(&mut self, path: &str, domain: &str) {
        let Some(mesh) = self.facts.mesh else {
            self.report
                .unchecked
                .insert("trust domains: no MeshConfig (ConfigMap istio-system/istio) among the files");
            return;
        };
        // `cluster.local` stands for the mesh's own, whatever that is (Istio's default).
        let known = domain == "cluster.local"
            || domain == mesh.trust_domain
            || mesh.trust_domain_aliases.iter().any(|alias| alias == domain);
        if !known {
            let text = format!(
                "the mesh's trust domain is `{}`, and `{domain}` is none of its aliases: only a workload of another \
                 mesh matches; correct it, or add it to `trustDomainAliases`",
                mesh.trust_domain
            );
            self.find(path, Code::UnknownTrustDomain, text);
        }
    }
}
