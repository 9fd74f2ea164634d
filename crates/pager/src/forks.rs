//! Forks: a child has the memory of the instant of its fork.
//!
//! A page that is there at that instant is there in the child as well and never faults. What is out
//! the child shares by reference: its table begins as the parent's. But the parent's other threads
//! go on changing mappings, and their reports come before the fork's or after it, whatever was
//! first. So a child is served only when all that was under way is reported. What was changed in
//! the table meanwhile is remembered ([`Past`]), and taken back for the child where the change came
//! after the fork. The child itself tells which did:
//!
//! * The kernel makes munmap, mremap and fork one after the other. So the child has either the
//!   mapping of before or that of after, and [`Memory::look`](crate::Memory::look) shows it. Where memory was moved
//!   on, or unmapped, after it had been moved, nothing is there before and after: what tells is the first move.
//! * madvise leaves no trace there. But a page of the program's memory holds the number of times
//!   that reports were read, and the child has a copy of it as it was at the fork. A removal that
//!   was read later had not been made. One that was read in the very reading in which the fork came may
//!   have been made before it: the kernel lets who removes go on while the pager still reads. The page is
//!   read when a thread of the child faults, for only then is a thread known: until then what is in
//!   [`Doubt`] has no place.

use farmem_vmem::{AddressRange, Look, Uffd};

use crate::changes::{Change, Heard};
use crate::engine::{Engine, Io, Space};
use crate::handover::Heirless;
use crate::memory::SpaceId;
use crate::ranges::RangeSet;
use crate::streams::Streams;
use crate::table::{Detached, Entry, PageTable, Place};

/// Moves of the same memory, one after the other, that are followed back to find out whether a child was forked
/// before them.
const CHAIN_MAX: usize = 64;

/// A fork that was reported.
#[derive(Debug)]
pub(crate) struct Fork {
    pub(crate) parent: SpaceId,
    child: SpaceId,
    heard: Heard,
}

/// A change that was made in the table. Forks whose reports are still to come may be older.
#[derive(Debug)]
pub(crate) struct Past {
    pub(crate) space: SpaceId,
    change: Change,
    heard: Heard,
    /// What the table had of pages that are gone; it holds their slots.
    lost: Detached,
    /// Of an unmapping: what of its range was registered.
    known: Vec<AddressRange>,
    /// Of a move: that the old place was unmapped has been heard, too. With `MREMAP_DONTUNMAP` it is not.
    vacated: bool,
}

/// A page that the child has if it was forked before the removal was read.
#[derive(Debug, Clone)]
pub(crate) struct Doubt {
    address: usize,
    entry: Entry,
    /// The reading that had the removal.
    reading: u64,
    /// The fork was reported before. Who drops pages waits until that is read, so they were still there at
    /// the fork.
    still_there: bool,
    /// It was reported in the same one. Whoever was heard of first may have gone on, and forked, before that
    /// ended.
    together: bool,
    /// The removal was one of the program that the pager shares memory with: the child's copy of the
    /// number of readings tells, and so does its own children's.
    of_own: bool,
}

/// What a child begins with.
struct Inheritance {
    table: PageTable,
    ranges: RangeSet,
    doubts: Vec<Doubt>,
    /// Where the child has moved memory to: what was there before had gone before.
    moved_to: RangeSet,
}

impl Engine {
    /// The process of a space has forked.
    pub fn on_fork(&mut self, io: &mut Io<'_>, parent: SpaceId, uffd: Uffd) {
        self.counts.events += 1;
        self.counts.forks += 1;
        if parent == SpaceId::OWN {
            self.sharing.on_fork();
        }
        let child = SpaceId(self.next_space);
        self.next_space += 1;
        io.memory.add_space(child, uffd);
        let heard = self.changes.hear(io.memory.readings());
        self.changes.forks.push(Fork { parent, child, heard });
    }

    /// Keeps a change that was made, for forks that may be older.
    pub(crate) fn remember(
        &mut self,
        space: SpaceId,
        (change, heard): (Change, Heard),
        lost: Detached,
        known: Vec<AddressRange>,
    ) {
        if matches!(change, Change::Remove(_)) && !lost.has_copies() {
            return;
        }
        self.changes.past.push(Past { space, change, heard, lost, known, vacated: false });
    }

    /// All that was under way is reported: forks to come are newer than all changes made.
    pub(crate) fn forget_past(&mut self, space: SpaceId) {
        let gone = self.changes.past.extract_if(.., |past| past.space == space);
        let gone: Vec<Past> = gone.collect();
        gone.into_iter().for_each(|past| self.release_all(past.lost));
    }

    /// Gives the children of a space, all of whose changes are reported, what they inherit.
    pub(crate) fn make_forks(&mut self, io: &mut Io<'_>, parent: SpaceId) {
        let forks = self.changes.forks.extract_if(.., |fork| fork.parent == parent);
        let forks: Vec<Fork> = forks.collect();
        if !forks.is_empty() {
            self.settle_looks(io);
        }
        for fork in forks {
            let undecided = self.share_doubts(parent);
            let Inheritance { table, ranges, mut doubts, .. } = self.inherit(io, &fork);
            doubts.extend(undecided);
            let streams = Streams::new(self.readahead_pages_max);
            let (id, parent) = (fork.child, Some(parent));
            self.spaces.push(Space {
                id,
                parent,
                table,
                streams,
                ranges,
                doubts,
                leaving: None,
                heirless: Heirless::default(),
            });
        }
    }

    /// What is not decided yet of a space's pages, for its child: that has them if its parent has.
    fn share_doubts(&mut self, parent: SpaceId) -> Vec<Doubt> {
        let parent = self.spaces.iter().find(|space| space.id == parent);
        let doubts = parent.map(|parent| parent.doubts.clone()).unwrap_or_default();
        for (slot, _) in doubts.iter().filter_map(|doubt| doubt.entry.copy()) {
            self.slots.share(slot);
        }
        doubts
    }

    fn inherit(&mut self, io: &mut Io<'_>, fork: &Fork) -> Inheritance {
        let empty = || PageTable::new(self.slots.holders());
        let parent = self.spaces.iter().find(|space| space.id == fork.parent);
        let table = parent.map_or_else(empty, |parent| parent.table.fork());
        let mut inherited = Inheritance {
            table,
            ranges: self.ranges(fork.parent).cloned().unwrap_or_default(),
            doubts: Vec::new(),
            moved_to: RangeSet::default(),
        };
        let past = std::mem::take(&mut self.changes.past);
        let relevant: Vec<&Past> = past.iter().filter(|past| past.space == fork.parent).collect();
        for (at, newest) in relevant.iter().enumerate().rev() {
            let earlier = &relevant[..at];
            self.take_back(io, fork, newest, earlier, &mut inherited);
        }
        self.changes.past = past;
        inherited
    }

    /// Takes a change back for a child, unless it had been made at the fork.
    fn take_back(
        &mut self,
        io: &mut Io<'_>,
        fork: &Fork,
        past: &Past,
        earlier: &[&Past],
        child: &mut Inheritance,
    ) {
        let mut is_there = |range: &AddressRange| {
            let look = io.memory.look(fork.child, range.start());
            look != Look::Nothing
        };
        match past.change {
            Change::Remove(_) => return self.doubt(fork, past, child),
            Change::Unmap(_) => {
                if child.had_seen(&mut is_there, past, earlier) {
                    return;
                }
                let known = past.known.iter().filter(|part| is_there(part));
                known.for_each(|&part| child.ranges.insert(part));
            }
            Change::Remap { from, to } => {
                let mut look = |range: AddressRange| io.memory.look(fork.child, range.start());
                if [look(from), look(to)].contains(&Look::Changing) {
                    // The child is changing its own mappings already. It has one of the two.
                    self.give_both(from, to, child);
                } else if child.had_seen(&mut |part| look(*part) != Look::Nothing, past, earlier) {
                    child.moved_to.insert(to);
                    return;
                } else {
                    child.move_back(from, to, look(from) != Look::Nothing);
                }
            }
        }
        self.give_back(past, child);
    }

    /// The pages of a removal are the child's if it was forked before.
    fn doubt(&mut self, fork: &Fork, past: &Past, child: &mut Inheritance) {
        past.lost.for_each(&mut |address, entry| {
            let unknown = child.table.get(address).is_none();
            if unknown && let Some(entry) = inherit_copy(&mut self.slots, entry) {
                let reading = past.heard.reading;
                let still_there = past.heard.order > fork.heard.order;
                let together = reading == fork.heard.reading;
                let of_own = past.space == SpaceId::OWN;
                child.doubts.push(Doubt { address, entry, reading, still_there, together, of_own });
            }
        });
    }

    /// Puts what was moved at its old place too.
    fn give_both(&mut self, from: AddressRange, to: AddressRange, child: &mut Inheritance) {
        let moved = child.table.detach(to);
        moved.into_entries(&mut |address, mut entry| {
            child.table.put(address, entry);
            if inherit_entry(&mut self.slots, &mut entry) {
                child.table.put(from.start() + (address - to.start()), entry);
            }
        });
        child.ranges.insert(from);
    }

    /// Gives a child what the parent had lost by a change.
    fn give_back(&mut self, past: &Past, child: &mut Inheritance) {
        past.lost.for_each(&mut |address, entry| {
            let unknown = child.table.get(address).is_none();
            if unknown && let Some(entry) = inherit_copy(&mut self.slots, entry) {
                child.table.put(address, entry);
            }
        });
    }

    /// Decides of pages whose removal may be older or newer than the fork; `thread` is one of the
    /// child's, if one is known.
    pub(crate) fn settle_doubts(&mut self, io: &mut Io<'_>, child: SpaceId, thread: u32) {
        let Some(space) = self.space_mut(child).filter(|space| !space.doubts.is_empty()) else {
            return;
        };
        let doubts = std::mem::take(&mut space.doubts);
        let forked = io.memory.readings_at_fork(child, thread);
        let mut lost = Vec::new();
        for Doubt { address, entry, reading, still_there, together, of_own } in doubts {
            // A reading counts when it begins and when it ends, and `reading` is its end. Of what was read
            // before the fork, it may not be known: most likely it was done then.
            let older = match forked.filter(|_| of_own) {
                Some(forked) => forked + 1 < reading,
                None => together,
            };
            let has = still_there || older;
            match self.table_mut(child) {
                Some(table) if has && table.get(address).is_none() => {
                    table.put(address, entry);
                }
                _ => lost.push(entry),
            }
        }
        self.release_entries(&lost);
    }

    /// The child itself has dropped or replaced pages of a range.
    pub(crate) fn forget_doubts(&mut self, child: SpaceId, range: AddressRange) {
        let Some(space) = self.space_mut(child).filter(|space| !space.doubts.is_empty()) else {
            return;
        };
        let gone = space.doubts.extract_if(.., |doubt| range.contains(doubt.address));
        let gone: Vec<Entry> = gone.map(|doubt| doubt.entry).collect();
        self.release_entries(&gone);
    }

    /// The child itself has moved pages.
    pub(crate) fn move_doubts(&mut self, child: SpaceId, from: AddressRange, to: AddressRange) {
        let doubts = self.space_mut(child).map(|space| &mut space.doubts);
        for doubt in doubts.into_iter().flatten().filter(|doubt| from.contains(doubt.address)) {
            doubt.address = to.start() + (doubt.address - from.start());
        }
    }

    /// The ranges of a space whose missing pages are reported, as far as is known.
    pub(crate) fn ranges(&self, space: SpaceId) -> Option<&RangeSet> {
        if space == SpaceId::OWN {
            return Some(&self.adopted);
        }
        self.spaces.iter().find(|other| other.id == space).map(|space| &space.ranges)
    }

    /// As [`Self::ranges`], to change.
    pub(crate) fn ranges_mut(&mut self, space: SpaceId) -> Option<&mut RangeSet> {
        if space == SpaceId::OWN {
            return Some(&mut self.adopted);
        }
        self.space_mut(space).map(|space| &mut space.ranges)
    }
}

impl Past {
    /// The change, if it was one of the space.
    pub(crate) fn change_in(&self, space: SpaceId) -> Option<Change> {
        (self.space == space).then_some(self.change)
    }

    /// Where memory of the space was moved to.
    pub(crate) fn target(&self, space: SpaceId) -> Option<AddressRange> {
        self.change.target().filter(|_| self.space == space)
    }

    fn has_freed(&self, range: AddressRange) -> bool {
        let freed = self.change.unmapped().or(self.change.moved());
        freed.is_some_and(|freed| freed.overlaps(range))
    }

    /// Notes that the old place of a move is heard to be unmapped.
    pub(crate) fn vacate(&mut self, space: SpaceId, range: AddressRange) {
        self.vacated |= self.space == space && self.change.moved() == Some(range);
    }
}

impl Inheritance {
    /// Whether an unmapping or a move had been made at the fork, by what is there in the child. Newer moves are
    /// decided already, `earlier` changes not yet.
    fn had_seen(
        &self,
        is_there: &mut dyn FnMut(&AddressRange) -> bool,
        past: &Past,
        earlier: &[&Past],
    ) -> bool {
        let reused = |range| !self.moved_to.overlapping(range).is_empty();
        match past.change {
            Change::Remove(_) => false,
            Change::Unmap(range) => {
                // Elsewhere in the range nothing tells: it may reach over what was never registered.
                reused(range)
                    || !past.known.iter().any(&mut *is_there)
                        && self.had_come(is_there, range, earlier)
            }
            Change::Remap { from, to } => {
                let before = is_there(&from);
                // MREMAP_DONTUNMAP leaves a mapping at the old place.
                let mut both = || {
                    let freed = || earlier.iter().any(|past| past.has_freed(to));
                    !past.vacated && is_there(&to) && !freed()
                };
                reused(from) || both() || !before && self.had_come(is_there, from, earlier)
            }
        }
    }

    /// What is not there in a range may have gone before the fork, or been moved there after it.
    fn had_come(
        &self,
        is_there: &mut dyn FnMut(&AddressRange) -> bool,
        range: AddressRange,
        earlier: &[&Past],
    ) -> bool {
        let mut range = range;
        let mut earlier = earlier;
        for _ in 0..CHAIN_MAX {
            let is_arrival =
                |past: &&Past| past.change.target().is_some_and(|to| to.overlaps(range));
            let Some(at) = earlier.iter().rposition(is_arrival) else {
                return true;
            };
            let arrival = earlier[at];
            let Some(from) = arrival.change.moved().filter(|_| arrival.vacated) else {
                // With MREMAP_DONTUNMAP that the old place is there says nothing.
                return true;
            };
            if !self.moved_to.overlapping(from).is_empty() {
                return true;
            }
            if is_there(&from) {
                return false;
            }
            (range, earlier) = (from, &earlier[..at]);
        }
        true
    }

    /// Undoes a move. The old place `is_there` unless memory was moved there after the fork, too.
    fn move_back(&mut self, from: AddressRange, to: AddressRange, is_there: bool) {
        let back = |address: usize| from.start() + (address - to.start());
        let moved = self.table.detach(to);
        moved.into_entries(&mut |address, entry| {
            self.table.put(back(address), entry);
        });
        for doubt in self.doubts.iter_mut().filter(|doubt| to.contains(doubt.address)) {
            doubt.address = back(doubt.address);
        }
        self.ranges.remove(to);
        if is_there {
            self.ranges.insert(from);
        }
    }
}

/// Makes of a parent's entry what a child has, as one more holder of its slot; false if that is
/// nothing.
fn inherit_entry(slots: &mut crate::slots::Slots, entry: &mut Entry) -> bool {
    match entry.place() {
        Place::Resident => false,
        Place::Zero => true,
        Place::Out | Place::Fetching | Place::Victim(_) => {
            entry.set_place(Place::Out);
            entry.copy().is_some_and(|(slot, _)| {
                slots.share(slot);
                true
            })
        }
    }
}

/// As [`inherit_entry`], of what has a copy on the servers.
fn inherit_copy(slots: &mut crate::slots::Slots, entry: &Entry) -> Option<Entry> {
    let mut entry = *entry;
    entry.copy()?;
    inherit_entry(slots, &mut entry).then_some(entry)
}
