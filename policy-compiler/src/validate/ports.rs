//! Ports: the Service's where the pod's is meant, and HTTP fields where no HTTP is.

use std::collections::BTreeSet;

use thyra_datapath_abi::tables::PolicyRef;

use super::Check;
use crate::finding::Code;
use crate::manifest::object::{Pod, ServicePort};
use crate::policy::{AuthorizationPolicy, Condition, Labels, Operation, Rule, Source};
use crate::world::AppProtocol;

/// A policy's name and selector.
type Whom<'a> = (&'a PolicyRef, Option<&'a Labels>);

impl Check<'_> {
    pub(super) fn ports(&mut self, path: &str, policy: &AuthorizationPolicy, rule: &Rule) {
        let whom = (&policy.reference, policy.selector.as_ref());
        for (at, operation) in rule.to.iter().enumerate() {
            let path = format!("{path}.to[{at}].operation");
            let lists = [
                ("ports", &operation.ports.values),
                ("notPorts", &operation.ports.not_values),
            ];
            for (name, ports) in lists {
                for (at, port) in ports.iter().enumerate() {
                    self.pod_port(&format!("{path}.{name}[{at}]"), whom, *port);
                }
            }
            if let Some(field) = http_field(rule, operation) {
                for (at, port) in operation.ports.values.iter().enumerate() {
                    self.http_port(&format!("{path}.ports[{at}]"), whom, *port, field);
                }
            }
        }
        for (at, condition) in rule.when.iter().enumerate() {
            if let Condition::DestinationPort(field) = condition {
                for (index, port) in field.values.iter().enumerate() {
                    self.pod_port(&format!("{path}.when[{at}].values[{index}]"), whom, *port);
                }
            }
        }
    }

    /// A port that no selected pod has, though one of their Services does.
    pub(super) fn pod_port(&mut self, path: &str, (policy, selector): Whom<'_>, port: u16) {
        let mut meant = BTreeSet::new();
        for pod in self.facts.selected(policy, selector) {
            if declares(pod, port) {
                return;
            }
            for service in self.facts.services_of(pod) {
                for behind in &service.ports {
                    match behind.target.port_of(pod, behind.transport) {
                        Some(target) if target == port => return,
                        Some(target) if behind.port == port => {
                            meant.insert((format!("{}/{}", service.namespace, service.name), target));
                        }
                        _ => {}
                    }
                }
            }
        }
        if let Some((service, target)) = meant.first() {
            let text = format!(
                "{port} is the port of Service {service}; policies see the pod's own, which is {target}; write {target}"
            );
            self.find(path, Code::ServicePort, text);
        }
    }

    /// A port that is declared TCP wherever it is declared.
    fn http_port(&mut self, path: &str, (policy, selector): Whom<'_>, port: u16, field: &str) {
        let mut declared = Vec::new();
        for pod in self.facts.selected(policy, selector) {
            let ports = self.facts.services_of(pod).flat_map(|service| &service.ports);
            let reaches = |p: &&ServicePort| p.target.port_of(pod, p.transport) == Some(port);
            declared.extend(ports.filter(reaches).map(|p| p.protocol));
        }
        let no_http = |protocol: &AppProtocol| matches!(protocol, AppProtocol::NotHttp | AppProtocol::Tls);
        if !declared.is_empty() && declared.iter().all(no_http) {
            let text = format!(
                "port {port} is declared to carry no HTTP, so `{field}` is not read there: ALLOW never matches, DENY \
                 matches without it; declare the Service's port `http`, or remove `{field}`"
            );
            self.find(path, Code::HttpOnTcp, text);
        }
    }
}

fn declares(pod: &Pod, port: u16) -> bool {
    let ports = pod.containers.iter().flat_map(|container| &container.ports);
    ports.into_iter().any(|declared| declared.port == port)
}

/// A field that only a request has, in this operation or in the rule around it.
fn http_field<'r>(rule: &'r Rule, operation: &Operation) -> Option<&'r str> {
    let of_operation = [
        ("hosts", operation.hosts.is_empty()),
        ("methods", operation.methods.is_empty()),
        ("paths", operation.paths.is_empty()),
    ];
    let of_source = |source: &Source| !source.request_principals.is_empty();
    let of_condition = rule.when.iter().find_map(|condition| match condition {
        Condition::Request { key, .. } => Some(key.as_str()),
        _ => None,
    });
    of_operation
        .into_iter()
        .find_map(|(name, is_empty)| (!is_empty).then_some(name))
        .or_else(|| rule.from.iter().any(of_source).then_some("requestPrincipals"))
        .or(of_condition)
}
