//! Cold pages leave memory and come back as they were.

use farmem_memserver::{FileTierConfig, ServerConfig};
use farmem_region::{ByteCount, PAGE_SIZE, PageCount};
use farmem_wire::{
    Action, HEADER_BYTES, Header, Hello, NO_SLOT, PageEntry, RefusalCode, Source, Tier,
    page_checksum, seal,
};
use std::io::{Read, Write};

use crate::raw::{Raw, TestServer, patiently};

/// Memory of these servers, in pages: 4 MiB.
const MEMORY: u64 = 1024;

fn bytes(pages: u64) -> ByteCount {
    PageCount::new(pages).bytes()
}

fn compressed(config: &mut ServerConfig) {
    config.tiers.compressed = bytes(4 * MEMORY);
    config.limits.inflight_bytes = bytes(128);
}

fn with_file(directory: &tempfile::TempDir) -> impl FnOnce(&mut ServerConfig) {
    let directory = directory.path().to_owned();
    move |config| {
        compressed(config);
        config.tiers.file = Some(FileTierConfig { directory, size: bytes(8 * MEMORY) });
    }
}

/// A page whose bytes all differ from those of other pages and versions: compressible five times
/// or so, or not at all.
pub(crate) fn content(page: u64, version: u64, is_compressible: bool) -> [u8; PAGE_SIZE] {
    let mut content = [0; PAGE_SIZE];
    let mut word = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ version << 40 | 1;
    for (at, chunk) in content.chunks_mut(8).enumerate() {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        if !is_compressible || at % 8 == 0 {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
    }
    content
}

impl Raw {
    /// Writes pages of any content, as one message.
    pub(crate) fn write_pages(
        &mut self,
        pages: &[(u64, u64, [u8; PAGE_SIZE])],
    ) -> Result<(), RefusalCode> {
        let message = self.pages_message(pages);
        patiently(|| {
            self.stream.write_all(&message).unwrap();
            self.receive().0.refusal.map_or(Ok(()), Err)
        })
    }

    fn pages_message(&self, pages: &[(u64, u64, [u8; PAGE_SIZE])]) -> Vec<u8> {
        let mut header = self.request(Action::Write);
        header.entries = pages.len() as u32;
        header.payload = (pages.len() * PAGE_SIZE) as u32;
        let mut message = vec![0; HEADER_BYTES];
        for (page, version, content) in pages {
            let (page, version) = ((*page).into_page(), (*version).into_version());
            let checksum = page_checksum(header.region, page, version, content);
            PageEntry { page, version, checksum, slot: 0 }.encode(&mut message);
        }
        seal(header, &mut message);
        pages.iter().for_each(|(_, _, content)| message.extend_from_slice(content));
        message
    }

    /// Whether pages were written and that was acknowledged.
    pub(crate) fn try_write_pages(&mut self, pages: &[(u64, u64, [u8; PAGE_SIZE])]) -> bool {
        let message = self.pages_message(pages);
        let mut head = [0; HEADER_BYTES];
        self.stream.write_all(&message).is_ok()
            && self.stream.read_exact(&mut head).is_ok()
            && Header::decode(&head).unwrap().refusal.is_none()
    }

    /// One page, checked as a client checks it.
    pub(crate) fn read_page(&mut self, page: u64) -> Result<(u64, Vec<u8>), RefusalCode> {
        patiently(|| self.try_read_page(page))
    }

    fn try_read_page(&mut self, page: u64) -> Result<(u64, Vec<u8>), RefusalCode> {
        let header = Header { entries: 1, ..self.request(Action::Read) };
        let mut message = vec![0; HEADER_BYTES];
        PageEntry { page: page.into_page(), ..PageEntry::default() }.encode(&mut message);
        seal(header, &mut message);
        self.stream.write_all(&message).unwrap();
        let (reply, entry, payload) = self.receive_entry();
        if let Some(code) = reply.refusal {
            return Err(code);
        }
        let content: &[u8; PAGE_SIZE] = payload.as_slice().try_into().unwrap();
        let expected = page_checksum(header.region, page.into_page(), entry.version, content);
        assert_eq!(entry.checksum, expected, "page {page}");
        Ok((entry.version.get(), payload))
    }
}

trait Number {
    fn into_page(self) -> farmem_region::PageIndex;
    fn into_version(self) -> farmem_region::Version;
}

impl Number for u64 {
    fn into_page(self) -> farmem_region::PageIndex {
        farmem_region::PageIndex::new(self)
    }
    fn into_version(self) -> farmem_region::Version {
        farmem_region::Version::new(self)
    }
}

/// Writes all pages of a region in messages of 16, then reads all back.
fn fill_and_check(client: &mut Raw, pages: u64, is_compressible: bool) {
    for start in (0..pages).step_by(16) {
        let message: Vec<_> =
            (start..start + 16).map(|page| (page, 1, content(page, 1, is_compressible))).collect();
        client.write_pages(&message).unwrap();
    }
    for page in 0..pages {
        let (version, found) = client.read_page(page).unwrap();
        assert_eq!(version, 1);
        assert!(found == content(page, 1, is_compressible), "page {page} has changed");
    }
}

#[test]
fn cap_91_a_server_holds_more_than_its_memory_if_it_can_be_compressed() {
    let server = TestServer::start(MEMORY, compressed);
    let mut client = Raw::with_region(&server, 3 * MEMORY);
    fill_and_check(&mut client, 3 * MEMORY, true);
    let stat = server.stat();
    assert!(stat.compressed_pages > MEMORY && stat.slots <= MEMORY + 512, "{stat:?}");
    assert!(stat.compressed_bytes < stat.compressed_pages * 4096 / 2, "{stat:?}");
    assert_eq!((stat.memory_bytes, stat.promise_bytes), (4 << 20, 16 << 20));
    client.free(0, 3 * MEMORY).unwrap();
    drop(client);
    server.wait_until(|stat| stat.slots == 0 && stat.compressed_pages == 0);
}

#[test]
fn cap_91_what_cannot_be_compressed_goes_to_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let server = TestServer::start(MEMORY, with_file(&directory));
    let mut client = Raw::with_region(&server, 6 * MEMORY);
    fill_and_check(&mut client, 6 * MEMORY, false);
    let stat = server.stat();
    assert!(stat.file_bytes > 4 * MEMORY * 4096 && stat.slots <= MEMORY + 512, "{stat:?}");
    assert_eq!(fs_entries(&directory), 0, "the file has no name");
    client.free(0, 6 * MEMORY).unwrap();
    server.wait_until(|stat| stat.slots == 0 && stat.file_bytes == 0);
}

fn fs_entries(directory: &tempfile::TempDir) -> usize {
    std::fs::read_dir(directory.path()).unwrap().count()
}

#[test]
fn cap_14_eight_times_the_memory_over_all_tiers() {
    let directory = tempfile::tempdir().unwrap();
    let server = TestServer::start(MEMORY, with_file(&directory));
    let mut client = Raw::with_region(&server, 8 * MEMORY);
    fill_and_check(&mut client, 8 * MEMORY, true);
    let stat = server.stat();
    assert!(stat.compressed_pages > 0 && stat.file_bytes > 0, "{stat:?}");
}

#[test]
fn cap_11_pinned_pages_stay_and_prefetched_ones_come_back() {
    let server = TestServer::start(MEMORY, compressed);
    let mut client = Raw::greeted(&server);
    let size = bytes(2 * MEMORY).get();
    client.create("mixed", size, 4096, Source::Fill(0)).unwrap();
    let mut region = Raw::opened(&server, "mixed").unwrap();
    region.write_pages(&[(0, 1, content(0, 1, true)), (1, 1, content(1, 1, true))]).unwrap();
    region.over(Action::Pin, 0, 64).unwrap();
    for page in 64..2 * MEMORY {
        region.write_pages(&[(page, 1, content(page, 1, true))]).unwrap();
    }
    let info = region.show();
    assert!(info.compressed.get() > 0 && info.pinned.get() == 64, "{info:?}");
    // Other copies of the region do not decide about its pinned pages.
    region.copy(Action::Clone, "copy", false).unwrap();
    let mut copy = Raw::opened(&server, "copy").unwrap();
    for page in 64..512 {
        copy.write_pages(&[(page, 2, content(page, 2, true))]).unwrap();
    }
    let before = server.stat().promoted_pages;
    assert!(region.read_page(0).is_ok() && region.read_page(63).is_ok());
    assert_eq!(server.stat().promoted_pages, before);
    assert!(region.over(Action::Prefetch, 64, 256).unwrap() > 0);
    for page in 64..320 {
        assert!(region.read_page(page).unwrap().1 == content(page, 1, true));
    }
}

#[test]
fn cap_17_copies_share_what_left_memory() {
    let directory = tempfile::tempdir().unwrap();
    let server = TestServer::start(MEMORY, |config| {
        with_file(&directory)(config);
        config.promise_percent = 1000;
    });
    let mut client = Raw::greeted(&server);
    client.create("0", bytes(2 * MEMORY).get(), 4096, Source::Fill(0)).unwrap();
    let mut base = Raw::opened(&server, "0").unwrap();
    for page in 0..MEMORY / 2 {
        base.write_pages(&[(page, 1, content(page, 1, page % 2 == 0))]).unwrap();
    }
    for name in ["1", "2", "3"] {
        base.copy(Action::Clone, name, false).unwrap();
        // So that the leaf is the copy's own, and only the pages are shared.
        Raw::opened(&server, name).unwrap().write_pages(&[(0, 2, content(0, 2, true))]).unwrap();
    }
    client.create("big", bytes(4 * MEMORY).get(), 4096, Source::Fill(0)).unwrap();
    let mut big = Raw::opened(&server, "big").unwrap();
    fill_and_check(&mut big, 4 * MEMORY, true);
    for name in ["0", "1", "2", "3"] {
        let mut copy = Raw::opened(&server, name).unwrap();
        for page in 1..MEMORY / 2 {
            assert!(copy.read_page(page).unwrap().1 == content(page, 1, page % 2 == 0));
        }
    }
    drop((client, big, base));
    for name in ["0", "1", "2", "3", "big"] {
        Raw::opened(&server, name).unwrap().delete().unwrap();
    }
    server.wait_until_empty();
    let stat = server.stat();
    assert_eq!((stat.compressed_pages, stat.file_bytes), (0, 0));
}

#[test]
fn a_slot_whose_page_has_left_is_told_as_none() {
    let server = TestServer::start(MEMORY, |config| {
        compressed(config);
        config.share_arena = true;
    });
    let mut client = Raw::silent(&server);
    let hello = Hello { oldest: 1, newest: 1, share_arena: true };
    client.call(Header::request(Action::Hello, 0), |out| hello.encode(out));
    client.setup(3 * MEMORY, false, false).unwrap();
    client.malloc(0, 3 * MEMORY).unwrap();
    for page in 0..3 * MEMORY {
        client.write_pages(&[(page, 1, content(page, 1, true))]).unwrap();
    }
    let mut gone = 0;
    for page in 0..3 * MEMORY {
        let header = Header { entries: 1, ..client.request(Action::Read) };
        let mut message = vec![0; HEADER_BYTES];
        PageEntry { page: page.into_page(), ..PageEntry::default() }.encode(&mut message);
        seal(header, &mut message);
        client.stream.write_all(&message).unwrap();
        let (_, entry, payload) = client.receive_entry();
        assert!(payload == content(page, 1, true));
        gone += u64::from(entry.slot == NO_SLOT);
    }
    assert!(gone > MEMORY, "{gone}: {:?}", server.stat());
}

/// Random operations on regions that are copied from each other, against plain vectors. The tiers
/// are so small that pages move all the time.
#[test]
fn every_operation_agrees_with_a_plain_vector() {
    for seed in 0..6 {
        // A disk would be asked for thousands of single pages.
        let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let server = TestServer::start(256, |config| {
            with_file(&directory)(config);
            config.promise_percent = 1000;
            config.limits.inflight_bytes = bytes(64);
            config.directories = vec![directory.path().canonicalize().unwrap()];
        });
        let mut model = Model::new(&server, seed);
        model.backups = Some(directory.path().canonicalize().unwrap());
        model.run(2500);
        drop(server);
    }
}

const MODEL_PAGES: u64 = 700;

/// Asks again while the server is busy, as clients do.
fn while_busy<T>(mut ask: impl FnMut() -> Result<T, RefusalCode>) -> Result<T, RefusalCode> {
    let began = std::time::Instant::now();
    loop {
        match ask() {
            Err(RefusalCode::Busy) if began.elapsed().as_secs() < 20 => {}
            result => return result,
        }
    }
}

pub(crate) struct Model<'a> {
    server: &'a TestServer,
    regions: Vec<Modelled>,
    random: u64,
    version: u64,
    made: u64,
    /// Where backups may be made.
    pub(crate) backups: Option<std::path::PathBuf>,
}

struct Modelled {
    name: String,
    client: Raw,
    /// For each page the version written, 0 for none.
    pages: Vec<u64>,
    pins: Vec<bool>,
    is_frozen: bool,
}

impl Modelled {
    fn len(&self) -> u64 {
        self.pages.len() as u64
    }
}

impl<'a> Model<'a> {
    pub(crate) fn new(server: &'a TestServer, seed: u64) -> Self {
        let random = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1;
        let mut model =
            Self { server, regions: Vec::new(), random, version: 0, made: 0, backups: None };
        model.create();
        model
    }

    fn next(&mut self, limit: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % limit
    }

    fn create(&mut self) {
        let name = format!("region {}", self.made);
        self.made += 1;
        let mut admin = Raw::greeted(self.server);
        admin.create(&name, MODEL_PAGES * 4096, 4096, Source::Fill(9)).unwrap();
        let client = Raw::opened(self.server, &name).unwrap();
        let (pages, pins) = (vec![0; MODEL_PAGES as usize], vec![false; MODEL_PAGES as usize]);
        self.regions.push(Modelled { name, client, pages, pins, is_frozen: false });
    }

    pub(crate) fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            let at = self.next(self.regions.len() as u64) as usize;
            let pages = self.regions[at].len();
            let start = self.next(pages);
            let count = (1 + self.next(40)).min(pages - start);
            match self.next(100) {
                0..45 => self.write(at, start, count.min(16)),
                45..80 => self.check(at, start, count.min(16)),
                80..86 => self.invalidate(at, start, count),
                86..89 => self.bring(at, Action::Initialise, start, count),
                89..92 => self.bring(at, Action::Prefetch, start, count),
                92..93 => self.pin(at, start, count.min(8)),
                93..94 => self.unpin(at),
                94..95 if self.next(2) == 0 => self.resize(at),
                94..95 => self.prefer(at, start, count),
                95..97 if self.regions.len() < 6 => self.copy(at),
                97..98 if self.regions.len() < 8 => self.back_up(at),
                98..99 if self.regions.len() > 1 => self.delete(at),
                99..100 if self.server.process.is_some() && self.next(2) == 0 => self.kill(at),
                99..100 if self.server.hands_over && self.next(2) == 0 => self.kill(at),
                _ => {}
            }
        }
        for at in 0..self.regions.len() {
            self.check(at, 0, self.regions[at].len());
        }
        while !self.regions.is_empty() {
            self.delete(0);
        }
        self.server.wait_until_empty();
        let stat = self.server.stat();
        assert_eq!((stat.compressed_pages, stat.file_bytes, stat.pinned_pages), (0, 0, 0));
        // A process that was killed has not counted to its end.
        assert!(stat.demoted_pages > 500 || self.server.process.is_some(), "{stat:?}");
    }

    /// Kills the server in the midst of writes to a region. Those that it has acknowledged must all
    /// be there, the others may be.
    /// Ends the server in the midst of writes, and has another one go on.
    fn kill(&mut self, at: usize) {
        let pause = std::time::Duration::from_micros(self.next(1500));
        let pages = self.regions[at].len();
        let writes: Vec<(u64, u64)> = (0..40)
            .map(|_| {
                self.version += 1;
                (self.next(pages - 16), self.version)
            })
            .collect();
        let server = self.server;
        let region = &mut self.regions[at];
        let acknowledged = std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(pause);
                match &server.process {
                    Some(process) => process.lock().unwrap().kill(),
                    None => server.hand_over(),
                }
            });
            let heard = writes.iter().take_while(|(start, version)| {
                let pages: Vec<_> = (*start..start + 16)
                    .map(|page| (page, *version, content(page, *version, version % 3 != 0)))
                    .collect();
                !region.is_frozen && region.client.try_write_pages(&pages)
            });
            heard.count()
        });
        if let Some(process) = &server.process {
            process.lock().unwrap().start_again();
        }
        for region in &mut self.regions {
            region.client = Raw::opened(server, &region.name).unwrap();
        }
        let region = &mut self.regions[at];
        if region.is_frozen {
            return;
        }
        for (start, version) in &writes[..acknowledged] {
            region.pages[*start as usize..*start as usize + 16].fill(*version);
        }
        let Some((start, version)) = writes.get(acknowledged) else {
            return;
        };
        for page in *start..start + 16 {
            let (found, _) = region.client.read_page(page).unwrap();
            let known = &mut region.pages[page as usize];
            assert!(found == *known || found == *version, "page {page}: {found}, not {known}");
            *known = found;
        }
    }

    fn write(&mut self, at: usize, start: u64, count: u64) {
        self.version += 1;
        let version = self.version;
        let region = &mut self.regions[at];
        let message: Vec<_> = (start..start + count)
            .map(|page| (page, version, content(page, version, !version.is_multiple_of(3))))
            .collect();
        let written = region.client.write_pages(&message);
        if region.is_frozen {
            assert_eq!(written, Err(RefusalCode::Frozen));
            return;
        }
        assert_eq!(written, Ok(()));
        region.pages[start as usize..(start + count) as usize].fill(version);
    }

    fn check(&mut self, at: usize, start: u64, count: u64) {
        let region = &mut self.regions[at];
        for page in start..start + count {
            let (version, found) = region.client.read_page(page).unwrap();
            let expected = region.pages[page as usize];
            assert_eq!(version, expected, "{} page {page}", region.name);
            match expected {
                0 => assert!(found == [9; PAGE_SIZE]),
                _ => assert!(found == content(page, version, !version.is_multiple_of(3))),
            }
        }
    }

    fn invalidate(&mut self, at: usize, start: u64, count: u64) {
        let region = &mut self.regions[at];
        let range = start as usize..(start + count) as usize;
        let result = patiently(|| region.client.over(Action::Invalidate, start, count));
        if region.is_frozen {
            assert_eq!(result, Err(RefusalCode::Frozen));
        } else if region.pins[range.clone()].contains(&true) {
            assert_eq!(result, Err(RefusalCode::Pinned));
        } else {
            // Pages that were made, but never written, are freed as well.
            if region.pages[range.clone()].iter().any(|version| *version > 0) {
                result.unwrap();
            } else {
                assert!(matches!(result, Ok(_) | Err(RefusalCode::AlreadyFree)), "{result:?}");
            }
            region.pages[range].fill(0);
        }
    }

    fn bring(&mut self, at: usize, action: Action, start: u64, count: u64) {
        patiently(|| self.regions[at].client.over(action, start, count)).unwrap();
    }

    fn pin(&mut self, at: usize, start: u64, count: u64) {
        let pinned: usize =
            self.regions.iter().flat_map(|region| &region.pins).filter(|pin| **pin).count();
        if pinned > 100 {
            return;
        }
        let region = &mut self.regions[at];
        patiently(|| region.client.over(Action::Pin, start, count)).unwrap();
        region.pins[start as usize..(start + count) as usize].fill(true);
    }

    fn unpin(&mut self, at: usize) {
        let region = &mut self.regions[at];
        let pages = region.len();
        patiently(|| region.client.over(Action::Unpin, 0, pages)).unwrap();
        region.pins.fill(false);
    }

    fn resize(&mut self, at: usize) {
        let pages = MODEL_PAGES / 2 + self.next(MODEL_PAGES / 2 + 1);
        let region = &mut self.regions[at];
        let result = patiently(|| region.client.resize(pages));
        if region.is_frozen {
            assert_eq!(result, Err(RefusalCode::Frozen));
        } else if region.pins.iter().skip(pages as usize).any(|pin| *pin) {
            assert_eq!(result, Err(RefusalCode::Pinned));
        } else {
            assert_eq!(result.unwrap().pages.get(), pages);
            region.pages.resize(pages as usize, 0);
            region.pins.resize(pages as usize, false);
        }
    }

    fn prefer(&mut self, at: usize, start: u64, count: u64) {
        let tiers = [None, Some(Tier::Dram), Some(Tier::Compressed), Some(Tier::File)];
        let tier = tiers[self.next(4) as usize];
        let result = patiently(|| self.regions[at].client.prefer(tier, start, count));
        assert!(matches!(result, Ok(_) | Err(RefusalCode::NoTier)), "{result:?}");
    }

    fn copy(&mut self, at: usize) {
        let name = format!("region {}", self.made);
        self.made += 1;
        let (is_frozen, on_access) = (self.next(3) == 0, self.next(3) == 0);
        let action = if is_frozen { Action::Snapshot } else { Action::Clone };
        let region = &mut self.regions[at];
        patiently(|| region.client.copy(action, &name, on_access)).unwrap();
        let client = Raw::opened(self.server, &name).unwrap();
        let (pages, pins) = (region.pages.clone(), vec![false; region.pages.len()]);
        self.regions.push(Modelled { name, client, pages, pins, is_frozen });
    }

    /// Backs a region up and makes another one from that, after some more was written.
    fn back_up(&mut self, at: usize) {
        let Some(directory) = self.backups.clone() else {
            return;
        };
        let path = directory.join(format!("backup{}", self.next(3)));
        let path = path.to_str().unwrap();
        let is_full = self.next(4) == 0;
        while_busy(|| self.regions[at].client.back_up(path, is_full)).unwrap();
        let pages = self.regions[at].pages.clone();
        let start = self.next(self.regions[at].len() - 8);
        self.write(at, start, 8);
        let name = format!("region {}", self.made);
        self.made += 1;
        while_busy(|| Raw::restore(self.server, path, &name, false)).unwrap();
        let client = Raw::opened(self.server, &name).unwrap();
        let pins = vec![false; pages.len()];
        self.regions.push(Modelled { name, client, pages, pins, is_frozen: false });
        let last = self.regions.len() - 1;
        self.check(last, 0, self.regions[last].len());
    }

    fn delete(&mut self, at: usize) {
        self.unpin(at);
        self.regions.swap_remove(at).client.delete().unwrap();
    }
}
