//! Requests through Envoy while the agent, Envoy and pods come and go, with the real programs on a node of the lab.
//!
//! They need root, an Envoy (`make envoy`) and the agent beside the command; without them they say so, and fail on CI.

#[path = "life/failures.rs"]
mod failures;
#[path = "life/given.rs"]
mod given;
#[path = "life/held.rs"]
mod held;
#[path = "life/held_http.rs"]
mod held_http;
#[path = "life/leaks.rs"]
mod leaks;
#[path = "life/node.rs"]
mod node;
#[path = "life/outlives.rs"]
mod outlives;
