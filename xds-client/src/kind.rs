//! The resource types that are asked for and the streams on which they are asked.
//!
//! Invariant: a `ztunnel~` stream never asks for a raw configuration kind, and only `router~` does.

use std::fmt;

/// A resource type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Workloads and services.
    Address,
    /// Istiod's own L4 reduction of authorization policies, lossy.
    Authorization,
    /// Raw AuthorizationPolicy.
    AuthorizationPolicy,
    /// Raw PeerAuthentication.
    PeerAuthentication,
    /// Raw RequestAuthentication.
    RequestAuthentication,
    /// Mesh-wide settings; a single resource without a name.
    MeshConfig,
}

/// Which of the two streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StreamKind {
    /// Addresses (and `Authorization` where asked for), as a node proxy.
    Workloads,
    /// Raw policies and MeshConfig; needs an identity in the mesh's root namespace.
    Config,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 6] = [
        Self::Address,
        Self::Authorization,
        Self::AuthorizationPolicy,
        Self::PeerAuthentication,
        Self::RequestAuthentication,
        Self::MeshConfig,
    ];

    /// The type URL of its subscription.
    #[must_use]
    pub const fn type_url(self) -> &'static str {
        match self {
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
            Self::AuthorizationPolicy => "security.istio.io/v1/AuthorizationPolicy",
            Self::PeerAuthentication => "security.istio.io/v1/PeerAuthentication",
            Self::RequestAuthentication => "security.istio.io/v1/RequestAuthentication",
            Self::MeshConfig => "core/v1alpha1/MeshConfig",
        }
    }

    /// The kind of a type URL, if it is one of ours.
    #[must_use]
    pub fn from_type_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == url)
    }

    /// Full protobuf name of the message that says what the resource is (inside the envelope, where there is
    /// one).
    #[must_use]
    pub const fn message(self) -> &'static str {
        match self {
            Self::Address => "istio.workload.Address",
            Self::Authorization => "istio.security.Authorization",
            Self::AuthorizationPolicy => "istio.security.v1beta1.AuthorizationPolicy",
            Self::PeerAuthentication => "istio.security.v1beta1.PeerAuthentication",
            Self::RequestAuthentication => "istio.security.v1beta1.RequestAuthentication",
            Self::MeshConfig => "istio.mesh.v1alpha1.MeshConfig",
        }
    }

    /// It comes inside an `istio.mcp.v1alpha1.Resource`, beside its metadata.
    #[must_use]
    pub const fn is_enveloped(self) -> bool {
        matches!(
            self,
            Self::AuthorizationPolicy | Self::PeerAuthentication | Self::RequestAuthentication
        )
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.message();
        f.write_str(name.rsplit('.').next().unwrap_or(name))
    }
}

impl StreamKind {
    /// First part of the node id, by which istiod chooses what it serves.
    #[must_use]
    pub const fn node_kind(self) -> &'static str {
        match self {
            Self::Workloads => "ztunnel",
            Self::Config => "router",
        }
    }

    /// What is asked for; `lossy` adds `Authorization` to the workloads.
    #[must_use]
    pub fn kinds(self, lossy: bool) -> Vec<Kind> {
        match self {
            Self::Workloads if lossy => vec![Kind::Address, Kind::Authorization],
            Self::Workloads => vec![Kind::Address],
            Self::Config => vec![
                Kind::AuthorizationPolicy,
                Kind::PeerAuthentication,
                Kind::RequestAuthentication,
                Kind::MeshConfig,
            ],
        }
    }
}

impl fmt::Display for StreamKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Workloads => "workloads",
            Self::Config => "config",
        })
    }
}
