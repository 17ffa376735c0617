//! What a stream hands on, and what it wants to hear back.
//!
//! Invariant: a push names everything that its response changed: what is new, what is gone and what couldn't
//! be read.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use thyra_proto::istio::mcp::v1alpha1::Metadata;
use thyra_proto::istio::mesh::v1alpha1::MeshConfig;
use thyra_proto::istio::security::Authorization;
use thyra_proto::istio::security::v1beta1::{AuthorizationPolicy, PeerAuthentication, RequestAuthentication};
use thyra_proto::istio::workload::Address;

use crate::kind::{Kind, StreamKind};
use crate::peer::Peer;

/// Takes what a stream brings. Both methods are called from the stream's task and must not block.
pub trait Sink: Send + 'static {
    /// Applies a push, before it is answered. Returns the resources that can't be used, by name: they are
    /// refused to the server, and given again whenever the server sends them again. Everything else counts as
    /// held.
    fn apply(&mut self, push: Push) -> Vec<Rejected>;

    /// The stream is in a new state.
    fn state(&mut self, stream: StreamKind, state: StreamState);
}

/// What one response changed.
#[derive(Clone, Debug)]
pub struct Push {
    /// Where it came from.
    pub stream: StreamKind,
    /// Type URL of all its resources.
    pub type_url: String,
    /// New and changed resources; those held in the same version are left out, also from an initial push.
    pub resources: Vec<Named>,
    /// Names that are gone. A name may be unknown to the sink.
    pub removed: Vec<String>,
    /// Resources that couldn't be decoded, already refused to the server: whatever was held under that name
    /// is out of date.
    pub undecodable: Vec<Rejected>,
    /// First of this type on a new stream: with it the type is in sync. It is no full list where something
    /// was held before.
    pub initial: bool,
    /// When the response had arrived.
    pub received: Instant,
}

/// A resource under its name on the wire.
#[derive(Clone, Debug)]
pub struct Named {
    /// Workload: uid; service: `namespace/hostname`; policies: `namespace/name`; MeshConfig: empty.
    pub name: String,
    /// Kubernetes' resourceVersion, or the server's content version; empty where there is none.
    pub version: String,
    /// The resource.
    pub body: Body,
    /// Fields and enum values of policies that this build doesn't know, such as `spec.rules[0].from[0].source
    /// field 99` or `spec.action value 7`.
    pub unknown: Vec<String>,
}

/// A decoded resource.
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all of them are the largest, an address"
)]
#[derive(Clone, Debug, PartialEq)]
pub enum Body {
    /// Workload or service.
    Address(Address),
    /// Istiod's L4 reduction of a policy.
    Authorization(Authorization),
    /// Raw policy.
    AuthorizationPolicy {
        /// From Kubernetes.
        metadata: Metadata,
        /// As written.
        spec: AuthorizationPolicy,
    },
    /// Raw policy.
    PeerAuthentication {
        /// From Kubernetes.
        metadata: Metadata,
        /// As written.
        spec: PeerAuthentication,
    },
    /// Raw policy.
    RequestAuthentication {
        /// From Kubernetes.
        metadata: Metadata,
        /// As written.
        spec: RequestAuthentication,
    },
    /// Mesh-wide settings.
    MeshConfig(MeshConfig),
}

/// A resource that can't be used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rejected {
    /// As in [`Named`].
    pub name: String,
    /// Why, for the server's log and for status.
    pub error: String,
}

/// How a stream is doing. Whatever it is, what was applied stays until a push changes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamState {
    /// Dialling; attempts are counted from 0 since the last good stream.
    Connecting {
        /// Which try.
        attempt: u32,
    },
    /// Connected and asked; at least one type wasn't answered yet.
    Syncing {
        /// Who answers.
        peer: Peer,
        /// Has the first response of the type been handled?
        ready: BTreeMap<Kind, bool>,
    },
    /// Every type was answered on this stream.
    Synced {
        /// Who answers.
        peer: Peer,
    },
    /// The connection couldn't be had, or ended.
    Disconnected {
        /// Why.
        error: String,
        /// Time until the next try.
        retry: Duration,
    },
    /// The server doesn't want us: UNAUTHENTICATED or PERMISSION_DENIED.
    Refused {
        /// The server's word.
        error: String,
        /// Time until the next try.
        retry: Duration,
    },
    /// Stopped on request; nothing follows.
    Stopped,
}
