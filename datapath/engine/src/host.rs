//! A node's maps in memory: the same packet path on the host, for tests, dry-run and read-back.
//!
//! Invariant: what the kernel's maps would hold, and nothing else; two banks, of which `control` names the
//! live one.

mod held;
mod packet;
mod steered;

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::AtomicU64;

use thyra_datapath_abi as abi;
use thyra_datapath_abi::count::{EndpointCounter, ReasonCounter, VerdictCounter};
use thyra_datapath_abi::datagram::{DATAGRAM4_WORDS, DATAGRAM6_WORDS, DatagramBucket4, DatagramBucket6};
use thyra_datapath_abi::flow::{FLOW4_WORDS, FLOW6_WORDS, FlowBucket4, FlowBucket6};
use thyra_datapath_abi::limits::{
    DATAGRAM_BUCKETS, FLOW_BUCKETS, IFINDEX_SLOTS, MAX_COLUMNS, MAX_ENDPOINTS, MAX_PORT_CLASSES,
    OUTBOUND_BUDGET, SLOTS4, SLOTS6,
};
use thyra_datapath_abi::{
    Control, EndpointRecord, EndpointSets, Event, EventKind, Flow4, Flow6, FlowState, Reason, Slot4, Slot6,
};
use zerocopy::{Immutable, IntoBytes};

pub use self::held::HostHeld;
pub use self::packet::HostPacket;
pub use self::steered::HostSteered;
use crate::account::{Counters, Direction};
use crate::datagram_table::{self, Touch};
use crate::datagram_words::DatagramWords;
use crate::decide::hold::Back;
use crate::family::Address6;
use crate::flow_table::{self, Key};
use crate::flow_words::FlowWords;
use crate::flows::{Datagrams, FlowTable, Flows};
use crate::program::Maps;
use crate::{BankImage, Table, Tables};

/// Nobody aims at the buckets of a node in memory.
const SEED: u64 = 0;

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
    /// To the agent.
    Divert,
    /// From the agent, marked as Thyra's own.
    GivenBack(Back),
    /// Straight into the pod behind this interface.
    Redirect(u32),
    /// As `Revoke`; the probe goes straight into the pod behind this interface.
    RevokeInto(u32),
}

/// The maps of a node.
#[derive(Debug)]
pub struct HostNode {
    /// The control word.
    pub control: Control,
    /// The banks.
    pub banks: [BankImage; 2],
    /// How many connections one pod may have open.
    pub outbound_budget: u64,
    /// Nanoseconds since boot.
    pub now_ns: Cell<u64>,
    /// What was counted.
    pub ledger: RefCell<Ledger>,
    records: Vec<EndpointRecord>,
    ifindex: Vec<u16>,
    // Made when a packet first asks: a look-up of a verdict needs none of them.
    outbound4: OnceCell<Vec<AtomicU64>>,
    outbound6: OnceCell<Vec<AtomicU64>>,
    outbound: OnceCell<Vec<AtomicU64>>,
    datagrams4: OnceCell<Vec<AtomicU64>>,
    datagrams6: OnceCell<Vec<AtomicU64>>,
    host4: RefCell<HashMap<Flow4, FlowState>>,
    host6: RefCell<HashMap<Flow6, FlowState>>,
    /// What Envoy has.
    pub steered: HostSteered,
    /// What is held.
    pub held: HostHeld,
}

impl Default for HostNode {
    fn default() -> Self {
        Self {
            control: Control::default(),
            banks: Default::default(),
            outbound_budget: OUTBOUND_BUDGET,
            now_ns: Cell::default(),
            ledger: RefCell::default(),
            records: vec![EndpointRecord::default(); MAX_ENDPOINTS],
            ifindex: vec![0; IFINDEX_SLOTS],
            outbound4: OnceCell::new(),
            outbound6: OnceCell::new(),
            outbound: OnceCell::new(),
            datagrams4: OnceCell::new(),
            datagrams6: OnceCell::new(),
            host4: RefCell::default(),
            host6: RefCell::default(),
            steered: HostSteered::default(),
            held: HostHeld::default(),
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
        sorted(match table {
            FlowTable::Outbound => {
                entries(self.words4(), |key: [u64; FLOW4_WORDS]| zerocopy::transmute!(key))
            }
            FlowTable::Host => self.host4.borrow().iter().map(|(k, s)| (*k, *s)).collect(),
        })
    }

    /// The same for IPv6.
    #[must_use]
    pub fn flows6(&self, table: FlowTable) -> Vec<(Flow6, FlowState)> {
        sorted(match table {
            FlowTable::Outbound => {
                entries(self.words6(), |key: [u64; FLOW6_WORDS]| zerocopy::transmute!(key))
            }
            FlowTable::Host => self.host6.borrow().iter().map(|(k, s)| (*k, *s)).collect(),
        })
    }

    /// Whether anything was ever remembered of datagrams.
    #[must_use]
    pub fn knows_datagrams(&self) -> bool {
        self.datagrams4.get().is_some() || self.datagrams6.get().is_some()
    }

    /// What is remembered of IPv4 datagrams.
    #[must_use]
    pub fn datagrams4(&self) -> DatagramWords<'_> {
        let bytes = MAX_ENDPOINTS * DATAGRAM_BUCKETS * size_of::<DatagramBucket4>();
        self.datagrams(self.datagrams4.get_or_init(|| zeroed(bytes)))
    }

    /// The same for IPv6.
    #[must_use]
    pub fn datagrams6(&self) -> DatagramWords<'_> {
        let bytes = MAX_ENDPOINTS * DATAGRAM_BUCKETS * size_of::<DatagramBucket6>();
        self.datagrams(self.datagrams6.get_or_init(|| zeroed(bytes)))
    }

    fn datagrams<'a>(&self, buckets: &'a [AtomicU64]) -> DatagramWords<'a> {
        DatagramWords {
            buckets,
            now_ns: self.now_ns.get(),
        }
    }

    fn words4(&self) -> FlowWords<'_> {
        let bytes = FLOW_BUCKETS * size_of::<FlowBucket4>();
        self.words(self.outbound4.get_or_init(|| zeroed(bytes)))
    }

    fn words6(&self) -> FlowWords<'_> {
        let bytes = FLOW_BUCKETS * size_of::<FlowBucket6>();
        self.words(self.outbound6.get_or_init(|| zeroed(bytes)))
    }

    fn words<'a>(&'a self, buckets: &'a [AtomicU64]) -> FlowWords<'a> {
        FlowWords {
            buckets,
            counts: self
                .outbound
                .get_or_init(|| zeroed(MAX_ENDPOINTS * size_of::<u64>())),
            budget: self.outbound_budget,
            now_ns: self.now_ns.get(),
        }
    }

    fn find_host<K: Eq + core::hash::Hash>(
        &self,
        flows: &RefCell<HashMap<K, FlowState>>,
        key: &K,
        mark: u32,
    ) -> Option<u32> {
        let mut flows = flows.borrow_mut();
        let state = flows.get_mut(key)?;
        let before = *state;
        if !before.has(mark) {
            *state = before.marked(mark, FlowState::tick(self.now_ns.get()));
        }
        Some(before.flags())
    }

    fn open_host<K: Copy + Eq + core::hash::Hash>(
        &self,
        flows: &RefCell<HashMap<K, FlowState>>,
        key: &K,
        flags: u32,
    ) -> bool {
        let state = FlowState::live(flags, 0, FlowState::tick(self.now_ns.get()));
        flows.borrow_mut().insert(*key, state);
        true
    }
}

/// So many bytes of zeros.
fn zeroed(bytes: usize) -> Vec<AtomicU64> {
    (0..bytes / size_of::<u64>())
        .map(|_| AtomicU64::default())
        .collect()
}

fn entries<K, const W: usize>(words: FlowWords<'_>, key: impl Fn([u64; W]) -> K) -> Vec<(K, FlowState)> {
    words
        .entries()
        .map(|entry| (key(entry.key), entry.state))
        .collect()
}

fn sorted<K: IntoBytes + Immutable>(mut flows: Vec<(K, FlowState)>) -> Vec<(K, FlowState)> {
    flows.sort_by(|a, b| a.0.as_bytes().cmp(b.0.as_bytes()));
    flows
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
        match table {
            FlowTable::Outbound => flow_table::find(&self.words4(), &Key::v4(key, SEED), mark),
            FlowTable::Host => self.find_host(&self.host4, key, mark),
        }
    }
    fn open4(&self, table: FlowTable, key: &Flow4, flags: u32) -> bool {
        match table {
            FlowTable::Outbound => flow_table::open(&self.words4(), &Key::v4(key, SEED), flags),
            FlowTable::Host => self.open_host(&self.host4, key, flags),
        }
    }
    fn forget4(&self, key: &Flow4) {
        self.host4.borrow_mut().remove(key);
    }
    fn find6(&self, table: FlowTable, key: &Flow6, mark: u32) -> Option<u32> {
        match table {
            FlowTable::Outbound => flow_table::find(&self.words6(), &Key::v6(key, SEED), mark),
            FlowTable::Host => self.find_host(&self.host6, key, mark),
        }
    }
    fn open6(&self, table: FlowTable, key: &Flow6, flags: u32) -> bool {
        match table {
            FlowTable::Outbound => flow_table::open(&self.words6(), &Key::v6(key, SEED), flags),
            FlowTable::Host => self.open_host(&self.host6, key, flags),
        }
    }
    fn forget6(&self, key: &Flow6) {
        self.host6.borrow_mut().remove(key);
    }
}

impl Datagrams for &HostNode {
    fn recall4(&self, endpoint: u16, key: [u64; DATAGRAM4_WORDS], kind: u32, touch: Touch) -> Option<u32> {
        let key = datagram_table::Key::new(key, endpoint, SEED);
        datagram_table::recall(&self.datagrams4(), &key, kind, touch)
    }
    fn recall6(&self, endpoint: u16, key: [u64; DATAGRAM6_WORDS], kind: u32, touch: Touch) -> Option<u32> {
        let key = datagram_table::Key::new(key, endpoint, SEED);
        datagram_table::recall(&self.datagrams6(), &key, kind, touch)
    }
    fn note4(&self, endpoint: u16, key: [u64; DATAGRAM4_WORDS], flags: u32) -> bool {
        let key = datagram_table::Key::new(key, endpoint, SEED);
        datagram_table::note(&self.datagrams4(), &key, flags)
    }
    fn note6(&self, endpoint: u16, key: [u64; DATAGRAM6_WORDS], flags: u32) -> bool {
        let key = datagram_table::Key::new(key, endpoint, SEED);
        datagram_table::note(&self.datagrams6(), &key, flags)
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
