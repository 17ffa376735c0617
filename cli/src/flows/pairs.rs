//! `thyra flows --pairs` and `--histogram`: what the flow log counted, by pair of identities.
//!
//! Invariant: a pair of pods of one node is two lines, one for each end that saw it.

use serde::Serialize;
use thyra_proto::thyra::v1;

use super::Log;
use crate::histogram::{Histogram, upto};
use crate::output::{Show, table};

/// What a histogram shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Of {
    /// From a connection's SYN to its answer, at the pod's interface.
    Connect,
    /// The shortest round trip of each connection, by the pod's own stack.
    Rtt,
}

/// What was counted of one pair.
#[derive(Debug, Serialize)]
struct Pair {
    reporter: String,
    source: String,
    destination: String,
    opened: u64,
    closed: u64,
    denied_packets: u64,
    bytes_to_destination: u64,
    bytes_to_source: u64,
    packets_to_destination: u64,
    packets_to_source: u64,
    retransmits: u64,
    connect: Durations,
    min_rtt: Durations,
}

#[derive(Debug, Serialize)]
struct Durations {
    count: u64,
    /// Milliseconds, on average; none of no connection.
    mean_ms: Option<f64>,
    /// Milliseconds; none where it lies beyond the last bound, or of no connection.
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    buckets: Vec<Bucket>,
    #[serde(skip)]
    histogram: Histogram,
}

/// Connections that took longer than the bucket before, up to this.
#[derive(Debug, Serialize)]
struct Bucket {
    /// Milliseconds; none for those beyond the last bound.
    upto_ms: Option<f64>,
    connections: u64,
}

#[derive(Debug, Serialize)]
pub(super) struct Pairs {
    pairs: Vec<Pair>,
    log: Log,
    #[serde(skip)]
    drawn: Option<Of>,
}

impl Durations {
    fn new(message: Option<v1::FlowHistogram>, bounds: &[f64]) -> Self {
        let v1::FlowHistogram { buckets, seconds } = message.unwrap_or_default();
        let histogram = Histogram::new(buckets, bounds, seconds);
        let count = histogram.total();
        let any = count > 0;
        let bucket = |(upto_ms, connections): &(Option<f64>, u64)| Bucket {
            upto_ms: *upto_ms,
            connections: *connections,
        };
        Self {
            count,
            mean_ms: any.then(|| histogram.mean_ms()),
            p50_ms: histogram.quantile_ms(50).filter(|_| any),
            p99_ms: histogram.quantile_ms(99).filter(|_| any),
            buckets: histogram.buckets.iter().map(bucket).collect(),
            histogram,
        }
    }

    fn quantile(&self, end: Option<f64>) -> String {
        if self.count == 0 {
            "-".to_owned()
        } else {
            upto(end)
        }
    }
}

impl Pair {
    fn new(pair: v1::FlowPair, bounds: &[f64]) -> Self {
        Self {
            reporter: pair.reporter,
            source: pair.source,
            destination: pair.destination,
            opened: pair.opened,
            closed: pair.closed,
            denied_packets: pair.denied_packets,
            bytes_to_destination: pair.bytes_to_destination,
            bytes_to_source: pair.bytes_to_source,
            packets_to_destination: pair.packets_to_destination,
            packets_to_source: pair.packets_to_source,
            retransmits: pair.retransmits,
            connect: Durations::new(pair.connect, bounds),
            min_rtt: Durations::new(pair.min_rtt, bounds),
        }
    }

    fn row(&self) -> Vec<String> {
        vec![
            self.source.clone(),
            self.destination.clone(),
            self.reporter.clone(),
            self.opened.to_string(),
            self.closed.to_string(),
            self.denied_packets.to_string(),
            self.bytes_to_destination.to_string(),
            self.bytes_to_source.to_string(),
            self.connect.quantile(self.connect.p50_ms),
            self.connect.quantile(self.connect.p99_ms),
            self.min_rtt.quantile(self.min_rtt.p50_ms),
            self.min_rtt.quantile(self.min_rtt.p99_ms),
        ]
    }

    fn drawn(&self, of: Of) -> String {
        let (durations, what) = match of {
            Of::Connect => (&self.connect, "SYN to answer"),
            Of::Rtt => (&self.min_rtt, "shortest round trip"),
        };
        if durations.count == 0 {
            return String::new();
        }
        format!(
            "\n{} -> {} ({what}, at the {})\n{}",
            self.source,
            self.destination,
            self.reporter,
            durations.histogram.bars()
        )
    }
}

impl Pairs {
    pub(super) fn new(reply: v1::ListFlowPairsResponse, (from, to): (&str, &str), drawn: Option<Of>) -> Self {
        let wanted = |pair: &v1::FlowPair| pair.source.contains(from) && pair.destination.contains(to);
        let pairs = reply.pairs.into_iter().filter(wanted);
        Self {
            pairs: pairs.map(|pair| Pair::new(pair, &reply.bounds)).collect(),
            log: reply.log.unwrap_or_default().into(),
            drawn,
        }
    }
}

impl Show for Pairs {
    fn text(&self) -> String {
        let header = [
            "SOURCE",
            "DESTINATION",
            "SEEN AT",
            "OPENED",
            "CLOSED",
            "DENIED",
            "BYTES >",
            "BYTES <",
            "CONNECT P50 MS",
            "P99 MS",
            "RTT P50 MS",
            "P99 MS",
        ];
        let mut text = table(&header, &self.pairs.iter().map(Pair::row).collect::<Vec<_>>());
        if let Some(of) = self.drawn {
            text.extend(self.pairs.iter().map(|pair| pair.drawn(of)));
        }
        text + &self.log.text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pair_is_drawn_once_anything_was_measured() {
        let pair = |buckets: Vec<u64>| {
            let message = v1::FlowPair {
                source: "a".into(),
                destination: "b".into(),
                reporter: "source".into(),
                connect: Some(v1::FlowHistogram {
                    buckets,
                    seconds: 0.001,
                }),
                ..v1::FlowPair::default()
            };
            Pair::new(message, &[0.001])
        };
        let one = pair(vec![1, 0]);
        assert_eq!(
            one.drawn(Of::Connect),
            format!(
                "\na -> b (SYN to answer, at the source)\n{:>10} ms  {} 1\n",
                "<= 1",
                "#".repeat(40)
            )
        );
        assert_eq!(one.drawn(Of::Rtt), "", "nothing measured");
        assert_eq!(one.row()[8..], ["<= 1", "<= 1", "-", "-"]);
        assert_eq!(pair(vec![0, 0]).connect.mean_ms, None);
    }
}
