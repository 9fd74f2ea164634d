//! Which pages of the region are in use. A slot is a page of the region that holds the server's
//! copy of one page of the program; the table from pages to slots is the client's.

use std::collections::BTreeMap;

use farmem_region::{PAGE_SHIFT, PageCount, PageIndex, PageRange};

use crate::table::{SharedHolders, lock};

/// Slots are numbered in 32 bits, the last number means none: 16 TiB of external memory.
pub(crate) const SLOTS_MAX: u64 = (u32::MAX - 1) as u64;

/// How a page of memory finds its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SlotPolicy {
    /// Slots are handed out as pages are moved out; the region grows as they run short.
    #[default]
    Allocated,
    /// The page at this address has slot 0, its neighbour slot 1, and so on: a region that is
    /// mapped as a whole, at its full size.
    Identity {
        /// Where the region starts.
        base: usize,
    },
}

/// Hands out runs of slots, so that neighbouring addresses get neighbouring slots and are read
/// back together.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    policy: SlotPolicy,
    /// Slots that the region has.
    capacity: u64,
    /// Slots from here on were never used.
    fresh: u64,
    /// Freed runs below `fresh`: start to length.
    free: BTreeMap<u64, u64>,
    free_count: u64,
    /// Slots with more than one holder (after fork).
    holders: SharedHolders,
    in_use: u64,
    in_use_peak: u64,
}

impl Slots {
    /// A region that has no pages yet.
    #[must_use]
    pub(crate) fn new(policy: SlotPolicy) -> Self {
        Self { policy, ..Self::default() }
    }

    /// Whether each page has a slot of its own.
    #[must_use]
    pub(crate) fn are_fixed(&self) -> bool {
        self.policy != SlotPolicy::Allocated
    }

    /// The slot of the page at `address`, in use from now on, if each page has a slot of its own.
    pub(crate) fn take_fixed(&mut self, address: usize) -> Option<PageIndex> {
        let SlotPolicy::Identity { base } = self.policy else {
            return None;
        };
        let slot = (address.checked_sub(base)? >> PAGE_SHIFT) as u64;
        assert!(slot < self.capacity, "the region is as large as its mapping");
        self.used(1);
        Some(PageIndex::new(slot))
    }

    /// A slot holds a page from before.
    pub(crate) fn restore(&mut self) {
        debug_assert!(self.are_fixed());
        self.used(1);
    }

    /// The region, of which nothing is in use yet, holds pages from before in these slots. Returns the
    /// others: they are free once the servers have been told.
    pub(crate) fn inherit(&mut self, mut slots: Vec<PageIndex>) -> Vec<PageRange> {
        slots.sort_unstable();
        let mut unused = Vec::new();
        let mut next = 0;
        let mut leave = |from: u64, to: u64| {
            if from < to {
                let count = PageCount::new(to - from);
                unused.push(PageRange { start: PageIndex::new(from), count });
            }
        };
        for pair in slots.chunk_by(|a, b| a == b) {
            let slot = pair[0];
            leave(next, slot.get());
            next = slot.get() + 1;
            self.used(1);
            pair[1..].iter().for_each(|&slot| self.share(slot));
        }
        leave(next, self.capacity);
        self.fresh = self.capacity.max(next);
        unused
    }

    /// The region has now `pages` pages.
    pub(crate) fn set_capacity(&mut self, pages: PageCount) {
        self.capacity = pages.get().min(SLOTS_MAX);
    }

    /// Slots that can be taken before the region must grow.
    #[must_use]
    pub(crate) const fn available(&self) -> u64 {
        match self.policy {
            SlotPolicy::Allocated => self.capacity.saturating_sub(self.fresh) + self.free_count,
            SlotPolicy::Identity { .. } => u64::MAX,
        }
    }

    /// Slots that hold a page, now and at most so far.
    #[must_use]
    pub(crate) const fn in_use(&self) -> (u64, u64) {
        (self.in_use, self.in_use_peak)
    }

    /// Takes a run of at most `count` slots; `None` if the region is full.
    pub(crate) fn take(&mut self, count: u64) -> Option<PageRange> {
        debug_assert!(count > 0);
        let run = self.take_freed(count).or_else(|| self.take_fresh(count));
        if let Some(run) = run {
            self.used(run.count.get());
        }
        run
    }

    fn used(&mut self, count: u64) {
        self.in_use += count;
        self.in_use_peak = self.in_use_peak.max(self.in_use);
    }

    fn take_fresh(&mut self, count: u64) -> Option<PageRange> {
        let count = count.min(self.capacity.saturating_sub(self.fresh));
        if count == 0 {
            return None;
        }
        let start = PageIndex::new(self.fresh);
        self.fresh += count;
        Some(PageRange { start, count: PageCount::new(count) })
    }

    fn take_freed(&mut self, count: u64) -> Option<PageRange> {
        let (&start, &length) = self.free.iter().next()?;
        let taken = count.min(length);
        // A long run is not broken up by short freed ones while there is fresh room.
        if taken < count && self.capacity - self.fresh >= count {
            return None;
        }
        self.free.remove(&start);
        if taken < length {
            self.free.insert(start + taken, length - taken);
        }
        self.free_count -= taken;
        Some(PageRange { start: PageIndex::new(start), count: PageCount::new(taken) })
    }

    /// What tables note their slots' holders in.
    #[must_use]
    pub(crate) fn holders(&self) -> SharedHolders {
        SharedHolders::clone(&self.holders)
    }

    /// The slots that have lost a holder with a chunk of a table, each once for each loss.
    pub(crate) fn take_dropped(&self) -> Vec<PageIndex> {
        std::mem::take(&mut lock(&self.holders).dropped)
    }

    /// One more holder of a slot in use.
    pub(crate) fn share(&mut self, slot: PageIndex) {
        *lock(&self.holders).others.entry(slot.get()).or_insert(0) += 1;
    }

    /// Whether a slot has several holders: then its content must not be written over.
    #[must_use]
    pub(crate) fn is_shared(&self, slot: PageIndex) -> bool {
        lock(&self.holders).others.contains_key(&slot.get())
    }

    /// One holder less. Returns whether that was the last one, so that the servers may forget the
    /// page; until they have been told the slot is not [free](Self::free), or they would forget
    /// what is stored there next.
    pub(crate) fn release(&mut self, slot: PageIndex) -> bool {
        let number = slot.get();
        let mut holders = lock(&self.holders);
        if let Some(others) = holders.others.get_mut(&number) {
            *others -= 1;
            if *others == 0 {
                holders.others.remove(&number);
            }
            return false;
        }
        drop(holders);
        self.in_use -= 1;
        true
    }

    /// Slots that nobody holds may be taken again.
    pub(crate) fn free(&mut self, run: PageRange) {
        let (mut start, mut length) = (run.start.get(), run.count.get());
        if self.are_fixed() || length == 0 {
            return;
        }
        self.free_count += length;
        if let Some((&s, &l)) = self.free.range(..start).next_back()
            && s + l == start
        {
            self.free.remove(&s);
            start = s;
            length += l;
        }
        if let Some(l) = self.free.remove(&(start + length)) {
            length += l;
        }
        self.free.insert(start, length);
    }

    /// Slots of a run that were not needed after all.
    pub(crate) fn put_back(&mut self, run: PageRange) {
        self.in_use -= run.count.get();
        self.free(run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_heir_does_not_use_becomes_free() {
        let mut slots = Slots::new(SlotPolicy::Allocated);
        slots.set_capacity(PageCount::new(10));
        let held = [7, 2, 3, 7].map(PageIndex::new);
        let unused = slots.inherit(held.to_vec());
        let bounds = |run: &PageRange| (run.start.get(), run.count.get());
        assert_eq!(unused.iter().map(bounds).collect::<Vec<_>>(), [(0, 2), (4, 3), (8, 2)]);
        assert_eq!((slots.in_use().0, slots.available()), (3, 0));
        unused.into_iter().for_each(|run| slots.free(run));
        assert_eq!(slots.available(), 7);
        assert!(!slots.release(PageIndex::new(7)) && slots.release(PageIndex::new(7)));
    }

    #[test]
    fn slots_are_given_once_and_come_back() {
        let mut slots = Slots::default();
        assert_eq!(slots.take(1), None);
        slots.set_capacity(PageCount::new(100));
        let mut held = Vec::new();
        while let Some(run) = slots.take(7) {
            held.extend((0..run.count.get()).map(|i| run.start.get() + i));
        }
        held.sort_unstable();
        assert_eq!(held, (0..100).collect::<Vec<_>>());
        for slot in held.iter().filter(|s| *s % 3 != 0) {
            assert!(slots.release(PageIndex::new(*slot)));
        }
        assert_eq!(slots.available(), 0, "not before the servers have been told");
        for slot in held.iter().filter(|s| *s % 3 != 0) {
            slots.free(PageRange { start: PageIndex::new(*slot), count: PageCount::new(1) });
        }
        assert_eq!(slots.available(), 66);
        assert_eq!(slots.take(2).unwrap().count, PageCount::new(2));
        assert_eq!(slots.in_use(), (36, 100));
    }

    #[test]
    fn a_shared_slot_is_free_when_the_last_holder_lets_go() {
        let mut slots = Slots::default();
        slots.set_capacity(PageCount::new(1));
        let slot = slots.take(1).unwrap().start;
        slots.share(slot);
        slots.share(slot);
        assert!(slots.is_shared(slot));
        assert!(!slots.release(slot));
        assert!(!slots.release(slot));
        assert!(!slots.is_shared(slot));
        assert!(slots.release(slot));
    }
}
