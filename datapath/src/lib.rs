//! User space of the datapath: loads, attaches and pins the programs, writes the tables, reads the events.
//!
//! Invariant: what is pinned enforces by itself. This process may die at any instruction: packets go on being
//! judged by the last state that was switched to, and the next process picks it up.
//!
//! ```text
//! open ──► reserve(uid) ──► commit(tables with that id) ──► attach ──► … commit … ──► detach
//! ```
//!
//! `open` finds the pinned maps or makes them; `reserve` gives an endpoint its id; `commit` writes the dead
//! bank and switches; `attach` puts the programs at the pod's interface.

mod attach;
mod beside;
mod blocks;
mod bpffs;
mod clsact;
mod commit;
mod counters;
mod coverage;
mod datagrams;
mod datapath;
mod direct;
mod endpoint_ids;
mod envoy_group;
mod events;
mod flow_maps;
mod given_group;
mod grace;
mod held_flows;
mod hold;
mod hook;
mod host_flows;
mod inside;
mod interface;
mod l7_flows;
mod mapping;
mod memory;
mod netlink;
mod netns;
mod object;
mod open;
mod outbound;
mod preflight;
mod programs;
mod socket_watch;
mod sockets;
mod state_file;
mod status;
mod steering;
mod sys;
mod tap;
mod traffic;
mod verdict_names;
mod view;

pub use attach::{AttachError, DetachError, EndpointSpec};
pub use bpffs::BpffsError;
pub use commit::{CommitError, CommitReport};
pub use counters::Counters;
pub use datapath::{Config, Datapath, Deny, HostTraffic, NonTcp, Origin, ReadError};
pub use direct::LocalRedirect;
pub use endpoint_ids::ReserveError;
pub use envoy_group::{EnvoyGroup, EnvoyGroupError};
pub use events::EventReader;
pub use flow_maps::CollectReport;
pub use given_group::{GivenGroup, GivenGroupError};
pub use hold::{HeldConnection, HoldError, Holding};
pub use hook::{Hook, Order, Place};
pub use inside::InsideError;
pub use object::{ObjectError, built_by, object};
pub use open::OpenError;
pub use preflight::{Check, PreflightError, preflight};
pub use programs::HookError;
pub use socket_watch::{EndedSockets, SocketWatch};
pub use sockets::{Connection, Held, Phase};
pub use state_file::StateError;
pub use status::{DatapathStatus, EndpointStatus, Fill};
pub use steering::SteerError;
pub use tap::{TAP_HEADER, Tap, TapWatch};
pub use traffic::Traffic;
pub use verdict_names::VerdictsFull;
pub use view::{KernelView, Sighting};

pub use thyra_datapath_abi as abi;
