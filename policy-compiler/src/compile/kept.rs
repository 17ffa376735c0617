//! What a compile leaves for the next one: where only workloads came and went, addresses change their classes and
//! nothing else does.
//!
//! Invariant: the short way gives what a whole compile gives, but for numbers and for classes that nothing has;
//! wherever it is not sure of that it gives up, and the whole is compiled.

use std::collections::BTreeMap;
use std::sync::Arc;

use thyra_datapath_abi::tables::{PolicyRef, Tables};

use super::CompileError;
use super::block::Blocks;
use super::class::{Classes, Sources};
use super::identity::Identities;
use super::lend::{Lending, Moved};
use super::limits::Limits;
use super::slot::{Slots, TestId, Tests};
use crate::policy::{AuthorizationPolicy, Labels, PeerAuthentication, RequestAuthentication};
use crate::shared_map::SharedMap;
use crate::world::World;

/// Moves beyond this number are not worth the short way.
const MOVES: usize = 512;

/// See the module.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) tables: Tables,
    pub(super) blocks: Blocks,
    pub(super) slots: Slots,
    /// The tests that parted the slots.
    pub(super) used: Vec<TestId>,
    pub(super) slot_column: Vec<u16>,
    pub(super) classes: Classes,
    /// What is wrong, addresses apart.
    pub(super) problems: Vec<String>,
    pub(super) ground: Ground,
}

/// The parts of a world that destinations and policies follow from, but for those that `Moved` tells of.
#[derive(Debug)]
pub(super) struct Ground {
    namespaces: BTreeMap<String, Option<Labels>>,
    authorization: BTreeMap<PolicyRef, Arc<AuthorizationPolicy>>,
    peer_authentication: BTreeMap<PolicyRef, Arc<PeerAuthentication>>,
    request_authentication: BTreeMap<PolicyRef, Arc<RequestAuthentication>>,
    unreadable: BTreeMap<PolicyRef, Arc<str>>,
    identities: SharedMap<Arc<str>, u32>,
    synced: bool,
}

impl Ground {
    pub(super) fn of(world: &World) -> Self {
        let namespace = |name: &String| (name.clone(), world.namespaces.get(name).cloned());
        Self {
            namespaces: world
                .endpoints
                .values()
                .map(|e| namespace(&e.namespace))
                .collect(),
            authorization: world.authorization.clone(),
            peer_authentication: world.peer_authentication.clone(),
            request_authentication: world.request_authentication.clone(),
            unreadable: world.unreadable.clone(),
            identities: world.identities.clone(),
            synced: world.synced,
        }
    }

    /// Whether `world` differs in workloads, identity numbers and what `Moved` tells of alone.
    fn holds(&self, world: &World) -> bool {
        let mut namespaces = self.namespaces.iter();
        self.synced == world.synced
            && namespaces.all(|(name, labels)| world.namespaces.get(name) == labels.as_ref())
            && same(&self.authorization, &world.authorization)
            && same(&self.peer_authentication, &world.peer_authentication)
            && same(&self.request_authentication, &world.request_authentication)
            && self.unreadable == world.unreadable
    }
}

impl Kept {
    /// Whether the short way leads to the tables of `world`.
    pub(super) fn reaches(&self, world: &World, moved: &Moved, identities: &Identities) -> bool {
        moved.addresses.len() <= MOVES
            && !moved.beyond
            && self.ground.holds(world)
            && !self.renumbers(world, identities)
    }

    /// Whether sources come down to the same classes in `world`, whatever its policies say of them.
    pub(super) fn seats(
        &self,
        world: &World,
        moved: &Moved,
        blocks: &Blocks,
        identities: &Identities,
    ) -> bool {
        moved.addresses.is_empty() && self.blocks == *blocks && !self.renumbers(world, identities)
    }

    /// Brings the sources into tables of other policies, where they have the same `seats`.
    pub(super) fn seat_again(
        self,
        sources: Sources<'_>,
        tables: &mut Tables,
    ) -> Result<Classes, CompileError> {
        tables.class_column = self.classes.columns(sources)?.into();
        tables.classes = self.tables.classes;
        tables.addresses = self.tables.addresses;
        tables.blocks = self.tables.blocks;
        Ok(self.classes)
    }

    /// Moves the addresses; `None` where that asks for more than this, and then the tables are of no use.
    pub(super) fn walk(
        &mut self,
        world: &World,
        moved: &Moved,
        lending: &Lending,
        identities: &Identities,
        tests: &mut Tests,
        limits: Limits,
    ) -> Option<()> {
        if !self.slots.admit(tests, &self.used, identities) {
            return None;
        }
        let sources = Sources {
            identities,
            blocks: &self.blocks,
            slots: &self.slots,
            slot_column: &self.slot_column,
            numbers: &world.identities,
            limits,
        };
        for address in &moved.addresses {
            let lender = lending.lenders().get(address);
            let (classes, tables) = (&mut self.classes, &mut self.tables);
            // The whole compile says what doesn't fit.
            classes.relocate(sources, *address, lender, tables).ok()?;
        }
        self.ground.identities = world.identities.clone();
        Some(())
    }

    /// Whether an identity that has a class has another number now.
    fn renumbers(&self, world: &World, identities: &Identities) -> bool {
        let (gone, come) = self
            .ground
            .identities
            .differences(&world.identities, |a, b| a == b);
        let changed = gone.iter().chain(&come);
        let changed: Vec<usize> = changed
            .flat_map(|(principal, _)| identities.with_principal(principal))
            .copied()
            .collect();
        self.classes.name_any(&changed)
    }
}

/// Whether both hold the same objects: an `Arc` is replaced when its content changes.
fn same<T>(before: &BTreeMap<PolicyRef, Arc<T>>, after: &BTreeMap<PolicyRef, Arc<T>>) -> bool {
    let mut pairs = before.values().zip(after.values());
    before.len() == after.len() && pairs.all(|(a, b)| Arc::ptr_eq(a, b))
}
