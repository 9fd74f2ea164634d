//! A few words of memory shared between processes through a memfd: statistics that outlive the
//! process that counts.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Shared 64-bit words, zero at first.
#[derive(Debug)]
pub struct SharedWords {
    file: OwnedFd,
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the memory is only reached as atomics.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Makes `words` words; `name` shows in /proc/PID/maps.
    ///
    /// # Errors
    /// If the memfd cannot be made, sized or mapped.
    pub fn new(name: &str, words: usize) -> io::Result<Self> {
        let file = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?;
        let bytes = words * size_of::<AtomicU64>();
        rustix::fs::ftruncate(&file, bytes as u64)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        }?;
        // SAFETY: the range is ours; the advice keeps it out of forked children.
        let _ = unsafe { rustix::mm::madvise(base, bytes, Advice::LinuxDontFork) };
        let base =
            NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { file, base, words })
    }

    /// The words.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping has `words` aligned words, lives as long as `self`, and is only
        // ever reached as atomics, also by the other processes that share it.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.words) }
    }

    /// The memfd, to pass on.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        let bytes = self.words * size_of::<AtomicU64>();
        // SAFETY: the mapping is ours and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), bytes) };
    }
}
