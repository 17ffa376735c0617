//! The node agent: sources tell, the store compiles and commits, the datapath enforces, the admin API
//! answers.
//!
//! Invariant: nothing here decides a verdict; the agent only carries what istiod says to the tables in the
//! kernel, and when it stops, what is enforced stays enforced.

pub mod admin;
pub mod api_server;
pub mod board;
pub mod by_pair;
pub mod chain;
pub mod change;
pub mod config;
pub mod convert;
pub mod denied;
pub mod flows;
pub mod held;
pub mod http;
pub mod keys;
pub mod l7;
pub mod metrics;
pub mod monitor;
pub mod plane;
pub mod pump;
pub mod reach;
pub mod registration;
pub mod requests;
pub mod run;
pub mod service;
pub mod snapshot;
pub mod socket;
pub mod source;
pub mod state_file;
pub mod store;
pub mod word;

pub use config::{Config, ConfigError, Settings};
pub use run::{RunError, run, run_on};
