//! The agent on a datapath that only remembers: endpoints, news, restarts, refusals, the API on its socket.
//!
//! Invariant: no root, no kernel, no network beyond a Unix socket and loopback.

#[path = "agent/api.rs"]
mod api;
#[path = "agent/flows.rs"]
mod flows;
#[path = "agent/lifecycle.rs"]
mod lifecycle;
#[path = "agent/plane.rs"]
mod plane;
#[path = "agent/sample.rs"]
mod sample;
