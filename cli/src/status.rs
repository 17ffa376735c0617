//! `thyra status`: whether this node enforces what it should, and what stands in the way.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use thyra_proto::thyra::v1;

use crate::client::{Agent, refused};
use crate::output::{Format, GREEN, RED, Show, YELLOW, coloured, show, table};

/// `thyra status`
#[derive(Clone, Copy, Debug, clap::Args)]
pub(crate) struct Args {
    /// One line
    #[arg(long, conflicts_with = "verbose")]
    brief: bool,
    /// Also how full each map is, and the peers
    #[arg(long)]
    verbose: bool,
}

#[derive(Debug, Serialize)]
struct Status {
    #[serde(skip)]
    args: Args,
    version: String,
    node: String,
    generation: u64,
    synced: bool,
    datapath: String,
    hook: String,
    local_redirect: String,
    policy_source: String,
    endpoints: u32,
    endpoints_enforced: u32,
    sources: Vec<Source>,
    peers: Vec<Peer>,
    maps: Vec<Map>,
    drops: Vec<Drops>,
    lost_events: u64,
    started_unix: u64,
    problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Source {
    name: String,
    state: String,
    detail: String,
    last_push_unix: u64,
    resources: u64,
    rejected: u64,
    ready: BTreeMap<String, bool>,
    rejections: Vec<String>,
}

/// The certificate of an xDS server.
#[derive(Debug, Serialize)]
pub(crate) struct Peer {
    stream: String,
    address: String,
    subject: String,
    sans: Vec<String>,
    not_after: String,
}

#[derive(Debug, Serialize)]
struct Map {
    name: String,
    used: u64,
    capacity: u64,
}

#[derive(Debug, Serialize)]
struct Drops {
    reason: String,
    reason_number: u32,
    packets: u64,
    bytes: u64,
}

impl Status {
    fn of(reply: v1::GetStatusResponse, args: Args) -> Self {
        let source = |s: v1::SourceStatus| Source {
            name: s.name,
            state: s.state,
            detail: s.detail,
            last_push_unix: s.last_push_unix,
            resources: s.resources,
            rejected: s.rejected,
            ready: s.ready.into_iter().collect(),
            rejections: s.rejections,
        };
        let map = |m: v1::MapFill| Map {
            name: m.name,
            used: m.used,
            capacity: m.capacity,
        };
        let drops = |d: v1::DropCount| Drops {
            reason: d.reason,
            reason_number: d.reason_number,
            packets: d.packets,
            bytes: d.bytes,
        };
        Self {
            args,
            version: reply.version,
            node: reply.node,
            generation: reply.generation,
            synced: reply.synced,
            datapath: reply.datapath,
            hook: reply.hook,
            local_redirect: reply.local_redirect,
            policy_source: reply.policy_source,
            endpoints: reply.endpoints,
            endpoints_enforced: reply.endpoints_enforced,
            sources: reply.sources.into_iter().map(source).collect(),
            peers: reply.peers.into_iter().map(Peer::from).collect(),
            maps: reply.maps.into_iter().map(map).collect(),
            drops: reply.drops.into_iter().map(drops).collect(),
            lost_events: reply.lost_events,
            started_unix: reply.started_unix,
            problems: reply.problems,
        }
    }

    fn is_well(&self) -> bool {
        self.synced && self.problems.is_empty()
    }

    fn headline(&self) -> String {
        let stale = self.sources.iter().any(|s| s.state == "stale");
        let word = match (self.is_well(), self.synced) {
            (true, _) if stale => coloured("OK, BUT STALE", YELLOW),
            (true, _) => coloured("OK", GREEN),
            (_, true) => coloured("PROBLEMS", YELLOW),
            _ => coloured("NOT SYNCED", RED),
        };
        format!(
            "{word}   node {}   generation {}   endpoints {} of {} enforced   policies from {}\n",
            self.node, self.generation, self.endpoints_enforced, self.endpoints, self.policy_source
        )
    }

    fn sources(&self) -> String {
        let row = |s: &Source| {
            vec![
                s.name.clone(),
                s.state.clone(),
                s.resources.to_string(),
                s.rejected.to_string(),
                s.detail.clone(),
            ]
        };
        let mut text = table(
            &["SOURCE", "STATE", "RESOURCES", "REJECTED", ""],
            &self.sources.iter().map(row).collect::<Vec<_>>(),
        );
        for rejection in self.sources.iter().flat_map(|s| &s.rejections) {
            text += &format!("rejected: {rejection}\n");
        }
        text
    }

    fn details(&self) -> String {
        let map = |m: &Map| {
            let percent = m.used.saturating_mul(100).checked_div(m.capacity).unwrap_or(0);
            vec![
                m.name.clone(),
                m.used.to_string(),
                m.capacity.to_string(),
                format!("{percent} %"),
            ]
        };
        let maps = table(
            &["MAP", "USED", "CAPACITY", ""],
            &self.maps.iter().map(map).collect::<Vec<_>>(),
        );
        format!("\n{maps}\n{}", Peers::table(&self.peers))
    }
}

impl Show for Status {
    fn text(&self) -> String {
        let mut text = self.headline();
        if self.args.brief {
            return text;
        }
        text += &format!(
            "agent {}   datapath {}   hook {}\n",
            self.version, self.datapath, self.hook
        );
        text += &match self.local_redirect.as_str() {
            // An agent of an earlier version says nothing.
            "" | "off" => "\n".to_owned(),
            redirect => format!("local redirect {redirect}\n\n"),
        };
        text += &self.sources();
        let drops: Vec<_> = self.drops.iter().filter(|d| d.packets > 0).collect();
        if !drops.is_empty() {
            let row = |d: &&Drops| {
                vec![
                    d.reason.clone(),
                    d.reason_number.to_string(),
                    d.packets.to_string(),
                    d.bytes.to_string(),
                ]
            };
            let rows: Vec<_> = drops.iter().map(row).collect();
            text += &format!(
                "\n{}",
                table(&["DROPPED BECAUSE", "REASON", "PACKETS", "BYTES"], &rows)
            );
        }
        if self.lost_events > 0 {
            text += &format!(
                "\n{} events were lost: the ring was full, or too much was refused at once\n",
                self.lost_events
            );
        }
        if self.args.verbose {
            text += &self.details();
        }
        for problem in &self.problems {
            text += &format!("\nproblem: {problem}\n");
        }
        text
    }
}

impl From<v1::XdsPeer> for Peer {
    fn from(message: v1::XdsPeer) -> Self {
        let v1::XdsPeer {
            stream,
            address,
            subject,
            sans,
            not_after,
        } = message;
        Self {
            stream,
            address,
            subject,
            sans,
            not_after,
        }
    }
}

/// `thyra xds …`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Xds {
    /// The streams to istiod: whom the agent talks to
    Status,
}

#[derive(Debug, Serialize)]
struct Peers(Vec<Peer>);

impl Peers {
    fn table(peers: &[Peer]) -> String {
        let row = |p: &Peer| {
            vec![
                p.stream.clone(),
                p.address.clone(),
                p.subject.clone(),
                p.sans.join(","),
                p.not_after.clone(),
            ]
        };
        table(
            &["STREAM", "SERVER", "SUBJECT", "NAMES", "VALID UNTIL"],
            &peers.iter().map(row).collect::<Vec<_>>(),
        )
    }
}

impl Show for Peers {
    fn text(&self) -> String {
        Self::table(&self.0)
    }
}

/// Runs `thyra status`: exit code 0 when synced and without problems, else 1.
pub(crate) async fn run(args: Args, agent: Agent, format: Format) -> Result<ExitCode> {
    let mut client = agent.connect().await?;
    let reply = client
        .admin
        .get_status(v1::GetStatusRequest {})
        .await
        .map_err(refused)?
        .into_inner();
    let status = Status::of(reply, args);
    show(&status, format)?;
    Ok(if status.is_well() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Runs `thyra xds status`.
pub(crate) async fn xds(_: Xds, agent: Agent, format: Format) -> Result<ExitCode> {
    let mut client = agent.connect().await?;
    let reply = client
        .admin
        .get_status(v1::GetStatusRequest {})
        .await
        .map_err(refused)?
        .into_inner();
    show(&Peers(reply.peers.into_iter().map(Peer::from).collect()), format)?;
    Ok(ExitCode::SUCCESS)
}
