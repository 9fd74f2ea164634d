//! Disks that are full or lose what they were given: told, and nothing else is disturbed.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use farmem_memserver::{DistantRegion, FileTierConfig, Neighbours, ServerConfig};
use farmem_region::{ByteCount, PageCount, PageIndex};
use farmem_wire::{Action, Header, PageEntry, RefusalCode, Source};

use crate::raw::{Raw, TestServer};
use crate::tiers::content;

/// Memory of these servers, in pages.
const MEMORY: u64 = 1024;

/// A server whose file tier believes that it may have `pages`.
fn with_file_tier(directory: &Path, pages: u64) -> impl FnOnce(&mut ServerConfig) {
    let directory = directory.to_owned();
    move |config| {
        let size = PageCount::new(pages).bytes();
        config.tiers.file = Some(FileTierConfig { directory, size });
        config.limits.inflight_bytes = ByteCount::new(512 << 10);
    }
}

/// A file system of that many bytes, while this lives.
pub(crate) struct SmallDisk {
    pub(crate) path: PathBuf,
    /// That it is mounted at, if it was made for it.
    directory: Option<tempfile::TempDir>,
}

impl SmallDisk {
    /// `None` where mounting is not permitted; says so.
    pub(crate) fn mount(bytes: u64) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mut disk = Self::mount_at(directory.path(), bytes)?;
        disk.directory = Some(directory);
        Some(disk)
    }

    /// As [`SmallDisk::mount`], at a directory that is there.
    pub(crate) fn mount_at(path: &Path, bytes: u64) -> Option<Self> {
        let mount = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "farmem-test"])
            .arg(path)
            .output()
            .unwrap();
        if mount.status.success() {
            return Some(Self { path: path.to_owned(), directory: None });
        }
        assert!(std::env::var_os("CI").is_none(), "not possible in CI: {mount:?}");
        eprintln!("skipped: {}", String::from_utf8_lossy(&mount.stderr));
        None
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // The server has the file open until it has ended.
        let _ = Command::new("umount").arg("-l").arg(&self.path).status();
    }
}

#[test]
fn cap_90_a_disk_that_is_full_sooner_than_promised_refuses_and_loses_nothing() {
    const DISK: u64 = 512;
    let Some(disk) = SmallDisk::mount(DISK * 4096) else { return };
    let server = TestServer::start(MEMORY, with_file_tier(&disk.path, 4 * MEMORY));
    let mut client = Raw::with_region(&server, 4 * MEMORY);
    let mut other = Raw::with_region(&server, 16);
    other.write_pages(&[(3, 1, content(3, 1, false))]).unwrap();
    let mut written = 0;
    let refusal = loop {
        match client.write_pages(&[(written, 1, content(written, 1, false))]) {
            Ok(()) => written += 1,
            Err(RefusalCode::Busy) => {}
            Err(code) => break code,
        }
        // Arenas come in chunks of 512 slots.
        assert!(written < MEMORY + DISK + 1024, "more than there is room for");
    };
    assert_eq!(refusal, RefusalCode::Full);
    assert!(written > MEMORY, "{written}");
    assert!(server.logs("cannot write to the file tier"));
    // All that was acknowledged is there, and nobody else has lost anything.
    for page in 0..written {
        assert!(client.read_page(page).unwrap().1 == content(page, 1, false), "page {page}");
    }
    assert!(other.read_page(3).unwrap().1 == content(3, 1, false));
    // What is freed can be used again.
    client.free(0, written / 2).unwrap();
    for page in 0..written / 4 {
        client.write_pages(&[(page, 2, content(page, 2, false))]).unwrap();
    }
    for page in 0..written / 4 {
        assert!(client.read_page(page).unwrap().1 == content(page, 2, false), "page {page}");
    }
}

#[test]
fn a_file_tier_that_lost_its_content_refuses_what_was_there_and_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let server = TestServer::start(MEMORY, with_file_tier(directory.path(), 4 * MEMORY));
    let mut client = Raw::with_region(&server, 2 * MEMORY);
    for page in 0..2 * MEMORY {
        client.write_pages(&[(page, 1, content(page, 1, false))]).unwrap();
    }
    cut_files_in(directory.path());
    let (mut lost, mut there) = (0, 0);
    for page in 0..2 * MEMORY {
        match client.read_page(page) {
            Ok((_, found)) => {
                assert!(found == content(page, 1, false), "page {page} is another one");
                there += 1;
            }
            Err(code) => {
                assert_eq!(code, RefusalCode::TierFailed);
                lost += 1;
            }
        }
    }
    assert!(lost > MEMORY / 2 && there > MEMORY / 2, "{lost} and {there}");
    assert!(server.stat().tier_failures >= lost && server.logs("lost a page in a slower tier"));
    // A page that is lost can be written anew.
    let mut other = Raw::with_region(&server, 16);
    other.write_pages(&[(0, 1, content(0, 1, true))]).unwrap();
    for page in 0..2 * MEMORY {
        client.write_pages(&[(page, 2, content(page, 2, false))]).unwrap();
    }
    for page in 0..2 * MEMORY {
        assert!(client.read_page(page).unwrap().1 == content(page, 2, false), "page {page}");
    }
    assert!(other.read_page(0).unwrap().1 == content(0, 1, true));
}

/// Whoever reads several pages is told which one is lost, wherever the others lie.
#[test]
fn a_read_of_several_pages_names_the_one_that_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let server = TestServer::start(MEMORY, with_file_tier(directory.path(), 4 * MEMORY));
    let mut client = Raw::with_region(&server, 2 * MEMORY);
    for page in 0..2 * MEMORY {
        client.write_pages(&[(page, 1, content(page, 1, false))]).unwrap();
    }
    cut_files_to(directory.path(), MEMORY / 2 * 4096);
    let lost = |page: &u64| client.read_page(*page).is_err();
    let (lost, there): (Vec<u64>, Vec<u64>) = (0..2 * MEMORY).partition(lost);
    assert!(lost.len() as u64 > MEMORY / 8 && there.len() as u64 > MEMORY, "{}", lost.len());
    for (lost, there) in lost.iter().cycle().zip(&there) {
        let header = Header { entries: 2, ..client.request(Action::Read) };
        let (reply, entries, _) = client.call_all(header, |out| {
            for page in [there, lost] {
                let page = PageIndex::new(*page);
                PageEntry { page, ..PageEntry::default() }.encode(out);
            }
        });
        assert_eq!(reply.refusal, Some(RefusalCode::TierFailed));
        let blamed = PageEntry::decode_all(&entries).next().unwrap();
        assert_eq!(blamed.page.get(), *lost, "read with {there}");
    }
}

/// Cuts the files without names that this process has open in a directory, as somebody else could
/// with access to it.
fn cut_files_in(directory: &Path) {
    cut_files_to(directory, 0);
}

fn cut_files_to(directory: &Path, bytes: u64) {
    let device = std::fs::metadata(directory).unwrap().dev();
    let mut cut = 0;
    for entry in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        if target.starts_with(directory) {
            let file = std::fs::OpenOptions::new().write(true).open(entry.path()).unwrap();
            assert_eq!(file.metadata().unwrap().dev(), device);
            file.set_len(bytes).unwrap();
            cut += 1;
        }
    }
    assert_eq!(cut, 1, "the file tier's");
}

/// What another server's region is on, and what its disk has.
#[derive(Default)]
struct Disk {
    kept: Vec<u8>,
    cache: Vec<(u64, Vec<u8>)>,
    /// How often it fails yet. Then it forgets what it was given, and does not tell again.
    failures: u32,
}

struct OnDisk(Arc<Mutex<Disk>>);

impl DistantRegion for OnDisk {
    fn identity(&self) -> (farmem_region::Incarnation, farmem_region::RegionId) {
        Default::default()
    }

    fn size(&mut self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().kept.len() as u64)
    }

    fn read(&mut self, bytes: std::ops::Range<u64>) -> io::Result<Vec<u8>> {
        Ok(self.0.lock().unwrap().kept[bytes.start as usize..bytes.end as usize].to_vec())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap().cache.push((at, bytes.to_vec()));
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        let given = std::mem::take(&mut disk.cache);
        if disk.failures > 0 {
            disk.failures -= 1;
            return Err(io::Error::other("the disk has failed"));
        }
        for (at, bytes) in given {
            disk.kept[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        }
        Ok(())
    }
}

/// fsync(2) reports a failure once, and forgets what could not be written.
#[test]
fn cap_15_what_a_disk_has_lost_is_dirty_again() {
    // Each flush asks twice, as a connection may have been cut.
    let disk = Disk { kept: vec![7; 600 * 4096], failures: 2, ..Disk::default() };
    let disk = Arc::new(Mutex::new(disk));
    let there = Arc::clone(&disk);
    let server = TestServer::start(2048, |config| {
        config.promise_percent = 1000;
        config.neighbours =
            Some(Neighbours::new(move |_, _, _| Ok(Box::new(OnDisk(Arc::clone(&there))))));
    });
    let source =
        Source::Server { address: "other:1", region: "there", offset: 0, writes_back: true };
    for (name, page_bytes) in [("usual", 4096), ("large", 64 << 10)] {
        let failures = std::mem::replace(&mut disk.lock().unwrap().failures, 2);
        assert_eq!(failures, if name == "usual" { 2 } else { 0 });
        Raw::greeted(&server).create(name, 592 * 4096, page_bytes, source).unwrap();
        let mut region = Raw::opened(&server, name).unwrap();
        region.write(&[(0, 1, 9), (5, 1, 8), (590, 1, 6)]).unwrap();
        assert_eq!(region.over(Action::Flush, 0, 592), Err(RefusalCode::SourceAway));
        let lost = |page: usize| disk.lock().unwrap().kept[page * 4096] == 7;
        assert!(lost(0) || name == "large");
        // Who has failed is not asked again for a moment.
        let until = Instant::now() + Duration::from_secs(20);
        while region.over(Action::Flush, 0, 592).is_err() {
            assert!(Instant::now() < until);
            std::thread::yield_now();
        }
        let disk = disk.lock().unwrap();
        for (page, byte) in [(0, 9), (1, 7), (5, 8), (590, 6)] {
            assert!(disk.kept[page * 4096..(page + 1) * 4096] == [byte; 4096], "{name}: {page}");
        }
    }
}
