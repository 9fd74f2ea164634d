//! What the pager leaves in the program's memory for forked children to have a copy of.
//!
//! ```text
//! | count, secret (one page, copied by fork) | a page that nobody can read |
//! ```

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use farmem_region::PAGE_SIZE;
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use rustix::process::Pid;

use crate::AddressRange;

/// A count in the memory of the calling process, of which each forked child has a copy as it was at
/// the instant of the fork.
#[derive(Debug)]
pub struct ForkMark {
    base: NonNull<AtomicU64>,
}

// SAFETY: the count is only reached as an atomic, and the other page not at all.
unsafe impl Send for ForkMark {}

const BYTES: usize = 2 * PAGE_SIZE;

impl ForkMark {
    /// Makes one, at zero.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice, its second page closed.
        let base = unsafe {
            let base = rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )?;
            // Also keeps the kernel from making it one mapping with a neighbour.
            rustix::mm::madvise(base, BYTES, Advice::LinuxDontDump)?;
            rustix::mm::mprotect(base.byte_add(PAGE_SIZE), PAGE_SIZE, MprotectFlags::empty())?;
            base
        };
        let base =
            NonNull::new(base.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        let mark = Self { base };
        let mut secret = [0; size_of::<u64>()];
        rustix::rand::getrandom(&mut secret[..], rustix::rand::GetRandomFlags::empty())?;
        mark.word(1).store(u64::from_le_bytes(secret), Ordering::Relaxed);
        Ok(mark)
    }

    /// Where another process can find out who has been forked from this one, and by what.
    #[must_use]
    pub fn place_and_secret(&self) -> (u64, u64) {
        (self.address() as u64, self.word(1).load(Ordering::Relaxed))
    }

    /// Whether a process has the mark of such a place: it was forked from the one that left it there,
    /// or is that one, and has run no other image since. False also if it may not be read.
    #[must_use]
    pub fn is_in(process: Pid, (place, secret): (u64, u64)) -> bool {
        let word = usize::try_from(place).ok().and_then(|at| at.checked_add(size_of::<u64>()));
        word.and_then(|word| read_word(process, word)) == Some(secret)
    }

    /// All of it.
    #[must_use]
    pub fn range(&self) -> AddressRange {
        AddressRange::new(self.address(), self.address() + BYTES)
    }

    /// The present count.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.word(0).load(Ordering::Relaxed)
    }

    /// Counts one more: whoever is forked from now on has the new count.
    pub fn advance(&self) {
        // Nobody else writes. System calls before and after it stay where they are.
        self.word(0).store(self.count() + 1, Ordering::Release);
    }

    /// The count that a forked child has, asked of one of its threads; `None` if it cannot be read:
    /// it has ended, or has numbers of its own for its threads.
    #[must_use]
    pub fn count_in(&self, thread: u32) -> Option<u64> {
        let thread = i32::try_from(thread).ok().filter(|&thread| thread > 0)?;
        let thread = Pid::from_raw(thread)?;
        // Elsewhere the number may be that of somebody else.
        let related = Self::is_in(thread, self.place_and_secret());
        read_word(thread, self.address()).filter(|_| related)
    }

    /// Returns when all who read or drop the pages of this address space at this moment are done.
    pub fn wait_for_others(&self) {
        let start = self.unreadable() as *mut core::ffi::c_void;
        // SAFETY: our own page keeps the protection that it has. What counts is the lock that the
        // kernel takes for it, which excludes everybody else.
        let _ = unsafe { rustix::mm::mprotect(start, PAGE_SIZE, MprotectFlags::empty()) };
    }

    /// A page of addresses from which nothing can be read.
    pub(crate) fn unreadable(&self) -> usize {
        self.address() + PAGE_SIZE
    }

    fn address(&self) -> usize {
        self.base.as_ptr() as usize
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < PAGE_SIZE / size_of::<u64>());
        // SAFETY: a word of our first page (asserted), aligned and only ever reached as an atomic.
        unsafe { self.base.add(index).as_ref() }
    }
}

/// Reads a word of another process.
fn read_word(process: Pid, address: usize) -> Option<u64> {
    let mut word = 0_u64;
    let local = libc::iovec { iov_base: (&raw mut word).cast(), iov_len: size_of::<u64>() };
    let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: size_of::<u64>() };
    let pid = process.as_raw_nonzero().get();
    // SAFETY: reads the other process into `word`, which is as long as is said.
    let read = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    (usize::try_from(read) == Ok(size_of::<u64>())).then_some(word)
}

impl Drop for ForkMark {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no reference into it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), BYTES) };
    }
}
