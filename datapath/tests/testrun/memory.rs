//! The memory of a loaded map, as user space maps it.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::AtomicU64;

use aya::maps::MapData;

/// A map's words, until it is dropped.
pub(crate) struct Memory {
    base: *mut u64,
    words: usize,
}

impl Memory {
    /// The first `words` words of a map with `BPF_F_MMAPABLE`.
    pub(crate) fn new(map: &MapData, words: usize) -> Self {
        // SAFETY: a fresh shared mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                words * size_of::<u64>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        assert_ne!(
            base,
            libc::MAP_FAILED,
            "mmap: {}",
            std::io::Error::last_os_error()
        );
        Self {
            base: base.cast(),
            words,
        }
    }

    /// All words. No program runs while the slice is in use: test-run is a call of this thread.
    pub(crate) fn words(&mut self) -> &mut [u64] {
        // SAFETY: the mapping is page-aligned and `words` long; `self` is borrowed for as long as the slice is.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.words) }
    }

    /// All words, as what is shared with programs is reached.
    pub(crate) fn shared(&self) -> &[AtomicU64] {
        // SAFETY: as above; atomics have the size and alignment of their words.
        unsafe { std::slice::from_raw_parts(self.base.cast(), self.words) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: exactly the range that `new` mapped; no reference outlives `self`.
        let done = unsafe { libc::munmap(self.base.cast(), self.words * size_of::<u64>()) };
        debug_assert_eq!(0, done, "the range is a mapping of ours");
    }
}
