//! A backup of a region in a directory.
//!
//! ```text
//! directory:   pages.1    the pages of the first backup, in turns in two files, so that two
//!              pages.2    threads write without waiting for each other
//!              pages.3    what had changed when the second was made
//!              manifest   the table of the newest one: where each page lies
//! ```
//!
//! A file of pages is never changed once a table speaks of it. A new table takes the former one's
//! place by a rename, once the disk has all that it speaks of. So whatever instant the machine ends
//! at, the table that is there is whole: the former one or the new one. Files that no table speaks of
//! are removed after that.

mod disk;
mod manifest;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use farmem_region::{Checksum, PAGE_SIZE, PageIndex, Version};

use self::disk::read_all;
pub(crate) use self::disk::{Disk, Folder};
pub(crate) use self::manifest::{BackedUp, Manifest, NoManifest};

const TABLE: &str = "manifest";
const NEW_TABLE: &str = "manifest.new";
const PAGES: &str = "pages.";
/// Files that a backup is written to at the same time: two threads take turns with checking and
/// writing, and a file system lets one at a time write to a file.
pub(crate) const LANES: usize = 2;
/// A backup is made anew, and former files go, when so many times the pages of the region lie in
/// files.
const OLD_PAGES_TIMES: u64 = 2;

/// Why a backup is not made, or cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackupError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Table(#[from] NoManifest),
    #[error("page {0} is not what its checksum says")]
    Damaged(PageIndex),
}

/// A backup in the making.
#[derive(Debug)]
pub(crate) struct Backup<'a> {
    disk: &'a dyn Disk,
    /// What the former backup holds.
    former: Vec<BackedUp>,
    /// The next one of it that may be meant.
    next: usize,
    table: Manifest,
    /// A file of the former backup that is gone or cut: then nothing of that is relied on.
    lacks: Option<u32>,
    lanes: [Lane; LANES],
    /// The one that pages are added to.
    lane: usize,
}

/// A file in the making.
#[derive(Debug)]
struct Lane {
    number: u32,
    file: Arc<OwnedFd>,
    /// Pages that are in it, or will be.
    written: u32,
}

/// A place for the contents of pages that are added together. It may be filled on any thread.
#[derive(Debug)]
pub(crate) struct Batch<'a> {
    disk: &'a dyn Disk,
    file: Arc<OwnedFd>,
    lane: usize,
    /// In the file, in pages.
    at: u32,
}

impl Batch<'_> {
    /// Which file it is in: two threads at the same one would wait for each other.
    pub(crate) const fn lane(&self) -> usize {
        self.lane
    }

    /// Writes the contents of all pages of it that are to be written.
    pub(crate) fn write(&self, slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.disk.write(&self.file, slices, u64::from(self.at) * PAGE_SIZE as u64)
    }
}

impl<'a> Backup<'a> {
    /// Begins a backup beside the one that is there, if any. `about` is without entries.
    pub(crate) fn begin(
        disk: &'a dyn Disk,
        about: Manifest,
        is_full: bool,
    ) -> Result<Self, BackupError> {
        let former = match load(disk) {
            Ok(former) => former.entries,
            Err(BackupError::Io(error)) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            // It is of no use, and is replaced as a whole; what a later version has written is not.
            Err(BackupError::Table(NoManifest::Damaged)) => Vec::new(),
            Err(error) => return Err(error),
        };
        let names = disk.names()?;
        let found = names.iter().filter_map(|name| name.strip_prefix(PAGES)?.parse().ok());
        // Nor one that is gone: what is left of a backup that is interrupted would be taken for it.
        let numbers = found.chain(former.iter().map(|entry| entry.file));
        let number = numbers.max().unwrap_or(0_u32).saturating_add(1);
        // Pages that each file must have.
        let mut files = BTreeMap::<u32, u64>::new();
        for entry in &former {
            let needed = files.entry(entry.file).or_default();
            *needed = (*needed).max(u64::from(entry.at) + 1);
        }
        let (mut in_files, mut lacks) = (0, None);
        for (file, needed) in files {
            let found = pages_in(disk, file);
            in_files += found;
            if found < needed && !is_full {
                lacks = Some(file);
            }
        }
        // Whoever keeps all former files for a few of their pages needs more and more room.
        let is_worth_it = in_files <= OLD_PAGES_TIMES * former.len() as u64;
        let keeps = !is_full && lacks.is_none() && is_worth_it;
        let former = if keeps { former } else { Vec::new() };
        let lane = |number: u32| {
            let file = Arc::new(disk.create_pages(&format!("{PAGES}{number}"))?);
            Ok::<_, io::Error>(Lane { number, file, written: 0 })
        };
        let lanes = [lane(number)?, lane(number.saturating_add(1))?];
        // The first batch goes to the first file.
        Ok(Self { disk, former, next: 0, table: about, lacks, lanes, lane: LANES - 1 })
    }

    /// Begins a batch, in the other file than the one before: the pages that are added next are in it.
    pub(crate) fn begin_batch(&mut self) -> Batch<'a> {
        self.lane = (self.lane + 1) % LANES;
        let lane = &self.lanes[self.lane];
        let (file, at) = (Arc::clone(&lane.file), lane.written);
        Batch { disk: self.disk, file, lane: self.lane, at }
    }

    /// Adds a page, after all those before it; returns whether its content is to be written, as the
    /// next one of its batch. It is not if the former backup holds it: versions and checksums tell.
    pub(crate) fn add(&mut self, page: PageIndex, version: Version, checksum: Checksum) -> bool {
        while self.former.get(self.next).is_some_and(|entry| entry.page < page) {
            self.next += 1;
        }
        let former = self.former.get(self.next).filter(|entry| {
            (entry.page, entry.version, entry.checksum) == (page, version, checksum)
        });
        if let Some(entry) = former {
            self.table.entries.push(*entry);
            return false;
        }
        let lane = &mut self.lanes[self.lane];
        // A file of 16 TiB would be more than a server lends.
        let (file, at) = (lane.number, lane.written);
        lane.written += 1;
        self.table.entries.push(BackedUp { page, version, checksum, file, at });
        true
    }

    /// The name of a file of the former backup that is gone or cut, if there is one: then this is a whole backup.
    pub(crate) fn lacks(&self) -> Option<String> {
        self.lacks.map(|number| format!("{PAGES}{number}"))
    }

    /// Pages whose contents were written.
    pub(crate) fn written(&self) -> u32 {
        self.lanes.iter().map(|lane| lane.written).sum()
    }

    /// Makes this the backup that is there.
    pub(crate) fn finish(self) -> io::Result<()> {
        let disk = self.disk;
        for lane in &self.lanes {
            disk.sync(&lane.file)?;
        }
        // One that was left behind by a backup that was interrupted.
        match disk.remove(NEW_TABLE) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let table = disk.create(NEW_TABLE)?;
        disk.write(&table, &mut [IoSlice::new(&self.table.encode())], 0)?;
        disk.sync(&table)?;
        // The names of both, before one of them stands for the backup.
        disk.sync_names()?;
        disk.rename(NEW_TABLE, TABLE)?;
        disk.sync_names()?;
        let used: BTreeSet<u32> = self.table.entries.iter().map(|entry| entry.file).collect();
        for name in disk.names()? {
            let number = name.strip_prefix(PAGES).and_then(|number| number.parse().ok());
            if number.is_some_and(|number| !used.contains(&number)) {
                disk.remove(&name)?;
            }
        }
        Ok(())
    }

    /// Gives up: what was there before still is.
    pub(crate) fn abandon(self) {
        // What cannot be removed is removed by the next backup that succeeds.
        for lane in &self.lanes {
            let _ = self.disk.remove(&format!("{PAGES}{}", lane.number));
        }
        let _ = self.disk.remove(NEW_TABLE);
    }
}

/// The table of the backup that is there.
pub(crate) fn load(disk: &dyn Disk) -> Result<Manifest, BackupError> {
    Ok(Manifest::decode(&read_all(disk, TABLE)?)?)
}

/// The file of a page.
pub(crate) fn open_pages(disk: &dyn Disk, number: u32) -> io::Result<OwnedFd> {
    disk.open(&format!("{PAGES}{number}"))
}

fn pages_in(disk: &dyn Disk, number: u32) -> u64 {
    let about = open_pages(disk, number).and_then(|file| Ok(rustix::fs::fstat(&file)?));
    about.map_or(0, |about| u64::try_from(about.st_size).unwrap_or(0) / PAGE_SIZE as u64)
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;
    use std::path::Path;
    use std::sync::atomic::{AtomicU32, Ordering};

    use farmem_region::PageCount;
    use farmem_transport::read_at;
    use farmem_wire::page_checksum;

    use super::*;

    /// A disk of which the machine ends at a call: that one does half of its work, no later one
    /// does anything.
    #[derive(Debug)]
    struct Ending {
        folder: Folder,
        calls_left: AtomicU32,
    }

    impl Ending {
        fn call<T>(
            &self,
            work: impl FnOnce() -> io::Result<T>,
            half: impl FnOnce(),
        ) -> io::Result<T> {
            match self.calls_left.load(Ordering::Relaxed).checked_sub(1) {
                Some(left) => {
                    self.calls_left.store(left, Ordering::Relaxed);
                    work()
                }
                None => {
                    half();
                    Err(io::Error::other("the machine has ended"))
                }
            }
        }
    }

    impl Disk for Ending {
        fn create(&self, name: &str) -> io::Result<OwnedFd> {
            self.call(|| self.folder.create(name), || drop(self.folder.create(name)))
        }
        fn open(&self, name: &str) -> io::Result<OwnedFd> {
            self.call(|| self.folder.open(name), || ())
        }
        fn write(&self, file: &OwnedFd, slices: &mut [IoSlice<'_>], at: u64) -> io::Result<()> {
            let first = slices.first().map(|slice| slice[..slice.len() / 2].to_vec());
            self.call(
                || self.folder.write(file, slices, at),
                || {
                    let half = first.unwrap_or_default();
                    let _ = self.folder.write(file, &mut [IoSlice::new(&half)], at);
                },
            )
        }
        fn sync(&self, file: &OwnedFd) -> io::Result<()> {
            self.call(|| self.folder.sync(file), || ())
        }
        fn sync_names(&self) -> io::Result<()> {
            self.call(|| self.folder.sync_names(), || ())
        }
        fn rename(&self, from: &str, to: &str) -> io::Result<()> {
            self.call(|| self.folder.rename(from, to), || ())
        }
        fn remove(&self, name: &str) -> io::Result<()> {
            self.call(|| self.folder.remove(name), || ())
        }
        fn names(&self) -> io::Result<Vec<String>> {
            self.call(|| self.folder.names(), || ())
        }
    }

    type Model = BTreeMap<u64, (u64, u8)>;

    fn about() -> Manifest {
        let (name, pages) = ("r".to_owned(), PageCount::new(64));
        let (entries, working_set) = (Vec::new(), Vec::new());
        Manifest { name, pages, page_bytes: 4096, fill: Some(0), entries, working_set }
    }

    fn checksum(page: u64, version: u64, byte: u8) -> Checksum {
        let (page, version) = (PageIndex::new(page), Version::new(version));
        page_checksum(farmem_region::RegionId::new(0), page, version, &[byte; PAGE_SIZE])
    }

    fn make(disk: &dyn Disk, model: &Model, is_full: bool) -> Result<u32, BackupError> {
        let mut backup = Backup::begin(disk, about(), is_full)?;
        for (page, (version, byte)) in model {
            let (at, sum) = (PageIndex::new(*page), checksum(*page, *version, *byte));
            let batch = backup.begin_batch();
            if backup.add(at, Version::new(*version), sum) {
                batch.write(&mut [IoSlice::new(&[*byte; PAGE_SIZE])])?;
            }
        }
        let written = backup.written();
        backup.finish()?;
        Ok(written)
    }

    fn restored(disk: &dyn Disk) -> Model {
        let table = load(disk).unwrap();
        let page = |entry: &BackedUp| {
            let mut content = [0; PAGE_SIZE];
            let file = open_pages(disk, entry.file).unwrap();
            let at = u64::from(entry.at) * PAGE_SIZE as u64;
            read_at(&file, &mut [IoSliceMut::new(&mut content)], at).unwrap();
            let (page, version) = (entry.page.get(), entry.version.get());
            assert_eq!(entry.checksum, checksum(page, version, content[0]), "page {page}");
            assert_eq!(content, [content[0]; PAGE_SIZE]);
            (page, (version, content[0]))
        };
        table.entries.iter().map(page).collect()
    }

    fn folder(path: &Path) -> Folder {
        let allowed = [path.parent().unwrap().canonicalize().unwrap()];
        let path = allowed[0].join(path.file_name().unwrap());
        Folder::open(&allowed, path.to_str().unwrap(), true).unwrap()
    }

    /// Cap 74: a backup that is interrupted at any call leaves the old state or the new one, and the
    /// next one succeeds.
    #[test]
    fn cap_74_a_backup_interrupted_anywhere_is_the_old_or_the_new_one() {
        let old: Model = (0..20).map(|page| (page * 2, (1, page as u8))).collect();
        let mut new = old.clone();
        new.insert(4, (2, 99));
        new.insert(41, (1, 98));
        new.remove(&6);
        for is_full in [false, true] {
            let (mut was_old, mut was_new) = (0, 0);
            for calls in 0.. {
                let all = tempfile::tempdir().unwrap();
                let path = all.path().join("backup");
                make(&folder(&path), &old, false).unwrap();
                let ending = Ending { folder: folder(&path), calls_left: AtomicU32::new(calls) };
                let result = make(&ending, &new, is_full);
                drop(ending);
                let found = restored(&folder(&path));
                assert!(found == old || found == new, "after {calls} calls: {found:?}");
                was_old += u32::from(found == old);
                was_new += u32::from(found == new);
                if result.is_ok() {
                    break;
                }
                make(&folder(&path), &new, is_full).unwrap();
                assert_eq!(restored(&folder(&path)), new);
                let left = folder(&path).names().unwrap();
                let stray = left.iter().filter(|name| name.ends_with(".new")).count();
                assert_eq!(stray, 0, "{left:?}");
            }
            assert!(was_old > 8 && was_new > 2, "{was_old} {was_new}");
        }
    }

    #[test]
    fn cap_74_only_what_changed_is_written_and_old_files_go() {
        let all = tempfile::tempdir().unwrap();
        let disk = folder(&all.path().join("backup"));
        let mut model: Model = (0..50).map(|page| (page, (1, 7))).collect();
        assert_eq!(make(&disk, &model, false).unwrap(), 50);
        assert_eq!(make(&disk, &model, false).unwrap(), 0);
        for round in 2..200 {
            model.insert(round % 50, (round, round as u8));
            let written = make(&disk, &model, false).unwrap();
            assert!(written == 1 || written == 50, "{written}");
            assert_eq!(restored(&disk), model);
        }
        let files = load(&disk).unwrap().entries;
        let files: BTreeSet<u32> = files.iter().map(|entry| entry.file).collect();
        let there = disk.names().unwrap().iter().filter(|name| name.starts_with(PAGES)).count();
        assert_eq!(there, files.len());
        assert_eq!(make(&disk, &model, true).unwrap(), 50);
    }

    /// What the former backup was to have and has not is written again, whatever is missing of it.
    #[test]
    fn cap_74_a_backup_relies_on_no_file_that_is_gone_or_cut() {
        type Harm = fn(&Path);
        let gone: Harm = |file| std::fs::remove_file(file).unwrap();
        let cut: Harm = |file| {
            let file = std::fs::File::options().write(true).open(file).unwrap();
            file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        };
        for (harm, name) in
            [(gone, "pages.1"), (gone, "pages.2"), (cut, "pages.1"), (cut, "pages.2")]
        {
            let all = tempfile::tempdir().unwrap();
            let path = all.path().join("backup");
            let disk = folder(&path);
            let mut model: Model = (0..50).map(|page| (page, (1, 7))).collect();
            make(&disk, &model, false).unwrap();
            model.insert(9, (2, 8));
            assert_eq!(make(&disk, &model, false).unwrap(), 1);
            let lacks = || {
                let begun = Backup::begin(&disk, about(), false).unwrap();
                let lacks = begun.lacks();
                begun.abandon();
                lacks
            };
            assert_eq!(lacks(), None);
            harm(&path.join(name));
            assert_eq!(lacks().as_deref(), Some(name));
            assert_eq!(make(&disk, &model, false).unwrap(), 50, "all of it");
            assert_eq!(restored(&disk), model);
        }
    }

    /// What an interrupted backup has left is not taken for a file of the former one that is gone.
    #[test]
    fn cap_74_a_file_that_is_gone_is_not_one_that_was_begun_later() {
        for name in ["pages.1", "pages.2"] {
            let all = tempfile::tempdir().unwrap();
            let path = all.path().join("backup");
            let disk = folder(&path);
            let model: Model = (0..50).map(|page| (page, (1, page as u8))).collect();
            make(&disk, &model, false).unwrap();
            std::fs::remove_file(path.join(name)).unwrap();
            let mut begun = Backup::begin(&disk, about(), false).unwrap();
            for (page, (version, byte)) in &model {
                let (at, sum) = (PageIndex::new(*page), checksum(*page, *version, *byte));
                let batch = begun.begin_batch();
                assert!(begun.add(at, Version::new(*version), sum));
                batch.write(&mut [IoSlice::new(&[*byte; PAGE_SIZE])]).unwrap();
            }
            drop(begun);
            assert_eq!(make(&disk, &model, false).unwrap(), 50, "all of it");
            assert_eq!(restored(&disk), model);
        }
    }

    #[test]
    fn a_directory_that_is_not_allowed_or_in_use_is_refused() {
        let all = tempfile::tempdir().unwrap();
        let root = all.path().canonicalize().unwrap();
        let allowed = [root.join("allowed")];
        std::fs::create_dir_all(&allowed[0]).unwrap();
        std::os::unix::fs::symlink(&root, allowed[0].join("link")).unwrap();
        let open = |path: &str| Folder::open(&allowed, path, true).map_err(|error| error.kind());
        let inside = allowed[0].join("b");
        let first = open(inside.to_str().unwrap()).unwrap();
        assert_eq!(open(inside.to_str().unwrap()).unwrap_err(), io::ErrorKind::ResourceBusy);
        drop(first);
        for wrong in ["link", "link/b", "../b", "none/b", ""] {
            let path = allowed[0].join(wrong);
            assert!(open(path.to_str().unwrap()).is_err(), "{wrong}");
        }
        assert!(open(root.join("b").to_str().unwrap()).is_err());
        assert!(!root.join("b").exists());
    }
}
