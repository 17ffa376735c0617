//! What the programs read and user space writes: one bank of the policy tables, and the state beside them.
//!
//! Each is one element of an array map, so that a packet finds it by one look-up and everything in it by
//! arithmetic. User space maps the same memory and writes it by whole aligned 64-bit words; a u16 table packs
//! four entries into a word, entry `i` in word `i / 4` at bit `16 × (i % 4)`.
//!
//! Invariant: nothing in a bank refers to the other one; the last store of a change is that of
//! `State::control`, which says which of the two a packet reads.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::limits::{
    BUCKETS, IFINDEX_SLOTS, MAX_CLASSES, MAX_COLUMNS, MAX_ENDPOINTS, MAX_PORT_CLASSES, MAX_ROWS, MAX_SETS,
    MAX_VERDICTS, SLOTS4, SLOTS6,
};
use crate::{Cell, Control, EndpointRecord, EndpointSets, Slot4, Slot6};

/// The policy tables, an element of `maps::BANKS`.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Bank {
    /// By endpoint id.
    pub endpoint_sets: [EndpointSets; MAX_ENDPOINTS],
    /// Exact IPv4 sources, by bucket.
    pub sources4: [[Slot4; SLOTS4]; BUCKETS],
    /// Exact IPv6 sources, by bucket.
    pub sources6: [[Slot6; SLOTS6]; BUCKETS],
    /// Column plus one, by source class.
    pub class_column: [u16; MAX_CLASSES],
    /// Port class, by destination port.
    pub port_class: [u16; 65_536],
    /// Row plus one, by policy set and port class.
    pub sets: [[u16; MAX_PORT_CLASSES]; MAX_SETS],
    /// By row plus one and column plus one; row 0 and column 0 are never written.
    pub rows: [[Cell; MAX_COLUMNS]; MAX_ROWS],
}

/// What belongs to no bank, the one element of `maps::STATE`.
#[repr(C)]
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct State {
    /// Which bank is live, and how verdicts are carried out.
    pub control: Control,
    /// Mixed into the hash of every connection, so that a pod can't choose its buckets.
    pub flow_seed: u64,
    /// Connections that one endpoint may have in `OUTBOUND4` and `OUTBOUND6` together.
    pub outbound_budget: u64,
    /// How many it has, by endpoint id.
    pub outbound: [u64; MAX_ENDPOINTS],
    /// By endpoint id.
    pub endpoints: [EndpointRecord; MAX_ENDPOINTS],
    /// Endpoint id, by interface index modulo `IFINDEX_SLOTS`.
    pub ifindex: [u16; IFINDEX_SLOTS],
    /// Cookie of the pod's network namespace, by endpoint id; 0 where no connection is steered to Envoy.
    pub netns: [u64; MAX_ENDPOINTS],
    /// Connections that one endpoint may have in `L7_FLOWS4` and `L7_FLOWS6` together.
    pub l7_budget: u64,
    /// How many it has, by endpoint id.
    pub l7: [u64; MAX_ENDPOINTS],
    /// Who judges a verdict's residual, by verdict id: a port of Envoy's in the pod, or the number under which its
    /// connections are held (`held::is_held`); 0 for nobody.
    pub listeners: [u16; MAX_VERDICTS],
    /// Index of the interface that leads to the agent, which holds packets; 0 for none.
    pub agent: u64,
}

const _: () = assert!(
    MAX_ENDPOINTS.is_power_of_two()
        && BUCKETS.is_power_of_two()
        && MAX_CLASSES.is_power_of_two()
        && MAX_PORT_CLASSES.is_power_of_two()
        && MAX_SETS.is_power_of_two()
        && MAX_COLUMNS.is_power_of_two()
        && MAX_ROWS.is_power_of_two()
        && IFINDEX_SLOTS.is_power_of_two(),
    "the programs keep an index inside its table by a mask"
);
