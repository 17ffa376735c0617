//! Settings with a fixed set of values; the same words in flags and in the file.
//!
//! Invariant: a word that is not listed here is refused where it is read.

use clap::ValueEnum;
use serde::Deserialize;
use thyra_datapath_abi::Mode;
use thyra_policy_compiler::world::Bootstrap;

/// `--default-mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ModeChoice {
    /// Not enforced.
    Off,
    /// Counted and reported only.
    Audit,
    /// Enforced.
    Enforce,
}

impl From<ModeChoice> for Mode {
    fn from(choice: ModeChoice) -> Self {
        match choice {
            ModeChoice::Off => Self::Off,
            ModeChoice::Audit => Self::Audit,
            ModeChoice::Enforce => Self::Enforce,
        }
    }
}

/// `--workload-source`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkloadSource {
    /// istiod's workload stream.
    #[default]
    Istiod,
    /// Manifests in a folder.
    Files,
}

/// `--policy-source`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PolicySource {
    /// istiod's config stream; when it refuses, the Kubernetes API.
    #[default]
    Auto,
    /// istiod's config stream only.
    Istiod,
    /// The Kubernetes API only.
    Kubernetes,
    /// istiod's L4 `Authorization`: lossy.
    Authorization,
    /// Manifests in a folder.
    Files,
}

impl PolicySource {
    /// The word that selects it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Istiod => "istiod",
            Self::Kubernetes => "kubernetes",
            Self::Authorization => "authorization",
            Self::Files => "files",
        }
    }
}

/// `--l7-hold`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HoldChoice {
    /// All that needs L7 goes through Envoy.
    #[default]
    Off,
    /// What asks for the server name of TLS alone is judged once, by its first bytes.
    Tls,
    /// And HTTP, by its first request, where all policies that have a say are annotated `thyra.io/l7-verdict:
    /// connection`.
    All,
}

/// `--redact`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RedactChoice {
    /// Nothing; it stands alone.
    None,
    /// What comes after the `?` of a path.
    Query,
    /// Whole paths.
    Path,
    /// The server names of TLS.
    ServerName,
}

/// `--deny`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DenyChoice {
    /// Answer with a reset.
    #[default]
    Reset,
    /// Drop silently.
    Drop,
}

/// `--attach`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachChoice {
    /// tcx links where the kernel has them (6.6), else clsact filters.
    #[default]
    Auto,
    /// tcx links, before all other programs.
    Tcx,
    /// tcx links, after the programs that are there.
    TcxLast,
    /// Filters of a clsact qdisc.
    Clsact,
}

/// `--hook`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HookChoice {
    /// The host end of the pod's veth.
    #[default]
    Host,
    /// The pod's own end.
    Pod,
}

/// `--host-traffic`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostTrafficChoice {
    /// Connections that the node itself makes pass.
    #[default]
    Allow,
    /// They are judged like any other.
    Enforce,
}

/// `--bootstrap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BootstrapChoice {
    /// Enrolled pods deny until the first full sync.
    Deny,
    /// They allow until then.
    Allow,
}

impl From<BootstrapChoice> for Bootstrap {
    fn from(choice: BootstrapChoice) -> Self {
        match choice {
            BootstrapChoice::Deny => Self::Deny,
            BootstrapChoice::Allow => Self::Allow,
        }
    }
}

/// `--non-tcp`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NonTcpChoice {
    /// UDP, SCTP, ICMP and the rest pass.
    #[default]
    Pass,
    /// They are judged by the same rules, as far as those need no L7.
    Enforce,
}

/// `--flow-log`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowLogChoice {
    /// Nothing is kept or written.
    Off,
    /// What is refused, second by second.
    #[default]
    Denied,
    /// Allowed TCP connections too.
    All,
}

impl FlowLogChoice {
    /// The word that selects it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Denied => "denied",
            Self::All => "all",
        }
    }
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}
