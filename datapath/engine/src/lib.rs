//! The packet path as pure functions: parse, look up, decide, account, and what a reset looks like.
//!
//! Invariant: the kernel programs and the host (tests, dry-run, read-back) run this same code; what differs
//! is only who loads bytes (`Load`), who holds the tables (`Tables`), the connections (`Flows`) and the
//! counters (`Counters`), and who carries out the end (`Hook`).
#![cfg_attr(target_arch = "bpf", no_std)]
#![forbid(unsafe_code)]

pub mod account;
#[cfg(not(target_arch = "bpf"))]
pub mod bank;
pub mod datagram_table;
#[cfg(not(target_arch = "bpf"))]
pub mod datagram_words;
pub mod decide;
pub mod family;
pub mod flow_table;
#[cfg(not(target_arch = "bpf"))]
pub mod flow_words;
pub mod flows;
pub mod held;
#[cfg(not(target_arch = "bpf"))]
pub mod host;
pub mod load;
pub mod lookup;
pub mod packet;
pub mod parse;
pub mod program;
pub mod reset;
pub mod steered;
pub mod tables;

#[cfg(not(target_arch = "bpf"))]
pub use bank::{BankImage, Overflow};
pub use family::{Family, V4, V6};
pub use flows::Flows;
pub use held::Held;
pub use load::Load;
pub use packet::Packet;
pub use steered::Steered;
pub use tables::{BANK_WORDS, Table, Tables};
