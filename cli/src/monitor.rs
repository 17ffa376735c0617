//! `thyra monitor`: events as they happen, one line each.
//!
//! Invariant: a line per event, also as JSON or YAML, so that a pipe can read them one by one.

use std::process::ExitCode;

use anyhow::Result;
use clap::builder::PossibleValuesParser;
use serde::Serialize;
use thyra_proto::MONITOR_KINDS;
use thyra_proto::thyra::v1;

use crate::client::{Agent, refused};
use crate::output::{Format, GREEN, RED, YELLOW, coloured, show_next, socket};
use crate::verdict::Verdict;

/// Cilium's word for what happened to a new connection; the others are the agent's own.
const POLICY_VERDICT: &str = "policy-verdict";

/// What `-t` takes.
fn kinds() -> PossibleValuesParser {
    PossibleValuesParser::new(MONITOR_KINDS.into_iter().chain([POLICY_VERDICT]))
}

/// `thyra monitor`
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: thyra monitor -t drop --to shop/cart")]
pub(crate) struct Args {
    /// Kinds to show (may be repeated); all by default
    #[arg(short = 't', long = "type", value_name = "KIND", value_delimiter = ',',
          value_parser = kinds())]
    kinds: Vec<String>,
    /// Only from this address or namespace/pod
    #[arg(long)]
    from: Option<String>,
    /// Only to this address or namespace/pod
    #[arg(long)]
    to: Option<String>,
    /// Only from or to this address, namespace/pod or endpoint id
    #[arg(long)]
    related_to: Option<String>,
    /// Tell refusals once a second with their number, by kind of source, endpoint, port and reason
    #[arg(long)]
    aggregate: bool,
}

#[derive(Debug, Serialize)]
struct Event {
    time_unix_ms: u64,
    kind: String,
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
    protocol: String,
    tcp_flags: String,
    length: u32,
    generation: u64,
    verdict: Option<Verdict>,
    host: bool,
    own_service: bool,
    reset_sent: bool,
    message: String,
    /// Packets that it stands for.
    count: u64,
}

impl From<v1::MonitorEvent> for Event {
    fn from(e: v1::MonitorEvent) -> Self {
        Self {
            time_unix_ms: e.time_unix_ms,
            kind: e.kind,
            direction: e.direction,
            endpoint: e.endpoint,
            source: e.source,
            source_port: e.source_port,
            source_workload: e.source_workload,
            source_identity: e.source_identity,
            source_principal: e.source_principal,
            destination: e.destination,
            destination_port: e.destination_port,
            destination_workload: e.destination_workload,
            destination_identity: e.destination_identity,
            protocol: e.protocol,
            tcp_flags: e.tcp_flags,
            length: e.length,
            generation: e.generation,
            verdict: e.verdict.as_ref().map(Verdict::from),
            host: e.host,
            own_service: e.own_service,
            reset_sent: e.reset_sent,
            message: e.message,
            count: e.count,
        }
    }
}

impl Event {
    /// `xx drop (policy denied by shop/deny-legacy#0) to endpoint 256, identity 31028->29898: A:1 -> B:2 tcp
    /// SYN`
    fn line(&self) -> String {
        let refused = self
            .verdict
            .as_ref()
            .is_some_and(|verdict| verdict.action == "deny");
        let (mark, colour) = match self.kind.as_str() {
            "request" | "stream" if !refused => ("->", GREEN),
            "new" | "outbound" => ("->", GREEN),
            "audit" | "agent" | "lost" => ("~~", YELLOW),
            _ => ("xx", RED),
        };
        match self.kind.as_str() {
            "agent" => return format!("{} {}\n", coloured(mark, colour), self.message),
            "lost" => return format!("{} {}\n", coloured("~~ lost", colour), self.message),
            _ => {}
        }
        let why = self.verdict.as_ref().map_or_else(String::new, |v| {
            let by = v
                .policy
                .as_ref()
                .map(|_| format!(" by {}", v.rule_text()))
                .unwrap_or_default();
            let because = if v.because.is_empty() {
                String::new()
            } else {
                format!(": {}", v.because.join(", "))
            };
            format!(" ({}{by}{because})", v.reason)
        });
        let times = match self.count {
            0 | 1 => String::new(),
            many => format!(" ×{many}"),
        };
        let side = if self.direction == "from_pod" {
            "from"
        } else {
            "to"
        };
        format!(
            "{}{times}{why} {side} endpoint {}, identity {}->{}: {} -> {} {} {}\n",
            coloured(&format!("{mark} {}", self.kind), colour),
            self.endpoint,
            self.source_identity,
            self.destination_identity,
            end(&self.source, self.source_port, &self.source_workload),
            end(
                &self.destination,
                self.destination_port,
                &self.destination_workload
            ),
            self.protocol,
            if matches!(self.kind.as_str(), "request" | "stream") {
                &self.message
            } else {
                &self.tcp_flags
            }
        )
    }
}

fn end(address: &str, port: u32, workload: &str) -> String {
    let socket = socket(address, port);
    if workload.is_empty() {
        socket
    } else {
        format!("{socket} ({workload})")
    }
}

/// Runs the command until the agent or the reader goes away.
pub(crate) async fn run(args: Args, agent: Agent, format: Format) -> Result<ExitCode> {
    let mut client = agent.connect().await?;
    let kinds = args.kinds.iter().flat_map(|kind| match kind.as_str() {
        POLICY_VERDICT => vec!["new".to_owned(), "drop".to_owned()],
        other => vec![other.to_owned()],
    });
    let request = v1::MonitorRequest {
        kinds: kinds.collect(),
        from: args.from.unwrap_or_default(),
        to: args.to.unwrap_or_default(),
        related_to: args.related_to.unwrap_or_default(),
        aggregate: args.aggregate,
    };
    let mut events = client.admin.monitor(request).await.map_err(refused)?.into_inner();
    while let Some(event) = events.message().await.map_err(refused)? {
        let event = Event::from(event);
        show_next(&event, || event.line(), format)?;
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::builder::TypedValueParser as _;

    use super::*;

    #[test]
    fn the_agent_knows_every_kind() {
        let taken: Vec<String> = kinds()
            .possible_values()
            .expect("a list")
            .map(|kind| kind.get_name().to_owned())
            .filter(|kind| kind != POLICY_VERDICT)
            .collect();
        assert_eq!(taken, MONITOR_KINDS);
    }

    #[test]
    fn a_drop_reads_as_peoples_eyes_know_it() {
        let verdict = v1::Verdict {
            action: "deny".into(),
            reason: "policy denied".into(),
            policy: "shop/deny-legacy".into(),
            rule: Some(0),
            ..v1::Verdict::default()
        };
        let event = v1::MonitorEvent {
            kind: "drop".into(),
            endpoint: 256,
            source_identity: 31028,
            destination_identity: 29898,
            source: "10.0.1.7".into(),
            source_port: 41022,
            destination: "10.0.1.12".into(),
            destination_port: 9080,
            protocol: "tcp".into(),
            tcp_flags: "SYN".into(),
            verdict: Some(verdict),
            ..v1::MonitorEvent::default()
        };
        assert_eq!(
            Event::from(event).line(),
            "xx drop (policy denied by shop/deny-legacy#0) to endpoint 256, identity 31028->29898: \
             10.0.1.7:41022 -> 10.0.1.12:9080 tcp SYN\n"
        );
    }

    #[test]
    fn refusals_that_are_told_together_say_how_many_they_are() {
        let event = v1::MonitorEvent {
            kind: "drop".into(),
            source: "10.0.1.7".into(),
            destination: "10.0.1.12".into(),
            count: 230,
            ..v1::MonitorEvent::default()
        };
        let line = Event::from(event).line();
        assert!(line.starts_with("xx drop ×230 to endpoint 0"), "{line}");
        let lost = v1::MonitorEvent {
            kind: "lost".into(),
            message: "7 events".into(),
            ..v1::MonitorEvent::default()
        };
        assert_eq!(Event::from(lost).line(), "~~ lost 7 events\n");
    }
}
