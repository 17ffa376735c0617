//! The BPF object that the build script made, and the name of the layout it was built for.
//!
//! Invariant: two builds that disagree about a map, a record, a limit or the place of a source address have
//! different layout names, so that one never reads the other's pinned memory.

use std::fmt::Write as _;
use std::mem::offset_of;

use aya_obj::Object;
use thyra_datapath_abi::count::{EndpointCounter, EventBudget, ReasonCounter, VerdictCounter};
use thyra_datapath_abi::{
    Bank, CpuCounters, Datagram4, Datagram6, EndpointRecord, Event, Flow4, Flow6, FlowState, HeldFlow,
    HeldKey4, HeldKey6, HeldOpening, HeldVerdict, ListenerKey, Opening, Slot6, State, limits, maps,
};
use thyra_datapath_engine::Table;
use thyra_datapath_engine::datagram_table::Key as DatagramKey;
use thyra_datapath_engine::family::Address6;
use thyra_datapath_engine::flow_table::Key;
use thyra_datapath_engine::lookup::{buckets4, buckets6};

/// The object file; empty when it was built with `THYRA_BPF=stub`.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/thyra.bpf.o"));

/// Addresses whose buckets tell one hash function from another.
const PROBES: [u64; 3] = [
    0x0a00_0001_0000_0001,
    0x9e37_79b9_7f4a_7c15,
    0xffff_ffff_ffff_fffe,
];

/// The object that ships in this build, for tests and benchmarks that load it on their own; empty in a build
/// without programs.
#[must_use]
pub fn object() -> &'static [u8] {
    OBJECT
}

/// Where the programs of this build come from, in one line.
#[must_use]
pub fn built_by() -> &'static str {
    env!("THYRA_BPF_BUILT_BY")
}

/// The parsed facts about the object that ships with this build.
#[derive(Clone, Debug)]
pub(crate) struct ShippedObject {
    pub(crate) bytes: &'static [u8],
    /// Name of the layout: 16 hex digits.
    pub(crate) layout: String,
    /// Name of the object's content: 16 hex digits.
    pub(crate) content: String,
    /// The maps by name.
    pub(crate) maps: Vec<MapShape>,
}

/// A map as the object declares it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct MapShape {
    pub(crate) name: String,
    pub(crate) kind: u32,
    pub(crate) key_bytes: u32,
    pub(crate) value_bytes: u32,
    pub(crate) entries: u32,
    pub(crate) flags: u32,
}

/// The object can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// The build left the programs out.
    #[error("this binary was built without BPF programs; build it again without `THYRA_BPF=stub`")]
    Stub,
    /// Not a BPF object.
    #[error("the built-in BPF object can't be read; build again")]
    Unreadable(#[source] Box<aya_obj::ParseError>),
    /// It lacks a map of the shared list.
    #[error("the built-in BPF object has no map `{0}`; clean and build again")]
    MapMissing(&'static str),
}

impl ShippedObject {
    /// Reads the built-in object.
    pub(crate) fn read() -> Result<Self, ObjectError> {
        if OBJECT.is_empty() {
            return Err(ObjectError::Stub);
        }
        let object = Object::parse(OBJECT).map_err(|e| ObjectError::Unreadable(Box::new(e)))?;
        let mut shapes = Vec::new();
        for name in maps::ALL {
            let map = object.maps.get(*name).ok_or(ObjectError::MapMissing(name))?;
            shapes.push(MapShape {
                name: (*name).to_owned(),
                kind: map.map_type(),
                key_bytes: map.key_size(),
                value_bytes: map.value_size(),
                entries: entries(name, map.max_entries()),
                flags: map.map_flags(),
            });
        }
        Ok(Self {
            bytes: OBJECT,
            layout: hash(describe(&shapes).as_bytes()),
            content: hash(OBJECT),
            maps: shapes,
        })
    }
}

/// CPUs that this machine may ever have; each has an element of its own in `COUNTERS`.
pub(crate) fn possible_cpus() -> usize {
    // Without `/sys` there is no BPF file system either, which preflight names; one CPU is right or refuses all.
    aya::util::nr_cpus().unwrap_or(1)
}

/// What the object leaves to whoever loads it.
fn entries(map: &str, declared: u32) -> u32 {
    match map {
        maps::COUNTERS => u32::try_from(possible_cpus()).unwrap_or(u32::MAX),
        _ => declared,
    }
}

/// Everything that both sides must agree on, as text.
fn describe(shapes: &[MapShape]) -> String {
    let mut text = String::new();
    for shape in shapes {
        // Writing to a String can't fail.
        let _ = writeln!(text, "{shape:?}");
    }
    for (name, bytes) in records() {
        let _ = writeln!(text, "{name} {bytes:?}");
    }
    for (name, bytes) in elements() {
        let _ = writeln!(text, "{name} {bytes:?}");
    }
    for (name, limit) in table_limits() {
        let _ = writeln!(text, "{name} {limit}");
    }
    let _ = writeln!(text, "a state of a connection {:x?}", FlowState::live(!0, !0, 1));
    for address in PROBES {
        let wide = Address6 {
            high: address,
            low: !address,
        };
        let narrow = u32::try_from(address >> 32).unwrap_or(0);
        let _ = writeln!(text, "buckets {:?} {:?}", buckets4(narrow), buckets6(wide));
        let (flow4, flow6) = (flow4(address), flow6(address));
        let _ = writeln!(
            text,
            "flows {:?} {:?}",
            Key::v4(&flow4, address),
            Key::v6(&flow6, address)
        );
        let datagram6 = Datagram6 {
            remote: flow6.local,
            ..Datagram6::default()
        };
        let datagram4 = Datagram4 {
            remote: flow4.local,
            ..Datagram4::default()
        };
        let _ = writeln!(
            text,
            "datagrams {:?} {:?}",
            DatagramKey::<1>::new(zerocopy::transmute!(datagram4), 1, address),
            DatagramKey::<3>::new(zerocopy::transmute!(datagram6), 1, address)
        );
    }
    text
}

/// A connection, to tell one hash function of connections from another.
fn flow4(bits: u64) -> Flow4 {
    zerocopy::transmute!([bits, !bits])
}

/// The same for IPv6.
fn flow6(bits: u64) -> Flow6 {
    zerocopy::transmute!([
        bits,
        !bits,
        bits.rotate_left(7),
        !bits.rotate_left(9),
        bits.rotate_left(11)
    ])
}

/// Offsets of every field, then the size; destructured without `..`, so that a new field stops the build
/// here.
fn records() -> Vec<(&'static str, Vec<usize>)> {
    macro_rules! offsets {
        ($($record:ident { $($field:ident),* $(,)? })*) => {
            vec![$({
                let $record { $($field: _),* } = $record::default();
                (stringify!($record), vec![$(offset_of!($record, $field),)* size_of::<$record>()])
            }),*]
        };
    }
    offsets! {
        EndpointRecord { ifindex, bridge_ifindex, address4, flags, address6, mac, netns }
        Slot6 { high, low, value }
        Flow4 { local, remote, local_port, remote_port, endpoint, protocol }
        Flow6 { local, remote, local_port, remote_port, endpoint, protocol }
        Datagram4 { remote, local_port, remote_port }
        Datagram6 { remote, local_port, remote_port, detail }
        Event {
            time_ns, generation, ifindex, length, sequence, source, destination, source_port, destination_port,
            endpoint, verdict, kind, reason, tcp_flags, flags, family, protocol, pad,
        }
        Opening { isn, port, flags }
        ListenerKey { netns, port, family }
        HeldOpening { isns, residual, flags, pad }
        HeldKey4 { flow, isns }
        HeldKey6 { flow, isns }
        HeldVerdict { isns, action, end }
        VerdictCounter { packets, bytes, connections }
        ReasonCounter { packets, bytes }
        EndpointCounter { to_pod_packets, from_pod_packets, to_pod_dropped, from_pod_dropped }
        EventBudget { credit_ns, filled_ns }
    }
}

/// The same for the elements too large to make one, and for one that has no default.
fn elements() -> [(&'static str, Vec<usize>); 4] {
    let counters = [
        offset_of!(CpuCounters, verdicts),
        offset_of!(CpuCounters, reasons),
        offset_of!(CpuCounters, endpoints),
        offset_of!(CpuCounters, lost),
        offset_of!(CpuCounters, budget),
        size_of::<CpuCounters>(),
    ];
    let state = [
        offset_of!(State, control),
        offset_of!(State, flow_seed),
        offset_of!(State, outbound_budget),
        offset_of!(State, outbound),
        offset_of!(State, endpoints),
        offset_of!(State, ifindex),
        offset_of!(State, netns),
        offset_of!(State, l7_budget),
        offset_of!(State, l7),
        offset_of!(State, listeners),
        offset_of!(State, agent),
        size_of::<State>(),
    ];
    let held = [
        offset_of!(HeldFlow, state),
        offset_of!(HeldFlow, isns),
        offset_of!(HeldFlow, opened),
        size_of::<HeldFlow>(),
    ];
    let bank = Table::ALL
        .map(Table::start)
        .into_iter()
        .chain([size_of::<Bank>()]);
    [
        ("State", state.to_vec()),
        ("Bank", bank.collect()),
        ("CpuCounters", counters.to_vec()),
        ("HeldFlow", held.to_vec()),
    ]
}

fn table_limits() -> [(&'static str, usize); 14] {
    [
        ("endpoints", limits::MAX_ENDPOINTS),
        ("ifindex slots", limits::IFINDEX_SLOTS),
        ("classes", limits::MAX_CLASSES),
        ("columns", limits::MAX_COLUMNS),
        ("rows", limits::MAX_ROWS),
        ("sets", limits::MAX_SETS),
        ("port classes", limits::MAX_PORT_CLASSES),
        ("verdicts", limits::MAX_VERDICTS),
        ("buckets", limits::BUCKETS),
        ("slots of a v4 bucket", limits::SLOTS4),
        ("slots of a v6 bucket", limits::SLOTS6),
        ("ring bytes", limits::EVENT_RING_BYTES),
        ("first port of Envoy", usize::from(limits::L7_FIRST_PORT)),
        ("ports of Envoy", usize::from(limits::L7_PORTS)),
    ]
}

/// FNV-1a, 64 bits, as 16 hex digits: it names builds, it guards against nobody.
fn hash(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(entries: u32) -> MapShape {
        MapShape {
            name: "BANKS".into(),
            kind: 2,
            key_bytes: 4,
            value_bytes: 8,
            entries,
            flags: 0x400,
        }
    }

    #[test]
    fn a_map_of_another_size_is_another_layout() {
        assert_ne!(
            hash(describe(&[shape(1)]).as_bytes()),
            hash(describe(&[shape(2)]).as_bytes())
        );
        assert_eq!(describe(&[shape(1)]), describe(&[shape(1)]));
    }

    #[test]
    fn a_layout_name_is_the_published_hash() {
        assert_eq!(hash(b""), "cbf29ce484222325");
        assert_eq!(hash(b"a"), "af63dc4c8601ec8c");
    }
}
