//! The matrix of every lab scenario, cell by cell against the oracle.

use std::net::IpAddr;
use std::path::Path;

use thyra_datapath_abi::{Action, Mode, Reason};
use thyra_policy_compiler::compile::Compiler;
use thyra_policy_compiler::manifest;
use thyra_policy_compiler::matrix::{Fate, Matrix, OUTSIDERS, matrix};
use thyra_policy_compiler::oracle::{self, Connection};
use thyra_policy_compiler::world::{NodeOptions, World};

/// The worlds of the lab's scenarios.
fn worlds() -> Vec<(String, World)> {
    let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/lab");
    let mut worlds = Vec::new();
    for entry in std::fs::read_dir(lab).unwrap() {
        let folder = entry.unwrap().path().join("manifests");
        let manifests = manifest::read_dir(&folder).unwrap();
        let options = NodeOptions {
            default_mode: Mode::Enforce,
            ..NodeOptions::default()
        };
        let world = manifest::world(&manifests, options).unwrap();
        worlds.push((folder.display().to_string(), world));
    }
    assert!(worlds.len() > 20);
    worlds
}

fn of(world: &World, grouped: bool) -> Matrix {
    matrix(world, &Compiler::new().compile(world).unwrap(), grouped)
}

fn address(addresses: &[IpAddr], family: u8) -> Option<IpAddr> {
    addresses.iter().copied().find(|a| a.is_ipv4() == (family == 4))
}

/// Where a source connects from.
fn source(world: &World, namespace: &str, name: &str, family: u8) -> Option<IpAddr> {
    if namespace.is_empty() {
        let block = name.split_once('/').map(|(network, _)| network.parse().unwrap());
        let addresses = block.map_or(OUTSIDERS.to_vec(), |network: IpAddr| vec![network]);
        return address(&addresses, family);
    }
    let mut workloads = world.workloads.values();
    let workload = workloads
        .find(|w| w.namespace == namespace && w.name == name)
        .unwrap();
    address(&workload.addresses, family)
}

fn fate(world: &World, connection: &Connection) -> Fate {
    let judgement = oracle::judge(world, connection);
    match (judgement.verdict.action, judgement.verdict.reason) {
        (Action::Allow, _) => Fate::Allow,
        (_, Reason::NeedsL7 | Reason::NeedsCustom) => Fate::NeedsL7,
        _ => Fate::Deny,
    }
}

#[test]
fn every_cell_says_what_the_oracle_says() {
    let mut asked = 0;
    for (name, world) in worlds() {
        let matrix = of(&world, false);
        for (group, line) in matrix.sources.iter().zip(&matrix.cells) {
            for (to, cell) in matrix.endpoints.iter().zip(line) {
                let mut endpoints = world.endpoints.values();
                let endpoint = endpoints
                    .find(|e| e.namespace == to.namespace && e.name == to.members[0])
                    .unwrap();
                for family in [4, 6] {
                    let from = source(&world, &group.namespace, &group.members[0], family);
                    let (Some(from), Some(destination)) = (from, address(&endpoint.addresses, family)) else {
                        continue;
                    };
                    let ports: Vec<_> = cell
                        .iter()
                        .filter(|p| p.family == 0 || p.family == family)
                        .collect();
                    let all: u32 = ports
                        .iter()
                        .flat_map(|p| &p.runs)
                        .map(|(first, last)| u32::from(last - first) + 1)
                        .sum();
                    assert_eq!(all, 65_536, "{name}: {group:?} to {to:?} has every port once");
                    for (ports, (first, last)) in
                        ports.iter().flat_map(|p| p.runs.iter().map(move |run| (p, run)))
                    {
                        for port in [*first, *last] {
                            let connection = Connection {
                                source: from,
                                destination_endpoint: endpoint.id,
                                destination,
                                port,
                            };
                            let told = (group, to, port, &ports.text);
                            assert_eq!(fate(&world, &connection), ports.fate, "{name}: {told:?}");
                            asked += 1;
                        }
                    }
                }
            }
        }
    }
    assert!(asked > 1_000, "only {asked} questions");
}

#[test]
fn groups_lose_nothing() {
    for (name, world) in worlds() {
        let (single, grouped) = (of(&world, false), of(&world, true));
        assert!(grouped.sources.len() <= single.sources.len());
        let find = |groups: &[thyra_policy_compiler::matrix::Group], namespace: &str, member: &String| {
            let holds = |g: &thyra_policy_compiler::matrix::Group| {
                g.namespace == namespace && g.members.contains(member)
            };
            groups.iter().position(holds).unwrap()
        };
        for (row, from) in single.sources.iter().enumerate() {
            for (column, to) in single.endpoints.iter().enumerate() {
                let grouped_row = find(&grouped.sources, &from.namespace, &from.members[0]);
                let grouped_column = find(&grouped.endpoints, &to.namespace, &to.members[0]);
                assert_eq!(
                    single.cells[row][column], grouped.cells[grouped_row][grouped_column],
                    "{name}: {from:?} to {to:?}"
                );
            }
        }
    }
}

#[test]
fn ports_that_read_alike_are_one_entry() {
    // What the kernel leaves to L7 differs at the port that is declared HTTP; to a reader it is the same.
    let text = "
apiVersion: v1
kind: Pod
metadata: {name: cart, namespace: shop, labels: {app: cart}}
spec: {containers: [{name: c}]}
---
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop}
spec: {selector: {app: cart}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: get, namespace: shop}
spec: {rules: [{to: [{operation: {methods: [GET]}}]}]}
";
    let options = NodeOptions {
        default_mode: Mode::Enforce,
        ..NodeOptions::default()
    };
    let world = manifest::world(&manifest::read_str("f.yaml", text).unwrap(), options).unwrap();
    let matrix = of(&world, false);
    let outsiders = matrix.cells.last().unwrap();
    assert_eq!(outsiders[0].len(), 1, "{:?}", outsiders[0]);
    assert_eq!(
        (outsiders[0][0].fate, outsiders[0][0].numbers().as_str()),
        (Fate::NeedsL7, "any")
    );
}
