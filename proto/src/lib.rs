//! Protobuf types of what istiod sends and of Thyra's admin API, by package path.
//!
//! Invariant: the code below `generated/` is written by `tests/generated.rs` from the files in `proto/`,
//! never by hand.

/// A package of generated code, with the lints that it can't know about lifted.
macro_rules! package {
    ($(#[$doc:meta])* $name:ident, $file:literal) => {
        $(#[$doc])*
        #[allow(
            unreachable_pub,
            clippy::all,
            clippy::pedantic,
            clippy::as_conversions,
            clippy::cast_possible_truncation,
            clippy::allow_attributes_without_reason,
            rustdoc::all,
            reason = "generated code, in the generator's style"
        )]
        pub mod $name {
            include!(concat!("generated/", $file));
        }
    };
}

/// What a `MonitorEvent` can be: what the kernel tells, what Envoy judged, what the agent did.
pub const MONITOR_KINDS: [&str; 11] = [
    "new",
    "drop",
    "revoke",
    "spoof",
    "malformed",
    "audit",
    "outbound",
    "request",
    "stream",
    "lost",
    "agent",
];

/// The xDS protocol.
pub mod envoy {
    /// Package `envoy.config`.
    pub mod config {
        /// Package `envoy.config.core`.
        pub mod core {
            package!(
                /// Who is asking.
                v3,
                "envoy.config.core.v3.rs"
            );
        }
    }
    /// Package `envoy.service`.
    pub mod service {
        /// Package `envoy.service.discovery`.
        pub mod discovery {
            package!(
                /// Delta discovery and its service.
                v3,
                "envoy.service.discovery.v3.rs"
            );
        }
    }
}

/// Google's common types.
pub mod google {
    package!(
        /// Errors inside messages.
        rpc,
        "google.rpc.rs"
    );
}

/// What istiod tells.
pub mod istio {
    package!(
        /// Workloads and services.
        workload,
        "istio.workload.rs"
    );
    /// Package `istio.mcp`.
    pub mod mcp {
        package!(
            /// The envelope of configuration objects.
            v1alpha1,
            "istio.mcp.v1alpha1.rs"
        );
    }
    /// Package `istio.mesh`.
    pub mod mesh {
        package!(
            /// Mesh-wide settings.
            v1alpha1,
            "istio.mesh.v1alpha1.rs"
        );
    }
    #[allow(
        unreachable_pub,
        clippy::all,
        clippy::pedantic,
        clippy::as_conversions,
        clippy::allow_attributes_without_reason,
        rustdoc::all,
        reason = "generated code, in the generator's style"
    )]
    /// The L4 view of authorization policies; operators' policies are in `v1beta1`.
    pub mod security {
        include!("generated/istio.security.rs");
        package!(
            /// Policies as their operators wrote them.
            v1beta1,
            "istio.security.v1beta1.rs"
        );
    }
    /// Package `istio.type`.
    pub mod r#type {
        package!(
            /// Selectors.
            v1beta1,
            "istio.r#type.v1beta1.rs"
        );
    }
}

/// Thyra's own API.
pub mod thyra {
    package!(
        /// What the agent serves on its socket.
        v1,
        "thyra.v1.rs"
    );
}

/// Descriptors of the packages below `istio`, as an encoded `google.protobuf.FileDescriptorSet` without
/// comments: names and numbers of every field that this build knows.
pub const ISTIO_DESCRIPTORS: &[u8] = include_bytes!("generated/istio.binpb");
