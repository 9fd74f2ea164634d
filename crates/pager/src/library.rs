//! What a library needs that maps a region, besides paging: contents that are there before the
//! first touch, everything written acknowledged, and the table back at the end.

use farmem_region::{PAGE_SIZE, PageIndex, Version};
use farmem_vmem::AddressRange;

use crate::engine::{Engine, Fatal, Io};
use crate::frames::WINDOW_FRAMES;
use crate::table::{Entry, Place};

/// Windows that one step of a flush moves out at most: about 1 ms.
const WINDOWS_PER_STEP: usize = 8;

/// How far a flush has come.
#[derive(Debug, Default)]
pub struct Flush {
    /// Everything below has been moved out.
    at: usize,
    /// Once all has been: the newest store then under way.
    last_store: Option<u64>,
    /// Once these have been done too: pages that were given back have been forgotten.
    has_released: bool,
    /// Pages that the kernel has pinned, and that could not be moved out.
    pinned: u64,
}

/// How a step of a flush ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flushed {
    /// It goes on: turn, then take the next step.
    NotYet,
    /// What had been written when it began is acknowledged, but for this many pages that the
    /// kernel held (direct input or output into them).
    Done {
        /// Pages that stayed.
        pinned: u64,
    },
}

impl Engine {
    /// Makes it known that the servers have a page, before it is touched for the first time.
    pub fn restore(&mut self, address: usize, page: PageIndex, version: Version) {
        let mut entry = Entry::new(Place::Out);
        // Its fingerprint is not known: when it comes out again it will be sent once more.
        entry.set_copy(page, version, 0);
        self.own_table().put(address, entry);
        self.slots.restore();
        self.skip_versions(Version::new(version.get() + 1));
    }

    /// The pages that the servers have, after a flush. Returns the version to go on with.
    pub fn copies(&mut self, each: &mut dyn FnMut(PageIndex, Version)) -> Version {
        self.own_table().retain(&mut |_, entry| {
            if let Some((page, version)) = entry.copy() {
                each(page, version);
            }
            true
        });
        self.take_version()
    }

    /// Moves everything out, whether used much or not, and waits until the servers have it. A
    /// page written while the flush goes on may or may not be part of it.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn flush_step(&mut self, io: &mut Io<'_>, flush: &mut Flush) -> Result<Flushed, Fatal> {
        if let Some(last) = flush.last_store {
            flush.has_released |= !self.has_unreleased();
            let waits = !flush.has_released || self.stores.keys().any(|&ticket| ticket <= last);
            let done = Flushed::Done { pinned: flush.pinned };
            return Ok(if waits { Flushed::NotYet } else { done });
        }
        while self.next_unshared(io).is_some() {}
        self.settle_looks(io);
        for _ in 0..WINDOWS_PER_STEP {
            if self.sharing.is_pending() || !self.may_evict(io)? || !self.has_window(io) {
                break;
            }
            let Some(source) = self.next_to_flush(io, flush) else {
                flush.last_store = Some(self.stores.keys().copied().max().unwrap_or(0));
                break;
            };
            if self.quarantine.overlaps(source) {
                // What is written there again must not stay behind.
                break;
            }
            let busy = self.counts.busy_pages;
            self.cut_short = false;
            self.evict_window(io, source, false)?;
            if self.sharing.is_pending() || self.cut_short {
                // It is tried again when its pages can be moved.
                break;
            }
            flush.pinned += self.counts.busy_pages - busy;
            flush.at = source.end();
        }
        Ok(Flushed::NotYet)
    }

    /// Whether a window is empty; the oldest ones are emptied if none is.
    fn has_window(&mut self, io: &mut Io<'_>) -> bool {
        loop {
            if let Some(window) = self.take_empty_window(io) {
                self.frames.put_back(window);
                return true;
            }
            if self.retire_oldest(io, true).is_none() {
                return false;
            }
        }
    }

    fn next_to_flush(&self, io: &Io<'_>, flush: &mut Flush) -> Option<AddressRange> {
        while let Some(range) = self.adopted.next_from(flush.at) {
            let rest = AddressRange::new(flush.at.max(range.start()), range.end());
            if let Some(start) = io.memory.first_present(rest) {
                let window = WINDOW_FRAMES * PAGE_SIZE;
                let end = (start / window + 1) * window;
                return Some(AddressRange::new(start, end.min(range.end())));
            }
            flush.at = range.end();
        }
        None
    }
}
