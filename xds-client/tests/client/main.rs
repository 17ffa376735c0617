//! The client from outside: tables of messages, bytes that hide something, and a server in this process.

#![expect(
    clippy::let_underscore_must_use,
    reason = "a test's server may lose its client at any time"
)]

mod decode;
mod delta;
mod istiod;
mod model;
mod streams;
mod wire;
