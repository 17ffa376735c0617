//! Random worlds and connections: small pools, so that everything collides with everything.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use thyra_datapath_abi::Mode;
use thyra_datapath_abi::tables::PolicyRef;
use thyra_policy_compiler::authorizer::{
    self, Authorizer, Check, HttpCheck, Provider, Providers, STATUS_ON_ERROR,
};
use thyra_policy_compiler::oracle::Connection;
use thyra_policy_compiler::policy::{
    AuthorizationPolicy, Condition, Field, L7Verdict, Labels, MtlsMode, Operation, PeerAuthentication,
    PolicyAction, RequestAuthentication, Rule, ServiceAccountRef, Source, StringMatch, Unknown,
};
use thyra_policy_compiler::tokens::{JwtRule, Keys};
use thyra_policy_compiler::world::{
    AppProtocol, Bootstrap, Endpoint, Mesh, NodeOptions, Service, ServicePort, Workload, WorkloadKind, World,
};

use super::entropy::Entropy;
use super::requests;

const NAMESPACES: [&str; 5] = ["shop", "team-a", "team-b", "istio-system", "kube-system"];
const ACCOUNTS: [&str; 3] = ["front", "cart", "default"];
const DOMAINS: [&str; 4] = ["cluster.local", "td2", "old.local", "else.where"];
const PORTS: [u16; 8] = [80, 443, 9080, 9090, 15020, 1, 65535, 0];
const ADDRESSES: [&str; 16] = [
    "10.244.0.2",
    "10.244.0.3",
    "10.244.0.4",
    "10.244.1.2",
    "10.244.1.3",
    "10.0.0.7",
    "192.0.2.1",
    "203.0.113.7",
    "fd00:10:244::2",
    "fd00:10:244::3",
    "fd00:10:244::4",
    "fd00:10:244:1::2",
    "fd00:10:244:1::3",
    "2001:db8::7",
    "10.96.0.1",
    "10.200.0.1",
];
const BLOCKS: [&str; 12] = [
    "10.244.0.0/24",
    "10.0.0.0/8",
    "0.0.0.0/0",
    "::/0",
    "fd00::/16",
    "10.244.0.2/31",
    "10.244.0.3/32",
    "fd00:10:244::/64",
    "fd00:10:244::3/128",
    "203.0.113.0/24",
    "192.0.2.0/25",
    "2001:db8::/32",
];

fn address(e: &mut Entropy<'_>) -> IpAddr {
    e.pick(&ADDRESSES).parse().unwrap()
}

fn block(e: &mut Entropy<'_>) -> IpNet {
    e.pick(&BLOCKS).parse().unwrap()
}

fn labels(e: &mut Entropy<'_>) -> Labels {
    let keys = e.some(2, |e| (e.pick(&["app", "tier"]), e.pick(&["a", "b"])));
    keys.into_iter()
        .map(|(k, v)| (k.to_owned(), v.to_owned()))
        .collect()
}

fn selector(e: &mut Entropy<'_>) -> Option<Labels> {
    e.chance(40).then(|| labels(e))
}

pub(crate) fn field<T>(e: &mut Entropy<'_>, draw: fn(&mut Entropy<'_>) -> T) -> Field<T> {
    match e.below(4) {
        0 | 1 => Field {
            values: vec![draw(e)],
            not_values: Vec::new(),
        },
        2 => Field {
            values: e.some(3, draw),
            not_values: e.some(1, draw),
        },
        _ => Field {
            values: Vec::new(),
            not_values: vec![draw(e)],
        },
    }
}

fn maybe<T>(e: &mut Entropy<'_>, percent: usize, draw: fn(&mut Entropy<'_>) -> T) -> Field<T> {
    if e.chance(percent) {
        field(e, draw)
    } else {
        Field::default()
    }
}

fn principal(e: &mut Entropy<'_>) -> StringMatch {
    let (domain, ns, sa) = (e.pick(&DOMAINS), e.pick(&NAMESPACES), e.pick(&ACCOUNTS));
    match e.below(10) {
        0..=3 => StringMatch::Exact(format!("{domain}/ns/{ns}/sa/{sa}")),
        4 => StringMatch::Prefix(format!("{domain}/ns/{ns}/sa/")),
        5 => StringMatch::Prefix(format!("{domain}/ns/{ns}/")),
        6 => StringMatch::Suffix(format!("/sa/{sa}")),
        7 => StringMatch::Suffix(format!(".local/ns/{ns}/sa/{sa}")),
        8 => StringMatch::Suffix(format!("/ns/{ns}/sa/{sa}")),
        _ => StringMatch::Present,
    }
}

fn namespace(e: &mut Entropy<'_>) -> StringMatch {
    match e.below(8) {
        0..=3 => StringMatch::Exact(e.pick(&NAMESPACES).to_owned()),
        4 => StringMatch::Prefix("team-".into()),
        5 => StringMatch::Suffix("-system".into()),
        6 => StringMatch::Glob(e.pick(&["t*m*a", "*e*", "s*p", "**"]).to_owned()),
        _ => StringMatch::Present,
    }
}

fn trust_domain(e: &mut Entropy<'_>) -> StringMatch {
    match e.below(6) {
        0..=2 => StringMatch::Exact(e.pick(&DOMAINS).to_owned()),
        3 => StringMatch::Prefix("td".into()),
        4 => StringMatch::Suffix(".local".into()),
        _ => StringMatch::Present,
    }
}

fn account(e: &mut Entropy<'_>) -> ServiceAccountRef {
    ServiceAccountRef {
        namespace: e.pick(&NAMESPACES).to_owned(),
        name: e.pick(&ACCOUNTS).to_owned(),
    }
}

fn port(e: &mut Entropy<'_>) -> u16 {
    e.pick(&PORTS)
}

fn unknown(e: &mut Entropy<'_>, percent: usize) -> Vec<Unknown> {
    if e.chance(percent) {
        vec![Unknown("field 99".into())]
    } else {
        Vec::new()
    }
}

fn source(e: &mut Entropy<'_>) -> Source {
    Source {
        principals: maybe(e, 40, principal),
        namespaces: maybe(e, 25, namespace),
        service_accounts: maybe(e, 12, account),
        trust_domains: maybe(e, 10, trust_domain),
        ip_blocks: maybe(e, 20, block),
        remote_ip_blocks: maybe(e, 6, block),
        request_principals: maybe(e, 10, requests::value),
        unknown: unknown(e, 3),
    }
}

fn operation(e: &mut Entropy<'_>) -> Operation {
    Operation {
        ports: maybe(e, 60, port),
        hosts: maybe(e, 8, requests::host),
        methods: maybe(e, 50, requests::method),
        paths: maybe(e, 25, requests::path),
        unknown: unknown(e, 3),
    }
}

fn condition(e: &mut Entropy<'_>) -> Condition {
    match e.below(11) {
        0 => Condition::SourceNamespace(field(e, namespace)),
        1 => Condition::SourcePrincipal(field(e, principal)),
        2 => Condition::SourceServiceAccount(field(e, account)),
        3 => Condition::SourceTrustDomain(field(e, trust_domain)),
        4 => Condition::SourceIp(field(e, block)),
        5 => Condition::RemoteIp(field(e, block)),
        6 | 7 => Condition::DestinationIp(field(e, block)),
        8 => Condition::DestinationPort(field(e, port)),
        9 => Condition::Sni(field(e, requests::sni)),
        _ => requests::condition(e),
    }
}

fn rule(e: &mut Entropy<'_>) -> Rule {
    Rule {
        from: e.some(2, source),
        to: e.some(2, operation),
        when: if e.chance(25) {
            e.some(2, condition)
        } else {
            Vec::new()
        },
        unknown: unknown(e, 2),
    }
}

fn reference(e: &mut Entropy<'_>, number: usize) -> PolicyRef {
    PolicyRef {
        namespace: e
            .pick(&["shop", "istio-system", "team-a", "shop", "team-b"])
            .into(),
        name: format!("p{number}").into(),
    }
}

fn authorization(e: &mut Entropy<'_>, number: usize) -> AuthorizationPolicy {
    let action = match e.below(13) {
        0..=5 => PolicyAction::Allow,
        6..=9 => PolicyAction::Deny,
        10 | 11 => PolicyAction::Custom,
        _ => PolicyAction::Audit,
    };
    AuthorizationPolicy {
        reference: reference(e, number),
        version: String::new(),
        action,
        provider: (action == PolicyAction::Custom).then(|| e.pick(&["ext", "web", "ext", "none"]).to_owned()),
        selector: selector(e),
        has_target_refs: e.chance(3),
        dry_run: e.chance(15),
        l7_verdict: L7Verdict::Request,
        rules: e.some(3, rule),
        unknown: unknown(e, 2),
    }
}

fn mode(e: &mut Entropy<'_>) -> MtlsMode {
    e.pick(&[
        MtlsMode::Unset,
        MtlsMode::Strict,
        MtlsMode::Permissive,
        MtlsMode::Disable,
    ])
}

fn peer_authentication(e: &mut Entropy<'_>, number: usize) -> PeerAuthentication {
    PeerAuthentication {
        reference: reference(e, number),
        version: String::new(),
        created: i64::try_from(e.below(3)).unwrap(),
        selector: selector(e),
        mode: mode(e),
        ports: e.some(2, |e| (port(e), mode(e))).into_iter().collect(),
        unknown: unknown(e, 5),
    }
}

fn workload(e: &mut Entropy<'_>, number: usize, services: &[Arc<str>]) -> Workload {
    let kind = if e.chance(15) {
        WorkloadKind::Other
    } else {
        WorkloadKind::Pod
    };
    Workload {
        uid: format!("Kubernetes//Pod/{number}").into(),
        kind,
        name: format!("w{number}"),
        namespace: e.pick(&NAMESPACES).to_owned(),
        addresses: e.some(2, address),
        network: if e.chance(8) {
            "other".into()
        } else {
            String::new()
        },
        trust_domain: e
            .pick(&["cluster.local", "cluster.local", "td2", "old.local"])
            .to_owned(),
        service_account: e.pick(&ACCOUNTS).to_owned(),
        node: String::new(),
        host_network: e.chance(6),
        healthy: true,
        hbone: e.chance(1),
        services: service_ports(e, services),
        authorization_policies: Vec::new(),
    }
}

fn service_ports(
    e: &mut Entropy<'_>,
    services: &[Arc<str>],
) -> std::collections::BTreeMap<Arc<str>, Vec<ServicePort>> {
    let protocols = [
        AppProtocol::NotHttp,
        AppProtocol::Http,
        AppProtocol::Tls,
        AppProtocol::Unknown,
    ];
    let mut all = std::collections::BTreeMap::new();
    for name in services {
        let ports = e.some(4, |e| ServicePort {
            port: 8000,
            target_port: port(e),
            protocol: e.pick(&protocols),
        });
        all.insert(Arc::clone(name), ports);
    }
    all
}

fn endpoint(e: &mut Entropy<'_>, id: u16, workloads: &mut [Workload]) -> Endpoint {
    let mut endpoint = Endpoint {
        id,
        uid: format!("uid-{id}"),
        namespace: match e.below(12) {
            0..8 => "shop",
            8..11 => "team-a",
            _ => "istio-system",
        }
        .to_owned(),
        name: format!("pod-{id}"),
        service_account: "default".into(),
        addresses: vec![
            format!("10.244.0.{}", id + 1).parse().unwrap(),
            format!("fd00:10:244::{}", id + 1).parse().unwrap(),
        ],
        labels: labels(e),
        annotations: Labels::new(),
        containers: vec!["app".into()],
    };
    if e.chance(8) {
        // One address of a family, as Kubernetes has it, but any.
        let other = address(e);
        let place = usize::from(other.is_ipv6());
        endpoint.addresses[place] = other;
    }
    if e.chance(8) {
        endpoint.labels.insert(
            "thyra.io/mode".into(),
            e.pick(&["audit", "off", "enforce", "odd"]).into(),
        );
    }
    if e.chance(4) {
        endpoint.containers.push("istio-proxy".into());
        endpoint.annotations.insert(
            "traffic.sidecar.istio.io/excludeInboundPorts".into(),
            "9090, x".into(),
        );
    }
    // Mostly the pod's own workload is there too.
    if let Some(own) = workloads.get_mut(usize::from(id)).filter(|_| e.chance(80)) {
        own.kind = WorkloadKind::Pod;
        own.namespace = endpoint.namespace.clone();
        own.name = endpoint.name.clone();
        own.addresses = endpoint.addresses.clone();
    }
    endpoint
}

/// One that is asked of every stream, and one of requests only.
fn providers() -> Providers {
    let mut providers = Providers::new();
    // How the tests with Envoy tell one what to say.
    let over_http = HttpCheck {
        request_headers: vec!["x-answer-*".to_owned()],
        ..HttpCheck::default()
    };
    for (name, check) in [("ext", Check::Grpc), ("web", Check::Http(over_http.clone()))] {
        let authorizer = Authorizer {
            target: authorizer::target(&format!("auth/{name}.example"), 80).unwrap(),
            check,
            timeout: Duration::from_secs(10),
            fail_open: false,
            status_on_error: STATUS_ON_ERROR,
            body: None,
        };
        authorizer::insert(&mut providers, Provider::new(name, Ok(authorizer)));
    }
    providers
}

fn mesh(e: &mut Entropy<'_>) -> Mesh {
    Mesh {
        trust_domain: e.pick(&["cluster.local", "cluster.local", "td2"]).to_owned(),
        trust_domain_aliases: e.some(2, |e| e.pick(&DOMAINS).to_owned()),
        extension_providers: providers(),
        path_normalization: requests::normalization(e),
        // The second one sorts after the pods' namespaces.
        root_namespace: e.pick(&["istio-system", "istio-system", "team-b"]).to_owned(),
        ..Mesh::default()
    }
}

fn node(e: &mut Entropy<'_>) -> NodeOptions {
    let ranges = [
        vec!["10.244.0.0/16", "fd00:10:244::/48"],
        vec![],
        vec!["10.0.0.0/8"],
    ];
    NodeOptions {
        default_mode: e.pick(&[
            Mode::Enforce,
            Mode::Enforce,
            Mode::Audit,
            Mode::Enforce,
            Mode::Off,
        ]),
        pod_mode_override: e.chance(20),
        trust_workload_entries: e
            .some(2, |e| e.pick(&NAMESPACES).to_owned())
            .into_iter()
            .collect(),
        pod_ranges: e.pick(&ranges).iter().map(|r| r.parse().unwrap()).collect(),
        node_addresses: e.some(1, address).into_iter().collect(),
        namespaces_are_told: e.chance(10),
        bootstrap: e.pick(&[Bootstrap::Deny, Bootstrap::Allow]),
        ..NodeOptions::default()
    }
}

/// A random world.
pub(crate) fn world(e: &mut Entropy<'_>) -> World {
    let mut world = World {
        mesh: mesh(e),
        node: node(e),
        synced: !e.chance(2),
        ..World::default()
    };
    for number in 0..1 + e.below(7) {
        let policy = authorization(e, number);
        world
            .authorization
            .insert(policy.reference.clone(), Arc::new(policy));
    }
    for number in 0..e.below(4) {
        let policy = peer_authentication(e, number);
        world
            .peer_authentication
            .insert(policy.reference.clone(), Arc::new(policy));
    }
    if e.chance(3) {
        let reference = reference(e, 7);
        world.unreadable.insert(reference, "field 99".into());
    }
    for name in NAMESPACES {
        if e.chance(15) {
            let mode = e.pick(&["enforce", "audit", "off", "odd"]).to_owned();
            world
                .namespaces
                .insert(name.into(), [("thyra.io/mode".to_owned(), mode)].into());
        }
    }
    let services: Vec<Arc<str>> = vec!["shop/s1".into(), "shop/s2".into()];
    if e.chance(50) {
        let service = Service {
            name: "s1".into(),
            namespace: "shop".into(),
            hostname: "s1".into(),
            addresses: e.some(2, address),
            ports: Vec::new(),
        };
        world.services.insert(Arc::clone(&services[0]), Arc::new(service));
    }
    let mut workloads: Vec<Workload> = (0..3 + e.below(8)).map(|n| workload(e, n, &services)).collect();
    for id in 1..=u16::try_from(1 + e.below(3)).unwrap() {
        let endpoint = endpoint(e, id, &mut workloads);
        world.endpoints.insert(id, Arc::new(endpoint));
    }
    for workload in workloads {
        world
            .workloads
            .insert(Arc::clone(&workload.uid), Arc::new(workload));
    }
    if e.chance(30) {
        for number in 0..1 + e.below(3) {
            let policy = request_authentication(e, number);
            world
                .request_authentication
                .insert(policy.reference.clone(), Arc::new(policy));
        }
    }
    world
}

fn request_authentication(e: &mut Entropy<'_>, number: usize) -> RequestAuthentication {
    let rule = |e: &mut Entropy<'_>| {
        let rule = JwtRule {
            issuer: e.pick(&["i", "x/i", "other", ""]).to_owned(),
            keys: Keys::Inline(r#"{"keys":[{"kty":"oct","k":"AAAA"}]}"#.into()),
            lists: e
                .some(2, |e| e.pick(&["groups", "azp"]).to_owned())
                .into_iter()
                .collect(),
            ..JwtRule::default()
        };
        rule.checked()
    };
    RequestAuthentication {
        reference: reference(e, number),
        version: String::new(),
        selector: selector(e),
        has_target_refs: e.chance(10),
        rules: e.some(3, rule),
        unknown: e.some(1, |_| Unknown("spec field 99".into())),
    }
}

/// A random connection to one of the world's endpoints, at an address of its own.
pub(crate) fn connection(e: &mut Entropy<'_>, world: &World) -> Connection {
    let endpoints: Vec<&Arc<Endpoint>> = world.endpoints.values().collect();
    let endpoint = endpoints[e.below(endpoints.len())];
    let destination = e.pick(&endpoint.addresses);
    let mut source = address(e);
    // One in three is somewhere in a block instead, where no table entry is exact.
    if e.chance(33) {
        let block = block(e);
        source = block.addr();
        if let (IpAddr::V4(v4), true) = (source, block.prefix_len() < 32) {
            source = IpAddr::V4((u32::from(v4) + 250).into());
        }
    }
    Connection {
        source,
        destination_endpoint: endpoint.id,
        destination,
        port: if e.chance(10) { 7000 } else { port(e) },
    }
}

/// Every source of the pools to every endpoint at every port of the pools.
pub(crate) fn connections(world: &World) -> Vec<Connection> {
    let mut all = Vec::new();
    for endpoint in world.endpoints.values() {
        for destination in &endpoint.addresses {
            for source in ADDRESSES {
                for port in PORTS.into_iter().chain([7000]) {
                    all.push(Connection {
                        source: source.parse().unwrap(),
                        destination_endpoint: endpoint.id,
                        destination: *destination,
                        port,
                    });
                }
            }
        }
    }
    all
}
