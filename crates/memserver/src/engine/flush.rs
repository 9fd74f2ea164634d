//! What is dirty goes to the backing file.

use std::io::IoSlice;
use std::iter;
use std::ops::Range;
use std::sync::Arc;

use farmem_region::{PAGE_SIZE, PageCount, PageIndex, PageRange};
use farmem_vmem::Slot;
use farmem_wire::{Header, Progress, RangeEntry, RefusalCode};

use super::copies::fill_copy;
use super::named::{Work, take_turn};
use super::pages::SPARE_SLOTS;
use super::parts::runs;
use super::supply::{Purpose, Stop, Supply};
use super::{Caller, Engine, Refusal, lock};
use crate::backing::{BackingFile, Writing};
use crate::neighbour::Neighbour;
use crate::region::Region;
use crate::table::{self, LEAF_PAGES};
use crate::tiers::Place;

/// Pages that are written before the next ones are looked at.
pub(super) const BATCH: usize = SPARE_SLOTS as usize;

/// A page that is to be written, as it was when it was looked at.
pub(super) struct Dirty {
    pub(super) page: PageIndex,
    pub(super) eighths: u8,
    /// Where it lay, if it is stored: if it still does once it is written, it is clean.
    pub(super) place: Option<Place>,
    pub(super) slot: Slot,
}

impl Engine {
    /// Writes what is dirty in ranges to the file, or a first part of it. Once nothing is left, all
    /// of it is on the disk.
    pub(crate) fn flush(
        &self,
        caller: &Caller,
        header: &Header,
        ranges: impl Iterator<Item = RangeEntry> + Clone,
    ) -> Result<Progress, Refusal> {
        let file = {
            let session = self.enter(caller, header)?;
            session.check_region(header)?;
            session.check_ranges(ranges.clone())?;
            Arc::clone(session.region.written_file().ok_or(RefusalCode::NoFile)?)
        };
        let _turn = take_turn(Some(&file))?;
        let mut work = Work::of_one_request();
        let first = (0..).zip(ranges.clone()).find(|(_, range)| range.0.count.get() > 0);
        if let Some((at, range)) = first
            && !self.fill_own(caller, header, &file, &mut work)?
        {
            let changed = PageCount::new(work.changed);
            return Ok(Progress { changed, next: Some((at, range.0.start)) });
        }
        for (at, range) in (0..).zip(ranges) {
            let end = range.0.start.get() + range.0.count.get();
            let mut page = range.0.start;
            while page.get() < end {
                if work.left == 0 {
                    return Ok(Progress {
                        changed: PageCount::new(work.changed),
                        next: Some((at, page)),
                    });
                }
                let count = PageCount::new(end - page.get());
                let rest = PageRange { start: page, count };
                page = self.flush_batch(caller, header, &file, rest, &mut work)?;
            }
        }
        let synced = file.sync();
        self.end_filling(caller, &file, synced.is_ok());
        synced.map_err(|error| {
            self.file_failed("sync", &file, &error);
            self.mark_dirty(caller, &file);
            file.refusal(&error)
        })?;
        Ok(Progress { changed: PageCount::new(work.changed), next: None })
    }

    /// The disk has failed: nobody knows what it has of what was written, and it may tell that only once
    /// (fsync(2)). All that was ever written is dirty again, as far as it is here.
    fn mark_dirty(&self, caller: &Caller, file: &Arc<BackingFile>) {
        let Some((_, shared)) = &caller.session else { return };
        let mut session = lock(shared);
        if session.ended || !session.region.written_file().is_some_and(|now| Arc::ptr_eq(now, file))
        {
            return;
        }
        self.mark_all_dirty(&mut session.region);
    }

    fn mark_all_dirty(&self, region: &mut Region) {
        let table = &mut region.table;
        let mut from = PageIndex::new(0);
        while let Some((first, _)) = table.leaf_from(from) {
            table.make_own(&self.tiers, first);
            table.mark_dirty(&self.tiers, first);
            from = PageIndex::new(first.get() + LEAF_PAGES as u64);
        }
    }

    /// Before the server stops in order: a flush that was cut off has pages for clean that no disk may have.
    pub(super) fn sync_files(&self) {
        for session in self.sessions().by_id.values() {
            let mut session = lock(session);
            let file = session.region.written_file().filter(|file| !file.is_distant());
            if file.is_some_and(|file| file.sync().is_err()) {
                self.mark_all_dirty(&mut session.region);
            }
        }
    }

    /// Writes a first batch of what is dirty in a range; returns the page after what it looked at.
    fn flush_batch(
        &self,
        caller: &Caller,
        header: &Header,
        file: &Arc<BackingFile>,
        range: PageRange,
        work: &mut Work,
    ) -> Result<PageIndex, Refusal> {
        let mut supply = Supply::of(Purpose::Send);
        let collected = self.collect(caller, header, file, range, &mut supply);
        self.end_supply(supply);
        let (dirty, next, _writing) = collected?;
        let written = self.write_back(file, &dirty);
        if written.is_ok() {
            work.changed += dirty.len() as u64;
            work.left = work.left.saturating_sub(dirty.len() as u64);
            if let Ok(session) = self.enter(caller, header) {
                self.clean(&session.region, &dirty);
            }
        }
        self.forget(dirty);
        if written.is_err() && file.neighbour().is_some_and(Neighbour::is_gone) {
            // With what was written to it before.
            self.mark_dirty(caller, file);
        }
        written.map(|()| next)
    }

    /// Pages that were written are clean, unless they have changed meanwhile.
    pub(super) fn clean(&self, region: &Region, written: &[Dirty]) {
        for Dirty { page, place, .. } in written {
            region.table.with(*page, |portion| {
                if place.as_ref().is_some_and(|place| portion.place.is(place)) {
                    region.table.note_clean(&self.tiers, *page);
                    portion.dirty = 0;
                }
            });
        }
    }

    /// Takes a token for each dirty page of one leaf, but no more than a batch, and begins to write them;
    /// returns also the page after those that were looked at.
    fn collect<'a>(
        &self,
        caller: &Caller,
        header: &Header,
        file: &'a BackingFile,
        range: PageRange,
        supply: &mut Supply,
    ) -> Result<(Vec<Dirty>, PageIndex, Writing<'a>), Refusal> {
        let end = range.start.get() + range.count.get();
        loop {
            let session = self.enter(caller, header)?;
            let mut dirty = Vec::new();
            let leaf = session.region.table.leaf_from(range.start);
            let Some(first) = leaf.map(|(first, _)| first.get()).filter(|first| *first < end)
            else {
                return Ok((dirty, PageIndex::new(end), file.begin_writing(iter::empty())));
            };
            let within = first.max(range.start.get())..(first + LEAF_PAGES as u64).min(end);
            let region = &session.region;
            match self.collect_dirty(region, within.clone(), &mut dirty, supply) {
                Ok(next) => {
                    let writing = file.begin_writing(dirty.iter().map(|dirty| dirty.page));
                    return Ok((dirty, next, writing));
                }
                Err(Stop::Refused(refusal)) => {
                    drop(session);
                    self.forget(dirty);
                    return Err(refusal);
                }
                // Then none is collected yet.
                Err(Stop::Needs(need)) => {
                    let is_dirty = |page: &PageIndex| {
                        region.table.with(*page, |portion| portion.dirty != 0) == Some(true)
                    };
                    let next = within.map(PageIndex::new).filter(is_dirty);
                    let needs = self.with_next(region, need, next);
                    drop(session);
                    self.supply(caller.may_wait, needs, supply)?;
                }
            }
        }
    }

    /// Takes a token for each dirty page, but no more than a batch, and only as far as nothing is
    /// lacking; returns the page after those that were looked at.
    fn collect_dirty(
        &self,
        region: &Region,
        within: Range<u64>,
        dirty: &mut Vec<Dirty>,
        supply: &mut Supply,
    ) -> Result<PageIndex, Stop> {
        let Some((first, leaf)) = region.table.leaf_from(PageIndex::new(within.start)) else {
            return Ok(PageIndex::new(within.end));
        };
        let leaf = table::lock(leaf);
        for at in within.clone() {
            let page = PageIndex::new(at);
            if dirty.len() == BATCH {
                return Ok(page);
            }
            let portion = leaf.portions.get((at - first.get()) as usize);
            let Some(portion) = portion.filter(|portion| portion.dirty != 0) else {
                continue;
            };
            let slot = match &portion.place {
                Place::Dram(slot) => Ok(self.arena.share(slot)),
                Place::Compressed(_) | Place::File(_) => self.copy_in(page, &portion, supply),
            };
            let slot = match slot {
                Ok(slot) => slot,
                Err(Stop::Needs(need)) if !dirty.is_empty() => {
                    self.forgo(need, supply);
                    return Ok(page);
                }
                Err(stop) => return Err(stop),
            };
            let place = Some(self.tiers.share(&portion.place));
            dirty.push(Dirty { page, eighths: portion.dirty, place, slot });
        }
        Ok(PageIndex::new(within.end))
    }

    /// Writes pages to the file. Copies that have not read them yet do so before.
    pub(super) fn write_back(&self, file: &BackingFile, dirty: &[Dirty]) -> Result<(), Refusal> {
        if dirty.is_empty() {
            return Ok(());
        }
        let pages: Vec<PageIndex> = dirty.iter().map(|dirty| dirty.page).collect();
        for copy in file.copies() {
            fill_copy(self, file, &copy, &pages)?;
        }
        let is_next = |one: &Dirty, next: &Dirty| {
            next.page.get() == one.page.get() + 1 && (one.eighths & next.eighths) == u8::MAX
        };
        for run in dirty.chunk_by(is_next) {
            let start = run[0].page.get() * PAGE_SIZE as u64;
            let result = if run[0].eighths == u8::MAX {
                let mut slices: Vec<_> =
                    run.iter().map(|page| IoSlice::new(self.arena.bytes(&page.slot))).collect();
                file.write(start, &mut slices)
            } else {
                self.write_eighths(file, start, &run[0])
            };
            result.map_err(|error| {
                self.file_failed("write", file, &error);
                file.refusal(&error)
            })?;
        }
        Ok(())
    }

    /// Writes those eighths of a page that are dirty.
    fn write_eighths(&self, file: &BackingFile, start: u64, page: &Dirty) -> std::io::Result<()> {
        let content = self.arena.bytes(&page.slot);
        for bytes in runs(page.eighths) {
            let at = start + bytes.start as u64;
            file.write(at, &mut [IoSlice::new(&content[bytes])])?;
        }
        Ok(())
    }

    pub(super) fn forget(&self, dirty: Vec<Dirty>) {
        let mut slots = Vec::new();
        for Dirty { place, slot, .. } in dirty {
            slots.push(slot);
            place.into_iter().for_each(|place| self.tiers.give_up(place, &mut slots));
        }
        self.arena.release(slots);
    }
}
