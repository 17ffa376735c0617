//! The flags and the keys of the config file: one struct, so that they can't differ.
//!
//! Invariant: every value is optional here; defaults live in `config`.

use std::num::NonZeroU32;
use std::path::PathBuf;

use clap::Args;
use serde::Deserialize;

use super::choice::{
    AttachChoice, BootstrapChoice, DenyChoice, FlowLogChoice, HoldChoice, HookChoice, HostTrafficChoice,
    LogFormat, ModeChoice, NonTcpChoice, PolicySource, RedactChoice, WorkloadSource,
};

/// Flags and file keys; see `Config` for what they mean together.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Settings {
    /// TOML file with the same keys as these flags; a flag wins over it
    #[arg(long, value_name = "FILE")]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Name of this node [default: the host name]
    #[arg(long)]
    pub node: Option<String>,
    /// Unix socket of the admin API [default: /run/thyra/agent.sock]
    #[arg(long)]
    pub socket: Option<PathBuf>,
    /// Folder on a bpffs for programs and maps [default: /sys/fs/bpf/thyra]
    #[arg(long)]
    pub bpffs: Option<PathBuf>,
    /// State folder [default: /var/lib/thyra]
    #[arg(long)]
    pub state: Option<PathBuf>,
    /// Address of /metrics and /healthz, or `off` [default: 127.0.0.1:9964]
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<String>,
    /// Where workloads come from [default: istiod]
    #[arg(long, value_enum)]
    pub workload_source: Option<WorkloadSource>,
    /// Where policies come from [default: auto]
    #[arg(long, value_enum)]
    pub policy_source: Option<PolicySource>,
    /// istiod: https://host:port, or http:// for tests
    #[arg(long, value_name = "URL")]
    pub xds_address: Option<String>,
    /// Name that istiod's certificate must carry [default: the host of --xds-address]
    #[arg(long, value_name = "NAME")]
    pub xds_server_name: Option<String>,
    /// Root certificates of istiod, PEM
    #[arg(long, value_name = "FILE")]
    pub xds_root: Option<PathBuf>,
    /// Service-account token for istiod
    #[arg(long, value_name = "FILE")]
    pub xds_token: Option<PathBuf>,
    /// Cluster id told to istiod [default: Kubernetes]
    #[arg(long)]
    pub cluster_id: Option<String>,
    /// API server access for the watches of pods, namespaces and nodes [default: in-cluster, if there]
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// Folder of the source `files`, re-read on change
    #[arg(long, value_name = "DIR")]
    pub manifests: Option<PathBuf>,
    /// Network of this cluster; workloads of others lend no identity
    #[arg(long)]
    pub network: Option<String>,
    /// Mesh root namespace [default: as MeshConfig says]
    #[arg(long)]
    pub root_namespace: Option<String>,
    /// Mesh trust domain [default: as MeshConfig says]
    #[arg(long)]
    pub trust_domain: Option<String>,
    /// Mode of pods that no label enrols [default: off]
    #[arg(long, value_enum)]
    pub default_mode: Option<ModeChoice>,
    /// A pod's own label may loosen its namespace's mode
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub pod_mode_override: Option<bool>,
    /// Namespaces whose WorkloadEntries may lend an identity
    #[arg(long, value_name = "NAMESPACES", value_delimiter = ',')]
    pub trust_workload_entries: Vec<String>,
    /// Pod range of the cluster (may repeat)
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub pod_cidr: Vec<String>,
    /// Address of a node (may repeat)
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    pub node_address: Vec<String>,
    /// How a refused connection is answered [default: reset]
    #[arg(long, value_enum)]
    pub deny: Option<DenyChoice>,
    /// How programs are put at the pods' interfaces [default: auto]
    #[arg(long, value_enum)]
    pub attach: Option<AttachChoice>,
    /// At which end of its veth what comes to a pod is judged [default: host]
    #[arg(long, value_enum)]
    pub hook: Option<HookChoice>,
    /// Connections that the node itself makes [default: allow]
    #[arg(long, value_enum)]
    pub host_traffic: Option<HostTrafficChoice>,
    /// Enrolled pods before the first full sync [default: deny]
    #[arg(long, value_enum)]
    pub bootstrap: Option<BootstrapChoice>,
    /// Seconds for which a new pod opens no connection after its address was another pod's [default: 2]
    #[arg(long, value_name = "SECONDS")]
    pub identity_grace: Option<u64>,
    /// Whether UDP, SCTP, ICMP and the rest are judged too [default: pass]
    #[arg(long, value_enum)]
    pub non_tcp: Option<NonTcpChoice>,
    /// Envoy for verdicts that need L7: a path, `auto` (the one in $PATH, if there) or `off` [default: auto]
    #[arg(long, value_name = "PATH")]
    pub envoy: Option<String>,
    /// Where an Envoy that somebody else runs asks for its configuration, in a folder that both share; see
    /// `thyra-agent envoy`
    #[arg(long, value_name = "PATH", conflicts_with = "envoy")]
    pub envoy_socket: Option<PathBuf>,
    /// User and group id that Envoy runs as [default: 65532]
    #[arg(long, value_name = "UID")]
    pub envoy_user: Option<u32>,
    /// Which connections are judged once, by their first bytes, and go on without Envoy [default: off]
    #[arg(long, value_enum)]
    pub l7_hold: Option<HoldChoice>,
    /// What the flow log keeps: nothing, what is refused, or all TCP connections [default: denied]
    #[arg(long, value_enum)]
    pub flow_log: Option<FlowLogChoice>,
    /// Log one of so many connections, a power of two up to 32768 [default: 1]
    #[arg(long, value_name = "N")]
    pub flow_log_sample: Option<u32>,
    /// MiB that Envoy may allocate; near it what holds much is reset [default: 1024]
    #[arg(long, value_name = "MIB")]
    pub envoy_memory: Option<NonZeroU32>,
    /// Connections of one pod that Envoy has at a time; more are reset [default: 4096]
    #[arg(long, value_name = "N")]
    pub l7_connections: Option<NonZeroU32>,
    /// Requests of one pod under way in Envoy at a time; as many more wait, beyond these 503 [default: 4096]
    #[arg(long, value_name = "N")]
    pub l7_requests: Option<NonZeroU32>,
    /// Requests in a second that Envoy passes to one pod and set of rules; more get 429 [default: any number]
    #[arg(long, value_name = "N")]
    pub l7_request_rate: Option<NonZeroU32>,
    /// What records of requests and streams leave out, a list: query, path, server-name, or none [default: query]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "WHAT")]
    pub redact: Option<Vec<RedactChoice>>,
    /// Put connections between pods of this node straight from one into the other, past the node's netfilter rules
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub local_redirect: Option<bool>,
    /// Log format [default: text]
    #[arg(long, value_enum)]
    pub log_format: Option<LogFormat>,
    /// Log filter, as in `info,thyra_agent=debug` [default: info]
    #[arg(long, value_name = "FILTER")]
    pub log: Option<String>,
    /// The agent's own namespace [default: istio-system]
    #[arg(long)]
    pub namespace: Option<String>,
    /// The agent's own pod name [default: thyra-NODE]
    #[arg(long)]
    pub pod_name: Option<String>,
}

impl Settings {
    /// Each value of `self`, else of `file`.
    #[must_use]
    pub fn or(self, file: Self) -> Self {
        let list = |flag: Vec<String>, file: Vec<String>| if flag.is_empty() { file } else { flag };
        Self {
            config: self.config.or(file.config),
            node: self.node.or(file.node),
            socket: self.socket.or(file.socket),
            bpffs: self.bpffs.or(file.bpffs),
            state: self.state.or(file.state),
            metrics: self.metrics.or(file.metrics),
            workload_source: self.workload_source.or(file.workload_source),
            policy_source: self.policy_source.or(file.policy_source),
            xds_address: self.xds_address.or(file.xds_address),
            xds_server_name: self.xds_server_name.or(file.xds_server_name),
            xds_root: self.xds_root.or(file.xds_root),
            xds_token: self.xds_token.or(file.xds_token),
            cluster_id: self.cluster_id.or(file.cluster_id),
            kubeconfig: self.kubeconfig.or(file.kubeconfig),
            manifests: self.manifests.or(file.manifests),
            network: self.network.or(file.network),
            root_namespace: self.root_namespace.or(file.root_namespace),
            trust_domain: self.trust_domain.or(file.trust_domain),
            default_mode: self.default_mode.or(file.default_mode),
            pod_mode_override: self.pod_mode_override.or(file.pod_mode_override),
            trust_workload_entries: list(self.trust_workload_entries, file.trust_workload_entries),
            pod_cidr: list(self.pod_cidr, file.pod_cidr),
            node_address: list(self.node_address, file.node_address),
            deny: self.deny.or(file.deny),
            attach: self.attach.or(file.attach),
            hook: self.hook.or(file.hook),
            host_traffic: self.host_traffic.or(file.host_traffic),
            bootstrap: self.bootstrap.or(file.bootstrap),
            identity_grace: self.identity_grace.or(file.identity_grace),
            non_tcp: self.non_tcp.or(file.non_tcp),
            envoy: self.envoy.or(file.envoy),
            envoy_socket: self.envoy_socket.or(file.envoy_socket),
            envoy_user: self.envoy_user.or(file.envoy_user),
            l7_hold: self.l7_hold.or(file.l7_hold),
            flow_log: self.flow_log.or(file.flow_log),
            flow_log_sample: self.flow_log_sample.or(file.flow_log_sample),
            envoy_memory: self.envoy_memory.or(file.envoy_memory),
            l7_connections: self.l7_connections.or(file.l7_connections),
            l7_requests: self.l7_requests.or(file.l7_requests),
            l7_request_rate: self.l7_request_rate.or(file.l7_request_rate),
            redact: self.redact.or(file.redact),
            local_redirect: self.local_redirect.or(file.local_redirect),
            log_format: self.log_format.or(file.log_format),
            log: self.log.or(file.log),
            namespace: self.namespace.or(file.namespace),
            pod_name: self.pod_name.or(file.pod_name),
        }
    }
}
