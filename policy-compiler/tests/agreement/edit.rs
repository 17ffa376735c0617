//! One random change of a world: a part of it is replaced by that of another random world, or goes.

use std::collections::BTreeMap;

use thyra_policy_compiler::world::World;

use super::entropy::Entropy;
use super::world::world;

/// Takes one entry over from `other`, or removes one.
fn entry<K: Ord + Clone, V: Clone>(e: &mut Entropy<'_>, mine: &mut BTreeMap<K, V>, other: &BTreeMap<K, V>) {
    if e.chance(30) {
        let keys: Vec<K> = mine.keys().cloned().collect();
        if let Some(key) = keys.get(e.below(keys.len())) {
            mine.remove(key);
        }
    } else if let Some((key, value)) = other.iter().nth(e.below(other.len())) {
        mine.insert(key.clone(), value.clone());
    }
}

/// Changes one thing.
pub(crate) fn edit(e: &mut Entropy<'_>, mine: &mut World) {
    let other = world(e);
    match e.below(10) {
        0 | 1 => entry(e, &mut mine.authorization, &other.authorization),
        2 => entry(e, &mut mine.peer_authentication, &other.peer_authentication),
        3 | 4 => entry(e, &mut mine.workloads, &other.workloads),
        5 => entry(e, &mut mine.endpoints, &other.endpoints),
        6 => entry(e, &mut mine.services, &other.services),
        7 => mine.namespaces = other.namespaces,
        8 => mine.mesh = other.mesh,
        _ => mine.node = other.node,
    }
}
