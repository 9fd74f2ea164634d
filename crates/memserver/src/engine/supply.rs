//! What takes time: room while memory is full, and pages from disks. It is supplied while no lock
//! is held; then the request looks again.
//!
//! ```text
//! a step, under the session's lock ----> done
//!      ^        |
//!      |        v what it needs
//!      +----- supply, with no lock held, on a thread that may wait
//! ```
//!
//! What was supplied may not fit any more when the step is taken again: a page may have moved, or
//! been made by somebody else. Then it is given back at the end.

use std::io::IoSliceMut;
use std::sync::Arc;
use std::{iter, slice};

use farmem_region::{Checksum, PAGE_SIZE, PageIndex, RegionId, Version};
use farmem_vmem::Slot;
use farmem_wire::{PageEntry, RefusalCode};

use super::pages::SPARE_SLOTS;
use super::parts::{WHOLE, runs};
use super::{Engine, Refusal};
use crate::backing::BackingFile;
use crate::neighbour::Claim;
use crate::region::{Region, Source};
use crate::table::Portion;
use crate::tiers::{LoadError, Place};

/// Why a step is not taken.
#[derive(Debug)]
pub(super) enum Stop {
    Needs(Need),
    Refused(Refusal),
}

/// What a step lacks.
#[derive(Debug)]
pub(super) enum Need {
    /// Slots for pages that are made, or copied from the compressed tier.
    Slots,
    /// A page that lies in a file.
    Page(Distant),
    /// Pages as the region's file has them.
    Source(FromSource),
}

/// A page that lies in a file, as it must be.
#[derive(Debug)]
pub(super) struct Distant {
    page: PageIndex,
    version: Version,
    checksum: Checksum,
    place: Place,
}

/// Absent pages of a region that is made from a file.
#[derive(Debug)]
pub(super) struct FromSource {
    file: Arc<BackingFile>,
    region: RegionId,
    pages: Vec<u64>,
    /// What is wanted of them.
    eighths: u8,
    /// As the region's: what was read before pages were removed may be out of date.
    removals: u64,
}

impl FromSource {
    /// Parts of one page.
    pub(super) fn parts(
        file: &Arc<BackingFile>,
        region: &Region,
        page: PageIndex,
        eighths: u8,
    ) -> Self {
        let (file, pages) = (Arc::clone(file), vec![page.get()]);
        let (region, removals) = (region.id, region.removals);
        Self { file, region, pages, eighths, removals }
    }
}

/// What slots are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Purpose {
    /// Pages that stay in them.
    #[default]
    Keep,
    /// Copies that are sent: the slots are free again soon. Some are left for this, so that what is
    /// stored can be read even when nothing more can be stored.
    Send,
}

/// What one request has been supplied with and not used yet.
#[derive(Debug, Default)]
pub(super) struct Supply {
    pub(super) purpose: Purpose,
    /// Empty ones.
    spare: Vec<Slot>,
    /// Tokens that nobody needs any more. Others may hold the same slots.
    unused: Vec<Slot>,
    fetched: Vec<(Place, Slot)>,
    made: Vec<Made>,
}

/// A page as the region's file has it, or parts of it and zeros.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) page: u64,
    /// What there is of it.
    pub(super) eighths: u8,
    removals: u64,
    pub(super) slot: Slot,
    /// Held until the page is stored, or done without.
    _claim: Option<Arc<Claim>>,
}

impl From<Need> for Stop {
    fn from(need: Need) -> Self {
        Self::Needs(need)
    }
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<RefusalCode> for Stop {
    fn from(code: RefusalCode) -> Self {
        Self::Refused(code.into())
    }
}

impl Need {
    /// Slots that it takes.
    pub(super) fn slots(&self) -> u32 {
        match self {
            Self::Slots => SPARE_SLOTS,
            Self::Page(_) => 1,
            // At most a unit's, or a leaf's.
            Self::Source(source) => source.pages.len() as u32,
        }
    }
}

impl Need {
    /// Pages that are made for it.
    pub(super) fn made(&self) -> u32 {
        match self {
            Self::Source(_) => self.slots(),
            Self::Slots | Self::Page(_) => 0,
        }
    }
}

impl Supply {
    /// Nothing yet.
    pub(super) fn of(purpose: Purpose) -> Self {
        Self { purpose, ..Self::default() }
    }

    /// An empty slot.
    pub(super) fn slot(&mut self) -> Result<Slot, Stop> {
        self.spare.pop().ok_or(Stop::Needs(Need::Slots))
    }

    /// What was made of a page, if it has all that is missing.
    pub(super) fn take_made(
        &mut self,
        page: PageIndex,
        removals: u64,
        missing: u8,
    ) -> Option<Made> {
        let is_it = |made: &Made| {
            made.page == page.get()
                && made.removals == removals
                && made.eighths & missing == missing
        };
        let at = self.made.iter().position(is_it)?;
        Some(self.made.swap_remove(at))
    }

    /// It is taken later.
    pub(super) fn put_back(&mut self, made: Made) {
        self.made.push(made);
    }

    /// Gives up pages that were made.
    fn do_without(&mut self, which: impl Fn(&Made) -> bool) {
        let (gone, kept) = std::mem::take(&mut self.made).into_iter().partition(which);
        self.made = kept;
        let gone: Vec<Made> = gone;
        self.spare.extend(gone.into_iter().map(|made| made.slot));
    }

    /// A slot that is not needed any more.
    pub(super) fn keep(&mut self, slot: Slot) {
        self.spare.push(slot);
    }

    /// Where tokens are collected that are not needed any more.
    pub(super) const fn unused(&mut self) -> &mut Vec<Slot> {
        &mut self.unused
    }
}

impl Engine {
    /// A copy of a stored page, wherever it lies.
    pub(super) fn copy_in(
        &self,
        page: PageIndex,
        portion: &Portion,
        supply: &mut Supply,
    ) -> Result<Slot, Stop> {
        let place = &portion.place;
        if let Place::File(_) = place {
            let Some(at) = supply.fetched.iter().position(|(there, _)| there.is(place)) else {
                return Err(Need::Page(self.distant(page, portion)).into());
            };
            let (token, slot) = supply.fetched.swap_remove(at);
            self.tiers.give_up(token, &mut supply.spare);
            return Ok(slot);
        }
        let mut slot = supply.slot()?;
        if let Place::Dram(from) = place {
            self.arena.copy_out(from, self.arena.bytes_mut(&mut slot));
            return Ok(slot);
        }
        let unpacked = self.tiers.unpack(place, &mut slot);
        match unpacked.and_then(|()| self.check(page, portion.version, portion.checksum, &slot)) {
            Ok(()) => Ok(slot),
            Err(error) => {
                supply.keep(slot);
                Err(self.page_lost(page, &error).into())
            }
        }
    }

    /// Pages of a range that are absent are made as the region's file has them.
    pub(super) fn make_from_file(
        &self,
        region: &mut Region,
        pages: std::ops::Range<u64>,
        supply: &mut Supply,
    ) -> Result<(), Stop> {
        let Some(source) = from_source(region, pages) else {
            return Ok(());
        };
        self.check_journal()?;
        let is_made = |page: &u64| {
            let is_it = |made: &Made| {
                (made.page, made.removals, made.eighths) == (*page, source.removals, WHOLE)
            };
            supply.made.iter().any(is_it)
        };
        if !source.pages.iter().all(is_made) {
            return Err(Need::Source(source).into());
        }
        for page in &source.pages {
            if let Some(made) = supply.take_made(PageIndex::new(*page), source.removals, WHOLE) {
                self.add_made(region, made, supply)?;
            }
        }
        Ok(())
    }

    /// What the following pages of a request will need too, as many as are supplied at once.
    pub(super) fn with_next(
        &self,
        region: &Region,
        first: Need,
        pages: impl Iterator<Item = PageIndex>,
    ) -> Vec<Need> {
        let (known, mut made_to) = match &first {
            Need::Slots => (None, 0),
            Need::Page(distant) => (Some(distant.page), 0),
            Need::Source(source) => (None, source.pages.last().map_or(0, |last| last + 1)),
        };
        let (mut slots, mut needs) = (first.slots(), vec![first]);
        for page in pages.filter(|page| Some(*page) != known) {
            if slots >= SPARE_SLOTS {
                break;
            }
            let distant = region.table.with(page, |portion| {
                matches!(portion.place, Place::File(_)).then(|| self.distant(page, portion))
            });
            let need = match distant {
                Some(distant) => distant.map(Need::Page),
                None if page.get() < made_to => None,
                None => from_source(region, region.unit_of(page)).map(Need::Source),
            };
            if let Some(Need::Source(source)) = &need {
                made_to = source.pages.last().map_or(made_to, |last| last + 1);
            }
            slots += need.as_ref().map_or(0, Need::slots);
            needs.extend(need);
        }
        needs
    }

    /// Gets what steps lack. The caller holds no lock. Refuses with [`Refusal::waits`] if that takes
    /// time that the caller does not have.
    pub(super) fn supply(
        &self,
        may_wait: bool,
        needs: Vec<Need>,
        supply: &mut Supply,
    ) -> Result<(), Refusal> {
        let slots = needs.iter().map(Need::slots).sum();
        let mut result = if may_wait || needs.iter().all(|need| matches!(need, Need::Slots)) {
            let made = needs.iter().any(|need| matches!(need, Need::Source(_)));
            let purpose = if made { Purpose::Keep } else { supply.purpose };
            self.take_slots(purpose, may_wait, slots, &mut supply.spare)
        } else {
            Err(Refusal::waits())
        };
        let mut distant = Vec::new();
        for need in needs {
            match need {
                Need::Slots => {}
                Need::Page(page) => distant.push(page),
                Need::Source(source) => {
                    result = result.and_then(|()| self.read_source(source, supply));
                }
            }
        }
        if result.is_ok() {
            return self.fetch_distant(distant, supply);
        }
        distant.into_iter().for_each(|page| self.tiers.give_up(page.place, &mut supply.spare));
        result
    }

    /// Does without.
    pub(super) fn forgo(&self, need: Need, supply: &mut Supply) {
        if let Need::Page(distant) = need {
            self.tiers.give_up(distant.place, &mut supply.spare);
        }
    }

    /// Gives back what was not used.
    pub(super) fn end_supply(&self, supply: Supply) {
        let Supply { mut spare, unused, fetched, made, purpose: _ } = supply;
        spare.extend(unused);
        for (place, slot) in fetched {
            self.tiers.give_up(place, &mut spare);
            spare.push(slot);
        }
        spare.extend(made.into_iter().map(|made| made.slot));
        if !spare.is_empty() {
            self.arena.release(spare);
        }
    }

    fn distant(&self, page: PageIndex, portion: &Portion) -> Distant {
        let Portion { version, checksum, .. } = *portion;
        Distant { page, version, checksum, place: self.tiers.share(&portion.place) }
    }

    fn read_source(&self, source: FromSource, supply: &mut Supply) -> Result<(), Refusal> {
        let FromSource { file, region, pages, eighths, removals } = source;
        let mut claim = None;
        if let Some(neighbour) = file.neighbour() {
            supply.do_without(|made| pages.contains(&made.page));
            claim = neighbour.claim(region, &pages).map(Arc::new);
            if claim.is_none() {
                // Somebody else brings them: they are looked for again.
                supply.do_without(|_| true);
                neighbour.wait(region, &pages);
                return Ok(());
            }
        }
        let mut slots = supply.spare.split_off(supply.spare.len() - pages.len());
        let read = match eighths {
            WHOLE => self.read_whole(&file, &pages, &mut slots),
            _ => self.read_eighths(&file, pages[0], eighths, &mut slots[0]),
        };
        if let Err(error) = read {
            self.file_failed("read", &file, &error);
            supply.spare.append(&mut slots);
            return Err(file.refusal(&error).into());
        }
        for (page, slot) in pages.into_iter().zip(slots) {
            supply.made.push(Made { page, eighths, removals, slot, _claim: claim.clone() });
        }
        Ok(())
    }

    fn read_whole(
        &self,
        file: &BackingFile,
        pages: &[u64],
        slots: &mut [Slot],
    ) -> std::io::Result<()> {
        let mut at = 0;
        for run in pages.chunk_by(|page, next| *next == page + 1) {
            let mut slices = Vec::new();
            self.arena.gather_mut(&mut slots[at..at + run.len()], &mut slices);
            file.read(run[0] * PAGE_SIZE as u64, &mut slices)?;
            at += run.len();
        }
        Ok(())
    }

    /// Reads parts of a page; the rest becomes zeros.
    fn read_eighths(
        &self,
        file: &BackingFile,
        page: u64,
        eighths: u8,
        slot: &mut Slot,
    ) -> std::io::Result<()> {
        let content = self.arena.bytes_mut(slot);
        content.fill(0);
        for bytes in runs(eighths) {
            let start = page * PAGE_SIZE as u64 + bytes.start as u64;
            file.read(start, &mut [IoSliceMut::new(&mut content[bytes])])?;
        }
        Ok(())
    }

    fn fetch_distant(&self, mut pages: Vec<Distant>, supply: &mut Supply) -> Result<(), Refusal> {
        if pages.is_empty() {
            return Ok(());
        }
        pages.sort_unstable_by_key(|page| page.place.order());
        let mut slots = supply.spare.split_off(supply.spare.len() - pages.len());
        let read = self.tiers.fetch(pages.iter().map(|page| &page.place), &mut slots);
        // Whoever reads many is told of the one that is lost, and only of that.
        let mut result = read.or_else(|_| self.fetch_one_by_one(&pages, &mut slots));
        for (distant, slot) in pages.into_iter().zip(slots) {
            let Distant { page, version, checksum, place } = distant;
            if result.is_ok() {
                let check = self.check(page, version, checksum, &slot);
                result = check.map_err(|error| self.page_lost(page, &error));
            }
            supply.fetched.push((place, slot));
        }
        if result.is_err() {
            // None of them is to be believed.
            for (place, slot) in supply.fetched.drain(..) {
                supply.spare.push(slot);
                self.tiers.give_up(place, &mut supply.spare);
            }
        }
        result
    }

    fn fetch_one_by_one(&self, pages: &[Distant], slots: &mut [Slot]) -> Result<(), Refusal> {
        for (distant, slot) in pages.iter().zip(slots) {
            let read = self.tiers.fetch(iter::once(&distant.place), slice::from_mut(slot));
            read.map_err(|error| self.page_lost(distant.page, &error))?;
        }
        Ok(())
    }

    /// Whether what came back from a slower tier is what went there.
    fn check(
        &self,
        page: PageIndex,
        version: Version,
        checksum: Checksum,
        slot: &Slot,
    ) -> Result<(), LoadError> {
        let found = Region::neutral(page, version, self.arena.bytes(slot));
        if found == checksum { Ok(()) } else { Err(LoadError::Damaged) }
    }

    pub(super) fn page_lost(&self, page: PageIndex, error: &LoadError) -> Refusal {
        crate::counters::count(&self.counters.tier_failures, 1);
        self.tell("page_lost", format_args!("lost a page in a slower tier: {error}"));
        Refusal::page(RefusalCode::TierFailed, PageEntry { page, ..PageEntry::default() })
    }
}

/// Those of these pages that are absent, as a whole or in part, if there are any and the region is made
/// from a file.
pub(super) fn from_source(region: &Region, pages: std::ops::Range<u64>) -> Option<FromSource> {
    let Source::File(file) = &region.source else {
        return None;
    };
    let is_whole = |portion: &mut Portion| portion.absent == 0;
    let is_absent = |page: &u64| region.table.with(PageIndex::new(*page), is_whole) != Some(true);
    let pages: Vec<u64> = pages.filter(is_absent).collect();
    let (file, region, removals) = (Arc::clone(file), region.id, region.removals);
    let eighths = WHOLE;
    (!pages.is_empty()).then_some(FromSource { file, region, pages, eighths, removals })
}
