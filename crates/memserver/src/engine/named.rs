//! Named regions: made, opened, listed, deleted; and what is done to ranges of them.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use farmem_region::{PAGE_SIZE, PageCount, PageIndex, PageRange, RegionId, SessionId, Version};
use farmem_vmem::Slot;
use farmem_wire::{
    Attach, AttachMode, BODY_BYTES_MAX, Create, Delete, FullBody, GrantedSetup, Header, List,
    NAME_BYTES_MAX, Open, PAGE_SIZES, Progress, RangeEntry, RefusalCode, RegionInfo,
    Source as WireSource,
};

use super::copies::Against;
use super::pages::SPARE_SLOTS;
use super::supply::{Stop, Supply};
use super::{Caller, Cause, Engine, Refusal, Sessions, lock};
use crate::backing::BackingFile;
use crate::journal::Record;
use crate::page_set::{PageSet, RANGES_MAX};
use crate::region::{Region, Source};
use crate::session::Session;
use crate::table::{LEAF_PAGES, Portion};
use crate::tiers::Place;

/// Pages that one request brings into dram, or writes back: 64 MiB, some tens of milliseconds.
const PAGES_PER_REQUEST_MAX: u64 = 16 << 10;
/// Of the memory, pinned pages take at most this share, in 32nds: the rest of what is lent has to
/// fit beside them.
const PINNED_32NDS: u64 = 24;

/// What is done to the pages of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bring {
    /// They are made as the region's source has them, if they were never written.
    Initialise,
    /// And brought into dram.
    Prefetch,
    /// And kept there.
    Pin,
}

impl Engine {
    /// Makes a named region.
    pub(crate) fn create(&self, create: &Create<'_>) -> Result<RegionInfo, Refusal> {
        let unit = u64::from(create.page_bytes).max(PAGE_SIZE as u64);
        let size = create.size.get();
        if !PAGE_SIZES.contains(&create.page_bytes) || size == 0 || !size.is_multiple_of(unit) {
            return Err(RefusalCode::Malformed.into());
        }
        self.check_tier(create.prefers)?;
        let source = match create.source {
            WireSource::Nothing => Source::Nothing,
            WireSource::Fill(byte) => Source::Fill(byte),
            WireSource::File { path, offset } => {
                Source::File(self.open_range(path, offset, size, create.page_bytes)?)
            }
            WireSource::Server { address, region, offset, .. } => {
                if !offset.is_multiple_of(u64::from(create.page_bytes))
                    || [address, region].iter().any(|text| text.chars().any(char::is_control))
                {
                    return Err(RefusalCode::Malformed.into());
                }
                let neighbours = self.config.neighbours.clone();
                let distant = BackingFile::distant(neighbours, address, region, offset, None);
                distant.check(size).map_err(|error| {
                    self.file_failed("find so much in", &distant, &error);
                    distant.refusal(&error)
                })?;
                Source::File(self.files.add(distant))
            }
        };
        let mut sessions = self.sessions();
        if let Source::File(file) = &source {
            self.check_range(&sessions, file, file.range(size), Against::OwnRanges)?;
        }
        let (id, mut session) =
            self.resident(&mut sessions, create.name, create.size.pages_rounded_up())?;
        session.region.writes_back = match create.source {
            WireSource::File { .. } => true,
            WireSource::Server { writes_back, .. } => writes_back,
            WireSource::Nothing | WireSource::Fill(_) => false,
        };
        session.region.source = source;
        session.region.set_page_bytes(create.page_bytes);
        let all = PageRange { start: PageIndex::new(0), count: session.region.pages };
        session.region.prefers.set(all, create.prefers);
        self.note_new(&session);
        let info = info(&session, None);
        sessions.by_id.insert(id, Arc::new(Mutex::new(session)));
        Ok(info)
    }

    /// A resident session with an empty region, not yet listed. Reserves what it may hold.
    pub(super) fn resident(
        &self,
        sessions: &mut Sessions,
        name: &str,
        pages: PageCount,
    ) -> Result<(SessionId, Session), Refusal> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
            return Err(RefusalCode::Malformed.into());
        }
        self.check_journal()?;
        if sessions.names.contains_key(name) {
            return Err(RefusalCode::NameTaken.into());
        }
        let (id, mut session) = self.session_for(sessions, name, pages.bytes(), false)?;
        let added = self.add_blocks(sessions, &mut session.region, pages);
        if let Err(refusal) = added {
            self.reservation.release(session.granted);
            session.region.blocks.drain(..).for_each(|block| sessions.blocks.give_back(block));
            return Err(refusal);
        }
        session.region.pages = pages;
        session.is_resident = true;
        sessions.names.insert(name.to_owned(), id);
        Ok((id, session))
    }

    /// Attaches the caller to a named region.
    pub(crate) fn open(
        &self,
        caller: &mut Caller,
        open: &Open<'_>,
    ) -> Result<(Header, GrantedSetup), Refusal> {
        if caller.session.is_some() {
            return Err(RefusalCode::Malformed.into());
        }
        let (id, shared) = {
            let sessions = self.sessions();
            let id = *sessions.names.get(open.name).ok_or(RefusalCode::NoRegion)?;
            (id, sessions.by_id.get(&id).cloned().ok_or(RefusalCode::NoRegion)?)
        };
        let mode = if open.take_over { AttachMode::TakeOver } else { AttachMode::Join };
        let mut session = lock(&shared);
        if session.ended {
            return Err(RefusalCode::NoRegion.into());
        }
        self.bind(caller, &mut session, &Attach { mode, replaces: 0 })?;
        caller.traffic = Arc::clone(&session.traffic);
        let reply = self.describe(&session);
        drop(session);
        caller.session = Some((id, shared));
        Ok(reply)
    }

    /// The named regions after one, as many as fit in a body. Only what is known without looking
    /// at every page is told.
    pub(crate) fn list(&self, list: &List) -> Vec<RegionInfo> {
        let sessions = self.sessions();
        let after = SessionId::new(list.after.get().saturating_add(1));
        let (mut infos, mut bytes) = (Vec::new(), 0);
        for shared in sessions.by_id.range(after..).map(|(_, shared)| shared) {
            let session = lock(shared);
            if !session.is_resident {
                continue;
            }
            let info = info(&session, None);
            bytes += info.encoded_bytes();
            if bytes > BODY_BYTES_MAX {
                break;
            }
            infos.push(info);
        }
        infos
    }

    /// All about the caller's region.
    pub(crate) fn show(&self, caller: &Caller, header: &Header) -> Result<RegionInfo, Refusal> {
        let session = self.enter(caller, header)?;
        session.check_region(header)?;
        Ok(info(&session, Some(places(&session.region))))
    }

    /// Deletes the caller's region, with all that it holds.
    pub(crate) fn delete(
        &self,
        caller: &Caller,
        header: &Header,
        delete: Delete,
    ) -> Result<(), Refusal> {
        let file = {
            let mut session = self.enter(caller, header)?;
            session.check_region(header)?;
            if !session.is_resident {
                // It goes with its session.
                return Err(RefusalCode::Malformed.into());
            }
            let refused = if session.region.pins.pages().get() > 0 {
                Some(("pages are pinned", RefusalCode::Pinned))
            } else if session.region.has_copies() && !delete.keeps_copies {
                Some(("it has copies", RefusalCode::Copied))
            } else {
                None
            };
            if let Some((why, code)) = refused {
                let name = &session.name;
                self.warn("free_refused", format_args!("region {name} is not deleted: {why}"));
                return Err(code.into());
            }
            session.leases.check_end(Some(caller.connection), Instant::now())?;
            session.region.written_file().cloned()
        };
        // Nothing is written any more where another region may be from now on.
        let _turn = take_turn(file.as_deref())?;
        let Some((_, shared)) = &caller.session else {
            return Err(RefusalCode::NotAttached.into());
        };
        let still = |Session { region, .. }: &Session| {
            region.pins.pages().get() == 0 && (delete.keeps_copies || !region.has_copies())
        };
        if !self.end(shared, Cause::Deleted(caller.connection), still) {
            // It was pinned, copied or deleted by somebody else since it was looked at, or a lease was given.
            return Err(RefusalCode::Busy.into());
        }
        Ok(())
    }

    /// Brings ranges into dram, or a first part of them.
    pub(crate) fn bring(
        &self,
        caller: &Caller,
        header: &Header,
        ranges: impl Iterator<Item = RangeEntry> + Clone,
        how: Bring,
    ) -> Result<Progress, Refusal> {
        {
            let session = self.enter(caller, header)?;
            session.check_region(header)?;
            session.check_ranges(ranges.clone())?;
        }
        self.check_journal()?;
        let mut supply = Supply::default();
        let mut work = Work::of_one_request();
        let mut next = None;
        for (at, range) in (0..).zip(ranges) {
            match self.bring_range(caller, header, range.0, how, &mut work, &mut supply) {
                Ok(None) => {}
                Ok(Some(page)) => {
                    next = Some((at, page));
                    break;
                }
                Err(refusal) => {
                    self.end_supply(supply);
                    return Err(refusal);
                }
            }
        }
        self.end_supply(supply);
        Ok(Progress { changed: PageCount::new(work.changed), next })
    }

    /// Brings a range in; returns the page from which on it is still to be done. Where it is refused, none of
    /// it that was not pinned before is.
    fn bring_range(
        &self,
        caller: &Caller,
        header: &Header,
        range: PageRange,
        how: Bring,
        work: &mut Work,
        supply: &mut Supply,
    ) -> Result<Option<PageIndex>, Refusal> {
        let mut pinned = Vec::new();
        let brought = self.bring_pieces(caller, header, (range, how), work, supply, &mut pinned);
        if brought.is_err()
            && let Some((_, shared)) = &caller.session
        {
            let mut session = lock(shared);
            if !session.ended {
                pinned.into_iter().for_each(|range| self.unpin_range(&mut session.region, range));
            }
        }
        brought
    }

    /// Brings a range in, a piece at a time; what of it was not pinned before and is now goes to `pinned`.
    fn bring_pieces(
        &self,
        caller: &Caller,
        header: &Header,
        (range, how): (PageRange, Bring),
        work: &mut Work,
        supply: &mut Supply,
        pinned: &mut Vec<PageRange>,
    ) -> Result<Option<PageIndex>, Refusal> {
        let end = range.start.get() + range.count.get();
        let mut page = range.start.get();
        while page < end {
            if work.left == 0 {
                return Ok(Some(PageIndex::new(page)));
            }
            let mut session = self.enter(caller, header)?;
            if end > session.region.pages.get() {
                // It was made smaller meanwhile.
                return Err(RefusalCode::OutOfBounds.into());
            }
            // Where nothing is and nothing is to be made there is nothing to look at.
            if !makes_pages(&session.region.source, how) {
                let stored = session.region.table.leaf_from(PageIndex::new(page));
                page = page.max(stored.map_or(end, |(first, _)| first.get()));
            }
            let stop = end.min((page / LEAF_PAGES as u64 + 1) * LEAF_PAGES as u64);
            // In a small memory no more at a time than has room beside other things, or what was
            // brought first would leave again before the last is there.
            let stop = stop.min(page + u64::from((self.arena.slots() / 8).max(SPARE_SLOTS)));
            if page >= stop {
                break;
            }
            let piece =
                PageRange { start: PageIndex::new(page), count: PageCount::new(stop - page) };
            if how == Bring::Pin {
                self.pin(&mut session.region, piece, pinned)?;
            }
            match self.bring_piece(&mut session.region, page..stop, how, work, supply) {
                Ok(()) => {
                    work.left = work.left.saturating_sub(piece.count.get());
                    page = stop;
                }
                Err(Stop::Needs(need)) => {
                    let needs = match how {
                        Bring::Initialise => vec![need],
                        Bring::Prefetch | Bring::Pin => {
                            let pages = (page..stop).map(PageIndex::new);
                            self.with_next(&session.region, need, pages)
                        }
                    };
                    drop(session);
                    self.supply(caller.may_wait, needs, supply)?;
                }
                Err(Stop::Refused(refusal)) => return Err(refusal),
            }
        }
        Ok(None)
    }

    /// Brings the pages of one leaf in.
    pub(super) fn bring_piece(
        &self,
        region: &mut Region,
        piece: Range<u64>,
        how: Bring,
        work: &mut Work,
        supply: &mut Supply,
    ) -> Result<(), Stop> {
        let end = piece.end;
        for page in piece.map(PageIndex::new) {
            let is_there = region.table.with(page, |portion| {
                let is_near = matches!(portion.place, Place::Dram(_));
                (portion.absent == 0, how == Bring::Initialise || is_near)
            });
            match is_there {
                Some((true, true)) => continue,
                Some((true, false)) => self.promote(region, page, supply)?,
                Some((false, _)) => {
                    self.make_from_file(region, page.get()..page.get() + 1, supply)?;
                }
                None if !makes_pages(&region.source, how) => continue,
                None => match &region.source {
                    Source::Nothing => continue,
                    Source::Fill(byte) => {
                        let byte = *byte;
                        self.initialise_with(region, page, byte, supply)?;
                    }
                    Source::File(_) => {
                        let unit = region.unit_of(page);
                        let stop = end.min(unit.start + u64::from(SPARE_SLOTS)).max(unit.end);
                        let before = region.table.stored().get();
                        self.make_from_file(region, unit.start..stop, supply)?;
                        // One is counted below.
                        work.changed += region.table.stored().get() - before - 1;
                    }
                },
            }
            work.changed += 1;
        }
        Ok(())
    }

    /// Brings a stored page back to dram.
    fn promote(
        &self,
        region: &mut Region,
        page: PageIndex,
        supply: &mut Supply,
    ) -> Result<(), Stop> {
        let former = region.table.with(page, |portion| {
            let slot = self.copy_in(page, portion, supply)?;
            let place = Place::Dram(slot);
            region.table.note_move(&self.tiers, page, &place);
            portion.heat = portion.heat.max(1);
            Ok::<_, Stop>(std::mem::replace(&mut portion.place, place))
        });
        if let Some(place) = former.transpose()? {
            self.tiers.give_up(place, supply.unused());
        }
        Ok(())
    }

    fn initialise_with(
        &self,
        region: &mut Region,
        page: PageIndex,
        byte: u8,
        supply: &mut Supply,
    ) -> Result<(), Stop> {
        // All of them are one slot, until one is written: that is stored elsewhere anyway.
        let slot = self.fill_page(region, byte, supply)?;
        self.put_made(region, page, slot, 0);
        Ok(())
    }

    pub(super) fn file_failed(&self, what: &str, file: &BackingFile, error: &std::io::Error) {
        let path = file.path().display();
        if file.is_distant() {
            self.tell("source_away", format_args!("cannot {what} {path}: {error}"));
            return;
        }
        let message = format_args!("cannot {what} the backing file {path}: {error}");
        self.tell("file_failed", message);
    }

    /// Puts a page that was made from the source into the table; what is absent of it is zeros.
    pub(super) fn put_made(&self, region: &mut Region, page: PageIndex, slot: Slot, absent: u8) {
        let version = Version::new(0);
        let checksum = Region::neutral(page, version, self.arena.bytes(&slot));
        let (generation, place) = (region.generation, Place::Dram(slot));
        let portion = Portion { place, dirty: 0, heat: 1, absent, generation, version, checksum };
        let former = region.table.put(&self.tiers, page, &portion);
        assert!(former.is_none(), "only an absent page is made from the source");
        self.note_preference(region);
        self.pages.fetch_add(1, Ordering::Relaxed);
    }

    /// Pins a range, and appends what of it was not pinned to `pinned`.
    fn pin(
        &self,
        region: &mut Region,
        range: PageRange,
        pinned_now: &mut Vec<PageRange>,
    ) -> Result<(), Refusal> {
        let before = region.pins.pages().get();
        let fresh = region.pins.gaps(range);
        region.pins.insert(range);
        self.tiers.note(|| Record::Pin { region: region.id, range });
        let added = region.pins.pages().get() - before;
        let limit = self.config.memory.get() / PAGE_SIZE as u64 * PINNED_32NDS / 32;
        let pinned = self.pinned.fetch_add(added, Ordering::Relaxed) + added;
        if pinned > limit {
            fresh.into_iter().for_each(|range| self.unpin_range(region, range));
            let asked = range.count.bytes();
            let free = PageCount::new((limit + added).saturating_sub(pinned)).bytes();
            return Err(Refusal::full(FullBody { asked, free }));
        }
        if region.pins.count() > RANGES_MAX {
            fresh.into_iter().for_each(|range| self.unpin_range(region, range));
            return Err(RefusalCode::TooManyRanges.into());
        }
        // In a leaf of their own, or a copy's use of them would decide.
        region.table.unshare(&self.tiers, range);
        pinned_now.extend(fresh);
        Ok(())
    }

    /// After a region was copied: the copy's use of pinned pages must not decide where they lie.
    pub(super) fn keep_pinned_apart(&self, region: &mut Region) {
        let ranges: Vec<_> = region.pins.ranges().collect();
        ranges.into_iter().for_each(|range| region.table.unshare(&self.tiers, range));
    }

    fn unpin_range(&self, region: &mut Region, range: PageRange) {
        let before = region.pins.pages().get();
        region.pins.remove(range);
        self.tiers.note(|| Record::Unpin { region: region.id, range });
        let removed = before - region.pins.pages().get();
        self.pinned.fetch_sub(removed, Ordering::Relaxed);
    }

    /// Lets ranges leave dram again.
    pub(crate) fn unpin(
        &self,
        caller: &Caller,
        header: &Header,
        ranges: impl Iterator<Item = RangeEntry> + Clone,
    ) -> Result<Progress, Refusal> {
        let mut session = self.enter(caller, header)?;
        session.check_region(header)?;
        session.check_ranges(ranges.clone())?;
        let before = session.region.pins.pages().get();
        let mut left = session.region.pins.clone();
        ranges.clone().for_each(|range| left.remove(range.0));
        if left.count() > RANGES_MAX.max(session.region.pins.count()) {
            return Err(RefusalCode::TooManyRanges.into());
        }
        ranges.for_each(|range| self.unpin_range(&mut session.region, range.0));
        let changed = PageCount::new(before - session.region.pins.pages().get());
        Ok(Progress { changed, next: None })
    }
}

/// The turn to write to a region's file, so that nobody else does.
pub(super) fn take_turn(
    file: Option<&BackingFile>,
) -> Result<Option<MutexGuard<'_, ()>>, RefusalCode> {
    file.map(|file| file.take_turn().ok_or(RefusalCode::Busy)).transpose()
}

/// Whether absent pages are made. What a fill holds needs no fetching: it is read at once.
fn makes_pages(source: &Source, how: Bring) -> bool {
    match source {
        Source::Nothing => how == Bring::Pin,
        Source::Fill(_) => how != Bring::Prefetch,
        Source::File(_) => true,
    }
}

/// What one request has done and may still do, in pages.
pub(super) struct Work {
    pub(super) changed: u64,
    pub(super) left: u64,
}

impl Work {
    pub(super) const fn of_one_request() -> Self {
        Self { changed: 0, left: PAGES_PER_REQUEST_MAX }
    }
}

/// How many pages of a region lie where, differ from the backing file, and were made or written
/// since the last copy.
#[derive(Debug, Default)]
pub(super) struct Places {
    dram: u64,
    compressed: u64,
    file: u64,
    dirty: u64,
    changed: u64,
}

fn places(region: &Region) -> Places {
    let mut places = Places::default();
    let mut from = PageIndex::new(0);
    while let Some((first, leaf)) = region.table.leaf_from(from) {
        for (at, portion) in crate::table::lock(leaf).portions.iter() {
            match &portion.place {
                Place::Dram(_) => places.dram += 1,
                Place::Compressed(_) => places.compressed += 1,
                Place::File(_) => places.file += 1,
            }
            let page = PageIndex::new(first.get() + at as u64);
            let is_held = region.own.as_ref().is_none_or(|own| own.held.contains(page));
            places.dirty += u64::from(region.writes_back && portion.dirty != 0 && is_held);
            places.changed += u64::from(portion.generation == region.generation);
        }
        from = PageIndex::new(first.get() + LEAF_PAGES as u64);
    }
    if let Some(own) = &region.own {
        // None of the others is in the file.
        places.dirty += region.pages.get() - own.held.pages().get();
    }
    places
}

pub(super) fn info(session: &Session, places: Option<Places>) -> RegionInfo {
    let Session { name, region, .. } = session;
    let places = places.unwrap_or_default();
    let file = region.file();
    RegionInfo {
        // A region has the number of its session.
        region: RegionId::new(session.id.get()),
        pages: region.pages,
        page_bytes: region.page_bytes(),
        is_frozen: region.is_frozen,
        is_file: file.is_some_and(|file| !file.is_distant()),
        is_server: file.is_some_and(|file| file.is_distant()),
        writes_back: region.writes_back,
        is_unfilled: region.own.is_some(),
        stored: region.table.stored(),
        dirty: PageCount::new(places.dirty),
        changed: PageCount::new(places.changed),
        pinned: region.pins.pages(),
        dram: PageCount::new(places.dram),
        compressed: PageCount::new(places.compressed),
        file: PageCount::new(places.file),
        preferred: region.prefers.pages(),
        name: name.clone(),
        // The file, or the region of another server.
        source: file.map_or_else(String::new, |file| file.path().display().to_string()),
    }
}

/// Ends what a region holds beside its table.
pub(super) fn end_region(engine: &Engine, region: &mut Region) {
    engine.pinned.fetch_sub(region.pins.pages().get(), Ordering::Relaxed);
    region.pins = PageSet::default();
    region.orphan();
    engine.arena.release(region.fill_page.take());
}
