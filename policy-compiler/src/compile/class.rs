//! Source classes: one for each identity and deepest block that an address or a block comes down to.
//!
//! Invariant: a class is open as long as an address or a block has it; class 0, the outsider, always. The number
//! of one that nothing has any more is given to the next new one.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use thyra_datapath_abi::tables::{ClassInfo, SourceAddress, SourceBlock, Tables};

use super::CompileError;
use super::block::{BlockId, Blocks, Place};
use super::identity::Identities;
use super::lend::{Lender, Lent};
use super::limits::{Limits, index};
use super::slot::Slots;
use crate::shared_map::SharedMap;

/// What a class is the class of.
type Source = (Lent, BlockId);

/// What sources come down to.
#[derive(Clone, Copy)]
pub(super) struct Sources<'a> {
    pub(super) identities: &'a Identities,
    pub(super) blocks: &'a Blocks,
    pub(super) slots: &'a Slots,
    /// Column of each slot.
    pub(super) slot_column: &'a [u16],
    /// Identity numbers, by principal.
    pub(super) numbers: &'a SharedMap<Arc<str>, u32>,
    pub(super) limits: Limits,
}

impl Sources<'_> {
    /// The column of a source.
    fn column(&self, (lent, block): Source) -> Result<u16, CompileError> {
        let slot = self.slots.find(lent, block);
        // A source that no slot stands for can't happen; column 0 would be the outsider's, so it is an error.
        let column = slot.and_then(|slot| self.slot_column.get(slot));
        column.copied().ok_or(CompileError::Lost)
    }
}

/// The classes of some tables.
#[derive(Debug, Default)]
pub(super) struct Classes {
    numbers: FxHashMap<Source, u32>,
    /// By number; how many addresses and blocks have it.
    list: Vec<(Source, u32)>,
    vacant: Vec<u32>,
    names: HashMap<BlockId, Vec<Arc<str>>>,
}

impl Classes {
    /// Gives every block and every address of `lenders` its class.
    pub(super) fn of(
        sources: Sources<'_>,
        lenders: &BTreeMap<IpAddr, Lender>,
        tables: &mut Tables,
    ) -> Result<Self, CompileError> {
        let mut classes = Self::default();
        classes.enter(sources, (Lent::Unknown, 0), tables)?;
        let mut addresses = Vec::with_capacity(lenders.len());
        for (address, lender) in lenders {
            addresses.extend(classes.address(sources, *address, lender, tables)?);
        }
        address_limit(addresses.len(), sources.limits)?;
        tables.addresses = addresses.into();
        let mut blocks = Vec::new();
        let (mut v4, mut v6) = (0, 0);
        for (net, place) in sources.blocks.iter() {
            let class = classes.enter(sources, (derived(place), place.block), tables)?;
            let family = if net.addr().is_ipv4() { &mut v4 } else { &mut v6 };
            *family += 1;
            let what = "CIDR blocks of one family";
            index::<u32>(what, *family, sources.limits.blocks, || format!("at `{net}`"))?;
            blocks.push(SourceBlock {
                network: net.network(),
                prefix: net.prefix_len(),
                class,
            });
        }
        tables.blocks = blocks.into();
        Ok(classes)
    }

    /// The columns of the same classes after policies have changed.
    pub(super) fn columns(&self, sources: Sources<'_>) -> Result<Vec<u16>, CompileError> {
        let outsider = sources.column((Lent::Unknown, 0))?;
        let column = |(source, users): &(Source, u32)| match users {
            0 => Ok(outsider),
            _ => sources.column(*source),
        };
        self.list.iter().map(column).collect()
    }

    /// Brings the entry of an address up to date with its owner. What fails leaves tables that say nothing.
    pub(super) fn relocate(
        &mut self,
        sources: Sources<'_>,
        address: IpAddr,
        lender: Option<&Lender>,
        tables: &mut Tables,
    ) -> Result<(), CompileError> {
        let entry = match lender {
            Some(lender) => self.address(sources, address, lender, tables)?,
            None => None,
        };
        let found = tables.addresses.binary_search_by(|s| s.address.cmp(&address));
        let addresses = Arc::make_mut(&mut tables.addresses);
        let left = match (found, entry) {
            (Ok(at), Some(entry)) => Some(std::mem::replace(&mut addresses[at], entry)),
            (Ok(at), None) => Some(addresses.remove(at)),
            (Err(at), Some(entry)) => {
                address_limit(addresses.len() + 1, sources.limits)?;
                addresses.insert(at, entry);
                None
            }
            (Err(_), None) => None,
        };
        if let Some(left) = left {
            self.leave(left.class, tables);
        }
        Ok(())
    }

    /// Whether any class is that of one of `identities`.
    pub(super) fn name_any(&self, identities: &[usize]) -> bool {
        let open = |(lent, _): &Source| matches!(lent, Lent::Known(known) if identities.contains(known));
        !identities.is_empty() && self.numbers.keys().any(open)
    }

    /// The entry of an address; none for one that its block already says everything about.
    fn address(
        &mut self,
        sources: Sources<'_>,
        address: IpAddr,
        lender: &Lender,
        tables: &mut Tables,
    ) -> Result<Option<SourceAddress>, CompileError> {
        let place = sources.blocks.place(address);
        if lender.lent == derived(place) && lender.local == 0 {
            return Ok(None);
        }
        let class = self.enter(sources, (lender.lent, place.block), tables)?;
        Ok(Some(SourceAddress {
            address,
            class,
            local: lender.local,
        }))
    }

    /// The class of a source, with one more that has it.
    fn enter(
        &mut self,
        sources: Sources<'_>,
        source: Source,
        tables: &mut Tables,
    ) -> Result<u32, CompileError> {
        let class = match self.numbers.get(&source) {
            Some(known) => *known,
            None => self.open(sources, source, tables)?,
        };
        self.list[at(class)].1 += 1;
        Ok(class)
    }

    fn open(
        &mut self,
        sources: Sources<'_>,
        source: Source,
        tables: &mut Tables,
    ) -> Result<u32, CompileError> {
        let column = sources.column(source)?;
        let info = self.info(sources, source);
        let columns = Arc::make_mut(&mut tables.class_column);
        let class = match self.vacant.pop() {
            Some(class) => {
                if let Some(vacant) = tables.classes.get_mut(at(class)) {
                    *vacant = info;
                }
                columns[at(class)] = column;
                self.list[at(class)] = (source, 0);
                class
            }
            None => {
                let count = tables.classes.len() + 1;
                let class = index::<u32>("source classes", count, sources.limits.classes, String::new)? - 1;
                tables.classes.push(info);
                columns.push(column);
                self.list.push((source, 0));
                class
            }
        };
        self.numbers.insert(source, class);
        Ok(class)
    }

    fn info(&mut self, sources: Sources<'_>, (lent, block): Source) -> ClassInfo {
        let principal = match lent {
            Lent::Known(identity) => Some(Arc::clone(sources.identities.principal(identity))),
            Lent::Unknown | Lent::Pending => None,
        };
        let number = principal
            .as_ref()
            .and_then(|principal| sources.numbers.get(principal));
        let names = self
            .names
            .entry(block)
            .or_insert_with(|| sources.blocks.names(block));
        ClassInfo {
            identity: number.copied().unwrap_or(0),
            principal,
            pending: lent == Lent::Pending,
            blocks: names.clone(),
        }
    }

    fn leave(&mut self, class: u32, tables: &mut Tables) {
        let (source, users) = &mut self.list[at(class)];
        *users -= 1;
        if *users > 0 {
            return;
        }
        self.numbers.remove(source);
        self.vacant.push(class);
        // As the outsider: no address leads there.
        if let Some(info) = tables.classes.get_mut(at(class)) {
            *info = ClassInfo::default();
        }
        Arc::make_mut(&mut tables.class_column)[at(class)] = tables.column(0).unwrap_or(0);
    }
}

/// What an address has of its block alone.
pub(super) fn derived(place: Place) -> Lent {
    if place.pod_range {
        Lent::Pending
    } else {
        Lent::Unknown
    }
}

fn at(class: u32) -> usize {
    usize::try_from(class).unwrap_or(usize::MAX)
}

fn address_limit(count: usize, limits: Limits) -> Result<(), CompileError> {
    index::<u32>("source addresses", count, limits.addresses, String::new).map(|_| ())
}
