//! kube-proxy in each node, and the moment when it has written its rules.
//!
//! Invariant: a lab is up only when every Service's address and backend stand in the node's ruleset.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, bail};

use super::{Cluster, POLL, START_TIMEOUT, spec, write};
use crate::lab::model::{Model, Service};
use crate::lab::netns::Netns;
use crate::lab::process::Process;
use crate::lab::services::{POD_RANGE4, POD_RANGE6};

impl Cluster {
    /// # Errors
    /// It can't be started.
    pub(crate) fn start_proxies(&mut self, nodes: &[Netns], model: &Model) -> anyhow::Result<()> {
        for (index, node) in nodes.iter().enumerate() {
            let config = self.folder.join(format!("proxy-{index}.yaml"));
            let kubeconfig = self.folder.join("kubeconfig");
            write(
                &config,
                &format!(
                    "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n\
                     mode: nftables\n\
                     clientConnection: {{kubeconfig: \"{}\"}}\nclusterCIDR: \"{POD_RANGE4},{POD_RANGE6}\"\n\
                     bindAddress: 0.0.0.0\nhealthzBindAddress: 127.0.0.1:10256\n\
                     metricsBindAddress: 127.0.0.1:10249\noomScoreAdj: 0\nnftables: {{minSyncPeriod: 10ms}}\n\
                     conntrack: {{maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, \
                     tcpCloseWaitTimeout: 0s}}\n",
                    kubeconfig.display()
                ),
            )?;
            let flags = vec![
                format!("--config={}", config.display()),
                format!("--hostname-override={}", model.nodes[index]),
            ];
            let spec = spec(node, &self.folder, &self.binaries, "kube-proxy", flags, &[]);
            self.processes.push(Process::start(spec)?);
        }
        Ok(())
    }

    /// Waits until each node's rules have what the model has.
    ///
    /// # Errors
    /// They haven't after a while; says what is missing.
    pub(crate) async fn wait_for_proxies(&mut self, nodes: &[Netns], model: &Model) -> anyhow::Result<()> {
        let wanted = expected(model);
        let deadline = Instant::now() + START_TIMEOUT;
        for node in nodes {
            loop {
                let rules = ruleset(node)?;
                let Some(missing) = wanted.iter().find(|text| !rules.contains(*text)) else {
                    break;
                };
                for process in &mut self.processes {
                    process.check()?;
                }
                if Instant::now() > deadline {
                    bail!("kube-proxy has no rule for `{missing}`");
                }
                tokio::time::sleep(POLL).await;
            }
        }
        Ok(())
    }
}

/// What kube-proxy's rules must mention: each Service's address, and each backend.
fn expected(model: &Model) -> Vec<String> {
    let mut texts = Vec::new();
    for service in model.services.values() {
        for port in &service.ports {
            let protocol = if port.udp { "udp" } else { "tcp" };
            for vip in &service.vips {
                texts.push(format!("{vip} . {protocol} . {}", port.port));
                for backend in Service::backends(port, model.backends(service), vip.is_ipv4()) {
                    texts.push(format!(": {} . {}", backend.address, backend.port));
                }
            }
        }
    }
    texts
}

fn ruleset(node: &Netns) -> anyhow::Result<String> {
    let mut command = Command::new("nft");
    command
        .args(["list", "ruleset"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let output = node
        .spawn(&mut command)
        .and_then(std::process::Child::wait_with_output)
        .context("can't run `nft`")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
