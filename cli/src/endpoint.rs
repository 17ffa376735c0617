//! `thyra endpoint`: the pods of this node, and what policy says of each, wanted and in the kernel.

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use thyra_proto::thyra::v1;

use crate::client::{Agent, refused};
use crate::output::{Format, RED, Show, coloured, dash, show, table};
use crate::verdict::Verdict;

/// The kernel's tables differ from what the agent wants.
const DRIFT: u8 = 3;

/// `thyra endpoint …`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// All endpoints of the node
    List,
    /// One endpoint
    Get {
        /// Endpoint id or namespace/pod
        endpoint: String,
    },
    /// Policy of an endpoint
    #[command(subcommand)]
    Policy(PolicyCommand),
}

/// `thyra endpoint policy …`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum PolicyCommand {
    /// What applies to it, wanted and kernel side by side; exit code 3 when they differ
    #[command(after_help = "Example: thyra endpoint policy get shop/cart -o json")]
    Get {
        /// Endpoint id or namespace/pod
        endpoint: String,
    },
}

/// An endpoint.
#[derive(Debug, Serialize)]
pub(crate) struct Endpoint {
    id: u32,
    namespace: String,
    name: String,
    pod_uid: String,
    mode: String,
    mode_reason: String,
    identity: u32,
    principal: String,
    addresses: Vec<String>,
    status: String,
    generation: u64,
    interface: String,
    ifindex: u32,
    policies: Vec<String>,
    labels: std::collections::BTreeMap<String, String>,
    local_redirect: String,
    hook: String,
    counters: Counters,
}

#[derive(Debug, Serialize)]
struct Counters {
    to_pod_packets: u64,
    from_pod_packets: u64,
    to_pod_dropped: u64,
    from_pod_dropped: u64,
}

impl From<v1::EndpointDetail> for Endpoint {
    fn from(detail: v1::EndpointDetail) -> Self {
        let endpoint = detail.endpoint.unwrap_or_default();
        let counters = detail.counters.unwrap_or_default();
        Self {
            id: detail.id,
            namespace: endpoint.namespace,
            name: endpoint.name,
            pod_uid: endpoint.pod_uid,
            mode: detail.mode,
            mode_reason: detail.mode_reason,
            identity: detail.identity,
            principal: detail.principal,
            addresses: endpoint.addresses,
            status: detail.status,
            generation: detail.generation,
            interface: endpoint.host_interface,
            ifindex: detail.ifindex,
            policies: detail.policies,
            labels: endpoint.labels.into_iter().collect(),
            local_redirect: detail.local_redirect,
            hook: detail.hook,
            counters: Counters {
                to_pod_packets: counters.to_pod_packets,
                from_pod_packets: counters.from_pod_packets,
                to_pod_dropped: counters.to_pod_dropped,
                from_pod_dropped: counters.from_pod_dropped,
            },
        }
    }
}

#[derive(Debug, Serialize)]
struct Endpoints(Vec<Endpoint>);

const COLUMNS: [&str; 9] = [
    "ENDPOINT",
    "POLICY (ingress) ENFORCEMENT",
    "IDENTITY",
    "PRINCIPAL",
    "POD",
    "IPv4",
    "IPv6",
    "STATUS",
    "GENERATION",
];

impl Endpoint {
    fn row(&self) -> Vec<String> {
        let family = |v6: bool| {
            self.addresses
                .iter()
                .find(|a| a.contains(':') == v6)
                .cloned()
                .unwrap_or_default()
        };
        vec![
            self.id.to_string(),
            self.mode.clone(),
            self.identity.to_string(),
            dash(&self.principal),
            format!("{}/{}", self.namespace, self.name),
            dash(&family(false)),
            dash(&family(true)),
            self.status.clone(),
            self.generation.to_string(),
        ]
    }
}

impl Show for Endpoints {
    fn text(&self) -> String {
        table(&COLUMNS, &self.0.iter().map(Endpoint::row).collect::<Vec<_>>())
    }
}

impl Show for Endpoint {
    fn text(&self) -> String {
        let policies = if self.policies.is_empty() {
            "none".to_owned()
        } else {
            self.policies.join(", ")
        };
        let c = &self.counters;
        format!(
            "{}\nmode: {} ({})\npolicies: {policies}\ninterface: {} (index {})\nhook: {}\nlocal redirect: {}\n\
             to pod: {} packets, {} dropped; from pod: {} packets, {} dropped\n",
            table(&COLUMNS, &[self.row()]),
            self.mode,
            self.mode_reason,
            self.interface,
            self.ifindex,
            dash(&self.hook),
            dash(&self.local_redirect),
            c.to_pod_packets,
            c.to_pod_dropped,
            c.from_pod_packets,
            c.from_pod_dropped
        )
    }
}

/// A line of `endpoint policy get`.
#[derive(Debug, Serialize)]
struct Entry {
    /// 4 or 6; 0 where both agree.
    family: u32,
    identity: u32,
    principal: String,
    blocks: Vec<String>,
    ports: String,
    /// Where Envoy listens in the pod; 0 where these connections don't go there.
    proxy_port: u32,
    wanted: Option<Verdict>,
    kernel: Option<Verdict>,
    drift: bool,
    packets: u64,
    bytes: u64,
}

impl Entry {
    fn row(&self) -> Vec<String> {
        let verdict = self.wanted.as_ref();
        let source = match (self.identity, self.family) {
            (0, 0) => dash(&self.blocks.join(",")),
            (0, family) => format!("{} (IPv{family})", dash(&self.blocks.join(","))),
            (identity, _) if self.blocks.is_empty() => identity.to_string(),
            (identity, _) => format!("{identity} in {}", self.blocks.join(",")),
        };
        let kernel = match &self.kernel {
            _ if !self.drift => String::new(),
            None => coloured("DRIFT: not in the kernel", RED),
            Some(kernel) => coloured(&format!("DRIFT: {} {}", kernel.word(), kernel.rule_text()), RED),
        };
        vec![
            verdict.map_or("Missing", Verdict::word).to_owned(),
            "Ingress".to_owned(),
            source,
            dash(&self.principal),
            if self.ports == "ANY" {
                self.ports.clone()
            } else {
                format!("{}/TCP", self.ports)
            },
            match self.proxy_port {
                0 => "NONE".to_owned(),
                port => port.to_string(),
            },
            verdict.map_or_else(String::new, Verdict::rule_text),
            verdict.map_or_else(String::new, |v| v.enforced_by.clone()),
            self.bytes.to_string(),
            self.packets.to_string(),
            kernel,
        ]
    }
}

impl From<v1::Residual> for Residual {
    fn from(residual: v1::Residual) -> Self {
        let v1::Residual {
            address,
            http,
            other,
            way,
        } = residual;
        Self {
            address,
            http,
            other,
            way,
        }
    }
}

#[derive(Debug, Serialize)]
struct Policy {
    endpoint: Endpoint,
    drift: bool,
    notes: Vec<String>,
    entries: Vec<Entry>,
    residuals: Vec<Residual>,
}

/// What is left to ask of L7, in words.
#[derive(Debug, Serialize)]
struct Residual {
    /// As `wanted.residual` names it.
    address: String,
    http: Vec<String>,
    other: Vec<String>,
    /// Who is given its connections, and why.
    way: String,
}

impl Residual {
    fn text(&self) -> String {
        let mut text = format!("\nleft to L7 ({}):\n", self.address);
        if !self.way.is_empty() {
            text += &format!("  {}\n", self.way);
        }
        for (what, lines) in [("an HTTP request", &self.http), ("any other stream", &self.other)] {
            text += &format!("  {what}:\n");
            for line in lines {
                text += &format!("    {line}\n");
            }
        }
        text
    }
}

impl Show for Policy {
    fn text(&self) -> String {
        let header = [
            "POLICY",
            "DIRECTION",
            "IDENTITY / CIDR",
            "PRINCIPAL",
            "PORT/PROTO",
            "PROXY PORT",
            "RULE",
            "ENFORCED-BY",
            "BYTES",
            "PACKETS",
            "",
        ];
        let mut text = table(&header, &self.entries.iter().map(Entry::row).collect::<Vec<_>>());
        if self.endpoint.mode != "enforce" {
            text += &format!("\nmode {}: {}\n", self.endpoint.mode, self.endpoint.mode_reason);
        }
        for note in &self.notes {
            text += &format!("\nnote: {note}\n");
        }
        for entry in self
            .entries
            .iter()
            .filter_map(|e| e.wanted.as_ref())
            .filter(|v| !v.because.is_empty())
        {
            text += &format!("\nneeds L7: {}\n", entry.because.join(", "));
        }
        text.extend(self.residuals.iter().map(Residual::text));
        text
    }
}

/// Runs the command.
pub(crate) async fn run(command: Command, agent: Agent, format: Format) -> Result<ExitCode> {
    let mut client = agent.connect().await?;
    match command {
        Command::List => {
            let reply = client
                .endpoints
                .list(v1::ListRequest {})
                .await
                .map_err(refused)?
                .into_inner();
            show(
                &Endpoints(reply.endpoints.into_iter().map(Endpoint::from).collect()),
                format,
            )?;
        }
        Command::Get { endpoint } => {
            let reply = client
                .admin
                .get_endpoint(v1::GetEndpointRequest { endpoint })
                .await
                .map_err(refused)?;
            show(&Endpoint::from(reply.into_inner()), format)?;
        }
        Command::Policy(PolicyCommand::Get { endpoint }) => {
            let request = v1::GetEndpointPolicyRequest { endpoint };
            let reply = client
                .admin
                .get_endpoint_policy(request)
                .await
                .map_err(refused)?
                .into_inner();
            let policy = policy(reply);
            show(&policy, format)?;
            if policy.drift {
                return Ok(ExitCode::from(DRIFT));
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn policy(reply: v1::GetEndpointPolicyResponse) -> Policy {
    let entries = reply.entries.into_iter().map(|entry| Entry {
        family: entry.family,
        identity: entry.identity,
        principal: entry.principal,
        blocks: entry.blocks,
        ports: entry.ports,
        proxy_port: entry.proxy_port,
        wanted: entry.wanted.as_ref().map(Verdict::from),
        kernel: entry.kernel.as_ref().map(Verdict::from),
        drift: entry.drift,
        packets: entry.packets,
        bytes: entry.bytes,
    });
    Policy {
        endpoint: reply.endpoint.unwrap_or_default().into(),
        drift: reply.drift,
        notes: reply.notes,
        entries: entries.collect(),
        residuals: reply.residuals.into_iter().map(Residual::from).collect(),
    }
}
