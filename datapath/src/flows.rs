//! The tables of remembered connections, and when an entry may go.
//!
//! Invariant: a connection that may still carry a packet stays; an entry that changed while it was being
//! removed is put back.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use aya::maps::MapData;
use thyra_datapath_abi::FlowState;

use crate::sys::{self, Cursor};

/// After a reset, stragglers may still arrive.
const RESET_LINGER: Duration = Duration::from_secs(2);
/// After both sides have closed, the last ACK may still be asked for again; a FIN that comes later is
/// answered with a reset, which hurts nobody. Kept short, since each entry takes the place of a new
/// connection.
const CLOSED_LINGER: Duration = Duration::from_secs(2);
/// Linux gives up on a SYN after 127 s (`tcp_syn_retries` = 6).
const UNANSWERED_LINGER: Duration = Duration::from_secs(130);

const BATCH: usize = 1024;
const STATE_BYTES: usize = size_of::<FlowState>();

/// One table; `K` is the size of its key.
#[derive(Debug)]
pub(crate) struct Flows<const K: usize> {
    map: MapData,
    /// Offset of the endpoint id in the key.
    endpoint_at: usize,
    cursor: Cursor,
    seen: usize,
    entries: usize,
}

/// A key and what is remembered under it.
type Entry<const K: usize> = ([u8; K], FlowState);

/// What one call to `Flows::sweep` did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Swept {
    pub(crate) looked_at: usize,
    pub(crate) removed: usize,
}

impl<const K: usize> Flows<K> {
    /// `map` must have keys of `K` bytes and values of a `FlowState`; the loader has compared its shape.
    pub(crate) fn new(map: MapData, endpoint_at: usize) -> Self {
        assert!(endpoint_at + 2 <= K, "the endpoint id lies within the key");
        Self {
            map,
            endpoint_at,
            cursor: Cursor::default(),
            seen: 0,
            entries: 0,
        }
    }

    /// Entries at the end of the last whole walk.
    pub(crate) fn entries(&self) -> usize {
        self.entries
    }

    /// Looks at up to about `budget` entries, from where the last call stopped, and removes finished ones.
    pub(crate) fn sweep(&mut self, now_ns: u64, budget: usize) -> io::Result<Swept> {
        let mut swept = Swept::default();
        while swept.looked_at < budget {
            let (batch, next) = self.batch(self.cursor)?;
            swept.looked_at += batch.len();
            self.seen += batch.len();
            for (key, state) in batch {
                if is_finished(state, now_ns) && self.remove_if(&key, |s| is_finished(s, now_ns))? {
                    swept.removed += 1;
                    self.seen -= 1;
                }
            }
            if let Some(next) = next {
                self.cursor = next;
            } else {
                self.cursor = Cursor::default();
                self.entries = std::mem::take(&mut self.seen);
                break;
            }
        }
        Ok(swept)
    }

    /// Forgets all connections of an endpoint. Returns how many there were.
    pub(crate) fn forget(&self, endpoint: u16) -> io::Result<usize> {
        let mut removed = 0;
        let mut cursor = Some(Cursor::default());
        while let Some(at) = cursor {
            let (batch, next) = self.batch(at)?;
            for (key, _) in batch {
                if self.endpoint(&key) == endpoint && self.remove_if(&key, |_| true)? {
                    removed += 1;
                }
            }
            cursor = next;
        }
        Ok(removed)
    }

    /// Writes all connections of endpoint `from` once more under the id `to`.
    pub(crate) fn copy(&self, from: u16, to: u16) -> io::Result<()> {
        let mut cursor = Some(Cursor::default());
        while let Some(at) = cursor {
            let (batch, next) = self.batch(at)?;
            for (mut key, state) in batch.into_iter().filter(|(key, _)| self.endpoint(key) == from) {
                key[self.endpoint_at..][..2].copy_from_slice(&to.to_ne_bytes());
                let value: [u8; STATE_BYTES] = zerocopy::transmute!(state);
                sys::insert_new(self.map.fd().as_fd(), &key, &value)?;
            }
            cursor = next;
        }
        Ok(())
    }

    fn batch(&self, at: Cursor) -> io::Result<(Vec<Entry<K>>, Option<Cursor>)> {
        let mut keys = vec![[0; K]; BATCH];
        let mut values = vec![[0; STATE_BYTES]; BATCH];
        let (read, next) = sys::lookup_batch(self.map.fd().as_fd(), at, &mut keys, &mut values)?;
        keys.truncate(read);
        Ok((
            keys.into_iter().zip(values.into_iter().map(state)).collect(),
            next,
        ))
    }

    /// The state may have changed since it was read (the pod uses the tuple again), so it is looked at again
    /// after it was taken out.
    fn remove_if(&self, key: &[u8; K], unwanted: impl Fn(FlowState) -> bool) -> io::Result<bool> {
        let fd = self.map.fd().as_fd();
        let Some(taken) = sys::take::<K, STATE_BYTES>(fd, key)? else {
            return Ok(false);
        };
        if unwanted(state(taken)) {
            return Ok(true);
        }
        sys::insert_new(fd, key, &taken)?;
        Ok(false)
    }

    fn endpoint(&self, key: &[u8; K]) -> u16 {
        u16::from_ne_bytes([key[self.endpoint_at], key[self.endpoint_at + 1]])
    }
}

fn state(bytes: [u8; STATE_BYTES]) -> FlowState {
    zerocopy::transmute!(bytes)
}

/// Whether nothing can come any more on a connection in this state.
fn is_finished(state: FlowState, now_ns: u64) -> bool {
    let both_fins = FlowState::LOCAL_FIN | FlowState::REMOTE_FIN;
    let linger = if state.flags & FlowState::RESET != 0 {
        RESET_LINGER
    } else if state.flags & both_fins == both_fins {
        CLOSED_LINGER
    } else if state.flags & FlowState::ANSWERED == 0 {
        UNANSWERED_LINGER
    } else {
        return false;
    };
    u128::from(now_ns.saturating_sub(state.changed_ns)) >= linger.as_nanos()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn finished(flags: u32, age_seconds: u64) -> bool {
        is_finished(
            FlowState {
                flags,
                pad: 0,
                changed_ns: 7,
            },
            7 + age_seconds * SECOND,
        )
    }

    #[test]
    fn an_established_connection_stays_however_old() {
        assert!(!finished(FlowState::ANSWERED, 1_000_000));
        assert!(
            !finished(FlowState::ANSWERED | FlowState::LOCAL_FIN, 1_000_000),
            "half closed"
        );
    }

    #[test]
    fn a_reset_connection_goes_after_two_seconds() {
        assert!(!finished(FlowState::ANSWERED | FlowState::RESET, 1));
        assert!(finished(FlowState::ANSWERED | FlowState::RESET, 2));
    }

    #[test]
    fn a_connection_closed_by_both_goes_after_two_seconds() {
        let closed = FlowState::ANSWERED | FlowState::LOCAL_FIN | FlowState::REMOTE_FIN;
        assert!(!finished(closed, 1));
        assert!(finished(closed, 2));
    }

    #[test]
    fn an_unanswered_syn_goes_after_the_last_retry() {
        assert!(!finished(0, 129));
        assert!(finished(0, 130));
    }

    #[test]
    fn a_clock_behind_the_entry_removes_nothing() {
        assert!(!is_finished(
            FlowState {
                flags: FlowState::RESET,
                pad: 0,
                changed_ns: 10 * SECOND
            },
            0
        ));
    }
}
