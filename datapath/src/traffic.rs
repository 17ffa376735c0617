//! What the kernel knows of a TCP connection's traffic: `struct tcp_info` of
//! <https://github.com/torvalds/linux/blob/v6.6/include/uapi/linux/tcp.h>.
//!
//! Invariant: a kernel that tells less (fields are only ever added at the end) is not taken to have told zero.

use std::time::Duration;

/// Attribute of a socket's answer, `INET_DIAG_INFO`.
pub(crate) const INFO: u16 = 2;
/// The bit that asks for it.
pub(crate) const WANTED: u8 = 1 << (INFO - 1);

/// Where fields begin, bytes.
const RTT: usize = 68;
const TOTAL_RETRANS: usize = 100;
const BYTES_RECEIVED: usize = 128;
const SEGS_OUT: usize = 136;
const SEGS_IN: usize = 140;
const MIN_RTT: usize = 148;
const BYTES_SENT: usize = 200;
const BYTES_RETRANS: usize = 208;

/// The traffic of one connection, as the pod's own stack counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Traffic {
    /// Payload that the pod sent, each byte once.
    pub bytes_sent: u64,
    /// Payload that it received; the other side's FIN counts as a byte.
    pub bytes_received: u64,
    /// Segments that it sent, those without payload and those sent again included.
    pub packets_sent: u64,
    /// Segments that it received.
    pub packets_received: u64,
    /// Segments that it sent again.
    pub retransmits: u64,
    /// Shortest round trip of the last five minutes (`net.ipv4.tcp_min_rtt_wlen`); none before the first.
    pub min_rtt: Option<Duration>,
    /// Smoothed round trip; none before the first.
    pub rtt: Option<Duration>,
}

impl Traffic {
    /// Out of a `tcp_info`; none of a kernel before 4.19, which doesn't tell all of it.
    pub(crate) fn read(info: &[u8]) -> Option<Self> {
        Some(Self {
            bytes_sent: long(info, BYTES_SENT)?.saturating_sub(long(info, BYTES_RETRANS)?),
            bytes_received: long(info, BYTES_RECEIVED)?,
            packets_sent: short(info, SEGS_OUT)?.into(),
            packets_received: short(info, SEGS_IN)?.into(),
            retransmits: short(info, TOTAL_RETRANS)?.into(),
            min_rtt: round_trip(short(info, MIN_RTT)?),
            rtt: round_trip(short(info, RTT)?),
        })
    }
}

/// Microseconds; all bits are set, or none, where nothing was measured.
fn round_trip(micros: u32) -> Option<Duration> {
    (micros != 0 && micros != u32::MAX).then(|| Duration::from_micros(micros.into()))
}

fn short(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_tells_less_tells_nothing() {
        let mut info = [0; 248];
        info[BYTES_SENT..][..8].copy_from_slice(&9_000_u64.to_ne_bytes());
        info[BYTES_RETRANS..][..8].copy_from_slice(&1_000_u64.to_ne_bytes());
        info[MIN_RTT..][..4].copy_from_slice(&u32::MAX.to_ne_bytes());
        info[RTT..][..4].copy_from_slice(&250_u32.to_ne_bytes());
        let traffic = Traffic::read(&info).unwrap();
        assert_eq!(traffic.bytes_sent, 8_000);
        assert_eq!(
            (traffic.min_rtt, traffic.rtt),
            (None, Some(Duration::from_micros(250)))
        );
        assert_eq!(Traffic::read(&info[..BYTES_RETRANS + 7]), None);
        assert_eq!(Traffic::read(&[]), None);
    }
}
