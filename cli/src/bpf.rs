//! `thyra bpf`: what the kernel's maps hold beside the tables.

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use thyra_proto::thyra::v1;

use crate::client::{Agent, refused};
use crate::output::{Format, Show, dash, show, socket, table};

/// `thyra bpf …`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Connections that are judged once, by their first bytes
    #[command(subcommand)]
    Flows(FlowsCommand),
}

/// `thyra bpf flows …`
#[derive(Debug, clap::Subcommand)]
pub(crate) enum FlowsCommand {
    /// Those that are held (await), allowed up to what was judged (guard), refused (deny) or the kernel's alone (open)
    #[command(after_help = "Example: thyra bpf flows list --endpoint shop/cart -o json\n\
                      What Envoy said of each: thyra monitor -t stream")]
    List {
        /// Only those of this endpoint: its id or namespace/pod
        #[arg(long, value_name = "ENDPOINT", default_value = "", hide_default_value = true)]
        endpoint: String,
    },
}

/// A connection.
#[derive(Debug, Serialize)]
struct Flow {
    state: String,
    /// None before there is one.
    verdict: Option<String>,
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
    /// Sequence numbers with which it began.
    source_isn: u32,
    destination_isn: u32,
    /// Sequence number behind the last byte that was judged.
    judged_end: Option<u32>,
    /// As `endpoint policy get` names it; none where nothing has the number any more.
    residual: Option<String>,
    residual_number: u32,
    because: Vec<String>,
    age_ms: u64,
}

impl From<v1::HeldFlow> for Flow {
    fn from(flow: v1::HeldFlow) -> Self {
        let v1::HeldFlow {
            state,
            verdict,
            endpoint,
            source,
            source_port,
            source_workload,
            source_identity,
            source_principal,
            destination,
            destination_port,
            destination_workload,
            destination_identity,
            destination_principal,
            source_isn,
            destination_isn,
            judged_end,
            residual,
            residual_number,
            because,
            age_ms,
        } = flow;
        let some = |text: String| (!text.is_empty()).then_some(text);
        Self {
            state,
            verdict: some(verdict),
            endpoint,
            source,
            source_port,
            source_workload,
            source_identity,
            source_principal,
            destination,
            destination_port,
            destination_workload,
            destination_identity,
            destination_principal,
            source_isn,
            destination_isn,
            judged_end,
            residual: some(residual),
            residual_number,
            because,
            age_ms,
        }
    }
}

#[derive(Debug, Serialize)]
struct Flows(Vec<Flow>);

const HEADER: [&str; 12] = [
    "ENDPOINT",
    "STATE",
    "VERDICT",
    "SOURCE",
    "WORKLOAD",
    "IDENTITY",
    "DESTINATION",
    "WORKLOAD",
    "ISN >",
    "ISN <",
    "ASKED BY",
    "AGE",
];

impl Flow {
    fn row(&self) -> Vec<String> {
        vec![
            self.endpoint.to_string(),
            self.state.clone(),
            dash(self.verdict.as_deref().unwrap_or_default()),
            socket(&self.source, self.source_port),
            dash(&self.source_workload),
            match self.source_identity {
                0 => dash(""),
                identity => identity.to_string(),
            },
            socket(&self.destination, self.destination_port),
            dash(&self.destination_workload),
            self.source_isn.to_string(),
            self.destination_isn.to_string(),
            dash(&self.because.join(", ")),
            seconds(self.age_ms),
        ]
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03} s", ms / 1000, ms % 1000)
}

impl Show for Flows {
    fn text(&self) -> String {
        let rows: Vec<_> = self.0.iter().map(Flow::row).collect();
        table(&HEADER, &rows)
    }
}

/// Runs the command.
pub(crate) async fn run(command: Command, agent: Agent, format: Format) -> Result<ExitCode> {
    let Command::Flows(FlowsCommand::List { endpoint }) = command;
    let mut client = agent.connect().await?;
    let request = v1::ListHeldFlowsRequest { endpoint };
    let reply = client.admin.list_held_flows(request).await.map_err(refused)?;
    let flows = reply.into_inner().flows.into_iter().map(Flow::from);
    show(&Flows(flows.collect()), format)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unjudged_connection_has_no_verdict_and_an_open_one_its_names() {
        let await_ = v1::HeldFlow {
            state: "await".into(),
            endpoint: 3,
            source: "fd00::1".into(),
            source_port: 40_000,
            destination: "fd00::2".into(),
            destination_port: 8443,
            source_isn: 7,
            destination_isn: 9,
            age_ms: 1_234,
            ..v1::HeldFlow::default()
        };
        let row = Flow::from(await_.clone()).row();
        let wanted = [
            "3",
            "await",
            "-",
            "[fd00::1]:40000",
            "-",
            "-",
            "[fd00::2]:8443",
            "-",
            "7",
            "9",
            "-",
            "1.234 s",
        ];
        assert_eq!(row, wanted);
        let open = v1::HeldFlow {
            state: "open".into(),
            verdict: "allow".into(),
            source_workload: "shop/front".into(),
            source_identity: 12,
            because: vec!["shop/by-name#0: connection.sni".into()],
            ..await_
        };
        let row = Flow::from(open).row();
        assert_eq!((&*row[2], &*row[4], &*row[5]), ("allow", "shop/front", "12"));
        assert_eq!(row[10], "shop/by-name#0: connection.sni");
    }
}
