//! The memory of a server on the same machine, without asking the server: pages are read where
//! they are stored, and written into slots that the server has assigned, then committed.
//!
//! Nothing that was read is believed before its checksum, which binds region, page, version and
//! content, has been found right: the slot may have been given to another page meanwhile. Then,
//! or when the place of a page is not known, the server is asked as over any connection.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};

use farmem_region::{Checksum, FrameId, Frames, PageIndex, PageRange, RegionId};
use farmem_transport::{ArenaFile, recycle, recycle_mut};
use farmem_wire::{Action, HEADER_BYTES, NO_SLOT, PageEntry, page_checksum, seal};

use crate::messages::{Message, Wanted};

/// Pages of one piece of the table, 16 MiB of region: 48 KiB.
const PIECE_PAGES: usize = 4096;

/// What is known of the server's arena.
#[derive(Debug)]
pub(crate) struct SharedArena {
    file: ArenaFile,
    places: Places,
    /// Slots to write into, those that lie side by side one after the other.
    fresh: VecDeque<u32>,
    /// Whether the kernel once did not read or write: then the connection is used.
    is_broken: bool,
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
            file,
            places: Places::default(),
            fresh: VecDeque::new(),
            is_broken: false,
            slices: Vec::new(),
            slices_mut: Vec::new(),
        }
    }

    /// The server has told where a page is.
    pub(crate) fn learn(&mut self, entry: &PageEntry) {
        self.places.set(entry.page, Place { slot: entry.slot, checksum: entry.checksum });
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
        message.head.truncate(HEADER_BYTES);
        let placed = message.wanted.iter().zip(&message.frames).zip(self.fresh.drain(..count));
        for ((Wanted { page, version }, frame), slot) in placed {
            let checksum = page_checksum(region, *page, *version, frames.bytes(*frame));
            let entry = PageEntry { page: *page, version: *version, checksum, slot };
            entry.encode(&mut message.head);
        }
        message.header.action = Action::Commit;
        message.header.payload = 0;
        seal(message.header, &mut message.head);
        true
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
