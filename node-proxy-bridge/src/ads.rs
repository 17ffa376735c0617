//! What Envoy is told, and what it said to it: an xDS server on a Unix socket.
//!
//! Invariant: a resource counts as accepted only when Envoy has acknowledged this version of it. What Envoy
//! refuses is not offered again; the last version that it took stays in its place.

mod catalog;
mod conversation;
mod server;

pub(crate) use self::catalog::hex;
pub use self::catalog::{Catalog, Kind, Name, Outcome, Resource};
pub use self::server::{AdsError, AdsServer};
