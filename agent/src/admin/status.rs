//! The agent's state in one answer.
//!
//! Invariant: everything that is not as it should be is in `problems`.

use thyra_datapath_abi::{Mode, Reason};
use thyra_node_proxy_bridge::L7Unavailable;
use thyra_policy_compiler::report::PolicyKind;
use thyra_proto::thyra::v1 as api;

use super::Admin;
use crate::snapshot::{Attached, Snapshot};
use crate::store::lock;
use crate::word;

/// The answer.
#[must_use]
pub(super) fn status(admin: &Admin) -> api::GetStatusResponse {
    let snapshot = admin.handle.snapshot();
    let (plane, counts) = {
        let plane = lock::read(&admin.plane);
        (plane.status(), plane.counts())
    };
    let mut problems = problems(&snapshot);
    problems.extend(plane.problems);
    let counts = counts.unwrap_or_else(|error| {
        problems.push(error.to_string());
        crate::plane::Counts::default()
    });
    let refusals = counts.reasons.iter().filter(|(r, _)| word::is_refusal(*r));
    api::GetStatusResponse {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        node: admin.about.node.clone(),
        generation: u64::from(snapshot.generation),
        datapath: plane.datapath,
        hook: plane.hook,
        local_redirect: plane.local_redirect,
        sources: admin.board.all(),
        maps: plane
            .maps
            .into_iter()
            .map(|m| api::MapFill {
                name: m.name,
                used: m.used,
                capacity: m.capacity,
            })
            .collect(),
        problems,
        endpoints: number(snapshot.held.registrations.len()),
        endpoints_enforced: number(enforced(&snapshot)),
        synced: snapshot.held.world.synced,
        policy_source: admin.about.policy_source.clone(),
        drops: refusals
            .map(|(reason, c)| api::DropCount {
                reason: reason.text().to_owned(),
                reason_number: u32::from(word::number(*reason)),
                packets: c.packets,
                bytes: c.bytes,
            })
            .collect(),
        lost_events: counts.lost,
        started_unix: admin.about.started_unix,
        peers: admin.board.peers(),
    }
}

/// Endpoints under enforcement. After a restart, until the world is whole again, the tables of the earlier
/// run go on deciding over every endpoint that is attached; their modes are not known here.
fn enforced(snapshot: &Snapshot) -> usize {
    let attached = |id: &u16| matches!(snapshot.attached.get(id), Some(Attached::At(_)));
    let modes = &snapshot.report.endpoints;
    if modes.is_empty() && snapshot.generation != 0 {
        return snapshot
            .held
            .registrations
            .keys()
            .filter(|id| attached(id))
            .count();
    }
    modes.values().filter(|e| e.mode == Mode::Enforce).count()
}

fn problems(snapshot: &Snapshot) -> Vec<String> {
    let held = &snapshot.held;
    let mut problems: Vec<String> = snapshot.problem.iter().cloned().collect();
    if !held.world.synced {
        let missing: Vec<&str> = held.awaited.iter().map(|t| t.name()).collect();
        problems.push(format!(
            "not everything was told yet, missing: {}",
            missing.join(", ")
        ));
    }
    let unreadable = |((kind, reference), why): (&(PolicyKind, _), _)| {
        let counts = if *kind == PolicyKind::RequestAuthentication {
            "takes no token"
        } else {
            "counts as an unknown DENY"
        };
        format!("{} {reference} can't be read and {counts}: {why}", kind.name())
    };
    problems.extend(held.unreadable.iter().map(unreadable));
    problems.extend(snapshot.report.problems.iter().cloned());
    for (id, attached) in snapshot.attached.iter() {
        if let Attached::Failed(why) = attached {
            problems.push(format!("endpoint {id} is not attached: {why}"));
        }
    }
    for (id, owner) in snapshot.held_back.iter() {
        problems.push(format!(
            "endpoint {id} may open no connection yet: its address was `{owner}`'s a moment ago, or is by istiod's word"
        ));
    }
    let l7 = snapshot
        .tables
        .verdicts
        .iter()
        .filter(|v| matches!(v.reason, Reason::NeedsL7 | Reason::NeedsCustom))
        .count();
    if l7 > 0 && !snapshot.l7.available {
        problems.push(L7Unavailable { verdicts: l7 }.to_string());
    }
    problems.extend(snapshot.l7.problem.clone().filter(|_| l7 > 0));
    problems.extend(snapshot.l7.refused.values().map(|why| format!("needs L7: {why}")));
    problems.extend(snapshot.l7.missing_keys.iter().cloned());
    problems.extend(snapshot.l7.missing_authorizers.iter().cloned());
    for (id, why) in &snapshot.l7.unsteered {
        problems.push(format!("endpoint {id}: what needs L7 is refused: {why}"));
    }
    problems
}

fn number(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
