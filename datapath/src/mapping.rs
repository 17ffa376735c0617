//! A map's memory in this process: words that the programs see at once.
//!
//! Invariant: memory is reached by whole 64-bit atomic accesses alone, so a program never sees half a word.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The memory of an array map that was created with `BPF_F_MMAPABLE`.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the memory belongs to the kernel's map, not to a thread, and is reached by atomics only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `words` 64-bit words of `map`.
    pub(crate) fn new(map: BorrowedFd<'_>, words: usize) -> io::Result<Self> {
        let bytes = words * size_of::<u64>();
        // SAFETY: a fresh shared mapping at an address of the kernel's choice; nothing else lies there. The
        // kernel refuses a length beyond the map's own.
        let base = unsafe {
            mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                map,
                0,
            )
        }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, words })
    }

    /// All words.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, `words` long, and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }

    pub(crate) fn load(&self, index: usize) -> u64 {
        self.words()[index].load(Ordering::Relaxed)
    }

    pub(crate) fn store(&self, index: usize, value: u64) {
        self.words()[index].store(value, Ordering::Relaxed);
    }

    /// A store that every earlier store of this thread precedes, as programs see it.
    pub(crate) fn publish(&self, index: usize, value: u64) {
        self.words()[index].store(value, Ordering::Release);
    }

    /// Entry `index` of a table of 16-bit values, four to a word (bit `16 × (index % 4)`).
    pub(crate) fn load16(&self, index: usize) -> u16 {
        let [low, high, ..] = (self.load(index / 4) >> (index % 4 * 16)).to_le_bytes();
        u16::from_le_bytes([low, high])
    }

    /// Changes one such entry. There is one writer, so its neighbours are safe.
    pub(crate) fn store16(&self, index: usize, value: u16) {
        let shift = index % 4 * 16;
        let others = self.load(index / 4) & !(0xffff << shift);
        self.store(index / 4, others | u64::from(value) << shift);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `new` mapped; no reference outlives `self`.
        let unmapped = unsafe { munmap(self.base.as_ptr().cast(), self.words * size_of::<u64>()) };
        debug_assert!(unmapped.is_ok(), "the range is a mapping of ours");
    }
}
