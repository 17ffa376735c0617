//! A lab that is up: its network, servers, control plane and agents, and the ways to change and to try it.
//!
//! Invariant: `model` is what is built; an object is in it, on the network and in the control plane, or in
//! none.

mod attempt;
mod change;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;

use super::agent::{Agent, Setup};
use super::control_plane::ControlPlane;
use super::model::{ContainerPort, Model, Pod};
use super::netns::Netns;
use super::object::objects;
use super::progress;
use super::registry::RunDir;
use super::scenario::{Action, Family, Scenario, Target};
use super::server::{Seen, Servers};
use super::services;
use super::topology::Network;
use super::verdict::Verdicts;

/// How long a change may take to be enforced everywhere.
const ENFORCED_WITHIN: Duration = Duration::from_secs(10);
/// The first state may be large.
const FIRST_ENFORCED_WITHIN: Duration = Duration::from_secs(30);

/// What to bring up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Choice {
    /// A production istiod instead of the embedded server.
    pub(crate) istiod: bool,
    /// The network, Services and servers alone: a control for tests that expect a denial.
    pub(crate) no_agent: bool,
}

/// The whole lab.
pub(crate) struct Lab {
    dir: RunDir,
    model: Model,
    network: Network,
    servers: Servers,
    seen: Arc<Seen>,
    control_plane: ControlPlane,
    agents: Vec<Agent>,
    verdicts: Verdicts,
    held: BTreeMap<String, attempt::Open>,
    probes: u64,
}

impl Lab {
    /// Brings everything up. On an error the caller removes what was made, by the folder's id.
    ///
    /// # Errors
    /// What could not be made, and why.
    pub(crate) async fn up(dir: &RunDir, scenario: &Scenario, choice: Choice) -> anyhow::Result<Self> {
        let objects = objects(&scenario.manifests);
        let mut model = Model::new(usize::from(scenario.settings.nodes), &objects)?;
        model.add(&objects)?;
        progress(&format!(
            "network: {} pods on {} node(s)",
            model.pods.len(),
            model.nodes.len()
        ));
        let network = Network::build(&dir.prefix(), scenario.settings.topology, &model)?;
        let seen = Arc::new(Seen::default());
        let mut lab = Self {
            dir: dir.clone(),
            servers: Servers::new(seen.clone())?,
            model,
            network,
            seen,
            control_plane: ControlPlane::None,
            agents: Vec::new(),
            verdicts: Verdicts::subscribe(Vec::new()).await,
            held: BTreeMap::new(),
            probes: 0,
        };
        lab.start_servers()?;
        lab.start_targets_outside(scenario)?;
        lab.start_control_plane(choice).await?;
        let versions = lab.control_plane.schedule(&objects, &mut lab.model).await?;
        let versions = lab.control_plane.apply(&objects, &lab.model, versions).await?;
        lab.load_services().await?;
        if !choice.no_agent {
            lab.start_agents(scenario).await?;
            lab.wait_enforced(versions, FIRST_ENFORCED_WITHIN).await?;
        }
        Ok(lab)
    }

    async fn start_control_plane(&mut self, choice: Choice) -> anyhow::Result<()> {
        if !choice.no_agent {
            progress(if choice.istiod {
                "control plane: etcd, kube-apiserver, istiod"
            } else {
                "control plane: embedded"
            });
        }
        self.control_plane = ControlPlane::start(choice, &self.dir, &self.network.nodes, &self.model).await?;
        Ok(())
    }

    async fn start_agents(&mut self, scenario: &Scenario) -> anyhow::Result<()> {
        let flags = self.control_plane.agent_flags(&self.model).await?;
        progress("agents: starting");
        let setup = Setup {
            dir: &self.dir,
            model: &self.model,
            flags: &scenario.settings.agent,
            control_plane: &flags,
        };
        let nodes = self.network.nodes.iter().enumerate();
        let starts = nodes.map(|(index, netns)| Agent::start(index, netns, &setup));
        self.agents = futures::future::try_join_all(starts).await?;
        let pods: Vec<Pod> = self.model.pods.values().cloned().collect();
        self.register(&pods).await?;
        for agent in &mut self.agents {
            agent.wait_for_sync().await?;
        }
        let agents = self.agents.iter().map(|agent| agent.admin.clone()).collect();
        self.verdicts = Verdicts::subscribe(agents).await;
        Ok(())
    }

    /// Tells each pod's agent of it.
    async fn register(&mut self, pods: &[Pod]) -> anyhow::Result<()> {
        for pod in pods {
            if let (Some(guest), Some(agent)) =
                (self.network.guest(&pod.key()), self.agents.get_mut(pod.node))
            {
                agent.add(pod, guest, &self.model).await?;
            }
        }
        Ok(())
    }

    async fn wait_enforced(
        &mut self,
        versions: Vec<thyra_proto::thyra::v1::ObjectVersion>,
        within: Duration,
    ) -> anyhow::Result<()> {
        for agent in &mut self.agents {
            agent.wait_enforced(versions.clone(), within).await?;
        }
        let rejections = self.control_plane.take_rejections();
        anyhow::ensure!(
            rejections.is_empty(),
            "refused by the agent: {}",
            rejections.join("; ")
        );
        Ok(())
    }

    async fn load_services(&mut self) -> anyhow::Result<()> {
        if self.control_plane.has_proxies() {
            return self
                .control_plane
                .wait_for_services(&self.network.nodes, &self.model)
                .await;
        }
        for (index, node) in self.network.nodes.iter().enumerate() {
            node.nft(&services::ruleset(&self.model, index))?;
        }
        Ok(())
    }

    fn start_servers(&mut self) -> anyhow::Result<()> {
        for pod in self.model.pods.values() {
            start_server(&mut self.servers, &self.network, pod)?;
        }
        Ok(())
    }

    /// Line echoes for probes that dial the world outside, or a node.
    fn start_targets_outside(&mut self, scenario: &Scenario) -> anyhow::Result<()> {
        let mut ports: BTreeMap<&str, Vec<ContainerPort>> = BTreeMap::new();
        for entry in &scenario.probes {
            let (Action::Probe(probe) | Action::Open { probe, .. }) = &entry.action else {
                continue;
            };
            let place = match probe.to {
                Target::Outside => "outside",
                Target::Host => "host",
                _ => continue,
            };
            let udp = matches!(probe.kind, super::scenario::Kind::Udp);
            let port = ContainerPort {
                name: String::new(),
                number: probe.port,
                udp,
            };
            let known = ports.entry(place).or_default();
            if !known.contains(&port) {
                known.push(port);
            }
        }
        for (place, ports) in ports {
            let netns = if place == "host" {
                &self.network.nodes[0]
            } else {
                &self.network.outside
            };
            self.servers.start(place, netns, None, &ports)?;
        }
        Ok(())
    }

    /// The namespace that a pod's sockets live in.
    fn netns_of(&self, pod: &Pod) -> anyhow::Result<&Netns> {
        if pod.host_network {
            return Ok(&self.network.nodes[pod.node]);
        }
        let guest = self.network.guest(&pod.key());
        Ok(&guest
            .with_context(|| format!("pod `{}` has no namespace", pod.key()))?
            .netns)
    }

    /// Of the first agent's live tables.
    pub(crate) async fn generation(&mut self) -> anyhow::Result<u64> {
        match self.agents.first_mut() {
            Some(agent) => Ok(agent.status().await?.generation),
            None => Ok(0),
        }
    }

    pub(crate) fn control_plane_name(&self) -> &'static str {
        self.control_plane.name()
    }

    /// Lines that tell a user what is there.
    pub(crate) fn describe(&self) -> String {
        let pods = self.model.pods.values().map(|pod| {
            let addresses: Vec<String> = pod.addresses.iter().map(ToString::to_string).collect();
            format!("  {}  {}\n", pod.key(), addresses.join("  "))
        });
        let services = self.model.services.values().map(|service| {
            let vips: Vec<String> = service.vips.iter().map(ToString::to_string).collect();
            format!(
                "  service/{}/{}  {}\n",
                service.namespace,
                service.name,
                vips.join("  ")
            )
        });
        pods.chain(services).collect()
    }

    /// Starts again what has ended, as a kubelet would; says what and how.
    ///
    /// # Errors
    /// It can't be started.
    pub(crate) fn revive(&mut self) -> anyhow::Result<Vec<String>> {
        let mut texts = self.control_plane.revive()?;
        for agent in &mut self.agents {
            texts.extend(agent.revive()?);
        }
        Ok(texts)
    }

    /// Stops the agents in order; the rest goes with the folder's id.
    pub(crate) async fn stop(&mut self) {
        for agent in &mut self.agents {
            agent.stop().await;
        }
    }
}

fn start_server(servers: &mut Servers, network: &Network, pod: &Pod) -> anyhow::Result<()> {
    let addresses = pod.host_network.then_some(pod.addresses.as_slice());
    let netns = if pod.host_network {
        &network.nodes[pod.node]
    } else {
        let guest = network.guest(&pod.key());
        &guest
            .with_context(|| format!("pod `{}` has no namespace", pod.key()))?
            .netns
    };
    servers.start(&pod.key(), netns, addresses, &pod.ports)?;
    Ok(())
}

/// The address of `family` among `addresses`.
fn of_family(addresses: &[std::net::IpAddr], family: Family) -> Option<std::net::IpAddr> {
    addresses
        .iter()
        .copied()
        .find(|address| Family::of(*address) == family)
}
