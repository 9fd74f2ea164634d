//! The order of changes: the kernel reports what threads do to a process's mappings, but not
//! always in the order in which they did it.
//!
//! A thread reports a change when it has made it. Another thread that uses the freed addresses at
//! once may be heard first. While a report is outstanding the kernel fills no page, and
//! [`Memory::look`](crate::Memory::look) says so. So a change that cannot have happened yet
//! (memory moved to a place that, as far as is known, is still in use) waits together with all that
//! concerns the same addresses until everything is reported; then the order can be told. A fork
//! waits in any case: see `forks.rs`.
//!
//! munmap is reported with all of the range that it was called for, as soon as a part of that is registered.
//! So the report may be of a part, too, that nobody knew of and that another thread has meanwhile moved
//! memory to. Where a move has been heard of first the unmapping waits, and what is there when everything is
//! reported was moved there afterwards.
//!
//! Besides, mremap is reported twice: as a move, and then as the unmapping of the old place, where
//! other memory may be by then.

use std::collections::VecDeque;

use farmem_vmem::{AddressRange, Look};

use crate::engine::{Engine, Io};
use crate::forks::{Fork, Past};
use crate::memory::SpaceId;
use crate::ranges::RangeSet;

/// Changes made that are kept without a moment in which all is reported; beyond that threads that change
/// mappings without a pause are held. About 100 bytes each, and what they have dropped.
const PAST_MAX: usize = 4096;

/// A change of a space's mappings.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Change {
    Remove(AddressRange),
    Unmap(AddressRange),
    Remap { from: AddressRange, to: AddressRange },
}

impl Change {
    fn concerns(&self, range: AddressRange) -> bool {
        match self {
            Self::Remove(own) | Self::Unmap(own) => own.overlaps(range),
            Self::Remap { from, to } => from.overlaps(range) || to.overlaps(range),
        }
    }

    pub(crate) const fn unmapped(self) -> Option<AddressRange> {
        match self {
            Self::Unmap(range) => Some(range),
            Self::Remove(_) | Self::Remap { .. } => None,
        }
    }

    pub(crate) const fn target(self) -> Option<AddressRange> {
        match self {
            Self::Remap { to, .. } => Some(to),
            Self::Remove(_) | Self::Unmap(_) => None,
        }
    }

    pub(crate) const fn moved(self) -> Option<AddressRange> {
        match self {
            Self::Remap { from, .. } => Some(from),
            Self::Remove(_) | Self::Unmap(_) => None,
        }
    }

    /// Where what it concerns begins and ends.
    fn edges(self) -> impl Iterator<Item = usize> {
        let ranges = match self {
            Self::Remove(range) | Self::Unmap(range) => [range, range],
            Self::Remap { from, to } => [from, to],
        };
        ranges.into_iter().flat_map(|range| [range.start(), range.end()])
    }

    fn is_concerned_by(&self, other: &Self) -> bool {
        match self {
            Self::Remove(own) | Self::Unmap(own) => other.concerns(*own),
            Self::Remap { from, to } => other.concerns(*from) || other.concerns(*to),
        }
    }
}

/// When a report was heard.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heard {
    /// The reading that had it: the count at its end.
    pub(crate) reading: u64,
    /// Its place in the order of all reports.
    pub(crate) order: u64,
}

/// What is known of changes that are not all reported yet.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    waiting: VecDeque<(SpaceId, Change, Heard)>,
    /// Reports heard so far.
    heard: u64,
    /// Forks that wait until all changes of their time are reported.
    pub(crate) forks: Vec<Fork>,
    /// Changes made since it was last seen that all were reported, the newest last.
    pub(crate) past: Vec<Past>,
    /// Old places of moved mappings, whose unmapping is still to be reported.
    moved_away: Vec<(SpaceId, AddressRange)>,
}

impl Changes {
    /// While changes of the own space wait nothing may be filled or moved out: the table is behind.
    pub(crate) fn are_waiting(&self) -> bool {
        self.wait_in(SpaceId::OWN)
    }

    /// Whether changes of this space wait.
    pub(crate) fn wait_in(&self, space: SpaceId) -> bool {
        self.waiting.iter().any(|&(other, ..)| other == space)
            || self.forks.iter().any(|fork| fork.parent == space)
    }

    /// Whether changes or forks of this space wait, or may be needed for forks to come.
    pub(crate) fn concern(&self, space: SpaceId) -> bool {
        self.wait_in(space) || self.past.iter().any(|past| past.space == space)
    }

    /// Whether it is time for such a moment.
    pub(crate) fn has_long_past(&self) -> bool {
        self.past.len() > PAST_MAX
    }

    /// Whether changes of any space wait.
    pub(crate) fn wait_anywhere(&self) -> bool {
        !self.waiting.is_empty() || !self.forks.is_empty()
    }

    /// One more report is heard, of this reading.
    pub(crate) const fn hear(&mut self, reading: u64) -> Heard {
        self.heard += 1;
        Heard { reading, order: self.heard }
    }

    pub(crate) fn moved_away(&mut self, space: SpaceId, from: AddressRange) {
        self.moved_away.push((space, from));
    }

    /// Whether the unmapping of this range is the second report of a move.
    pub(crate) fn is_second_report(&mut self, space: SpaceId, range: AddressRange) -> bool {
        let found = self.moved_away.iter().position(|&moved| moved == (space, range));
        found.map(|at| self.moved_away.swap_remove(at)).is_some()
    }

    /// The parts of moves' targets that unmappings which wait are of, too, each such that every change that
    /// waits, or was made lately, concerns all of it or nothing.
    fn moved_and_unmapped(&self, space: SpaceId) -> Vec<AddressRange> {
        let waiting =
            || self.waiting.iter().filter(|&&(other, ..)| other == space).map(|wait| wait.1);
        let unmapped: Vec<AddressRange> = waiting().filter_map(Change::unmapped).collect();
        if unmapped.is_empty() {
            return Vec::new();
        }
        let past = self.past.iter().filter_map(|past| past.target(space));
        let targets = past.chain(waiting().filter_map(Change::target));
        let both = targets.flat_map(|to| unmapped.iter().map(move |range| range.intersect(to)));
        let made = self.past.iter().filter_map(|past| past.change_in(space));
        let edges: Vec<usize> = waiting().chain(made).flat_map(Change::edges).collect();
        let mut parts = Vec::new();
        for part in both.filter(|part| !part.is_empty()) {
            let inside =
                edges.iter().copied().filter(|edge| (part.start()..part.end()).contains(edge));
            let mut cuts: Vec<usize> = inside.chain([part.start(), part.end()]).collect();
            cuts.sort_unstable();
            cuts.dedup();
            parts.extend(cuts.windows(2).map(|cut| AddressRange::new(cut[0], cut[1])));
        }
        parts
    }

    /// Every report has been read: with `MREMAP_DONTUNMAP` there is no second one.
    pub(crate) fn all_reported(&mut self) {
        self.moved_away.retain(|&(space, _)| space != SpaceId::OWN);
    }

    /// Spaces with something that all reports must be read for.
    fn spaces(&self) -> Vec<SpaceId> {
        let waiting = self.waiting.iter().map(|&(space, ..)| space);
        let forks = self.forks.iter().map(|fork| fork.parent);
        let past = self.past.iter().map(|past| past.space);
        let mut spaces: Vec<SpaceId> = waiting.chain(forks).chain(past).collect();
        spaces.sort_unstable();
        spaces.dedup();
        spaces
    }
}

impl Engine {
    /// Makes a change in its turn: now, or when all that came before it is reported.
    pub(crate) fn make_in_turn(&mut self, io: &mut Io<'_>, space: SpaceId, change: Change) {
        let concerned = |&(other, waiting, _): &(SpaceId, Change, Heard)| {
            other == space && change.is_concerned_by(&waiting)
        };
        let heard = self.changes.hear(io.memory.readings());
        let must_wait = !self.is_possible(space, &change) || self.may_be_older(space, &change);
        if must_wait || self.changes.waiting.iter().any(concerned) {
            self.changes.waiting.push_back((space, change, heard));
        } else {
            self.make(io, space, (change, heard), &RangeSet::default());
        }
    }

    /// Makes the changes that wait, where everything has been reported.
    pub fn catch_up(&mut self, io: &mut Io<'_>) {
        for space in self.changes.spaces() {
            if io.memory.look(space, 0) == Look::Changing {
                continue;
            }
            if let Some(arrived) = self.arrived_at(io, space) {
                self.catch_up_with(io, space, &arrived);
            }
        }
    }

    /// Where memory is that was moved there, as far as it may have been unmapped before; `None` if that cannot
    /// be told as mappings change again.
    fn arrived_at(&self, io: &mut Io<'_>, space: SpaceId) -> Option<RangeSet> {
        let mut arrived = RangeSet::default();
        for part in self.changes.moved_and_unmapped(space) {
            match io.memory.look(space, part.start()) {
                Look::Changing => return None,
                Look::Registered => arrived.insert(part),
                Look::Nothing | Look::Ended => {}
            }
        }
        Some(arrived)
    }

    /// Makes the changes of a space that wait: nothing more will be reported of their time. `arrived` is
    /// what is there although an unmapping of it may be among them.
    pub(crate) fn catch_up_with(&mut self, io: &mut Io<'_>, space: SpaceId, arrived: &RangeSet) {
        while let Some(change) = self.next_change(space) {
            self.make(io, space, change, arrived);
        }
        self.make_forks(io, space);
        self.forget_past(space);
    }

    /// Takes the first change, or the one that must have come before it: what freed its target.
    fn next_change(&mut self, space: SpaceId) -> Option<(Change, Heard)> {
        let waiting = &self.changes.waiting;
        let of_space = |&(other, ..): &(SpaceId, Change, Heard)| other == space;
        let mut at = waiting.iter().position(of_space)?;
        for _ in 0..waiting.len() {
            let change = waiting[at].1;
            let Some(target) = change.target() else {
                break;
            };
            if self.is_possible(space, &change) {
                break;
            }
            let frees = |kind: fn(Change) -> Option<AddressRange>| {
                waiting.iter().position(|&(other, change, _)| {
                    other == space && kind(change).is_some_and(|range| range.overlaps(target))
                })
            };
            let Some(freed) = frees(Change::moved).or_else(|| frees(Change::unmapped)) else {
                break;
            };
            at = freed;
        }
        self.changes.waiting.remove(at).map(|(_, change, heard)| (change, heard))
    }

    /// Whether the change can have happened in the space as it is known: memory is only ever moved
    /// to where none is.
    fn is_possible(&self, space: SpaceId, change: &Change) -> bool {
        match change {
            Change::Remap { to, .. } => {
                self.ranges(space).is_none_or(|ranges| ranges.overlapping(*to).is_empty())
            }
            Change::Remove(_) | Change::Unmap(_) => true,
        }
    }

    /// Whether the change was perhaps made before a move that was heard of before it, to a part of its range. Who
    /// unmaps nothing known but what was moved there has done so afterwards: else it would not be reported.
    fn may_be_older(&self, space: SpaceId, change: &Change) -> bool {
        let Change::Unmap(range) = *change else {
            return false;
        };
        let mut targets = RangeSet::default();
        let past = self.changes.past.iter().filter_map(|past| past.target(space));
        past.filter(|to| to.overlaps(range)).for_each(|to| targets.insert(to));
        if targets.is_empty() || self.changes.moved_away.contains(&(space, range)) {
            return false;
        }
        let known = self.ranges(space).map(|ranges| ranges.inside(range)).unwrap_or_default();
        known.into_iter().any(|part| targets.gaps(part).iter().any(|gap| !gap.is_empty()))
    }

    /// The space is gone: nothing more will be reported.
    pub(crate) fn forget_changes(&mut self, gone: SpaceId) {
        self.changes.moved_away.retain(|&(space, _)| space != gone);
    }
}
