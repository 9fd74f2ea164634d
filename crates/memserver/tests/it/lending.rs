//! What is lent: parts of files, copies that are filled from their originals, and pages that change
//! while they are on their way.

use std::fs;
use std::io::Write;

use farmem_memserver::ServerConfig;
use farmem_region::{PAGE_SIZE, PageIndex};
use farmem_wire::{Action, HEADER_BYTES, Header, PageEntry, Source, page_checksum, seal};

use crate::raw::{Raw, TestServer};

const PAGES: u64 = 64;
const BYTES: u64 = PAGES * PAGE_SIZE as u64;

fn start(directory: &tempfile::TempDir) -> TestServer {
    let path = directory.path().canonicalize().unwrap();
    TestServer::start(2048, move |config: &mut ServerConfig| {
        config.promise_percent = 1000;
        config.directories = vec![path];
    })
}

/// A file of 2 x 64 pages, the first of them full of 1, the second of 2, and so on.
fn file_in(directory: &tempfile::TempDir) -> String {
    let path = directory.path().canonicalize().unwrap().join("file");
    let bytes: Vec<u8> = (0..2 * PAGES).flat_map(|page| [1 + page as u8; PAGE_SIZE]).collect();
    fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A region of 64 pages from an offset of a file, in bytes.
fn part_of(server: &TestServer, name: &str, path: &str, offset: u64) -> Raw {
    let source = Source::File { path, offset };
    Raw::greeted(server).create(name, BYTES, 4096, source).unwrap();
    Raw::opened(server, name).unwrap()
}

/// Cap 10: portions are made ahead as the file has them, and need it no more.
#[test]
fn cap_1_cap_10_a_part_of_a_file_is_lent_and_brought_in_ahead() {
    let directory = tempfile::tempdir().unwrap();
    let server = start(&directory);
    let path = file_in(&directory);
    let mut part = part_of(&server, "part", &path, 32 * PAGE_SIZE as u64);
    assert_eq!(part.read(&[(0, 0), (63, 0)]), Ok(vec![33, 96]));
    let there = part.show().stored.get();
    assert!(there < 32, "{there}: only what is near what was read");
    part.over(Action::Prefetch, 0, 32).unwrap();
    fs::write(&path, vec![0; BYTES as usize * 2]).unwrap();
    assert_eq!(part.read(&[(1, 0), (31, 0)]), Ok(vec![34, 64]), "as it was when it was brought in");
    assert_eq!(part.read(&[(60, 0)]), Ok(vec![0]), "not brought in");
}

/// Parent and child after a fork: each has its part of one file, and both are written back.
#[test]
fn cap_22_two_parts_of_one_file_are_lent_and_written_back_apart() {
    let directory = tempfile::tempdir().unwrap();
    let server = start(&directory);
    let path = file_in(&directory);
    let mut parent = part_of(&server, "parent", &path, 0);
    let mut child = part_of(&server, "child", &path, BYTES);
    parent.write(&[(5, 1, 200)]).unwrap();
    child.write(&[(5, 1, 201), (63, 1, 202)]).unwrap();
    child.over(Action::Flush, 0, PAGES).unwrap();
    let in_file = |page: u64| fs::read(&path).unwrap()[page as usize * PAGE_SIZE];
    assert_eq!([in_file(5), in_file(64 + 5), in_file(127)], [6, 201, 202], "the child's alone");
    parent.over(Action::Flush, 0, PAGES).unwrap();
    assert_eq!([in_file(5), in_file(64 + 5), in_file(64)], [200, 201, 65]);
}

/// Cap 18: what a copy lacks comes from what its original was. Cap 19: a copy has a page of its own only
/// once it is written.
#[test]
fn cap_18_cap_19_a_copy_is_filled_from_its_original_and_copied_on_write() {
    let directory = tempfile::tempdir().unwrap();
    let server = start(&directory);
    let path = file_in(&directory);
    let mut original = part_of(&server, "original", &path, 0);
    original.write(&[(0, 1, 100), (1, 1, 101)]).unwrap();
    original.copy(Action::Clone, "copy", false).unwrap();
    let slots = server.stat().slots;
    let mut copy = Raw::opened(&server, "copy").unwrap();
    assert_eq!(copy.read(&[(0, 1), (1, 1)]), Ok(vec![100, 101]));
    assert_eq!(server.stat().slots, slots, "reading copies nothing");
    copy.write(&[(0, 2, 110)]).unwrap();
    assert_eq!(server.stat().slots, slots + 1, "writing copies what is written");
    // The original goes on, to its file too: the copy has what was there then, read or not.
    original.write(&[(1, 2, 111), (40, 1, 112)]).unwrap();
    original.over(Action::Flush, 0, PAGES).unwrap();
    assert_eq!(copy.read(&[(0, 2), (1, 1), (40, 0), (41, 0)]), Ok(vec![110, 101, 41, 42]));
    assert_eq!(original.read(&[(0, 1), (1, 2), (40, 1)]), Ok(vec![100, 111, 112]));
}

/// On another server, under another number, in other memory: the same contents.
#[test]
fn cap_60_contents_mean_the_same_wherever_they_lie() {
    let directory = tempfile::tempdir().unwrap();
    let (one, other) = (start(&directory), start(&directory));
    let backup = directory.path().canonicalize().unwrap().join("backup");
    let backup = backup.to_str().unwrap();
    Raw::greeted(&one).create("r", BYTES, 4096, Source::Fill(9)).unwrap();
    let mut region = Raw::opened(&one, "r").unwrap();
    (0..32).for_each(|page| region.write(&[(page, 3, page as u8)]).unwrap());
    region.back_up(backup, false).unwrap();
    let mut others = Raw::with_region(&other, 100);
    others.write(&[(0, 1, 1)]).unwrap();
    Raw::restore(&other, backup, "elsewhere", false).unwrap();
    let mut elsewhere = Raw::opened(&other, "elsewhere").unwrap();
    assert_ne!(elsewhere.session.region, region.session.region);
    for page in 0..32 {
        // Which compares the checksum, as it is bound to this region's number.
        assert_eq!(elsewhere.read_page(page), Ok((3, vec![page as u8; PAGE_SIZE])));
    }
    assert_eq!(elsewhere.read(&[(40, 0)]), Ok(vec![9]));
}

/// Replies wait in the server while another client writes all of their pages anew: they hold what was
/// there when they were made, page by page, and the writer waits for nobody.
#[test]
fn cap_92_pages_on_their_way_are_what_they_were_while_they_are_written() {
    const REQUESTS: u64 = 12;
    let server = TestServer::start(2048, |config| config.promise_percent = 1000);
    Raw::greeted(&server).create("r", BYTES, 4096, Source::Fill(0)).unwrap();
    let mut writer = Raw::opened(&server, "r").unwrap();
    let all = |version: u64| (0..PAGES).map(|page| (page, version, version as u8)).collect();
    let write = |writer: &mut Raw, version| {
        let pages: Vec<_> = all(version);
        writer.write(&pages).unwrap();
    };
    write(&mut writer, 1);
    let mut reader = writer.attach(&server, farmem_wire::AttachMode::Join, 0).unwrap();
    for request in 1..=REQUESTS {
        let header = Header { request, entries: PAGES as u32, ..reader.request(Action::Read) };
        let mut message = vec![0; HEADER_BYTES];
        for page in (0..PAGES).map(PageIndex::new) {
            PageEntry { page, ..PageEntry::default() }.encode(&mut message);
        }
        seal(header, &mut message);
        reader.stream.write_all(&message).unwrap();
    }
    // 3 MiB of replies do not fit in a socket: most wait, and that is less than the session may have.
    server.wait_until(|stat| stat.pages_read >= REQUESTS * PAGES);
    for version in 2..40 {
        write(&mut writer, version);
    }
    let mut former = 0;
    for _ in 0..REQUESTS {
        let (header, entries, payload) = reader.receive_all();
        assert_eq!(header.refusal, None);
        for (entry, page) in PageEntry::decode_all(&entries).zip(payload.chunks(PAGE_SIZE)) {
            let content: &[u8; PAGE_SIZE] = page.try_into().unwrap();
            assert_eq!(*content, [entry.version.get() as u8; PAGE_SIZE], "page {}", entry.page);
            let expected = page_checksum(header.region, entry.page, entry.version, content);
            assert_eq!(entry.checksum, expected);
            former += u64::from(entry.version.get() == 1);
        }
    }
    assert_eq!(former, REQUESTS * PAGES, "all were on their way");
    assert_eq!(reader.read(&[(0, 39), (63, 39)]), Ok(vec![39, 39]));
    drop((reader, writer));
    let slots = |stat: &farmem_wire::ServerStat| stat.slots == PAGES;
    server.wait_until(slots);
}
