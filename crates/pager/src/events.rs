//! What the program does to its mappings, as the kernel reports it.
//!
//! While such a change is under way the kernel refuses to fill pages (`Stop::Retry`), so what the
//! table says when the event is read is what was true when the change began.

use farmem_region::{Nanos, PAGE_SIZE};
use farmem_vmem::{AddressRange, Uffd};

use crate::changes::Change;
use crate::engine::{Engine, Fatal, Io, Space};
use crate::memory::SpaceId;
use crate::ranges::RangeSet;
use crate::streams::Streams;
use crate::table::{Entry, PageTable, Place};

/// How long pages of a removed range that are still there are left alone. The kernel announces
/// madvise *before* it drops the pages; the thread that called then needs to run for some
/// instructions. A page moved out in between would come back with its old content.
const QUARANTINE_NANOS: u64 = 1_000_000_000;

/// Ranges whose removal was announced a short while ago.
#[derive(Debug, Default)]
pub(crate) struct Quarantine {
    recent: RangeSet,
    older: RangeSet,
    turned: Nanos,
}

impl Quarantine {
    fn insert(&mut self, range: AddressRange) {
        self.recent.insert(range);
    }

    fn remove(&mut self, range: AddressRange) {
        self.recent.remove(range);
        self.older.remove(range);
    }

    fn is_due(&self, now: Nanos) -> bool {
        !self.is_empty() && now.since(self.turned) >= QUARANTINE_NANOS
    }

    /// Forgets what was inserted more than one period ago.
    fn age(&mut self, now: Nanos) {
        self.older = std::mem::take(&mut self.recent);
        self.turned = now;
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.recent.is_empty() && self.older.is_empty()
    }

    pub(crate) fn overlaps(&self, range: AddressRange) -> bool {
        let hits =
            |set: &RangeSet| set.next_from(range.start()).is_some_and(|part| part.overlaps(range));
        !self.is_empty() && (hits(&self.recent) || hits(&self.older))
    }
}

impl Engine {
    /// Lets quarantined ranges go when their time is over and no change is under way.
    pub fn age_quarantine(&mut self, io: &mut Io<'_>) {
        let now = (io.clock)();
        if self.quarantine.is_due(now) && io.memory.settled() {
            self.quarantine.age(now);
        }
    }

    /// The program's contents of a range are about to be dropped: they read as zero from now on.
    pub fn on_remove(&mut self, io: &mut Io<'_>, space: SpaceId, range: AddressRange) {
        self.counts.events += 1;
        self.counts.removes += 1;
        if space != SpaceId::OWN || self.in_turn(Change::Remove(range)).is_some() {
            self.remove(io, space, range);
        }
    }

    pub(crate) fn remove(&mut self, io: &mut Io<'_>, space: SpaceId, range: AddressRange) {
        self.drop_pages(io, space, range);
        if space == SpaceId::OWN {
            self.quarantine.insert(range);
        }
    }

    /// A mapping is gone.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn on_unmap(
        &mut self,
        io: &mut Io<'_>,
        space: SpaceId,
        range: AddressRange,
    ) -> Result<(), Fatal> {
        self.counts.events += 1;
        self.counts.unmaps += 1;
        if space != SpaceId::OWN || self.in_turn(Change::Unmap(range)).is_some() {
            self.unmap(io, space, range)?;
        }
        Ok(())
    }

    pub(crate) fn unmap(
        &mut self,
        io: &mut Io<'_>,
        space: SpaceId,
        range: AddressRange,
    ) -> Result<(), Fatal> {
        if self.changes.is_second_report(space, range) {
            return Ok(());
        }
        if space == SpaceId::OWN {
            self.adopted.remove(range);
            self.pinned.remove(range);
            self.quarantine.remove(range);
        }
        self.drop_pages(io, space, range);
        Ok(())
    }

    /// mremap has moved a mapping.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn on_remap(
        &mut self,
        io: &mut Io<'_>,
        space: SpaceId,
        from: AddressRange,
        to: usize,
    ) -> Result<(), Fatal> {
        self.counts.events += 1;
        self.counts.remaps += 1;
        let to = AddressRange::pages_from(to, from.pages());
        if space != SpaceId::OWN || self.in_turn(Change::Remap { from, to }).is_some() {
            self.remap(io, space, from, to)?;
        }
        Ok(())
    }

    pub(crate) fn remap(
        &mut self,
        io: &mut Io<'_>,
        space: SpaceId,
        from: AddressRange,
        target: AddressRange,
    ) -> Result<(), Fatal> {
        self.changes.moved_away(space, from);
        if space == SpaceId::OWN {
            self.adopted.remove(from);
            self.adopted.insert(target);
            self.pinned.remove(from);
            if self.quarantine.overlaps(from) {
                self.quarantine.remove(from);
                self.quarantine.insert(target);
            }
        }
        self.drop_pages(io, space, target);
        let mut moved = Vec::new();
        if let Some(table) = self.table_mut(space) {
            table.take_range(from, &mut |address, entry| moved.push((address, entry)));
        }
        for (address, entry) in moved {
            let next = target.start() + (address - from.start());
            self.move_entry(space, address, next, entry);
        }
        // Who waited at the old place looks again, and finds no mapping there.
        io.memory.wake(space, from);
        Ok(())
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
        change: &mut dyn FnMut(&mut crate::engine::FetchingPage),
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
        let mut dropped = Vec::new();
        if let Some(table) = self.table_mut(space) {
            table.take_range(range, &mut |address, entry| dropped.push((address, entry)));
        }
        self.recount |= space == SpaceId::OWN;
        for (address, mut entry) in dropped {
            match entry.place() {
                Place::Victim(frame) => self.forget_frame(frame),
                Place::Fetching => {
                    self.for_fetching(space, address, &mut |page| page.cancelled = true);
                    io.memory.wake(space, AddressRange::pages_from(address, 1));
                }
                Place::Resident | Place::Zero | Place::Out => {}
            }
            if let Some(slot) = entry.take_copy() {
                self.release(slot);
            }
        }
    }

    /// The process of a space has forked: the child inherits, by reference, what is out.
    ///
    /// A page that is there at the moment of the fork is there in the child as well and never
    /// faults; so only the entries of absent pages matter, and those cannot have changed since,
    /// because pages are not filled while the event is unread. Pages moved out in between have
    /// entries too; they do no harm, as the child has those pages.
    pub fn on_fork(&mut self, io: &mut Io<'_>, parent: SpaceId, uffd: Uffd) {
        self.counts.events += 1;
        if parent != SpaceId::OWN {
            return self.fork(io, parent, uffd);
        }
        if let Some(Change::Fork(uffd)) = self.in_turn(Change::Fork(uffd)) {
            self.fork(io, parent, uffd);
        }
    }

    pub(crate) fn fork(&mut self, io: &mut Io<'_>, parent: SpaceId, uffd: Uffd) {
        self.counts.forks += 1;
        let id = SpaceId(self.next_space);
        self.next_space += 1;
        let mut table = match self.space_mut(parent) {
            Some(space) => space.table.clone(),
            None => PageTable::default(),
        };
        let slots = &mut self.slots;
        table.retain(&mut |_, entry| match entry.place() {
            Place::Resident => false,
            Place::Zero => true,
            Place::Out | Place::Fetching | Place::Victim(_) => {
                entry.set_place(Place::Out);
                entry.copy().is_some_and(|(slot, _)| {
                    slots.share(slot);
                    true
                })
            }
        });
        let streams = Streams::new(self.readahead_pages_max);
        self.spaces.push(Space { id, table, streams });
        io.memory.add_space(id, uffd);
    }

    /// A forked child has ended, or started another program: its share of the region is free.
    pub fn on_space_gone(&mut self, io: &mut Io<'_>, space: SpaceId) {
        self.drop_pages(io, space, AddressRange::new(0, usize::MAX & !(PAGE_SIZE - 1)));
        self.spaces.retain(|other| other.id != space);
        self.changes.forget(space);
        self.deferred.retain(|fault| fault.space != space);
        io.memory.remove_space(space);
    }

    /// The forked children that are served.
    pub fn child_spaces(&self) -> impl Iterator<Item = SpaceId> + '_ {
        self.spaces.iter().map(|space| space.id).filter(|&id| id != SpaceId::OWN)
    }
}
