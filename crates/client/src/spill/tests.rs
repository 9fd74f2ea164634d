//! The file beside a store that has little room.

use std::collections::HashMap;
use std::path::Path;

use farmem_region::{
    Completion, FetchPage, FrameId, Frames, Nanos, Outcome, PAGE_SIZE, PageCount, PageIndex,
    PageRange, PageStore, Readiness, Request, StoreError, StorePage, Ticket, Version,
};

use super::{SpillFile, SpillStore};
use crate::frames::HeapFrames;

/// Keeps pages in memory up to a number of them; completes one request with each `advance`, the
/// newest first.
#[derive(Debug)]
struct SmallStore {
    most: u64,
    /// Pages that it could have more, if it were asked for no more.
    free: u64,
    pages: HashMap<u64, (Version, [u8; PAGE_SIZE])>,
    queue: Vec<(Ticket, Asked)>,
}

#[derive(Debug)]
enum Asked {
    Fetch(Vec<FetchPage>),
    Store(Vec<StorePage>),
    Release(Vec<PageRange>),
    Grow(PageCount),
}

impl SmallStore {
    fn new(most: u64) -> Self {
        Self { most, free: 0, pages: HashMap::new(), queue: Vec::new() }
    }

    fn answer(&mut self, asked: Asked, frames: &mut dyn Frames) -> Result<Outcome, StoreError> {
        match asked {
            Asked::Fetch(pages) => {
                for FetchPage { page, version, frame } in pages {
                    let (kept, bytes) = &self.pages[&page.get()];
                    assert_eq!(*kept, version);
                    *frames.bytes_mut(frame) = *bytes;
                }
                Ok(Outcome::Fetched { server_nanos: 5 })
            }
            Asked::Store(pages) => {
                for StorePage { page, version, frame } in pages {
                    assert!(page.get() < self.most, "page {page} does not belong here");
                    self.pages.insert(page.get(), (version, *frames.bytes(frame)));
                }
                Ok(Outcome::Stored)
            }
            Asked::Release(ranges) => {
                for PageRange { start, count } in ranges {
                    assert!(start.get() + count.get() <= self.most);
                    for page in start.get()..start.get() + count.get() {
                        self.pages.remove(&page);
                    }
                }
                Ok(Outcome::Released)
            }
            Asked::Grow(count) if count.get() <= self.free => {
                self.free -= count.get();
                self.most += count.get();
                Ok(Outcome::Grown { pages: PageCount::new(self.most) })
            }
            Asked::Grow(count) => {
                let (server, asked) = ("test".to_owned(), count.bytes().get());
                Err(StoreError::Full { server, asked, free: self.free * PAGE_SIZE as u64 })
            }
        }
    }
}

impl PageStore for SmallStore {
    fn submit(&mut self, ticket: Ticket, request: Request<'_>) -> Result<(), StoreError> {
        let asked = match request {
            Request::Fetch(pages) | Request::FetchAhead(pages) => Asked::Fetch(pages.to_vec()),
            Request::Store(pages) => Asked::Store(pages.to_vec()),
            Request::Release(ranges) => Asked::Release(ranges.to_vec()),
            Request::Grow(count) => Asked::Grow(count),
        };
        self.queue.push((ticket, asked));
        Ok(())
    }

    fn advance(
        &mut self,
        _now: Nanos,
        frames: &mut dyn Frames,
        done: &mut Vec<Completion>,
    ) -> Result<(), StoreError> {
        if let Some((ticket, asked)) = self.queue.pop() {
            let result = self.answer(asked, frames);
            done.push(Completion { ticket, result });
        }
        Ok(())
    }

    fn readiness(&self) -> Readiness {
        Readiness { descriptor: None, wants_write: false, deadline: None }
    }
}

/// A store with room for 4 pages beside a file in `directory`.
struct Spilling {
    store: SpillStore<SmallStore>,
    frames: HeapFrames,
    next: u64,
}

impl Spilling {
    fn new(directory: &Path) -> Self {
        let file = SpillFile::create(directory).unwrap();
        let store = SpillStore::new(SmallStore::new(4), PageCount::new(4), Some(file));
        Self { store, frames: HeapFrames::new(32), next: 0 }
    }

    fn ask(&mut self, request: Request<'_>) -> Result<Outcome, StoreError> {
        self.next += 1;
        self.store.submit(Ticket(self.next), request)?;
        let mut done = Vec::new();
        for _ in 0..4 {
            self.store.advance(Nanos::new(0), &mut self.frames, &mut done)?;
        }
        assert_eq!(done.len(), 1, "{done:?}");
        assert_eq!(done[0].ticket, Ticket(self.next));
        done.remove(0).result
    }

    fn grow(&mut self, pages: u64) -> Result<Outcome, StoreError> {
        self.ask(Request::Grow(PageCount::new(pages)))
    }

    /// Stores pages with contents that tell page and version.
    fn store(&mut self, version: u64, pages: &[u64]) -> Result<Outcome, StoreError> {
        let mut request = Vec::new();
        for (&page, frame) in pages.iter().zip((0..32).rev().map(FrameId::new)) {
            self.frames.bytes_mut(frame).fill((page * 7 + version) as u8);
            let (page, version) = (PageIndex::new(page), Version::new(version));
            request.push(StorePage { page, version, frame });
        }
        self.ask(Request::Store(&request))
    }

    fn fetch(&mut self, version: u64, pages: &[u64]) -> Result<Outcome, StoreError> {
        let mut request = Vec::new();
        for (&page, frame) in pages.iter().zip((0..32).map(FrameId::new)) {
            self.frames.bytes_mut(frame).fill(0xee);
            let (page, version) = (PageIndex::new(page), Version::new(version));
            request.push(FetchPage { page, version, frame });
        }
        let outcome = self.ask(Request::Fetch(&request))?;
        for (&page, frame) in pages.iter().zip((0..32).map(FrameId::new)) {
            let expected = [(page * 7 + version) as u8; PAGE_SIZE];
            assert_eq!(*self.frames.bytes(frame), expected, "page {page}");
        }
        Ok(outcome)
    }
}

#[test]
fn what_the_server_refuses_goes_to_the_file_and_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    let mut spilling = Spilling::new(directory.path());
    assert_eq!(spilling.store(1, &[0, 1]), Ok(Outcome::Stored));
    assert_eq!(spilling.grow(8), Ok(Outcome::Grown { pages: PageCount::new(12) }));
    assert_eq!(spilling.grow(8), Ok(Outcome::Grown { pages: PageCount::new(20) }));
    assert_eq!(spilling.store(2, &[2, 3, 4, 5, 6, 19, 11]), Ok(Outcome::Stored));
    let mixed = spilling.fetch(2, &[5, 2, 19, 3, 4, 6, 11]);
    assert_eq!(mixed, Ok(Outcome::Fetched { server_nanos: 5 }));
    assert_eq!(spilling.fetch(2, &[4, 5, 6]), Ok(Outcome::Fetched { server_nanos: 0 }));
    assert_eq!(spilling.fetch(1, &[1, 0]), Ok(Outcome::Fetched { server_nanos: 5 }));
    // Over its end: nothing is ever there.
    let range = PageRange { start: PageIndex::new(3), count: PageCount::new(16) };
    assert_eq!(spilling.ask(Request::Release(&[range])), Ok(Outcome::Released));
    assert!(spilling.store.inner.pages.len() == 3);
    let error = spilling.fetch(2, &[5]).unwrap_err();
    assert!(matches!(error, StoreError::Disk { .. }), "{error}");
    assert_eq!(spilling.fetch(2, &[19]), Ok(Outcome::Fetched { server_nanos: 0 }));
}

#[test]
fn the_file_has_no_name_and_gives_room_back() {
    let directory = tempfile::tempdir().unwrap();
    let mut spilling = Spilling::new(directory.path());
    spilling.grow(16).unwrap();
    spilling.store(1, &[4, 5, 6, 7]).unwrap();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    let blocks = |spilling: &Spilling| {
        let file = spilling.store.file.as_ref().unwrap();
        rustix::fs::fstat(file.descriptor()).unwrap().st_blocks
    };
    let before = blocks(&spilling);
    let range = PageRange { start: PageIndex::new(4), count: PageCount::new(16) };
    spilling.ask(Request::Release(&[range])).unwrap();
    assert!(blocks(&spilling) < before);
}

#[test]
fn a_stale_version_and_a_changed_disk_are_found_out() {
    let directory = tempfile::tempdir().unwrap();
    let mut spilling = Spilling::new(directory.path());
    spilling.grow(8).unwrap();
    spilling.store(3, &[5, 6]).unwrap();
    let error = spilling.fetch(2, &[5]).unwrap_err().to_string();
    assert!(error.contains("page 5 version 2: version 3 is there"), "{error}");
    let file = spilling.store.file.as_ref().unwrap().descriptor();
    rustix::io::pwrite(file, b"x", PAGE_SIZE as u64 + 100).unwrap();
    let error = spilling.fetch(3, &[5]).unwrap_err().to_string();
    assert!(error.contains("does not match its checksum"), "{error}");
    assert!(error.contains(directory.path().to_str().unwrap()), "{error}");
    spilling.fetch(3, &[6]).unwrap();
}

#[test]
fn what_is_left_in_the_store_is_used_before_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let mut spilling = Spilling::new(directory.path());
    let before = spilling.store.kept_inside().get();
    spilling.store.inner.free = 3;
    spilling.grow(8).unwrap();
    assert_eq!(spilling.store.kept_inside(), PageCount::new(before + 3));
    assert_eq!(spilling.store.spilled(), PageCount::new(0));
    spilling.grow(8).unwrap();
    assert_eq!(spilling.store.kept_inside(), PageCount::new(before + 3));
    assert!(spilling.store.spilled() >= PageCount::new(8));
}

#[test]
fn a_store_without_a_file_stays_full() {
    let store = SpillStore::new(SmallStore::new(4), PageCount::new(4), None);
    let mut spilling = Spilling { store, frames: HeapFrames::new(4), next: 0 };
    assert!(matches!(spilling.grow(1), Err(StoreError::Full { .. })));
}

#[test]
fn a_store_without_a_file_grows_by_what_is_left() {
    let store = SpillStore::new(SmallStore::new(4), PageCount::new(4), None);
    let mut spilling = Spilling { store, frames: HeapFrames::new(32), next: 0 };
    spilling.store.inner.free = 3;
    assert_eq!(spilling.grow(8), Ok(Outcome::Grown { pages: PageCount::new(7) }));
    assert_eq!(spilling.store.kept_inside(), PageCount::new(7));
    assert_eq!(spilling.store(1, &[6]), Ok(Outcome::Stored));
    assert!(matches!(spilling.grow(8), Err(StoreError::Full { free: 0, .. })));
}

#[test]
fn a_directory_that_cannot_be_used_is_named() {
    let error = SpillFile::create(Path::new("/nowhere/at/all")).unwrap_err().to_string();
    assert!(error.contains("/nowhere/at/all") && error.contains("No such file"), "{error}");
}

/// A file system of 1 MiB, gone when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=1m", "farmem-test"])
            .arg(directory.path())
            .output();
        mount.is_ok_and(|output| output.status.success()).then_some(Self(directory))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_names_its_directory_and_the_remedy() {
    let Some(disk) = SmallDisk::mount() else {
        eprintln!("skipped: mounting a small tmpfs needs root");
        return;
    };
    let mut spilling = Spilling::new(disk.0.path());
    spilling.grow(128).unwrap();
    spilling.store(1, &[4, 130]).unwrap();
    let error = spilling.grow(256).unwrap_err();
    assert!(matches!(error, StoreError::DiskFull { asked: 0x10_0000, .. }), "{error}");
    let text = error.to_string();
    for part in [disk.0.path().to_str().unwrap(), "No space left", "--spill DIR"] {
        assert!(text.contains(part), "{text}");
    }
    // What was there still is, and there is room up to the old end.
    spilling.fetch(1, &[4, 130]).unwrap();
    spilling.store(2, &[131, 0]).unwrap();
    // Someone else fills the disk; a page that had its room given back finds none.
    let range = PageRange { start: PageIndex::new(4), count: PageCount::new(1) };
    spilling.ask(Request::Release(&[range])).unwrap();
    let _ = std::fs::write(disk.0.path().join("other"), vec![1; 1 << 20]);
    let error = spilling.store(3, &[4]).unwrap_err();
    assert!(matches!(error, StoreError::DiskFull { .. }), "{error}");
}
