//! What the programs have counted, summed over the CPUs.
//!
//! Invariant: a counter only grows while its verdict id keeps its meaning; it is set to zero before the id
//! gets another one.

use std::collections::BTreeMap;

use aya::maps::{Map, MapData, MapError, PerCpuArray, PerCpuValues};
use thyra_datapath_abi::Reason;
use thyra_datapath_abi::maps::{EndpointCounter, ReasonCounter, VerdictCounter};

/// All counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// By verdict id; ids that have a name or are in the live tables.
    pub verdicts: BTreeMap<u16, VerdictCounter>,
    /// By reason; those that ever happened.
    pub reasons: BTreeMap<Reason, ReasonCounter>,
    /// By endpoint id; those that are attached.
    pub endpoints: BTreeMap<u16, EndpointCounter>,
    /// Events that found the ring full.
    pub lost_events: u64,
}

pub(crate) struct CounterMaps {
    pub(crate) verdicts: PerCpuArray<MapData, [u64; 3]>,
    pub(crate) reasons: PerCpuArray<MapData, [u64; 2]>,
    pub(crate) endpoints: PerCpuArray<MapData, [u64; 4]>,
    pub(crate) lost: PerCpuArray<MapData, u64>,
}

impl CounterMaps {
    pub(crate) fn new(
        verdicts: MapData,
        reasons: MapData,
        endpoints: MapData,
        lost: MapData,
    ) -> Result<Self, MapError> {
        Ok(Self {
            verdicts: PerCpuArray::try_from(Map::PerCpuArray(verdicts))?,
            reasons: PerCpuArray::try_from(Map::PerCpuArray(reasons))?,
            endpoints: PerCpuArray::try_from(Map::PerCpuArray(endpoints))?,
            lost: PerCpuArray::try_from(Map::PerCpuArray(lost))?,
        })
    }

    pub(crate) fn read(
        &self,
        verdicts: impl Iterator<Item = u16>,
        endpoints: impl Iterator<Item = u16>,
    ) -> Result<Counters, MapError> {
        let mut counters = Counters::default();
        for id in verdicts {
            let [packets, bytes, connections] = sum(&self.verdicts.get(&u32::from(id), 0)?);
            counters.verdicts.insert(
                id,
                VerdictCounter {
                    packets,
                    bytes,
                    connections,
                },
            );
        }
        for reason in Reason::ALL {
            let [packets, bytes] = sum(&self.reasons.get(&u32::from(reason_number(*reason)), 0)?);
            if packets != 0 {
                counters.reasons.insert(*reason, ReasonCounter { packets, bytes });
            }
        }
        for id in endpoints {
            let [to_pod_packets, from_pod_packets, to_pod_dropped, from_pod_dropped] =
                sum(&self.endpoints.get(&u32::from(id), 0)?);
            let counter = EndpointCounter {
                to_pod_packets,
                from_pod_packets,
                to_pod_dropped,
                from_pod_dropped,
            };
            counters.endpoints.insert(id, counter);
        }
        counters.lost_events = self.lost.get(&0, 0)?.iter().copied().fold(0, u64::wrapping_add);
        Ok(counters)
    }

    /// Sets a verdict's counter to zero. No program may still count under the id.
    pub(crate) fn reset_verdict(&mut self, id: u16) -> Result<(), MapError> {
        let cpus = self.verdicts.get(&u32::from(id), 0)?.len();
        self.verdicts
            .set(u32::from(id), PerCpuValues::try_from(vec![[0; 3]; cpus])?, 0)
    }

    /// Sets an endpoint's counter to zero.
    pub(crate) fn reset_endpoint(&mut self, id: u16) -> Result<(), MapError> {
        let cpus = self.endpoints.get(&u32::from(id), 0)?.len();
        self.endpoints
            .set(u32::from(id), PerCpuValues::try_from(vec![[0; 4]; cpus])?, 0)
    }
}

#[expect(
    clippy::as_conversions,
    reason = "a fieldless enum with `repr(u8)` has no other way to its number"
)]
pub(crate) const fn reason_number(reason: Reason) -> u8 {
    reason as u8
}

fn sum<const N: usize>(cpus: &PerCpuValues<[u64; N]>) -> [u64; N] {
    let mut total = [0_u64; N];
    for cpu in cpus.iter() {
        for (sum, value) in total.iter_mut().zip(cpu) {
            *sum = sum.wrapping_add(*value);
        }
    }
    total
}
