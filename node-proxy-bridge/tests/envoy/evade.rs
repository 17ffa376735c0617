//! Nothing gets past: crafted bytes go to a listener as it is inside a pod, and whatever comes out of it towards the
//! pod is recorded and accounted for to the last byte.
//!
//! Each family has its control: with its guard off the same bytes do reach the pod.

mod client;
mod custom;
mod door;
mod first_request;
mod frames;
mod framing;
mod http2;
mod large;
mod namespace;
mod neighbours;
mod paths;
mod pod;
mod policy;
mod segments;
mod server_name;
mod told;
mod upgrade;
