//! What an endpoint's tables say, wanted and kernel side by side.
//!
//! Invariant: every cell of the endpoint is compared with the kernel's, not only those that have a line.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use thyra_datapath_abi::count::VerdictCounter;
use thyra_datapath_abi::tables::{ClassInfo, EndpointTables, Tables, Verdict};
use thyra_datapath_abi::{Action, Mode};
use thyra_policy_compiler::explain::{self, Line};
use thyra_policy_compiler::residual::Way;
use thyra_proto::thyra::v1 as api;
use tonic::Status;

use super::{detail, verdict};
use crate::plane::Kernel;
use crate::snapshot::Snapshot;
use crate::store::{SharedPlane, lock};
use crate::word;

/// Sources that no policy is likely to name: documentation's addresses (RFC 5737, RFC 3849).
const OUTSIDER4: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 7));
const OUTSIDER6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7));

/// The answer.
///
/// # Errors
/// The endpoint has no tables in this run yet, or the kernel's can't be read.
pub(super) fn policy(
    snapshot: &Snapshot,
    plane: &SharedPlane,
    id: u16,
) -> Result<api::GetEndpointPolicyResponse, Status> {
    let placed = snapshot.tables.endpoint(id).copied();
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
    let lines = explain::lines(&snapshot.tables, id);
    let mut entries: Vec<_> = lines
        .into_iter()
        .filter(|l| view.has_family(l.family))
        .map(|l| view.entry(&l))
        .collect();
    if !entries.iter().any(|e| e.drift) {
        entries.extend(view.drifting_cells());
    }
    let report = snapshot.report.endpoints.get(&id);
    Ok(api::GetEndpointPolicyResponse {
        endpoint: detail::one(snapshot, plane, id),
        drift: entries.iter().any(|e| e.drift),
        residuals: residuals(snapshot, &entries),
        entries,
        notes: report.map_or_else(Vec::new, |r| r.notes.to_vec()),
    })
}

/// Those that the entries name, each once.
fn residuals(snapshot: &Snapshot, entries: &[api::PolicyEntry]) -> Vec<api::Residual> {
    let wanted = entries.iter().filter_map(|entry| entry.wanted.as_ref());
    let named: BTreeSet<&str> = wanted.map(|verdict| verdict.residual.as_str()).collect();
    let held = named.into_iter().filter_map(|address| {
        let residual = snapshot.residuals.get(address)?;
        Some(api::Residual {
            address: address.to_owned(),
            http: residual.http_words(),
            other: residual.other_words(),
            way: way(snapshot, address, residual.way()).to_owned(),
        })
    });
    held.collect()
}

/// Who is given the connections of a residual, in words.
fn way(snapshot: &Snapshot, address: &str, cheapest: Way) -> &'static str {
    match cheapest {
        Way::Inline(_) => cheapest.words(),
        Way::HoldTls | Way::HoldHttp if snapshot.l7.holds.contains_key(address) => cheapest.words(),
        Way::HoldTls | Way::HoldHttp => {
            "inline: could be judged once for the connection; see `--l7-hold` and the agent's log"
        }
    }
}

struct View<'a> {
    snapshot: &'a Snapshot,
    plane: &'a SharedPlane,
    placed: EndpointTables,
    kernel: &'a dyn Kernel,
    counters: BTreeMap<u16, VerdictCounter>,
}

impl View<'_> {
    /// A line of a family in which the pod has no address says nothing.
    fn has_family(&self, family: u8) -> bool {
        let registration = self.snapshot.held.registrations.get(&self.placed.endpoint);
        family == 0 || registration.is_some_and(|r| r.addresses.iter().any(|a| a.is_ipv4() == (family == 4)))
    }

    fn entry(&self, line: &Line) -> api::PolicyEntry {
        let source = line
            .source
            .filter(|s| line.family == 0 || s.is_ipv4() == (line.family == 4));
        // A class that no address is known of can't be asked about: the kernel's side stays empty.
        let kernel = source.map(|s| self.kernel(s, line.port));
        let wanted = &line.verdict;
        let counter = self
            .id(wanted)
            .and_then(|id| self.counters.get(&id))
            .copied()
            .unwrap_or_default();
        let proxy_port = self.proxy_port(wanted);
        let mut shown = verdict::to_api(wanted);
        if proxy_port != 0 || self.is_held(wanted) {
            shown.enforced_by = verdict::WITH_ENVOY.to_owned();
        }
        let pending = line.pending.then(|| "pending".to_owned());
        api::PolicyEntry {
            family: u32::from(line.family),
            identity: line.identity,
            principal: line.principal.as_deref().unwrap_or_default().to_owned(),
            blocks: line
                .blocks
                .iter()
                .map(ToString::to_string)
                .chain(pending)
                .collect(),
            ports: line.ports.clone(),
            wanted: Some(shown),
            proxy_port: u32::from(proxy_port),
            drift: kernel.as_ref().is_some_and(|k| !self.agree(wanted, k)),
            kernel: kernel.and_then(|k| k.shown),
            packets: counter.packets,
            bytes: counter.bytes,
        }
    }

    /// Where Envoy listens for connections with this verdict; 0 where none goes there.
    fn proxy_port(&self, verdict: &Verdict) -> u16 {
        let l7 = &self.snapshot.l7;
        let steered = verdict.cell_action() == Action::Proxy
            && self.placed.mode == Mode::Enforce
            && !l7.unsteered.contains_key(&self.placed.endpoint);
        let residual = verdict.residual.as_ref().filter(|_| steered);
        residual
            .and_then(|residual| l7.ports.get(residual))
            .copied()
            .unwrap_or(0)
    }

    /// Whether connections with this verdict are held until an oracle of Envoy's has answered.
    fn is_held(&self, verdict: &Verdict) -> bool {
        let l7 = &self.snapshot.l7;
        let judged = |residual| l7.holds.contains_key(residual) && !l7.refused.contains_key(residual);
        verdict.cell_action() == Action::Proxy
            && self.placed.mode == Mode::Enforce
            && verdict.residual.as_ref().is_some_and(judged)
    }

    /// One line for each cell that the kernel holds differently.
    fn drifting_cells(&self) -> Vec<api::PolicyEntry> {
        let tables = &self.snapshot.tables;
        let mut entries = Vec::new();
        for (class, source) in representatives(tables) {
            let family = if source.is_ipv4() { 4 } else { 6 };
            let set = if source.is_ipv4() {
                self.placed.set4
            } else {
                self.placed.set6
            };
            let Some(info) = tables.class(class).filter(|_| self.has_family(family)) else {
                continue;
            };
            for (port, ports) in port_classes(tables) {
                let kernel = self.kernel(source, port);
                let wanted = tables.verdict(set, port, class);
                if wanted.is_some_and(|w| self.agree(w, &kernel)) {
                    continue;
                }
                entries.push(drifting(family, info, ports, wanted, kernel.shown));
            }
        }
        entries
    }

    fn kernel(&self, source: IpAddr, port: u16) -> Held {
        let Some((action, id)) = self.kernel.judge(self.placed.endpoint, source, port) else {
            return Held::default();
        };
        let shown = match lock::read(self.plane).verdict(id) {
            Some(known) if action == known.cell_action() => verdict::to_api(&known),
            Some(known) => api::Verdict {
                action: word::action(action).into(),
                ..verdict::to_api(&known)
            },
            None => verdict::unnamed(action, id),
        };
        Held {
            cell: Some((action, id)),
            shown: Some(shown),
        }
    }

    fn agree(&self, wanted: &Verdict, kernel: &Held) -> bool {
        kernel
            .cell
            .is_some_and(|(action, id)| action == wanted.cell_action() && self.id(wanted) == Some(id))
    }

    fn id(&self, verdict: &Verdict) -> Option<u16> {
        let index = self.snapshot.tables.verdicts.iter().position(|v| v == verdict)?;
        self.snapshot.verdict_ids.get(index).copied()
    }
}

/// The kernel's side of a cell.
#[derive(Default)]
struct Held {
    cell: Option<(thyra_datapath_abi::Action, u16)>,
    shown: Option<api::Verdict>,
}

fn drifting(
    family: u8,
    info: &ClassInfo,
    ports: String,
    wanted: Option<&Verdict>,
    kernel: Option<api::Verdict>,
) -> api::PolicyEntry {
    api::PolicyEntry {
        family: u32::from(family),
        identity: info.identity,
        principal: info.principal.as_deref().unwrap_or_default().to_owned(),
        blocks: info.blocks.iter().map(ToString::to_string).collect(),
        ports,
        wanted: wanted.map(verdict::to_api),
        kernel,
        proxy_port: 0,
        drift: true,
        packets: 0,
        bytes: 0,
    }
}

/// An address of each class and family, by which the kernel can be asked.
fn representatives(tables: &Tables) -> Vec<(u32, IpAddr)> {
    let exact = tables.addresses.iter().map(|s| (s.class, s.address));
    let blocks = tables.blocks.iter().map(|b| (b.class, b.network));
    let mut found: BTreeMap<(u32, bool), IpAddr> = BTreeMap::new();
    for (class, address) in [(0, OUTSIDER4), (0, OUTSIDER6)]
        .into_iter()
        .chain(exact)
        .chain(blocks)
    {
        if tables.class_of(address) == class {
            found.entry((class, address.is_ipv4())).or_insert(address);
        }
    }
    found
        .into_iter()
        .map(|((class, _), address)| (class, address))
        .collect()
}

/// A port of each port class, with all its ports as text.
fn port_classes(tables: &Tables) -> Vec<(u16, String)> {
    let mut classes: BTreeMap<u16, (u16, Vec<String>)> = BTreeMap::new();
    for (i, (first, class)) in tables.port_runs.iter().enumerate() {
        let last = tables
            .port_runs
            .get(i + 1)
            .map_or(u16::MAX, |(next, _)| next.saturating_sub(1));
        let text = if *first == last {
            first.to_string()
        } else {
            format!("{first}-{last}")
        };
        classes
            .entry(*class)
            .or_insert_with(|| (*first, Vec::new()))
            .1
            .push(text);
    }
    classes
        .into_values()
        .map(|(port, ranges)| (port, ranges.join(",")))
        .collect()
}
