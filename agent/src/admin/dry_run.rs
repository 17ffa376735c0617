//! What would happen to a connection: asked of the live tables.
//!
//! Invariant: the same tables answer here as in the kernel.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use thyra_policy_compiler::world::Service;
use thyra_proto::thyra::v1 as api;
use tonic::Status;

use super::verdict;
use crate::snapshot::Snapshot;

/// `outside`: addresses that documentation owns (RFC 5737, RFC 3849); the lab's outsider has them too.
const OUTSIDE4: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 7));
const OUTSIDE6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7));

/// One verdict for each pod that the destination names.
///
/// # Errors
/// INVALID_ARGUMENT, NOT_FOUND or FAILED_PRECONDITION with what to write instead.
pub(super) fn dry_run(
    snapshot: &Snapshot,
    request: &api::DryRunRequest,
) -> Result<api::DryRunResponse, Status> {
    let api::DryRunRequest {
        from,
        to,
        port,
        family,
    } = request;
    let v4 = match family {
        0 | 4 => true,
        6 => false,
        other => {
            return Err(Status::invalid_argument(format!(
                "family is 4 or 6, not `{other}`"
            )));
        }
    };
    let port = u16::try_from(*port).ok().filter(|p| *p != 0);
    let port = port.ok_or_else(|| Status::invalid_argument("port is a number from 1 to 65535"))?;
    let source = source(snapshot, from, v4)?;
    let targets = destinations(snapshot, to, port, v4)?;
    let judge = |(id, port): (u16, u16)| {
        let verdict = snapshot.tables.judge(id, source, port);
        let name = snapshot
            .held
            .registrations
            .get(&id)
            .map_or_else(String::new, |r| r.pod());
        let missing = || Status::internal(format!("endpoint {id} has no tables"));
        let verdict = verdict.ok_or_else(missing)?;
        Ok(api::DryRunVerdict {
            to: name,
            port: u32::from(port),
            verdict: Some(verdict::to_api(verdict)),
        })
    };
    Ok(api::DryRunResponse {
        verdicts: targets.into_iter().map(judge).collect::<Result<_, Status>>()?,
    })
}

fn source(snapshot: &Snapshot, from: &str, v4: bool) -> Result<IpAddr, Status> {
    if from == "outside" {
        return Ok(if v4 { OUTSIDE4 } else { OUTSIDE6 });
    }
    if let Ok(address) = from.parse::<IpAddr>() {
        let address = address.to_canonical();
        if address.is_ipv4() != v4 {
            return Err(Status::invalid_argument(format!(
                "`{from}` is not of the family that was asked for"
            )));
        }
        return Ok(address);
    }
    let parts: Vec<&str> = from.split('/').collect();
    match parts.as_slice() {
        [namespace, name] => pod_address(snapshot, namespace, name, v4),
        [namespace, "sa", account] => account_address(snapshot, namespace, account, v4),
        _ => Err(Status::invalid_argument(format!(
            "`{from}` is not `namespace/pod`, `namespace/sa/NAME`, an address or `outside`"
        ))),
    }
}

fn pod_address(snapshot: &Snapshot, namespace: &str, name: &str, v4: bool) -> Result<IpAddr, Status> {
    let here = snapshot
        .held
        .registrations
        .values()
        .filter(|r| r.namespace == namespace && r.name == name);
    let here = here.flat_map(|r| r.addresses.iter().copied());
    let told = snapshot
        .workloads(namespace, name)
        .flat_map(|w| w.addresses.iter().copied());
    let missing = || {
        let family = if v4 { 4 } else { 6 };
        Status::not_found(format!(
            "no pod or workload `{namespace}/{name}` with an IPv{family} address is known"
        ))
    };
    here.chain(told).find(|a| a.is_ipv4() == v4).ok_or_else(missing)
}

fn account_address(snapshot: &Snapshot, namespace: &str, account: &str, v4: bool) -> Result<IpAddr, Status> {
    let tables = &snapshot.tables;
    let wanted = format!("/ns/{namespace}/sa/{account}");
    let has = |class: u32| {
        tables
            .class(class)
            .and_then(|c| c.principal.as_deref())
            .is_some_and(|p| p.ends_with(&wanted))
    };
    let mut sources = tables.addresses.iter().filter(|s| s.address.is_ipv4() == v4);
    let missing = || {
        Status::not_found(format!(
            "no workload runs as `{namespace}/{account}` \
             (`thyra dry-run --manifests DIR` answers for one that doesn't run yet)"
        ))
    };
    sources
        .find(|s| has(s.class))
        .map(|s| s.address)
        .ok_or_else(missing)
}

/// Endpoint and pod port of each pod of this node behind `to`.
fn destinations(snapshot: &Snapshot, to: &str, port: u16, v4: bool) -> Result<Vec<(u16, u16)>, Status> {
    let parts: Vec<&str> = to.split('/').collect();
    match parts.as_slice() {
        ["service", namespace, name] => backends(snapshot, namespace, name, port, v4),
        [_, _] | [_] => {
            let missing = || Status::not_found(format!("no pod `{to}` is an endpoint of this node"));
            Ok(vec![(snapshot.endpoint(to).ok_or_else(missing)?, port)])
        }
        _ => Err(Status::invalid_argument(format!(
            "`{to}` is not `namespace/pod` or `service/namespace/name`"
        ))),
    }
}

fn backends(
    snapshot: &Snapshot,
    namespace: &str,
    name: &str,
    port: u16,
    v4: bool,
) -> Result<Vec<(u16, u16)>, Status> {
    let world = &snapshot.held.world;
    let service = world
        .services
        .iter()
        .find(|(_, s)| s.namespace == namespace && s.name == name);
    let missing = || Status::not_found(format!("no Service `{namespace}/{name}` is known"));
    let (key, service): (&Arc<str>, &Arc<Service>) = service.ok_or_else(missing)?;
    if !service.ports.iter().any(|p| p.port == port) {
        return Err(Status::not_found(format!(
            "Service `{namespace}/{name}` has no port {port}"
        )));
    }
    let mut found = Vec::new();
    for workload in world.workloads.values() {
        let Some(ports) = workload.services.get(key) else {
            continue;
        };
        let Some(target) = ports.iter().find(|p| p.port == port).map(|p| p.target_port) else {
            continue;
        };
        let has = |r: &crate::registration::Registration| {
            r.addresses
                .iter()
                .any(|a| a.is_ipv4() == v4 && workload.addresses.contains(a))
        };
        let here = snapshot.held.registrations.iter().find(|(_, r)| has(r));
        found.extend(here.map(|(id, _)| (*id, target)));
    }
    found.sort_unstable();
    if found.is_empty() {
        return Err(Status::failed_precondition(format!(
            "no pod behind `{namespace}/{name}` is on this node"
        )));
    }
    Ok(found)
}
