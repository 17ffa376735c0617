//! Istio policies to exact tables: `World` in, `Tables` out, by partial evaluation; pure, without clock or
//! I/O.
//!
//! Invariant: a table cell says what the oracle says for every connection that falls into it.

pub mod authorizer;
pub mod compile;
pub mod diff;
pub mod explain;
pub mod finding;
pub mod manifest;
pub mod matrix;
pub mod oracle;
pub mod parse;
pub mod policy;
pub mod report;
pub mod residual;
pub mod shared_map;
pub mod tokens;
pub mod traffic;
pub mod validate;
pub mod world;
