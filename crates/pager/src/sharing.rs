//! Pages that a forked child has too: the kernel does not move them.
//!
//! They become the program's own when they are written to. A second thread of the pager lets the
//! kernel do as if they were ([`Memory::unshare`](crate::Memory::unshare)), a window at a time,
//! just before the window is moved out: where the child lives it costs a copy of each page. What
//! refuses to be moved even then is pinned, and the window is not asked for again before the next
//! fork.

use std::collections::HashSet;

use farmem_region::PAGE_SIZE;
use farmem_vmem::AddressRange;

use crate::engine::{Engine, Io};
use crate::frames::WINDOW_FRAMES;

/// Windows that are made movable ahead of their eviction at most. Their copies are above the limit
/// for that long: 2 MiB.
const WINDOWS_MAX: usize = 2;
const WINDOW_BYTES: usize = WINDOW_FRAMES * PAGE_SIZE;

/// What is known of sharing.
#[derive(Debug, Default)]
pub(crate) struct Sharing {
    /// Windows, by number, whose pages have been made the program's own since the last fork.
    unshared: HashSet<usize>,
    /// Windows asked for and not taken back.
    pending: usize,
    /// Of these, how many were asked for before the last fork.
    outdated: usize,
}

impl Sharing {
    /// From now on a child may have all pages too.
    pub(crate) fn on_fork(&mut self) {
        self.unshared.clear();
        self.outdated = self.pending;
    }

    /// Pages have come from elsewhere.
    pub(crate) fn on_arrival(&mut self, target: AddressRange) {
        let (first, last) = (target.start() / WINDOW_BYTES, target.end() / WINDOW_BYTES);
        self.unshared.retain(|window| !(first..=last).contains(window));
    }

    /// Whether windows are being made movable.
    pub(crate) const fn is_pending(&self) -> bool {
        self.pending > 0
    }

    /// Whether no more can be asked for now.
    pub(crate) const fn is_busy(&self) -> bool {
        self.pending >= WINDOWS_MAX
    }
}

impl Engine {
    /// Whether windows are being made movable.
    pub(crate) const fn is_unsharing(&self) -> bool {
        self.sharing.is_pending()
    }

    /// Begins to make the pages of a window movable that has a page at `address` which was not;
    /// false if that was done already, or cannot be.
    pub(crate) fn unshare(&mut self, io: &mut Io<'_>, address: usize) -> bool {
        let window = address / WINDOW_BYTES;
        if self.sharing.is_busy() || self.sharing.unshared.contains(&window) {
            return false;
        }
        let Some(adopted) = self.adopted.find(address) else {
            return false;
        };
        let around = AddressRange::pages_from(window * WINDOW_BYTES, WINDOW_FRAMES);
        let asked = io.memory.unshare(around.intersect(adopted));
        self.sharing.pending += usize::from(asked);
        asked
    }

    /// Takes a window back that has been made movable as far as possible, and is adopted still.
    pub(crate) fn next_unshared(&mut self, io: &mut Io<'_>) -> Option<AddressRange> {
        while let Some(range) = io.memory.unshared() {
            self.counts.unshared_windows += 1;
            self.sharing.pending -= 1;
            if self.sharing.outdated > 0 {
                self.sharing.outdated -= 1;
            } else {
                self.sharing.unshared.insert(range.start() / WINDOW_BYTES);
            }
            let adopted = self.adopted.find(range.start());
            if adopted.is_some_and(|adopted| range.end() <= adopted.end()) {
                return Some(range);
            }
        }
        None
    }
}
