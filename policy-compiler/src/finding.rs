//! What is amiss in files, under codes that stay: for people, for CI and for editors.
//!
//! Invariant: a code once published keeps its name and meaning; docs/validate.md has a section for each.

use std::fmt;

use serde::Serialize;

use crate::manifest::{Location, ManifestError};

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The files are refused.
    Error,
    /// Accepted, but probably not what was meant.
    Warning,
}

macro_rules! codes {
    ($($severity:ident { $($(#[$doc:meta])* $code:ident = $name:literal,)* })*) => {
        /// What kind of thing is amiss.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code {
            $($($(#[$doc])* $code,)*)*
        }

        impl Code {
            /// All codes.
            pub const ALL: &[Self] = &[$($(Self::$code,)*)*];

            /// Its published name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $($(Self::$code => $name,)*)*
                }
            }

            /// How bad it is.
            #[must_use]
            pub const fn severity(self) -> Severity {
                match self {
                    $($(Self::$code => Severity::$severity,)*)*
                }
            }
        }
    };
}

codes! {
    Error {
        /// A file can't be read: missing, too large, not UTF-8.
        NotReadable = "not-readable",
        /// No YAML or JSON.
        Syntax = "syntax",
        /// A kind or version that its group doesn't have.
        UnknownKind = "unknown-kind",
        /// A field that the kind doesn't have.
        UnknownField = "unknown-field",
        /// A value of the wrong type or form, or fields that can't stand together.
        BadValue = "bad-value",
        /// A principal that no identity can have.
        BadPrincipal = "bad-principal",
        /// One object twice, with different contents.
        DefinedTwice = "defined-twice",
        /// The objects can't be put on one node.
        NoPlan = "no-plan",
    }
    Warning {
        /// A policy that does nothing.
        NoEffect = "no-effect",
        /// An ALLOW policy that allows nothing.
        AllowsNothing = "allows-nothing",
        /// A condition that Istio can't express.
        Inexpressible = "inexpressible",
        /// A principal whose form no identity has.
        OddPrincipal = "odd-principal",
        /// A policy for waypoints.
        TargetRefs = "target-refs",
        /// The extension provider isn't in the MeshConfig.
        NoProvider = "no-provider",
        /// AUDIT never decides.
        Audit = "audit",
        /// A selector that selects no pod.
        SelectsNothing = "selects-nothing",
        /// The Service's port where the pod's is meant.
        ServicePort = "service-port",
        /// A rule that no connection matches.
        NeverMatches = "never-matches",
        /// What the rule allows is denied by another policy.
        Shadowed = "shadowed",
        /// The namespace isn't there.
        UnknownNamespace = "unknown-namespace",
        /// The service account isn't there.
        UnknownServiceAccount = "unknown-service-account",
        /// The mesh has no such trust domain.
        UnknownTrustDomain = "unknown-trust-domain",
        /// HTTP fields on a port that is declared TCP.
        HttpOnTcp = "http-on-tcp",
        /// A word for what a verdict of L7 is for that isn't one.
        UnknownL7Verdict = "unknown-l7-verdict",
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// One thing that is amiss.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    /// Where.
    pub at: Location,
    /// What kind.
    pub code: Code,
    /// `namespace/name` of the policy; empty where the place says it all.
    pub object: String,
    /// What is amiss and what to do.
    pub text: String,
}

impl From<ManifestError> for Finding {
    fn from(error: ManifestError) -> Self {
        Self {
            at: error.at,
            code: error.code,
            object: String::new(),
            text: error.text,
        }
    }
}
