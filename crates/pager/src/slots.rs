//! Which pages of the region are in use. A slot is a page of the region that holds the server's
//! copy of one page of the program; the table from pages to slots is the client's.

use std::collections::{BTreeMap, HashMap};

use farmem_region::{PageCount, PageIndex, PageRange};

/// Slots are numbered in 32 bits, the last number means none: 16 TiB of external memory.
pub(crate) const SLOTS_MAX: u64 = (u32::MAX - 1) as u64;

/// Hands out runs of slots, so that neighbouring addresses get neighbouring slots and are read
/// back together.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    /// Slots that the region has.
    capacity: u64,
    /// Slots from here on were never used.
    fresh: u64,
    /// Freed runs below `fresh`: start to length.
    free: BTreeMap<u64, u64>,
    free_count: u64,
    /// Slots with more than one holder (after fork): number of holders beyond the first.
    shared: HashMap<u64, u32>,
    in_use: u64,
    in_use_peak: u64,
}

impl Slots {
    /// The region has now `pages` pages.
    pub(crate) fn set_capacity(&mut self, pages: PageCount) {
        self.capacity = pages.get().min(SLOTS_MAX);
    }

    /// Slots that can be taken before the region must grow.
    #[must_use]
    pub(crate) const fn available(&self) -> u64 {
        self.capacity.saturating_sub(self.fresh) + self.free_count
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
            self.in_use += run.count.get();
            self.in_use_peak = self.in_use_peak.max(self.in_use);
        }
        run
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

    /// One more holder of a slot in use.
    pub(crate) fn share(&mut self, slot: PageIndex) {
        *self.shared.entry(slot.get()).or_insert(0) += 1;
    }

    /// Whether a slot has several holders: then its content must not be written over.
    #[must_use]
    pub(crate) fn is_shared(&self, slot: PageIndex) -> bool {
        self.shared.contains_key(&slot.get())
    }

    /// One holder less. Returns whether that was the last one, so that the servers may forget the
    /// page.
    pub(crate) fn release(&mut self, slot: PageIndex) -> bool {
        let number = slot.get();
        if let Some(others) = self.shared.get_mut(&number) {
            *others -= 1;
            if *others == 0 {
                self.shared.remove(&number);
            }
            return false;
        }
        let (mut start, mut length) = (number, 1);
        if let Some((&s, &l)) = self.free.range(..number).next_back()
            && s + l == number
        {
            self.free.remove(&s);
            start = s;
            length += l;
        }
        if let Some(l) = self.free.remove(&(number + 1)) {
            length += l;
        }
        self.free.insert(start, length);
        self.free_count += 1;
        self.in_use -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
