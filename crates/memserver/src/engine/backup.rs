//! Regions go to backups and come back from them.
//!
//! A backup is of one instant: it is made from a snapshot, which shares all pages with the region,
//! and goes when the backup is made. A region that is restored has its name only when all of it is
//! there.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use farmem_region::{ByteCount, Checksum, PAGE_SIZE, PageCount, PageIndex, PageRange, Version};
use farmem_vmem::Slot;
use farmem_wire::{
    Action, Header, PAGES_PER_MESSAGE_MAX, PageEntry, Progress, RangeEntry, RefusalCode,
    RegionInfo, Source as WireSource,
};

use super::named::info;
use super::supply::Purpose;
use super::{Caller, Cause, Engine, Refusal, Sessions, SharedSession, lock};
use crate::backing::BackingFile;
use crate::backup::{
    self, BackedUp, Backup, BackupError, Batch, Folder, LANES, Manifest, NoManifest, open_pages,
};
use crate::journal::Record;
use crate::region::{Region, Source};
use crate::session::Session;
use crate::table::{self, LEAF_PAGES, Portion};
use crate::tiers::Place;
use crate::working_set::WorkingSet;

/// Backups and restores at the same time: each keeps a thread that other requests may wait for.
const JOBS_MAX: u32 = 2;
/// Of the memory, the pages that are read and written at a time take at most this part.
const BATCH_SHARE: u32 = 32;

/// What is read in so many batches is written at once: half a MiB.
const BATCHES_PER_WRITE: usize = 2;
/// Batches that each thread of a backup knows of before it has done with the one before.
const BATCHES_AHEAD: usize = 4;

/// How long a backup or a restore waits for memory: as long as clients do.
const BUSY_PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts: whoever makes room needs the processor for it.
const BUSY_PAUSE: Duration = Duration::from_millis(5);

/// So many as to let no more begin.
const CLOSED: u32 = u32::MAX;
/// Before it is looked again whether leases on a region that is to be replaced have ended.
const LEASE_PAUSE: Duration = Duration::from_millis(10);

/// Backups and restores that are under way.
#[derive(Debug, Default)]
pub(super) struct Jobs(AtomicU32);

/// One of them.
struct Job<'a>(&'a AtomicU32);

impl Jobs {
    /// Lets no more begin; false, and they may, if some are under way.
    pub(super) fn close(&self) -> bool {
        self.0.compare_exchange(0, CLOSED, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    /// Lets them begin again.
    pub(super) fn open(&self) {
        let _ = self.0.compare_exchange(CLOSED, 0, Ordering::Relaxed, Ordering::Relaxed);
    }

    fn begin(&self) -> Result<Job<'_>, RefusalCode> {
        let begin = |jobs: u32| (jobs < JOBS_MAX).then(|| jobs + 1);
        match self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, begin) {
            Ok(_) => Ok(Job(&self.0)),
            Err(_) => Err(RefusalCode::Busy),
        }
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A page as a table tells of it.
#[derive(Debug, Clone, Copy)]
struct Told {
    page: PageIndex,
    version: Version,
    checksum: Checksum,
}

impl Engine {
    /// Backs the caller's region up. Takes as long as the disk does.
    pub(crate) fn back_up(
        &self,
        caller: &Caller,
        header: &Header,
        path: &str,
        is_full: bool,
    ) -> Result<Progress, Refusal> {
        let _job = self.jobs.begin()?;
        let folder = self.folder(path, true)?;
        let mut snapshot = self.hidden_snapshot(caller, header)?;
        let result = self.back_up_snapshot(&mut snapshot, &folder, is_full);
        if let Some((_, shared)) = &snapshot.session {
            self.end(shared, Cause::Disconnected, |_| true);
        }
        let written = result.map_err(|error| match error {
            Failed::Refused(refusal) => refusal,
            Failed::Disk(error) => self.backup_failed("back up to", path, &error),
        })?;
        Ok(Progress { changed: PageCount::new(written.into()), next: None })
    }

    /// A snapshot of the caller's region, and who alone is attached to it.
    fn hidden_snapshot(&self, caller: &Caller, header: &Header) -> Result<Caller, Refusal> {
        let mut snapshot = self.caller();
        snapshot.may_wait = true;
        let mut sessions = self.sessions();
        let mut original = self.enter(caller, header)?;
        original.check_region(header)?;
        // It holds what is stored now, and what a file has beside that, and never more.
        let room = match original.region.source {
            Source::File(_) => original.region.pages,
            Source::Nothing | Source::Fill(_) => original.region.table.stored(),
        };
        let room = ByteCount::new(room.bytes().get().max(PAGE_SIZE as u64));
        let (id, mut session) = self.session_for(&mut sessions, &original.name, room, false)?;
        session.is_temporary = true;
        session.region.pages = original.region.pages;
        session.region.begin_as_copy(&mut original.region);
        session.region.is_frozen = true;
        session.attach(snapshot.connection);
        self.note_copy(&original, &session);
        self.keep_pinned_apart(&mut original.region);
        let stored = session.region.table.stored().get();
        let file = match &session.region.source {
            Source::File(file) => Some(Arc::clone(file)),
            Source::Nothing | Source::Fill(_) => None,
        };
        let shared = Arc::new(Mutex::new(session));
        if let Some(file) = file {
            // Before the original can be written back again.
            file.add_copy(Arc::downgrade(&shared));
        }
        sessions.by_id.insert(id, Arc::clone(&shared));
        drop(original);
        self.pages.fetch_add(stored, Ordering::Relaxed);
        snapshot.session = Some((id, shared));
        Ok(snapshot)
    }

    fn back_up_snapshot(
        &self,
        snapshot: &mut Caller,
        folder: &Folder,
        is_full: bool,
    ) -> Result<u32, Failed> {
        let Some((_, shared)) = snapshot.session.clone() else {
            return Err(Failed::Refused(RefusalCode::NotAttached.into()));
        };
        let (about, header, every) = {
            let session = lock(&shared);
            let region = &session.region;
            let fill = match region.source {
                Source::Fill(byte) => Some(byte),
                // All of the file's pages are in the backup.
                Source::File(_) => Some(0),
                Source::Nothing => None,
            };
            let name = session.name.clone();
            let (pages, page_bytes) = (region.pages, region.page_bytes());
            let (entries, working_set) = (Vec::new(), region.working_set.order());
            let is_inside = |page: &PageIndex| region.contains(*page);
            let working_set: Vec<_> = working_set.into_iter().filter(is_inside).collect();
            let about = Manifest { name, pages, page_bytes, fill, entries, working_set };
            let (header, _) = self.describe(&session);
            (about, header, matches!(region.source, Source::File(_)))
        };
        let mut backup = Backup::begin(folder, about, is_full)?;
        if let Some(name) = backup.lacks() {
            self.tell(
                "backup_failed",
                format_args!(
                    "{name} of the former backup of region {} is gone or cut: that one cannot be restored, and a \
                     whole one is made in its place",
                    lock(&shared).name
                ),
            );
        }
        match self.write_pages(snapshot, &shared, header, every, &mut backup) {
            Ok(()) => {
                let written = backup.written();
                backup.finish()?;
                Ok(written)
            }
            Err(error) => {
                backup.abandon();
                Err(error)
            }
        }
    }

    /// Some threads check and write; this one says what.
    fn write_pages(
        &self,
        snapshot: &Caller,
        shared: &SharedSession,
        header: Header,
        every: bool,
        backup: &mut Backup<'_>,
    ) -> Result<(), Failed> {
        let failed = Mutex::new(None);
        let has_failed = AtomicBool::new(false);
        let told = thread::scope(|scope| {
            let lanes: [_; LANES] = std::array::from_fn(|_| {
                let (give, take) = sync_channel::<(Batch<'_>, Vec<Told>)>(BATCHES_AHEAD);
                let (failed, has_failed) = (&failed, &has_failed);
                scope.spawn(move || {
                    // To the end, or who gives would wait for ever.
                    for (batch, wanted) in take {
                        if has_failed.load(Ordering::Relaxed) || self.is_stopping() {
                            continue;
                        }
                        if let Err(error) = self.write_batch(snapshot, header, &wanted, &batch) {
                            failed
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .get_or_insert(error);
                            has_failed.store(true, Ordering::Relaxed);
                        }
                    }
                });
                give
            });
            self.tell_pages(snapshot, shared, header, every, backup, |batch, wanted| {
                // Fails only if the other side has panicked, which is told below.
                let _ = lanes[batch.lane()].send((batch, wanted));
                !has_failed.load(Ordering::Relaxed)
            })
        });
        told?;
        self.check_stopping()?;
        let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        failed.map_or(Ok(()), Err)
    }

    /// Fails once the server is to end: who waits for it does not wait for a backup too.
    fn check_stopping(&self) -> Result<(), Refusal> {
        if self.is_stopping() { Err(RefusalCode::Busy.into()) } else { Ok(()) }
    }

    /// Repeats what is refused as busy: there will be room, unless the server is to end.
    fn patiently(&self, mut attempt: impl FnMut() -> Result<(), Refusal>) -> Result<(), Refusal> {
        let began = Instant::now();
        loop {
            match attempt() {
                Err(refusal)
                    if refusal.code == RefusalCode::Busy
                        && began.elapsed() < BUSY_PATIENCE
                        && !self.is_stopping() =>
                {
                    thread::sleep(BUSY_PAUSE);
                }
                result => return result,
            }
        }
    }

    /// Adds all pages of a snapshot to a backup, a batch at a time, as long as `give` says so: it gets
    /// what is to be written.
    fn tell_pages<'a>(
        &self,
        snapshot: &Caller,
        shared: &SharedSession,
        header: Header,
        every: bool,
        backup: &mut Backup<'a>,
        mut give: impl FnMut(Batch<'a>, Vec<Told>) -> bool,
    ) -> Result<(), Failed> {
        let (mut from, mut told) = (PageIndex::new(0), Vec::new());
        loop {
            self.check_stopping()?;
            told.clear();
            if every {
                // Those that were never looked at are read from the file first.
                let range = self.fill_leaf(snapshot, header, from)?;
                if range {
                    from = tell_leaf(&lock(shared).region, from, &mut told).unwrap_or(from);
                }
            } else if let Some(next) = tell_leaf(&lock(shared).region, from, &mut told) {
                from = next;
            }
            if told.is_empty() {
                return Ok(());
            }
            for pages in told.chunks(self.batch() * BATCHES_PER_WRITE) {
                let batch = backup.begin_batch();
                let is_wanted = |page: &&Told| backup.add(page.page, page.version, page.checksum);
                let wanted: Vec<Told> = pages.iter().filter(is_wanted).copied().collect();
                if !wanted.is_empty() && !give(batch, wanted) {
                    return Ok(());
                }
            }
        }
    }

    /// Reads the pages of the leaf that begins at a page from the region's file; false past the end.
    fn fill_leaf(
        &self,
        snapshot: &Caller,
        header: Header,
        from: PageIndex,
    ) -> Result<bool, Failed> {
        let Some((_, shared)) = &snapshot.session else {
            return Ok(false);
        };
        let pages = lock(shared).region.pages.get();
        let end = pages.min(from.get() + LEAF_PAGES as u64);
        let count = PageCount::new(end.saturating_sub(from.get()));
        if count.get() == 0 {
            return Ok(false);
        }
        let range = PageRange { start: from, count };
        let ranges = [RangeEntry(range)];
        self.bring(snapshot, &header, ranges.into_iter(), super::Bring::Initialise)?;
        Ok(true)
    }

    /// Reads pages, checks them and writes them.
    fn write_batch(
        &self,
        snapshot: &Caller,
        header: Header,
        wanted: &[Told],
        batch: &Batch<'_>,
    ) -> Result<(), Failed> {
        let header = Header { action: Action::Read, ..header };
        let mut slots = Vec::with_capacity(wanted.len());
        let read = wanted.chunks(self.batch()).try_for_each(|wanted| {
            let entries = wanted.iter().map(|told| PageEntry {
                page: told.page,
                version: told.version,
                ..PageEntry::default()
            });
            // What is refused takes what it was given along.
            let mut read = Vec::new();
            self.patiently(|| self.read(snapshot, &header, entries.clone(), &mut read, |_| ()))?;
            slots.append(&mut read);
            Ok(())
        });
        let result = read.map_err(|refusal: Refusal| Failed::from(refusal));
        let result = result.and_then(|()| self.check_batch(wanted, &slots)).and_then(|()| {
            let mut slices: Vec<IoSlice<'_>> = Vec::new();
            self.arena.gather(&slots, &mut slices);
            Ok(batch.write(&mut slices)?)
        });
        self.arena.release(slots);
        result
    }

    /// Damage is found before it is written, not when it is needed.
    fn check_batch(&self, told: &[Told], slots: &[Slot]) -> Result<(), Failed> {
        for (told, slot) in told.iter().zip(slots) {
            let found = Region::neutral(told.page, told.version, self.arena.bytes(slot));
            if found != told.checksum {
                return Err(BackupError::Damaged(told.page).into());
            }
        }
        Ok(())
    }

    /// Makes a region from a backup, under a name that is free or, if `replaces`, taken.
    pub(crate) fn restore(
        &self,
        path: &str,
        name: &str,
        replaces: bool,
    ) -> Result<RegionInfo, Refusal> {
        let _job = self.jobs.begin()?;
        let folder = self.folder(path, false)?;
        let failed = |error: &BackupError| self.backup_failed("restore from", path, error);
        let table = backup::load(&folder).map_err(|error| failed(&error))?;
        self.check_free(name, replaces)?;
        let source = table.fill.map_or(WireSource::Nothing, WireSource::Fill);
        let shared = self.begin_restored(&table, source, name)?;
        let result = self.read_pages(&folder, &table, &shared).map_err(|error| match error {
            Failed::Refused(refusal) => refusal,
            Failed::Disk(error) => failed(&error),
        });
        let result = result.and_then(|()| self.name_restored(&shared, name, replaces));
        if result.is_err() {
            self.end(&shared, Cause::Disconnected, |_| true);
        }
        result
    }

    fn check_free(&self, name: &str, replaces: bool) -> Result<(), RefusalCode> {
        if !replaces && self.sessions().names.contains_key(name) {
            return Err(RefusalCode::NameTaken);
        }
        Ok(())
    }

    /// A region that nobody can open yet.
    fn begin_restored(
        &self,
        table: &Manifest,
        source: WireSource<'_>,
        name: &str,
    ) -> Result<SharedSession, Refusal> {
        let unit = u64::from(table.page_bytes).max(PAGE_SIZE as u64);
        let is_known = farmem_wire::PAGE_SIZES.contains(&table.page_bytes);
        let size = table.pages.bytes().get();
        if !is_known || size == 0 || !size.is_multiple_of(unit) {
            return Err(RefusalCode::BadBackup.into());
        }
        let mut sessions = self.sessions();
        let hidden = format!("restore of {}", name.chars().take(50).collect::<String>());
        let (id, mut session) = self.resident(&mut sessions, &hidden, table.pages)?;
        sessions.names.remove(&hidden);
        session.is_resident = false;
        session.is_temporary = true;
        session.region.set_page_bytes(table.page_bytes);
        session.region.working_set = WorkingSet::of(table.working_set.clone());
        session.region.source = match source {
            WireSource::Fill(byte) => Source::Fill(byte),
            WireSource::Nothing | WireSource::File { .. } | WireSource::Server { .. } => {
                Source::Nothing
            }
        };
        self.note_new(&session);
        let shared = Arc::new(Mutex::new(session));
        sessions.by_id.insert(id, Arc::clone(&shared));
        Ok(shared)
    }

    fn read_pages(
        &self,
        folder: &Folder,
        table: &Manifest,
        shared: &SharedSession,
    ) -> Result<(), Failed> {
        let mut files = OpenFiles::default();
        let is_run =
            |one: &BackedUp, next: &BackedUp| next.file == one.file && next.at == one.at + 1;
        for run in table
            .entries
            .chunk_by(is_run)
            .flat_map(|run| run.chunks(self.batch() * BATCHES_PER_WRITE))
        {
            self.check_stopping()?;
            self.check_journal().map_err(Refusal::from)?;
            let descriptor = files.get(folder, run[0].file)?;
            let mut slots = Vec::new();
            self.patiently(|| self.take_slots(Purpose::Keep, true, run.len() as u32, &mut slots))?;
            let mut slices = Vec::new();
            self.arena.gather_mut(&mut slots, &mut slices);
            let at = u64::from(run[0].at) * PAGE_SIZE as u64;
            let result = farmem_transport::read_at(descriptor, &mut slices, at);
            let result = result.map_err(missing).and_then(|()| {
                let told: Vec<_> = run.iter().map(Told::of).collect();
                self.check_batch(&told, &slots)
            });
            if let Err(error) = result {
                self.arena.release(slots);
                return Err(error);
            }
            self.put_restored(shared, run, slots);
        }
        Ok(())
    }

    fn put_restored(&self, shared: &SharedSession, run: &[BackedUp], slots: Vec<Slot>) {
        let mut session = lock(shared);
        let generation = session.region.generation;
        for (entry, slot) in run.iter().zip(slots) {
            let BackedUp { page, version, checksum, .. } = *entry;
            let place = Place::Dram(slot);
            let portion =
                Portion { place, dirty: 0, heat: 0, absent: 0, generation, version, checksum };
            let former = session.region.table.put(&self.tiers, page, &portion);
            assert!(former.is_none(), "a table names a page once");
        }
        self.pages.fetch_add(run.len() as u64, Ordering::Relaxed);
    }

    /// Gives a region that is whole its name; the one that had it ends.
    fn name_restored(
        &self,
        shared: &SharedSession,
        name: &str,
        replaces: bool,
    ) -> Result<RegionInfo, Refusal> {
        let former = self.named(name);
        let file = former.and_then(|former| lock(&former).region.written_file().cloned());
        // Nothing is written any more where another region may be from now on. To wait for that may take
        // seconds, in which leases would be given again.
        let _turn = file.as_ref().map(|file| file.wait_for_turn());
        let (mut sessions, former) = self.close_former(name, replaces, file.as_ref())?;
        let info = {
            let mut session = lock(shared);
            name.clone_into(&mut session.name);
            session.is_resident = true;
            session.is_temporary = false;
            sessions.names.insert(name.to_owned(), session.id);
            for (page, begins) in session.region.working_set.records() {
                let region = session.region.id;
                self.tiers.note(|| Record::Read { region, page, begins });
            }
            // After a restart the later one of a name counts.
            self.note_session(&session);
            info(&session, None)
        };
        if let Some(former) = former {
            // It must not take the name with it.
            lock(&former).is_resident = false;
            drop(sessions);
            self.end(&former, Cause::Disconnected, |_| true);
        }
        Ok(info)
    }

    /// Waits until no client believes what it knows of the region that is to be replaced, nor will again.
    /// Returns that region, if there is one, and the sessions, which are locked since it was looked for.
    fn close_former(
        &self,
        name: &str,
        replaces: bool,
        file: Option<&Arc<BackingFile>>,
    ) -> Result<(MutexGuard<'_, Sessions>, Option<SharedSession>), Refusal> {
        loop {
            let sessions = self.sessions();
            let former = sessions.names.get(name).and_then(|id| sessions.by_id.get(id)).cloned();
            let Some(former) = former else {
                return Ok((sessions, None));
            };
            if !replaces {
                return Err(RefusalCode::NameTaken.into());
            }
            let is_closed = {
                let Session { region, leases, .. } = &mut *lock(&former);
                if region.pins.pages().get() > 0 {
                    return Err(RefusalCode::Pinned.into());
                }
                if region.written_file().map(Arc::as_ptr) != file.map(Arc::as_ptr) {
                    // It is another one than was looked at.
                    return Err(RefusalCode::Busy.into());
                }
                leases.close(Instant::now()).is_ok()
            };
            if is_closed {
                return Ok((sessions, Some(former)));
            }
            drop(sessions);
            thread::sleep(LEASE_PAUSE);
        }
    }

    /// The session of a named region.
    fn named(&self, name: &str) -> Option<SharedSession> {
        let sessions = self.sessions();
        sessions.names.get(name).and_then(|id| sessions.by_id.get(id).cloned())
    }

    /// Pages that are read at a time.
    fn batch(&self) -> usize {
        let share = BATCH_SHARE * (LANES * BATCHES_PER_WRITE) as u32;
        ((self.arena.slots() / share) as usize).clamp(1, PAGES_PER_MESSAGE_MAX)
    }

    fn folder(&self, path: &str, create: bool) -> Result<Folder, Refusal> {
        Folder::open(&self.config.directories, path, create).map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => RefusalCode::Busy.into(),
            io::ErrorKind::StorageFull => RefusalCode::DiskFull.into(),
            _ => {
                let message = format_args!("refused to use {path} for a backup: {error}");
                self.tell("file_refused", message);
                RefusalCode::NoFile.into()
            }
        })
    }

    fn backup_failed(&self, what: &str, path: &str, error: &BackupError) -> Refusal {
        self.tell("backup_failed", format_args!("cannot {what} {path}: {error}"));
        match error {
            BackupError::Io(error) if error.kind() == io::ErrorKind::StorageFull => {
                RefusalCode::DiskFull.into()
            }
            BackupError::Io(error) if error.kind() == io::ErrorKind::NotFound => {
                RefusalCode::NoFile.into()
            }
            BackupError::Io(_) => RefusalCode::FileFailed.into(),
            BackupError::Table(NoManifest::Version(_)) => RefusalCode::BackupVersion.into(),
            BackupError::Table(NoManifest::Damaged) => RefusalCode::BadBackup.into(),
            BackupError::Damaged(page) => Refusal::page(
                RefusalCode::BadBackup,
                PageEntry { page: *page, ..PageEntry::default() },
            ),
        }
    }
}

/// The files of pages that were read from last.
#[derive(Default)]
struct OpenFiles(Vec<(u32, OwnedFd)>);

impl OpenFiles {
    fn get(&mut self, folder: &Folder, number: u32) -> Result<&OwnedFd, Failed> {
        let at = match self.0.iter().position(|(open, _)| *open == number) {
            Some(at) => at,
            None => {
                // Those that a backup was written to at the same time.
                if self.0.len() == LANES {
                    self.0.remove(0);
                }
                self.0.push((number, open_pages(folder, number).map_err(missing)?));
                self.0.len() - 1
            }
        };
        Ok(&self.0[at].1)
    }
}

/// Why a backup or a restore ends early.
enum Failed {
    Refused(Refusal),
    Disk(BackupError),
}

impl From<Refusal> for Failed {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl<E: Into<BackupError>> From<E> for Failed {
    fn from(error: E) -> Self {
        Self::Disk(error.into())
    }
}

/// A table speaks of files that are not there, or end before.
fn missing(error: io::Error) -> Failed {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof => {
            BackupError::Table(NoManifest::Damaged).into()
        }
        _ => error.into(),
    }
}

impl Told {
    const fn of(entry: &BackedUp) -> Self {
        Self { page: entry.page, version: entry.version, checksum: entry.checksum }
    }
}

/// What is stored in the first leaf from a page on; returns the page after that leaf.
fn tell_leaf(region: &Region, from: PageIndex, told: &mut Vec<Told>) -> Option<PageIndex> {
    let (first, leaf) = region.table.leaf_from(from)?;
    for (at, portion) in table::lock(leaf).portions.iter() {
        let Portion { version, checksum, .. } = portion;
        let page = PageIndex::new(first.get() + at as u64);
        told.push(Told { page, version, checksum });
    }
    Some(PageIndex::new(first.get() + LEAF_PAGES as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_job_begins_once_they_are_closed_and_they_are_not_closed_while_one_is_under_way() {
        let jobs = Jobs::default();
        let job = jobs.begin();
        assert!(job.is_ok() && !jobs.close());
        drop(job);
        assert!(jobs.close() && jobs.begin().is_err() && !jobs.close());
        jobs.open();
        assert!(jobs.begin().is_ok());
    }
}
