//! Whether every packet that a pod receives has met `to_pod`: what its interface has received, against what the
//! program has counted.
//!
//! Invariant: the program counts every packet that it sees, also those that it drops. At the host end it does so before
//! the interface does: the counters are read before and after the interface, so what arrives meanwhile never shows as
//! missed. Inside the pod (`Place::Pod`) the interface is first, so what has just arrived is waited for.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use netlink_packet_route::link::LinkAttribute;
use thyra_datapath_abi::count::EndpointCounter;

use crate::datapath::Datapath;
use crate::direct::attributes;
use crate::hook::Place;
use crate::open::endpoint_numbers;

/// A packet that has arrived in a pod waits for its program no longer than a turn of the kernel's queue of them takes.
const STEP: Duration = Duration::from_millis(5);
/// How many such steps are waited.
const PATIENCE: u32 = 10;

/// Packets at one moment.
#[derive(Clone, Copy, Debug)]
struct Sample {
    ifindex: u32,
    received: u64,
    /// What the program had counted before and after `received` was read.
    seen: [u64; 2],
}

/// What was found at the last check.
#[derive(Debug, Default)]
pub(crate) struct Coverage {
    last: BTreeMap<u16, Sample>,
    missed: BTreeMap<u16, u64>,
}

impl Coverage {
    /// Packets that went past the program between the last two checks.
    pub(crate) fn missed(&self, endpoint: u16) -> Option<u64> {
        self.missed.get(&endpoint).copied()
    }

    /// Takes the next samples; endpoints that missed packets now and did not before.
    fn take(&mut self, samples: BTreeMap<u16, Sample>) -> Vec<(u16, u64)> {
        let missed: BTreeMap<u16, u64> = samples
            .iter()
            .filter_map(|(id, now)| Some((*id, past(self.last.get(id)?, now)?)))
            .collect();
        let news = missed.iter().filter(|(id, _)| !self.missed.contains_key(id));
        let news = news.map(|(id, count)| (*id, *count)).collect();
        self.last = samples;
        self.missed = missed;
        news
    }
}

/// Packets that were surely received and not seen between two samples of one interface.
fn past(before: &Sample, now: &Sample) -> Option<u64> {
    let received = now.received.checked_sub(before.received)?;
    let seen = now.seen[1].checked_sub(before.seen[0])?;
    let past = received.checked_sub(seen).filter(|past| *past > 0)?;
    (before.ifindex == now.ifindex).then_some(past)
}

impl Datapath {
    /// Compares what the pods' interfaces have received with what the programs have seen since the last call. Returns
    /// the endpoints that packets reach past the program, and how many did, when that is news. Call it every few
    /// seconds; `status` tells the last answer.
    pub fn check_coverage(&mut self) -> Vec<(u16, u64)> {
        let before = self.counters().endpoints;
        let attached = endpoint_numbers().filter_map(|id| {
            let ifindex = self.memory.record(id).ifindex;
            // An interface that is not one end of a veth can't be asked.
            let received = (ifindex != 0).then(|| received_by_pod(ifindex).ok().flatten())??;
            Some((id, ifindex, received))
        });
        let received: Vec<(u16, u32, u64)> = attached.collect();
        let after = self.seen_by_now(&received);
        let sample = |(id, ifindex, received): (u16, u32, u64)| {
            let seen = [&before, &after].map(|counters| counters.get(&id).map_or(0, seen));
            (
                id,
                Sample {
                    ifindex,
                    received,
                    seen,
                },
            )
        };
        let samples = received.into_iter().map(sample).collect();
        self.coverage.take(samples)
    }
}

impl Datapath {
    /// What the programs have seen after `received` was read: inside pods, once they have seen all of that, or will
    /// not.
    fn seen_by_now(&self, received: &[(u16, u32, u64)]) -> BTreeMap<u16, EndpointCounter> {
        let mut now = self.counters().endpoints;
        let patience = match self.config.place {
            Place::Host => 0,
            Place::Pod => PATIENCE,
        };
        for _ in 0..patience {
            let is_behind = received.iter().any(|(id, _, received)| {
                let last = self.coverage.last.get(id);
                let since = |last: &Sample| (received.checked_sub(last.received), last.seen[0]);
                let (Some(arrived), before) = last.map_or((None, 0), since) else {
                    return false;
                };
                now.get(id).map_or(0, seen).saturating_sub(before) < arrived
            });
            if !is_behind {
                break;
            }
            std::thread::sleep(STEP);
            now = self.counters().endpoints;
        }
        now
    }
}

fn seen(counter: &EndpointCounter) -> u64 {
    counter.to_pod_packets.saturating_add(counter.to_pod_dropped)
}

/// Packets that the far end of a veth, in its own namespace, has received; none for any other interface.
fn received_by_pod(ifindex: u32) -> io::Result<Option<u64>> {
    let (mut peer, mut namespace) = (None, None);
    for attribute in attributes(ifindex, None)? {
        match attribute {
            LinkAttribute::Link(index) => peer = Some(index),
            LinkAttribute::LinkNetNsId(id) => namespace = Some(id),
            _ => {}
        }
    }
    let (Some(peer), Some(namespace)) = (peer, namespace) else {
        return Ok(None);
    };
    let received = |attribute| match attribute {
        LinkAttribute::Stats64(stats) => Some(stats.rx_packets),
        _ => None,
    };
    Ok(attributes(peer, Some(namespace))?.into_iter().find_map(received))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(coverage: &mut Coverage, ifindex: u32, received: u64, seen: u64) -> Vec<(u16, u64)> {
        let seen = [seen; 2];
        let sample = Sample {
            ifindex,
            received,
            seen,
        };
        coverage.take([(7, sample)].into())
    }

    #[test]
    fn what_arrives_while_it_is_looked_is_not_missed() {
        let mut coverage = Coverage::default();
        let mut look = |received, seen| {
            let ifindex = 3;
            let sample = Sample {
                ifindex,
                received,
                seen,
            };
            coverage.take([(7, sample)].into())
        };
        // A thousand arrive between the first look at the counters and the second, whenever the interface is read.
        assert_eq!(look(0, [0, 1000]), []);
        assert_eq!(look(2000, [1000, 2000]), []);
        assert_eq!(look(2000, [2000, 3000]), []);
        assert_eq!(look(9000, [3000, 4000]), [(7, 5000)]);
    }

    #[test]
    fn only_what_went_past_since_the_last_check_counts_and_is_told_once() {
        let mut coverage = Coverage::default();
        assert_eq!(
            taken(&mut coverage, 3, 100, 0),
            [],
            "before the first check nothing is known"
        );
        assert_eq!(
            taken(&mut coverage, 3, 200, 150),
            [],
            "more was seen than received: some was dropped"
        );
        assert_eq!(taken(&mut coverage, 3, 260, 200), [(7, 10)]);
        assert_eq!(taken(&mut coverage, 3, 280, 210), [], "no news");
        assert_eq!(coverage.missed(7), Some(10));
        assert_eq!(taken(&mut coverage, 3, 290, 220), []);
        assert_eq!(coverage.missed(7), None);
        assert_eq!(taken(&mut coverage, 4, 400, 220), [], "another interface");
    }

    #[test]
    fn loopback_has_no_far_end() {
        assert_eq!(received_by_pod(1).unwrap(), None);
    }
}
