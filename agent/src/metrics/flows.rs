//! What Prometheus sees of the flow log.
//!
//! Invariant: no more pairs than the flow log tells apart.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;

use super::encode_durations;
use crate::flows::Flows;
use crate::flows::pairs::{BOUNDS, Counted, Durations, Ends, Pair};

#[derive(Debug)]
pub(super) struct FlowCounts(pub(super) Arc<Flows>);

/// A counter of a pair: name, help, which.
type Number = (&'static str, &'static str, fn(&Pair) -> u64);
/// The same with a direction's worth of traffic each.
type Traffic = (&'static str, &'static str, [fn(&Pair) -> u64; 2]);

const NUMBERS: [Number; 4] = [
    (
        "tcp_connections_opened",
        "TCP connections that the flow log saw begin",
        |p| p.opened,
    ),
    (
        "tcp_connections_closed",
        "TCP connections that the flow log saw end",
        |p| p.closed,
    ),
    (
        "tcp_retransmits",
        "Segments sent again by this node's end of connections that ended",
        |p| p.traffic.retransmits,
    ),
    (
        "denied_packets",
        "Packets refused, as far as they were reported",
        |p| p.denied,
    ),
];
const TRAFFIC: [Traffic; 2] = [
    (
        "tcp_bytes",
        "Payload of TCP connections that ended",
        [|p| p.traffic.bytes_to_destination, |p| p.traffic.bytes_to_source],
    ),
    (
        "tcp_packets",
        "Segments of TCP connections that ended",
        [
            |p| p.traffic.packets_to_destination,
            |p| p.traffic.packets_to_source,
        ],
    ),
];
const DIRECTIONS: [&str; 2] = ["to_destination", "to_source"];

fn labels(ends: &Ends) -> [(&'static str, &str); 3] {
    [
        ("reporter", ends.reporter),
        ("source", &ends.source),
        ("destination", &ends.destination),
    ]
}

fn histogram(
    encoder: &mut DescriptorEncoder<'_>,
    (name, help): (&str, &str),
    counted: &Counted,
    of: fn(&Pair) -> &Durations,
) -> Result<(), fmt::Error> {
    let mut durations = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
    for (ends, pair) in counted {
        encode_durations(durations.encode_family(&labels(ends))?, &BOUNDS, of(pair))?;
    }
    Ok(())
}

impl Collector for FlowCounts {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let counted = self.0.counted();
        for (name, help, of) in NUMBERS {
            let mut numbers = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (ends, pair) in &counted {
                ConstCounter::new(of(pair)).encode(numbers.encode_family(&labels(ends))?)?;
            }
        }
        for (name, help, of) in TRAFFIC {
            let mut numbers = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (ends, pair) in &counted {
                for (direction, of) in DIRECTIONS.into_iter().zip(of) {
                    let [reporter, source, destination] = labels(ends);
                    let labels = [reporter, source, destination, ("direction", direction)];
                    ConstCounter::new(of(pair)).encode(numbers.encode_family(&labels)?)?;
                }
            }
        }
        let help = "From a SYN to its answer at the pod's interface, in seconds";
        histogram(
            &mut encoder,
            ("tcp_connect_duration_seconds", help),
            &counted,
            |pair| &pair.connect,
        )?;
        let help = "Shortest round trip of each TCP connection that ended, in seconds";
        histogram(&mut encoder, ("tcp_min_rtt_seconds", help), &counted, |pair| {
            &pair.min_rtt
        })
    }
}
