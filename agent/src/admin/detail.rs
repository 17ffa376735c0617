//! One endpoint as the admin API tells it.
//!
//! Invariant: `ready` is said only of an endpoint whose programs sit at its interface and whose tables are
//! live.

use std::collections::BTreeMap;

use thyra_datapath_abi::count::EndpointCounter;
use thyra_proto::thyra::v1 as api;

use crate::registration::Registration;
use crate::snapshot::{Attached, Snapshot};
use crate::store::{SharedPlane, lock};
use crate::word;

/// All endpoints, by id.
#[must_use]
pub fn all(snapshot: &Snapshot, plane: &SharedPlane) -> Vec<api::EndpointDetail> {
    let counters = counters(plane);
    snapshot
        .held
        .registrations
        .iter()
        .map(|(id, r)| detail(snapshot, (&counters, plane), *id, r))
        .collect()
}

/// One endpoint.
#[must_use]
pub fn one(snapshot: &Snapshot, plane: &SharedPlane, id: u16) -> Option<api::EndpointDetail> {
    let registration = snapshot.held.registrations.get(&id)?;
    Some(detail(snapshot, (&counters(plane), plane), id, registration))
}

/// Counters that can't be read are shown as zero; the map itself is named in status then.
fn counters(plane: &SharedPlane) -> BTreeMap<u16, EndpointCounter> {
    lock::read(plane)
        .counts()
        .map(|c| c.endpoints.into_iter().collect())
        .unwrap_or_default()
}

fn detail(
    snapshot: &Snapshot,
    (counters, plane): (&BTreeMap<u16, EndpointCounter>, &SharedPlane),
    id: u16,
    registration: &Registration,
) -> api::EndpointDetail {
    let report = snapshot.report.endpoints.get(&id);
    let class = registration
        .addresses
        .iter()
        .find_map(|a| snapshot.class(*a).filter(|c| c.principal.is_some()));
    let ifindex = match snapshot.attached.get(&id) {
        Some(Attached::At(index)) => *index,
        Some(Attached::Failed(_)) | None => 0,
    };
    let mut endpoint = registration.to_api();
    // What selects and enrols it, which the API server may have told differently.
    if let Some(known) = snapshot.held.world.endpoints.get(&id) {
        let own = known
            .labels
            .iter()
            .filter(|(k, _)| !k.starts_with("thyra.io/authorization/"));
        endpoint.labels = own.map(|(k, v)| (k.clone(), v.clone())).collect();
        endpoint.service_account.clone_from(&known.service_account);
    }
    let counter = counters.get(&id).copied().unwrap_or_default();
    api::EndpointDetail {
        id: u32::from(id),
        endpoint: Some(endpoint),
        mode: report.map_or_else(String::new, |r| word::mode(r.mode).to_owned()),
        mode_reason: report.map_or_else(String::new, |r| r.mode_reason.to_owned()),
        identity: class.map_or(0, |c| c.identity),
        principal: class
            .and_then(|c| c.principal.as_deref())
            .unwrap_or_default()
            .to_owned(),
        status: status(snapshot, id),
        generation: u64::from(snapshot.generation),
        ifindex,
        policies: report.map_or_else(Vec::new, |r| r.policies.iter().map(ToString::to_string).collect()),
        counters: Some(api::EndpointCounters {
            to_pod_packets: counter.to_pod_packets,
            from_pod_packets: counter.from_pod_packets,
            to_pod_dropped: counter.to_pod_dropped,
            from_pod_dropped: counter.from_pod_dropped,
        }),
        local_redirect: lock::read(plane).local_redirect(id),
        hook: lock::read(plane).hook_of(id).to_owned(),
    }
}

fn status(snapshot: &Snapshot, id: u16) -> String {
    let off = snapshot
        .report
        .endpoints
        .get(&id)
        .is_some_and(|r| r.mode == thyra_datapath_abi::Mode::Off);
    match snapshot.attached.get(&id) {
        Some(Attached::Failed(why)) => format!("error: {why}"),
        None => "waiting".into(),
        Some(Attached::At(_)) if snapshot.held_back.contains_key(&id) => "held-back".into(),
        Some(Attached::At(_)) if off => "not-enforced".into(),
        Some(Attached::At(_)) if !snapshot.held.world.synced => "waiting".into(),
        Some(Attached::At(_)) => "ready".into(),
    }
}
