//! A node's maps in memory: the same packet path on the host, for tests, dry-run and read-back.
//!
//! Invariant: what the kernel's maps would hold, and nothing else; two banks, of which `control` names the
//! live one.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};

use thyra_datapath_abi as abi;
use thyra_datapath_abi::count::{EndpointCounter, ReasonCounter, VerdictCounter};
use thyra_datapath_abi::limits::{
    IFINDEX_SLOTS, MAX_COLUMNS, MAX_ENDPOINTS, MAX_OUTBOUND, MAX_PORT_CLASSES, SLOTS4, SLOTS6,
};
use thyra_datapath_abi::maps::OWN_MARK;
use thyra_datapath_abi::{
    Control, EndpointRecord, EndpointSets, Event, EventKind, Flow4, Flow6, FlowState, Reason, Slot4, Slot6,
};
use zerocopy::IntoBytes as _;

use crate::account::{Counters, Direction};
use crate::decide::Arrival;
use crate::family::Address6;
use crate::flows::{FlowTable, Flows};
use crate::load::chunk;
use crate::program::{self, Hook, Maps, Program};
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

/// Whoever holds one bank's image, with the state beside it.
pub trait Holder {
    /// The live bank.
    fn image(&self) -> &BankImage;
    /// The control word.
    fn control(&self) -> Control;
    /// The endpoint in a slot of the interface table.
    fn endpoint_in(&self, slot: usize) -> u16;
    /// The records, by endpoint id; all `MAX_ENDPOINTS` of them.
    fn records(&self) -> &[EndpointRecord];
}

/// A place in memory on this machine.
fn place(index: u32) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

impl<H: Holder> Tables for H {
    fn control(&self) -> Control {
        Holder::control(self)
    }
    fn endpoint_in(&self, slot: u32) -> u16 {
        Holder::endpoint_in(self, place(slot))
    }
    fn record(&self, endpoint: u16) -> &EndpointRecord {
        &self.records()[usize::from(endpoint) % MAX_ENDPOINTS]
    }
    fn sets(&self, endpoint: u16) -> EndpointSets {
        let words = self.image().words(Table::EndpointSets);
        EndpointSets(words.get(usize::from(endpoint)).copied().unwrap_or(0))
    }
    fn bucket4(&self, index: u32) -> &[Slot4; SLOTS4] {
        let words = self.image().bucket::<SLOTS4>(Table::Sources4, index);
        zerocopy::transmute_ref!(words.unwrap_or(&[0; SLOTS4]))
    }
    fn bucket6(&self, index: u32) -> &[Slot6; SLOTS6] {
        let words = self.image().bucket::<{ SLOTS6 * 3 }>(Table::Sources6, index);
        zerocopy::transmute_ref!(words.unwrap_or(&[0; SLOTS6 * 3]))
    }
    fn block4(&self, address: u32) -> u16 {
        self.image().class4(address.to_be_bytes()).unwrap_or(0)
    }
    fn block6(&self, address: Address6) -> u16 {
        self.image().class6(address.to_bytes()).unwrap_or(0)
    }
    fn column(&self, class: u16) -> u16 {
        self.image().entry(Table::ClassColumn, usize::from(class))
    }
    fn port_class(&self, port: u16) -> u16 {
        self.image().entry(Table::PortClass, usize::from(port))
    }
    fn row(&self, set: u16, port_class: u16) -> u16 {
        let at = usize::from(set) * MAX_PORT_CLASSES + usize::from(port_class);
        self.image().entry(Table::Sets, at)
    }
    fn cell(&self, row: u16, column: u16) -> abi::Cell {
        let at = usize::from(row) * MAX_COLUMNS + usize::from(column);
        abi::Cell(self.image().entry(Table::Rows, at))
    }
}

impl Holder for &HostNode {
    fn image(&self) -> &BankImage {
        &self.banks[usize::from(self.control.bank() != 0)]
    }
    fn control(&self) -> Control {
        self.control
    }
    fn endpoint_in(&self, slot: usize) -> u16 {
        self.ifindex[slot]
    }
    fn records(&self) -> &[EndpointRecord] {
        &self.records
    }
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

impl Maps for &HostNode {
    type Node = Self;

    fn open(self) -> Option<Self> {
        Some(self)
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
