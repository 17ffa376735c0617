//! What Prometheus sees.
//!
//! Invariant: numbers of the kernel are read from the kernel on each scrape; nothing is counted twice.

mod flows;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, LabelSetEncoder, MetricEncoder};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use thyra_datapath_abi::tables::Verdict;
use thyra_node_proxy_bridge::hold::Counts;

use self::flows::FlowCounts;
use crate::board::Board;
use crate::by_pair;
use crate::flows::Flows;
use crate::requests::{BOUNDS, Counted, Requests};
use crate::store::{SharedPlane, lock};
use crate::word;

/// Metrics that the agent itself counts.
#[derive(Debug)]
pub struct Metrics {
    /// Seconds from news received to enforced.
    pub propagation: Histogram,
    /// Generation that is enforced.
    pub generation: Gauge,
    /// Endpoints of this node.
    pub endpoints: Gauge,
    /// States that could not be enforced.
    pub refused: Counter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            // 0.25 ms to about 2 s.
            propagation: Histogram::new(exponential_buckets(0.000_25, 2.0, 14)),
            generation: Gauge::default(),
            endpoints: Gauge::default(),
            refused: Counter::default(),
        }
    }
}

/// All metrics, ready to be scraped.
#[must_use]
pub fn registry(
    metrics: &Metrics,
    plane: SharedPlane,
    board: Arc<Board>,
    requests: Arc<Requests>,
    flows: Arc<Flows>,
) -> Registry {
    let mut registry = Registry::with_prefix("thyra");
    let seconds = "Seconds from the arrival of news to its enforcement";
    registry.register("policy_propagation_seconds", seconds, metrics.propagation.clone());
    registry.register(
        "generation",
        "Generation of the tables that are enforced",
        metrics.generation.clone(),
    );
    registry.register(
        "endpoints",
        "Pods of this node that are endpoints",
        metrics.endpoints.clone(),
    );
    registry.register(
        "refused_states",
        "States that could not be enforced",
        metrics.refused.clone(),
    );
    registry.register_collector(Box::new(KernelCounters(plane)));
    registry.register_collector(Box::new(SourceAges(board)));
    registry.register_collector(Box::new(RequestCounts(requests)));
    registry.register_collector(Box::new(FlowCounts(flows)));
    registry
}

/// Adds what becomes of connections that are held.
pub fn held(registry: &mut Registry, counts: Arc<Counts>) {
    registry.register_collector(Box::new(HeldCounts(counts)));
}

#[derive(Debug)]
struct HeldCounts(Arc<Counts>);

impl Collector for HeldCounts {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let help = "Connections whose first bytes were held, by what became of them";
        let mut ends = encoder.encode_descriptor("held_connections", help, None, MetricType::Counter)?;
        for (end, counter) in [
            ("allowed", &self.0.allowed),
            ("refused", &self.0.refused),
            ("late", &self.0.late),
            ("conflict", &self.0.conflicts),
        ] {
            ConstCounter::new(of(counter)).encode(ends.encode_family(&[("end", end)])?)?;
        }
        let help = "Segments of connections to be held that were dropped for want of room";
        let full = encoder.encode_descriptor("held_full", help, None, MetricType::Counter)?;
        ConstCounter::new(of(&self.0.full)).encode(full)?;
        let help = "Connections whose first bytes are held now";
        let now = encoder.encode_descriptor("held_now", help, None, MetricType::Gauge)?;
        ConstGauge::new(i64::try_from(of(&self.0.held)).unwrap_or(i64::MAX)).encode(now)
    }
}

struct KernelCounters(SharedPlane);

impl fmt::Debug for KernelCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KernelCounters")
    }
}

impl Collector for KernelCounters {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let plane = lock::read(&self.0);
        // Counters that can't be read are left out, as Prometheus expects.
        let counts = plane.counts().unwrap_or_default();
        let mut drops =
            encoder.encode_descriptor("drops", "Packets that did not go on", None, MetricType::Counter)?;
        for (reason, counter) in counts.reasons.iter().filter(|(r, _)| word::is_refusal(*r)) {
            let labels = [("reason", reason.text())];
            ConstCounter::new(counter.packets).encode(drops.encode_family(&labels)?)?;
        }
        let help = "Packets by the verdict that judged them";
        let mut verdicts = encoder.encode_descriptor("verdicts", help, None, MetricType::Counter)?;
        for (id, counter) in &counts.verdicts {
            let Some(verdict) = plane.verdict(*id) else {
                continue;
            };
            ConstCounter::new(counter.packets).encode(verdicts.encode_family(&VerdictLabels(verdict))?)?;
        }
        let help = "Events that were not written: the ring was full, or the budget of refusals spent";
        let lost = encoder.encode_descriptor("lost_events", help, None, MetricType::Counter)?;
        ConstCounter::new(counts.lost).encode(lost)?;
        let status = plane.status();
        let help = "Endpoints whose connections with each other go straight (--local-redirect)";
        let redirected =
            encoder.encode_descriptor("local_redirect_endpoints", help, None, MetricType::Gauge)?;
        ConstGauge::new(i64::try_from(status.redirected).unwrap_or(i64::MAX)).encode(redirected)?;
        let help = "Used share of a map, 0 to 1";
        let mut fill = encoder.encode_descriptor("map_fill", help, None, MetricType::Gauge)?;
        for map in status.maps {
            ConstGauge::new(share(map.used, map.capacity))
                .encode(fill.encode_family(&[("map", map.name)])?)?;
        }
        Ok(())
    }
}

fn share(used: u64, capacity: u64) -> f64 {
    let small = |n: u64| f64::from(u32::try_from(n).unwrap_or(u32::MAX));
    if capacity == 0 {
        0.0
    } else {
        small(used) / small(capacity)
    }
}

#[derive(Debug)]
struct RequestCounts(Arc<Requests>);

impl Collector for RequestCounts {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let Counted { pairs, rules, missed } = self.0.counted();
        let help = "Requests that Envoy judged, by the rule that decided";
        let mut requests = encoder.encode_descriptor("requests", help, None, MetricType::Counter)?;
        for ((rule, outcome), count) in &rules {
            let policy = rule.as_ref().map(|rule| rule.policy.to_string());
            let index = rule.as_ref().and_then(|rule| rule.rule);
            let labels = [
                ("policy", policy.unwrap_or_default()),
                ("rule", index.map(|index| index.to_string()).unwrap_or_default()),
                ("action", outcome.text().to_owned()),
            ];
            ConstCounter::new(*count).encode(requests.encode_family(&labels)?)?;
        }
        let help = "Requests that Envoy judged and that went by too fast to be counted";
        let lost = encoder.encode_descriptor("missed_requests", help, None, MetricType::Counter)?;
        ConstCounter::new(missed).encode(lost)?;
        let help = "How long requests through Envoy took, in seconds";
        let name = "request_duration_seconds";
        let mut durations = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
        for ((source, destination), pair) in &pairs {
            let labels = [("source", &**source), ("destination", &**destination)];
            encode_durations(durations.encode_family(&labels)?, &BOUNDS, &pair.durations)?;
        }
        Ok(())
    }
}

/// The durations of one pair.
fn encode_durations<const BUCKETS: usize>(
    mut encoder: MetricEncoder<'_>,
    bounds: &[f64],
    durations: &by_pair::Histogram<BUCKETS>,
) -> Result<(), fmt::Error> {
    let bounds = bounds.iter().copied().chain([f64::INFINITY]);
    let buckets: Vec<(f64, u64)> = bounds.zip(durations.buckets).collect();
    let (took, total) = (durations.took.as_secs_f64(), durations.total());
    encoder.encode_histogram::<[(&str, &str); 0]>(took, total, &buckets, None)
}

#[derive(Debug)]
struct VerdictLabels(Verdict);

impl prometheus_client::encoding::EncodeLabelSet for VerdictLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder) -> Result<(), fmt::Error> {
        use prometheus_client::encoding::EncodeLabel;
        let rule = self.0.rule.as_ref();
        let policy = rule.map_or_else(String::new, |r| r.policy.to_string());
        let index = rule
            .and_then(|r| r.rule)
            .map_or_else(String::new, |i| i.to_string());
        ("policy", policy).encode(encoder.encode_label())?;
        ("rule", index).encode(encoder.encode_label())?;
        ("action", word::action(self.0.cell_action())).encode(encoder.encode_label())?;
        ("reason", self.0.reason.text()).encode(encoder.encode_label())
    }
}

#[derive(Debug)]
struct SourceAges(Arc<Board>);

impl Collector for SourceAges {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs());
        let sources = self.0.all();
        let help = "Seconds since a source last told anything";
        let mut age = encoder.encode_descriptor("xds_age_seconds", help, None, MetricType::Gauge)?;
        for source in sources.iter().filter(|s| s.last_push_unix != 0) {
            let seconds = i64::try_from(now.saturating_sub(source.last_push_unix)).unwrap_or(i64::MAX);
            ConstGauge::new(seconds).encode(age.encode_family(&[("source", source.name.clone())])?)?;
        }
        let help = "1 while a source is connected";
        let mut connected = encoder.encode_descriptor("xds_connected", help, None, MetricType::Gauge)?;
        for source in &sources {
            let up = i64::from(matches!(source.state.as_str(), "synced" | "syncing"));
            ConstGauge::new(up).encode(connected.encode_family(&[("source", source.name.clone())])?)?;
        }
        let help = "Resources that are refused right now";
        let mut rejected = encoder.encode_descriptor("xds_rejected", help, None, MetricType::Gauge)?;
        for source in &sources {
            let number = i64::try_from(source.rejected).unwrap_or(i64::MAX);
            ConstGauge::new(number).encode(rejected.encode_family(&[("source", source.name.clone())])?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scrape_has_the_requests_with_cumulative_buckets() {
        let requests = Arc::new(Requests::default());
        let mut registry = Registry::with_prefix("thyra");
        registry.register_collector(Box::new(RequestCounts(Arc::clone(&requests))));
        requests.add_for_test(&[300, 700, 9_000_000]);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("a string takes all");
        for line in [
            r#"thyra_requests_total{policy="",rule="",action="refused"} 3"#,
            r#"thyra_request_duration_seconds_bucket{source="a",destination="b",le="0.0005"} 1"#,
            r#"thyra_request_duration_seconds_bucket{source="a",destination="b",le="4.096"} 2"#,
            r#"thyra_request_duration_seconds_bucket{source="a",destination="b",le="+Inf"} 3"#,
            r#"thyra_request_duration_seconds_count{source="a",destination="b"} 3"#,
        ] {
            let found = text.lines().any(|found| {
                // Labels come in any order.
                let parts = |line: &str| {
                    let mut parts: Vec<String> = line.split([',', '{', '}']).map(str::to_owned).collect();
                    parts.sort();
                    parts
                };
                parts(found) == parts(line)
            });
            assert!(found, "{line}\n{text}");
        }
    }
}
