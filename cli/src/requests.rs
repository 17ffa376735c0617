//! `thyra requests`: what Envoy judged since the agent started, and how long it took.
//!
//! Invariant: a quantile is the upper end of the bucket that holds it, never a guess inside it.

use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;
use thyra_proto::thyra::v1;

use crate::client::{Agent, refused};
use crate::output::{Format, Show, show, table};

/// Widest bar of a histogram, characters.
const BAR: u64 = 40;

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
        let ends = bounds.iter().map(|bound| Some(bound * 1e3)).chain([None]);
        let buckets = ends.zip(message.buckets);
        let buckets: Vec<Bucket> = buckets
            .map(|(upto_ms, requests)| Bucket { upto_ms, requests })
            .collect();
        let all: u64 = buckets.iter().map(|bucket| bucket.requests).sum();
        let mean_ms = message.seconds * 1e3 / f64::from(u32::try_from(all.max(1)).unwrap_or(u32::MAX));
        Self {
            source: message.source,
            destination: message.destination,
            allowed: message.allowed,
            denied: message.denied,
            refused: message.refused,
            mean_ms,
            p50_ms: quantile(&buckets, all, 50),
            p99_ms: quantile(&buckets, all, 99),
            buckets,
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
        let most = self.buckets.iter().map(|b| b.requests).max().unwrap_or(0).max(1);
        let mut text = format!("\n{} -> {}\n", self.source, self.destination);
        for bucket in self.buckets.iter().filter(|bucket| bucket.requests > 0) {
            let length = (bucket.requests * BAR).div_ceil(most);
            let bar = "#".repeat(usize::try_from(length).unwrap_or(0));
            text += &format!("{:>10} ms  {bar} {}\n", upto(bucket.upto_ms), bucket.requests);
        }
        text
    }
}

/// The end of the bucket that holds the request at `percent` of `all`.
fn quantile(buckets: &[Bucket], all: u64, percent: u64) -> Option<f64> {
    let wanted = (all * percent).div_ceil(100);
    let mut seen = 0;
    buckets
        .iter()
        .find(|bucket| {
            seen += bucket.requests;
            seen >= wanted
        })
        .and_then(|bucket| bucket.upto_ms)
}

fn upto(end: Option<f64>) -> String {
    end.map_or_else(|| "more".to_owned(), |end| format!("<= {end}"))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(buckets: &[u64]) -> Pair {
        let message = v1::RequestPair {
            buckets: buckets.to_vec(),
            seconds: 0.1,
            ..v1::RequestPair::default()
        };
        Pair::new(message, &[0.001, 0.002])
    }

    #[test]
    fn a_quantile_is_the_end_of_its_bucket() {
        let one = pair(&[98, 1, 1]);
        assert_eq!((one.p50_ms, one.p99_ms), (Some(1.0), Some(2.0)));
        assert_eq!(pair(&[1, 0, 99]).p50_ms, None);
        assert_eq!(pair(&[0, 0, 0]).mean_ms, 100.0, "no request, no division by it");
    }
}
