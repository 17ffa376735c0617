//! What verdicts that need L7 cost, beside the same stock Envoy as an ordinary reverse proxy and as a pair of sidecars.
//!
//! Invariant: every side enforces the same rules, which is tried before anything is measured, and gets the same
//! requests from the same client; the halves of a sample run back to back and take turns in going first. Clients,
//! servers and Envoys share one pinned CPU, so that a ratio compares the work and not the scheduler's luck.
//!
//! ```text
//! inline    client 0 ─► pod 1:8080 (Envoy inside the pod)       proxy   client 2 ─► pod 4:8080 ─► pod 5:8080
//! L4        client 0 ─► pod 1:9090                              nothing client 2 ─► pod 3:9090
//! held      client 0 ─► pod 1:8443, judged by its ClientHello   the same client 2 ─► pod 3:8443
//! sidecars  client 6 ─► its Envoy ─► the Envoy of pod 7 ─► pod 7:8080, with and without mTLS
//! ```

mod hello;
mod http;
mod ours;
mod rival;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use self::http::Way;
use self::ours::{HTTP_PORT, L4_PORT, NAMED_PORT, OTHER_NAME, Ours, SERVER_NAME};
use self::rival::Rival;
use crate::netns::{self, Node};
use crate::pair::CPU;
use crate::progress::Steps;
use crate::stats::{Estimate, bootstrap, median, quantile};

/// Where the agent is while latencies are looked at, as the kernel would have it on a node with two CPUs.
const OTHER_CPU: usize = 0;
/// Samples of a ratio.
const SAMPLES: usize = 21;
/// Requests a second whose latency is looked at.
const RATE: u32 = 1_000;
/// Pods that talk, and their numbers.
const PODS: usize = 8;
const CLIENT: usize = 0;
const SERVER: usize = 1;
const OTHER_CLIENT: usize = 2;
const OTHER_SERVER: usize = 3;
const PROXY: usize = 4;
const BEHIND_PROXY: usize = 5;
const SIDECAR_CLIENT: usize = 6;
const SIDECAR_SERVER: usize = 7;
/// Pods that are added to a node with an Envoy, and then one at a time.
const MORE: usize = 100;
const ONE_MORE: usize = 15;
/// A sidecar's ports: for requests of its own pod, and for those that come in; without and with mTLS.
const SIDECAR_OUT: [u16; 2] = [15_001, 15_002];
const SIDECAR_IN: [u16; 2] = [15_006, 15_008];
/// Ratios of requests per second.
const RATES: [&str; 3] = ["inline_rps_ratio", "l4_beside_l7_ratio", "hold_rps_ratio"];
/// Figures of one round of latencies.
const LATENCIES: [&str; 4] = [
    "p99_pair_mtls_vs_l4",
    "p99_pair_vs_l4",
    "p99_pair_vs_hold",
    "p99_pair_vs_inline",
];
/// What being held adds to the first bytes of a connection, and how many connections are looked at for a sample of it.
const FIRST: &str = "hold_first_us";
const FIRSTS: usize = 50;

/// Programs that are measured.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Programs<'a> {
    /// The agent.
    pub(crate) agent: &'a Path,
    /// A stock Envoy: the one that the agent starts, and the one that it is compared with.
    pub(crate) envoy: &'a Path,
}

/// Who asks whom, and through what.
struct Ways {
    inline: Way,
    proxy: Way,
    beside: Way,
    nothing: Way,
    held: Way,
    not_held: Way,
    sidecars: Way,
    sidecars_mtls: Way,
}

/// The figures.
///
/// # Errors
/// When a part doesn't come up, or enforces something else than it should.
pub(crate) fn measure(
    programs: Programs<'_>,
    span: Duration,
    steps: &Steps,
) -> Result<Vec<(&'static str, Estimate)>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let node = Node::new("l7", PODS + MORE + ONE_MORE)?;
    netns::enter(&node.name())?;
    let folder = tempfile::Builder::new().prefix("thyra-bench-").tempdir()?;
    runtime.block_on(async {
        let pods = u16::try_from(PODS + MORE + ONE_MORE)?;
        let mut ours = Ours::start(programs.agent, programs.envoy, pods).await?;
        // Only what listens in the server is waited for: the client has an Envoy, too.
        for pod in [CLIENT, SERVER] {
            ours.add(&node, pod).await?;
        }
        // What Thyra itself does for a request is a part of what it costs.
        ours.pin(CPU, CPU)?;
        let idle = ours.envoy_mb()?;
        let _rivals = rivals(programs.envoy, folder.path(), &node)?;
        serve(&node)?;
        let ways = Ways::of(&node)?;
        ways.probe(&node)?;
        let mut found = Vec::new();
        found.extend(bootstrap(&[idle], median).map(|e| ("envoy_idle_mb", e)));
        found.extend(rates(&ways, span, steps)?);
        ours.pin(OTHER_CPU, CPU)?;
        found.extend(latencies(&ways, span, steps)?);
        found.extend(firsts(&ways, steps)?);
        found.extend(growth(&mut ours, &node, steps).await?);
        Ok(found)
    })
}

/// Number of steps that `measure` reports.
#[must_use]
pub(crate) const fn steps() -> usize {
    (RATES.len() + 2) * SAMPLES + MORE + ONE_MORE
}

/// The reverse proxy, and the sidecars of both pods.
fn rivals(envoy: &Path, folder: &Path, node: &Node) -> Result<[Rival; 3]> {
    let [client, server] = rival::certificates(folder, [6, 7])?;
    let at = |pod, port| SocketAddr::from((Node::address(pod), port));
    let own = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let start = |pod, parts| Rival::start(envoy, folder, (&node.pod(pod), CPU), parts);
    let (anybody, address, certificate) = (
        rival::from_anybody(),
        rival::from_address(Node::address(SIDECAR_CLIENT)),
        rival::from_certificate(6),
    );
    let proxy = (
        vec![rival::listener(HTTP_PORT, "pod", Some(&anybody), None)],
        vec![rival::cluster("pod", at(BEHIND_PROXY, HTTP_PORT), None)],
    );
    let out = (
        vec![
            rival::listener(SIDECAR_OUT[0], "plain", None, None),
            rival::listener(SIDECAR_OUT[1], "mtls", None, None),
        ],
        vec![
            rival::cluster("plain", at(SIDECAR_SERVER, SIDECAR_IN[0]), None),
            rival::cluster("mtls", at(SIDECAR_SERVER, SIDECAR_IN[1]), Some(&client)),
        ],
    );
    let come_in = (
        vec![
            rival::listener(SIDECAR_IN[0], "pod", Some(&address), None),
            rival::listener(SIDECAR_IN[1], "pod", Some(&certificate), Some(&server)),
        ],
        vec![rival::cluster("pod", own(HTTP_PORT), None)],
    );
    Ok([
        start(PROXY, proxy)?,
        start(SIDECAR_CLIENT, out)?,
        start(SIDECAR_SERVER, come_in)?,
    ])
}

fn serve(node: &Node) -> Result<()> {
    let servers = [
        (SERVER, HTTP_PORT),
        (SERVER, L4_PORT),
        (SERVER, NAMED_PORT),
        (OTHER_SERVER, L4_PORT),
        (OTHER_SERVER, NAMED_PORT),
        (BEHIND_PROXY, HTTP_PORT),
        (SIDECAR_SERVER, HTTP_PORT),
    ];
    for (pod, port) in servers {
        http::serve(&node.pod(pod), port, CPU).with_context(|| format!("serve port {port} of pod {pod}"))?;
    }
    Ok(())
}

impl Ways {
    fn of(node: &Node) -> Result<Self> {
        let way = |name, client, pod, port| Way {
            name,
            client: node.pod(client),
            to: SocketAddr::from((Node::address(pod), port)),
            cpu: CPU,
            hello: Vec::new(),
        };
        let named = |name, client, pod| -> Result<Way> {
            Ok(Way {
                hello: hello::hello(SERVER_NAME)?,
                ..way(name, client, pod, NAMED_PORT)
            })
        };
        let sidecar = |name, port| Way {
            to: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            ..way(name, SIDECAR_CLIENT, SIDECAR_CLIENT, port)
        };
        Ok(Self {
            inline: way("through Envoy in the pod", CLIENT, SERVER, HTTP_PORT),
            proxy: way("through a reverse proxy", OTHER_CLIENT, PROXY, HTTP_PORT),
            beside: way("beside L7 rules", CLIENT, SERVER, L4_PORT),
            nothing: way("without policy", OTHER_CLIENT, OTHER_SERVER, L4_PORT),
            held: named("held until it is judged", CLIENT, SERVER)?,
            not_held: named("not held", OTHER_CLIENT, OTHER_SERVER)?,
            sidecars: sidecar("through two sidecars", SIDECAR_OUT[0]),
            sidecars_mtls: sidecar("through two sidecars with mTLS", SIDECAR_OUT[1]),
        })
    }

    /// That every side enforces the rules, and that the kernel refuses a stranger.
    fn probe(&self, node: &Node) -> Result<()> {
        for way in [&self.inline, &self.proxy, &self.sidecars, &self.sidecars_mtls] {
            rival::probe(way)?;
        }
        for way in [&self.beside, &self.nothing] {
            let status = way.status("GET", "/public/page")?;
            ensure!(status == Some(200), "{}: answered {status:?}", way.name);
        }
        self.probe_held()?;
        for way in [&self.inline, &self.beside, &self.held] {
            let stranger = Way {
                client: node.pod(OTHER_CLIENT),
                ..way.clone()
            };
            let status = stranger.status("GET", "/public/page")?;
            ensure!(
                status.is_none(),
                "{}: a stranger is answered {status:?}",
                way.name
            );
        }
        Ok(())
    }

    /// That one name is allowed, and another one isn't.
    fn probe_held(&self) -> Result<()> {
        for way in [&self.held, &self.not_held] {
            // Envoy may not yet have what judges it; what is held until then waits.
            let status = way.status("GET", "/")?;
            ensure!(status == Some(200), "{}: answered {status:?}", way.name);
        }
        let other = |way: &Way| -> Result<Option<u16>> {
            let hello = hello::hello(OTHER_NAME)?;
            Way { hello, ..way.clone() }.status("GET", "/")
        };
        let (held, not_held) = (other(&self.held)?, other(&self.not_held)?);
        ensure!(
            held.is_none() && not_held == Some(200),
            "another name is answered {held:?} where it is judged and {not_held:?} elsewhere"
        );
        Ok(())
    }
}

fn rates(ways: &Ways, span: Duration, steps: &Steps) -> Result<Vec<(&'static str, Estimate)>> {
    let mut found = Vec::new();
    for (name, ours, other) in [
        (RATES[0], &ways.inline, &ways.proxy),
        (RATES[1], &ways.beside, &ways.nothing),
        (RATES[2], &ways.held, &ways.not_held),
    ] {
        let mut samples = Vec::with_capacity(SAMPLES);
        for turn in 0..SAMPLES {
            samples.push(if turn % 2 == 0 {
                ours.rate(span)? / other.rate(span)?
            } else {
                let other = other.rate(span)?;
                ours.rate(span)? / other
            });
            steps.step(name);
        }
        found.extend(bootstrap(&samples, median).map(|e| (name, e)));
    }
    Ok(found)
}

/// The 99th percentile through two sidecars ÷ ours, by round; each round begins with another one.
fn latencies(ways: &Ways, span: Duration, steps: &Steps) -> Result<Vec<(&'static str, Estimate)>> {
    let sides = [
        &ways.sidecars_mtls,
        &ways.sidecars,
        &ways.inline,
        &ways.held,
        &ways.beside,
    ];
    let mut samples: [Vec<f64>; LATENCIES.len()] = Default::default();
    for turn in 0..SAMPLES {
        let mut p99 = [0.0; 5];
        for place in 0..sides.len() {
            let at = (turn + place) % sides.len();
            // A percentile of fewer requests would be their worst.
            let took = sides[at].latencies(RATE, span.max(Duration::from_millis(500)))?;
            p99[at] = quantile(&took, 0.99).context("no request was answered")?;
        }
        let [mtls, plain, inline, held, l4] = p99;
        let ratios = [mtls / l4, plain / l4, plain / held, plain / inline];
        for (sample, ratio) in samples.iter_mut().zip(ratios) {
            sample.push(ratio);
        }
        steps.step("p99");
    }
    let found = LATENCIES.into_iter().zip(samples);
    Ok(found
        .filter_map(|(name, samples)| Some((name, bootstrap(&samples, median)?)))
        .collect())
}

/// What the first bytes of a held connection wait longer than those of another one.
fn firsts(ways: &Ways, steps: &Steps) -> Result<Option<(&'static str, Estimate)>> {
    let mut samples = Vec::with_capacity(SAMPLES);
    for turn in 0..SAMPLES {
        let took = |way: &Way| median(&way.firsts(FIRSTS)?).context("nothing was answered");
        samples.push(if turn % 2 == 0 {
            took(&ways.held)? - took(&ways.not_held)?
        } else {
            let other = took(&ways.not_held)?;
            took(&ways.held)? - other
        });
        steps.step(FIRST);
    }
    let micros: Vec<f64> = samples.iter().map(|seconds| seconds * 1e6).collect();
    Ok(bootstrap(&micros, median).map(|estimate| (FIRST, estimate)))
}

/// What 100 pods more are to a running Envoy, and how soon it listens in one more.
async fn growth(ours: &mut Ours, node: &Node, steps: &Steps) -> Result<Vec<(&'static str, Estimate)>> {
    let before = ours.envoy_mb()?;
    for pod in PODS..PODS + MORE {
        ours.add(node, pod).await?;
        steps.step("envoy_100_pods_mb");
    }
    let more = ours.envoy_mb()? - before;
    let mut active = Vec::with_capacity(ONE_MORE);
    for pod in PODS + MORE..PODS + MORE + ONE_MORE {
        active.push(ours.add(node, pod).await?.as_secs_f64() * 1e3);
        steps.step("listener_active_ms");
    }
    let figures = [
        ("envoy_100_pods_mb", bootstrap(&[more], median)),
        ("listener_active_ms", bootstrap(&active, median)),
    ];
    Ok(figures
        .into_iter()
        .filter_map(|(name, estimate)| Some((name, estimate?)))
        .collect())
}
