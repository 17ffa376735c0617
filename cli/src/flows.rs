//! `thyra flows`: TCP connections and refusals that the flow log knows, and how long connections take, by pair of
//! identities.
//!
//! Invariant: a flow that ended is one line, also as JSON or YAML when they are followed; what is not known is a dash
//! or null, never zero.

mod pairs;

use std::process::ExitCode;

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use serde::Serialize;
use thyra_proto::thyra::v1;

use crate::client::{Agent, refused};
use crate::output::{Format, Show, dash, show, show_next, socket, table};
use crate::verdict::Verdict;

/// `thyra flows`
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  thyra flows --to shop/cart --verdict deny\n  thyra flows -f -o json\n  \
                  thyra flows --histogram --to sa/cart\n\
                  Connections are logged by an agent with --flow-log=all."
)]
pub(crate) struct Args {
    /// Only from this address, namespace/pod or principal; for pairs, any whose source holds this text
    #[arg(long)]
    from: Option<String>,
    /// Only to this address, namespace/pod or principal; for pairs, any whose destination holds this text
    #[arg(long)]
    to: Option<String>,
    /// Only from or to this address, namespace/pod, principal or endpoint id
    #[arg(long)]
    related_to: Option<String>,
    /// Only those that passed, were refused, or passed in audit mode
    #[arg(long, value_parser = PossibleValuesParser::new(["allow", "deny", "audit"]))]
    verdict: Option<String>,
    /// Only the newest
    #[arg(long, value_name = "N")]
    last: Option<usize>,
    /// Flows as they end, instead of those that the log holds
    #[arg(short, long)]
    follow: bool,
    /// How many, how much and how fast, by pair of identities
    #[arg(long, conflicts_with_all = ["follow", "last", "related_to", "verdict"])]
    pairs: bool,
    /// The same with how long connections took to be answered (or the round trip) drawn
    #[arg(long, value_name = "OF", num_args = 0..=1, require_equals = true, default_missing_value = "connect",
          conflicts_with_all = ["follow", "last", "related_to", "verdict"])]
    histogram: Option<pairs::Of>,
}

/// How the log stands.
#[derive(Debug, Serialize)]
pub(crate) struct Log {
    logged: String,
    sample: u32,
    forgotten: u64,
    lost_events: u64,
    notes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Flow {
    state: String,
    direction: String,
    endpoint: u32,
    source: String,
    source_port: u32,
    source_workload: String,
    source_identity: u32,
    source_principal: String,
    destination: String,
    destination_port: u32,
    destination_workload: String,
    destination_identity: u32,
    destination_principal: String,
    protocol: String,
    verdict: Option<Verdict>,
    /// None of one that began before anybody looked.
    start_unix_ms: Option<u64>,
    end_unix_ms: Option<u64>,
    duration_ms: Option<u64>,
    connect_us: Option<u64>,
    traffic: Option<Traffic>,
    denied_packets: u64,
}

/// As the endpoint's own stack counts it.
#[derive(Debug, Serialize)]
struct Traffic {
    bytes_to_destination: u64,
    bytes_to_source: u64,
    packets_to_destination: u64,
    packets_to_source: u64,
    retransmits: u64,
    min_rtt_us: Option<u64>,
    rtt_us: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Flows {
    flows: Vec<Flow>,
    log: Log,
}

const HEADER: [&str; 13] = [
    "START",
    "STATE",
    "DIR",
    "SOURCE",
    "DESTINATION",
    "VERDICT",
    "BY",
    "BYTES >",
    "BYTES <",
    "PACKETS",
    "DURATION",
    "CONNECT",
    "RTT",
];

impl From<v1::FlowLog> for Log {
    fn from(log: v1::FlowLog) -> Self {
        let v1::FlowLog {
            logged,
            sample,
            forgotten,
            lost_events,
            notes,
        } = log;
        Self {
            logged,
            sample,
            forgotten,
            lost_events,
            notes,
        }
    }
}

impl Log {
    /// What a reader has to know, a line each.
    pub(crate) fn text(&self) -> String {
        let mut lines = Vec::new();
        match (self.logged.as_str(), self.sample) {
            ("all", 0 | 1) => {}
            ("all", n) => lines.push(format!("one of {n} connections is logged")),
            ("denied", _) => {
                lines.push(
                    "only what is refused is logged; connections are with the agent's --flow-log=all".into(),
                );
            }
            _ => lines.push("nothing is logged: the agent runs with --flow-log=off".into()),
        }
        if self.forgotten > 0 {
            lines.push(format!("{} older flows had to make room", self.forgotten));
        }
        if self.lost_events > 0 {
            lines.push(format!(
                "{} events were lost, since the maps were made",
                self.lost_events
            ));
        }
        lines.extend(self.notes.iter().map(|note| format!("not watched: {note}")));
        let lines: String = lines.into_iter().map(|line| line + "\n").collect();
        if lines.is_empty() {
            lines
        } else {
            format!("\n{lines}")
        }
    }
}

impl From<v1::FlowTraffic> for Traffic {
    fn from(traffic: v1::FlowTraffic) -> Self {
        let v1::FlowTraffic {
            bytes_to_destination,
            bytes_to_source,
            packets_to_destination,
            packets_to_source,
            retransmits,
            min_rtt_us,
            rtt_us,
        } = traffic;
        Self {
            bytes_to_destination,
            bytes_to_source,
            packets_to_destination,
            packets_to_source,
            retransmits,
            min_rtt_us,
            rtt_us,
        }
    }
}

impl From<v1::Flow> for Flow {
    fn from(flow: v1::Flow) -> Self {
        let start = (flow.start_unix_ms != 0).then_some(flow.start_unix_ms);
        let took = start
            .zip(flow.end_unix_ms)
            .map(|(start, end)| end.saturating_sub(start));
        Self {
            state: flow.state,
            direction: flow.direction,
            endpoint: flow.endpoint,
            source: flow.source,
            source_port: flow.source_port,
            source_workload: flow.source_workload,
            source_identity: flow.source_identity,
            source_principal: flow.source_principal,
            destination: flow.destination,
            destination_port: flow.destination_port,
            destination_workload: flow.destination_workload,
            destination_identity: flow.destination_identity,
            destination_principal: flow.destination_principal,
            protocol: flow.protocol,
            verdict: flow.verdict.as_ref().map(Verdict::from),
            start_unix_ms: start,
            end_unix_ms: flow.end_unix_ms,
            duration_ms: took,
            connect_us: flow.connect_us,
            traffic: flow.traffic.map(Traffic::from),
            denied_packets: flow.denied_packets,
        }
    }
}

impl Flow {
    fn row(&self) -> Vec<String> {
        let (action, by) = self.verdict.as_ref().map_or_else(Default::default, |verdict| {
            let by = match verdict.policy {
                Some(_) => verdict.rule_text(),
                None => verdict.reason.clone(),
            };
            (verdict.action.clone(), by)
        });
        let of = |number: fn(&Traffic) -> u64| self.traffic.as_ref().map(number);
        let packets = if self.state == "denied" {
            self.denied_packets.to_string()
        } else {
            let there = of(|t| t.packets_to_destination).zip(of(|t| t.packets_to_source));
            there.map_or_else(String::new, |(there, back)| format!("{there}/{back}"))
        };
        let rtt = self.traffic.as_ref().and_then(|traffic| traffic.min_rtt_us);
        let cells = [
            self.start_unix_ms.map_or_else(String::new, time_of_day),
            self.state.clone(),
            self.direction.clone(),
            end(&self.source_workload, &self.source, self.source_port),
            end(
                &self.destination_workload,
                &self.destination,
                self.destination_port,
            ),
            action,
            by,
            of(|t| t.bytes_to_destination).map_or_else(String::new, |n| n.to_string()),
            of(|t| t.bytes_to_source).map_or_else(String::new, |n| n.to_string()),
            packets,
            self.duration_ms
                .map_or_else(String::new, |ms| format!("{}.{:03} s", ms / 1000, ms % 1000)),
            self.connect_us.map_or_else(String::new, milliseconds),
            rtt.map_or_else(String::new, milliseconds),
        ];
        cells.iter().map(|cell| dash(cell)).collect()
    }
}

/// Of the day in UTC.
fn time_of_day(unix_ms: u64) -> String {
    let (seconds, ms) = (unix_ms / 1000 % 86_400, unix_ms % 1000);
    format!(
        "{:02}:{:02}:{:02}.{ms:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

fn milliseconds(micros: u64) -> String {
    format!("{}.{:03} ms", micros / 1000, micros % 1000)
}

fn end(workload: &str, address: &str, port: u32) -> String {
    match workload {
        "" => socket(address, port),
        known => format!("{known}:{port}"),
    }
}

impl Show for Flows {
    fn text(&self) -> String {
        let rows: Vec<_> = self.flows.iter().map(Flow::row).collect();
        table(&HEADER, &rows) + &self.log.text()
    }
}

/// Runs the command.
pub(crate) async fn run(args: Args, agent: Agent, format: Format) -> Result<ExitCode> {
    let mut client = agent.connect().await?;
    if args.pairs || args.histogram.is_some() {
        let request = v1::ListFlowPairsRequest {};
        let reply = client
            .admin
            .list_flow_pairs(request)
            .await
            .map_err(refused)?
            .into_inner();
        let (from, to) = (args.from.unwrap_or_default(), args.to.unwrap_or_default());
        show(&pairs::Pairs::new(reply, (&from, &to), args.histogram), format)?;
        return Ok(ExitCode::SUCCESS);
    }
    let filter = Some(v1::FlowFilter {
        from: args.from.unwrap_or_default(),
        to: args.to.unwrap_or_default(),
        related_to: args.related_to.unwrap_or_default(),
        verdict: args.verdict.unwrap_or_default(),
    });
    if args.follow {
        let request = v1::WatchFlowsRequest { filter };
        let mut flows = client
            .admin
            .watch_flows(request)
            .await
            .map_err(refused)?
            .into_inner();
        while let Some(flow) = flows.message().await.map_err(refused)? {
            let flow = Flow::from(flow);
            show_next(&flow, || flow.row().join("  ") + "\n", format)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    let request = v1::ListFlowsRequest { filter };
    let reply = client
        .admin
        .list_flows(request)
        .await
        .map_err(refused)?
        .into_inner();
    let older = reply.flows.len().saturating_sub(args.last.unwrap_or(usize::MAX));
    let flows = Flows {
        flows: reply.flows.into_iter().skip(older).map(Flow::from).collect(),
        log: reply.log.unwrap_or_default().into(),
    };
    show(&flows, format)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_a_dash_and_never_zero() {
        let flow = v1::Flow {
            state: "open".into(),
            direction: "in".into(),
            source: "fd00::1".into(),
            source_port: 40_000,
            destination: "10.0.0.1".into(),
            destination_workload: "shop/cart".into(),
            destination_port: 80,
            ..v1::Flow::default()
        };
        let dashes = ["-"; 8];
        let row = [
            &["-", "open", "in", "[fd00::1]:40000", "shop/cart:80"][..],
            &dashes,
        ]
        .concat();
        assert_eq!(Flow::from(flow).row(), row);
    }

    #[test]
    fn a_flow_that_ended_shows_what_went_over_it_and_how_long_it_took() {
        let flow = v1::Flow {
            state: "closed".into(),
            start_unix_ms: 86_400_000 + 3_723_004,
            end_unix_ms: Some(86_400_000 + 3_723_004 + 1_500),
            connect_us: Some(1_234),
            traffic: Some(v1::FlowTraffic {
                bytes_to_destination: 10,
                bytes_to_source: 20,
                packets_to_destination: 5,
                packets_to_source: 4,
                min_rtt_us: Some(50),
                ..v1::FlowTraffic::default()
            }),
            ..v1::Flow::default()
        };
        let row = Flow::from(flow).row();
        assert_eq!(row[0], "01:02:03.004");
        assert_eq!(row[7..], ["10", "20", "5/4", "1.500 s", "1.234 ms", "0.050 ms"]);
    }
}
