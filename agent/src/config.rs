//! What an operator tells the agent: flags over a TOML file over defaults, checked before anything starts.
//!
//! Invariant: a `Config` exists only when every value in it was read and makes sense; nothing is guessed
//! later.

pub mod choice;
mod settings;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use thyra_datapath_abi::limits::L7_BUDGET;
use thyra_datapath_abi::{Control, Mode};
use thyra_node_proxy_bridge::listener::Redact;
use thyra_policy_compiler::world::{Bootstrap, NodeOptions};
use thyra_xds_client::{Server, ServerError};

pub use choice::{
    AttachChoice, BootstrapChoice, DenyChoice, FlowLogChoice, HoldChoice, HookChoice, HostTrafficChoice,
    LogFormat, ModeChoice, NonTcpChoice, PolicySource, RedactChoice, WorkloadSource,
};
pub use settings::Settings;

use crate::api_server::ApiServer;
use crate::l7::{Budget, EnvoyChoice};

/// Where the agent listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/thyra/agent.sock";
/// Where the programs and maps are pinned unless told otherwise.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf/thyra";
/// Where endpoints, identities and verdict names are kept unless told otherwise.
pub const DEFAULT_STATE: &str = "/var/lib/thyra";
/// Where `/metrics` and `/healthz` are served unless told otherwise.
pub const DEFAULT_METRICS: &str = "127.0.0.1:9964";
/// Istio's default cluster id.
const DEFAULT_CLUSTER: &str = "Kubernetes";
/// Seconds.
const DEFAULT_GRACE: u64 = 2;
/// The user and group that Envoy runs as: nobody's, on any distribution; `nonroot` in images that have no users.
pub const DEFAULT_ENVOY_USER: u32 = 65_532;
/// Istio's default root namespace.
const DEFAULT_NAMESPACE: &str = "istio-system";

/// Why a configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("can't read config file `{file}`")]
    Read {
        /// As given.
        file: String,
        /// Cause.
        source: std::io::Error,
    },
    /// The file isn't what it should be; the TOML error carries line and column.
    #[error("config file `{file}`: {message}")]
    Parse {
        /// As given.
        file: String,
        /// What and where.
        message: String,
    },
    /// A value that can't be used.
    #[error("`{key}`: `{value}` {why}")]
    Value {
        /// Flag or key.
        key: &'static str,
        /// As given.
        value: String,
        /// What is wrong and what to write.
        why: String,
    },
    /// istiod can't be asked that way.
    #[error("`--xds-address`: {0}")]
    Server(#[from] ServerError),
    /// Something needed is missing.
    #[error("`--{key}` is missing: {why}")]
    Missing {
        /// Flag or key.
        key: &'static str,
        /// What needs it.
        why: &'static str,
    },
}

/// Everything.
#[derive(Clone, Debug)]
pub struct Config {
    /// Node options that verdicts read.
    pub node: NodeOptions,
    /// Root namespace given by flag; wins over MeshConfig.
    pub root_namespace: Option<String>,
    /// Trust domain given by flag; wins over MeshConfig.
    pub trust_domain: Option<String>,
    /// Unix socket.
    pub socket: PathBuf,
    /// Directory on bpffs.
    pub bpffs: PathBuf,
    /// State folder.
    pub state: PathBuf,
    /// HTTP address; none: off.
    pub metrics: Option<SocketAddr>,
    /// Where workloads come from.
    pub workload_source: WorkloadSource,
    /// Where policies come from.
    pub policy_source: PolicySource,
    /// Set when a source needs it.
    pub istiod: Option<Server>,
    /// `clusterid` on every stream.
    pub cluster_id: String,
    /// For the pod watch and the Kubernetes source.
    pub kubeconfig: Option<PathBuf>,
    /// For the files source.
    pub manifests: Option<PathBuf>,
    /// The agent's own namespace, part of its node id.
    pub namespace: String,
    /// The agent's own pod name, part of its node id.
    pub pod_name: String,
    /// How a deny is carried out.
    pub deny: DenyChoice,
    /// How programs are put at the pods' interfaces.
    pub attach: AttachChoice,
    /// At which end of its veth what comes to a pod is judged.
    pub hook: HookChoice,
    /// Whether the node's own connections are judged.
    pub host_traffic: HostTrafficChoice,
    /// Whether other protocols than TCP are judged.
    pub non_tcp: NonTcpChoice,
    /// How long a new pod is held back after its address was another's.
    pub identity_grace: Duration,
    /// Which Envoy judges what needs L7.
    pub envoy: EnvoyChoice,
    /// User and group of Envoy.
    pub envoy_user: u32,
    /// Which connections are judged once, by their first bytes.
    pub l7_hold: HoldChoice,
    /// What the flow log keeps.
    pub flow_log: FlowLogChoice,
    /// One of two to this number of connections is logged.
    pub flow_log_sampling: u8,
    /// What it may be made to do.
    pub budget: Budget,
    /// What its records of requests and streams leave out.
    pub redact: Redact,
    /// Connections of one pod that it has at a time.
    pub l7_connections: u64,
    /// Whether connections between pods of this node go straight from one into the other.
    pub local_redirect: bool,
    /// Log format.
    pub log_format: LogFormat,
    /// Log filter.
    pub log: String,
}

impl Config {
    /// The API server to ask, where there is one.
    #[must_use]
    pub fn api_server(&self) -> Option<ApiServer> {
        ApiServer::find(self.kubeconfig.as_ref())
    }
}

impl Settings {
    /// Flags over the file that `--config` names.
    ///
    /// # Errors
    /// The file can't be read or holds an unknown key or a bad value.
    pub fn with_file(self) -> Result<Self, ConfigError> {
        let Some(path) = self.config.clone() else {
            return Ok(self);
        };
        Ok(self.or(read_file(&path)?))
    }

    /// The whole configuration.
    ///
    /// # Errors
    /// Names the flag that is wrong or missing.
    pub fn resolve(self) -> Result<Config, ConfigError> {
        let workload_source = self.workload_source.unwrap_or_default();
        let policy_source = self.policy_source.unwrap_or_default();
        if policy_source == PolicySource::Authorization && workload_source == WorkloadSource::Files {
            let why = "comes on istiod's workload stream; give `--workload-source=istiod`";
            return Err(value("policy-source", "authorization", why));
        }
        if policy_source == PolicySource::Kubernetes && ApiServer::find(self.kubeconfig.as_ref()).is_none() {
            let why = "the source `kubernetes` needs an API server, and this process is not in a cluster";
            return Err(ConfigError::Missing {
                key: "kubeconfig",
                why,
            });
        }
        let istiod = self.istiod(workload_source, policy_source)?;
        let files = workload_source == WorkloadSource::Files || policy_source == PolicySource::Files;
        if files && self.manifests.is_none() {
            return Err(ConfigError::Missing {
                key: "manifests",
                why: "the source `files` reads it",
            });
        }
        let name = self.node.clone().unwrap_or_else(host_name);
        let (budget, hook, redact) = (self.budget(), self.hook()?, self.redact()?);
        let envoy = self.envoy()?;
        Ok(Config {
            node: self.node_options(name.clone())?,
            metrics: metrics_address(self.metrics.as_deref().unwrap_or(DEFAULT_METRICS))?,
            socket: self.socket.unwrap_or_else(|| DEFAULT_SOCKET.into()),
            bpffs: self.bpffs.unwrap_or_else(|| DEFAULT_BPFFS.into()),
            state: self.state.unwrap_or_else(|| DEFAULT_STATE.into()),
            root_namespace: self.root_namespace,
            trust_domain: self.trust_domain,
            workload_source,
            policy_source,
            istiod,
            cluster_id: self.cluster_id.unwrap_or_else(|| DEFAULT_CLUSTER.into()),
            kubeconfig: self.kubeconfig,
            manifests: self.manifests,
            namespace: self.namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.into()),
            pod_name: self.pod_name.unwrap_or_else(|| format!("thyra-{name}")),
            deny: self.deny.unwrap_or_default(),
            attach: self.attach.unwrap_or_default(),
            hook,
            host_traffic: self.host_traffic.unwrap_or_default(),
            non_tcp: self.non_tcp.unwrap_or_default(),
            identity_grace: Duration::from_secs(self.identity_grace.unwrap_or(DEFAULT_GRACE)),
            envoy,
            envoy_user: self.envoy_user.unwrap_or(DEFAULT_ENVOY_USER),
            l7_hold: self.l7_hold.unwrap_or_default(),
            flow_log: self.flow_log.unwrap_or_default(),
            flow_log_sampling: sampling(self.flow_log_sample.unwrap_or(1))?,
            budget,
            redact,
            l7_connections: self.l7_connections.map_or(L7_BUDGET, |count| count.get().into()),
            local_redirect: self.local_redirect.unwrap_or(false),
            log_format: self.log_format.unwrap_or_default(),
            log: self.log.unwrap_or_else(|| "info".into()),
        })
    }

    /// # Errors
    /// Another flag can't be obeyed at the pod's own end.
    fn hook(&self) -> Result<HookChoice, ConfigError> {
        let hook = self.hook.unwrap_or_default();
        let why = match (hook, self.attach.unwrap_or_default()) {
            (HookChoice::Host, _) => return Ok(hook),
            (HookChoice::Pod, AttachChoice::Clsact) => "needs tcx links; leave `--attach` out",
            (HookChoice::Pod, AttachChoice::TcxLast) => {
                "needs the first place at the host end; leave `--attach` out"
            }
            (HookChoice::Pod, AttachChoice::Auto | AttachChoice::Tcx)
                if self.local_redirect == Some(true) =>
            {
                "can't be used with `--local-redirect`, which judges at the host ends; choose one"
            }
            (HookChoice::Pod, AttachChoice::Auto | AttachChoice::Tcx) => return Ok(hook),
        };
        Err(value("hook", "pod", why))
    }

    /// # Errors
    /// Nothing and something are to be left out.
    fn redact(&self) -> Result<Redact, ConfigError> {
        let Some(chosen) = &self.redact else {
            return Ok(Redact::default());
        };
        let has = |choice| chosen.contains(&choice);
        if chosen.is_empty() || has(RedactChoice::None) && chosen.len() > 1 {
            return Err(value(
                "redact",
                "none",
                "stands alone; name `query`, `path` or `server-name`, or `none` of them",
            ));
        }
        Ok(Redact {
            query: has(RedactChoice::Query) || has(RedactChoice::Path),
            path: has(RedactChoice::Path),
            server_name: has(RedactChoice::ServerName),
        })
    }

    /// # Errors
    /// Two are named, or a place that isn't the same for both.
    fn envoy(&self) -> Result<EnvoyChoice, ConfigError> {
        let Some(socket) = &self.envoy_socket else {
            return Ok(envoy_choice(self.envoy.as_deref()));
        };
        let why = match &self.envoy {
            Some(_) => "can't be used with `envoy`, which names one that the agent starts; choose one",
            None if !socket.is_absolute() || socket.file_name().is_none() => {
                "is no absolute path of a socket; Envoy has to find it there too"
            }
            None => return Ok(EnvoyChoice::Given(socket.clone())),
        };
        Err(value("envoy-socket", &socket.display().to_string(), why))
    }

    fn budget(&self) -> Budget {
        let usual = Budget::default();
        Budget {
            heap: self
                .envoy_memory
                .map_or(usual.heap, |mib| u64::from(mib.get()) << 20),
            requests_at_once: self.l7_requests.unwrap_or(usual.requests_at_once),
            requests_per_second: self.l7_request_rate,
        }
    }

    fn istiod(
        &self,
        workloads: WorkloadSource,
        policies: PolicySource,
    ) -> Result<Option<Server>, ConfigError> {
        let policies = matches!(
            policies,
            PolicySource::Auto | PolicySource::Istiod | PolicySource::Authorization
        );
        if workloads == WorkloadSource::Files && !policies {
            return Ok(None);
        }
        let Some(address) = self.xds_address.clone() else {
            let why =
                "istiod is a source (give `--workload-source=files --policy-source=files` to run without)";
            return Err(ConfigError::Missing {
                key: "xds-address",
                why,
            });
        };
        let (name, root, token) = (
            self.xds_server_name.clone(),
            self.xds_root.clone(),
            self.xds_token.clone(),
        );
        Ok(Some(Server::new(&address, name, root, token)?))
    }

    fn node_options(&self, name: String) -> Result<NodeOptions, ConfigError> {
        Ok(NodeOptions {
            name,
            network: self.network.clone().unwrap_or_default(),
            default_mode: self.default_mode.map_or(Mode::Off, Mode::from),
            pod_mode_override: self.pod_mode_override.unwrap_or(false),
            trust_workload_entries: self.trust_workload_entries.iter().cloned().collect(),
            pod_ranges: self
                .pod_cidr
                .iter()
                .map(|c| pod_range(c))
                .collect::<Result<_, _>>()?,
            node_addresses: self
                .node_address
                .iter()
                .map(|a| node_address(a))
                .collect::<Result<BTreeSet<_>, _>>()?,
            // Known once the sources are.
            namespaces_are_told: false,
            bootstrap: self.bootstrap.map_or(Bootstrap::Deny, Bootstrap::from),
        })
    }
}

fn read_file(path: &Path) -> Result<Settings, ConfigError> {
    let file = path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        file: file.clone(),
        source,
    })?;
    toml::from_str(&text).map_err(|e| ConfigError::Parse {
        file,
        message: e.to_string(),
    })
}

fn value(key: &'static str, value: &str, why: &str) -> ConfigError {
    ConfigError::Value {
        key,
        value: value.into(),
        why: why.into(),
    }
}

fn pod_range(text: &str) -> Result<IpNet, ConfigError> {
    text.parse::<IpNet>()
        .map(|net| net.trunc())
        .map_err(|_| value("pod-cidr", text, "is not a CIDR like `10.244.0.0/16`"))
}

fn node_address(text: &str) -> Result<IpAddr, ConfigError> {
    let parsed = text
        .parse::<IpAddr>()
        .map_err(|_| value("node-address", text, "is not an IP address"))?;
    Ok(parsed.to_canonical())
}

fn metrics_address(text: &str) -> Result<Option<SocketAddr>, ConfigError> {
    if text == "off" {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| {
        value(
            "metrics",
            text,
            "is neither `off` nor an address like `127.0.0.1:9964`",
        )
    })
}

fn sampling(one_of: u32) -> Result<u8, ConfigError> {
    let exponent = u8::try_from(one_of.trailing_zeros()).unwrap_or(u8::MAX);
    if one_of.is_power_of_two() && exponent <= Control::MAX_SAMPLING {
        return Ok(exponent);
    }
    let why = "is not a power of two up to 32768";
    Err(value("flow-log-sample", &one_of.to_string(), why))
}

fn envoy_choice(text: Option<&str>) -> EnvoyChoice {
    match text {
        None | Some("auto") => EnvoyChoice::Auto,
        Some("off") => EnvoyChoice::Off,
        Some(path) => EnvoyChoice::At(path.into()),
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests;
