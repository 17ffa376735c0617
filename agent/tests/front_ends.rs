//! The two exact front ends read alike: every policy of the test data, as YAML, and as istiod's raw types carry it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use thyra_agent::convert;
use thyra_policy_compiler::manifest::{self, Body, Object};
use thyra_proto::istio::mcp::v1alpha1::Metadata;
use thyra_proto::istio::security::v1beta1 as raw;
use thyra_proto::istio::r#type::v1beta1::{PolicyTargetReference, WorkloadSelector};

/// All folders of manifests in the test data.
fn folders() -> Vec<PathBuf> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata");
    let below = |folder: PathBuf| {
        std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
    };
    let mut folders: Vec<PathBuf> = below(data.join("policy")).filter(|path| path.is_dir()).collect();
    for scenario in below(data.join("lab")) {
        folders.extend(below(scenario).filter(|path| path.is_dir()));
    }
    folders
}

fn texts(value: &Value) -> Vec<String> {
    let items = value.as_array().into_iter().flatten();
    items
        .map(|item| item.as_str().expect("a string").to_owned())
        .collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn map(value: &Value) -> BTreeMap<String, String> {
    let entries = value.as_object().into_iter().flatten();
    entries.map(|(key, value)| (key.clone(), text(value))).collect()
}

fn metadata(object: &Object) -> Metadata {
    Metadata {
        name: format!("{}/{}", object.namespace, object.name),
        annotations: map(&object.raw["metadata"]["annotations"]),
        ..Metadata::default()
    }
}

fn selector(spec: &Value) -> Option<WorkloadSelector> {
    spec.get("selector")
        .filter(|s| !s.is_null())
        .map(|selector| WorkloadSelector {
            match_labels: map(&selector["matchLabels"]),
        })
}

fn target(value: &Value) -> PolicyTargetReference {
    PolicyTargetReference {
        group: text(&value["group"]),
        kind: text(&value["kind"]),
        name: text(&value["name"]),
        namespace: text(&value["namespace"]),
    }
}

fn source(value: &Value) -> raw::Source {
    raw::Source {
        principals: texts(&value["principals"]),
        not_principals: texts(&value["notPrincipals"]),
        request_principals: texts(&value["requestPrincipals"]),
        not_request_principals: texts(&value["notRequestPrincipals"]),
        namespaces: texts(&value["namespaces"]),
        not_namespaces: texts(&value["notNamespaces"]),
        ip_blocks: texts(&value["ipBlocks"]),
        not_ip_blocks: texts(&value["notIpBlocks"]),
        remote_ip_blocks: texts(&value["remoteIpBlocks"]),
        not_remote_ip_blocks: texts(&value["notRemoteIpBlocks"]),
        service_accounts: texts(&value["serviceAccounts"]),
        not_service_accounts: texts(&value["notServiceAccounts"]),
        trust_domains: texts(&value["trustDomains"]),
        not_trust_domains: texts(&value["notTrustDomains"]),
    }
}

fn operation(value: &Value) -> raw::Operation {
    raw::Operation {
        hosts: texts(&value["hosts"]),
        not_hosts: texts(&value["notHosts"]),
        ports: texts(&value["ports"]),
        not_ports: texts(&value["notPorts"]),
        methods: texts(&value["methods"]),
        not_methods: texts(&value["notMethods"]),
        paths: texts(&value["paths"]),
        not_paths: texts(&value["notPaths"]),
    }
}

fn rule(value: &Value) -> raw::Rule {
    let from = items(&value["from"]).map(|from| raw::rule::From {
        source: from.get("source").map(source),
    });
    let to = items(&value["to"]).map(|to| raw::rule::To {
        operation: to.get("operation").map(operation),
    });
    let when = items(&value["when"]).map(|when| raw::Condition {
        key: text(&when["key"]),
        values: texts(&when["values"]),
        not_values: texts(&when["notValues"]),
    });
    raw::Rule {
        from: from.collect(),
        to: to.collect(),
        when: when.collect(),
    }
}

fn authorization(spec: &Value) -> raw::AuthorizationPolicy {
    let action = match spec["action"].as_str() {
        None | Some("" | "ALLOW") => 0,
        Some("DENY") => 1,
        Some("AUDIT") => 2,
        Some("CUSTOM") => 3,
        Some(other) => panic!("{other}"),
    };
    let provider = spec.get("provider").map(|provider| {
        raw::authorization_policy::ActionDetail::Provider(raw::authorization_policy::ExtensionProvider {
            name: text(&provider["name"]),
        })
    });
    raw::AuthorizationPolicy {
        selector: selector(spec),
        target_ref: spec.get("targetRef").map(target),
        target_refs: items(&spec["targetRefs"]).map(target).collect(),
        rules: items(&spec["rules"]).map(rule).collect(),
        action,
        action_detail: provider,
    }
}

fn mtls(value: &Value) -> raw::peer_authentication::MutualTls {
    let mode = match value["mode"].as_str() {
        None | Some("" | "UNSET") => 0,
        Some("DISABLE") => 1,
        Some("PERMISSIVE") => 2,
        Some("STRICT") => 3,
        Some(other) => panic!("{other}"),
    };
    raw::peer_authentication::MutualTls { mode }
}

fn peer(spec: &Value) -> raw::PeerAuthentication {
    let ports = spec["portLevelMtls"].as_object().into_iter().flatten();
    raw::PeerAuthentication {
        selector: selector(spec),
        mtls: spec.get("mtls").map(mtls),
        port_level_mtls: ports
            .map(|(port, value)| (port.parse().unwrap(), mtls(value)))
            .collect(),
    }
}

#[test]
fn yaml_and_the_raw_types_read_alike() {
    let mut counts = [0, 0];
    for folder in folders() {
        // Folders of other things hold no manifests.
        let Ok(manifests) = manifest::read_dir(&folder) else {
            continue;
        };
        for object in &manifests.objects {
            let told = format!("{}: {}/{}", folder.display(), object.namespace, object.name);
            let spec = &object.raw["spec"];
            match &object.body {
                Body::AuthorizationPolicy(policy) => {
                    let converted =
                        convert::policy::authorization(metadata(object), authorization(spec), &[]);
                    let converted = converted.unwrap_or_else(|error| panic!("{told}: {error}"));
                    assert_eq!(converted, *policy, "{told}");
                    counts[0] += 1;
                }
                Body::PeerAuthentication(policy) => {
                    let converted = convert::peer::authentication(metadata(object), peer(spec), &[]).unwrap();
                    assert_eq!(converted, *policy, "{told}");
                    counts[1] += 1;
                }
                _ => {}
            }
        }
    }
    assert!(counts[0] > 120 && counts[1] > 5, "{counts:?}");
}
