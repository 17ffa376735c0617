//! The CIDR blocks that verdicts depend on, nested: those of policies and the cluster's pod ranges.
//!
//! Invariant: CIDR blocks never overlap partly, so the deepest policy block that holds an address says which
//! others do.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::bits::Bits;
use crate::policy::Field;

/// Index of a policy block, from 1; 0 is "in no policy block".
pub(crate) type BlockId = usize;

/// What the blocks say about an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct Place {
    /// Deepest policy block.
    pub(crate) block: BlockId,
    /// In a pod range.
    pub(crate) pod_range: bool,
}

/// A node of the forest.
#[derive(Debug, PartialEq, Eq)]
struct Node {
    net: IpNet,
    parent: Option<usize>,
    place: Place,
}

/// All blocks of both families, outer ones first.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Blocks {
    nodes: Vec<Node>,
    /// Of each policy block (index − 1): its node.
    policy: Vec<usize>,
}

impl Blocks {
    pub(crate) fn new(policy: &HashSet<IpNet>, pod_ranges: &[IpNet]) -> Self {
        let ranges: HashSet<IpNet> = pod_ranges.iter().map(IpNet::trunc).collect();
        let mut all: Vec<IpNet> = policy.union(&ranges).copied().collect();
        all.sort_unstable_by_key(|net| (net.network(), net.prefix_len()));
        let mut blocks = Self::default();
        let mut open: Vec<usize> = Vec::new();
        for net in all {
            while open
                .last()
                .is_some_and(|at| !blocks.nodes[*at].net.contains(&net))
            {
                open.pop();
            }
            let parent = open.last().copied();
            let mut place = parent.map_or_else(Place::default, |at| blocks.nodes[at].place);
            let at = blocks.nodes.len();
            if policy.contains(&net) {
                blocks.policy.push(at);
                place.block = blocks.policy.len();
            }
            place.pod_range |= ranges.contains(&net);
            blocks.nodes.push(Node { net, parent, place });
            open.push(at);
        }
        blocks
    }

    /// Where an address lies.
    pub(crate) fn place(&self, address: IpAddr) -> Place {
        let after = self.nodes.partition_point(|node| node.net.network() <= address);
        let mut at = after.checked_sub(1);
        while let Some(node) = at.map(|at| &self.nodes[at]) {
            if node.net.contains(&address) {
                return node.place;
            }
            at = node.parent;
        }
        Place::default()
    }

    /// Number of policy blocks, "none" included.
    pub(crate) fn len(&self) -> usize {
        self.policy.len() + 1
    }

    /// Every block with the place of the addresses that no longer block holds.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (IpNet, Place)> + '_ {
        self.nodes.iter().map(|node| (node.net, node.place))
    }

    /// The policy blocks that hold the addresses of `block`, outermost first, as text.
    pub(crate) fn names(&self, block: BlockId) -> Vec<Arc<str>> {
        let mut names = Vec::new();
        let mut at = block.checked_sub(1).map(|i| self.policy[i]);
        while let Some(node) = at.map(|at| &self.nodes[at]) {
            // A pod range between two policy blocks only repeats the outer one's number.
            if self.is_policy(node) {
                names.push(node.net.to_string().into());
            }
            at = node.parent;
        }
        names.reverse();
        names
    }

    fn is_policy(&self, node: &Node) -> bool {
        let own = node.place.block.checked_sub(1).map(|i| self.policy[i]);
        own.is_some_and(|at| self.nodes[at].net == node.net)
    }

    /// The blocks (by `BlockId`) whose addresses the field holds.
    pub(crate) fn held(&self, field: &Field<IpNet>) -> Bits {
        let mut held = if field.values.is_empty() {
            Bits::full(self.len())
        } else {
            self.under(&field.values)
        };
        held.remove(&self.under(&field.not_values));
        held
    }

    fn under(&self, values: &[IpNet]) -> Bits {
        let values: HashSet<IpNet> = values.iter().map(IpNet::trunc).collect();
        let mut inside = vec![false; self.nodes.len()];
        let mut blocks = Bits::empty(self.len());
        for (at, node) in self.nodes.iter().enumerate() {
            inside[at] = node.parent.is_some_and(|parent| inside[parent]) || values.contains(&node.net);
            if inside[at] && self.is_policy(node) {
                blocks.insert(node.place.block);
            }
        }
        blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_deepest_block_names_all_that_hold_an_address() {
        let policy = nets(&["10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0", "fd00::/8"]);
        let blocks = Blocks::new(&policy.into_iter().collect(), &nets(&["10.1.0.0/15"]));
        let names = |address: &str| {
            let place = blocks.place(address.parse().unwrap());
            let names: Vec<String> = blocks
                .names(place.block)
                .iter()
                .map(ToString::to_string)
                .collect();
            (names.join(" "), place.pod_range)
        };
        assert_eq!(
            names("10.1.2.3"),
            ("0.0.0.0/0 10.0.0.0/8 10.1.0.0/16".into(), true)
        );
        assert_eq!(names("10.0.2.3"), ("0.0.0.0/0 10.0.0.0/8".into(), true));
        assert_eq!(names("10.2.2.3"), ("0.0.0.0/0 10.0.0.0/8".into(), false));
        assert_eq!(names("192.0.2.1"), ("0.0.0.0/0".into(), false));
        assert_eq!(names("fd12::1"), ("fd00::/8".into(), false));
        assert_eq!(names("2001:db8::1"), (String::new(), false));
    }

    #[test]
    fn a_field_holds_the_blocks_inside_its_values_but_not_its_not_values() {
        let policy = nets(&["10.0.0.0/8", "10.1.0.0/16", "10.1.1.0/24"]);
        let blocks = Blocks::new(&policy.iter().copied().collect(), &[]);
        let held = blocks.held(&Field {
            values: vec![policy[0]],
            not_values: vec![policy[1]],
        });
        let holds = |address: &str| held.contains(blocks.place(address.parse().unwrap()).block);
        assert!(holds("10.2.0.1"));
        assert!(!holds("10.1.0.1"));
        assert!(!holds("10.1.1.1"));
        assert!(!holds("11.0.0.1"));
    }
}
