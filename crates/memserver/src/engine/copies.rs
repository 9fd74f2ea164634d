//! Virtual copies of named regions, and the ranges of files that they depend on, or have of their own.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use farmem_region::{PageCount, PageIndex, SessionId};
use farmem_wire::{Copy, FileRange, Header, RefusalCode, RegionInfo, TakenBody};

use super::named::info;
use super::supply::{Stop, Supply};
use super::{Caller, Engine, Refusal, Sessions, SharedSession, lock};
use crate::backing::BackingFile;
use crate::page_set::PageSet;
use crate::region::{OwnRange, Region, Source};

/// A range of a file that another region has, or a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Taken {
    asked: (u64, u64),
    taken: (u64, u64),
    holder: SessionId,
}

/// What a range of a file may not overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Against {
    /// What any region is made from or written back to.
    AllFiles,
    /// What clones were given as their own, and what those of them that are not filled are still made from.
    OwnRanges,
}

impl Engine {
    /// Makes a virtual copy of the caller's region: neither time nor memory depend on its size. A clone that
    /// is given a range of a file has not written anything there yet.
    pub(crate) fn copy_region(
        &self,
        caller: &Caller,
        header: &Header,
        copy: &Copy<'_>,
        is_frozen: bool,
    ) -> Result<RegionInfo, Refusal> {
        let own = match &copy.range {
            Some(_) if is_frozen => return Err(RefusalCode::Malformed.into()),
            // A file is opened.
            Some(_) if !caller.may_wait => return Err(Refusal::waits()),
            Some(range) => Some(self.open_own(caller, header, range)?),
            None => None,
        };
        let mut sessions = self.sessions();
        if let Some((file, pages)) = &own {
            let asked = file.range(pages.bytes().get());
            self.check_range(&sessions, file, asked, Against::AllFiles)?;
        }
        let mut original = self.enter(caller, header)?;
        original.check_region(header)?;
        let pages = original.region.pages;
        if own.as_ref().is_some_and(|(_, for_pages)| *for_pages != pages) {
            // Its size was changed since it was looked at.
            return Err(RefusalCode::Busy.into());
        }
        let (id, mut session) = self.resident(&mut sessions, copy.name, pages)?;
        let from = &mut original.region;
        session.region.begin_as_copy(from);
        session.region.descend_from(from);
        let (stored, source) = (from.table.stored().get(), from.source.clone());
        session.region.is_frozen = is_frozen;
        session.region.copies_on_access = copy.on_access && !is_frozen;
        if let Some((file, _)) = own {
            session.region.own = Some(OwnRange { file, held: PageSet::default() });
            session.region.writes_back = true;
            session.region.has_own_range = true;
        }
        self.note_copy(&original, &session);
        self.keep_pinned_apart(&mut original.region);
        let info = info(&session, None);
        let shared = Arc::new(Mutex::new(session));
        if let Source::File(file) = source {
            // Before the original can be written back again.
            file.add_copy(Arc::downgrade(&shared));
        }
        sessions.by_id.insert(id, shared);
        drop(original);
        self.pages.fetch_add(stored, Ordering::Relaxed);
        Ok(info)
    }

    /// Opens a range of a file that a region is to be made from, or written back to.
    pub(super) fn open_range(
        &self,
        path: &str,
        offset: u64,
        bytes: u64,
        page_bytes: u32,
    ) -> Result<Arc<BackingFile>, Refusal> {
        if !offset.is_multiple_of(u64::from(page_bytes)) {
            return Err(RefusalCode::Malformed.into());
        }
        let opened = BackingFile::open(&self.config.directories, path, offset, bytes);
        let opened = opened.map_err(|error| {
            self.tell("file_refused", format_args!("refused to open {path}: {error}"));
            RefusalCode::NoFile
        })?;
        Ok(self.files.add(opened))
    }

    /// Opens the range that a clone of the caller's region is to have; also how many pages it is for.
    fn open_own(
        &self,
        caller: &Caller,
        header: &Header,
        range: &FileRange<'_>,
    ) -> Result<(Arc<BackingFile>, PageCount), Refusal> {
        let (pages, page_bytes, path) = {
            let session = self.enter(caller, header)?;
            session.check_region(header)?;
            let Some(file) = session.region.file() else {
                let name = &session.name;
                let what = format_args!("region {name} is made from no file: nor is a clone of it");
                self.warn("file_refused", what);
                return Err(RefusalCode::NoFile.into());
            };
            // It came as text. That of another server's region is none that can be opened.
            let path = file.path().to_str().unwrap_or_default().to_owned();
            (session.region.pages, session.region.page_bytes(), path)
        };
        let path = if range.path.is_empty() { &path } else { range.path };
        let file = self.open_range(path, range.offset, pages.bytes().get(), page_bytes)?;
        Ok((file, pages))
    }

    /// Refuses bytes of a file that regions have, or a part of them. No session is locked by the caller;
    /// as long as the sessions are, no range is given to anybody.
    pub(super) fn check_range(
        &self,
        sessions: &Sessions,
        file: &BackingFile,
        asked: Range<u64>,
        against: Against,
    ) -> Result<(), Refusal> {
        for (id, shared) in &sessions.by_id {
            let session = lock(shared);
            let overlaps = |taken: &Range<u64>| taken.start < asked.end && asked.start < taken.end;
            let Some(taken) = ranges_of(&session.region, file, against).find(overlaps) else {
                continue;
            };
            let (name, path) = (&session.name, file.path().display());
            self.warn(
                "range_refused",
                format_args!(
                    "bytes {} to {} of {path} are not given to another region: region {name} has {} to {}",
                    asked.start, asked.end, taken.start, taken.end
                ),
            );
            let [asked, taken] = [asked, taken].map(|range| (range.start, range.end));
            return Err(Refusal::taken(Taken { asked, taken, holder: *id }));
        }
        Ok(())
    }

    /// As a client is told of it.
    pub(crate) fn taken_body(&self, taken: &Taken) -> TakenBody {
        let Taken { asked, taken, holder } = *taken;
        let session = self.session(holder);
        let holder = session.map_or_else(|_| String::new(), |shared| lock(&shared).name.clone());
        TakenBody { asked: asked.0..asked.1, taken: taken.0..taken.1, holder }
    }
}

/// The ranges of a file that a region has.
fn ranges_of<'a>(
    region: &'a Region,
    file: &'a BackingFile,
    against: Against,
) -> impl Iterator<Item = Range<u64>> + 'a {
    let made_from = match &region.source {
        Source::File(source) => Some(source),
        Source::Nothing | Source::Fill(_) => None,
    };
    let counts = against == Against::AllFiles || region.has_own_range;
    let bytes = region.pages.bytes().get();
    // Twice the same, unless it is a clone that is not filled.
    let both = region.file().into_iter().chain(made_from).filter(move |_| counts);
    both.filter(|other| other.is_same_file(file)).map(move |other| other.range(bytes))
}

/// Keeps a copy's pages as the file has them now, before the file changes.
pub(super) fn fill_copy(
    engine: &Engine,
    file: &BackingFile,
    copy: &SharedSession,
    pages: &[PageIndex],
) -> Result<(), Refusal> {
    let mut supply = Supply::default();
    let mut result = Ok(());
    'pages: for page in pages {
        loop {
            let mut session = lock(copy);
            // It may be made from another part of the file, have been made smaller, or be made from a range of
            // its own by now.
            let pages = session.region.made_from(file, *page);
            if pages.is_empty() || session.ended || !session.region.depends_on_original() {
                continue 'pages;
            }
            let made = engine.make_from_file(&mut session.region, pages, &mut supply);
            drop(session);
            match made {
                Ok(()) => break,
                Err(Stop::Needs(need)) => result = engine.supply(true, vec![need], &mut supply),
                Err(Stop::Refused(refusal)) => result = Err(refusal),
            }
            if result.is_err() {
                break 'pages;
            }
        }
    }
    engine.end_supply(supply);
    result
}
