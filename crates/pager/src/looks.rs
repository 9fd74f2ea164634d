//! Looking at pages that have been moved out: zero, known to the servers, or to be written.
//!
//! A page's fingerprint is taken by a second thread of the pager where there is one, for that takes
//! longer than to move the page. Until the result is back the frame counts as one whose store is
//! under way ([`FrameUse::Writing`]): it may be copied back to the program, and is neither moved
//! nor reused. Changes of mappings are followed only when no look is under way, so all else finds
//! the table as if each page had been looked at when it was moved.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use farmem_region::{Errand, FrameId, Lent, Loan, PageIndex, PageRange, Request, StorePage};

use crate::engine::{Engine, Fatal, Io};
use crate::frames::FrameUse;
use crate::table::{Entry, Fingerprint, Place};

/// Pages of an errand: what is read for the program waits no longer than for one of these.
const PAGES_MAX: usize = 64;

/// Looks that are under way.
#[derive(Debug, Default)]
pub(crate) struct Looks {
    seen: Arc<Seen>,
    /// Errands not taken back.
    errands: usize,
    /// Pages of these.
    pages: usize,
    /// See [`Config::lent_pages_min`](crate::Config::lent_pages_min).
    lent_pages_min: usize,
    /// Why the result of one could not be acted on.
    failure: Option<Fatal>,
    /// Buffers, kept.
    dirty: Vec<Dirty>,
    request: Vec<StorePage>,
}

/// A page that the servers do not have.
#[derive(Debug)]
struct Dirty {
    address: usize,
    frame: FrameId,
    fingerprint: Fingerprint,
}

/// Results that were not taken back yet.
#[derive(Debug, Default)]
struct Seen {
    count: AtomicUsize,
    looks: Mutex<Vec<Look>>,
}

/// Pages and their fingerprints.
#[derive(Debug)]
struct Look {
    secret: [u8; 192],
    frames: Vec<FrameId>,
    fingerprints: Vec<Fingerprint>,
}

/// The errand.
struct Looking {
    look: Look,
    seen: Arc<Seen>,
}

impl Errand for Looking {
    fn run(&mut self, frames: &mut dyn Lent) {
        let Look { secret, frames: ids, fingerprints } = &mut self.look;
        let each = 0..ids.len();
        fingerprints.extend(each.map(|at| crate::engine::fingerprint(secret, frames.bytes(at))));
    }

    fn deliver(self: Box<Self>) {
        let Self { look, seen } = *self;
        let mut looks = seen.looks.lock().unwrap_or_else(PoisonError::into_inner);
        looks.push(look);
        seen.count.store(looks.len(), Ordering::Release);
    }
}

impl Looks {
    pub(crate) fn new(lent_pages_min: usize) -> Self {
        Self { lent_pages_min, ..Self::default() }
    }

    /// Pages that may still turn out to need a slot each.
    pub(crate) const fn pages(&self) -> usize {
        self.pages
    }

    /// Stores that may still become necessary.
    pub(crate) const fn errands(&self) -> usize {
        self.errands
    }
}

impl Engine {
    /// Looks at pages that have been moved out into these frames, or has it done.
    pub(crate) fn look(&mut self, io: &mut Io<'_>, frames: &[FrameId]) -> Result<(), Fatal> {
        // What has a slot of its own may have to go there before anything else is done to it.
        let may_lend = !self.slots.are_fixed() && frames.len() >= self.looks.lent_pages_min;
        for part in frames.chunks(PAGES_MAX) {
            if !may_lend || !io.memory.would_lend(Loan::Read) || !self.lend(io, part) {
                self.look_here(io, part)?;
            }
        }
        Ok(())
    }

    fn lend(&mut self, io: &mut Io<'_>, frames: &[FrameId]) -> bool {
        let fingerprints = Vec::with_capacity(frames.len());
        let look = Look { secret: self.secret(), frames: frames.to_vec(), fingerprints };
        let errand = Box::new(Looking { look, seen: Arc::clone(&self.looks.seen) });
        let taken = io.memory.lend(frames, Loan::Read, errand).is_ok();
        if taken {
            self.looks.errands += 1;
            self.looks.pages += frames.len();
        }
        taken
    }

    fn look_here(&mut self, io: &mut Io<'_>, frames: &[FrameId]) -> Result<(), Fatal> {
        let mut dirty = std::mem::take(&mut self.looks.dirty);
        dirty.clear();
        for (at, &frame) in frames.iter().enumerate() {
            if let Some(&next) = frames.get(at + 1) {
                io.memory.prefetch(next);
            }
            let fingerprint = self.fingerprint(io.memory.bytes(frame));
            self.judge(frame, fingerprint, &mut dirty);
        }
        let result = self.write_back(io, &dirty);
        self.looks.dirty = dirty;
        result
    }

    /// Acts on what has been seen since the last call.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn take_looks(&mut self, io: &mut Io<'_>) -> Result<(), Fatal> {
        if let Some(failure) = self.looks.failure.take() {
            return Err(failure);
        }
        if self.looks.seen.count.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        let seen = {
            let mut looks = self.looks.seen.looks.lock().unwrap_or_else(PoisonError::into_inner);
            self.looks.seen.count.store(0, Ordering::Relaxed);
            std::mem::take(&mut *looks)
        };
        let mut dirty = std::mem::take(&mut self.looks.dirty);
        let mut result = Ok(());
        for look in seen {
            self.looks.errands -= 1;
            self.looks.pages -= look.frames.len();
            dirty.clear();
            for (&frame, &fingerprint) in look.frames.iter().zip(&look.fingerprints) {
                self.judge(frame, fingerprint, &mut dirty);
            }
            result = result.and_then(|()| self.write_back(io, &dirty));
        }
        self.looks.dirty = dirty;
        result
    }

    /// Sees to it that no look is under way. Before mappings change in the table, and before a child
    /// gets a share of it: both count on every page that is out, or on its way, being stored.
    pub(crate) fn settle_looks(&mut self, io: &mut Io<'_>) {
        while self.looks.errands > 0 && self.looks.failure.is_none() {
            io.memory.await_errand();
            if let Err(failure) = self.take_looks(io) {
                self.looks.failure = Some(failure);
            }
        }
    }

    /// What becomes of a page that has been looked at.
    fn judge(&mut self, frame: FrameId, fingerprint: Fingerprint, dirty: &mut Vec<Dirty>) {
        let FrameUse::Writing(address) = self.frames.frame(frame) else {
            // It has gone back, or away, meanwhile.
            self.frames.set(frame, FrameUse::Spent);
            return;
        };
        if self.zeros_are_absent && fingerprint == self.zero_fingerprint() {
            self.counts.zero_drops += 1;
            self.frames.set(frame, FrameUse::Spent);
            let mut zero = Entry::new(Place::Zero);
            if let Some(entry) = self.own_table().get_mut(address) {
                std::mem::swap(entry, &mut zero);
            }
            if let Some(slot) = zero.take_copy() {
                self.release(slot);
            }
            return;
        }
        let Some(entry) = self.own_table().get(address) else {
            unreachable!("a page in a frame is in the table")
        };
        if entry.copy().is_some() && entry.fingerprint == fingerprint {
            self.counts.clean_drops += 1;
            self.frames.set(frame, FrameUse::Victim(address));
        } else {
            dirty.push(Dirty { address, frame, fingerprint });
        }
    }

    /// Sends pages that the servers do not have.
    fn write_back(&mut self, io: &mut Io<'_>, dirty: &[Dirty]) -> Result<(), Fatal> {
        if dirty.is_empty() {
            return Ok(());
        }
        let mut fresh = PageRange { start: PageIndex::new(0), count: Default::default() };
        let mut request = std::mem::take(&mut self.looks.request);
        request.clear();
        for (at, &Dirty { address, frame, fingerprint }) in dirty.iter().enumerate() {
            // To change it: what a child's table has in common with this one counts as shared then.
            let entry = self.own_table().get_mut(address);
            let held = entry.and_then(|entry| entry.copy()).map(|(slot, _)| slot);
            let page = match held.filter(|slot| !self.slots.is_shared(*slot)) {
                Some(slot) => slot,
                None => {
                    // A slot shared with a forked child must keep what the child inherited.
                    if let Some(slot) = held {
                        self.release(slot);
                    }
                    let fixed = self.slots.take_fixed(address);
                    fixed.unwrap_or_else(|| self.next_slot(&mut fresh, dirty.len() - at))
                }
            };
            let version = self.take_version();
            if let Some(entry) = self.own_table().get_mut(address) {
                entry.set_copy(page, version, fingerprint);
            }
            request.push(StorePage { page, version, frame });
        }
        self.slots.put_back(fresh);
        let ticket = self.take_ticket();
        io.store.submit(ticket, Request::Store(&request))?;
        self.stores.insert(ticket.0, dirty.iter().map(|page| page.frame).collect());
        self.looks.request = request;
        Ok(())
    }

    fn next_slot(&mut self, run: &mut PageRange, need: usize) -> PageIndex {
        if run.count.get() == 0 {
            // `has_slots` has made sure of a window's worth.
            *run = self.slots.take(need as u64).unwrap_or_else(|| {
                unreachable!("a window is moved out only when slots for it are free")
            });
        }
        let slot = run.start;
        run.start = PageIndex::new(slot.get() + 1);
        run.count = farmem_region::PageCount::new(run.count.get() - 1);
        slot
    }

    /// Notes that a page has been moved out into a frame, and is still to be looked at.
    pub(crate) fn moved_out(&mut self, address: usize, frame: FrameId) {
        let table = self.own_table();
        if table.get(address).is_none() {
            table.put(address, Entry::new(Place::Resident));
        }
        if let Some(entry) = table.get_mut(address) {
            entry.set_place(Place::Victim(frame));
        }
        self.frames.set(frame, FrameUse::Writing(address));
    }
}
