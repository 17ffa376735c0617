//! A node's maps in memory: the same packet path on the host, for tests, dry-run and read-back.
//!
//! Invariant: what the kernel's maps would hold, and nothing else; two banks, of which `control` names the
//! live one.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};

use thyra_datapath_abi::limits::{BUCKETS, IFINDEX_SLOTS, MAX_ENDPOINTS, MAX_OUTBOUND, SLOTS4, SLOTS6};
use thyra_datapath_abi::maps::{EndpointCounter, OWN_MARK, ReasonCounter, VerdictCounter};
use thyra_datapath_abi::source::{Block4, Block6};
use thyra_datapath_abi::{
    Control, EndpointRecord, Event, EventKind, Flow4, Flow6, FlowState, Reason, Slot4, Slot6,
};
use zerocopy::{FromBytes as _, IntoBytes as _};

use crate::account::{Counters, Direction};
use crate::decide::Arrival;
use crate::flows::{FlowTable, Flows};
use crate::load::chunk;
use crate::program::{self, Hook, Program};
use crate::{BankImage, Family, Load, Packet, Table, Tables};

/// Everything that a program counts and reports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// By verdict id.
    pub verdicts: BTreeMap<u16, VerdictCounter>,
    /// By reason.
    pub reasons: BTreeMap<Reason, ReasonCounter>,
    /// By endpoint id.
    pub endpoints: BTreeMap<u16, EndpointCounter>,
    /// In order; `time_ns` is the node's clock.
    pub events: Vec<Event>,
}

/// How a packet ended on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// On to the next program.
    Pass,
    /// Thyra's own packet, on to the next program.
    PassOwn,
    /// Gone.
    Drop,
    /// Answered with a reset.
    Refuse,
    /// Answered with a reset, and the far end probed.
    Revoke,
}

/// The maps of a node.
#[derive(Debug)]
pub struct HostNode {
    /// The control word.
    pub control: Control,
    /// The banks.
    pub banks: [BankImage; 2],
    /// How many connections of one family pods may have open.
    pub outbound_limit: usize,
    /// Nanoseconds since boot.
    pub now_ns: Cell<u64>,
    /// What was counted.
    pub ledger: RefCell<Ledger>,
    records: Vec<EndpointRecord>,
    ifindex: Vec<u16>,
    flows4: RefCell<HashMap<(FlowTable, Flow4), FlowState>>,
    flows6: RefCell<HashMap<(FlowTable, Flow6), FlowState>>,
}

impl Default for HostNode {
    fn default() -> Self {
        Self {
            control: Control::default(),
            banks: Default::default(),
            outbound_limit: MAX_OUTBOUND,
            now_ns: Cell::default(),
            ledger: RefCell::default(),
            records: vec![EndpointRecord::default(); MAX_ENDPOINTS],
            ifindex: vec![0; IFINDEX_SLOTS],
            flows4: RefCell::default(),
            flows6: RefCell::default(),
        }
    }
}

impl HostNode {
    /// A node whose bank 0 holds `image`, as generation 1, with `flags` of `Control` besides the image's own.
    #[must_use]
    pub fn new(image: BankImage, flags: u64) -> Self {
        let control = Control::new(1, 0, flags | image.flags());
        Self {
            control,
            banks: [image, BankImage::default()],
            ..Self::default()
        }
    }

    /// Attaches an endpoint. Its interface index must not share a slot with another's.
    pub fn attach(&mut self, endpoint: u16, record: EndpointRecord) {
        let slot = usize::try_from(record.ifindex).unwrap_or(usize::MAX) % IFINDEX_SLOTS;
        self.ifindex[slot] = endpoint;
        self.records[usize::from(endpoint)] = record;
    }

    /// What is remembered of IPv4 connections, sorted by their keys' bytes.
    #[must_use]
    pub fn flows4(&self, table: FlowTable) -> Vec<(Flow4, FlowState)> {
        let mut flows: Vec<_> = only(&self.flows4.borrow(), table);
        flows.sort_by(|a, b| a.0.as_bytes().cmp(b.0.as_bytes()));
        flows
    }

    /// The same for IPv6.
    #[must_use]
    pub fn flows6(&self, table: FlowTable) -> Vec<(Flow6, FlowState)> {
        let mut flows: Vec<_> = only(&self.flows6.borrow(), table);
        flows.sort_by(|a, b| a.0.as_bytes().cmp(b.0.as_bytes()));
        flows
    }

    fn find<K: Copy + Eq + core::hash::Hash>(
        &self,
        flows: &RefCell<HashMap<(FlowTable, K), FlowState>>,
        (table, key): (FlowTable, K),
        mark: u32,
    ) -> Option<u32> {
        let mut flows = flows.borrow_mut();
        let state = flows.get_mut(&(table, key))?;
        let before = state.flags;
        if before & mark != mark {
            state.flags |= mark;
            state.changed_ns = self.now_ns.get();
        }
        Some(before)
    }

    fn open<K: Copy + Eq + core::hash::Hash>(
        &self,
        flows: &RefCell<HashMap<(FlowTable, K), FlowState>>,
        (table, key): (FlowTable, K),
        flags: u32,
    ) -> bool {
        let mut flows = flows.borrow_mut();
        let count = flows.keys().filter(|(t, _)| *t == table).count();
        if table == FlowTable::Outbound && count >= self.outbound_limit && !flows.contains_key(&(table, key))
        {
            return false;
        }
        flows.insert(
            (table, key),
            FlowState {
                flags,
                pad: 0,
                changed_ns: self.now_ns.get(),
            },
        );
        true
    }
}

fn only<K: Copy>(flows: &HashMap<(FlowTable, K), FlowState>, table: FlowTable) -> Vec<(K, FlowState)> {
    flows
        .iter()
        .filter(|((t, _), _)| *t == table)
        .map(|((_, key), state)| (*key, *state))
        .collect()
}

/// Splits an index over both banks.
fn banked(index: u32, per_bank: usize) -> Option<(usize, usize)> {
    let index = usize::try_from(index).ok()?;
    Some((index / per_bank, index % per_bank))
}

impl Tables for &HostNode {
    fn control(&self) -> Control {
        self.control
    }
    fn record(&self, endpoint: u16) -> Option<&EndpointRecord> {
        self.records.get(usize::from(endpoint))
    }
    fn word(&self, table: Table, index: u32) -> u64 {
        if table == Table::Ifindex {
            let first = usize::try_from(index).map_or(usize::MAX, |i| i.saturating_mul(4));
            let four = self
                .ifindex
                .get(first..)
                .and_then(|rest| rest.get(..4))
                .unwrap_or(&[]);
            return four
                .iter()
                .rev()
                .fold(0, |word, &entry| word << 16 | u64::from(entry));
        }
        let Some((bank, word)) = banked(index, table.words()) else {
            return 0;
        };
        self.banks
            .get(bank)
            .and_then(|bank| bank.words(table).get(word))
            .copied()
            .unwrap_or(0)
    }
    fn bucket4(&self, index: u32) -> Option<&[Slot4; SLOTS4]> {
        let (bank, bucket) = banked(index, BUCKETS)?;
        let words = self
            .banks
            .get(bank)?
            .words(Table::Sources4)
            .get(bucket * SLOTS4..)?
            .get(..SLOTS4)?;
        <[Slot4; SLOTS4]>::ref_from_bytes(words.as_bytes()).ok()
    }
    fn bucket6(&self, index: u32) -> Option<&[Slot6; SLOTS6]> {
        let (bank, bucket) = banked(index, BUCKETS)?;
        let length = SLOTS6 * 3;
        let words = self
            .banks
            .get(bank)?
            .words(Table::Sources6)
            .get(bucket * length..)?
            .get(..length)?;
        <[Slot6; SLOTS6]>::ref_from_bytes(words.as_bytes()).ok()
    }
    fn block4(&self, key: &Block4) -> Option<u32> {
        let bank = self.banks.get(usize::try_from(key.bank).ok()?)?;
        longest(bank.blocks4(key.bank).map(|(k, class)| {
            (
                k.prefix_len - 32,
                covers(&k.address, &key.address, k.prefix_len - 32),
                class,
            )
        }))
    }
    fn block6(&self, key: &Block6) -> Option<u32> {
        let bank = self.banks.get(usize::try_from(key.bank).ok()?)?;
        longest(bank.blocks6(key.bank).map(|(k, class)| {
            (
                k.prefix_len - 32,
                covers(&k.address, &key.address, k.prefix_len - 32),
                class,
            )
        }))
    }
}

fn longest(blocks: impl Iterator<Item = (u32, bool, u32)>) -> Option<u32> {
    blocks
        .filter(|(_, covers, _)| *covers)
        .max_by_key(|(length, _, _)| *length)
        .map(|(_, _, class)| class)
}

/// Whether the first `length` bits are equal.
fn covers(network: &[u8], address: &[u8], length: u32) -> bool {
    let mut left = length;
    network.iter().zip(address).all(|(n, a)| {
        let bits = left.min(8);
        left -= bits;
        (n ^ a).leading_zeros() >= bits
    })
}

impl Flows for &HostNode {
    fn find4(&self, table: FlowTable, key: &Flow4, mark: u32) -> Option<u32> {
        self.find(&self.flows4, (table, *key), mark)
    }
    fn find6(&self, table: FlowTable, key: &Flow6, mark: u32) -> Option<u32> {
        self.find(&self.flows6, (table, *key), mark)
    }
    fn open4(&self, table: FlowTable, key: &Flow4, flags: u32) -> bool {
        self.open(&self.flows4, (table, *key), flags)
    }
    fn open6(&self, table: FlowTable, key: &Flow6, flags: u32) -> bool {
        self.open(&self.flows6, (table, *key), flags)
    }
    fn forget4(&self, table: FlowTable, key: &Flow4) {
        self.flows4.borrow_mut().remove(&(table, *key));
    }
    fn forget6(&self, table: FlowTable, key: &Flow6) {
        self.flows6.borrow_mut().remove(&(table, *key));
    }
}

impl Counters for &HostNode {
    fn verdict(&self, verdict: u16, bytes: u32, connection: bool) {
        let mut ledger = self.ledger.borrow_mut();
        let counter = ledger.verdicts.entry(verdict).or_default();
        counter.packets += 1;
        counter.bytes += u64::from(bytes);
        counter.connections += u64::from(connection);
    }
    fn reason(&self, reason: Reason, bytes: u32) {
        let mut ledger = self.ledger.borrow_mut();
        let counter = ledger.reasons.entry(reason).or_default();
        counter.packets += 1;
        counter.bytes += u64::from(bytes);
    }
    fn endpoint(&self, endpoint: u16, direction: Direction, passed: bool) {
        let mut ledger = self.ledger.borrow_mut();
        let counter = ledger.endpoints.entry(endpoint).or_default();
        *match (direction, passed) {
            (Direction::ToPod, true) => &mut counter.to_pod_packets,
            (Direction::ToPod, false) => &mut counter.to_pod_dropped,
            (Direction::FromPod, true) => &mut counter.from_pod_packets,
            (Direction::FromPod, false) => &mut counter.from_pod_dropped,
        } += 1;
    }
    fn report(&self, _: EventKind, event: Event) {
        let event = Event {
            time_ns: self.now_ns.get(),
            ..event
        };
        self.ledger.borrow_mut().events.push(event);
    }
}

/// A packet at a hook of the node.
#[derive(Clone, Copy, Debug)]
pub struct HostPacket<'a> {
    /// Its bytes.
    pub bytes: &'a [u8],
    /// What the kernel would say about it.
    pub arrival: Arrival,
    /// Its mark.
    pub mark: u32,
}

impl HostNode {
    /// Runs a program on a packet.
    pub fn run<P: Program>(&self, packet: HostPacket<'_>) -> End {
        program::run::<P, &Self, HostPacket<'_>>(self, packet)
    }
}

impl Load for HostPacket<'_> {
    fn length(&self) -> u32 {
        u32::try_from(self.bytes.len()).unwrap_or(u32::MAX)
    }
    fn is_merged(&self) -> bool {
        false
    }
    fn head<const N: usize>(&self) -> Option<&[u8; N]> {
        self.bytes.first_chunk()
    }
    fn near16<const AT: usize, const N: usize>(head: &[u8; N]) -> u16 {
        u16::from_be_bytes(*within::<AT, _>(head))
    }
    fn near32<const AT: usize, const N: usize>(head: &[u8; N]) -> u32 {
        u32::from_be_bytes(*within::<AT, _>(head))
    }
    fn near64<const AT: usize, const N: usize>(head: &[u8; N]) -> u64 {
        u64::from_be_bytes(*within::<AT, _>(head))
    }
    fn far8(&self, offset: u32) -> u8 {
        u8::from_be_bytes(chunk(self.bytes, offset))
    }
    fn far16(&self, offset: u32) -> u16 {
        u16::from_be_bytes(chunk(self.bytes, offset))
    }
    fn far32(&self, offset: u32) -> u32 {
        u32::from_be_bytes(chunk(self.bytes, offset))
    }
    fn far64(&self, offset: u32) -> u64 {
        u64::from_be_bytes(chunk(self.bytes, offset))
    }
}

/// Bytes of a head at a constant place, which the parser keeps inside it.
fn within<const AT: usize, const LENGTH: usize>(head: &[u8]) -> &[u8; LENGTH] {
    head[AT..]
        .first_chunk()
        .expect("a constant place inside the head")
}

impl Hook for HostPacket<'_> {
    type End = End;

    fn arrival(&self) -> Arrival {
        self.arrival
    }
    fn is_own(&self) -> bool {
        self.mark == OWN_MARK
    }
    fn pass(&self) -> End {
        End::Pass
    }
    fn pass_own(&self) -> End {
        End::PassOwn
    }
    fn drop(&self) -> End {
        End::Drop
    }
    fn refuse<F: Family>(&self, _: &Packet<F>, _: Direction) -> End {
        End::Refuse
    }
    fn revoke<F: Family>(&self, _: &Packet<F>, _: Direction) -> End {
        End::Revoke
    }
}
