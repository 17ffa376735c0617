//! Two pods on a node, made of network namespaces, gone when dropped.
//!
//! Invariant: names are unique to this process, and only namespaces made here are touched.

use std::fs::File;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A node namespace with pods joined to it by veths with routes.
pub(crate) struct Node {
    prefix: String,
    pods: usize,
}

impl Node {
    /// Makes the node and `pods` pods: pod `i` has 10.244.(i/200).(2+i%200), and host interface `v<i>`. `word` tells
    /// it from this run's other nodes.
    ///
    /// # Errors
    /// When `ip` can't be run or refuses (no root).
    pub(crate) fn new(word: &str, pods: usize) -> Result<Self> {
        let node = Self {
            prefix: format!("thyra-bench-{}-{word}", std::process::id()),
            pods,
        };
        ip(&["netns", "add", &node.name()])?;
        batch(&node.name(), &["link set lo up".to_owned()])?;
        run(Command::new("ip").args([
            "netns",
            "exec",
            &node.name(),
            "sysctl",
            "-qw",
            "net.ipv4.ip_forward=1",
        ]))?;
        for pod in 0..pods {
            node.add_pod(pod)?;
        }
        Ok(node)
    }

    /// Name of the node's namespace.
    #[must_use]
    pub(crate) fn name(&self) -> String {
        format!("{}-n", self.prefix)
    }

    /// Name of a pod's namespace.
    #[must_use]
    pub(crate) fn pod(&self, pod: usize) -> String {
        format!("{}-p{pod}", self.prefix)
    }

    /// Host interface of a pod.
    #[must_use]
    pub(crate) fn interface(pod: usize) -> String {
        format!("v{pod}")
    }

    /// IPv4 address of a pod.
    #[must_use]
    pub(crate) fn address(pod: usize) -> std::net::Ipv4Addr {
        let octet = |n: usize| u8::try_from(n).unwrap_or(u8::MAX);
        std::net::Ipv4Addr::new(10, 244, octet(pod / 200), octet(2 + pod % 200))
    }

    fn add_pod(&self, pod: usize) -> Result<()> {
        let (name, host, address) = (self.pod(pod), Self::interface(pod), Self::address(pod));
        ip(&["netns", "add", &name])?;
        batch(
            &self.name(),
            &[
                format!("link add {host} type veth peer name eth0 netns {name}"),
                format!("addr add 10.244.255.1/32 dev {host}"),
                format!("link set {host} up"),
            ],
        )?;
        batch(
            &name,
            &[
                "link set lo up".to_owned(),
                format!("addr add {address}/32 dev eth0"),
                "link set eth0 up".to_owned(),
                "route add 10.244.255.1 dev eth0 scope link".to_owned(),
                format!("route add default via 10.244.255.1 src {address}"),
            ],
        )?;
        // A connect loop leaves tens of thousands of connections in TIME_WAIT; their ports must be usable
        // again.
        for setting in [
            "net.ipv4.tcp_tw_reuse=1",
            "net.ipv4.ip_local_port_range=10240 65000",
        ] {
            run(Command::new("ip").args(["netns", "exec", &name, "sysctl", "-qw", setting]))?;
        }
        batch(&self.name(), &[format!("route add {address}/32 dev {host}")])
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for name in (0..self.pods).map(|pod| self.pod(pod)).chain([self.name()]) {
            // A namespace that was never made can't be deleted; nothing depends on the answer.
            drop(
                Command::new("ip")
                    .args(["netns", "del", &name])
                    .stderr(Stdio::null())
                    .status(),
            );
        }
    }
}

/// Moves the calling thread (alone) into a named network namespace.
///
/// # Errors
/// When the namespace is gone or the caller may not enter it.
pub(crate) fn enter(name: &str) -> Result<()> {
    let path = format!("/run/netns/{name}");
    let file = File::open(&path).with_context(|| format!("open namespace `{path}`"))?;
    move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("enter namespace `{name}`"))
}

fn ip(arguments: &[&str]) -> Result<()> {
    run(Command::new("ip").args(arguments))
}

fn batch(namespace: &str, lines: &[String]) -> Result<()> {
    for line in lines {
        run(Command::new("ip").args(["-n", namespace]).args(line.split(' ')))?;
    }
    Ok(())
}

/// Runs a command that must succeed.
///
/// # Errors
/// With what it said.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("run `{command:?}`"))?;
    if !output.status.success() {
        bail!(
            "`{command:?}` failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
