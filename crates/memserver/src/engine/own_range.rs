//! The first flush of a clone that has a range of a file of its own: all that the range does not hold yet
//! is written there.
//!
//! ```text
//! clone      | absent | stored  | absent | stored |     absent pages are made from the original's file
//! own range  | held   | held    | old    | old    |     until all are held, and the disk has them
//! ```
//!
//! Nothing is read from the range before all of it is held. So it may be written in any order, by as many
//! requests and processes as it takes: a flush that comes to nothing changes nothing, and the next one
//! goes on. Pages that are absent are written there and stay absent: a clone may be larger than
//! memory.
//!
//! Whether a page is dirty is told by its leaf, and in a leaf that the clone shares with its original that
//! is about the original's file. So the clone takes no notice of it, and makes the leaf its own before
//! it says there what is clean.

use std::sync::Arc;

use farmem_region::{PageCount, PageIndex, PageRange};
use farmem_wire::{Header, RefusalCode};

use super::flush::{BATCH, Dirty};
use super::named::Work;
use super::parts::WHOLE;
use super::supply::{Need, Stop, Supply, from_source};
use super::{Caller, Engine, Refusal, lock};
use crate::backing::{BackingFile, Writing};
use crate::page_set::PageSet;
use crate::region::{OwnRange, Region};
use crate::table::LEAF_PAGES;
use crate::tiers::Place;

/// Pages side by side that a clone's own range does not hold yet.
struct Unheld<'a> {
    pages: Vec<Dirty>,
    /// None of them is forgotten meanwhile.
    _writing: Writing<'a>,
}

impl Engine {
    /// Writes what a clone's own range does not hold yet, or a first part of it; true if it holds all
    /// then. True also for other regions.
    pub(super) fn fill_own(
        &self,
        caller: &Caller,
        header: &Header,
        file: &Arc<BackingFile>,
        work: &mut Work,
    ) -> Result<bool, Refusal> {
        loop {
            let mut supply = Supply::default();
            let unheld = self.next_unheld(caller, header, file, &mut supply);
            self.end_supply(supply);
            let Some(unheld) = unheld? else {
                return Ok(true);
            };
            let written = self.write_back(file, &unheld.pages);
            if written.is_ok() {
                let count = unheld.pages.len() as u64;
                work.changed += count;
                work.left = work.left.saturating_sub(count);
                self.note_held(caller, file, &unheld.pages);
            }
            self.forget(unheld.pages);
            written?;
            if work.left == 0 {
                return Ok(false);
            }
        }
    }

    /// After a flush: if all of a clone's own range is held, and the disk has it, the clone is made from
    /// there from now on. If the disk has failed, nothing is known of what it has.
    pub(super) fn end_filling(&self, caller: &Caller, file: &Arc<BackingFile>, is_synced: bool) {
        let Some((_, shared)) = &caller.session else { return };
        let mut session = lock(shared);
        let Some(own) = own_of(&mut session.region, file) else { return };
        if !is_synced {
            own.held = PageSet::default();
        } else if !session.ended && session.region.complete_own() {
            self.note_session(&session);
        }
    }

    /// The first pages that the own range does not hold, all of one leaf.
    fn next_unheld<'a>(
        &self,
        caller: &Caller,
        header: &Header,
        file: &'a Arc<BackingFile>,
        supply: &mut Supply,
    ) -> Result<Option<Unheld<'a>>, Refusal> {
        loop {
            let mut session = self.enter(caller, header)?;
            let region = &mut session.region;
            let count = region.pages.get();
            let Some(own) = own_of(region, file) else {
                return Ok(None);
            };
            let start = own.held.first_missing(0);
            let leaf_end = (start / LEAF_PAGES as u64 + 1) * LEAF_PAGES as u64;
            let held = own.held.first_from(start).unwrap_or(u64::MAX);
            let end = held.min(start + BATCH as u64).min(leaf_end).min(count);
            if start >= end {
                return Ok(None);
            }
            self.check_journal()?;
            if region.table.leaf_of(PageIndex::new(start)).is_some() {
                region.table.make_own(&self.tiers, PageIndex::new(start));
            }
            let mut pages = Vec::new();
            let stop = self.look_at_whole(region, start..end, &mut pages, supply);
            match stop {
                Ok(()) => {}
                Err(Stop::Needs(need)) if !pages.is_empty() => self.forgo(need, supply),
                Err(Stop::Needs(need)) => {
                    let stored = |page: &PageIndex| region.table.with(*page, |_| ()).is_some();
                    let next = (start..end).map(PageIndex::new).filter(stored);
                    let needs = self.with_next(region, need, next);
                    drop(session);
                    self.supply(caller.may_wait, needs, supply)?;
                    continue;
                }
                Err(Stop::Refused(refusal)) => {
                    drop(session);
                    self.forget(pages);
                    return Err(refusal);
                }
            }
            let _writing = file.begin_writing(pages.iter().map(|dirty| dirty.page));
            return Ok(Some(Unheld { pages, _writing }));
        }
    }

    /// Takes a token for each page of a range, whether it is stored or not, as far as nothing is
    /// lacking.
    fn look_at_whole(
        &self,
        region: &mut Region,
        range: std::ops::Range<u64>,
        pages: &mut Vec<Dirty>,
        supply: &mut Supply,
    ) -> Result<(), Stop> {
        for at in range.clone() {
            let page = PageIndex::new(at);
            if region.table.with(page, |portion| portion.absent != 0) == Some(true) {
                self.make_from_file(region, at..at + 1, supply)?;
            }
            let stored = region.table.with(page, |portion| -> Result<_, Stop> {
                let slot = match &portion.place {
                    Place::Dram(slot) => self.arena.share(slot),
                    Place::Compressed(_) | Place::File(_) => self.copy_in(page, portion, supply)?,
                };
                Ok((slot, Some(self.tiers.share(&portion.place))))
            });
            let (slot, place) = match stored {
                Some(found) => found?,
                // It was read after the original's file could not change under it: before that changes, the
                // page is stored.
                None => match supply.take_made(page, region.removals, WHOLE) {
                    Some(made) => (made.slot, None),
                    None => match from_source(region, at..range.end) {
                        Some(source) => return Err(Need::Source(source).into()),
                        None => return Err(RefusalCode::NoPage.into()),
                    },
                },
            };
            pages.push(Dirty { page, eighths: WHOLE, place, slot });
        }
        Ok(())
    }

    /// The own range holds pages that were written to it. What was written to them meanwhile is dirty.
    fn note_held(&self, caller: &Caller, file: &Arc<BackingFile>, written: &[Dirty]) {
        let Some((_, shared)) = &caller.session else { return };
        let mut session = lock(shared);
        if session.ended {
            return;
        }
        let region = &mut session.region;
        self.clean(region, written);
        let first = written.first().map(|first| first.page);
        if let (Some(own), Some(start)) = (own_of(region, file), first) {
            let count = PageCount::new(written.len() as u64);
            own.held.insert(PageRange { start, count });
        }
    }
}

/// The region's own range, if that is the file and does not hold all of it yet.
fn own_of<'a>(region: &'a mut Region, file: &Arc<BackingFile>) -> Option<&'a mut OwnRange> {
    region.own.as_mut().filter(|own| Arc::ptr_eq(&own.file, file))
}
