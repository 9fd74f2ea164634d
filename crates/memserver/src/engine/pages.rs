//! Requests about pages: read, write, the slots of clients that share the arena, free.

use std::collections::HashMap;
use std::iter::Peekable;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use farmem_region::{PAGE_SIZE, PageCount, PageIndex, PageRange, RegionId, Version};
use farmem_vmem::{Arena, Slot};
use farmem_wire::{
    Action, Free, FullBody, Header, NO_SLOT, PageEntry, Progress, RangeEntry, RefusalCode,
    SLOTS_ASSIGNED_MAX, Tier, page_checksum,
};

use super::supply::{Need, Purpose, Stop, Supply};
use super::{Caller, Engine, Refusal};
use crate::counters::count;
use crate::region::{Region, Source};
use crate::session::Session;
use crate::table::Portion;
use crate::tiers::Place;

/// A page in a slower tier that was asked for so often since the hand passed goes back to dram;
/// before, a copy of it is sent. Most pages that a pager fetches it then has itself.
const PROMOTE_HEAT: u8 = 2;
/// The most that accesses can heat a page: it cools down in four passes of the hand.
pub(super) const HEAT_MAX: u8 = 15;
/// A page that was just written survives one pass.
const WRITTEN_HEAT: u8 = 1;
/// Slots that are taken at once for pages that come from elsewhere: those of a usual message.
pub(super) const SPARE_SLOTS: u32 = 64;

/// A server is full if everybody has tried in vain to make room for so long, and nobody has pages on their
/// way to a slower tier: who is about to give memory back may wait for a processor.
const FULL_TIME: Duration = Duration::from_millis(50);
/// After an attempt to make room that moved nothing.
const FRUITLESS_PAUSE: Duration = Duration::from_millis(5);
/// The longest that one request makes room before it is refused as busy: clients take a server that
/// says nothing for a second for lost, and others wait for the same worker.
const ROOM_TIME_MAX: Duration = Duration::from_millis(100);

/// Pages that are read from the region's file for one read, or for one write which touches large portions in
/// part: 16 of 2 MiB. What needs more is refused as busy once so many are there; repeated, it finds them.
const MADE_PER_REQUEST_MAX: u32 = 8192;

/// How a page that is to be written stands to what is stored.
enum Standing {
    New,
    /// It is stored already: the write is repeated.
    Stored(PageEntry),
    /// Something newer is stored.
    Old(PageEntry),
}

/// A page that was found: what is known of it, and a token for a slot that holds it.
type Found = (PageEntry, Slot);

impl Engine {
    /// Looks pages up: a token for each slot goes to `slots`, what is known of it to `found`.
    /// After a refusal both are as before.
    pub(crate) fn read(
        &self,
        caller: &Caller,
        header: &Header,
        wanted: impl Iterator<Item = PageEntry> + Clone,
        slots: &mut Vec<Slot>,
        found: impl FnMut(PageEntry),
    ) -> Result<(), Refusal> {
        let mut supply = Supply::of(Purpose::Send);
        let mut wanted = wanted.peekable();
        let result = self.read_with(caller, header, &mut wanted, slots, &mut supply, found);
        self.end_supply(supply);
        if result.is_err() {
            self.arena.release(slots.drain(..));
            return result;
        }
        count(&self.counters.reads, 1);
        count(&self.counters.pages_read, slots.len());
        Ok(())
    }

    fn read_with(
        &self,
        caller: &Caller,
        header: &Header,
        wanted: &mut Peekable<impl Iterator<Item = PageEntry> + Clone>,
        slots: &mut Vec<Slot>,
        supply: &mut Supply,
        mut found: impl FnMut(PageEntry),
    ) -> Result<(), Refusal> {
        let mut made = 0;
        loop {
            let mut session = self.enter(caller, header)?;
            session.check_region(header)?;
            let is_kept = self.keeps_working_set(&session);
            let region = &mut session.region;
            let needs = loop {
                let Some(entry) = wanted.peek() else {
                    return Ok(());
                };
                match self.find(region, *entry, supply) {
                    Ok((entry, slot)) => {
                        if is_kept {
                            self.note_read(region, entry.page);
                        }
                        slots.push(slot);
                        found(entry);
                        wanted.next();
                    }
                    Err(Stop::Refused(refusal)) => return Err(refusal),
                    Err(Stop::Needs(need)) => {
                        let next = wanted.clone().skip(1).map(|entry| entry.page);
                        break self.with_next(region, need, next);
                    }
                }
            };
            drop(session);
            made += needs.iter().map(Need::made).sum::<u32>();
            if made > MADE_PER_REQUEST_MAX {
                // What was made stays: the client comes again, and finds less to be made.
                return Err(RefusalCode::Busy.into());
            }
            self.supply(caller.may_wait, needs, supply)?;
        }
    }

    /// The page that a read asks for. Version 0 asks for whichever there is.
    fn find(
        &self,
        region: &mut Region,
        wanted: PageEntry,
        supply: &mut Supply,
    ) -> Result<Found, Stop> {
        if !region.contains(wanted.page) {
            return Err(Refusal::page(RefusalCode::OutOfBounds, wanted).into());
        }
        let is_partial = |portion: &mut Portion| portion.absent != 0;
        // Where no page can be, each lookup is worth saving.
        if region.has_parts() && region.table.with(wanted.page, is_partial) == Some(true) {
            let page = wanted.page.get();
            self.make_from_file(region, page..page + 1, supply)?;
        }
        match self.find_stored(region, wanted, supply)? {
            Some(found) => Ok(found),
            None if wanted.version != Version::new(0) => {
                Err(Refusal::page(RefusalCode::NoPage, wanted).into())
            }
            None => self.make(region, wanted, supply),
        }
    }

    /// A page as it is stored, if it is: what of it is absent is zeros.
    pub(super) fn find_stored(
        &self,
        region: &mut Region,
        wanted: PageEntry,
        supply: &mut Supply,
    ) -> Result<Option<Found>, Stop> {
        let looked = region.table.with(wanted.page, |portion| {
            let entry = self.entry(region, wanted.page, portion);
            let is_wanted = [Version::new(0), portion.version].contains(&wanted.version);
            let slot = match &portion.place {
                Place::Dram(slot) if is_wanted => {
                    warm(&mut portion.heat);
                    Some(self.arena.share(slot))
                }
                Place::Dram(_) | Place::Compressed(_) | Place::File(_) => None,
            };
            (entry, is_wanted, slot)
        });
        match looked {
            Some((entry, false, _)) => {
                let stored = PageEntry { checksum: wanted.checksum, slot: wanted.slot, ..entry };
                Err(Refusal::page(RefusalCode::WrongVersionOfPage, stored).into())
            }
            Some((entry, true, Some(slot))) if !region.copies_on_access => Ok(Some((entry, slot))),
            Some((_, true, slot)) => {
                self.arena.release(slot);
                self.fetch(region, wanted.page, supply).map(Some)
            }
            None => Ok(None),
        }
    }

    /// A stored page that is not in dram, or that is to become the region's own.
    fn fetch(
        &self,
        region: &mut Region,
        page: PageIndex,
        supply: &mut Supply,
    ) -> Result<Found, Stop> {
        if region.copies_on_access {
            return self.copy_own(region, page, supply);
        }
        let fetched = region.table.with(page, |portion| -> Result<_, Stop> {
            let slot = self.copy_in(page, portion, supply)?;
            warm(&mut portion.heat);
            let mut former = None;
            let is_wanted = match region.prefers.of(page) {
                None => portion.heat >= PROMOTE_HEAT,
                Some(tier) => tier == Tier::Dram,
            };
            if is_wanted && self.may_promote() {
                let place = Place::Dram(self.arena.share(&slot));
                region.table.note_move(&self.tiers, page, &place);
                former = Some(std::mem::replace(&mut portion.place, place));
                count(&self.counters.promoted_pages, 1);
            }
            Ok((self.entry(region, page, portion), slot, former))
        });
        let (entry, slot, former) = fetched.unwrap_or(Err(RefusalCode::NoPage.into()))?;
        former.into_iter().for_each(|place| self.tiers.give_up(place, supply.unused()));
        Ok((entry, slot))
    }

    /// A stored page, which becomes the region's own if it is shared with a copy or the original.
    fn copy_own(
        &self,
        region: &mut Region,
        page: PageIndex,
        supply: &mut Supply,
    ) -> Result<Found, Stop> {
        let own = |portion: &mut Portion| match &portion.place {
            Place::Dram(slot) if self.arena.tokens(slot) == 1 => Some(self.arena.share(slot)),
            Place::Dram(_) | Place::Compressed(_) | Place::File(_) => None,
        };
        let is_shared = region.table.is_shared(page);
        let own = if is_shared { None } else { region.table.with(page, own).flatten() };
        let slot = match own {
            Some(slot) => slot,
            None => {
                self.check_journal()?;
                supply.purpose = Purpose::Keep;
                let copied = region.table.with(page, |portion| self.copy_in(page, portion, supply));
                let slot = copied.unwrap_or(Err(RefusalCode::NoPage.into()))?;
                let token = Place::Dram(self.arena.share(&slot));
                let former = region.table.move_own(&self.tiers, page, token);
                self.tiers.give_up(former, supply.unused());
                slot
            }
        };
        let entry = region.table.with(page, |portion| self.entry(region, page, portion));
        Ok((entry.unwrap_or_default(), slot))
    }

    /// A page that was never written, as the region's source has it.
    fn make(
        &self,
        region: &mut Region,
        wanted: PageEntry,
        supply: &mut Supply,
    ) -> Result<Found, Stop> {
        let page = wanted.page;
        match &region.source {
            Source::Nothing => Err(Refusal::page(RefusalCode::NoPage, wanted).into()),
            Source::Fill(byte) => {
                let byte = *byte;
                let slot = self.fill_page(region, byte, supply)?;
                let content = self.arena.bytes(&slot);
                let checksum = Region::neutral(page, Version::new(0), content);
                let checksum = region.bind(checksum);
                let entry =
                    PageEntry { page, version: Version::new(0), checksum, slot: self.no_slot() };
                Ok((entry, slot))
            }
            Source::File(_) => {
                self.make_from_file(region, region.unit_of(page), supply)?;
                self.find(region, wanted, supply)
            }
        }
    }

    /// A token for the page that all absent pages of a fill region look like.
    pub(super) fn fill_page(
        &self,
        region: &mut Region,
        byte: u8,
        supply: &mut Supply,
    ) -> Result<Slot, Stop> {
        let page = match &mut region.fill_page {
            Some(page) => page,
            empty => {
                let mut slot = supply.slot()?;
                self.arena.bytes_mut(&mut slot).fill(byte);
                empty.insert(slot)
            }
        };
        Ok(self.arena.share(page))
    }

    /// Checks a write before its pages arrive, and takes fresh slots for them.
    pub(crate) fn begin_write(
        &self,
        caller: &Caller,
        header: &Header,
        entries: impl Iterator<Item = PageEntry> + Clone,
        slots: &mut Vec<Slot>,
    ) -> Result<(), Refusal> {
        check_versions(entries.clone().map(|entry| (entry.page, entry.version)))?;
        let session = self.enter(caller, header)?;
        session.check_change(header)?;
        let written = entries.clone();
        let mut outside = entries.filter(|entry| !session.region.contains(entry.page));
        if let Some(outside) = outside.next() {
            return Err(Refusal::page(RefusalCode::OutOfBounds, outside));
        }
        drop(session);
        self.check_journal()?;
        self.initialise_around(caller, header, &written)?;
        caller.traffic.let_in(header.entries, self.config.limits.session_slots_max())?;
        let purpose = Purpose::Keep;
        let taken = self.take_slots(purpose, caller.may_wait, header.entries, slots);
        if taken.is_err() {
            caller.traffic.let_go(header.entries);
        }
        taken
    }

    /// Where portions are of several pages, those that are about to be written in part are read from
    /// the region's file as a whole: they are written back as a whole.
    fn initialise_around(
        &self,
        caller: &Caller,
        header: &Header,
        written: &(impl Iterator<Item = PageEntry> + Clone),
    ) -> Result<(), Refusal> {
        let (mut supply, mut made) = (Supply::default(), 0);
        let result = loop {
            let mut session = match self.enter(caller, header) {
                Ok(session) => session,
                Err(refusal) => break Err(refusal),
            };
            match self.initialise_units(&mut session.region, written, &mut supply) {
                Ok(()) => break Ok(()),
                Err(Stop::Refused(refusal)) => break Err(refusal),
                Err(Stop::Needs(need)) => {
                    drop(session);
                    made += need.slots();
                    if made > MADE_PER_REQUEST_MAX {
                        // What was made stays: the client comes again, and finds less to be made.
                        break Err(RefusalCode::Busy.into());
                    }
                    if let Err(refusal) = self.supply(caller.may_wait, vec![need], &mut supply) {
                        break Err(refusal);
                    }
                }
            }
        };
        self.end_supply(supply);
        result
    }

    fn initialise_units(
        &self,
        region: &mut Region,
        written: &(impl Iterator<Item = PageEntry> + Clone),
        supply: &mut Supply,
    ) -> Result<(), Stop> {
        if region.unit_pages() == 1 || !matches!(region.source, Source::File(_)) {
            return Ok(());
        }
        let mut former = 0..0;
        for entry in written.clone() {
            let unit = region.unit_of(entry.page);
            if unit == former || !region.contains(entry.page) {
                continue;
            }
            let is_in = |entry: &PageEntry| unit.contains(&entry.page.get());
            let whole = written.clone().filter(is_in).count() as u64 == unit.end - unit.start;
            if !whole {
                self.make_from_file(region, unit.clone(), supply)?;
            }
            former = unit;
        }
        Ok(())
    }

    /// Ends a write whose pages will not come.
    pub(crate) fn abandon_write(&self, caller: &Caller, slots: Vec<Slot>) {
        caller.traffic.let_go(slots.len() as u32);
        self.arena.release(slots);
    }

    /// Takes slots; if there are not enough, cold pages leave dram first, or it refuses with
    /// [`Refusal::waits`].
    pub(super) fn take_slots(
        &self,
        purpose: Purpose,
        may_wait: bool,
        count: u32,
        slots: &mut Vec<Slot>,
    ) -> Result<(), Refusal> {
        let began = Instant::now();
        let is_over = || began.elapsed() > ROOM_TIME_MAX || self.is_stopping();
        loop {
            if self.take(purpose, count, slots) {
                self.found_room();
                self.note_pressure();
                return Ok(());
            }
            if !self.tiers.has_slower() {
                break;
            }
            if !may_wait {
                return Err(Refusal::waits());
            }
            // What the keeper moves meanwhile counts too.
            let moved = || self.counters.demoted_pages.load(Ordering::Relaxed);
            let before = moved();
            let demoted = self.demote_until(count as usize, &is_over);
            if demoted.moved > 0 || moved() != before {
                self.found_room();
            } else if let Err(busy) = self.check_journal() {
                // No page leaves where no move can be noted: that says nothing of how full memory is.
                self.found_room();
                if purpose == Purpose::Keep {
                    return Err(busy.into());
                }
                std::thread::sleep(FRUITLESS_PAUSE);
            } else if demoted.is_exhausted {
                let short_for = self.found_no_room();
                if short_for >= FULL_TIME && !self.is_moving() {
                    self.check_journal()?;
                    break;
                }
                std::thread::sleep(FRUITLESS_PAUSE);
            }
            if is_over() {
                return Err(RefusalCode::Busy.into());
            }
        }
        if self.config.promise() > self.config.memory {
            // More is promised than there is memory for, and nothing of it can leave.
            let asked = PageCount::new(count.into()).bytes();
            let free = PageCount::new((self.arena.slots() - self.arena.taken()).into()).bytes();
            return Err(Refusal::full(FullBody { asked, free }));
        }
        Err(RefusalCode::Busy.into())
    }

    /// Takes slots, unless that would leave none for pages to be compressed into, or for those that
    /// are stored to be read.
    fn take(&self, purpose: Purpose, count: u32, slots: &mut Vec<Slot>) -> bool {
        let left = match purpose {
            Purpose::Keep => self.demotion_slots() + self.reading_slots(),
            Purpose::Send => self.demotion_slots(),
        };
        if purpose == Purpose::Send || !self.headroom.is_limited() {
            return self.arena.take_leaving(left, count, slots);
        }
        // Or a page that is compressed would need memory that was never had.
        let kept = self.demotion_slots();
        if self.arena.take_kept(left, kept, count, slots) {
            return true;
        }
        let bytes = Arena::file_bytes(count + kept);
        let may = self.headroom.take(bytes, |free| {
            let free = free.get() >> 10;
            let rest = "no more memory is taken until there is more";
            self.tell("memory_short", format_args!("the control group leaves {free} KiB: {rest}"));
        });
        may && self.arena.keep_free(count + kept) && self.arena.take_leaving(left, count, slots)
    }

    /// Ends a write: the pages are in their slots. Either all of them match their checksums and
    /// those that are new are stored, or nothing changes. The slots are used up; `unused` is room
    /// for those that are not needed any more. Where the pages are now goes to `stored`.
    pub(crate) fn commit_write(
        &self,
        caller: &Caller,
        header: &Header,
        entries: &[PageEntry],
        slots: &mut Vec<Slot>,
        unused: &mut Vec<Slot>,
        stored: impl FnMut(PageEntry),
    ) -> Result<(), Refusal> {
        let result = self
            .verify(header.region, entries, slots)
            .and_then(|()| self.flip(caller, header, entries, slots, unused, stored));
        self.arena.release(slots.drain(..).chain(unused.drain(..)));
        caller.traffic.let_go(header.entries);
        result
    }

    /// Recomputes the checksums from the stored bytes.
    fn verify(
        &self,
        region: RegionId,
        entries: &[PageEntry],
        slots: &[Slot],
    ) -> Result<(), Refusal> {
        for (entry, slot) in entries.iter().zip(slots) {
            let stored = page_checksum(region, entry.page, entry.version, self.arena.bytes(slot));
            if stored != entry.checksum {
                count(&self.counters.damaged_pages, 1);
                let found = PageEntry { checksum: stored, ..*entry };
                return Err(Refusal::page(RefusalCode::WrongChecksum, found));
            }
        }
        Ok(())
    }

    /// Puts verified pages into the table. A page whose version is stored already is left as it
    /// is, so a repeated write is harmless; an older version is refused after all other pages
    /// have been stored.
    fn flip(
        &self,
        caller: &Caller,
        header: &Header,
        entries: &[PageEntry],
        slots: &mut Vec<Slot>,
        unused: &mut Vec<Slot>,
        mut stored: impl FnMut(PageEntry),
    ) -> Result<(), Refusal> {
        let mut session = self.enter(caller, header)?;
        session.check_change(header)?;
        session.check_others(caller.connection)?;
        let region = &mut session.region;
        let was_told = region.is_told(caller.connection);
        let before = region.table.stored().get();
        let mut result = Ok(());
        for (entry, slot) in entries.iter().zip(slots.drain(..)) {
            if !region.contains(entry.page) {
                // It was made smaller while the page was on its way.
                unused.push(slot);
                result = Err(Refusal::page(RefusalCode::OutOfBounds, *entry));
                continue;
            }
            match self.standing(region, entry) {
                Standing::New => {
                    stored(PageEntry { slot: slot.number(), ..*entry });
                    self.store(region, entry, slot, unused);
                }
                Standing::Stored(there) => {
                    unused.push(slot);
                    stored(there);
                }
                Standing::Old(there) => {
                    unused.push(slot);
                    result = Err(Refusal::page(RefusalCode::OldVersion, there));
                }
            }
        }
        let added = region.table.stored().get() - before;
        region.skip_news(caller.connection, was_told);
        self.note_preference(region);
        drop(session);
        self.count_written(entries.len(), added);
        result
    }

    /// Puts a page that was written into the table.
    fn store(&self, region: &mut Region, entry: &PageEntry, slot: Slot, unused: &mut Vec<Slot>) {
        let portion = Portion {
            dirty: self.dirty(region, entry.page, &slot),
            place: Place::Dram(slot),
            heat: WRITTEN_HEAT,
            absent: 0,
            generation: region.generation,
            version: entry.version,
            checksum: region.bind(entry.checksum),
        };
        if let Some(former) = region.table.put(&self.tiers, entry.page, &portion) {
            self.tiers.give_up(former, unused);
        }
        let range = PageRange { start: entry.page, count: PageCount::new(1) };
        region.note_change(range, Some(entry.version));
    }

    /// Which eighths of a page will differ from the backing file once `slot` holds it.
    fn dirty(&self, region: &Region, page: PageIndex, slot: &Slot) -> u8 {
        if !region.writes_back {
            return 0;
        }
        if region.page_bytes() as usize >= PAGE_SIZE {
            return u8::MAX;
        }
        let unit = region.page_bytes() as usize;
        let changed = |old: &[u8; PAGE_SIZE], new: &[u8; PAGE_SIZE]| {
            let units = old.chunks(unit).zip(new.chunks(unit)).enumerate();
            let eighths = unit / (PAGE_SIZE / 8);
            let mask = |at: usize| (u8::MAX >> (8 - eighths)) << (at * eighths);
            units.filter(|(_, (old, new))| old != new).fold(0, |all, (at, _)| all | mask(at))
        };
        let former = region.table.with(page, |portion| match &portion.place {
            Place::Dram(old) => {
                let differs = changed(self.arena.bytes(old), self.arena.bytes(slot));
                portion.dirty | portion.absent | differs
            }
            Place::Compressed(_) | Place::File(_) => u8::MAX,
        });
        former.unwrap_or(u8::MAX)
    }

    fn count_written(&self, pages: usize, added: u64) {
        self.pages.fetch_add(added, Ordering::Relaxed);
        count(&self.counters.writes, 1);
        count(&self.counters.pages_written, pages);
    }

    /// How a page that is to be written stands to what is stored.
    fn standing(&self, region: &Region, entry: &PageEntry) -> Standing {
        let there = region.table.with(entry.page, |portion| {
            (portion.version >= entry.version).then(|| self.entry(region, entry.page, portion))
        });
        match there.flatten() {
            Some(there) if there.version == entry.version && there.checksum == entry.checksum => {
                Standing::Stored(there)
            }
            Some(there) => Standing::Old(there),
            None => Standing::New,
        }
    }

    /// Tops the session's slots up to `wanted` and lists all of them.
    pub(crate) fn assign_slots(
        &self,
        caller: &Caller,
        header: &Header,
        wanted: usize,
        slots: &mut Vec<Slot>,
        mut list: impl FnMut(u32),
    ) -> Result<(), Refusal> {
        if !caller.shares_arena {
            return Err(RefusalCode::Unsupported.into());
        }
        let mut session = self.enter(caller, header)?;
        let missing = wanted.min(SLOTS_ASSIGNED_MAX).saturating_sub(session.assigned.len());
        self.assign(&mut session, missing, slots, |_| ());
        session.assigned.keys().for_each(|slot| list(*slot));
        drop(session);
        self.note_pressure();
        Ok(())
    }

    /// Gives the session that many fresh slots, or none if the arena has not as many.
    fn assign(
        &self,
        session: &mut Session,
        count: usize,
        slots: &mut Vec<Slot>,
        mut list: impl FnMut(u32),
    ) {
        let count = u32::try_from(count).expect("at most SLOTS_ASSIGNED_MAX");
        if self.take(Purpose::Keep, count, slots) {
            for slot in slots.drain(..) {
                list(slot.number());
                session.assigned.insert(slot.number(), slot);
            }
        }
    }

    /// Stores pages that the client has written into slots of its session: either all that are
    /// new match their checksums and are stored, or nothing changes. The session gets as many
    /// fresh slots for those used up, which go to `list`.
    ///
    /// The session stays locked throughout: it has one writer, who waits for this.
    pub(crate) fn commit_slots(
        &self,
        caller: &Caller,
        header: &Header,
        entries: impl ExactSizeIterator<Item = PageEntry> + Clone,
        slots: &mut Vec<Slot>,
        list: impl FnMut(u32),
    ) -> Result<(), Refusal> {
        check_versions(entries.clone().map(|entry| (entry.page, entry.version)))?;
        self.initialise_around(caller, header, &entries)?;
        let mut session = self.enter(caller, header)?;
        session.check_change(header)?;
        session.check_others(caller.connection)?;
        let session = &mut *session;
        let mut content = [0; PAGE_SIZE];
        for entry in entries.clone() {
            self.check_commit(session, &entry, &mut content)?;
        }
        let was_told = session.region.is_told(caller.connection);
        let before = session.region.table.stored().get();
        let (mut used, mut result, pages) = (0, Ok(()), entries.len());
        for entry in entries {
            match self.standing(&session.region, &entry) {
                Standing::Stored(_) => {}
                Standing::Old(there) => {
                    result = Err(Refusal::page(RefusalCode::OldVersion, there));
                }
                Standing::New => {
                    let Some(slot) = session.assigned.remove(&entry.slot) else {
                        // Named before for another page.
                        result = Err(Refusal::page(RefusalCode::NoSlot, entry));
                        continue;
                    };
                    self.store(&mut session.region, &entry, slot, slots);
                    used += 1;
                }
            }
        }
        let added = session.region.table.stored().get() - before;
        session.region.skip_news(caller.connection, was_told);
        self.note_preference(&session.region);
        self.count_written(pages, added);
        self.arena.release(slots.drain(..));
        self.assign(session, used, slots, list);
        self.note_pressure();
        result
    }

    /// Whether a page may be committed: it lies in the region and, unless it is stored already,
    /// in a slot of the session whose bytes match the checksum. They are copied to `content` to be
    /// looked at.
    fn check_commit(
        &self,
        session: &Session,
        entry: &PageEntry,
        content: &mut [u8; PAGE_SIZE],
    ) -> Result<(), Refusal> {
        if !session.region.contains(entry.page) {
            return Err(Refusal::page(RefusalCode::OutOfBounds, *entry));
        }
        if !matches!(self.standing(&session.region, entry), Standing::New) {
            return Ok(());
        }
        let Some(slot) = session.assigned.get(&entry.slot) else {
            return Err(Refusal::page(RefusalCode::NoSlot, *entry));
        };
        self.arena.copy_out(slot, content);
        let found = page_checksum(session.region.id, entry.page, entry.version, content);
        if found != entry.checksum {
            count(&self.counters.damaged_pages, 1);
            let found = PageEntry { checksum: found, ..*entry };
            return Err(Refusal::page(RefusalCode::WrongChecksum, found));
        }
        Ok(())
    }

    /// Forgets pages: they hold what the region's source says. Those that are pinned stay pinned, if they
    /// are forgotten: they are kept in dram once they are written again, or made.
    pub(crate) fn free(
        &self,
        caller: &Caller,
        header: &Header,
        ranges: impl Iterator<Item = RangeEntry> + Clone,
        free: Free,
        slots: &mut Vec<Slot>,
    ) -> Result<Progress, Refusal> {
        let mut session = self.enter(caller, header)?;
        if ranges.clone().next().is_none() {
            // Asks whether the caller still is who may change the region.
            return Ok(Progress { changed: PageCount::new(0), next: None });
        }
        session.check_change(header)?;
        match header.action {
            Action::Invalidate => session.check_ranges(ranges.clone())?,
            // Pagers free the pages of 4 KiB that they write.
            _ => session.check_bounds(ranges.clone())?,
        }
        session.check_others(caller.connection)?;
        let is_pinned = |range: RangeEntry| session.region.pins.overlaps(range.0);
        if !free.also_pinned && ranges.clone().any(is_pinned) {
            let name = &session.name;
            self.warn("free_refused", format_args!("{name} frees pages that are pinned"));
            return Err(RefusalCode::Pinned.into());
        }
        if let Some(file) = session.region.written_file()
            && ranges.clone().any(|range| file.is_writing(range.0))
        {
            return Err(RefusalCode::Busy.into());
        }
        let was_told = session.region.is_told(caller.connection);
        let before = session.region.table.stored().get();
        for range in ranges {
            session.region.table.remove(&self.tiers, range.0, slots);
            session.region.note_forgotten(range.0);
            session.region.note_change(range.0, None);
        }
        session.region.skip_news(caller.connection, was_told);
        let removed = before - session.region.table.stored().get();
        if removed == 0 {
            // A program's pager gives slots back that it never came to fill: no news to anybody. Whoever
            // frees twice what has a name is mistaken.
            if session.is_resident {
                let name = &session.name;
                self.warn("free_refused", format_args!("{name} frees pages that are free already"));
            }
            return Err(RefusalCode::AlreadyFree.into());
        }
        drop(session);
        self.pages.fetch_sub(removed, Ordering::Relaxed);
        self.arena.release(slots.drain(..));
        self.surplus.store(true, Ordering::Relaxed);
        Ok(Progress { changed: PageCount::new(removed), next: None })
    }

    /// What a client is told of a page.
    pub(super) fn entry(&self, region: &Region, page: PageIndex, portion: &Portion) -> PageEntry {
        let slot = match &portion.place {
            Place::Dram(slot) if self.config.share_arena && portion.absent == 0 => slot.number(),
            Place::Dram(_) | Place::Compressed(_) | Place::File(_) => self.no_slot(),
        };
        let checksum = region.bind(portion.checksum);
        PageEntry { page, version: portion.version, checksum, slot }
    }

    /// The slot of a page that has none that stays.
    const fn no_slot(&self) -> u32 {
        if self.config.share_arena { NO_SLOT } else { 0 }
    }
}

/// A page was asked for.
fn warm(heat: &mut u8) {
    *heat = heat.saturating_add(1).min(HEAT_MAX);
}

/// Whether the versions of one message are such as a change may have: 0 is that of what was never written, and a
/// page that is named again must be newer there, or one of both would be taken for the other.
pub(super) fn check_versions(
    changed: impl Iterator<Item = (PageIndex, Version)> + Clone,
) -> Result<(), RefusalCode> {
    if changed.clone().any(|(_, version)| version == Version::new(0)) {
        return Err(RefusalCode::Malformed);
    }
    // As nearly all messages are.
    if changed.clone().zip(changed.clone().skip(1)).all(|((page, _), (next, _))| page < next) {
        return Ok(());
    }
    let mut newest = HashMap::new();
    for (page, version) in changed {
        if newest.insert(page, version).is_some_and(|former| former >= version) {
            return Err(RefusalCode::Malformed);
        }
    }
    Ok(())
}
