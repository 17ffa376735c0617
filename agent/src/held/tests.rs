//! What news makes of the world.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use thyra_policy_compiler::policy::PolicyAction;
use thyra_policy_compiler::world::{Service, WorkloadKind};

use super::*;
use crate::convert::authorization;
use crate::registration::NAMESPACE_LABELS;

fn registration(name: &str, address: &str) -> Registration {
    Registration {
        uid: format!("uid-{name}"),
        namespace: "shop".into(),
        name: name.into(),
        netns: String::new(),
        host_interface: format!("veth-{name}"),
        addresses: vec![address.parse().expect("an address")],
        mac: None,
        labels: BTreeMap::from([("app".to_owned(), "registered".to_owned())]),
        annotations: BTreeMap::from([(
            NAMESPACE_LABELS.to_owned(),
            r#"{"thyra.io/mode":"audit"}"#.to_owned(),
        )]),
        service_account: "registered".into(),
        containers: Vec::new(),
    }
}

fn workload(uid: &str, address: &str, policies: &[&str]) -> Arc<Workload> {
    Arc::new(Workload {
        uid: uid.into(),
        kind: WorkloadKind::Pod,
        name: "front".into(),
        namespace: "shop".into(),
        addresses: vec![address.parse().expect("an address")],
        network: String::new(),
        trust_domain: "cluster.local".into(),
        service_account: "front".into(),
        node: String::new(),
        host_network: false,
        healthy: true,
        hbone: false,
        services: BTreeMap::new(),
        authorization_policies: policies.iter().map(|p| (*p).to_owned()).collect(),
    })
}

fn pod(name: &str, app: &str) -> Change {
    Change::Pod(Arc::new(Pod {
        uid: format!("uid-{name}"),
        namespace: "shop".into(),
        name: name.into(),
        version: "5".into(),
        labels: BTreeMap::from([("app".to_owned(), app.to_owned())]),
        annotations: BTreeMap::new(),
        service_account: "told".into(),
        containers: vec!["istio-proxy".into()],
    }))
}

#[test]
fn the_api_servers_word_on_a_pod_wins_but_for_its_addresses() {
    let mut held = Held::new(Basis::default());
    held.registrations.insert(1, registration("front", "10.0.0.1"));
    held.derive();
    assert_eq!(held.world.endpoints[&1].labels["app"], "registered");
    assert!(held.apply(pod("front", "told")));
    held.derive();
    let endpoint = &held.world.endpoints[&1];
    assert_eq!(
        (endpoint.labels["app"].as_str(), endpoint.service_account.as_str()),
        ("told", "told")
    );
    assert_eq!(endpoint.containers, ["istio-proxy"]);
    assert_eq!(endpoint.addresses[0].to_string(), "10.0.0.1");
    assert!(held.apply(Change::OnlyPods(BTreeSet::new())));
    held.derive();
    assert_eq!(held.world.endpoints[&1].labels["app"], "registered");
}

#[test]
fn registrations_tell_namespace_labels_only_where_no_api_server_does() {
    let mut alone = Held::new(Basis::default());
    alone.registrations.insert(1, registration("front", "10.0.0.1"));
    alone.derive();
    assert_eq!(alone.world.namespaces["shop"]["thyra.io/mode"], "audit");
    let mut watched = Held::new(Basis {
        awaited: BTreeSet::from([Topic::Namespaces]),
        ..Basis::default()
    });
    watched.registrations.insert(1, registration("front", "10.0.0.1"));
    watched.derive();
    assert!(watched.world.namespaces.is_empty());
}

#[test]
fn an_unchanged_endpoint_keeps_its_allocation() {
    let mut held = Held::new(Basis::default());
    held.registrations.insert(1, registration("front", "10.0.0.1"));
    held.derive();
    let before = held.world.endpoints[&1].clone();
    held.derive();
    assert!(Arc::ptr_eq(&before, &held.world.endpoints[&1]));
}

#[test]
fn the_same_news_twice_changes_nothing() {
    let mut held = Held::new(Basis::default());
    assert!(held.apply(Change::Workload(workload("a", "10.0.0.1", &[]))));
    assert!(!held.apply(Change::Workload(workload("a", "10.0.0.1", &[]))));
    assert!(held.apply(Change::Workload(workload("a", "10.0.0.2", &[]))));
    assert!(held.apply(Change::AddressGone("a".into())));
    assert!(!held.apply(Change::AddressGone("a".into())));
}

#[test]
fn a_removed_name_may_be_a_service() {
    let mut held = Held::new(Basis::default());
    held.apply(Change::Service(Arc::new(Service {
        name: "cart".into(),
        namespace: "shop".into(),
        hostname: "cart.shop.svc".into(),
        addresses: Vec::new(),
        ports: Vec::new(),
    })));
    assert!(held.apply(Change::AddressGone("shop/cart.shop.svc".into())));
    assert!(held.world.services.is_empty());
}

#[test]
fn identity_numbers_are_kept_when_the_workload_goes_and_comes_back() {
    let mut held = Held::new(Basis::default());
    held.apply(Change::Workload(workload("a", "10.0.0.1", &[])));
    let number = held.world.identities["cluster.local/ns/shop/sa/front"];
    held.apply(Change::AddressGone("a".into()));
    held.apply(Change::Workload(workload("b", "10.0.0.2", &[])));
    assert_eq!(held.world.identities["cluster.local/ns/shop/sa/front"], number);
    assert_eq!(number, FIRST_IDENTITY);
}

#[test]
fn nodes_add_to_what_was_configured_and_take_only_their_own_away() {
    let mut basis = Basis::default();
    basis
        .node
        .pod_ranges
        .push("10.244.0.0/16".parse().expect("a range"));
    let mut held = Held::new(basis);
    let addresses = BTreeSet::from(["192.0.2.1".parse().expect("an address")]);
    let ranges = vec![
        "10.8.0.0/16".parse().expect("a range"),
        "10.244.0.0/16".parse().expect("a range"),
    ];
    held.apply(Change::Node("n1".into(), Node { addresses, ranges }));
    held.derive();
    assert_eq!(
        (
            held.world.node.pod_ranges.len(),
            held.world.node.node_addresses.len()
        ),
        (2, 1)
    );
    held.apply(Change::NodeGone("n1".into()));
    held.derive();
    assert_eq!(
        (
            held.world.node.pod_ranges.len(),
            held.world.node.node_addresses.len()
        ),
        (1, 0)
    );
}

#[test]
fn flags_win_over_mesh_config() {
    let mut held = Held::new(Basis {
        root_namespace: Some("mesh".into()),
        ..Basis::default()
    });
    assert_eq!(held.world.mesh.root_namespace, "mesh");
    let told = Mesh {
        root_namespace: "other".into(),
        trust_domain: "prod".into(),
        ..Mesh::default()
    };
    held.apply(Change::Mesh(told));
    assert_eq!(held.world.mesh.root_namespace, "mesh");
    assert_eq!(held.world.mesh.trust_domain, "prod");
}

#[test]
fn an_unreadable_policy_replaces_its_older_version_and_a_request_authentication_denies_nothing() {
    let mut held = Held::new(Basis::default());
    let reference = PolicyRef {
        namespace: "shop".into(),
        name: "p".into(),
    };
    held.apply(Change::Unreadable(
        PolicyKind::RequestAuthentication,
        reference.clone(),
        "bad".into(),
    ));
    assert!(held.world.unreadable.is_empty());
    // But no token is taken where it may apply.
    let request = held.world.request_authentication[&reference].clone();
    assert_eq!((request.rules.len(), request.unknown.len()), (0, 1));
    assert_eq!(request.selector, None);
    held.apply(Change::PolicyGone(
        PolicyKind::RequestAuthentication,
        reference.clone(),
    ));
    assert!(held.world.request_authentication.is_empty());
    held.apply(Change::Unreadable(
        PolicyKind::Authorization,
        reference.clone(),
        "bad".into(),
    ));
    assert_eq!(held.world.unreadable.len(), 1);
    // Another kind of the same name is another policy.
    held.apply(Change::PolicyGone(
        PolicyKind::PeerAuthentication,
        reference.clone(),
    ));
    assert_eq!(held.world.unreadable.len(), 1);
    held.apply(Change::OnlyPolicies(PolicyKind::Authorization, BTreeSet::new()));
    assert!(held.world.unreadable.is_empty());
}

#[test]
fn a_listed_policy_that_has_not_arrived_denies_at_the_workloads_that_list_it_only() {
    let mut held = Held::new(Basis {
        listed_policies: true,
        ..Basis::default()
    });
    held.registrations.insert(1, registration("front", "10.0.0.1"));
    held.registrations.insert(2, registration("cart", "10.0.0.2"));
    held.apply(Change::Workload(workload("a", "10.0.0.1", &["shop/p"])));
    held.derive();
    let reference = PolicyRef {
        namespace: "shop".into(),
        name: "p".into(),
    };
    let awaited = &held.world.authorization[&reference];
    assert_eq!(awaited.action, PolicyAction::Deny);
    let mark = authorization::mark("shop/p");
    assert_eq!(
        awaited.selector,
        Some([(mark.clone(), authorization::LISTED.to_owned())].into())
    );
    assert!(held.world.endpoints[&1].labels.contains_key(&mark));
    assert!(!held.world.endpoints[&2].labels.contains_key(&mark));
    held.apply(Change::Workload(workload("a", "10.0.0.1", &[])));
    held.derive();
    assert!(held.world.authorization.is_empty());
}
