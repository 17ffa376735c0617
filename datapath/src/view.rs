//! The live bank as the kernel's maps hold it, judged by the same code as in the kernel.
//!
//! Invariant: a copy; what is committed later doesn't show. It is read from the maps, never from what the
//! agent believes to have written.

use std::net::IpAddr;
use std::sync::atomic::Ordering;

use aya::maps::MapError;
use thyra_datapath_abi::{Action, Control, EndpointRecord, Mode};
use thyra_datapath_engine::family::Address6;
use thyra_datapath_engine::host::Holder;
use thyra_datapath_engine::{BankImage, Table, Tables as _, lookup};

use crate::memory::Memory;
use crate::open::endpoint_numbers;

/// A copy of the live bank.
#[derive(Clone, Debug)]
pub struct KernelView {
    control: Control,
    records: Vec<EndpointRecord>,
    image: BankImage,
}

/// What the kernel's tables say about a new connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// What happens to it in mode `Enforce`.
    pub action: Action,
    /// Why: a verdict id, 0 for none.
    pub verdict: u16,
    /// Class of the source.
    pub class: u16,
    /// Local endpoint that owns the source address, 0 for none.
    pub local: u16,
    /// How the endpoint's verdicts are carried out.
    pub mode: Mode,
}

impl KernelView {
    pub(crate) fn read(memory: &Memory) -> Result<Self, MapError> {
        let live = memory.control();
        let words = |table: Table| memory.bank(table, live.bank()).iter();
        let copy = |table| words(table).map(|word| word.load(Ordering::Relaxed)).collect();
        let blocks4 = memory.blocks4.read(live.bank())?;
        let blocks6 = memory.blocks6.read(live.bank())?;
        let ids = std::iter::once(0).chain(endpoint_numbers());
        Ok(Self {
            control: live,
            records: ids.map(|id| memory.record(id)).collect(),
            image: BankImage::of(
                Table::ALL.into_iter().map(|table| (table, copy(table))),
                blocks4.into_iter().filter_map(block),
                blocks6.into_iter().filter_map(block),
            ),
        })
    }

    /// Generation of the copied bank.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.control.generation()
    }

    /// The interface side of an endpoint; none when it is not attached.
    #[must_use]
    pub fn record(&self, endpoint: u16) -> Option<&EndpointRecord> {
        self.records
            .get(usize::from(endpoint))
            .filter(|record| record.ifindex != 0)
    }

    /// What happens to a new connection from `source` to a port of an endpoint, of the family of `source`.
    /// None when the tables have no place for the endpoint: it refuses everything.
    #[must_use]
    pub fn evaluate(&self, endpoint: u16, source: IpAddr, port: u16) -> Option<Sighting> {
        let sets = self.sets(endpoint);
        if !sets.is_placed() {
            return None;
        }
        let (set, source) = match source.to_canonical() {
            IpAddr::V4(v4) => (sets.set4(), lookup::source4(self, u32::from(v4))),
            IpAddr::V6(v6) => (
                sets.set6(),
                lookup::source6(self, Address6::from_bytes(v6.octets())),
            ),
        };
        let cell = lookup::cell(self, set, source.class, port.to_be_bytes());
        Some(Sighting {
            action: cell.action(),
            verdict: cell.verdict(),
            class: source.class,
            local: source.local,
            mode: sets.mode(),
        })
    }
}

impl Holder for KernelView {
    fn image(&self) -> &BankImage {
        &self.image
    }

    fn control(&self) -> Control {
        self.control
    }

    /// The copy is asked about endpoints, never about interfaces.
    fn endpoint_in(&self, _: usize) -> u16 {
        0
    }

    fn records(&self) -> &[EndpointRecord] {
        &self.records
    }
}

/// A block as an image holds it; its prefix in the trie has the bank before it.
fn block<const A: usize>(((prefix, network), class): ((u32, [u8; A]), u32)) -> Option<(([u8; A], u8), u16)> {
    let prefix = u8::try_from(prefix.checked_sub(32)?).ok()?;
    Some(((network, prefix), u16::try_from(class).ok()?))
}
