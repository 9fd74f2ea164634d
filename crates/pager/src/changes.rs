//! The order of changes: the kernel reports what threads do to the program's mappings, but not
//! always in the order in which they did it.
//!
//! A thread reports a change when it has made it. Another thread that uses the freed addresses at
//! once may be heard first. While a report is outstanding the kernel fills no page, and
//! [`Memory::settled`](crate::Memory::settled) is false. So a change that cannot have happened yet
//! (memory moved to a place that, as far as is known, is still in use) waits together with all that
//! concerns the same addresses until everything is reported; then the order can be told.
//!
//! Besides, mremap is reported twice: as a move, and then as the unmapping of the old place, where
//! other memory may be by then.

use std::collections::VecDeque;

use farmem_vmem::{AddressRange, Uffd};

use crate::engine::{Engine, Fatal, Io};
use crate::memory::SpaceId;

/// A change of the own space's mappings that waits for its turn.
#[derive(Debug)]
pub(crate) enum Change {
    Remove(AddressRange),
    Unmap(AddressRange),
    Remap { from: AddressRange, to: AddressRange },
    Fork(Uffd),
}

impl Change {
    fn concerns(&self, range: AddressRange) -> bool {
        match self {
            Self::Remove(own) | Self::Unmap(own) => own.overlaps(range),
            Self::Remap { from, to } => from.overlaps(range) || to.overlaps(range),
            // The child inherits everything.
            Self::Fork(_) => true,
        }
    }

    fn is_concerned_by(&self, other: &Self) -> bool {
        match self {
            Self::Remove(own) | Self::Unmap(own) => other.concerns(*own),
            Self::Remap { from, to } => other.concerns(*from) || other.concerns(*to),
            Self::Fork(_) => true,
        }
    }
}

/// What is known of changes that are not all reported yet.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    waiting: VecDeque<Change>,
    /// Old places of moved mappings, whose unmapping is still to be reported.
    moved_away: Vec<(SpaceId, AddressRange)>,
}

impl Changes {
    /// While changes wait nothing may be filled or moved out: the table is behind.
    pub(crate) fn are_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(crate) fn moved_away(&mut self, space: SpaceId, from: AddressRange) {
        self.moved_away.push((space, from));
    }

    /// Whether the unmapping of this range is the second report of a move.
    pub(crate) fn is_second_report(&mut self, space: SpaceId, range: AddressRange) -> bool {
        let found = self.moved_away.iter().position(|&moved| moved == (space, range));
        found.map(|at| self.moved_away.swap_remove(at)).is_some()
    }

    /// Every report has been read: with `MREMAP_DONTUNMAP` there is no second one.
    pub(crate) fn all_reported(&mut self) {
        self.moved_away.retain(|&(space, _)| space != SpaceId::OWN);
    }

    pub(crate) fn forget(&mut self, gone: SpaceId) {
        self.moved_away.retain(|&(space, _)| space != gone);
    }
}

impl Engine {
    /// Makes a change wait if it must; gives it back if it may be made now.
    pub(crate) fn in_turn(&mut self, change: Change) -> Option<Change> {
        let waiting = &mut self.changes.waiting;
        let early = !is_possible(&self.adopted, &change);
        if early || waiting.iter().any(|other| change.is_concerned_by(other)) {
            waiting.push_back(change);
            return None;
        }
        Some(change)
    }

    /// Makes the changes that wait, if everything has been reported.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn catch_up(&mut self, io: &mut Io<'_>) -> Result<(), Fatal> {
        if !self.changes.are_waiting() || !io.memory.settled() {
            return Ok(());
        }
        while let Some(change) = self.next_change() {
            match change {
                Change::Remove(range) => self.remove(io, SpaceId::OWN, range),
                Change::Unmap(range) => self.unmap(io, SpaceId::OWN, range)?,
                Change::Remap { from, to } => self.remap(io, SpaceId::OWN, from, to)?,
                Change::Fork(uffd) => self.fork(io, SpaceId::OWN, uffd),
            }
        }
        Ok(())
    }

    /// Takes the first change, or the one that must have come before it: what freed its target.
    fn next_change(&mut self) -> Option<Change> {
        let waiting = &mut self.changes.waiting;
        let mut at = 0;
        for _ in 0..waiting.len() {
            let Some(Change::Remap { to, .. }) = waiting.get(at) else {
                break;
            };
            if is_possible(&self.adopted, &waiting[at]) {
                break;
            }
            let target = *to;
            let moves = |change: &Change| matches!(change, Change::Remap { from, .. } if from.overlaps(target));
            let unmaps =
                |change: &Change| matches!(change, Change::Unmap(range) if range.overlaps(target));
            let freed = waiting.iter().position(moves).or_else(|| waiting.iter().position(unmaps));
            let Some(freed) = freed else { break };
            at = freed;
        }
        waiting.remove(at)
    }
}

/// Whether the change can have happened in the space as it is known: memory is only ever moved to
/// where none is.
fn is_possible(adopted: &crate::ranges::RangeSet, change: &Change) -> bool {
    match change {
        Change::Remap { to, .. } => adopted.overlapping(*to).is_empty(),
        Change::Remove(_) | Change::Unmap(_) | Change::Fork(_) => true,
    }
}
