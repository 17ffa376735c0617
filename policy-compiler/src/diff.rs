//! What a change of policies (or of anything else) changes: every source, endpoint and port whose fate is another.
//!
//! Invariant: exactly the ports whose fate differs, or whose conditions on the request do, are listed. Sources and
//! endpoints that only one of the two worlds has are named, not compared.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;

use thyra_datapath_abi::tables::{EndpointTables, SourceBlock, Tables, Verdict};

use crate::explain;
use crate::matrix::{Fate, OUTSIDE, OUTSIDERS, fate};
use crate::world::World;

/// A world with its tables.
#[derive(Clone, Copy, Debug)]
pub struct Side<'a> {
    /// The world.
    pub world: &'a World,
    /// What the compiler made of it.
    pub tables: &'a Tables,
}

/// Sources that gain or lose the same ports of one endpoint, for the same reason.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// `namespace/name` of the endpoint.
    pub endpoint: String,
    /// Before.
    pub before: Fate,
    /// After.
    pub after: Fate,
    /// First and last of each run, ascending.
    pub runs: Vec<(u16, u16)>,
    /// 4 or 6 where only one family changes, else 0.
    pub family: u8,
    /// What decides afterwards.
    pub why: String,
    /// `namespace/name`, CIDR block or `outside`; sorted.
    pub sources: Vec<String>,
}

/// The whole difference.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// By endpoint.
    pub changes: Vec<Change>,
    /// Endpoints that only the second world has.
    pub added: Vec<String>,
    /// Endpoints that only the first has.
    pub removed: Vec<String>,
}

/// Who connects, by name, with an address of each family.
type Sources = BTreeMap<String, [Option<IpAddr>; 2]>;
/// What changes alike: before, after, why; and the ports.
type Turns = BTreeMap<(Fate, Fate, String), Vec<(u16, u16)>>;

/// Compares two worlds; `progress` hears how many of how many sources are done.
#[must_use]
pub fn diff(before: Side<'_>, after: Side<'_>, mut progress: impl FnMut(usize, usize)) -> Diff {
    let (old, new) = (endpoints(before), endpoints(after));
    let only = |one: &BTreeMap<String, EndpointTables>, other: &BTreeMap<String, EndpointTables>| {
        one.keys()
            .filter(|name| !other.contains_key(*name))
            .cloned()
            .collect()
    };
    let blocks = blocks([before, after]);
    let (sources_before, sources_after) = (sources(before, &blocks), sources(after, &blocks));
    let mut grouped: BTreeMap<Change, BTreeSet<String>> = BTreeMap::new();
    let total = sources_before.len();
    for (done, (name, addresses)) in sources_before.iter().enumerate() {
        progress(done, total);
        let Some(later) = sources_after.get(name) else {
            continue;
        };
        for (endpoint, placed) in &old {
            let Some(replaced) = new.get(endpoint) else {
                continue;
            };
            let turns = [0, 1].map(|family| {
                let lookup = |side: Side<'_>, placed: &EndpointTables, address| {
                    ([placed.set4, placed.set6][family], side.tables.class_of(address))
                };
                let one = lookup(before, placed, addresses[family]?);
                let other = lookup(after, replaced, later[family]?);
                Some(turns((before.tables, one), (after.tables, other)))
            });
            for change in changes(endpoint, turns) {
                grouped.entry(change).or_default().insert(name.clone());
            }
        }
    }
    progress(total, total);
    let with_sources = |(change, sources): (Change, BTreeSet<String>)| Change {
        sources: sources.into_iter().collect(),
        ..change
    };
    Diff {
        changes: grouped.into_iter().map(with_sources).collect(),
        added: only(&new, &old),
        removed: only(&old, &new),
    }
}

fn endpoints(side: Side<'_>) -> BTreeMap<String, EndpointTables> {
    let placed = side.tables.endpoints.iter().filter_map(|placed| {
        let endpoint = side.world.endpoints.get(&placed.endpoint)?;
        Some((format!("{}/{}", endpoint.namespace, endpoint.name), *placed))
    });
    placed.collect()
}

/// The blocks that policies of either side name, each with an address that no longer block of either side holds and
/// that is nobody's own; a block without one is nothing but its parts.
fn blocks(sides: [Side<'_>; 2]) -> Sources {
    let all = || {
        sides
            .into_iter()
            .flat_map(|side| side.tables.blocks.iter().map(move |block| (side, block)))
    };
    let ranges: BTreeSet<(bool, u128, u128)> = all().map(|(_, block)| range(block)).collect();
    let owned: HashSet<IpAddr> = sides
        .iter()
        .flat_map(|side| side.tables.addresses.iter().map(|source| source.address))
        .collect();
    let named = all().filter(|(side, block)| !side.tables.is_pending(block.class));
    let witnessed = named.filter_map(|(_, block)| {
        let address = witness(range(block), &ranges, &owned)?;
        let address = [true, false].map(|v4| (address.is_ipv4() == v4).then_some(address));
        Some((format!("{}/{}", block.network, block.prefix), address))
    });
    witnessed.collect()
}

/// Family (is it IPv4), first and last address of a block.
fn range(block: &SourceBlock) -> (bool, u128, u128) {
    let (v4, first, bits) = match block.network {
        IpAddr::V4(network) => (true, u128::from(network.to_bits()), 32),
        IpAddr::V6(network) => (false, network.to_bits(), 128),
    };
    let hosts = u128::MAX
        .checked_shr(128 - (bits - u32::from(block.prefix)))
        .unwrap_or(0);
    (v4, first, first | hosts)
}

/// The first address of a block that is in none of the blocks inside it and not `owned`.
fn witness(
    (v4, first, last): (bool, u128, u128),
    ranges: &BTreeSet<(bool, u128, u128)>,
    owned: &HashSet<IpAddr>,
) -> Option<IpAddr> {
    let inside = ranges.range((v4, first, 0)..=(v4, last, u128::MAX));
    let inside: Vec<(u128, u128)> = inside
        .map(|(_, from, to)| (*from, *to))
        .filter(|(from, to)| *to <= last && (*from, *to) != (first, last))
        .collect();
    let mut at = first;
    // In order of their first addresses, so one walk passes them all.
    let mut ahead = inside.into_iter().peekable();
    loop {
        while let Some((_, to)) = ahead.next_if(|(from, _)| *from <= at) {
            at = at.max(to.checked_add(1)?);
        }
        if at > last {
            return None;
        }
        let address = if v4 {
            IpAddr::V4(u32::try_from(at).ok()?.into())
        } else {
            IpAddr::V6(at.into())
        };
        if !owned.contains(&address) {
            return Some(address);
        }
        at = at.checked_add(1)?;
    }
}

fn sources(side: Side<'_>, blocks: &Sources) -> Sources {
    let mut sources = blocks.clone();
    let of_family = |addresses: &[IpAddr], v4| addresses.iter().copied().find(|a| a.is_ipv4() == v4);
    for workload in side.world.workloads.values().filter(|w| !w.host_network) {
        let addresses = [true, false].map(|v4| of_family(&workload.addresses, v4));
        sources.insert(format!("{}/{}", workload.namespace, workload.name), addresses);
    }
    sources.insert(OUTSIDE.to_owned(), OUTSIDERS.map(Some));
    sources
}

/// The tables, and the policy set and source class that decide over a port.
type Lookup<'a> = (&'a Tables, (u16, u32));

/// Ports whose fate turns.
fn turns(before: Lookup<'_>, after: Lookup<'_>) -> Turns {
    let starts: BTreeSet<u16> = [before, after]
        .iter()
        .flat_map(|(tables, ..)| tables.port_runs.iter().map(|(first, _)| *first))
        .collect();
    let starts: Vec<u16> = starts.into_iter().collect();
    let mut turns = Turns::new();
    for (at, first) in starts.iter().enumerate() {
        let last = starts.get(at + 1).map_or(u16::MAX, |next| next - 1);
        let look = |(tables, (set, class)): Lookup<'_>| tables.verdict(set, *first, class).cloned();
        let (Some(old), Some(new)) = (look(before), look(after)) else {
            continue;
        };
        if !turns_away(&old, &new) {
            continue;
        }
        let runs = turns
            .entry((fate(&old), fate(&new), explain::text(&new)))
            .or_default();
        explain::add_range(runs, *first, last);
    }
    turns
}

/// Whether some connection may end otherwise: another fate, or other conditions on the request.
fn turns_away(old: &Verdict, new: &Verdict) -> bool {
    fate(old) != fate(new)
        || (fate(new) == Fate::NeedsL7 && (&old.residual, &old.because) != (&new.residual, &new.because))
}

/// One source's changes at an endpoint, still without the source.
fn changes(endpoint: &str, turns: [Option<Turns>; 2]) -> Vec<Change> {
    let change = |family, ((before, after, why), runs): ((Fate, Fate, String), Vec<(u16, u16)>)| Change {
        endpoint: endpoint.to_owned(),
        before,
        after,
        runs,
        family,
        why,
        sources: Vec::new(),
    };
    let of = |(family, turns): (u8, Turns)| turns.into_iter().map(move |turn| change(family, turn));
    merged(turns).into_iter().flat_map(of).collect()
}

/// Both families' as one where they agree.
fn merged([four, six]: [Option<Turns>; 2]) -> Vec<(u8, Turns)> {
    match (four, six) {
        (Some(four), Some(six)) if four == six => vec![(0, four)],
        (four, six) => {
            let of = |family, turns: Option<Turns>| turns.map(|turns| (family, turns));
            of(4, four).into_iter().chain(of(6, six)).collect()
        }
    }
}
