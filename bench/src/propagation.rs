//! How long a policy change takes from istiod's response to the kernel: a real agent, a real stream, real
//! veths.
//!
//! Invariant: the clock starts before the server hands the response to the stream and stops when the kernel's
//! own control word has moved, so everything in between counts.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::agent::{self, Agent};
use crate::bpffs::Bpffs;
use crate::control_plane::{self, ADDRESS, AUTHORIZATION, CONFIG_TYPES, ControlPlane};
use crate::mesh;
use crate::netns::{self, Node};
use crate::progress::Steps;
use crate::stats::{Estimate, bootstrap, median, quantile};
use anyhow::{Context, Result, bail, ensure};
use aya::maps::{Array, Map, MapData};
use thyra_datapath::abi::{Control, State, maps};
use thyra_proto::envoy::service::discovery::v3::Resource;
use thyra_proto::istio::security::v1beta1 as security;

const PODS: u16 = 50;
const IDENTITIES: u32 = 1_000;
const POLICIES: u32 = 100;
const CHANGE: Duration = Duration::from_secs(5);
/// Between two changes, as an operator's would come: the last one is over and done.
const PAUSE: Duration = Duration::from_millis(60);
const POLL: Duration = Duration::from_micros(50);

/// A change of the last policy.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    /// Names or no longer names an identity.
    Identity,
    /// Names or no longer names a CIDR block that splits source classes.
    Split,
}

/// `propagation_p99_ms` and `propagation_split_p99_ms` over `changes` changes each.
///
/// # Errors
/// When the agent doesn't come up or a change is not enforced within seconds.
pub(crate) fn measure(agent: &Path, changes: usize, steps: &Steps) -> Result<Vec<(&'static str, Estimate)>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let node = Node::new("agent", usize::from(PODS))?;
    netns::enter(&node.name())?;
    runtime.block_on(async {
        let bench = Bench::start(agent, &node).await?;
        let mut found = Vec::new();
        for (name, change) in [
            ("propagation_p99_ms", Change::Identity),
            ("propagation_split_p99_ms", Change::Split),
        ] {
            let mut samples = Vec::with_capacity(changes);
            for i in 0..changes {
                samples.push(bench.change(change, i).await?.as_secs_f64() * 1e3);
                steps.step(name);
                tokio::time::sleep(PAUSE).await;
            }
            found.extend(bootstrap(&samples, |s| quantile(s, 0.99)).map(|e| (name, e)));
        }
        found.extend(bootstrap(&[bench.anonymous_mib()?], median).map(|e| ("agent_rss_mib", e)));
        Ok(found)
    })
}

/// Number of steps that `measure` reports.
#[must_use]
pub(crate) const fn steps(changes: usize) -> usize {
    2 * changes
}

struct Bench {
    // The agent goes first, then its file system.
    agent: Agent,
    state: Array<MapData, [u8; size_of::<State>()]>,
    plane: ControlPlane,
    _bpffs: Bpffs,
}

impl Bench {
    async fn start(program: &Path, node: &Node) -> Result<Self> {
        let bpffs = Bpffs::mount()?;
        let plane = ControlPlane::start().await?;
        plane.push(
            ADDRESS,
            (0..IDENTITIES)
                .map(|i| control_plane::workload(i, PODS, &[]))
                .collect(),
        );
        plane.push(
            AUTHORIZATION,
            (0..POLICIES).map(|i| policy(i, 1, false, false)).collect(),
        );
        for type_url in CONFIG_TYPES {
            plane.push(type_url, Vec::new());
        }
        let mut agent = Agent::start(program, &bpffs, &plane, &[])?;
        let mut endpoints = agent.endpoints().await?;
        for pod in 0..usize::from(PODS) {
            agent::register(&mut endpoints, node, pod).await?;
        }
        let state = open_state(&bpffs)?;
        let bench = Self {
            agent,
            state,
            plane,
            _bpffs: bpffs,
        };
        bench.settle().await?;
        Ok(bench)
    }

    /// Memory of the agent that is its own, no file's, MiB (proc(5), `smaps_rollup`).
    fn anonymous_mib(&self) -> Result<f64> {
        let path = format!("/proc/{}/smaps_rollup", self.agent.id());
        let text = std::fs::read_to_string(&path).with_context(|| format!("read `{path}`"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Anonymous:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        let kib: f64 = kib.with_context(|| format!("`{path}` tells no size"))?.parse()?;
        Ok(kib / 1024.0)
    }

    /// Waits until nothing moves any more.
    async fn settle(&self) -> Result<()> {
        let (mut last, mut since) = (self.generation()?, Instant::now());
        while since.elapsed() < Duration::from_secs(1) {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let now = self.generation()?;
            if now != last {
                (last, since) = (now, Instant::now());
            }
        }
        ensure!(
            last != 0,
            "the agent (process {}) has committed nothing",
            self.agent.id()
        );
        Ok(())
    }

    async fn change(&self, change: Change, i: usize) -> Result<Duration> {
        let on = i.is_multiple_of(2);
        let version = u64::try_from(i)? + 2 + if change == Change::Split { 1_000_000 } else { 0 };
        let (identity, split) = (on && change == Change::Identity, on && change == Change::Split);
        let before = self.generation()?;
        let sent = self.plane.push(
            AUTHORIZATION,
            vec![policy(POLICIES - 1, version, identity, split)],
        );
        loop {
            // Lets the server's task write; a sleep of 50 µs is what the poll adds at most.
            tokio::time::sleep(POLL).await;
            if self.generation()? != before {
                return Ok(sent.elapsed());
            }
            if sent.elapsed() > CHANGE {
                bail!("change {i} was not enforced within {CHANGE:?}");
            }
        }
    }

    fn generation(&self) -> Result<u32> {
        let state = self.state.get(&0, 0)?;
        let word = state
            .first_chunk()
            .context("a state begins with its control word")?;
        Ok(Control(u64::from_ne_bytes(*word)).generation())
    }
}

fn open_state(bpffs: &Bpffs) -> Result<Array<MapData, [u8; size_of::<State>()]>> {
    let pin = bpffs.find(maps::STATE)?;
    let map =
        Map::from_map_data(MapData::from_pin(&pin).with_context(|| format!("open `{}`", pin.display()))?)?;
    Array::try_from(map).context("the state is an array of one element")
}

/// Policy `i` allows its share of the identities; the changes add one more of each kind.
fn policy(i: u32, version: u64, identity: bool, split: bool) -> Resource {
    let share = (1..IDENTITIES)
        .filter(|w| w % POLICIES == i)
        .chain(identity.then_some(0));
    let principals = share.map(mesh::principal).collect();
    let mut from = vec![source(security::Source {
        principals,
        ..security::Source::default()
    })];
    if split {
        let ip_blocks = vec!["10.32.0.0/17".to_owned()];
        from.push(source(security::Source {
            ip_blocks,
            ..security::Source::default()
        }));
    }
    let operation = security::Operation {
        ports: vec!["9000".into(), "9001".into()],
        ..security::Operation::default()
    };
    let to = vec![security::rule::To {
        operation: Some(operation),
    }];
    let spec = security::AuthorizationPolicy {
        rules: vec![security::Rule {
            from,
            to,
            when: Vec::new(),
        }],
        ..security::AuthorizationPolicy::default()
    };
    control_plane::policy(&format!("allow-{i:04}"), version, &spec)
}

fn source(source: security::Source) -> security::rule::From {
    security::rule::From { source: Some(source) }
}
