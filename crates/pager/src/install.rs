//! Puts fetched pages into the program's memory.

use farmem_region::{FrameId, PAGE_SIZE, StoreError};
use farmem_vmem::{AddressRange, Progress, Stop};

use crate::counts::Latency;
use crate::engine::{BORDER, Engine, Fatal, Fault, Fetch, FetchingPage, Io};
use crate::frames::FrameUse;
use crate::memory::SpaceId;
use crate::table::{Entry, Place};

/// Runs at least this long are always moved.
pub(crate) const MOVE_PAGES_MIN: usize = 8;
/// Shorter ones, but for a single page that a thread waits for, are moved while that takes no
/// longer than this: about what a copy takes with the allocation and the freeing of a page.
const SHORT_MOVE_NANOS_MAX: u64 = 6_000;
/// What one short move counts for at most: now and then one waits for a processor.
const SHORT_MOVE_NANOS_COUNTED: u64 = 10_000;
/// Short runs that are copied after moves have taken longer, before it is tried again.
const COPIES_BETWEEN_TRIES: u32 = 64;
/// Markers kept uninstalled at once; the oldest is given up then.
const MARKERS_MAX: usize = 64;

/// Nothing is read ahead for so long after something of that was refused: what a thread waits for is asked for
/// alone then, so that it is known whose refusal it is.
const ALONE_MICROS: u64 = 100_000;

/// How an attempt to install a run ended.
enum Installed {
    /// That many pages, perhaps fewer than the run has: go on after them.
    Some(usize),
    /// Not now: events must be read first, or memory freed.
    Later,
}

/// Whether short runs are moved or copied. A move changes the page tables at its source too, which
/// interrupts every other processor that runs the program at that moment, once a run: with one
/// thread, which mostly waits, it costs less than a copy, with two that compute several times more.
#[derive(Debug, Default)]
pub(crate) struct ShortMoves {
    /// Decaying average of what a move of a short run takes.
    nanos: u64,
    copies_left: u32,
}

impl ShortMoves {
    /// Whether to move the next short run.
    const fn pay(&mut self) -> bool {
        if self.nanos <= SHORT_MOVE_NANOS_MAX {
            return true;
        }
        if self.copies_left == 0 {
            self.copies_left = COPIES_BETWEEN_TRIES;
            return true;
        }
        self.copies_left -= 1;
        false
    }

    /// One took that long.
    fn took(&mut self, nanos: u64) {
        self.nanos = (self.nanos * 31 + nanos.min(SHORT_MOVE_NANOS_COUNTED)) / 32;
    }
}

impl Engine {
    /// Installs the pages of a fetch that has arrived. What cannot be installed before events
    /// have been read waits in `arrived`.
    pub(crate) fn install(&mut self, io: &mut Io<'_>, mut fetch: Fetch) {
        let before = (io.clock)();
        if fetch.fault_at.is_some() {
            // Noted before: it may have run, and faulted again, when all is installed.
            self.threads.on_wake(fetch.thread, before);
        }
        let mut at = 0;
        while at < fetch.pages.len() {
            let page = fetch.pages[at];
            if page.cancelled {
                self.let_go(&page);
                at += 1;
            } else if page.address == fetch.marker && !page.wanted {
                self.keep_marker(page);
                at += 1;
            } else {
                let run = run_length(&fetch, at);
                match self.install_run(io, &fetch, at, run) {
                    Installed::Some(pages) => at += pages,
                    Installed::Later => {
                        fetch.pages.drain(..at);
                        self.arrived.push_back(fetch);
                        return;
                    }
                }
            }
        }
        if let Some(since) = fetch.fault_at {
            let now = (io.clock)();
            self.sample(Latency::Install, now.since(before));
            self.sample(Latency::Fault, now.since(since));
        }
        self.recycle(fetch.pages);
    }

    /// Pages cannot be had. Those that no thread waits for are left where they are; what is waited for is asked for
    /// alone, and if it was, the program cannot go on.
    pub(crate) fn on_refused_fetch(
        &mut self,
        io: &mut Io<'_>,
        ticket: u64,
        error: StoreError,
    ) -> Result<(), Fatal> {
        let Some(fetch) = self.fetches.remove(&ticket) else {
            return Ok(());
        };
        let now = (io.clock)();
        if let [page] = fetch.pages[..]
            && page.wanted
            && !page.cancelled
        {
            return Err(error.into());
        }
        self.alone_until = now.plus_micros(ALONE_MICROS);
        for page in &fetch.pages {
            if page.cancelled {
                self.let_go(page);
                continue;
            }
            self.frames.pool(page.frame);
            let table = self.table_mut(fetch.space);
            if let Some(entry) = table.and_then(|table| table.get_mut(page.address)) {
                entry.set_place(Place::Out);
            }
            if page.wanted {
                let (address, thread) = (page.address, fetch.thread);
                let since = fetch.fault_at.unwrap_or(now);
                self.deferred.push_back(Fault {
                    space: fetch.space,
                    address,
                    write: false,
                    thread,
                    since,
                });
            }
        }
        self.recycle(fetch.pages);
        Ok(())
    }

    /// Tries what could not be installed before.
    pub fn retry_arrived(&mut self, io: &mut Io<'_>) {
        for _ in 0..self.arrived.len() {
            let Some(fetch) = self.arrived.pop_front() else {
                break;
            };
            self.install(io, fetch);
        }
    }

    fn install_run(&mut self, io: &mut Io<'_>, fetch: &Fetch, at: usize, run: usize) -> Installed {
        if self.changes.wait_in(fetch.space) {
            return Installed::Later;
        }
        let page = fetch.pages[at];
        let may_move = fetch.space == SpaceId::OWN && self.should_move(fetch, run);
        let mut progress = if may_move {
            self.move_in(io, page, run)
        } else {
            io.memory.copy_in(fetch.space, page.address, page.frame, run, fetch.pull)
        };
        let moved = progress.bytes / PAGE_SIZE;
        if may_move {
            for page in &fetch.pages[at..at + moved] {
                self.frames.set(page.frame, FrameUse::Hole);
                self.installed(fetch.space, *page);
            }
            if moved > 0 {
                return Installed::Some(moved);
            }
            if matches!(progress.stop, Some(Stop::Busy | Stop::Unmovable)) {
                // The mapping's protection differs from the scratch area's: a copy works.
                progress = io.memory.copy_in(fetch.space, page.address, page.frame, run, None);
            }
        }
        let copied = progress.bytes / PAGE_SIZE;
        for page in &fetch.pages[at..at + copied] {
            self.frames.pool(page.frame);
            self.installed(fetch.space, *page);
        }
        if fetch.space == SpaceId::OWN {
            self.budget.allocated(copied);
        }
        if copied > 0 {
            return Installed::Some(copied);
        }
        if progress == BORDER && run > 1 {
            return self.install_run(io, fetch, at, run / 2);
        }
        match progress.stop {
            None => Installed::Some(run),
            Some(Stop::Retry | Stop::NoMemory) => Installed::Later,
            Some(Stop::AlreadyThere) => {
                // Someone else has filled it: that content is newer than the servers' copy.
                self.frames.pool(page.frame);
                self.drop_copy(fetch.space, page.address);
                io.memory.wake(fetch.space, AddressRange::pages_from(page.address, 1));
                Installed::Some(1)
            }
            Some(Stop::Gone | Stop::Busy | Stop::Unmovable | Stop::Hole) => {
                // The mapping is gone; its event will drop the entry. Until then the page is out.
                self.frames.pool(page.frame);
                if let Some(entry) =
                    self.table_mut(fetch.space).and_then(|t| t.get_mut(page.address))
                {
                    entry.set_place(Place::Out);
                }
                io.memory.wake(fetch.space, AddressRange::pages_from(page.address, 1));
                Installed::Some(1)
            }
        }
    }

    fn should_move(&mut self, fetch: &Fetch, run: usize) -> bool {
        let is_fault = fetch.pages.len() == 1 && fetch.fault_at.is_some();
        run >= MOVE_PAGES_MIN || (!is_fault && self.short_moves.pay())
    }

    fn move_in(&mut self, io: &mut Io<'_>, first: FetchingPage, run: usize) -> Progress {
        if run >= MOVE_PAGES_MIN {
            return io.memory.move_in(first.address, first.frame, run);
        }
        let before = (io.clock)();
        let progress = io.memory.move_in(first.address, first.frame, run);
        self.short_moves.took((io.clock)().since(before));
        progress
    }

    /// Records that a page is in place.
    fn installed(&mut self, space: SpaceId, page: FetchingPage) {
        if space == SpaceId::OWN {
            if let Some(entry) = self.own_table().get_mut(page.address) {
                entry.set_place(Place::Resident);
            }
        } else {
            // A child's pages are not moved out again by this pager: it needs the copy no more.
            self.drop_copy(space, page.address);
        }
    }

    fn drop_copy(&mut self, space: SpaceId, address: usize) {
        let entry = self.table_mut(space).and_then(|table| table.take(address));
        if let Some(slot) = entry.as_ref().and_then(Entry::copy).map(|(slot, _)| slot) {
            self.release(slot);
        }
    }

    fn keep_marker(&mut self, page: FetchingPage) {
        self.frames.set(page.frame, FrameUse::Victim(page.address));
        if let Some(entry) = self.own_table().get_mut(page.address) {
            entry.set_place(Place::Victim(page.frame));
        }
        self.markers.push_back((page.address, page.frame));
        while self.markers.len() > MARKERS_MAX {
            self.give_up_oldest_marker();
        }
    }

    /// The program never came to the oldest marker: it is out again.
    pub(crate) fn give_up_oldest_marker(&mut self) -> bool {
        let Some((address, frame)) = self.markers.pop_front() else {
            return false;
        };
        if !self.is_marker(address, frame) {
            return true;
        }
        if let Some(entry) = self.own_table().get_mut(address)
            && entry.place() == Place::Victim(frame)
        {
            entry.set_place(Place::Out);
            self.frames.pool(frame);
        }
        true
    }

    pub(crate) fn is_marker(&self, address: usize, frame: FrameId) -> bool {
        self.frames.frame(frame) == FrameUse::Victim(address) && !self.frames.is_queued(frame)
    }
}

/// Pages from `at` on that are neighbours in the program and in the scratch area.
fn run_length(fetch: &Fetch, at: usize) -> usize {
    let first = fetch.pages[at];
    let follows = |(offset, page): &(usize, &FetchingPage)| {
        page.address == first.address + offset * PAGE_SIZE
            && page.frame.get() as usize == first.frame.get() as usize + offset
            && !page.cancelled
            && (page.address != fetch.marker || page.wanted)
    };
    fetch.pages[at..].iter().enumerate().take_while(follows).count()
}
