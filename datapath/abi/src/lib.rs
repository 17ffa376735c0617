//! Everything that the kernel programs and user space must agree on: limits, maps, records, reasons, events.
//!
//! Invariant: a type here has one layout, no padding and no pointer; what it means is said once, in this
//! crate.
#![cfg_attr(target_arch = "bpf", no_std)]
#![forbid(unsafe_code)]

pub mod bank;
pub mod cell;
#[cfg(not(target_arch = "bpf"))]
pub mod chunked;
pub mod control;
pub mod count;
pub mod datagram;
pub mod endpoint;
pub mod event;
pub mod flow;
pub mod held;
pub mod limits;
pub mod maps;
pub mod reason;
pub mod source;
pub mod steered;
#[cfg(not(target_arch = "bpf"))]
pub mod tables;

pub use bank::{Bank, State};
pub use cell::{Action, Cell};
pub use control::Control;
pub use count::CpuCounters;
pub use datagram::{Datagram4, Datagram6};
pub use endpoint::{EndpointRecord, EndpointSets, Mode};
pub use event::{Event, EventKind};
pub use flow::{Flow4, Flow6, FlowState};
pub use held::{HeldFlow, HeldKey4, HeldKey6, HeldOpening, HeldVerdict, Isns};
pub use reason::Reason;
pub use source::{Slot4, Slot6};
pub use steered::{ListenerKey, Opening};
