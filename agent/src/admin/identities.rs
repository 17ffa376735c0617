//! Identities with the addresses and workloads that have them.
//!
//! Invariant: an address is listed under the identity that the tables give it, not the one that a workload
//! claims.

use std::collections::BTreeMap;

use thyra_proto::thyra::v1 as api;

use crate::snapshot::Snapshot;

/// All identities, by number.
#[must_use]
pub(super) fn list(snapshot: &Snapshot) -> api::ListIdentitiesResponse {
    let mut by_number: BTreeMap<u32, api::Identity> = BTreeMap::new();
    for class in snapshot.tables.classes.iter().filter(|c| c.identity != 0) {
        let Some(principal) = class.principal.as_deref() else {
            continue;
        };
        by_number
            .entry(class.identity)
            .or_insert_with(|| identity(class.identity, principal));
    }
    for source in snapshot.tables.addresses.iter() {
        let class = snapshot.tables.class(source.class);
        let Some(entry) = class.and_then(|c| by_number.get_mut(&c.identity)) else {
            continue;
        };
        entry.addresses.push(source.address.to_string());
        if let Some((namespace, name)) = snapshot.owner(source.address) {
            let workload = format!("{namespace}/{name}");
            if !entry.workloads.contains(&workload) {
                entry.workloads.push(workload);
            }
        }
    }
    api::ListIdentitiesResponse {
        identities: by_number.into_values().collect(),
    }
}

fn identity(id: u32, principal: &str) -> api::Identity {
    let (trust_domain, rest) = principal.split_once("/ns/").unwrap_or((principal, ""));
    let (namespace, service_account) = rest.split_once("/sa/").unwrap_or((rest, ""));
    api::Identity {
        id,
        principal: principal.to_owned(),
        namespace: namespace.to_owned(),
        service_account: service_account.to_owned(),
        trust_domain: trust_domain.to_owned(),
        addresses: Vec::new(),
        workloads: Vec::new(),
    }
}
