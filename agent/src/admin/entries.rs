//! What an endpoint's tables say, wanted and kernel side by side.
//!
//! Invariant: every cell of the endpoint is compared with the kernel's; lines are merged only where both sides agree
//! with their neighbours'.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use thyra_datapath_abi::Action;
use thyra_datapath_abi::maps::VerdictCounter;
use thyra_datapath_abi::tables::{ClassInfo, EndpointTables, Tables};
use thyra_proto::thyra::v1 as api;
use tonic::Status;

use super::{detail, verdict};
use crate::plane::Kernel;
use crate::snapshot::Snapshot;
use crate::store::{SharedPlane, lock};

/// Where an address that no policy names is looked for.
const OUTSIDERS4: [Ipv4Addr; 4] = [
    Ipv4Addr::new(203, 0, 113, 7),
    Ipv4Addr::new(198, 51, 100, 7),
    Ipv4Addr::new(192, 0, 2, 7),
    Ipv4Addr::new(240, 0, 0, 7),
];
const OUTSIDERS6: [Ipv6Addr; 3] = [
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7),
    Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 7),
    Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 7),
];

/// One cell: index of the wanted verdict, and what the kernel holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cell {
    wanted: u16,
    kernel: Option<(Action, u16)>,
}

/// A row of cells, one for each port class, and the class's name.
struct Row {
    class: u16,
    cells: Vec<Cell>,
}

/// The answer.
///
/// # Errors
/// The endpoint has no tables in this run yet, or the kernel's can't be read.
pub(super) fn policy(
    snapshot: &Snapshot,
    plane: &SharedPlane,
    id: u16,
) -> Result<api::GetEndpointPolicyResponse, Status> {
    let placed = snapshot
        .tables
        .endpoints
        .iter()
        .find(|e| e.endpoint == id)
        .copied();
    let placed = placed.ok_or_else(|| {
        Status::failed_precondition(
            "no tables were compiled yet; what the kernel enforces is an earlier run's",
        )
    })?;
    let (kernel, counts) = {
        let plane = lock::read(plane);
        (plane.read_back(), plane.counts())
    };
    let kernel = kernel.map_err(|e| Status::internal(e.to_string()))?;
    let counters = counts
        .map(|c| c.verdicts.into_iter().collect())
        .unwrap_or_default();
    let view = View {
        snapshot,
        plane,
        placed,
        kernel: kernel.as_ref(),
        counters,
    };
    let mut lines = view.family(4);
    lines.extend(view.family(6));
    let entries = merge_families(lines);
    let report = snapshot.report.endpoints.get(&id);
    Ok(api::GetEndpointPolicyResponse {
        endpoint: detail::one(snapshot, plane, id),
        drift: entries.iter().any(|e| e.drift),
        entries,
        notes: report.map_or_else(Vec::new, |r| r.notes.to_vec()),
    })
}

struct View<'a> {
    snapshot: &'a Snapshot,
    plane: &'a SharedPlane,
    placed: EndpointTables,
    kernel: &'a dyn Kernel,
    counters: BTreeMap<u16, VerdictCounter>,
}

impl View<'_> {
    fn tables(&self) -> &Tables {
        &self.snapshot.tables
    }

    /// Lines of one family. A class that differs nowhere from the outsider has none of its own.
    fn family(&self, family: u32) -> Vec<api::PolicyEntry> {
        let registration = self.snapshot.held.registrations.get(&self.placed.endpoint);
        if !registration.is_some_and(|r| r.addresses.iter().any(|a| a.is_ipv4() == (family == 4))) {
            return Vec::new();
        }
        let rows: Vec<Row> = representatives(self.tables(), family)
            .into_iter()
            .map(|(c, a)| self.row(c, a))
            .collect();
        let outsider = rows.iter().find(|r| r.class == 0).map(|r| r.cells.clone());
        let mut entries = Vec::new();
        let mut said: BTreeSet<(u32, String, Vec<String>, Vec<Cell>)> = BTreeSet::new();
        for row in rows
            .iter()
            .filter(|r| r.class != 0)
            .chain(rows.iter().filter(|r| r.class == 0))
        {
            let Some(info) = self.tables().classes.get(usize::from(row.class)) else {
                continue;
            };
            let key = (
                info.identity,
                principal(info),
                blocks(row.class, info),
                row.cells.clone(),
            );
            if said.insert(key) {
                entries.extend(self.lines(family, row, info, outsider.as_deref()));
            }
        }
        entries
    }

    fn row(&self, class: u16, source: IpAddr) -> Row {
        let set = if source.is_ipv4() {
            self.placed.set4
        } else {
            self.placed.set6
        };
        let tables = self.tables();
        let column = tables.class_column.get(usize::from(class)).copied().unwrap_or(0);
        let cells = first_ports(tables).into_iter().map(|(port_class, port)| {
            let row = tables
                .sets
                .get(usize::from(set))
                .and_then(|s| s.get(usize::from(port_class)));
            let row = row.and_then(|r| tables.rows.get(usize::from(*r)));
            let wanted = row
                .and_then(|r| r.get(usize::from(column)))
                .copied()
                .unwrap_or(u16::MAX);
            Cell {
                wanted,
                kernel: self.kernel.judge(self.placed.endpoint, source, port),
            }
        });
        Row {
            class,
            cells: cells.collect(),
        }
    }

    /// One line for each distinct cell of the row, without those that the outsider has too.
    fn lines(
        &self,
        family: u32,
        row: &Row,
        info: &ClassInfo,
        outsider: Option<&[Cell]>,
    ) -> Vec<api::PolicyEntry> {
        let mut by_cell: BTreeMap<Cell, BTreeSet<u16>> = BTreeMap::new();
        for ((port_class, _), (i, cell)) in first_ports(self.tables())
            .into_iter()
            .zip(row.cells.iter().enumerate())
        {
            let same = row.class != 0 && outsider.and_then(|o| o.get(i)) == Some(cell);
            if !same {
                by_cell.entry(*cell).or_default().insert(port_class);
            }
        }
        let mut lines: Vec<_> = by_cell
            .into_iter()
            .map(|(cell, ports)| self.line(family, row.class, info, cell, &ports))
            .collect();
        // A line for one port stands above that for all the rest.
        lines.sort_by_key(|l| l.ports.contains(','));
        lines
    }

    fn line(
        &self,
        family: u32,
        class: u16,
        info: &ClassInfo,
        cell: Cell,
        ports: &BTreeSet<u16>,
    ) -> api::PolicyEntry {
        let wanted = self.tables().verdicts.get(usize::from(cell.wanted));
        let id = self.snapshot.verdict_ids.get(usize::from(cell.wanted)).copied();
        let agree = match (wanted, cell.kernel) {
            (Some(wanted), Some((action, kernel))) => wanted.action == action && Some(kernel) == id,
            _ => false,
        };
        let kernel = cell
            .kernel
            .map(|(action, id)| match lock::read(self.plane).verdict(id) {
                Some(known) => api::Verdict {
                    action: crate::word::action(action).into(),
                    ..verdict::to_api(&known)
                },
                None => verdict::unnamed(action, id),
            });
        let counter = id
            .and_then(|id| self.counters.get(&id))
            .copied()
            .unwrap_or_default();
        api::PolicyEntry {
            family,
            identity: info.identity,
            principal: principal(info),
            blocks: blocks(class, info),
            ports: port_text(self.tables(), ports),
            wanted: wanted.map(verdict::to_api),
            kernel,
            drift: !agree,
            packets: counter.packets,
            bytes: counter.bytes,
        }
    }
}

fn principal(info: &ClassInfo) -> String {
    info.principal.as_deref().unwrap_or_default().to_owned()
}

fn blocks(class: u16, info: &ClassInfo) -> Vec<String> {
    if class == 0 {
        return vec!["ANY".to_owned()];
    }
    let pending = info.pending.then(|| "pending".to_owned());
    info.blocks.iter().map(|b| b.to_string()).chain(pending).collect()
}

/// An address of each class that has one in this family: by it the kernel is asked.
fn representatives(tables: &Tables, family: u32) -> BTreeMap<u16, IpAddr> {
    let v4 = family == 4;
    let exact = tables.addresses.iter().map(|s| (s.class, s.address));
    let blocks = tables
        .blocks
        .iter()
        .flat_map(|b| [(b.class, b.network), (b.class, next(b.network))]);
    let outside = if v4 {
        OUTSIDERS4.map(|a| (0, IpAddr::V4(a))).to_vec()
    } else {
        OUTSIDERS6.map(|a| (0, IpAddr::V6(a))).to_vec()
    };
    let mut found = BTreeMap::new();
    for (class, address) in outside.into_iter().chain(exact).chain(blocks) {
        if address.is_ipv4() == v4 && tables.class_of(address) == class {
            found.entry(class).or_insert(address);
        }
    }
    found
}

/// A network's own address may be an exact one; the next may not.
fn next(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(a) => IpAddr::V4(Ipv4Addr::from(u32::from(a).wrapping_add(1))),
        IpAddr::V6(a) => IpAddr::V6(Ipv6Addr::from(u128::from(a).wrapping_add(1))),
    }
}

/// A port of each port class.
fn first_ports(tables: &Tables) -> BTreeMap<u16, u16> {
    let mut ports = BTreeMap::new();
    for (first, class) in &tables.port_runs {
        ports.entry(*class).or_insert(*first);
    }
    ports
}

/// "9080", "1-79,81-65535", "ANY".
fn port_text(tables: &Tables, classes: &BTreeSet<u16>) -> String {
    let mut ranges: Vec<(u16, u16)> = Vec::new();
    for (i, (first, class)) in tables.port_runs.iter().enumerate() {
        let last = tables
            .port_runs
            .get(i + 1)
            .map_or(u16::MAX, |(next, _)| next.saturating_sub(1));
        if !classes.contains(class) {
            continue;
        }
        match ranges.last_mut() {
            Some((_, end)) if end.checked_add(1) == Some(*first) => *end = last,
            _ => ranges.push((*first, last)),
        }
    }
    let text = |(first, last): &(u16, u16)| match (*first, *last) {
        (0, u16::MAX) => "ANY".to_owned(),
        (a, b) if a == b => a.to_string(),
        (a, b) => format!("{a}-{b}"),
    };
    ranges.iter().map(text).collect::<Vec<_>>().join(",")
}

/// A line that both families have is said once.
fn merge_families(lines: Vec<api::PolicyEntry>) -> Vec<api::PolicyEntry> {
    let mut merged: Vec<api::PolicyEntry> = Vec::new();
    for line in lines {
        let twin = merged.iter_mut().find(|m| {
            let as_this = api::PolicyEntry {
                family: line.family,
                ..(**m).clone()
            };
            m.family != line.family && as_this == line
        });
        match twin {
            Some(twin) => twin.family = 0,
            None => merged.push(line),
        }
    }
    // The outsider's lines are the rest of everything: last.
    merged.sort_by_key(|l| l.blocks.first().is_some_and(|b| b == "ANY"));
    merged
}
