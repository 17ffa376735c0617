//! Flows by pair of identities: how many, how much, how long they took to be answered.
//!
//! Invariant: a flow is counted once at each end that is an endpoint of this node; pairs beyond the limit are counted
//! together.

use std::collections::BTreeMap;
use std::time::Duration;

use thyra_proto::thyra::v1 as api;

use super::record;
use crate::by_pair::{Histogram, OTHERS, UNKNOWN, told_apart};

/// Upper ends of the histograms' buckets, seconds; one more bucket takes the rest.
pub const BOUNDS: [f64; 16] = [
    0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256,
    0.512, 1.024, 4.096,
];

/// Who was seen talking to whom, and at which end.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ends {
    /// `source` or `destination`: the end that is an endpoint.
    pub reporter: &'static str,
    /// Principal of who opens connections.
    pub source: String,
    /// Principal of who accepts them.
    pub destination: String,
}

/// Durations, by `BOUNDS`.
pub type Durations = Histogram<{ BOUNDS.len() + 1 }>;

/// What was counted of one pair.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Pair {
    /// Connections that began.
    pub opened: u64,
    /// Connections that ended.
    pub closed: u64,
    /// Packets that were refused.
    pub denied: u64,
    /// What went over those that ended.
    pub traffic: api::FlowTraffic,
    /// From SYN to answer.
    pub connect: Durations,
    /// Shortest round trip of each that ended.
    pub min_rtt: Durations,
}

/// All that was counted.
pub type Counted = BTreeMap<Ends, Pair>;

/// The counters.
#[derive(Debug, Default)]
pub(super) struct Pairs(Counted);

impl Pairs {
    pub(super) fn counted(&self) -> &Counted {
        &self.0
    }

    pub(super) fn opened(&mut self, flow: &api::Flow) {
        self.of(flow).opened += 1;
    }

    pub(super) fn answered(&mut self, flow: &api::Flow, took: Duration) {
        self.of(flow).connect.add(&BOUNDS, took);
    }

    pub(super) fn denied(&mut self, flow: &api::Flow) {
        self.of(flow).denied += flow.denied_packets;
    }

    pub(super) fn closed(&mut self, flow: &api::Flow) {
        let pair = self.of(flow);
        pair.closed += 1;
        let Some(traffic) = &flow.traffic else {
            return;
        };
        pair.traffic.bytes_to_destination += traffic.bytes_to_destination;
        pair.traffic.bytes_to_source += traffic.bytes_to_source;
        pair.traffic.packets_to_destination += traffic.packets_to_destination;
        pair.traffic.packets_to_source += traffic.packets_to_source;
        pair.traffic.retransmits += traffic.retransmits;
        if let Some(micros) = traffic.min_rtt_us {
            pair.min_rtt.add(&BOUNDS, Duration::from_micros(micros));
        }
    }

    fn of(&mut self, flow: &api::Flow) -> &mut Pair {
        let name = |principal: &str| match principal {
            "" => UNKNOWN.to_owned(),
            known => known.to_owned(),
        };
        let reporter = if flow.direction == record::OUT {
            "source"
        } else {
            "destination"
        };
        let ends = Ends {
            reporter,
            source: name(&flow.source_principal),
            destination: name(&flow.destination_principal),
        };
        let ends = told_apart(&self.0, ends, || Ends {
            reporter,
            source: OTHERS.to_owned(),
            destination: OTHERS.to_owned(),
        });
        self.0.entry(ends).or_default()
    }
}

fn histogram(durations: &Durations) -> api::FlowHistogram {
    api::FlowHistogram {
        buckets: durations.buckets.to_vec(),
        seconds: durations.took.as_secs_f64(),
    }
}

/// The counters as the admin API tells them.
#[must_use]
pub fn to_api(counted: &Counted) -> Vec<api::FlowPair> {
    let pair = |(ends, pair): (&Ends, &Pair)| api::FlowPair {
        reporter: ends.reporter.to_owned(),
        source: ends.source.clone(),
        destination: ends.destination.clone(),
        opened: pair.opened,
        closed: pair.closed,
        denied_packets: pair.denied,
        bytes_to_destination: pair.traffic.bytes_to_destination,
        bytes_to_source: pair.traffic.bytes_to_source,
        packets_to_destination: pair.traffic.packets_to_destination,
        packets_to_source: pair.traffic.packets_to_source,
        retransmits: pair.traffic.retransmits,
        connect: Some(histogram(&pair.connect)),
        min_rtt: Some(histogram(&pair.min_rtt)),
    };
    counted.iter().map(pair).collect()
}
