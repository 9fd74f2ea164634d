//! What the program does to its mappings, as the kernel reports it.
//!
//! While such a change is under way the kernel refuses to fill pages (`Stop::Retry`), so what the
//! table says when the event is read is what was true when the change began.

use farmem_region::{Nanos, PAGE_SIZE, PageIndex};
use farmem_vmem::AddressRange;

use crate::changes::{Change, Heard};
use crate::engine::{Engine, FetchingPage, Io};
use crate::memory::SpaceId;
use crate::ranges::RangeSet;
use crate::table::{Detached, Entry, PageTable, Place};

/// The threads that may still be dropping pages are looked at this often.
const LOOK_PERIOD_MICROS: u64 = 20_000;
/// And so rarely that looking costs a hundredth of the time at most, however many they are.
const LOOK_PERIOD_PER_COST: u64 = 100;

/// Ranges whose removal was announced. The kernel announces madvise *before* it drops the pages; the
/// thread that called then needs to run for some instructions. A page moved out in between would
/// come back with its old content, so pages of these ranges that are still there are left alone.
#[derive(Debug, Default)]
pub(crate) struct Quarantine {
    /// Announced since the watch began.
    recent: RangeSet,
    /// Those whose callers are watched.
    watched: RangeSet,
    next_look: Nanos,
}

impl Quarantine {
    pub(crate) fn insert(&mut self, range: AddressRange) {
        self.recent.insert(range);
    }

    fn remove(&mut self, range: AddressRange) {
        self.recent.remove(range);
        self.watched.remove(range);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.recent.is_empty() && self.watched.is_empty()
    }

    pub(crate) fn overlaps(&self, range: AddressRange) -> bool {
        let hits =
            |set: &RangeSet| set.next_from(range.start()).is_some_and(|part| part.overlaps(range));
        !self.is_empty() && (hits(&self.recent) || hits(&self.watched))
    }
}

impl Engine {
    /// Lets quarantined ranges go when whoever drops pages there has done it.
    pub fn age_quarantine(&mut self, io: &mut Io<'_>) {
        if self.quarantine.is_empty() {
            return;
        }
        let start = (io.clock)();
        if start < self.quarantine.next_look {
            return;
        }
        let quarantine = &mut self.quarantine;
        if !quarantine.watched.is_empty() && io.memory.removers_are_done() {
            quarantine.watched = RangeSet::default();
        }
        if quarantine.watched.is_empty() && !quarantine.recent.is_empty() && io.memory.settled() {
            // Whose removal has been read has gone on.
            quarantine.watched = std::mem::take(&mut quarantine.recent);
            io.memory.watch_removers();
        }
        let now = (io.clock)();
        let pause = (now.since(start) / 1000).saturating_mul(LOOK_PERIOD_PER_COST);
        quarantine.next_look = now.plus_micros(pause.max(LOOK_PERIOD_MICROS));
    }

    /// The program's contents of a range are about to be dropped: they read as zero from now on.
    pub fn on_remove(&mut self, io: &mut Io<'_>, space: SpaceId, range: AddressRange) {
        self.counts.events += 1;
        self.counts.removes += 1;
        self.make_in_turn(io, space, Change::Remove(range));
    }

    /// A mapping is gone.
    pub fn on_unmap(&mut self, io: &mut Io<'_>, space: SpaceId, range: AddressRange) {
        self.counts.events += 1;
        self.counts.unmaps += 1;
        self.make_in_turn(io, space, Change::Unmap(range));
    }

    /// mremap has moved a mapping.
    pub fn on_remap(&mut self, io: &mut Io<'_>, space: SpaceId, from: AddressRange, to: usize) {
        self.counts.events += 1;
        self.counts.remaps += 1;
        let to = AddressRange::pages_from(to, from.pages());
        self.make_in_turn(io, space, Change::Remap { from, to });
    }

    /// Follows a change in the table that was heard of then. Where memory has `arrived` since nothing
    /// was unmapped.
    pub(crate) fn make(
        &mut self,
        io: &mut Io<'_>,
        space: SpaceId,
        (change, heard): (Change, Heard),
        arrived: &RangeSet,
    ) {
        self.settle_looks(io);
        match change {
            Change::Remove(range) => {
                let lost = self.remove(io, space, range);
                self.remember(space, (change, heard), lost, Vec::new());
            }
            Change::Unmap(range) if self.changes.is_second_report(space, range) => {
                self.changes.past.iter_mut().for_each(|past| past.vacate(space, range));
            }
            Change::Unmap(range) => {
                for part in arrived.gaps(range) {
                    let known = self.ranges(space).map(|ranges| ranges.inside(part));
                    let lost = self.unmap(io, space, part);
                    let made = (Change::Unmap(part), heard);
                    self.remember(space, made, lost, known.unwrap_or_default());
                }
            }
            Change::Remap { from, to } => {
                let lost = self.remap(io, space, from, to);
                self.remember(space, (change, heard), lost, Vec::new());
            }
        }
    }

    fn remove(&mut self, io: &mut Io<'_>, space: SpaceId, range: AddressRange) -> Detached {
        if space == SpaceId::OWN {
            self.quarantine.insert(range);
        }
        self.forget_doubts(space, range);
        self.take_pages(io, space, range)
    }

    /// Forgets that the range is looked after, and what is known of its pages.
    pub(crate) fn unmap(
        &mut self,
        io: &mut Io<'_>,
        space: SpaceId,
        range: AddressRange,
    ) -> Detached {
        if let Some(ranges) = self.ranges_mut(space) {
            ranges.remove(range);
        }
        if space == SpaceId::OWN {
            self.pinned.remove(range);
            self.quarantine.remove(range);
        }
        self.forget_doubts(space, range);
        self.take_pages(io, space, range)
    }

    fn remap(
        &mut self,
        io: &mut Io<'_>,
        space: SpaceId,
        from: AddressRange,
        target: AddressRange,
    ) -> Detached {
        self.changes.moved_away(space, from);
        if let Some(ranges) = self.ranges_mut(space) {
            ranges.remove(from);
            ranges.insert(target);
        }
        if space == SpaceId::OWN {
            self.pinned.remove(from);
            if self.quarantine.overlaps(from) {
                self.quarantine.remove(from);
                self.quarantine.insert(target);
            }
        }
        if space == SpaceId::OWN {
            self.sharing.on_arrival(target);
        }
        self.forget_doubts(space, target);
        self.move_doubts(space, from, target);
        let lost = self.take_pages(io, space, target);
        let moved = self.table_mut(space).map(|table| table.detach(from));
        if let Some(moved) = moved {
            moved.into_entries(&mut |address, entry| {
                let next = target.start() + (address - from.start());
                self.move_entry(space, address, next, entry);
            });
        }
        // Who waited at the old place looks again, and finds no mapping there.
        io.memory.wake(space, from);
        lost
    }

    fn move_entry(&mut self, space: SpaceId, address: usize, next: usize, entry: Entry) {
        use crate::frames::FrameUse;
        match entry.place() {
            Place::Victim(frame) => {
                let changed = match self.frames.frame(frame) {
                    FrameUse::Victim(_) => FrameUse::Victim(next),
                    FrameUse::Writing(_) => FrameUse::Writing(next),
                    _ => unreachable!("a victim's frame holds it"),
                };
                self.frames.set(frame, changed);
                for marker in self.markers.iter_mut().filter(|m| m.1 == frame) {
                    marker.0 = next;
                }
            }
            Place::Fetching => self.for_fetching(space, address, &mut |page| {
                page.address = next;
                page.wanted = true;
            }),
            Place::Resident | Place::Zero | Place::Out => {}
        }
        if let Some(table) = self.table_mut(space) {
            table.put(next, entry);
        }
    }

    fn for_fetching(
        &mut self,
        space: SpaceId,
        address: usize,
        change: &mut dyn FnMut(&mut FetchingPage),
    ) {
        let fetches = self.fetches.values_mut().chain(self.arrived.iter_mut());
        for fetch in fetches.filter(|fetch| fetch.space == space) {
            for page in fetch.pages.iter_mut().filter(|p| p.address == address && !p.cancelled) {
                change(page);
            }
        }
    }

    /// Forgets everything known of a range and wakes who waits there.
    pub(crate) fn drop_pages(&mut self, io: &mut Io<'_>, space: SpaceId, range: AddressRange) {
        let lost = self.take_pages(io, space, range);
        self.release_all(lost);
    }

    /// As [`Self::drop_pages`], but the slots are still held by what is returned.
    pub(crate) fn take_pages(
        &mut self,
        io: &mut Io<'_>,
        space: SpaceId,
        range: AddressRange,
    ) -> Detached {
        let table = self.table_mut(space);
        let taken = table.map_or_else(Detached::default, |table| table.detach(range));
        self.recount |= space == SpaceId::OWN;
        taken.for_each(&mut |address, entry| match entry.place() {
            Place::Victim(frame) => self.forget_frame(frame),
            Place::Fetching => {
                self.cancel(space, address, entry.copy().map(|(slot, _)| slot));
                io.memory.wake(space, AddressRange::pages_from(address, 1));
            }
            Place::Resident | Place::Zero | Place::Out => {}
        });
        taken
    }

    /// What is fetched to a page will not be needed. Its slot is held until it has come: a fetch may have to
    /// be repeated, over another connection or because it came damaged, and must find then what it asked
    /// for, not that the page was released or another one stored there.
    fn cancel(&mut self, space: SpaceId, address: usize, slot: Option<PageIndex>) {
        let mut cancelled = false;
        self.for_fetching(space, address, &mut |page| {
            (page.cancelled, page.held) = (true, slot);
            cancelled = true;
        });
        if let Some(slot) = slot.filter(|_| cancelled) {
            self.slots.share(slot);
            self.held_slots += 1;
        }
    }

    /// A page that was dropped while it was fetched has come, or never will.
    pub(crate) fn let_go(&mut self, page: &FetchingPage) {
        self.forget_frame(page.frame);
        if let Some(slot) = page.held {
            self.held_slots -= 1;
            self.release(slot);
        }
    }

    /// Releases the slots of what is gone.
    pub(crate) fn release_all(&mut self, lost: Detached) {
        lost.into_slots(&mut |slot| self.release(slot));
    }

    /// As [`Self::release_all`], of entries that were in no table any more.
    pub(crate) fn release_entries(&mut self, lost: &[Entry]) {
        for (slot, _) in lost.iter().filter_map(Entry::copy) {
            self.release(slot);
        }
    }

    /// A forked child has ended, or started another program: its share of the region is free.
    pub fn on_space_gone(&mut self, io: &mut Io<'_>, space: SpaceId) {
        self.catch_up_with(io, space, &RangeSet::default());
        let everything = AddressRange::new(0, usize::MAX & !(PAGE_SIZE - 1));
        self.forget_doubts(space, everything);
        let fetches = self.fetches.values().chain(&self.arrived).filter(|f| f.space == space);
        let pages = fetches.flat_map(|fetch| &fetch.pages).filter(|page| !page.cancelled);
        for address in pages.map(|page| page.address).collect::<Vec<_>>() {
            let entry = self.table_mut(space).and_then(|table| table.get(address));
            self.cancel(space, address, entry.and_then(|entry| entry.copy()).map(|(slot, _)| slot));
        }
        if let Some(lost) = self.table_mut(space).map(PageTable::detach_all) {
            self.release_all(lost);
        }
        self.spaces.retain(|other| other.id != space);
        self.forget_changes(space);
        self.deferred.retain(|fault| fault.space != space);
        io.memory.remove_space(space);
    }

    /// The forked children that are served.
    pub fn child_spaces(&self) -> impl Iterator<Item = SpaceId> + '_ {
        self.spaces.iter().map(|space| space.id).filter(|&id| id != SpaceId::OWN)
    }
}
