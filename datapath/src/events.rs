//! Reading the ring of events.
//!
//! The programs write without waking anybody (a wake-up costs more than the packet) until the ring is a
//! quarter full, so the reader looks by a timer and sleeps when there is nothing.

use std::io;
use std::time::Duration;

use aya::maps::{Map, MapData, RingBuf};
use thyra_datapath_abi::Event;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use zerocopy::FromBytes;

/// How late an event may be when the ring is nearly empty.
const PERIOD: Duration = Duration::from_millis(20);
/// Events in one batch at most.
const BATCH: usize = 4_096;

/// The reader of the ring.
#[derive(Debug)]
pub struct EventReader {
    ring: AsyncFd<Ring>,
    /// The last batch was full: more may be waiting.
    more: bool,
    unreadable: u64,
}

/// `RingBuf` without `Debug`.
struct Ring(RingBuf<MapData>);

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ring")
    }
}

impl std::os::fd::AsRawFd for Ring {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_raw_fd()
    }
}

impl EventReader {
    pub(crate) fn new(map: MapData) -> io::Result<Self> {
        let ring = RingBuf::try_from(Map::RingBuf(map)).map_err(io::Error::other)?;
        // SAFETY: the ring owns its map's descriptor and keeps it until it is dropped.
        let ring = unsafe { AsyncFd::register_with_interest(Ring(ring), Interest::READABLE) }?;
        Ok(Self {
            ring,
            more: false,
            unreadable: 0,
        })
    }

    /// The next events, at least one, oldest first. Cancel-safe: events are taken only when they are
    /// returned.
    pub async fn next_batch(&mut self) -> io::Result<Vec<Event>> {
        loop {
            // Looking again at once would find an event or two and burn a CPU on a steady trickle.
            if !std::mem::take(&mut self.more) {
                tokio::select! {
                    () = tokio::time::sleep(PERIOD) => {}
                    ready = self.ring.readable() => ready?.clear_ready(),
                }
            }
            let batch = self.take();
            self.more = batch.len() == BATCH;
            if !batch.is_empty() {
                return Ok(batch);
            }
        }
    }

    /// Records that were no events (none unless the programs are of another build).
    #[must_use]
    pub fn unreadable(&self) -> u64 {
        self.unreadable
    }

    fn take(&mut self) -> Vec<Event> {
        let mut batch = Vec::new();
        while batch.len() < BATCH {
            let Some(item) = self.ring.get_mut().0.next() else {
                break;
            };
            match Event::read_from_bytes(&item) {
                Ok(event) => batch.push(event),
                Err(_) => self.unreadable += 1,
            }
        }
        batch
    }
}
