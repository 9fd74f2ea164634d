//! Choosing pages and moving them out.
//!
//! A clock hand passes over the adopted ranges in the order of addresses, a window of
//! [`WINDOW_FRAMES`] pages at a time, so that what is moved out together lies together: on the
//! servers too, for reading it back. A page whose use count is not zero loses one and stays.

use farmem_region::{FrameId, Nanos, PAGE_SHIFT, PAGE_SIZE, Request};
use farmem_vmem::{AddressRange, Look, PageKind, Residents, Stop};

use crate::engine::{Engine, Fatal, Io, Scope};
use crate::frames::{Discard, FrameUse, WINDOW_FRAMES, WindowId};
use crate::memory::SpaceId;
use crate::table::{Entry, Place};

/// How long a refusal of more room is believed: others may have given some back since.
const FULL_NANOS: u64 = 1_000_000_000;
/// Windows with pages that one step looks at before it gives up.
const WINDOWS_PER_STEP: usize = 64;
/// Pages found locked, pinned or shared after which a step leaves the rest of a window alone: there
/// are whole mappings of them, and each costs three system calls.
const BUSY_PAGES_MAX: u64 = 8;
/// How long nothing is moved out after a step that found nothing but such pages: longer each time.
const BUSY_PAUSE_MIN_US: u64 = 2_000;
const BUSY_PAUSE_MAX_US: u64 = 50_000;
/// Adopted ranges without pages that one step passes over before it gives up.
const RANGES_PER_STEP: usize = 1024;
/// Frames whose stores are under way at most; eviction waits for acknowledgements beyond that.
/// 4,096 pages are 16 MiB: some milliseconds of a fast network.
const BUSY_FRAMES_MAX: usize = 4096;
/// Steps by which one round of upkeep shrinks at most: about 1 ms.
const SHRINK_STEPS_MAX: usize = 16;
/// Stores under way at most, however few pages each has: the store's queue is bounded.
const STORES_MAX: usize = 128;
/// Slots that must be free before a window is moved out, so that all its pages find one.
const SLOTS_MIN: u64 = 2 * WINDOW_FRAMES as u64;
/// Free slots below which the region grows ahead of need: 64 MiB, some tens of milliseconds of
/// writing at full speed.
const SLOTS_LOW: u64 = 16 << 10;
/// Slots of pages that are here given back at once at most where the region has no more: another 64 MiB.
const COPIES_MAX: usize = 16 << 10;
/// After a look for such slots that has found none the next one waits: it passes over the whole table.
const COPIES_PAUSE_US: u64 = 100_000;
/// Requests to forget pages under way at most, and ranges in one of them: together half of the store's queue,
/// or there would be no room in it for what is moved out.
const RELEASES_MAX: usize = 8;
const RELEASED_RUNS_MAX: usize = 16 << 10;
/// Growth of the region asked for at once: 64 MiB.
const GROW_PAGES: u64 = 16 << 10;

/// Buffers of a step, kept for the next one.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    spans: Vec<AddressRange>,
    /// What the kernel has gone through of the spans.
    done: Vec<AddressRange>,
    moved: Vec<FrameId>,
    /// The step has seen pages that stay for a reason that passes: hot, or about to vanish.
    passing: bool,
    /// Pages have been hot in this turn, and are less so now.
    pub(crate) cooled: bool,
}

/// What a step of eviction achieved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Evicted {
    /// That many pages are in the victim buffer now.
    Pages(usize),
    /// Something stands against it that passes: acknowledgements, growth of the region, a change of
    /// the program's mappings, pages that are hot.
    NotNow,
    /// No page is there that could be moved.
    NothingMovable,
}

impl Engine {
    /// Moves the next window's cold pages out.
    pub(crate) fn evict_step(&mut self, io: &mut Io<'_>) -> Result<Evicted, Fatal> {
        if (io.clock)() < self.evict_after {
            return Ok(Evicted::NothingMovable);
        }
        if !self.may_evict(io)? {
            return Ok(Evicted::NotNow);
        }
        let busy_before = self.counts.busy_pages;
        self.scan.passing = false;
        for _ in 0..WINDOWS_PER_STEP {
            let source = match self.next_unshared(io) {
                None if self.sharing.is_busy() => None,
                None => self.next_source(io),
                unshared => unshared,
            };
            let Some(source) = source else {
                break;
            };
            match self.evict_window(io, source, true)? {
                0 => {}
                pages => {
                    self.busy_pause_us = 0;
                    return Ok(Evicted::Pages(pages));
                }
            }
        }
        if self.sharing.is_pending() {
            return Ok(Evicted::NotNow);
        }
        if self.counts.busy_pages - busy_before >= BUSY_PAGES_MAX {
            // Shared with a forked child, most likely: asking again at once changes nothing.
            self.busy_pause_us =
                (self.busy_pause_us * 2).clamp(BUSY_PAUSE_MIN_US, BUSY_PAUSE_MAX_US);
            self.evict_after = (io.clock)().plus_micros(self.busy_pause_us);
            return Ok(Evicted::NothingMovable);
        }
        Ok(if self.scan.passing { Evicted::NotNow } else { Evicted::NothingMovable })
    }

    /// Whether pages can be moved out now.
    pub(crate) fn may_evict(&mut self, io: &mut Io<'_>) -> Result<bool, Fatal> {
        if self.heir.is_unchecked {
            return Ok(false);
        }
        let stores = self.stores.len() + self.looks.errands();
        // What a child has too has just been copied, and stays there twice until it is stored.
        let busy_max = if self.sharing.is_pending() { WINDOW_FRAMES } else { BUSY_FRAMES_MAX };
        let waiting = self.frames.busy_frames() >= busy_max || stores >= STORES_MAX;
        if waiting || !self.has_slots(io)? {
            return Ok(false);
        }
        if self.slots.are_fixed() {
            // A page is stored in the slot that it may just have left.
            self.send_releases(io)?;
            let held = self.held_slots > 0 || self.changes.concern(SpaceId::OWN);
            if held || !self.releases.is_empty() {
                return Ok(false);
            }
        }
        // A change of mappings under way might end before the pages are moved.
        if self.changes.are_waiting() || !io.memory.settled() {
            return Ok(false);
        }
        self.changes.all_reported();
        self.refresh_pinned(io);
        Ok(true)
    }

    /// Moves out what may be moved of a window, its hot pages only if `spare_hot` does not hold.
    pub(crate) fn evict_window(
        &mut self,
        io: &mut Io<'_>,
        source: AddressRange,
        spare_hot: bool,
    ) -> Result<usize, Fatal> {
        if io.memory.look(SpaceId::OWN, source.start()) == Look::Nothing {
            self.leave_unregistered(io, source);
            return Ok(0);
        }
        let mut scan = std::mem::take(&mut self.scan);
        let (passing, cooled) = self.choose(io, source, spare_hot, &mut scan.spans);
        scan.passing |= passing;
        scan.cooled |= cooled;
        // A flush tells of each page that it leaves.
        let busy_max = if spare_hot { BUSY_PAGES_MAX } else { u64::MAX };
        let is_empty = scan.spans.is_empty();
        let result =
            if is_empty { Ok(0) } else { self.move_spans(io, source, busy_max, &mut scan) };
        self.scan = scan;
        result
    }

    /// Looks no longer after those pages of a window that are not registered, though nothing was heard of it:
    /// shmat with `SHM_REMAP` is not reported. Pages moved out there would read as zero.
    fn leave_unregistered(&mut self, io: &mut Io<'_>, source: AddressRange) {
        let pages = (source.start()..source.end()).step_by(PAGE_SIZE);
        for page in pages.map(|address| AddressRange::pages_from(address, 1)) {
            match io.memory.look(SpaceId::OWN, page.start()) {
                Look::Nothing => {
                    let lost = self.unmap(io, SpaceId::OWN, page);
                    self.release_all(lost);
                }
                Look::Changing | Look::Ended => return,
                Look::Registered => {}
            }
        }
    }

    /// Whether slots are free, asking for more ahead of need.
    fn has_slots(&mut self, io: &mut Io<'_>) -> Result<bool, Fatal> {
        let available = self.slots.available();
        let now = (io.clock)();
        let is_known = self.full.as_ref().is_some_and(|(_, at)| now.since(*at) < FULL_NANOS);
        if available < SLOTS_LOW && self.growing.is_none() && !is_known {
            let ticket = self.take_ticket();
            let pages = farmem_region::PageCount::new(GROW_PAGES);
            match io.store.submit(ticket, Request::Grow(pages)) {
                Ok(()) => self.growing = Some(ticket.0),
                Err(farmem_region::StoreError::Busy { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if available >= SLOTS_MIN + self.looks.pages() as u64 {
            return Ok(true);
        }
        let Some((full, _)) = self.full.clone().filter(|_| is_known) else {
            return Ok(false);
        };
        if now < self.copies_after {
            return Ok(false);
        }
        if self.give_up_copies(io)? > 0 {
            return Ok(self.slots.available() >= SLOTS_MIN + self.looks.pages() as u64);
        }
        self.copies_after = now.plus_micros(COPIES_PAUSE_US);
        if self.budget.excess() > 0 && self.frames.victim_frames() == 0 {
            // No room out there, and none here: the program cannot go on.
            return Err(full.into());
        }
        Ok(false)
    }

    /// Gives slots back of pages that are here: they are sent again when they are moved out, but something can
    /// be moved out at all. Returns how many.
    fn give_up_copies(&mut self, io: &mut Io<'_>) -> Result<usize, Fatal> {
        let mut here = Vec::new();
        self.own_table().for_each(&mut |address, entry| {
            let is_spare = entry.place() == Place::Resident && entry.copy().is_some();
            if is_spare && here.len() < COPIES_MAX {
                here.push(address);
            }
        });
        for &address in &here {
            if let Some(slot) = self.own_table().get_mut(address).and_then(Entry::take_copy) {
                self.release(slot);
            }
        }
        self.send_releases(io)?;
        Ok(here.len())
    }

    /// The next window of addresses under the hand that has pages at all; `None` if there is none
    /// up to the end of the adopted ranges.
    fn next_source(&mut self, io: &Io<'_>) -> Option<AddressRange> {
        let mut has_turned = false;
        for _ in 0..RANGES_PER_STEP {
            let Some(range) = self.adopted.next_from(self.hand) else {
                let now = (io.clock)();
                if self.budget.round_ended(now, self.frames.with_memory()) {
                    let here = self.count_pages(io);
                    self.budget.counted(now, here);
                }
                if std::mem::replace(&mut has_turned, true) {
                    break;
                }
                self.hand = 0;
                continue;
            };
            let rest = AddressRange::new(self.hand.max(range.start()), range.end());
            let Some(start) = io.memory.first_present(rest) else {
                self.hand = range.end();
                continue;
            };
            let window = WINDOW_FRAMES * PAGE_SIZE;
            let end = (start / window + 1) * window;
            self.hand = end.min(range.end());
            return Some(AddressRange::new(start, self.hand));
        }
        None
    }

    /// Finds the spans of the window in which every page that is there may be moved. Returns whether
    /// others may be later, and whether some of them are colder now.
    fn choose(
        &mut self,
        io: &mut Io<'_>,
        source: AddressRange,
        spare_hot: bool,
        spans: &mut Vec<AddressRange>,
    ) -> (bool, bool) {
        let (mut passing, mut cooled) = (false, false);
        spans.clear();
        let quarantined = self.quarantine.overlaps(source);
        let pinned = self.pinned.overlapping(source);
        let (table, budget) = (&mut self.spaces[0].table, &mut self.budget);
        let counts = &mut self.counts;
        // The end of the last page seen that must stay; a span must not reach over it.
        let mut barrier = 0;
        io.memory.present(source, &mut |run| {
            budget.saw(run.pages_with_memory());
            for address in (run.range.start()..run.range.end()).step_by(PAGE_SIZE) {
                let entry = table.get(address);
                let hot = spare_hot && entry.as_ref().is_some_and(|entry| entry.uses() > 0);
                // Not seen being filled since its removal was announced: it may vanish yet.
                let vanishing = quarantined && entry.is_none();
                let pinned = pinned.iter().any(|part| part.contains(address));
                let stays = run.kind != PageKind::Page || hot || vanishing || pinned;
                // A flush tells of whatever it has left.
                counts.busy_pages += u64::from(pinned && !spare_hot);
                if hot && let Some(entry) = table.get_mut(address) {
                    entry.set_uses(entry.uses() - 1);
                    cooled = true;
                }
                let end = address + PAGE_SIZE;
                if stays {
                    passing |= hot || vanishing;
                    barrier = end;
                    continue;
                }
                match spans.last_mut() {
                    Some(span) if barrier <= span.start() => {
                        *span = AddressRange::new(span.start(), end);
                    }
                    _ => spans.push(AddressRange::new(address, end)),
                }
            }
        });
        (passing, cooled)
    }

    fn move_spans(
        &mut self,
        io: &mut Io<'_>,
        source: AddressRange,
        busy_max: u64,
        scan: &mut Scan,
    ) -> Result<usize, Fatal> {
        let Some(window) = self.take_empty_window(io) else {
            return Ok(0);
        };
        let base = source.start() & !(WINDOW_FRAMES * PAGE_SIZE - 1);
        let busy_before = self.counts.busy_pages;
        scan.done.clear();
        for &span in &scan.spans {
            let busy = self.counts.busy_pages - busy_before;
            if busy >= busy_max {
                break;
            }
            let first = frame_at(window.first(), span.start() - base);
            if self.move_span(io, span, (first, busy_max - busy), &mut scan.done) {
                // Most likely the others are shared too.
                break;
            }
        }
        self.frames.queue(window);
        scan.moved.clear();
        scan.moved.extend(window.frames().filter(|&frame| io.memory.frame_present(frame)));
        let found = scan.moved.len();
        let mut done = scan.done.iter().peekable();
        scan.moved.retain(|&frame| {
            let offset = (frame.get() - window.first().get()) as usize;
            let address = base + (offset << PAGE_SHIFT);
            while done.next_if(|part| part.end() <= address).is_some() {}
            let was_passed = done.peek().is_some_and(|part| part.contains(address));
            // Whether the kernel says that it has come so far is not enough: with swap it was seen to refuse
            // a page that it had moved.
            if self.is_stray(address) || !was_passed && is_there(io, address) {
                self.frames.hole_filled(frame);
                self.budget.allocated(1);
                return false;
            }
            self.moved_out(address, frame);
            true
        });
        let moved = scan.moved.len();
        if found == 0 {
            // Everything vanished between looking and moving.
            self.frames.unqueue_newest();
        }
        self.counts.evicted_pages += moved as u64;
        self.look(io, &scan.moved)?;
        Ok(moved)
    }

    /// Takes a window without pages. A few pooled frames or a marker in each window would leave none:
    /// they are given up then.
    pub(crate) fn take_empty_window(&mut self, io: &mut Io<'_>) -> Option<WindowId> {
        loop {
            if let Some(window) = self.frames.take_empty() {
                if !self.has_strays(io, window) {
                    return Some(window);
                }
                continue;
            }
            let Some(pooled) = self.frames.take_to_discard() else {
                // Markers hold a frame of a window each.
                if self.give_up_oldest_marker() {
                    continue;
                }
                return None;
            };
            if self.discard_pooled(io, pooled) == 0 {
                return None;
            }
        }
    }

    /// Whether a window without pages, just taken, has got memory from outside that the kernel does not take
    /// back: these frames are spare then.
    fn has_strays(&mut self, io: &mut Io<'_>, window: WindowId) -> bool {
        let mut found = false;
        io.memory.find_strays(window.first(), WINDOW_FRAMES, &mut |_| found = true);
        if !found {
            return false;
        }
        io.memory.discard(window.first(), WINDOW_FRAMES);
        let mut kept = window.frames().filter(|&frame| io.memory.frame_present(frame)).peekable();
        let has_kept = kept.peek().is_some();
        for frame in kept {
            self.frames.pool(frame);
            self.budget.allocated(1);
        }
        has_kept
    }

    /// What the kernel cannot have moved out of an address that it has gone through, as nothing was there, got
    /// into the frame from outside since [`Self::has_strays`]. Where a page may have been and was not, it is zeros
    /// that have got there.
    fn is_stray(&mut self, address: usize) -> bool {
        let place = self.own_table().get(address).map(|entry| entry.place());
        !matches!(place, None | Some(Place::Resident | Place::Zero))
    }

    /// Moves what can be moved of a span to the frames from `first` on, up to so many pages that cannot; true if
    /// its window is being made movable instead.
    fn move_span(
        &mut self,
        io: &mut Io<'_>,
        span: AddressRange,
        (first, busy_max): (FrameId, u64),
        done: &mut Vec<AddressRange>,
    ) -> bool {
        let mut at = span.start();
        // One call may not reach over the border of two mappings, and neighbours need not be one
        // (after mremap, or with different protections): where it is refused, less is tried.
        let mut step = span.bytes();
        let busy_before = self.counts.busy_pages;
        while at < span.end() && self.counts.busy_pages - busy_before < busy_max {
            let part = AddressRange::new(at, span.end().min(at.saturating_add(step)));
            let progress = io.memory.move_out(part, frame_at(first, at - span.start()));
            done.push(AddressRange::new(at, at + progress.bytes));
            at += progress.bytes;
            match progress.stop {
                None => step = step.saturating_mul(2),
                Some(Stop::Unmovable) if part.pages() > 1 => {
                    step = part.pages() / 2 * PAGE_SIZE;
                }
                Some(Stop::Retry) if progress.bytes > 0 => {}
                Some(Stop::Busy) if self.unshare(io, at) => return true,
                Some(Stop::Busy | Stop::Unmovable | Stop::AlreadyThere | Stop::Hole) => {
                    self.leave_for_now(io, at);
                    at += PAGE_SIZE;
                }
                Some(Stop::Retry | Stop::Gone | Stop::NoMemory) => {
                    self.cut_short = true;
                    return false;
                }
            }
        }
        false
    }

    /// The page cannot be moved now: it stays, and is not asked again too soon.
    fn leave_for_now(&mut self, io: &Io<'_>, address: usize) {
        if !is_there(io, address) {
            return;
        }
        self.counts.busy_pages += 1;
        let table = self.own_table();
        if table.get(address).is_none() {
            table.put(address, Entry::new(Place::Resident));
        }
        if let Some(entry) = table.get_mut(address) {
            entry.set_uses(crate::table::USE_MAX);
        }
    }

    /// Takes the oldest window out of the victim queue: its pages are out from now on. Returns
    /// the pages whose memory became free, or `None` if there is no such window now.
    pub(crate) fn retire_oldest(&mut self, io: &mut Io<'_>, discard: bool) -> Option<usize> {
        let window = self.frames.take_oldest()?;
        let mut freed = 0usize;
        for frame in window.frames() {
            match self.frames.frame(frame) {
                FrameUse::Victim(address) => {
                    if let Some(entry) = self.own_table().get_mut(address) {
                        entry.set_place(Place::Out);
                    }
                }
                FrameUse::Spent => {}
                FrameUse::Hole | FrameUse::Pooled | FrameUse::Receiving => continue,
                FrameUse::Writing(_) | FrameUse::Abandoned => {
                    unreachable!("a window with stores under way is not retired")
                }
            }
            freed += 1;
            if discard {
                self.frames.set(frame, FrameUse::Hole);
            } else {
                self.frames.pool(frame);
            }
        }
        if discard && freed > 0 {
            let kept = self.discard(io, window.first(), WINDOW_FRAMES);
            freed = freed.saturating_sub(kept);
            self.budget.freed(freed);
        }
        Some(freed)
    }

    /// Gives the memory of frames back that are holes from now on. Those whose memory the kernel
    /// keeps join the pool: what is moved out must not meet what they still hold. Returns how many.
    fn discard(&mut self, io: &mut Io<'_>, first: FrameId, count: usize) -> usize {
        io.memory.discard(first, count);
        let mut kept = 0;
        for frame in (0..count).map(|at| frame_at(first, at << PAGE_SHIFT)) {
            if io.memory.frame_present(frame) {
                self.frames.hole_filled(frame);
                kept += 1;
            }
        }
        kept
    }

    /// Gives back what was taken from the pool. Returns how many pages became free.
    fn discard_pooled(&mut self, io: &mut Io<'_>, pooled: Discard) -> usize {
        let kept = self.discard(io, pooled.first, pooled.span);
        let freed = pooled.pages.saturating_sub(kept);
        self.budget.freed(freed);
        freed
    }

    /// Takes up to `count` frames for a fetch, fewer if memory is short; neighbours if possible, for
    /// only those can be moved into place together.
    pub(crate) fn take_frames(&mut self, io: &mut Io<'_>, count: usize, frames: &mut Vec<FrameId>) {
        if count >= crate::install::MOVE_PAGES_MIN {
            let mut found = self.frames.take_neighbours(count, frames);
            if !found && self.retire_oldest(io, false).is_some() {
                found = self.frames.take_neighbours(count, frames);
            }
            if found {
                return;
            }
        }
        let mut taken = self.frames.take_pooled(count, frames);
        while taken < count {
            let retired = self.retire_oldest(io, false).is_some_and(|pages| pages > 0);
            if !retired && !self.give_up_oldest_marker() && !self.populate_window(io, count - taken)
            {
                return;
            }
            taken += self.frames.take_pooled(count - taken, frames);
        }
    }

    /// Gives frames fresh memory.
    fn populate_window(&mut self, io: &mut Io<'_>, count: usize) -> bool {
        let Some(window) = self.frames.take_empty() else {
            return false;
        };
        let got = io.memory.populate(window.first(), count.min(WINDOW_FRAMES));
        for frame in window.frames().take(got) {
            self.frames.pool(frame);
        }
        if got == 0 {
            self.frames.put_back(window);
        }
        self.budget.allocated(got);
        got > 0
    }

    /// Keeps the program within its budget and frames at hand. Does a bounded amount of work;
    /// returns whether it did any.
    ///
    /// # Errors
    /// [`Fatal`].
    pub fn balance(&mut self, io: &mut Io<'_>) -> Result<bool, Fatal> {
        self.scan.cooled = false;
        self.measure(io);
        self.send_releases(io)?;
        if self.adopted.is_empty() {
            return Ok(false);
        }
        if self.budget.excess() > 0 {
            let mut steps = 0;
            while steps < SHRINK_STEPS_MAX && self.budget.excess() > 0 && self.shrink(io)? {
                steps += 1;
            }
            return Ok(steps > 0);
        }
        self.stuck = false;
        let near = self.budget.estimate() + self.budget.victim_target() >= self.budget.target();
        if near && self.keeps_copies() && self.retire_oldest(io, true).is_some() {
            return Ok(true);
        }
        if near && self.frames.victim_frames() < self.budget.victim_target() {
            return Ok(matches!(self.evict_step(io)?, Evicted::Pages(_)));
        }
        if near && self.frames.pooled() < self.budget.pool_target() / 2 {
            return Ok(self.retire_oldest(io, false).is_some());
        }
        Ok(false)
    }

    /// Whether the victim buffer holds copies of pages that a forked child has too: the tree has them
    /// twice, and they are worth less than what they would take the place of.
    const fn keeps_copies(&self) -> bool {
        self.sharing.is_pending() && self.frames.victim_frames() > 0
    }

    /// Gives memory back: pooled frames that are too many, then the oldest victims, then new ones.
    fn shrink(&mut self, io: &mut Io<'_>) -> Result<bool, Fatal> {
        if self.frames.pooled() > self.budget.pool_target()
            && let Some(pooled) = self.frames.take_to_discard()
            && self.discard_pooled(io, pooled) > 0
        {
            return Ok(true);
        }
        let enough =
            self.keeps_copies() || self.frames.victim_frames() * 2 > self.budget.victim_target();
        if enough && self.retire_oldest(io, true).is_some() {
            return Ok(true);
        }
        if self.looks.pages() >= self.budget.excess() {
            // They are gone as soon as they have been looked at.
            return Ok(self.retire_oldest(io, true).is_some());
        }
        let evicted = self.evict_step(io)?;
        self.stuck = evicted == Evicted::NothingMovable && self.frames.victim_frames() == 0;
        if self.stuck {
            self.budget.bear((io.clock)());
        }
        if let Evicted::Pages(_) = evicted {
            return Ok(true);
        }
        Ok(self.retire_oldest(io, true).is_some())
    }

    /// Whether the program uses more than its limit.
    pub(crate) const fn exceeds_limit(&self) -> bool {
        self.budget.is_exceeded()
    }

    fn measure(&mut self, io: &mut Io<'_>) {
        let now = (io.clock)();
        if !self.budget.is_due(now) {
            return;
        }
        match self.scope {
            Scope::Process => self.budget.measure(now, io.memory.resident(), io.memory.ran()),
            Scope::Ranges => {
                let anonymous = if std::mem::take(&mut self.recount) {
                    self.count_pages(io)
                } else {
                    self.budget.estimate()
                };
                // What is new there is reported: it does not grow unseen.
                let ran = Some(Nanos::new(0));
                self.budget.measure(now, Residents { anonymous, shared: 0 }, ran);
            }
        }
        let measured = self.budget.measured();
        self.counts.local_pages = measured.anonymous as u64;
        self.counts.local_pages_peak = self.counts.local_pages_peak.max(self.counts.local_pages);
        self.counts.shared_pages = measured.shared as u64;
    }

    /// Pages of the adopted ranges that are there, and frames with memory.
    fn count_pages(&self, io: &Io<'_>) -> usize {
        let mut pages = self.frames.with_memory();
        let mut at = 0;
        while let Some(range) = self.adopted.next_from(at) {
            io.memory.present(range, &mut |run| pages += run.pages_with_memory());
            at = range.end();
        }
        pages
    }

    fn send_releases(&mut self, io: &mut Io<'_>) -> Result<(), Fatal> {
        self.slots.take_dropped().into_iter().for_each(|slot| self.release(slot));
        if self.releases.is_empty() || self.releasing >= RELEASES_MAX {
            return Ok(());
        }
        let ticket = self.take_ticket();
        let count = self.releases.len().min(RELEASED_RUNS_MAX);
        match io.store.submit(ticket, Request::Release(&self.releases[..count])) {
            Ok(()) => {
                self.releasing += 1;
                self.releases.drain(..count).for_each(|run| self.slots.free(run));
            }
            Err(farmem_region::StoreError::Busy { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

fn is_there(io: &Io<'_>, address: usize) -> bool {
    let mut there = false;
    let page = AddressRange::pages_from(address, 1);
    io.memory.present(page, &mut |run| there = run.kind != PageKind::Guard);
    there
}

fn frame_at(first: FrameId, offset_bytes: usize) -> FrameId {
    let offset = u32::try_from(offset_bytes >> PAGE_SHIFT).unwrap_or(0);
    FrameId::new(first.get() + offset)
}
