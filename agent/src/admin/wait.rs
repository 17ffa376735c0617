//! Waiting until named object versions are enforced.
//!
//! Invariant: an object counts as enforced only by the snapshot, whose world the live tables were compiled
//! from.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use serde_json::Value;
use thyra_datapath_abi::tables::PolicyRef;
use thyra_policy_compiler::authorizer::fingerprint;
use thyra_policy_compiler::report::PolicyKind;
use thyra_proto::thyra::v1 as api;
use tonic::Status;

use crate::snapshot::Snapshot;
use crate::store::Handle;

/// When the caller names no time.
const DEFAULT_PATIENCE: Duration = Duration::from_secs(10);

/// Waits.
///
/// # Errors
/// INVALID_ARGUMENT for a kind that can't be waited for; DEADLINE_EXCEEDED naming what isn't enforced.
pub(super) async fn wait(
    handle: &Handle,
    request: api::WaitEnforcedRequest,
) -> Result<api::WaitEnforcedResponse, Status> {
    let api::WaitEnforcedRequest { objects, timeout_ms } = request;
    let patience = match timeout_ms {
        0 => DEFAULT_PATIENCE,
        ms => Duration::from_millis(u64::from(ms)),
    };
    let mut snapshots = handle.watch();
    let until = tokio::time::sleep(patience);
    tokio::pin!(until);
    loop {
        let snapshot = snapshots.borrow_and_update().clone();
        let missing = missing(&snapshot, &objects)?;
        if missing.is_empty() {
            return Ok(api::WaitEnforcedResponse {
                generation: u64::from(snapshot.generation),
            });
        }
        tokio::select! {
            changed = snapshots.changed() => {
                changed.map_err(|_| Status::unavailable("the agent is stopping"))?;
            }
            () = &mut until => {
                let problem = snapshot.problem.iter().map(|p| format!(" ({p})")).collect::<String>();
                let missing = missing.join("; ");
                return Err(Status::deadline_exceeded(format!("not enforced yet: {missing}{problem}")));
            }
        }
    }
}

fn missing(snapshot: &Snapshot, objects: &[api::ObjectVersion]) -> Result<Vec<String>, Status> {
    let mut missing = Vec::new();
    for object in objects {
        if let Some(why) = lacks(snapshot, object)? {
            let name = if object.namespace.is_empty() {
                object.name.clone()
            } else {
                format!("{}/{}", object.namespace, object.name)
            };
            missing.push(format!("{} {name}: {why}", object.kind));
        }
    }
    Ok(missing)
}

/// Why an object is not enforced as asked; none when it is.
fn lacks(snapshot: &Snapshot, object: &api::ObjectVersion) -> Result<Option<String>, Status> {
    let held = &snapshot.held;
    let world = &held.world;
    if !world.synced {
        return Ok(Some("not everything was told yet".into()));
    }
    if snapshot.l7.is_awaited {
        return Ok(Some("envoy has not taken the rules yet".into()));
    }
    let reference = PolicyRef {
        namespace: object.namespace.as_str().into(),
        name: object.name.as_str().into(),
    };
    let unreadable = |kind| held.unreadable.contains_key(&(kind, reference.clone()));
    Ok(match object.kind.as_str() {
        "AuthorizationPolicy" => {
            let version = world.authorization.get(&reference).map(|p| p.version.as_str());
            policy(object, version, unreadable(PolicyKind::Authorization))
        }
        "PeerAuthentication" => {
            let version = world
                .peer_authentication
                .get(&reference)
                .map(|p| p.version.as_str());
            policy(object, version, unreadable(PolicyKind::PeerAuthentication))
        }
        "RequestAuthentication" => {
            let version = world
                .request_authentication
                .get(&reference)
                .map(|p| p.version.as_str());
            policy(object, version, unreadable(PolicyKind::RequestAuthentication))
        }
        "MeshConfig" | "ConfigMap" => mesh(snapshot, object)?,
        "Namespace" => namespace(snapshot, object),
        "Pod" => pod(snapshot, object)?,
        "WorkloadEntry" => workload(snapshot, object, &object.name)?,
        "Service" => service(snapshot, object)?,
        // They decide nothing by themselves: what uses them carries the name.
        "ServiceAccount" | "Node" => None,
        other => {
            let text = format!("`{other}` is not a kind whose enforcement can be waited for");
            return Err(Status::invalid_argument(text));
        }
    })
}

/// The version that is held against the version that is wanted.
fn policy(object: &api::ObjectVersion, held: Option<&str>, unreadable: bool) -> Option<String> {
    match (object.deleted, held) {
        (true, None) if !unreadable => None,
        (true, _) => Some("still held".into()),
        (false, _) if unreadable => Some("it can't be read (`thyra policy list` says why)".into()),
        (false, None) => Some("has not arrived".into()),
        (false, Some(version)) => older(&object.version, version),
    }
}

/// Versions of one kind are numbers that grow; where they aren't, only the same one will do.
fn older(wanted: &str, held: &str) -> Option<String> {
    let reached = match (wanted.parse::<u128>(), held.parse::<u128>()) {
        (Ok(wanted), Ok(held)) => held >= wanted,
        _ => wanted.is_empty() || wanted == held,
    };
    (!reached).then(|| format!("held is version `{held}`, wanted `{wanted}`"))
}

/// MeshConfig has no version on istiod's wire: its content is compared then.
fn mesh(snapshot: &Snapshot, object: &api::ObjectVersion) -> Result<Option<String>, Status> {
    let mesh = &snapshot.held.world.mesh;
    if object.deleted {
        // Without the object Istio's defaults hold, but for what flags say.
        let default =
            mesh.trust_domain_aliases.is_empty() && fingerprint(&mesh.extension_providers).is_empty();
        return Ok((!default).then(|| "its settings are still held".into()));
    }
    if !mesh.version.is_empty() && older(&object.version, &mesh.version).is_none() {
        return Ok(None);
    }
    let Some(content) = content(object)? else {
        let same = mesh.version.is_empty();
        return Ok((!same).then(|| format!("held is version `{}`", mesh.version)));
    };
    let differs = |key: &str, held: Value| content.get(key).is_some_and(|wanted| *wanted != held);
    let differs = differs("trustDomain", mesh.trust_domain.clone().into())
        || differs("rootNamespace", mesh.root_namespace.clone().into())
        || differs("trustDomainAliases", mesh.trust_domain_aliases.clone().into())
        || differs("authorizers", fingerprint(&mesh.extension_providers).into());
    Ok(differs.then(|| "held settings differ".into()))
}

/// Where no API server tells namespaces, registrations do, and whoever waits has written those.
fn namespace(snapshot: &Snapshot, object: &api::ObjectVersion) -> Option<String> {
    let held = &snapshot.held;
    let version = held.namespaces.get(&object.name).map(|n| n.version.as_str());
    match (object.deleted, version) {
        _ if held.namespaces.is_empty() => None,
        (true, None) => None,
        (true, Some(_)) => Some("still held".into()),
        (false, None) => Some("has not arrived".into()),
        (false, Some(version)) => older(&object.version, version),
    }
}

fn pod(snapshot: &Snapshot, object: &api::ObjectVersion) -> Result<Option<String>, Status> {
    let held = &snapshot.held;
    let key = (object.namespace.clone(), object.name.clone());
    if object.deleted && held.pods.contains_key(&key) {
        return Ok(Some("still held".into()));
    }
    let told = held
        .pods
        .get(&key)
        .filter(|p| !p.version.is_empty() && !object.version.is_empty());
    if let Some(why) = told.and_then(|p| older(&object.version, &p.version)) {
        return Ok(Some(why));
    }
    let mut endpoints = held.world.endpoints.values();
    let endpoint = endpoints.find(|e| e.namespace == object.namespace && e.name == object.name);
    if let Some(owner) = endpoint.and_then(|e| snapshot.held_back.get(&e.id)) {
        return Ok(Some(format!(
            "it may open nothing yet: its address was `{owner}`'s"
        )));
    }
    if let (false, Some(content)) = (object.deleted, content(object)?)
        && let (Some(labels), Some(endpoint)) = (content.get("labels").and_then(Value::as_object), endpoint)
    {
        let has = |(k, v): (&String, &Value)| endpoint.labels.get(k).map(String::as_str) == v.as_str();
        if !labels.iter().all(has) {
            return Ok(Some("held labels differ".into()));
        }
    }
    workload(snapshot, object, &object.name)
}

fn workload(snapshot: &Snapshot, object: &api::ObjectVersion, name: &str) -> Result<Option<String>, Status> {
    let held = snapshot.workloads(&object.namespace, name);
    let held: BTreeSet<IpAddr> = held.flat_map(|w| w.addresses.iter().copied()).collect();
    let known = snapshot.workloads(&object.namespace, name).next().is_some();
    if object.deleted {
        return Ok(known.then(|| "still held".into()));
    }
    let Some(content) = content(object)? else {
        return Ok(None);
    };
    let Some(wanted) = content.get("addresses").and_then(Value::as_array) else {
        return Ok(None);
    };
    let wanted: BTreeSet<IpAddr> = wanted
        .iter()
        .filter_map(Value::as_str)
        .filter_map(|a| a.parse().ok())
        .collect();
    if wanted.is_empty() || held == wanted {
        return Ok(None);
    }
    let text = |list: &BTreeSet<IpAddr>| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    Ok(Some(format!(
        "held addresses are [{}], wanted [{}]",
        text(&held),
        text(&wanted)
    )))
}

fn service(snapshot: &Snapshot, object: &api::ObjectVersion) -> Result<Option<String>, Status> {
    let world = &snapshot.held.world;
    let service = world
        .services
        .values()
        .find(|s| s.namespace == object.namespace && s.name == object.name);
    let Some(service) = service else {
        return Ok((!object.deleted).then(|| "has not arrived".into()));
    };
    if object.deleted {
        return Ok(Some("still held".into()));
    }
    let Some(content) = content(object)? else {
        return Ok(None);
    };
    let Some(wanted) = content.get("ports").and_then(Value::as_array) else {
        return Ok(None);
    };
    let pair = |p: &Value| Some((p.get(0)?.as_u64()?, p.get(1).and_then(Value::as_u64).unwrap_or(0)));
    let wanted: BTreeSet<(u64, u64)> = wanted.iter().filter_map(pair).collect();
    let held: BTreeSet<(u64, u64)> = service
        .ports
        .iter()
        .map(|p| (u64::from(p.port), u64::from(p.target_port)))
        .collect();
    // istiod tells a named target port as 0: its number differs from pod to pod. Ports that aren't TCP may be
    // told too.
    let agrees = |(port, target): &(u64, u64)| {
        held.iter()
            .any(|(p, t)| p == port && (t == target || *t == 0 || *target == 0))
    };
    Ok((!wanted.iter().all(agrees)).then(|| format!("held ports are {held:?}, wanted {wanted:?}")))
}

fn content(object: &api::ObjectVersion) -> Result<Option<Value>, Status> {
    if object.content.is_empty() {
        return Ok(None);
    }
    let wrong = |e| {
        Status::invalid_argument(format!(
            "`content` of {} {} is not JSON: {e}",
            object.kind, object.name
        ))
    };
    serde_json::from_str(&object.content).map(Some).map_err(wrong)
}
