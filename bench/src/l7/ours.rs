//! Our side: a real agent with the stock Envoy that it starts, on a node whose pods have policies that read HTTP.
//!
//! Invariant: pods are made endpoints by registration and Envoy by the agent alone, as on any node.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Pid;
use thyra_datapath::abi::limits::{L7_FIRST_PORT, L7_PORTS};
use thyra_proto::istio::security::v1beta1 as security;
use thyra_proto::thyra::v1::endpoint_service_client::EndpointServiceClient;
use tonic::transport::Channel;

use crate::agent::{self, Agent};
use crate::bpffs::Bpffs;
use crate::control_plane::{self, ADDRESS, AUTHORIZATION, CONFIG_TYPES, ControlPlane};
use crate::load;
use crate::mesh;
use crate::netns::{self, Node};

/// The port that a Service declares to be HTTP, on which each request is judged.
pub(super) const HTTP_PORT: u16 = 8080;
/// The port whose verdict is the kernel's.
pub(super) const L4_PORT: u16 = 9090;
/// The port on which a connection is judged by its server name, once.
pub(super) const NAMED_PORT: u16 = 8443;
/// The name that policy allows there.
pub(super) const SERVER_NAME: &str = "cart.example.com";
/// One that it doesn't.
pub(super) const OTHER_NAME: &str = "other.example.com";
const IDENTITIES: u32 = 1_000;
const LIMIT: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(1);
/// How proc(5) writes that a socket listens.
const LISTEN: &str = "0A";

/// The node's part of Thyra.
pub(super) struct Ours {
    // The agent goes first, then its file system.
    agent: Agent,
    endpoints: EndpointServiceClient<Channel>,
    _plane: ControlPlane,
    _bpffs: Bpffs,
}

impl Ours {
    /// Starts it in the calling thread's network namespace, for the workloads that are pods of this node.
    ///
    /// # Errors
    /// When the agent doesn't come up.
    pub(super) async fn start(agent: &Path, envoy: &Path, pods: u16) -> Result<Self> {
        let bpffs = Bpffs::mount()?;
        // Envoy has a user of its own, and its folder is in here.
        let passable = std::os::unix::fs::PermissionsExt::from_mode(0o711);
        std::fs::set_permissions(bpffs.files(), passable)?;
        let plane = ControlPlane::start().await?;
        let workloads = (0..IDENTITIES).map(|i| control_plane::workload(i, pods, &[HTTP_PORT]));
        plane.push(ADDRESS, workloads.collect());
        plane.push(AUTHORIZATION, policies());
        for type_url in CONFIG_TYPES {
            plane.push(type_url, Vec::new());
        }
        let flags = [format!("--envoy={}", envoy.display()), "--l7-hold=tls".to_owned()];
        let mut agent = Agent::start(agent, &bpffs, &plane, &flags)?;
        let endpoints = agent.endpoints().await?;
        Ok(Self {
            agent,
            endpoints,
            _plane: plane,
            _bpffs: bpffs,
        })
    }

    /// Makes a pod an endpoint; how long it takes until Envoy listens in it.
    ///
    /// # Errors
    /// When the agent refuses the pod, or Envoy doesn't listen within `LIMIT`.
    pub(super) async fn add(&mut self, node: &Node, pod: usize) -> Result<Duration> {
        let namespace = node.pod(pod);
        let begun = Instant::now();
        let watch = std::thread::spawn(move || -> Result<Instant> {
            netns::enter(&namespace)?;
            while begun.elapsed() < LIMIT {
                if envoy_listens()? {
                    return Ok(Instant::now());
                }
                std::thread::sleep(POLL);
            }
            bail!("Envoy doesn't listen in `{namespace}` after {LIMIT:?}")
        });
        agent::register(&mut self.endpoints, node, pod).await?;
        let listening = watch
            .join()
            .map_err(|_| anyhow::anyhow!("the watch of a listener panicked"))?;
        let listening = listening.with_context(|| format!("the agent said: {}", self.agent.log()))?;
        Ok(listening.duration_since(begun))
    }

    /// Keeps all threads of the agent on one CPU, and those of its Envoy.
    ///
    /// # Errors
    /// When one doesn't run.
    pub(super) fn pin(&self, agent: usize, envoy: usize) -> Result<()> {
        let own = i32::try_from(self.agent.id()).ok().and_then(Pid::from_raw);
        for (process, cpu) in [
            (own.context("a process is a number")?, agent),
            (self.envoy()?, envoy),
        ] {
            let threads = format!("/proc/{}/task", process.as_raw_nonzero());
            for thread in std::fs::read_dir(&threads).with_context(|| format!("read `{threads}`"))? {
                let name = thread?.file_name();
                let number = name.to_str().and_then(|name| name.parse().ok());
                let thread = number.and_then(Pid::from_raw).context("a thread is a number")?;
                // A thread of the agent's pool may have ended since.
                load::pin_thread(Some(thread), cpu).ok();
            }
        }
        Ok(())
    }

    fn envoy(&self) -> Result<Pid> {
        self.agent.envoy().context("the agent has started no Envoy")
    }

    /// What its Envoy has in memory, MB (proc(5), `VmRSS`).
    ///
    /// # Errors
    /// When it doesn't run.
    pub(super) fn envoy_mb(&self) -> Result<f64> {
        let path = format!("/proc/{}/status", self.envoy()?.as_raw_nonzero());
        let text = std::fs::read_to_string(&path).with_context(|| format!("read `{path}`"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        let kib: f64 = kib.with_context(|| format!("`{path}` tells no size"))?.parse()?;
        ensure!(kib > 0.0, "`{path}` tells a size of nothing");
        Ok(kib * 1024.0 / 1e6)
    }
}

/// Whether one of Envoy's ports is listened at in the calling thread's network namespace.
fn envoy_listens() -> Result<bool> {
    let text = std::fs::read_to_string("/proc/thread-self/net/tcp").context("read the sockets of a pod")?;
    let ports = text.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, state) = (fields.next()?, fields.nth(1)?);
        let port = u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok()?;
        (state == LISTEN).then_some(port)
    });
    let mut ports = ports;
    Ok(ports.any(|port| (L7_FIRST_PORT..L7_FIRST_PORT + L7_PORTS).contains(&port)))
}

/// Workload 0 may ask for what is public, and nobody for what isn't; to the port without HTTP rules it may connect, and
/// to the one with names by one of them.
fn policies() -> Vec<thyra_proto::envoy::service::discovery::v3::Resource> {
    let http = || vec![HTTP_PORT.to_string()];
    let friend = || {
        vec![security::rule::From {
            source: Some(security::Source {
                principals: vec![mesh::principal(0)],
                ..security::Source::default()
            }),
        }]
    };
    let public = security::Operation {
        ports: http(),
        methods: vec!["GET".into()],
        paths: vec!["/public*".into()],
        ..security::Operation::default()
    };
    let admin = security::Operation {
        ports: http(),
        paths: vec!["/admin*".into()],
        ..security::Operation::default()
    };
    let plain = security::Operation {
        ports: vec![L4_PORT.to_string()],
        ..security::Operation::default()
    };
    let named = security::Operation {
        ports: vec![NAMED_PORT.to_string()],
        ..security::Operation::default()
    };
    let name = security::Condition {
        key: "connection.sni".into(),
        values: vec![SERVER_NAME.into()],
        ..security::Condition::default()
    };
    let (allow, deny) = (
        security::authorization_policy::Action::Allow,
        security::authorization_policy::Action::Deny,
    );
    vec![
        control_plane::policy("public", 1, &spec(allow, friend(), public, Vec::new())),
        control_plane::policy("no-admin", 1, &spec(deny, Vec::new(), admin, Vec::new())),
        control_plane::policy("plain", 1, &spec(allow, friend(), plain, Vec::new())),
        control_plane::policy("named", 1, &spec(allow, friend(), named, vec![name])),
    ]
}

fn spec(
    action: security::authorization_policy::Action,
    from: Vec<security::rule::From>,
    operation: security::Operation,
    when: Vec<security::Condition>,
) -> security::AuthorizationPolicy {
    let to = vec![security::rule::To {
        operation: Some(operation),
    }];
    security::AuthorizationPolicy {
        rules: vec![security::Rule { from, to, when }],
        action: action.into(),
        ..security::AuthorizationPolicy::default()
    }
}
