//! What must be done inside the program's address space, but not by the thread that reads its
//! faults: it might wait for a page itself.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use farmem_region::PAGE_SIZE;
use rustix::mm::Advice;

use crate::{AddressRange, PageKind, Pagemap};

/// Ranges given and not taken back at most.
const RANGES_MAX: usize = 16;

/// Errands for a second thread of the pager, which calls [`Errands::run`].
///
/// There is one kind: to *unshare* a range. Pages that a process shares with a forked child, or
/// shared with one that has ended, refuse to be moved until they are written to. The kernel does as
/// if they were (MADV_POPULATE_WRITE), which copies a page only where the child still has it too.
#[derive(Debug)]
pub struct Errands {
    pagemap: Pagemap,
    /// A thread runs them.
    runs: AtomicBool,
    lists: Mutex<Lists>,
    news: Condvar,
}

#[derive(Debug, Default)]
struct Lists {
    given: VecDeque<AddressRange>,
    done: VecDeque<AddressRange>,
    closed: bool,
}

impl Errands {
    /// None yet, and nobody who runs them.
    ///
    /// # Errors
    /// If /proc is not mounted or not readable.
    pub fn new() -> io::Result<Self> {
        let room = || VecDeque::with_capacity(RANGES_MAX);
        Ok(Self {
            pagemap: Pagemap::open()?,
            runs: AtomicBool::new(false),
            lists: Mutex::new(Lists { given: room(), done: room(), closed: false }),
            news: Condvar::new(),
        })
    }

    /// Lets the pages of a range be unshared; false if nobody does it, or not now.
    #[must_use]
    pub fn unshare(&self, range: AddressRange) -> bool {
        let mut lists = self.lists();
        let room = lists.given.len() + lists.done.len() < RANGES_MAX;
        let accepted = room && self.runs.load(Ordering::Relaxed);
        if accepted {
            lists.given.push_back(range);
            self.news.notify_one();
        }
        accepted
    }

    /// The next range that was unshared, as far as that is possible, in the order of giving.
    #[must_use]
    pub fn unshared(&self) -> Option<AddressRange> {
        self.lists().done.pop_front()
    }

    /// Runs errands until [`Self::close`] is called, and calls `done` after each. What this thread touches may
    /// be missing: then it waits for the pager like any thread of the program.
    pub fn run(&self, done: impl Fn()) {
        self.runs.store(true, Ordering::Relaxed);
        while let Some(range) = self.next() {
            self.pagemap.present(range, &mut |run| {
                if run.kind == PageKind::Page {
                    populate(run.range);
                }
            });
            self.lists().done.push_back(range);
            done();
        }
        self.runs.store(false, Ordering::Relaxed);
    }

    /// Lets [`Self::run`] return.
    pub fn close(&self) {
        self.lists().closed = true;
        self.news.notify_all();
    }

    fn next(&self) -> Option<AddressRange> {
        let mut lists = self.lists();
        loop {
            if lists.closed {
                return None;
            }
            if let Some(range) = lists.given.pop_front() {
                return Some(range);
            }
            lists = self.news.wait(lists).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lists(&self) -> MutexGuard<'_, Lists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes pages the process's own. Those of a mapping that must not be written stay as they are.
fn populate(range: AddressRange) {
    let advise = |range: AddressRange| {
        let start = range.start() as *mut core::ffi::c_void;
        // SAFETY: no content changes: the kernel does what a write to the page would have it do
        // first, and refuses where no write is allowed.
        unsafe { rustix::mm::madvise(start, range.bytes(), Advice::LinuxPopulateWrite) }
    };
    if advise(range).is_err() {
        // A border of mappings, or a page that is gone: each for itself.
        for address in (range.start()..range.end()).step_by(PAGE_SIZE) {
            let _ = advise(AddressRange::pages_from(address, 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_thread_nothing_is_accepted() {
        let errands = Errands::new().unwrap();
        assert!(!errands.unshare(AddressRange::new(0, 0)));
        errands.close();
        errands.run(|| ());
        assert_eq!(errands.unshared(), None);
    }
}
