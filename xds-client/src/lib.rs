//! Delta xDS as istiod speaks it: a pure state machine, decoding that drops nothing, and a transport over
//! rustls.
//!
//! Invariant: what the sink was given and didn't reject is exactly what the server is told is held, so that a
//! deletion during an outage arrives when the stream is back.
//!
//! One call of [`run`] is one stream: a connection, a task and a sink of its own. [`StreamKind::Workloads`]
//! asks as a node proxy, [`StreamKind::Config`] as a control-plane peer; neither ever disturbs the other.

pub mod backoff;
mod cause;
pub mod decode;
pub mod delta;
pub mod kind;
pub mod node;
pub mod peer;
pub mod server;
pub mod sink;
pub mod stream;
pub mod tls;
pub mod transport;
pub mod unknown;

pub use kind::{Kind, StreamKind};
pub use node::NodeIdentity;
pub use peer::Peer;
pub use server::{Server, ServerError};
pub use sink::{Body, Named, Push, Rejected, Sink, StreamState};
pub use stream::{ClientConfig, run};
