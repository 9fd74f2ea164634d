//! Parts of pages: in a region with a page size of 512 bytes or 1 KiB such a page is what is read,
//! written, forgotten, made from the file and dirty by itself.
//!
//! ```text
//! one page of 4 KiB of the table, in one slot:  | 8 eighths of 512 bytes |
//! dirty, a bit for each: it differs from the file
//! absent, a bit for each: it is as the file has it, and was not read yet; zeros in the slot
//! ```
//!
//! What is not absent of the 4 KiB has one version, greater with each write of any part, and one
//! checksum, with zeros for what is absent. Who wants all of them has the rest read in before. They
//! are in part absent only where a file is the source: what has another source is there as a whole.

use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use farmem_region::{Checksum, PAGE_SIZE, PageCount, PageIndex, PageRange, Version};
use farmem_vmem::Slot;
use farmem_wire::{Header, PageEntry, PartEntry, RefusalCode, part_checksum};

use super::pages::check_versions;
use super::supply::{FromSource, Made, Need, Purpose, Stop, Supply};
use super::{Caller, Engine, Refusal};
use crate::counters::count;
use crate::region::{Region, Source};
use crate::session::Session;
use crate::table::Portion;
use crate::tiers::{LoadError, Place};

/// Bytes of what one bit of `Portion::dirty` and `Portion::absent` stands for.
const EIGHTH: usize = PAGE_SIZE / 8;
/// All of a page.
pub(super) const WHOLE: u8 = u8::MAX;

/// What becomes of a part.
#[derive(Clone, Copy)]
enum Change<'a> {
    Write(&'a [u8]),
    /// It is as the source has it.
    Forget,
}

/// What has become of it.
enum Outcome {
    Changed,
    /// It was so before.
    Same,
    /// What is stored is newer, or something else in that version.
    Old(PageEntry),
}

/// What is known of a stored page beside where it lies.
#[derive(Clone, Copy)]
struct State {
    dirty: u8,
    heat: u8,
    absent: u8,
    generation: u16,
    version: Version,
    checksum: Checksum,
}

impl State {
    const fn of(portion: &Portion) -> Self {
        let Portion { dirty, heat, absent, generation, version, checksum, .. } = *portion;
        Self { dirty, heat, absent, generation, version, checksum }
    }
}

impl Engine {
    /// Looks parts of pages up and shows each with its bytes, in their order.
    pub(crate) fn read_parts(
        &self,
        caller: &Caller,
        header: &Header,
        wanted: &[PartEntry],
        mut found: impl FnMut(PartEntry, &[u8]),
    ) -> Result<(), Refusal> {
        let mut supply = Supply::of(Purpose::Send);
        let mut left = wanted;
        let result = self.in_steps(caller, header, wanted, &mut supply, |session, supply| {
            while let Some((part, rest)) = left.split_first() {
                self.look_at_part(session, part, supply, &mut found)?;
                left = rest;
            }
            Ok(())
        });
        self.end_supply(supply);
        result?;
        count(&self.counters.reads, 1);
        count(&self.counters.pages_read, wanted.len());
        Ok(())
    }

    /// Writes parts of pages: either all of them match their checksums, or nothing changes. As in
    /// other writes a part that is stored already in its version is left as it is, and an older
    /// version is refused after all others have been stored.
    pub(crate) fn write_parts(
        &self,
        caller: &Caller,
        header: &Header,
        parts: &[PartEntry],
        mut bytes: &[u8],
    ) -> Result<(), Refusal> {
        let mut changes = Vec::with_capacity(parts.len());
        for part in parts {
            let (content, rest) =
                bytes.split_at_checked(part.bytes.into()).ok_or(RefusalCode::Malformed)?;
            let checksum =
                part_checksum(header.region, part.page, part.version, part.first, content);
            if checksum != part.checksum {
                count(&self.counters.damaged_pages, 1);
                let (page, version) = (part.page, part.version);
                let found = PageEntry { page, version, checksum, slot: 0 };
                return Err(Refusal::page(RefusalCode::WrongChecksum, found));
            }
            changes.push((*part, Change::Write(content)));
            bytes = rest;
        }
        if !bytes.is_empty() {
            return Err(RefusalCode::Malformed.into());
        }
        self.change_parts(caller, header, parts, &changes)?;
        count(&self.counters.writes, 1);
        count(&self.counters.pages_written, parts.len());
        Ok(())
    }

    /// Forgets parts of pages: they hold what the region's source says.
    pub(crate) fn free_parts(
        &self,
        caller: &Caller,
        header: &Header,
        parts: &[PartEntry],
    ) -> Result<(), Refusal> {
        let changes: Vec<_> = parts.iter().map(|part| (*part, Change::Forget)).collect();
        if self.change_parts(caller, header, parts, &changes)? == 0 {
            self.warn("free_refused", format_args!("parts are freed that are free already"));
            return Err(RefusalCode::AlreadyFree.into());
        }
        self.surplus.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Takes a step under the session's lock, again and again until it lacks nothing.
    fn in_steps(
        &self,
        caller: &Caller,
        header: &Header,
        parts: &[PartEntry],
        supply: &mut Supply,
        mut step: impl FnMut(&mut Session, &mut Supply) -> Result<(), Stop>,
    ) -> Result<(), Refusal> {
        loop {
            let mut session = self.enter_parts(caller, header, parts)?;
            let need = match step(&mut session, supply) {
                Ok(()) => return Ok(()),
                Err(Stop::Refused(refusal)) => return Err(refusal),
                Err(Stop::Needs(need)) => need,
            };
            drop(session);
            self.supply(caller.may_wait, vec![need], supply)?;
        }
    }

    /// The caller's session, if all parts lie in its region and are pages of its page size.
    fn enter_parts<'a>(
        &self,
        caller: &'a Caller,
        header: &Header,
        parts: &[PartEntry],
    ) -> Result<MutexGuard<'a, Session>, Refusal> {
        let session = self.enter(caller, header)?;
        session.check_region(header)?;
        let region = &session.region;
        let unit = u16::try_from(region.page_bytes()).unwrap_or(u16::MAX);
        if usize::from(unit) >= PAGE_SIZE || !parts.iter().all(|part| part.is_of(unit)) {
            return Err(RefusalCode::Malformed.into());
        }
        if let Some(outside) = parts.iter().find(|part| !region.contains(part.page)) {
            return Err(Refusal::page(RefusalCode::OutOfBounds, about(outside.page)));
        }
        Ok(session)
    }

    fn look_at_part(
        &self,
        session: &mut Session,
        part: &PartEntry,
        supply: &mut Supply,
        found: &mut impl FnMut(PartEntry, &[u8]),
    ) -> Result<(), Stop> {
        let is_kept = self.keeps_working_set(session);
        let (region, page) = (&mut session.region, part.page);
        let is_stored = region.table.with(page, |_| ()).is_some();
        let mut content = [0; PAGE_SIZE];
        let version = match &region.source {
            Source::Fill(byte) if !is_stored => {
                content.fill(*byte);
                Version::new(0)
            }
            _ => {
                self.make_parts(region, page, eighths(part), supply)?;
                self.copy_checked(region, page, supply, &mut content)?
            }
        };
        if ![Version::new(0), version].contains(&part.version) {
            let there = PageEntry { version, ..about(page) };
            return Err(Refusal::page(RefusalCode::WrongVersionOfPage, there).into());
        }
        let bytes = &content[part.range()];
        let checksum = part_checksum(region.id, page, version, part.first, bytes);
        found(PartEntry { version, checksum, ..*part }, bytes);
        if is_kept {
            self.note_read(region, page);
        }
        Ok(())
    }

    /// Copies what is stored of a page, and compares it with its checksum; returns its version.
    fn copy_checked(
        &self,
        region: &mut Region,
        page: PageIndex,
        supply: &mut Supply,
        content: &mut [u8; PAGE_SIZE],
    ) -> Result<Version, Stop> {
        let found = self.find_stored(region, about(page), supply)?;
        let (_, slot) = found.ok_or(RefusalCode::NoPage)?;
        self.arena.copy_out(&slot, content);
        supply.unused().push(slot);
        let state = region.table.with(page, |portion| State::of(portion));
        let state = state.ok_or(RefusalCode::NoPage)?;
        self.check_content(page, state, content)?;
        Ok(state.version)
    }

    fn check_content(
        &self,
        page: PageIndex,
        state: State,
        content: &[u8; PAGE_SIZE],
    ) -> Result<(), Stop> {
        if Region::neutral(page, state.version, content) == state.checksum {
            return Ok(());
        }
        Err(self.page_lost(page, &LoadError::Damaged).into())
    }

    /// Sees to it that parts of a page are there.
    fn make_parts(
        &self,
        region: &mut Region,
        page: PageIndex,
        wanted: u8,
        supply: &mut Supply,
    ) -> Result<(), Stop> {
        let absent = region.table.with(page, |portion| portion.absent);
        let missing = absent.unwrap_or(WHOLE) & wanted;
        if missing == 0 {
            return Ok(());
        }
        let Source::File(file) = &region.source else {
            return Err(Refusal::page(RefusalCode::NoPage, about(page)).into());
        };
        self.check_journal()?;
        match supply.take_made(page, region.removals, missing) {
            Some(made) => self.add_made(region, made, supply),
            None => Err(Need::Source(FromSource::parts(file, region, page, missing)).into()),
        }
    }

    /// Puts what was made of a page from the source into the table. What is stored of it stays as it
    /// is.
    pub(super) fn add_made(
        &self,
        region: &mut Region,
        made: Made,
        supply: &mut Supply,
    ) -> Result<(), Stop> {
        let page = PageIndex::new(made.page);
        let Some(state) = region.table.with(page, |portion| State::of(portion)) else {
            self.put_made(region, page, made.slot, !made.eighths);
            return Ok(());
        };
        let added = made.eighths & state.absent;
        let mut merged = match self.copy_former(region, page, state, supply) {
            Ok(merged) => merged,
            Err(stop) => {
                // It is taken again once that is there.
                supply.put_back(made);
                return Err(stop);
            }
        };
        let (to, from) = (self.arena.bytes_mut(&mut merged), self.arena.bytes(&made.slot));
        for bytes in runs(added) {
            to[bytes.clone()].copy_from_slice(&from[bytes]);
        }
        supply.keep(made.slot);
        let state = State { absent: state.absent & !added, ..state };
        self.put_parts(region, page, merged, state, supply);
        Ok(())
    }

    /// A slot with what is stored of a page, to be changed and put in its place: who is being sent the
    /// former one is not disturbed.
    fn copy_former(
        &self,
        region: &mut Region,
        page: PageIndex,
        state: State,
        supply: &mut Supply,
    ) -> Result<Slot, Stop> {
        supply.purpose = Purpose::Keep;
        let copied = region.table.with(page, |portion| self.copy_in(page, portion, supply));
        let slot = copied.unwrap_or(Err(RefusalCode::NoPage.into()))?;
        match self.check_content(page, state, self.arena.bytes(&slot)) {
            Ok(()) => Ok(slot),
            Err(stop) => {
                supply.keep(slot);
                Err(stop)
            }
        }
    }

    /// Stores a page as a slot has it now.
    fn put_parts(
        &self,
        region: &mut Region,
        page: PageIndex,
        slot: Slot,
        state: State,
        supply: &mut Supply,
    ) {
        let State { dirty, heat, absent, generation, version, .. } = state;
        let checksum = Region::neutral(page, version, self.arena.bytes(&slot));
        let place = Place::Dram(slot);
        let portion = Portion { place, dirty, heat, absent, generation, version, checksum };
        match region.table.put(&self.tiers, page, &portion) {
            Some(former) => self.tiers.give_up(former, supply.unused()),
            None => {
                self.pages.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.note_preference(region);
    }

    /// Changes parts in their order; returns how many were changed.
    fn change_parts(
        &self,
        caller: &Caller,
        header: &Header,
        parts: &[PartEntry],
        changes: &[(PartEntry, Change<'_>)],
    ) -> Result<u64, Refusal> {
        check_versions(parts.iter().map(|part| (part.page, part.version)))?;
        self.check_journal()?;
        let (mut left, mut changed, mut old) = (changes, 0, None);
        let mut supply = Supply::default();
        let result = self.in_steps(caller, header, parts, &mut supply, |session, supply| {
            session.check_change(header)?;
            session.check_others(caller.connection)?;
            let region = &mut session.region;
            let was_told = region.is_told(caller.connection);
            let mut result = Ok(());
            while let Some(((part, change), rest)) = left.split_first() {
                match self.change_part(region, part, *change, supply) {
                    Ok(Outcome::Changed) => changed += 1,
                    Ok(Outcome::Same) => {}
                    Ok(Outcome::Old(there)) => old = Some(there),
                    Err(stop) => {
                        result = Err(stop);
                        break;
                    }
                }
                left = rest;
            }
            region.skip_news(caller.connection, was_told);
            result
        });
        self.end_supply(supply);
        result?;
        match old {
            Some(there) => Err(Refusal::page(RefusalCode::OldVersion, there)),
            None => Ok(changed),
        }
    }

    fn change_part(
        &self,
        region: &mut Region,
        part: &PartEntry,
        change: Change<'_>,
        supply: &mut Supply,
    ) -> Result<Outcome, Stop> {
        let state = region.table.with(part.page, |portion| State::of(portion));
        if let Some(state) = state.filter(|state| state.version >= part.version) {
            let is_same =
                state.version == part.version && self.is_as(region, part, state, change, supply)?;
            let there = PageEntry { version: state.version, ..about(part.page) };
            return Ok(if is_same { Outcome::Same } else { Outcome::Old(there) });
        }
        match change {
            Change::Write(bytes) => self.write_part(region, part, state, bytes, supply),
            Change::Forget => self.forget_part(region, part, state, supply),
        }
    }

    /// Whether a part is as it is to be already, because the request is repeated.
    fn is_as(
        &self,
        region: &mut Region,
        part: &PartEntry,
        state: State,
        change: Change<'_>,
        supply: &mut Supply,
    ) -> Result<bool, Stop> {
        let absent = state.absent & eighths(part);
        if absent != 0 {
            return Ok(matches!(change, Change::Forget) && absent == eighths(part));
        }
        let mut content = [0; PAGE_SIZE];
        self.copy_checked(region, part.page, supply, &mut content)?;
        let content = &content[part.range()];
        Ok(match (change, &region.source) {
            (Change::Write(bytes), _) => content == bytes,
            (Change::Forget, Source::Fill(fill)) => content.iter().all(|byte| byte == fill),
            (Change::Forget, _) => false,
        })
    }

    fn write_part(
        &self,
        region: &mut Region,
        part: &PartEntry,
        state: Option<State>,
        bytes: &[u8],
        supply: &mut Supply,
    ) -> Result<Outcome, Stop> {
        let (mut slot, absent) = match (state, &region.source) {
            (Some(state), _) => (self.copy_former(region, part.page, state, supply)?, state.absent),
            (None, Source::Nothing) => {
                return Err(Refusal::page(RefusalCode::NoPage, about(part.page)).into());
            }
            (None, source) => {
                let (fill, absent) = match source {
                    Source::Fill(byte) => (*byte, 0),
                    Source::Nothing | Source::File(_) => (0, WHOLE),
                };
                let mut slot = supply.slot()?;
                self.arena.bytes_mut(&mut slot).fill(fill);
                (slot, absent)
            }
        };
        self.arena.bytes_mut(&mut slot)[part.range()].copy_from_slice(bytes);
        let dirty = state.map_or(0, |state| state.dirty) | eighths(part);
        let dirty = if region.writes_back { dirty } else { 0 };
        let absent = absent & !eighths(part);
        self.put_changed(region, part, slot, dirty, absent, supply);
        Ok(Outcome::Changed)
    }

    fn forget_part(
        &self,
        region: &mut Region,
        part: &PartEntry,
        state: Option<State>,
        supply: &mut Supply,
    ) -> Result<Outcome, Stop> {
        let range = PageRange { start: part.page, count: PageCount::new(1) };
        if region.pins.overlaps(range) {
            return Err(Refusal::page(RefusalCode::Pinned, about(part.page)).into());
        }
        if region.written_file().is_some_and(|file| file.is_writing(range)) {
            return Err(RefusalCode::Busy.into());
        }
        let Some(state) = state else { return Ok(Outcome::Same) };
        let (fill, absent) = match &region.source {
            // It is not there in part only: it would be taken for what it is not.
            Source::Nothing => return Err(RefusalCode::Malformed.into()),
            Source::Fill(byte) => (*byte, 0),
            Source::File(_) => (0, state.absent | eighths(part)),
        };
        if absent != 0 && absent == state.absent {
            return Ok(Outcome::Same);
        }
        region.note_forgotten(range);
        if absent == WHOLE {
            region.table.remove(&self.tiers, range, supply.unused());
            region.note_change(range, None);
            self.pages.fetch_sub(1, Ordering::Relaxed);
            return Ok(Outcome::Changed);
        }
        let mut slot = self.copy_former(region, part.page, state, supply)?;
        self.arena.bytes_mut(&mut slot)[part.range()].fill(fill);
        self.put_changed(region, part, slot, state.dirty & !eighths(part), absent, supply);
        Ok(Outcome::Changed)
    }

    /// Stores a page of which a part has changed, in the part's version.
    fn put_changed(
        &self,
        region: &mut Region,
        part: &PartEntry,
        slot: Slot,
        dirty: u8,
        absent: u8,
        supply: &mut Supply,
    ) {
        let (version, generation) = (part.version, region.generation);
        let checksum = Checksum::default();
        let state = State { dirty, heat: 1, absent, generation, version, checksum };
        self.put_parts(region, part.page, slot, state, supply);
        let range = PageRange { start: part.page, count: PageCount::new(1) };
        region.note_change(range, Some(version));
    }
}

/// The eighths of its page that a part is.
const fn eighths(part: &PartEntry) -> u8 {
    let (first, count) = (part.first as usize / EIGHTH, part.bytes as usize / EIGHTH);
    (((1_u16 << count) - 1) << first) as u8
}

/// The bytes of a page that eighths are, those side by side as one.
pub(super) fn runs(eighths: u8) -> impl Iterator<Item = std::ops::Range<usize>> {
    let is_in = move |at: &usize| *at < 8 && eighths & 1 << at != 0;
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = (next..8).find(is_in)?;
        let end = (start..8).find(|at| !is_in(at)).unwrap_or(8);
        next = end;
        Some(start * EIGHTH..end * EIGHTH)
    })
}

/// What a refusal says of a page.
fn about(page: PageIndex) -> PageEntry {
    PageEntry { page, ..PageEntry::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eighths_and_their_bytes() {
        let part = |first, bytes| PartEntry { first, bytes, ..PartEntry::default() };
        assert_eq!([part(0, 512), part(3584, 512)].map(|part| eighths(&part)), [1, 128]);
        assert_eq!([part(0, 4096), part(1024, 2048)].map(|part| eighths(&part)), [255, 0x3c]);
        let found: Vec<_> = runs(0b1100_1101).collect();
        assert_eq!(found, [0..512, 1024..2048, 3072..4096]);
        assert_eq!((runs(0).count(), runs(255).next()), (0, Some(0..4096)));
    }
}
