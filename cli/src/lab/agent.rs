//! The agents of a lab: started in their nodes, told of their pods, asked what they enforce.
//!
//! Invariant: an agent runs in its node's network namespace with a bpffs, a state folder and a socket of its
//! own.

use std::ffi::OsString;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::mount::{MountFlags, mount};
use thyra_proto::thyra::v1 as api;
use thyra_proto::thyra::v1::admin_service_client::AdminServiceClient;
use thyra_proto::thyra::v1::endpoint_service_client::EndpointServiceClient;
use tonic::transport::{Channel, Endpoint, Uri};

use super::BadInput;
use super::model::{Model, NodeAddresses, Pod};
use super::netns::Netns;
use super::process::{Process, Spec};
use super::registry::RunDir;
use super::scenario::AgentFlag;
use super::services::{POD_RANGE4, POD_RANGE6};
use super::topology::Guest;

/// An agent that doesn't answer by then is broken; one that ended is noticed at once. An emulated CPU needs some 30 s
/// to verify the programs.
const START_TIMEOUT: Duration = Duration::from_secs(90);
/// How long its first full sync may take.
const SYNC_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a stopping agent may take.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(20);
/// The agent's exit code when its flags can't be used.
const BAD_INPUT: i32 = 2;
/// Where the agent honours a namespace's labels when no API server tells them.
const NAMESPACE_LABELS: &str = "thyra.io/namespace-labels";

/// A running agent.
pub(crate) struct Agent {
    name: String,
    process: Process,
    pub(crate) admin: AdminServiceClient<Channel>,
    endpoints: EndpointServiceClient<Channel>,
}

/// What every agent of a lab is started with.
pub(crate) struct Setup<'a> {
    pub(crate) dir: &'a RunDir,
    pub(crate) model: &'a Model,
    /// From `scenario.yaml`; they win.
    pub(crate) flags: &'a [AgentFlag],
    /// Where the control plane is and how to speak to it, by node.
    pub(crate) control_plane: &'a [Vec<(String, String)>],
}

impl Agent {
    /// Starts the agent of one node and waits until its socket answers.
    ///
    /// # Errors
    /// There is no agent program, or it ended; then with the end of its log.
    pub(crate) async fn start(node: usize, netns: &Netns, setup: &Setup<'_>) -> anyhow::Result<Self> {
        let folder = setup.dir.node(node);
        let (bpffs, state) = (folder.join("bpf"), folder.join("state"));
        for path in [&bpffs, &state] {
            fs::create_dir_all(path).with_context(|| format!("can't make `{}`", path.display()))?;
        }
        mount("bpf", &bpffs, "bpf", MountFlags::empty(), None)
            .with_context(|| format!("can't mount a bpffs at `{}`", bpffs.display()))?;
        let socket = setup.dir.agent_socket(node);
        let name = setup.model.nodes[node].clone();
        let process = Process::start(Spec {
            name: format!("the agent of `{name}`"),
            program: program()?,
            arguments: arguments(node, &socket, &bpffs, &state, setup),
            environment: &[],
            log: folder.join("agent.log"),
            folder,
            netns: netns.clone(),
        })?;
        let channel = channel(&socket)?;
        let mut agent = Self {
            name,
            process,
            admin: AdminServiceClient::new(channel.clone()),
            endpoints: EndpointServiceClient::new(channel),
        };
        agent.wait_for_answer(setup.flags).await?;
        Ok(agent)
    }

    async fn wait_for_answer(&mut self, flags: &[AgentFlag]) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            if self.admin.get_status(api::GetStatusRequest {}).await.is_ok() {
                return Ok(());
            }
            if let Err(error) = self.process.check().with_context(|| origin(flags)) {
                // The scenario's flags are a user's input; what the agent can't use of it is the user's to
                // mend.
                let mistake = !flags.is_empty() && self.process.ended_with(BAD_INPUT);
                return Err(if mistake {
                    BadInput(format!("{error:#}")).into()
                } else {
                    error
                });
            }
            if Instant::now() > deadline {
                bail!(
                    "the agent of `{}` doesn't answer:\n{}",
                    self.name,
                    self.process.last_words()
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits for the first full sync.
    ///
    /// # Errors
    /// It doesn't come; says what the agent's status is.
    pub(crate) async fn wait_for_sync(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + SYNC_TIMEOUT;
        loop {
            let status = self.status().await?;
            if status.synced {
                return Ok(());
            }
            if Instant::now() > deadline {
                let sources = status
                    .sources
                    .iter()
                    .map(|source| format!("\n  {}: {} {}", source.name, source.state, source.detail));
                bail!(
                    "the agent of `{}` isn't synced:{}",
                    self.name,
                    sources.collect::<String>()
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }

    pub(crate) async fn status(&mut self) -> anyhow::Result<api::GetStatusResponse> {
        let answer = self.admin.get_status(api::GetStatusRequest {}).await;
        Ok(answer
            .with_context(|| format!("the agent of `{}` doesn't answer", self.name))?
            .into_inner())
    }

    /// Makes a pod an endpoint, or tells what changed of it.
    ///
    /// # Errors
    /// The agent refuses it.
    pub(crate) async fn add(&mut self, pod: &Pod, guest: &Guest, model: &Model) -> anyhow::Result<()> {
        let mut annotations = pod.annotations.clone();
        if let Some(labels) = model.namespaces.get(&pod.namespace) {
            annotations.insert(NAMESPACE_LABELS.to_owned(), serde_json::to_string(labels)?);
        }
        let endpoint = api::Endpoint {
            pod_uid: pod.uid.clone(),
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            netns_path: guest.netns.path().display().to_string(),
            host_interface: guest.interface.clone(),
            addresses: pod.addresses.iter().map(ToString::to_string).collect(),
            mac: guest.mac.clone(),
            labels: pod.labels.clone().into_iter().collect(),
            annotations: annotations.into_iter().collect(),
            service_account: pod.service_account.clone(),
            containers: pod.containers.clone(),
        };
        let answer = self
            .endpoints
            .add(api::AddRequest {
                endpoint: Some(endpoint),
            })
            .await;
        answer.map_err(|status| refusal(&self.name, "pod", &pod.key(), &status))?;
        Ok(())
    }

    /// # Errors
    /// The agent doesn't answer.
    pub(crate) async fn delete(&mut self, pod: &Pod) -> anyhow::Result<()> {
        let request = api::DelRequest {
            pod_uid: pod.uid.clone(),
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
        };
        let answer = self.endpoints.del(request).await;
        answer.map_err(|status| refusal(&self.name, "removal of pod", &pod.key(), &status))?;
        Ok(())
    }

    /// Returns when each object version is enforced, or changes nothing.
    ///
    /// # Errors
    /// Which ones aren't after `timeout`.
    pub(crate) async fn wait_enforced(
        &mut self,
        objects: Vec<api::ObjectVersion>,
        timeout: Duration,
    ) -> anyhow::Result<()> {
        let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        let answer = self
            .admin
            .wait_enforced(api::WaitEnforcedRequest { objects, timeout_ms })
            .await;
        answer.map_err(|status| anyhow::anyhow!("agent of `{}`: {}", self.name, status.message()))?;
        Ok(())
    }

    /// Asks it to end, and makes it end.
    pub(crate) async fn stop(&mut self) {
        self.process.stop(STOP_TIMEOUT).await;
    }

    /// Starts it again if it has ended, as a DaemonSet would; says how it had ended.
    ///
    /// # Errors
    /// It can't be started.
    pub(crate) fn revive(&mut self) -> anyhow::Result<Option<String>> {
        self.process.revive()
    }
}

/// Where an agent's flags may have come from, for a reader of its last words.
fn origin(flags: &[AgentFlag]) -> String {
    let given = flags
        .iter()
        .map(|flag| format!("`{}` is from {}:{}", flag.key, flag.file.display(), flag.line));
    let given: Vec<String> = given.collect();
    if given.is_empty() {
        "the agent doesn't start".to_owned()
    } else {
        format!("the agent doesn't start ({})", given.join(", "))
    }
}

fn refusal(node: &str, what: &str, key: &str, status: &tonic::Status) -> anyhow::Error {
    anyhow::anyhow!(
        "the agent of `{node}` refuses {what} `{key}`: {}",
        status.message()
    )
}

/// `$THYRA_AGENT`, else the program beside this one.
pub(crate) fn program() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("THYRA_AGENT") {
        return Ok(path.into());
    }
    let own = std::env::current_exe().context("can't find this program's own file")?;
    let path = own.with_file_name("thyra-agent");
    if !path.is_file() {
        bail!(
            "there is no `{}`; build it with `cargo build -p thyra-agent`, or name it in THYRA_AGENT",
            path.display()
        );
    }
    Ok(path)
}

/// Every flag once; what the scenario says wins.
fn arguments(node: usize, socket: &Path, bpffs: &Path, state: &Path, setup: &Setup<'_>) -> Vec<OsString> {
    let mut flags: Vec<(String, String)> = vec![
        ("node".into(), setup.model.nodes[node].clone()),
        ("socket".into(), socket.display().to_string()),
        ("bpffs".into(), bpffs.display().to_string()),
        ("state".into(), state.display().to_string()),
        ("default-mode".into(), "enforce".into()),
        envoy(socket),
        ("pod-cidr".into(), POD_RANGE4.into()),
        ("pod-cidr".into(), POD_RANGE6.into()),
    ];
    for other in 0..setup.model.nodes.len() {
        let NodeAddresses {
            own,
            gateways,
            ranges: _,
        } = NodeAddresses::of(other);
        let addresses: Vec<IpAddr> = own.into_iter().chain(gateways).collect();
        flags.extend(
            addresses
                .iter()
                .map(|address| ("node-address".into(), address.to_string())),
        );
    }
    flags.extend(setup.control_plane.get(node).into_iter().flatten().cloned());
    flags.retain(|(key, _)| !setup.flags.iter().any(|given| given.key == *key));
    flags.extend(
        setup
            .flags
            .iter()
            .map(|given| (given.key.clone(), given.value.clone())),
    );
    flags
        .into_iter()
        .map(|(key, value)| format!("--{key}={value}").into())
        .collect()
}

/// The Envoy for verdicts that need L7: `THYRA_ENVOY`, else what `make envoy` installed, else the one in $PATH, if any.
/// With `given` somebody else runs it, and it asks in the folder `given` beside the agent's socket.
fn envoy(socket: &Path) -> (String, String) {
    let named = std::env::var("THYRA_ENVOY").ok().filter(|path| !path.is_empty());
    if named.as_deref() == Some("given") {
        let asks = socket.with_file_name("given").join("xds.sock");
        return ("envoy-socket".into(), asks.display().to_string());
    }
    let cache = std::env::var_os("THYRA_CACHE").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME")?;
        Some(PathBuf::from(home).join(".cache/thyra"))
    });
    let installed = cache
        .map(|cache| cache.join("envoy/envoy"))
        .filter(|path| path.exists());
    let path = named
        .or_else(|| installed.map(|path| path.display().to_string()))
        .unwrap_or_else(|| "auto".to_owned());
    ("envoy".into(), path)
}

/// A lazy connection over a Unix socket.
fn channel(socket: &Path) -> anyhow::Result<Channel> {
    let socket = socket.to_owned();
    // Every URI will do: the connector knows where to go.
    let endpoint = Endpoint::from_static("http://agent");
    Ok(
        endpoint.connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move {
                tokio::net::UnixStream::connect(socket)
                    .await
                    .map(hyper_util::rt::TokioIo::new)
            }
        })),
    )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{AgentFlag, Model, RunDir, Setup, arguments};

    #[test]
    fn a_scenarios_flag_replaces_the_labs_own() {
        let model = Model::new(2, &[]).expect("two nodes");
        let flag = |key: &str, value: &str| AgentFlag {
            key: key.into(),
            value: value.into(),
            file: Path::new("scenario.yaml").into(),
            line: 1,
        };
        let flags = [flag("default-mode", "off"), flag("deny", "drop")];
        let setup = Setup {
            dir: &RunDir::of("test"),
            model: &model,
            flags: &flags,
            control_plane: &[],
        };
        let arguments = arguments(1, Path::new("/s"), Path::new("/b"), Path::new("/t"), &setup);
        assert!(arguments.contains(&"--node=node-1".into()));
        assert!(arguments.contains(&"--default-mode=off".into()));
        assert!(!arguments.contains(&"--default-mode=enforce".into()));
        assert!(arguments.contains(&"--deny=drop".into()));
        assert_eq!(
            arguments
                .iter()
                .filter(|flag| flag.to_string_lossy().starts_with("--node-address="))
                .count(),
            8
        );
    }
}
