//! Entries of probes.yaml, run against the lab.
//!
//! Invariant: one entry yields one result, whatever happens.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;

use super::{Lab, of_family};
use crate::lab::model::{NodeAddresses, OUTSIDE4, OUTSIDE6};
use crate::lab::netns::Netns;
use crate::lab::object::objects;
use crate::lab::probe::{self, Dial, Held, Hold, Outcome};
use crate::lab::report::ProbeResult;
use crate::lab::scenario::{
    Action, ConnectionState, Entry, Expect, Family, Peer, Probe, Scenario, Target, read_manifest_file,
};
use crate::lab::server::{Seen, is_http};
use crate::lab::services;
use crate::lab::verdict::{Verdict, Wanted};

/// A connection that is kept open, with what finds its end's event.
pub(super) struct Open {
    held: Held,
    probe: Probe,
    wanted: Wanted,
}

/// Where a probe comes from and goes to.
struct Route {
    netns: Netns,
    sources: Vec<IpAddr>,
    to: SocketAddr,
    ends: Vec<(IpAddr, u16)>,
    speaks_http: bool,
}

impl Lab {
    /// Runs one entry.
    pub(crate) async fn run(&mut self, index: usize, entry: &Entry, scenario: &Scenario) -> ProbeResult {
        let started = Instant::now();
        let mut result = match &entry.action {
            Action::Probe(probe) => self.run_probe(probe).await,
            Action::Apply(files) => {
                let done = self.run_change(scenario, files, false).await;
                change_result("apply", done)
            }
            Action::Delete(files) => {
                let done = self.run_change(scenario, files, true).await;
                change_result("delete", done)
            }
            Action::Open { name, probe } => self.run_open(name, probe).await,
            Action::ExpectOpen { name, state } => self.run_expect_open(name, *state).await,
        };
        result.index = index;
        if result.latency_us == 0 {
            result.latency_us = micros(started.elapsed());
        }
        result
    }

    async fn run_change(
        &mut self,
        scenario: &Scenario,
        files: &[std::path::PathBuf],
        delete: bool,
    ) -> anyhow::Result<()> {
        let mut all = Vec::new();
        for file in files {
            all.extend(read_objects(&scenario.file(file))?);
        }
        if delete {
            self.delete(&all).await
        } else {
            self.apply(&all).await
        }
    }

    async fn run_probe(&mut self, probe: &Probe) -> ProbeResult {
        let route = match self.route(probe) {
            Ok(route) => route,
            Err(error) => return probe_result("probe", probe, &Outcome::Failed(format!("{error:#}"))),
        };
        let since = self.verdicts.now();
        let seen = probe::run(&Dial {
            netns: &route.netns,
            to: route.to,
            kind: &probe.kind,
            speaks_http: route.speaks_http,
            timeout: probe.timeout,
            token: self.token(),
            seen: &self.seen,
        })
        .await;
        let wanted = self.wanted(&route, seen.client, since);
        let mut result = probe_result("probe", probe, &seen.outcome);
        result.latency_us = micros(seen.latency);
        result.verdict = self.verdict(&wanted).await;
        result
    }

    async fn run_open(&mut self, name: &str, probe: &Probe) -> ProbeResult {
        let route = match self.route(probe) {
            Ok(route) => route,
            Err(error) => return probe_result("open", probe, &Outcome::Failed(format!("{error:#}"))),
        };
        let since = self.verdicts.now();
        let hold = Hold {
            netns: &route.netns,
            to: route.to,
            speaks_http: route.speaks_http,
            timeout: probe.timeout,
            token: self.token(),
        };
        let started = Instant::now();
        let opened = Held::open(&hold).await;
        let (outcome, client) = match &opened {
            Ok(held) => (Outcome::Allow, Some(held.client())),
            Err((outcome, client)) => (outcome.clone(), *client),
        };
        let mut result = probe_result("open", probe, &outcome);
        result.latency_us = micros(started.elapsed());
        let wanted = self.wanted(&route, client, since);
        result.verdict = self.verdict(&wanted).await;
        if let Ok(held) = opened {
            let wanted = Wanted {
                since: self.verdicts.now(),
                ended: true,
                ..wanted
            };
            self.held.insert(
                name.to_owned(),
                Open {
                    held,
                    probe: probe.clone(),
                    wanted,
                },
            );
        }
        result
    }

    async fn run_expect_open(&mut self, name: &str, expect: ConnectionState) -> ProbeResult {
        let Some(mut open) = self.held.remove(name) else {
            let mut result = blank("expect_open", expect.to_string());
            "never opened".clone_into(&mut result.actual);
            return result;
        };
        let state = open.held.state().await;
        let mut result = probe_result("expect_open", &open.probe, &Outcome::Allow);
        result.expect = expect.to_string();
        result.actual = state.to_string();
        result.ok = state == expect;
        if state != ConnectionState::Alive {
            result.verdict = self.verdict(&open.wanted).await;
        }
        self.held.insert(name.to_owned(), open);
        result
    }

    async fn verdict(&self, wanted: &Wanted) -> Option<Verdict> {
        if self.agents.is_empty() {
            None
        } else {
            self.verdicts.find(wanted).await
        }
    }

    fn token(&mut self) -> String {
        self.probes += 1;
        Seen::token(self.probes)
    }

    fn wanted(&self, route: &Route, client: Option<SocketAddr>, since: u64) -> Wanted {
        let nodes = (0..self.model.nodes.len()).map(NodeAddresses::of);
        let masks = nodes
            .flat_map(|node| node.own.into_iter().chain(node.gateways))
            .collect();
        let mut sources = route.sources.clone();
        sources.extend(client.map(|client| client.ip()));
        let mut ends = route.ends.clone();
        ends.push((route.to.ip(), route.to.port()));
        Wanted {
            client,
            sources,
            ends,
            masks,
            since,
            ended: false,
        }
    }

    fn route(&self, probe: &Probe) -> anyhow::Result<Route> {
        let v4 = probe.family == Family::V4;
        let host = NodeAddresses::of(0);
        let (netns, sources) = match &probe.from {
            Peer::Host => (
                &self.network.nodes[0],
                host.own.into_iter().chain(host.gateways).collect(),
            ),
            Peer::Outside => (&self.network.outside, vec![OUTSIDE4.into(), OUTSIDE6.into()]),
            Peer::Pod(key) => {
                let pod = self
                    .model
                    .pods
                    .get(key)
                    .with_context(|| format!("pod `{key}` is gone"))?;
                (self.netns_of(pod)?, pod.addresses.clone())
            }
        };
        let no_address = || format!("`{}` has no IPv{} address", probe.to, probe.family.number());
        let mut speaks_http = false;
        let mut ends = Vec::new();
        let to = match &probe.to {
            Target::Host => (
                of_family(&host.own, probe.family).with_context(no_address)?,
                probe.port,
            ),
            Target::Outside => {
                let outside: IpAddr = if v4 { OUTSIDE4.into() } else { OUTSIDE6.into() };
                (outside, probe.port)
            }
            Target::Pod(key) => {
                let pod = self
                    .model
                    .pods
                    .get(key)
                    .with_context(|| format!("pod `{key}` is gone"))?;
                speaks_http = is_http(pod.port_name(probe.port));
                (
                    of_family(&pod.addresses, probe.family).with_context(no_address)?,
                    probe.port,
                )
            }
            Target::Service(key) => {
                let service = self
                    .model
                    .services
                    .get(key)
                    .with_context(|| format!("Service `{key}` is gone"))?;
                ends = services::ends(&self.model, service, probe.port, v4);
                speaks_http = self.model.backends(service).any(|pod| {
                    ends.iter().any(|(address, port)| {
                        pod.addresses.contains(address) && is_http(pod.port_name(*port))
                    })
                });
                services::entrance(&self.model, service, probe.port, v4).with_context(no_address)?
            }
        };
        Ok(Route {
            netns: netns.clone(),
            sources,
            to: to.into(),
            ends,
            speaks_http,
        })
    }
}

fn read_objects(path: &Path) -> anyhow::Result<Vec<crate::lab::object::Object>> {
    Ok(objects(&read_manifest_file(path)?))
}

fn blank(kind: &'static str, expect: String) -> ProbeResult {
    ProbeResult {
        index: 0,
        kind,
        from: None,
        to: None,
        port: None,
        ip: None,
        expect,
        actual: String::new(),
        ok: false,
        verdict: None,
        latency_us: 0,
    }
}

fn probe_result(kind: &'static str, probe: &Probe, outcome: &Outcome) -> ProbeResult {
    let expect: Expect = probe.expect;
    ProbeResult {
        from: Some(probe.from.to_string()),
        to: Some(probe.to.to_string()),
        port: Some(probe.port),
        ip: Some(probe.family.number()),
        actual: outcome.show(expect),
        ok: outcome.meets(expect),
        ..blank(kind, expect.to_string())
    }
}

fn change_result(kind: &'static str, done: anyhow::Result<()>) -> ProbeResult {
    let mut result = blank(kind, "enforced".to_owned());
    result.ok = done.is_ok();
    result.actual = match done {
        Ok(()) => "enforced".to_owned(),
        Err(error) => format!("{error:#}"),
    };
    result
}

fn micros(duration: std::time::Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
