//! Hash tables of connections: those that the node made, those that Envoy has.
//!
//! Invariant: a connection that may still carry a packet stays; an entry that changed while it was being
//! removed is put back.

use std::io;
use std::os::fd::AsFd;

use aya::maps::MapData;
use thyra_datapath_abi::FlowState;

use crate::flow_maps::{Swept, is_finished};
use crate::sys::{self, Cursor};

const BATCH: usize = 1024;
const STATE_BYTES: usize = size_of::<FlowState>();

/// One table; `K` is the size of its key, `V` of its value, which begins with a `FlowState`.
#[derive(Debug)]
pub(crate) struct HostFlows<const K: usize, const V: usize = STATE_BYTES> {
    map: MapData,
    /// Offset of the endpoint id in the key.
    endpoint_at: usize,
    cursor: Cursor,
    seen: usize,
    entries: usize,
}

/// A key and what is remembered under it.
pub(crate) type Entry<const K: usize> = ([u8; K], FlowState);
type Raw<const K: usize, const V: usize> = ([u8; K], [u8; V]);
/// Entries, and where the next ones are.
type Batch<const K: usize, const V: usize> = (Vec<Raw<K, V>>, Option<Cursor>);

impl<const K: usize, const V: usize> HostFlows<K, V> {
    /// `map` must have keys of `K` bytes and values of `V`; the loader has compared its shape.
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

    /// Looks at up to about `budget` entries, from where the last call stopped, and removes finished ones; `gone` hears
    /// of the endpoint of each.
    pub(crate) fn sweep(&mut self, now_ns: u64, budget: usize, gone: impl Fn(u16)) -> io::Result<Swept> {
        self.sweep_if(budget, |value| is_finished(state(*value), now_ns), gone)
    }

    /// The same with another idea of what is finished.
    pub(crate) fn sweep_if(
        &mut self,
        budget: usize,
        is_over: impl Fn(&[u8; V]) -> bool,
        gone: impl Fn(u16),
    ) -> io::Result<Swept> {
        let mut swept = Swept::default();
        while swept.looked_at < budget {
            let (batch, next) = self.batch(self.cursor)?;
            swept.looked_at += batch.len();
            self.seen += batch.len();
            for (key, value) in batch {
                if is_over(&value) && self.remove_if(&key, &is_over)? {
                    gone(self.endpoint(&key));
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

    /// Forgets all connections of an endpoint; `gone`: as in `sweep`.
    pub(crate) fn forget(&self, endpoint: u16, gone: impl Fn(u16)) -> io::Result<()> {
        for (key, _) in self.of(endpoint)? {
            if self.remove_if(&key, |_| true)? {
                gone(endpoint);
            }
        }
        Ok(())
    }

    /// Forgets all connections whose state is unwanted; `gone`: as in `sweep`.
    pub(crate) fn forget_if(
        &self,
        unwanted: impl Fn(FlowState) -> bool,
        gone: impl Fn(u16),
    ) -> io::Result<()> {
        let mut cursor = Some(Cursor::default());
        while let Some(at) = cursor {
            let (batch, next) = self.batch(at)?;
            for (key, _) in batch.into_iter().filter(|(_, value)| unwanted(state(*value))) {
                if self.remove_if(&key, |value| unwanted(state(*value)))? {
                    gone(self.endpoint(&key));
                }
            }
            cursor = next;
        }
        Ok(())
    }

    /// Forgets all connections whose key and state are unwanted; `gone`: as in `sweep`.
    pub(crate) fn forget_where(
        &self,
        unwanted: impl Fn(&[u8; K], FlowState) -> bool,
        gone: impl Fn(u16),
    ) -> io::Result<()> {
        for (key, value) in self.all()? {
            if unwanted(&key, state(value)) && self.remove_if(&key, |value| unwanted(&key, state(*value)))? {
                gone(self.endpoint(&key));
            }
        }
        Ok(())
    }

    /// The connections of an endpoint.
    pub(crate) fn of(&self, endpoint: u16) -> io::Result<Vec<Entry<K>>> {
        let own = self.all()?.into_iter();
        let own = own.filter(|(key, _)| self.endpoint(key) == endpoint);
        Ok(own.map(|(key, value)| (key, state(value))).collect())
    }

    /// All connections.
    pub(crate) fn all(&self) -> io::Result<Vec<Raw<K, V>>> {
        let mut found = Vec::new();
        let mut cursor = Some(Cursor::default());
        while let Some(at) = cursor {
            let (batch, next) = self.batch(at)?;
            found.extend(batch);
            cursor = next;
        }
        Ok(found)
    }

    fn batch(&self, at: Cursor) -> io::Result<Batch<K, V>> {
        let mut keys = vec![[0; K]; BATCH];
        let mut values = vec![[0; V]; BATCH];
        let (read, next) = sys::lookup_batch(self.map.fd().as_fd(), at, &mut keys, &mut values)?;
        keys.truncate(read);
        Ok((keys.into_iter().zip(values).collect(), next))
    }

    /// The state may have changed since it was read (the pod uses the tuple again), so it is looked at again
    /// after it was taken out.
    fn remove_if(&self, key: &[u8; K], unwanted: impl Fn(&[u8; V]) -> bool) -> io::Result<bool> {
        let fd = self.map.fd().as_fd();
        let Some(taken) = sys::take::<K, V>(fd, key)? else {
            return Ok(false);
        };
        if unwanted(&taken) {
            return Ok(true);
        }
        sys::insert_new(fd, key, &taken)?;
        Ok(false)
    }

    fn endpoint(&self, key: &[u8; K]) -> u16 {
        u16::from_ne_bytes([key[self.endpoint_at], key[self.endpoint_at + 1]])
    }
}

impl<const K: usize> HostFlows<K> {
    /// Writes all connections of endpoint `from` once more under the id `to`.
    pub(crate) fn copy(&self, from: u16, to: u16) -> io::Result<()> {
        for (mut key, state) in self.of(from)? {
            key[self.endpoint_at..][..2].copy_from_slice(&to.to_ne_bytes());
            let value: [u8; STATE_BYTES] = zerocopy::transmute!(state);
            sys::insert_new(self.map.fd().as_fd(), &key, &value)?;
        }
        Ok(())
    }
}

fn state<const V: usize>(bytes: [u8; V]) -> FlowState {
    let head = bytes.first_chunk().copied().unwrap_or_default();
    FlowState(u64::from_ne_bytes(head))
}
