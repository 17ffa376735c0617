//! `thyra requests`: what Envoy judged since the agent started, and how long it took.
//!
//! Invariant: a request is in one pair and in one rule.

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use thyra_proto::thyra::v1;

use crate::client::{Agent, refused};
use crate::histogram::{Histogram, upto};
use crate::output::{Format, Show, show, table};

/// `thyra requests …`
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: thyra requests --histogram --to bookinfo-reviews\n\
                  Each request by itself: thyra monitor -t request")]
pub(crate) struct Args {
    /// Only pairs whose source holds this text
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    from: String,
    /// Only pairs whose destination holds this text
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    to: String,
    /// Draw how long the requests of each pair took
    #[arg(long)]
    histogram: bool,
}

/// The requests of one pair of identities.
#[derive(Debug, Serialize)]
struct Pair {
    source: String,
    destination: String,
    allowed: u64,
    denied: u64,
    refused: u64,
    /// Milliseconds, on average.
    mean_ms: f64,
    /// Milliseconds; none where it lies beyond the last bound.
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    /// Requests by duration.
    buckets: Vec<Bucket>,
    #[serde(skip)]
    histogram: Histogram,
}

/// Requests that took longer than the bucket before, up to this.
#[derive(Debug, Serialize)]
struct Bucket {
    /// Milliseconds; none for those beyond the last bound.
    upto_ms: Option<f64>,
    requests: u64,
}

#[derive(Debug, Serialize)]
struct Rule {
    policy: String,
    rule: Option<u32>,
    action: String,
    requests: u64,
}

#[derive(Debug, Serialize)]
struct Requests {
    pairs: Vec<Pair>,
    rules: Vec<Rule>,
    missed: u64,
    #[serde(skip)]
    histogram: bool,
}

impl Pair {
    fn new(message: v1::RequestPair, bounds: &[f64]) -> Self {
        let histogram = Histogram::new(message.buckets, bounds, message.seconds);
        let bucket = |(upto_ms, requests): &(Option<f64>, u64)| Bucket {
            upto_ms: *upto_ms,
            requests: *requests,
        };
        Self {
            source: message.source,
            destination: message.destination,
            allowed: message.allowed,
            denied: message.denied,
            refused: message.refused,
            mean_ms: histogram.mean_ms(),
            p50_ms: histogram.quantile_ms(50),
            p99_ms: histogram.quantile_ms(99),
            buckets: histogram.buckets.iter().map(bucket).collect(),
            histogram,
        }
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.source.clone(),
            self.destination.clone(),
            self.allowed.to_string(),
            self.denied.to_string(),
            self.refused.to_string(),
            format!("{:.2}", self.mean_ms),
            upto(self.p50_ms),
            upto(self.p99_ms),
        ]
    }

    fn bars(&self) -> String {
        format!(
            "\n{} -> {}\n{}",
            self.source,
            self.destination,
            self.histogram.bars()
        )
    }
}

impl Show for Requests {
    fn text(&self) -> String {
        let header = [
            "SOURCE",
            "DESTINATION",
            "ALLOWED",
            "DENIED",
            "REFUSED",
            "MEAN MS",
            "P50 MS",
            "P99 MS",
        ];
        let mut text = table(&header, &self.pairs.iter().map(Pair::row).collect::<Vec<_>>());
        if self.histogram {
            text.extend(self.pairs.iter().map(Pair::bars));
        }
        let rule = |rule: &Rule| {
            let index = rule.rule.map_or_else(String::new, |index| format!("#{index}"));
            let policy = match rule.policy.as_str() {
                "" => "no rule",
                policy => policy,
            };
            vec![
                format!("{policy}{index}"),
                rule.action.clone(),
                rule.requests.to_string(),
            ]
        };
        let rules: Vec<Vec<String>> = self.rules.iter().map(rule).collect();
        text += &format!("\n{}", table(&["RULE", "ACTION", "REQUESTS"], &rules));
        if self.missed > 0 {
            text += &format!("\n{} more went by too fast to be counted\n", self.missed);
        }
        text
    }
}

/// Runs the command.
pub(crate) async fn run(args: Args, agent: Agent, format: Format) -> Result<ExitCode> {
    let mut client = agent.connect().await?;
    let reply = client
        .admin
        .list_requests(v1::ListRequestsRequest {})
        .await
        .map_err(refused)?
        .into_inner();
    let wanted =
        |pair: &v1::RequestPair| pair.source.contains(&args.from) && pair.destination.contains(&args.to);
    let pairs = reply.pairs.into_iter().filter(wanted);
    let rule = |v1::RequestRule {
                    policy,
                    rule,
                    action,
                    requests,
                }| Rule {
        policy,
        rule,
        action,
        requests,
    };
    let requests = Requests {
        pairs: pairs.map(|pair| Pair::new(pair, &reply.bounds)).collect(),
        rules: reply.rules.into_iter().map(rule).collect(),
        missed: reply.missed,
        histogram: args.histogram,
    };
    show(&requests, format)?;
    Ok(ExitCode::SUCCESS)
}
