//! What can be changed of a named region beside its pages: its size, and where it is to be kept.

use std::sync::atomic::Ordering;

use farmem_region::{ByteCount, PAGE_SIZE, PageCount, PageIndex, PageRange};
use farmem_wire::{Header, Prefer, Progress, RangeEntry, RefusalCode, RegionInfo, Resize, Tier};

use super::copies::Against;
use super::named::{info, take_turn};
use super::{Caller, Engine, Refusal, Sessions};
use crate::journal::Record;
use crate::prefer::RANGES_MAX;
use crate::region::{Region, block_pages};
use crate::session::Session;

impl Engine {
    /// Makes the caller's region larger or smaller. What was beyond the new end is forgotten.
    pub(crate) fn resize(
        &self,
        caller: &Caller,
        header: &Header,
        resize: &Resize,
    ) -> Result<RegionInfo, Refusal> {
        let (file, written, had, against) = {
            let session = self.enter(caller, header)?;
            check_resize(&session, header, resize)?;
            let against =
                if session.region.has_own_range { Against::AllFiles } else { Against::OwnRanges };
            let Region { pages, .. } = session.region;
            (session.region.file().cloned(), session.region.written_file().cloned(), pages, against)
        };
        // Nothing is written any more to what it loses.
        let _turn = take_turn(written.as_deref())?;
        if let Some(file) = &file {
            // With no lock held, as that may take time.
            file.check(resize.size.get()).map_err(|error| {
                self.file_failed("find so much in", file, &error);
                file.refusal(&error)
            })?;
        }
        let mut sessions = self.sessions();
        if let Some(file) = file.filter(|_| resize.size > had.bytes()) {
            // What is added to it.
            let asked = file.range(had.bytes().get()).end..file.range(resize.size.get()).end;
            self.check_range(&sessions, &file, asked, against)?;
        }
        let mut session = self.enter(caller, header)?;
        check_resize(&session, header, resize)?;
        session.check_others(caller.connection)?;
        if session.region.pages != had {
            // Somebody else has changed it meanwhile.
            return Err(RefusalCode::Busy.into());
        }
        let wanted = resize.size.pages_rounded_up();
        if wanted > had {
            self.grow(&mut sessions, &mut session, wanted)?;
            return Ok(info(&session, None));
        }
        let mut slots = Vec::new();
        let removed = self.shrink(&mut sessions, &mut session, wanted, &mut slots)?;
        let info = info(&session, None);
        drop((session, sessions));
        self.pages.fetch_sub(removed, Ordering::Relaxed);
        self.arena.release(slots);
        self.surplus.store(true, Ordering::Relaxed);
        Ok(info)
    }

    fn grow(
        &self,
        sessions: &mut Sessions,
        session: &mut Session,
        wanted: PageCount,
    ) -> Result<(), Refusal> {
        self.check_journal()?;
        let had = session.region.pages;
        let missing = PageCount::new(wanted.get() - had.get()).bytes();
        let granted = self.reservation.reserve(missing, false)?;
        let blocks = session.region.blocks.len();
        if let Err(refusal) = self.add_blocks(sessions, &mut session.region, wanted) {
            self.reservation.release(granted);
            let added = session.region.blocks.drain(blocks..);
            added.for_each(|block| sessions.blocks.give_back(block));
            return Err(refusal);
        }
        session.granted = ByteCount::new(session.granted.get() + granted.get());
        // It is larger once that is noted, and has then all that belongs to it.
        self.note_blocks(&session.region, blocks);
        // It goes on as it ended.
        let last = PageIndex::new(had.get() - 1);
        if let Some(tier) = session.region.prefers.of(last) {
            let count = PageCount::new(wanted.get() - had.get());
            let added = PageRange { start: PageIndex::new(had.get()), count };
            self.set_preference(&mut session.region, added, Some(tier));
        }
        session.region.pages = wanted;
        self.note_session(session);
        Ok(())
    }

    /// Returns how many pages were forgotten, whose slots go to `slots`.
    fn shrink(
        &self,
        sessions: &mut Sessions,
        session: &mut Session,
        wanted: PageCount,
        slots: &mut Vec<farmem_vmem::Slot>,
    ) -> Result<u64, Refusal> {
        let region = &mut session.region;
        let count = PageCount::new(region.pages.get() - wanted.get());
        let beyond = PageRange { start: PageIndex::new(wanted.get()), count };
        if region.pins.overlaps(beyond) {
            let name = &session.name;
            self.warn("free_refused", format_args!("region {name} is not cut: pages are pinned"));
            return Err(RefusalCode::Pinned.into());
        }
        region.pages = wanted;
        session.granted = ByteCount::new(session.granted.get() - count.bytes().get());
        // It is smaller from here on: what another process finds beyond the end it forgets.
        self.note_session(session);
        let region = &mut session.region;
        let before = region.table.stored().get();
        region.table.remove(&self.tiers, beyond, slots);
        // The map does not say how large the region is.
        region.outdate_news();
        region.note_forgotten(beyond);
        self.set_preference(region, beyond, None);
        let keep = wanted.get().div_ceil(block_pages(&self.config));
        let keep = usize::try_from(keep).unwrap_or(usize::MAX).min(region.blocks.len());
        for block in region.blocks.drain(keep..) {
            sessions.blocks.give_back(block);
        }
        // No region has as many blocks as 32 bits count.
        let keep = u32::try_from(keep).unwrap_or(u32::MAX);
        self.tiers.note(|| Record::KeepBlocks { region: region.id, keep });
        let removed = before - region.table.stored().get();
        self.reservation.release(count.bytes());
        Ok(removed)
    }

    /// Sets in which tier ranges of the caller's region are to be kept.
    pub(crate) fn prefer(
        &self,
        caller: &Caller,
        header: &Header,
        ranges: impl Iterator<Item = RangeEntry> + Clone,
        prefer: &Prefer,
    ) -> Result<Progress, Refusal> {
        self.check_tier(prefer.tier)?;
        let mut session = self.enter(caller, header)?;
        session.check_region(header)?;
        session.check_ranges(ranges.clone())?;
        self.check_journal()?;
        let mut wanted = session.region.prefers.clone();
        ranges.clone().for_each(|range| wanted.set(range.0, prefer.tier));
        // Where there are more, as a former build allowed, they may become fewer.
        if wanted.len() > RANGES_MAX.max(session.region.prefers.len()) {
            return Err(RefusalCode::TooManyRanges.into());
        }
        let mut changed = 0;
        for range in ranges {
            self.set_preference(&mut session.region, range.0, prefer.tier);
            changed += range.0.count.get();
        }
        self.note_preference(&session.region);
        Ok(Progress { changed: PageCount::new(changed), next: None })
    }

    /// Whether the server has a tier that somebody prefers.
    pub(super) fn check_tier(&self, tier: Option<Tier>) -> Result<(), RefusalCode> {
        match tier {
            Some(Tier::Compressed) if !self.tiers.has_compressed() => Err(RefusalCode::NoTier),
            Some(Tier::File) if !self.tiers.has_file() => Err(RefusalCode::NoTier),
            Some(Tier::Dram | Tier::Compressed | Tier::File) | None => Ok(()),
        }
    }

    pub(super) fn set_preference(&self, region: &mut Region, range: PageRange, tier: Option<Tier>) {
        region.prefers.set(range, tier);
        self.tiers.note(|| Record::Prefer { region: region.id, range, tier });
    }
}

/// Whether a region can be given a size, apart from what holds it.
fn check_resize(session: &Session, header: &Header, resize: &Resize) -> Result<(), RefusalCode> {
    session.check_change(header)?;
    let unit = u64::from(session.region.page_bytes()).max(PAGE_SIZE as u64);
    let size = resize.size.get();
    // The regions of sessions grow by malloc.
    if !session.is_resident || size == 0 || !size.is_multiple_of(unit) {
        return Err(RefusalCode::Malformed);
    }
    if session.region.own.is_some() && size > session.region.pages.bytes().get() {
        // What is added is as its own range has it, all the rest is not yet.
        return Err(RefusalCode::Unfilled);
    }
    Ok(())
}
