//! A real agent, fed by the bench's own control plane and told of its pods as a CNI would.
//!
//! Invariant: the agent, and the Envoy that it has started, end with the value that stands for them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use thyra_proto::thyra::v1 as admin;
use thyra_proto::thyra::v1::endpoint_service_client::EndpointServiceClient;
use tonic::transport::{Channel, Endpoint};

use crate::bpffs::Bpffs;
use crate::control_plane::ControlPlane;
use crate::mesh;
use crate::netns::Node;

const START: Duration = Duration::from_secs(30);
/// What it gets to end by itself, and its Envoy with it.
const STOP: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);

/// See the module.
pub(crate) struct Agent {
    child: Child,
    socket: PathBuf,
}

impl Agent {
    /// Starts one in the calling thread's network namespace, on its CPUs; `flags` come after the usual ones.
    ///
    /// # Errors
    /// When the program can't be started.
    pub(crate) fn start(
        program: &Path,
        bpffs: &Bpffs,
        plane: &ControlPlane,
        flags: &[String],
    ) -> Result<Self> {
        let socket = bpffs.files().join("agent.sock");
        let log = std::fs::File::create(bpffs.files().join("agent.log"))?;
        let child = Command::new(program)
            .arg("--node=bench")
            .arg(format!("--socket={}", socket.display()))
            .arg(format!("--bpffs={}", bpffs.path().join("thyra").display()))
            .arg(format!("--state={}", bpffs.files().join("state").display()))
            .arg(format!("--xds-address=http://{}", plane.address))
            .args([
                "--metrics=off",
                "--policy-source=istiod",
                "--default-mode=enforce",
                "--log=warn",
            ])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log))
            .spawn()
            .with_context(|| format!("start `{}`", program.display()))?;
        Ok(Self { child, socket })
    }

    /// Its process.
    #[must_use]
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it has said so far.
    #[must_use]
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.socket.with_file_name("agent.log")).unwrap_or_default()
    }

    /// Where pods are registered, once it answers.
    ///
    /// # Errors
    /// When it ends, with what it said, or doesn't answer in time.
    pub(crate) async fn endpoints(&mut self) -> Result<EndpointServiceClient<Channel>> {
        let start = Instant::now();
        loop {
            if let Ok(channel) = connect(&self.socket).await {
                return Ok(EndpointServiceClient::new(channel));
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("the agent ended with {status}: {}", self.log());
            }
            ensure!(
                start.elapsed() < START,
                "the agent's socket did not appear within {START:?}"
            );
            tokio::time::sleep(POLL).await;
        }
    }

    /// The Envoy that it has started, by the folder in its command line, whoever its parent is.
    #[must_use]
    pub(crate) fn envoy(&self) -> Option<Pid> {
        let folder = self.socket.with_file_name("envoy");
        let config = folder.join("bootstrap.json").display().to_string();
        let processes = std::fs::read_dir("/proc").ok()?.flatten();
        processes
            .filter(|entry| {
                let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
                line.split(|byte| *byte == 0)
                    .any(|word| word == config.as_bytes())
            })
            .find_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
    }

    /// Whether it has ended by itself before `STOP` is over.
    fn ends(&mut self) -> bool {
        let since = Instant::now();
        while since.elapsed() < STOP {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return true;
            }
            std::thread::sleep(POLL);
        }
        false
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It is a child of this process: a signal reaches it, or it is gone already.
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            kill_process(pid, Signal::TERM).ok();
        }
        if !self.ends() {
            drop(self.child.kill());
            drop(self.child.wait());
        }
        // An agent may leave it for the next one.
        if let Some(envoy) = self.envoy() {
            kill_process(envoy, Signal::KILL).ok();
        }
    }
}

/// Registers pod `pod` of `node`, whose identity is the mesh's workload of the same number.
///
/// # Errors
/// When the agent refuses it.
pub(crate) async fn register(
    client: &mut EndpointServiceClient<Channel>,
    node: &Node,
    pod: usize,
) -> Result<()> {
    let endpoint = admin::Endpoint {
        pod_uid: format!("uid-{pod}"),
        namespace: mesh::NAMESPACE.into(),
        name: format!("w-{pod}"),
        netns_path: format!("/run/netns/{}", node.pod(pod)),
        host_interface: Node::interface(pod),
        addresses: vec![Node::address(pod).to_string()],
        service_account: format!("sa-{pod}"),
        ..admin::Endpoint::default()
    };
    client
        .add(admin::AddRequest {
            endpoint: Some(endpoint),
        })
        .await
        .with_context(|| format!("register pod {pod}"))?;
    Ok(())
}

async fn connect(socket: &Path) -> Result<Channel> {
    let endpoint = Endpoint::try_from(format!("unix:{}", socket.display()))?;
    Ok(endpoint.connect().await?)
}
