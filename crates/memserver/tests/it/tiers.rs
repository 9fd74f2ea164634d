//! Cold pages leave memory and come back as they were.

use farmem_memserver::{FileTierConfig, ServerConfig};
use farmem_region::{ByteCount, PAGE_SIZE, PageCount};
use farmem_wire::{
    Action, HEADER_BYTES, Header, Hello, NO_SLOT, PageEntry, RefusalCode, Source, page_checksum,
    seal,
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

pub(crate) fn with_file(directory: &tempfile::TempDir) -> impl FnOnce(&mut ServerConfig) {
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
