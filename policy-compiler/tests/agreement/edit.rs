//! One random change of a world: a part of it is replaced by that of another random world, or goes.

use std::collections::BTreeMap;
use std::sync::Arc;

use thyra_policy_compiler::world::World;

use super::entropy::Entropy;
use super::world::world;

/// What happens to one entry.
enum Edit<K, V> {
    Put(K, V),
    Remove(K),
    Nothing,
}

/// Takes one of the `others` over, or removes one of `keys`.
fn pick<K, V>(e: &mut Entropy<'_>, mut keys: Vec<K>, mut others: Vec<(K, V)>) -> Edit<K, V> {
    if e.chance(30) {
        let at = e.below(keys.len());
        return if at < keys.len() {
            Edit::Remove(keys.swap_remove(at))
        } else {
            Edit::Nothing
        };
    }
    let at = e.below(others.len());
    if at < others.len() {
        let (key, value) = others.swap_remove(at);
        Edit::Put(key, value)
    } else {
        Edit::Nothing
    }
}

fn entry<K: Ord + Clone, V: Clone>(e: &mut Entropy<'_>, mine: &mut BTreeMap<K, V>, other: &BTreeMap<K, V>) {
    let others = other.iter().map(|(key, value)| (key.clone(), value.clone()));
    match pick(e, mine.keys().cloned().collect(), others.collect()) {
        Edit::Put(key, value) => drop(mine.insert(key, value)),
        Edit::Remove(key) => drop(mine.remove(&key)),
        Edit::Nothing => {}
    }
}

/// A pod comes, goes, or is replaced; where it comes it may take the place of another.
fn workload(e: &mut Entropy<'_>, mine: &mut World, other: &World) {
    let others = other
        .workloads
        .iter()
        .map(|(uid, workload)| (uid.clone(), workload.clone()));
    match pick(e, mine.workloads.keys().cloned().collect(), others.collect()) {
        Edit::Put(uid, workload) => drop(mine.workloads.insert(uid, workload)),
        Edit::Remove(uid) => drop(mine.workloads.remove(&uid)),
        Edit::Nothing => {}
    }
    // As the agent does: every principal has a number that it keeps.
    let principals: Vec<Arc<str>> = mine.workloads.values().map(|w| w.principal().into()).collect();
    for principal in principals {
        if !mine.identities.contains_key(&principal) {
            let number = u32::try_from(mine.identities.len()).unwrap() + 256;
            mine.identities.insert(principal, number);
        }
    }
}

/// Changes one thing.
pub(crate) fn edit(e: &mut Entropy<'_>, mine: &mut World) {
    let other = world(e);
    match e.below(14) {
        0 | 1 => entry(e, &mut mine.authorization, &other.authorization),
        2 => entry(e, &mut mine.peer_authentication, &other.peer_authentication),
        3 => entry(e, &mut mine.request_authentication, &other.request_authentication),
        5 => entry(e, &mut mine.endpoints, &other.endpoints),
        6 => entry(e, &mut mine.services, &other.services),
        7 => mine.namespaces = other.namespaces,
        8 => mine.mesh = other.mesh,
        9 => mine.node = other.node,
        _ => workload(e, mine, &other),
    }
}
