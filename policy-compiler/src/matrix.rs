//! Who may talk to whom: every source against every endpoint, read off the compiled tables.
//!
//! Invariant: a cell lists all 65,536 ports. Sources (or endpoints) that share a line live in one namespace and fare
//! alike everywhere.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use thyra_datapath_abi::tables::{EndpointTables, Tables, Verdict};
use thyra_datapath_abi::{Action, Reason};

use crate::explain;
use crate::world::World;

/// Sources or endpoints that share a line.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    /// Namespace; empty for a block and for the outsider.
    pub namespace: String,
    /// Names, sorted.
    pub members: Vec<String>,
}

/// What may happen to a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fate {
    /// The kernel lets it in.
    Allow,
    /// The request decides.
    NeedsL7,
    /// It is refused.
    Deny,
}

/// Ports with one verdict.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ports {
    /// First and last of each run, ascending.
    pub runs: Vec<(u16, u16)>,
    /// What happens there.
    pub fate: Fate,
    /// `allowed by shop/allow-front#0: …`
    pub text: String,
    /// 4 or 6 where the families differ, else 0.
    pub family: u8,
}

/// The whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Matrix {
    /// By namespace; then the policies' CIDR blocks, for whoever lives there without an identity; the outsider last.
    pub sources: Vec<Group>,
    /// By namespace.
    pub endpoints: Vec<Group>,
    /// By source, then by endpoint: all ports, those that get in first.
    pub cells: Vec<Vec<Vec<Ports>>>,
}

/// What stands in the place of all ports.
pub const ANY_PORT: &str = "any";
/// Who has no identity: addresses of documentation ranges, as everywhere `outside` is asked about.
pub const OUTSIDE: &str = "outside";
/// The outsider's addresses.
pub const OUTSIDERS: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(203, 0, 113, 7)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7)),
];

/// A line before it is grouped: namespace, name, cells.
type Line = (String, String, Vec<Vec<Ports>>);

/// The matrix of a compiled world. With `grouped`, sources (and endpoints) of a namespace that fare alike share a line.
#[must_use]
pub fn matrix(world: &World, tables: &Tables, grouped: bool) -> Matrix {
    let mut lines: Vec<Line> = world
        .workloads
        .values()
        .filter(|workload| !workload.host_network)
        .map(|workload| {
            let cells = cells(world, tables, |family| class(tables, &workload.addresses, family));
            (workload.namespace.clone(), workload.name.clone(), cells)
        })
        .collect();
    lines.sort();
    // In a pod range without an identity nobody lives for long.
    lines.extend(
        tables
            .blocks
            .iter()
            .filter(|block| !tables.is_pending(block.class))
            .map(|block| {
                let of_block = |family| (block.network.is_ipv4() == (family == 4)).then_some(block.class);
                let name = format!("{}/{}", block.network, block.prefix);
                (String::new(), name, cells(world, tables, of_block))
            }),
    );
    let outside = cells(world, tables, |family| class(tables, &OUTSIDERS, family));
    lines.push((String::new(), OUTSIDE.to_owned(), outside));
    let (sources, cells) = group(lines, grouped);
    let across = world.endpoints.values().enumerate().map(|(column, endpoint)| {
        let cells = cells.iter().map(|line| line[column].clone()).collect();
        (endpoint.namespace.clone(), endpoint.name.clone(), cells)
    });
    let mut across: Vec<Line> = across.collect();
    across.sort();
    let (endpoints, columns) = group(across, grouped);
    let turned = (0..sources.len())
        .map(|row| columns.iter().map(|column| column[row].clone()).collect())
        .collect();
    Matrix {
        sources,
        endpoints,
        cells: turned,
    }
}

fn group(lines: Vec<Line>, grouped: bool) -> (Vec<Group>, Vec<Vec<Vec<Ports>>>) {
    let mut groups: Vec<(Group, Vec<Vec<Ports>>)> = Vec::new();
    let mut places: BTreeMap<(String, Vec<Vec<Ports>>), usize> = BTreeMap::new();
    for (namespace, name, cells) in lines {
        let key = (namespace, cells);
        if let Some(place) = places.get(&key).filter(|_| grouped) {
            groups[*place].0.members.push(name);
            continue;
        }
        places.insert(key.clone(), groups.len());
        let (namespace, cells) = key;
        let members = vec![name];
        groups.push((Group { namespace, members }, cells));
    }
    groups.into_iter().unzip()
}

fn class(tables: &Tables, addresses: &[IpAddr], family: u8) -> Option<u32> {
    let of_family = addresses
        .iter()
        .find(|address| address.is_ipv4() == (family == 4));
    of_family.map(|address| tables.class_of(*address))
}

/// A source's cells, by endpoint.
fn cells(world: &World, tables: &Tables, class: impl Fn(u8) -> Option<u32>) -> Vec<Vec<Ports>> {
    let (four, six) = (class(4), class(6));
    let cell = |id: &u16| {
        tables
            .endpoint(*id)
            .map_or_else(Vec::new, |placed| cell(tables, placed, (four, six)))
    };
    world.endpoints.keys().map(cell).collect()
}

fn cell(tables: &Tables, placed: &EndpointTables, (four, six): (Option<u32>, Option<u32>)) -> Vec<Ports> {
    let ports = |set, class: Option<u32>| class.map(|class| ports(tables, set, class));
    match (ports(placed.set4, four), ports(placed.set6, six)) {
        (Some(four), Some(six)) if four != six => {
            let of = |family, ports: Vec<Ports>| ports.into_iter().map(move |p| Ports { family, ..p });
            of(4, four).chain(of(6, six)).collect()
        }
        (Some(ports), _) | (None, Some(ports)) => ports,
        (None, None) => Vec::new(),
    }
}

fn ports(tables: &Tables, set: u16, class: u32) -> Vec<Ports> {
    // Verdicts may differ in nothing but what is left to L7; to whoever reads them they are one.
    let mut alike: BTreeMap<(Fate, String), Vec<(u16, u16)>> = BTreeMap::new();
    for (verdict, runs) in explain::fate(tables, set, class) {
        if let Some(verdict) = tables.verdicts.get(usize::from(verdict)) {
            let same = alike.entry((fate(verdict), explain::text(verdict))).or_default();
            same.extend(runs);
        }
    }
    let alike = alike.into_iter().map(|((fate, text), runs)| Ports {
        runs: joined(runs),
        fate,
        text,
        family: 0,
    });
    let mut ports: Vec<Ports> = alike.collect();
    ports.sort_by(|a, b| (a.fate, &a.runs).cmp(&(b.fate, &b.runs)));
    ports
}

/// The runs in order, those that touch as one.
fn joined(mut runs: Vec<(u16, u16)>) -> Vec<(u16, u16)> {
    runs.sort_unstable();
    let mut joined: Vec<(u16, u16)> = Vec::with_capacity(runs.len());
    for (first, last) in runs {
        match joined.last_mut() {
            Some(before) if first.saturating_sub(1) <= before.1 => before.1 = before.1.max(last),
            _ => joined.push((first, last)),
        }
    }
    joined
}

/// What may happen to a connection with this verdict.
#[must_use]
pub fn fate(verdict: &Verdict) -> Fate {
    match (verdict.action, verdict.reason) {
        (Action::Allow, _) => Fate::Allow,
        (Action::Proxy, _) | (_, Reason::NeedsL7 | Reason::NeedsCustom) => Fate::NeedsL7,
        (Action::Deny | Action::Hold | Action::Missing, _) => Fate::Deny,
    }
}

impl Fate {
    /// allow | needs-l7 | deny
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::NeedsL7 => "needs-l7",
            Self::Deny => "deny",
        }
    }
}

impl Ports {
    /// `8080`, `1-79,443`, `any`.
    #[must_use]
    pub fn numbers(&self) -> String {
        explain::ports(&self.runs, ANY_PORT)
    }
}
