//! The memory of a server on the same machine, without asking the server: pages are read where
//! they are stored, and written into slots that the server has assigned, then committed.
//!
//! Nothing that was read is believed before its checksum, which binds region, page, version and
//! content, has been found right: the slot may have been given to another page meanwhile. Then,
//! or when the place of a page is not known, the server is asked as over any connection.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farmem_region::{
    Checksum, Errand, FrameId, Frames, Lent, Loan, PageCount, PageIndex, PageRange, RegionId,
};
use farmem_transport::{ArenaFile, recycle, recycle_mut};
use farmem_wire::{NO_SLOT, PAGE_ENTRY_BYTES, PAGES_PER_MESSAGE_MAX, PageEntry, page_checksum};

use crate::messages::{MESSAGE_PAGES, Message, MessageIndex, Wanted};

/// Pages of one piece of the table, 16 MiB of region: 48 KiB.
const PIECE_PAGES: usize = 4096;
/// Fewer pages are read or written sooner than another thread is woken for them.
const CARRIED_PAGES_MIN: usize = 16;
/// Pages that lie side by side, on average, in a read that another thread does. What is read here and
/// there is also put in place so, page by page, and each of these changes interrupts every
/// processor that runs a thread of the pager.
const CARRIED_RUN_PAGES_MIN: usize = 8;
const _: () = assert!(MESSAGE_PAGES <= u64::BITS as usize, "a bit for each page");

/// What is known of the server's arena.
#[derive(Debug)]
pub(crate) struct SharedArena {
    file: Arc<ArenaFile>,
    carried: Arc<Carried>,
    /// Readings under way elsewhere.
    away: usize,
    places: Places,
    inherited: Inherited,
    /// Slots to write into, those that lie side by side one after the other.
    fresh: VecDeque<u32>,
    /// Whether the kernel once did not read or write: then the connection is used.
    is_broken: bool,
    head: Vec<u8>,
    slices: Vec<IoSlice<'static>>,
    slices_mut: Vec<IoSliceMut<'static>>,
}

/// Where a page is stored, and the checksum that it must have.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// [`NO_SLOT`] if it is not known, or if there is none.
    slot: u32,
    checksum: Checksum,
}

impl SharedArena {
    pub(crate) fn new(file: ArenaFile) -> Self {
        Self {
            file: Arc::new(file),
            carried: Arc::default(),
            away: 0,
            places: Places::default(),
            inherited: Inherited::default(),
            fresh: VecDeque::new(),
            is_broken: false,
            head: Vec::new(),
            slices: Vec::new(),
            slices_mut: Vec::new(),
        }
    }

    /// The server has told where a page is.
    pub(crate) fn learn(&mut self, entry: &PageEntry) {
        self.places.set(entry.page, Place { slot: entry.slot, checksum: entry.checksum });
    }

    /// The region begins with so many pages of another one, which were stored there.
    pub(crate) fn inherit(&mut self, pages: PageCount) {
        self.inherited.pages = pages.get();
    }

    /// From which page on the server is to be asked where pages lie, after it had to be asked for the
    /// first one that is wanted; `None` if that would tell nothing new.
    pub(crate) fn next_unknown(&mut self, wanted: &[Wanted]) -> Option<PageIndex> {
        let page = wanted.first()?.page;
        if page.get() >= self.inherited.pages || self.places.get(page).is_some() {
            return None;
        }
        self.inherited.ask(page)
    }

    /// The server has told where an inherited page was when it was asked: what is known is newer.
    pub(crate) fn learn_inherited(&mut self, entry: &PageEntry) {
        if self.places.get(entry.page).is_none() {
            self.learn(entry);
        }
    }

    /// The pages are no more.
    pub(crate) fn forget(&mut self, range: &PageRange) {
        self.places.forget(range);
    }

    /// The server has assigned slots beside those there are.
    pub(crate) fn add_fresh(&mut self, slots: impl Iterator<Item = u32>) {
        self.fresh.extend(slots);
    }

    /// The server has listed all slots that it has assigned and that no message uses.
    pub(crate) fn set_fresh(&mut self, slots: impl Iterator<Item = u32>) {
        self.fresh.clear();
        self.fresh.extend(slots);
        self.fresh.make_contiguous().sort_unstable();
    }

    /// Whether that many pages could be placed now.
    pub(crate) fn has_room(&self, pages: usize) -> bool {
        self.fresh.len() >= pages && !self.is_broken
    }

    /// Whether it is of use at all.
    pub(crate) const fn is_usable(&self) -> bool {
        !self.is_broken
    }

    /// Reads the pages of a read whose places are known, and leaves the others in it.
    pub(crate) fn fetch(
        &mut self,
        message: &mut Message,
        region: RegionId,
        frames: &mut dyn Frames,
    ) {
        let mut kept = 0;
        let mut at = 0;
        while at < message.wanted.len() {
            let run = self.places.run(&message.wanted[at..]);
            let end = at + run.map_or(1, |(_, count)| count);
            let is_read = run.is_some_and(|(first, _)| {
                self.read(first, &message.frames[at..end], frames).is_ok_and(|whole| whole)
            });
            for at in at..end {
                let (wanted, frame) = (message.wanted[at], message.frames[at]);
                if is_read && self.is_right(region, wanted, frame, frames) {
                    continue;
                }
                message.wanted[kept] = wanted;
                message.frames[kept] = frame;
                kept += 1;
            }
            at = end;
        }
        message.wanted.truncate(kept);
        message.frames.truncate(kept);
    }

    /// Lets another thread read the pages of a read whose places are known; false if it is not to be
    /// so. What it could not read is left when it [returns](Self::returned).
    pub(crate) fn carry(
        &mut self,
        index: MessageIndex,
        message: &Message,
        region: RegionId,
        frames: &mut dyn Frames,
    ) -> bool {
        let many = message.wanted.len() >= CARRIED_PAGES_MIN && !self.is_broken;
        if !many || !frames.would_lend(Loan::Fill) {
            return false;
        }
        let place = |wanted: &Wanted| {
            let place = self.places.get(wanted.page)?;
            Some(Portable { wanted: *wanted, place })
        };
        let Some(pages) = message.wanted.iter().map(place).collect::<Option<Vec<_>>>() else {
            return false;
        };
        let runs = pages.chunk_by(Portable::is_followed_by).count();
        if pages.len() < runs * CARRIED_RUN_PAGES_MIN {
            return false;
        }
        let load = Load { message: index, region, pages, right: 0, kind: Kind::Reading };
        self.lend(load, &message.frames, Loan::Fill, frames)
    }

    /// Lets another thread copy the pages of a write into fresh slots; false if it is not to be so.
    /// Otherwise the message is a commit, complete when that [returns](Self::returned).
    pub(crate) fn begin_to_place(
        &mut self,
        index: MessageIndex,
        message: &mut Message,
        region: RegionId,
        frames: &mut dyn Frames,
    ) -> bool {
        let count = message.wanted.len();
        let many = count >= CARRIED_PAGES_MIN && self.has_room(count);
        if !many || !frames.would_lend(Loan::Read) {
            return false;
        }
        let checksum = Checksum::new(0);
        let slots = self.fresh.iter().zip(&message.wanted);
        let pages =
            slots.map(|(&slot, &wanted)| Portable { wanted, place: Place { slot, checksum } });
        let load =
            Load { message: index, region, pages: pages.collect(), right: 0, kind: Kind::Placing };
        // So that the slots count as used.
        let entries = load.entries();
        if !self.lend(load, &message.frames, Loan::Read, frames) {
            return false;
        }
        self.fresh.drain(..count);
        message.become_commit(&entries);
        message.placing = true;
        true
    }

    fn lend(&mut self, load: Load, ids: &[FrameId], loan: Loan, frames: &mut dyn Frames) -> bool {
        let (file, carried) = (Arc::clone(&self.file), Arc::clone(&self.carried));
        let errand = Box::new(Carrying { load, file, carried });
        let taken = frames.lend(ids, loan, errand).is_ok();
        self.away += usize::from(taken);
        taken
    }

    /// The next load that is back.
    pub(crate) fn returned(&mut self) -> Option<Load> {
        if self.away == 0 || self.carried.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut loads = self.carried.loads();
        let load = loads.pop_front()?;
        self.carried.count.store(loads.len(), Ordering::Relaxed);
        self.away -= 1;
        Some(load)
    }

    /// Completes a commit whose pages have been copied, or makes it a write if they could not be.
    pub(crate) fn placed(&mut self, load: &Load, message: &mut Message) {
        message.placing = false;
        if load.is_whole() {
            message.become_commit(&load.entries());
            message.sealed = true;
        } else {
            self.is_broken = true;
            message.unplace();
        }
    }

    fn read(&mut self, first: u32, ids: &[FrameId], frames: &mut dyn Frames) -> io::Result<bool> {
        let mut slices = recycle_mut(std::mem::take(&mut self.slices_mut));
        frames.gather_mut(ids, &mut slices);
        let result = self.file.read(first, &mut slices);
        self.slices_mut = recycle_mut(slices);
        result
    }

    fn is_right(
        &self,
        region: RegionId,
        wanted: Wanted,
        frame: FrameId,
        frames: &dyn Frames,
    ) -> bool {
        let found = page_checksum(region, wanted.page, wanted.version, frames.bytes(frame));
        self.places.get(wanted.page).is_some_and(|place| place.checksum == found)
    }

    /// Makes a write into a commit: copies its pages into fresh slots. Returns false, with the
    /// message as it was, if that cannot be.
    pub(crate) fn place(
        &mut self,
        message: &mut Message,
        region: RegionId,
        frames: &dyn Frames,
    ) -> bool {
        let count = message.wanted.len();
        if !self.has_room(count) {
            return false;
        }
        let slots = self.fresh.make_contiguous();
        let (mut at, mut is_written) = (0, true);
        for run in slots[..count].chunk_by(|slot, next| *next == slot + 1) {
            let mut slices = recycle(std::mem::take(&mut self.slices));
            frames.gather(&message.frames[at..at + run.len()], &mut slices);
            let written = self.file.write(run[0], &slices);
            self.slices = recycle(slices);
            is_written &= written.is_ok_and(|whole| whole);
            at += run.len();
        }
        if !is_written {
            self.is_broken = true;
            return false;
        }
        let Message { wanted, frames: ids, .. } = &*message;
        let placed = wanted.iter().zip(ids).zip(self.fresh.drain(..count));
        let mut head = std::mem::take(&mut self.head);
        head.clear();
        for ((Wanted { page, version }, frame), slot) in placed {
            let checksum = page_checksum(region, *page, *version, frames.bytes(*frame));
            PageEntry { page: *page, version: *version, checksum, slot }.encode(&mut head);
        }
        message.become_commit(&head);
        self.head = head;
        true
    }
}

/// Pages that the region began with. Their places are asked for when they are needed, for as many as a
/// reply tells: whoever forks and ends soon asks for none.
#[derive(Debug, Default)]
struct Inherited {
    pages: u64,
    /// A bit for each stretch of pages that has been asked for.
    asked: Vec<u64>,
}

impl Inherited {
    /// Where the stretch of the page begins, if it has not been asked for.
    fn ask(&mut self, page: PageIndex) -> Option<PageIndex> {
        let stretch = page.get() / PAGES_PER_MESSAGE_MAX as u64;
        let word = usize::try_from(stretch / 64).ok()?;
        if word >= self.asked.len() {
            self.asked.resize(word + 1, 0);
        }
        let bit = 1 << (stretch % 64);
        let is_new = self.asked[word] & bit == 0;
        self.asked[word] |= bit;
        is_new.then(|| PageIndex::new(stretch * PAGES_PER_MESSAGE_MAX as u64))
    }
}

/// A page and where it is to be found.
#[derive(Debug, Clone, Copy)]
struct Portable {
    wanted: Wanted,
    place: Place,
}

impl Portable {
    fn is_followed_by(&self, next: &Self) -> bool {
        self.place.slot + 1 == next.place.slot
    }
}

/// What another thread does with the pages of a message.
#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) message: MessageIndex,
    pub(crate) kind: Kind,
    region: RegionId,
    pages: Vec<Portable>,
    /// A bit for each page that was read and found right, or written.
    right: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Out of their slots.
    Reading,
    /// Into fresh slots.
    Placing,
}

impl Load {
    /// Leaves in a read what could not be read.
    pub(crate) fn apply(&self, message: &mut Message) {
        let mut kept = 0;
        for at in (0..message.wanted.len()).filter(|at| self.right & (1 << at) == 0) {
            message.wanted[kept] = message.wanted[at];
            message.frames[kept] = message.frames[at];
            kept += 1;
        }
        message.wanted.truncate(kept);
        message.frames.truncate(kept);
    }

    fn is_whole(&self) -> bool {
        self.right.count_ones() as usize == self.pages.len()
    }

    /// The entries of the commit.
    fn entries(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.pages.len() * PAGE_ENTRY_BYTES);
        for Portable { wanted: Wanted { page, version }, place: Place { slot, checksum } } in
            self.pages.iter().copied()
        {
            PageEntry { page, version, checksum, slot }.encode(&mut bytes);
        }
        bytes
    }

    fn checksum(&self, at: usize, frames: &dyn Lent) -> Checksum {
        let Wanted { page, version } = self.pages[at].wanted;
        page_checksum(self.region, page, version, frames.bytes(at))
    }

    fn read(&mut self, file: &ArenaFile, range: Range<usize>, frames: &mut dyn Lent) {
        let mut slices = Vec::new();
        frames.gather_mut(range.clone(), &mut slices);
        if file.read(self.pages[range.start].place.slot, &mut slices).is_ok_and(|whole| whole) {
            for at in range {
                let is_right = self.checksum(at, frames) == self.pages[at].place.checksum;
                self.right |= u64::from(is_right) << at;
            }
        }
    }

    fn write(&mut self, file: &ArenaFile, range: Range<usize>, frames: &dyn Lent) {
        let mut slices = Vec::new();
        frames.gather(range.clone(), &mut slices);
        if file.write(self.pages[range.start].place.slot, &slices).is_ok_and(|whole| whole) {
            for at in range {
                self.pages[at].place.checksum = self.checksum(at, frames);
                self.right |= 1 << at;
            }
        }
    }
}

/// Loads that are back.
#[derive(Debug, Default)]
struct Carried {
    count: AtomicUsize,
    loads: Mutex<VecDeque<Load>>,
}

impl Carried {
    fn loads(&self) -> MutexGuard<'_, VecDeque<Load>> {
        self.loads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The errand.
struct Carrying {
    load: Load,
    file: Arc<ArenaFile>,
    carried: Arc<Carried>,
}

impl Errand for Carrying {
    fn run(&mut self, frames: &mut dyn Lent) {
        let Self { load, file, .. } = self;
        let runs = load.pages.chunk_by(Portable::is_followed_by);
        let lengths: Vec<usize> = runs.map(<[Portable]>::len).collect();
        let mut from = 0;
        for length in lengths {
            let range = from..from + length;
            from = range.end;
            match load.kind {
                Kind::Reading => load.read(file, range, frames),
                Kind::Placing => load.write(file, range, frames),
            }
        }
    }

    fn deliver(self: Box<Self>) {
        let Self { load, carried, .. } = *self;
        let mut loads = carried.loads();
        loads.push_back(load);
        carried.count.store(loads.len(), Ordering::Release);
    }
}

/// Where the pages of the region are, as far as it is known: 12 bytes a page.
#[derive(Debug, Default)]
struct Places {
    pieces: Vec<Option<Box<Piece>>>,
}

#[derive(Debug)]
struct Piece {
    slots: [u32; PIECE_PAGES],
    checksums: [Checksum; PIECE_PAGES],
}

impl Places {
    fn get(&self, page: PageIndex) -> Option<Place> {
        let (piece, at) = split(page);
        let piece = self.pieces.get(piece)?.as_ref()?;
        let place = Place { slot: piece.slots[at], checksum: piece.checksums[at] };
        (place.slot != NO_SLOT).then_some(place)
    }

    fn set(&mut self, page: PageIndex, place: Place) {
        let (piece, at) = split(page);
        if piece >= self.pieces.len() {
            self.pieces.resize_with(piece + 1, || None);
        }
        let piece = self.pieces[piece].get_or_insert_with(|| {
            let checksums = [Checksum::new(0); PIECE_PAGES];
            Box::new(Piece { slots: [NO_SLOT; PIECE_PAGES], checksums })
        });
        piece.slots[at] = place.slot;
        piece.checksums[at] = place.checksum;
    }

    fn forget(&mut self, range: &PageRange) {
        let end = range.start.get().saturating_add(range.count.get());
        let mut page = range.start.get();
        while page < end {
            let (piece, at) = split(PageIndex::new(page));
            let count = usize::try_from(end - page).unwrap_or(usize::MAX).min(PIECE_PAGES - at);
            match self.pieces.get_mut(piece) {
                None => return,
                Some(None) => {}
                Some(Some(piece)) => piece.slots[at..at + count].fill(NO_SLOT),
            }
            page += count as u64;
        }
    }

    /// How many of the first pages lie side by side, and the first one's slot.
    fn run(&self, wanted: &[Wanted]) -> Option<(u32, usize)> {
        let slot = |wanted: &Wanted| self.get(wanted.page).map(|place| place.slot);
        let first = slot(wanted.first()?)?;
        let next = (first..).zip(wanted);
        Some((first, next.take_while(|(at, wanted)| slot(wanted) == Some(*at)).count()))
    }
}

/// Which piece, and where in it. A page past what can be addressed falls past every piece.
fn split(page: PageIndex) -> (usize, usize) {
    let page = usize::try_from(page.get()).unwrap_or(usize::MAX);
    (page / PIECE_PAGES, page % PIECE_PAGES)
}
