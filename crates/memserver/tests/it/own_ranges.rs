//! Clones that have a range of a file of their own: given at once, filled by the first flush, refused where
//! somebody else has it.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use farmem_region::{PAGE_SIZE, PageCount, PageIndex, PageRange};
use farmem_wire::{
    Action, AttachMode, Copy, FileRange, Header, Progress, RangeEntry, RefusalCode, RegionInfo,
    Source, TakenBody,
};

use crate::faults::SmallDisk;
use crate::raw::{Raw, TestServer, patiently};
use crate::restart::{in_a_process, in_memory};

const PAGES: u64 = 64;
const BYTES: u64 = PAGES * PAGE_SIZE as u64;

struct Rig {
    server: TestServer,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

/// A server, and a file of so many ranges, of which page n is full of n.
fn rig(ranges: u64) -> Rig {
    let directory = tempfile::tempdir().unwrap();
    let allowed = directory.path().canonicalize().unwrap().join("allowed");
    fs::create_dir(&allowed).unwrap();
    let path = allowed.join("file");
    let server = TestServer::start(2048, move |config| {
        config.promise_percent = 1000;
        config.directories = vec![allowed];
    });
    let bytes: Vec<u8> = (0..ranges * PAGES).flat_map(|page| [page as u8; PAGE_SIZE]).collect();
    fs::write(&path, bytes).unwrap();
    Rig { server, path, _directory: directory }
}

impl Rig {
    fn create(&self, name: &str, offset: u64) -> Result<Raw, RefusalCode> {
        let source = Source::File { path: self.path.to_str().unwrap(), offset };
        Raw::greeted(&self.server).create(name, BYTES, 4096, source)?;
        Raw::opened(&self.server, name)
    }

    fn clone_at(&self, of: &mut Raw, name: &str, offset: u64) -> Result<Raw, RefusalCode> {
        clone_in(of, name, "", offset)?;
        Raw::opened(&self.server, name)
    }

    /// The byte of which each page of the file is full.
    fn pages(&self) -> Vec<u8> {
        let file = fs::read(&self.path).unwrap();
        let byte = |page: &[u8]| {
            assert!(page.iter().all(|byte| *byte == page[0]), "a torn page");
            page[0]
        };
        file.chunks(PAGE_SIZE).map(byte).collect()
    }
}

fn clone_in(of: &mut Raw, name: &str, path: &str, offset: u64) -> Result<RegionInfo, RefusalCode> {
    let range = Some(FileRange { path, offset });
    patiently(|| of.copy_to(Action::Clone, &Copy { on_access: false, name, range }))
}

fn read_all(region: &mut Raw) -> Vec<u8> {
    let pages: Vec<_> = (0..PAGES).map(|page| (page, 0)).collect();
    patiently(|| region.read(&pages)).unwrap()
}

fn flush(region: &mut Raw) -> Result<u64, RefusalCode> {
    region.over(Action::Flush, 0, PAGES)
}

#[test]
fn cap_22_cap_30_a_clone_is_written_to_its_own_range_and_the_parent_to_its() {
    let rig = rig(2);
    let mut parent = rig.create("parent", 0).unwrap();
    parent.write(&[(1, 1, 201), (2, 1, 202)]).unwrap();
    let (stat, file) = (rig.server.stat(), rig.pages());
    let mut child = rig.clone_at(&mut parent, "child", BYTES).unwrap();
    let now = rig.server.stat();
    assert_eq!((now.slots, now.table_bytes), (stat.slots, stat.table_bytes), "nothing is copied");
    assert_eq!(rig.pages(), file, "and nothing written");
    let info = child.show();
    assert!(info.is_unfilled && info.writes_back && info.is_file);
    assert_eq!(info.dirty.get(), PAGES, "none of it is in its range");
    // Both go on. What the child never touched is what the parent was, though that is flushed since.
    parent.write(&[(2, 2, 212), (40, 1, 240)]).unwrap();
    child.write(&[(3, 1, 203)]).unwrap();
    flush(&mut parent).unwrap();
    let mut expected: Vec<u8> = (0..PAGES as u8).collect();
    (expected[1], expected[2], expected[3]) = (201, 202, 203);
    // Some of it is not looked at before it is flushed.
    assert_eq!(child.read(&[(2, 0), (40, 0)]), Ok(vec![202, 40]));
    assert_eq!(flush(&mut child), Ok(PAGES));
    let file = rig.pages();
    assert_eq!(file[PAGES as usize..], expected);
    assert_eq!([file[1], file[2], file[3], file[40]], [201, 212, 3, 240], "the parent's own");
    assert_eq!(read_all(&mut child), expected);
    let info = child.show();
    assert!(!info.is_unfilled);
    assert_eq!(info.dirty.get(), 0);
    // From now on only what is dirty is written, and what is absent is read from the own range.
    child.write(&[(5, 1, 205)]).unwrap();
    assert_eq!(flush(&mut child), Ok(1));
    child.over(Action::Invalidate, 0, PAGES).unwrap();
    let other = OpenOptions::new().write(true).open(&rig.path).unwrap();
    other.write_all_at(&[77; PAGE_SIZE], BYTES + 9 * PAGE_SIZE as u64).unwrap();
    (expected[5], expected[9]) = (205, 77);
    assert_eq!(read_all(&mut child), expected);
}

#[test]
fn cap_22_what_a_clone_inherited_dirty_stays_dirty_for_the_parent() {
    let rig = rig(2);
    let mut parent = rig.create("parent", 0).unwrap();
    parent.write(&[(1, 1, 201), (2, 1, 202)]).unwrap();
    let mut child = rig.clone_at(&mut parent, "child", BYTES).unwrap();
    // They are the same pages, in the same part of the tables.
    flush(&mut child).unwrap();
    assert_eq!(parent.show().dirty.get(), 2);
    assert_eq!(flush(&mut parent), Ok(2));
    assert_eq!(rig.pages()[1..3], [201, 202]);
    // And the other way round.
    let mut again = rig.clone_at(&mut child, "again", 0).map(|_| ()).unwrap_err();
    assert_eq!(again, RefusalCode::RangeTaken);
    child.delete().unwrap();
    parent.write(&[(1, 2, 211)]).unwrap();
    let mut second = rig.clone_at(&mut parent, "second", BYTES).unwrap();
    flush(&mut parent).unwrap();
    assert_eq!(second.show().dirty.get(), PAGES, "its range holds what the former one wrote");
    flush(&mut second).unwrap();
    assert_eq!(rig.pages()[PAGES as usize + 1], 211);
    again = rig.clone_at(&mut second, "third", BYTES).map(|_| ()).unwrap_err();
    assert_eq!(again, RefusalCode::RangeTaken);
}

#[test]
fn cap_22_copies_of_a_clone_are_what_it_was_before_and_after_its_range_is_filled() {
    let rig = rig(4);
    let mut parent = rig.create("parent", 0).unwrap();
    let mut child = rig.clone_at(&mut parent, "child", BYTES).unwrap();
    child.write(&[(1, 1, 201)]).unwrap();
    child.copy(Action::Snapshot, "before", false).unwrap();
    let mut grandchild = rig.clone_at(&mut child, "grandchild", 2 * BYTES).unwrap();
    let mut before = Raw::opened(&rig.server, "before").unwrap();
    child.write(&[(2, 1, 202)]).unwrap();
    parent.write(&[(50, 1, 250)]).unwrap();
    flush(&mut child).unwrap();
    flush(&mut parent).unwrap();
    child.copy(Action::Snapshot, "after", false).unwrap();
    let mut after = Raw::opened(&rig.server, "after").unwrap();
    child.write(&[(3, 1, 203), (60, 1, 160)]).unwrap();
    assert_eq!(flush(&mut child), Ok(2));
    let mut expected: Vec<u8> = (0..PAGES as u8).collect();
    expected[1] = 201;
    assert_eq!(read_all(&mut before), expected);
    assert_eq!(flush(&mut grandchild), Ok(PAGES));
    assert_eq!(read_all(&mut grandchild), expected);
    assert_eq!(rig.pages()[2 * PAGES as usize..3 * PAGES as usize], expected);
    expected[2] = 202;
    assert_eq!(read_all(&mut after), expected);
    // Nothing of it needs those that it comes from.
    parent.delete().unwrap();
    child.delete().unwrap();
    assert_eq!(read_all(&mut after), expected);
}

#[test]
fn cap_22_a_range_that_another_region_has_is_refused_at_its_edges() {
    let rig = rig(6);
    let page = PAGE_SIZE as u64;
    let mut parent = rig.create("parent", BYTES).unwrap();
    for offset in [page, BYTES, 2 * BYTES - page] {
        let range = Some(FileRange { path: "", offset });
        let copy = Copy { on_access: false, name: "child", range };
        let (reply, body) = parent.call(parent.request(Action::Clone), |out| copy.encode(out));
        assert_eq!(reply.refusal, Some(RefusalCode::RangeTaken));
        let (asked, taken) = (offset..offset + BYTES, BYTES..2 * BYTES);
        let holder = "parent".to_owned();
        assert_eq!(TakenBody::decode(&body), Ok(TakenBody { asked, taken, holder }));
    }
    assert!(rig.server.logs_all(&["not given", "region parent has"]));
    // By another name it is the same file.
    let link = rig.path.with_file_name("link");
    fs::hard_link(&rig.path, &link).unwrap();
    let link = link.to_str().unwrap();
    let refused = clone_in(&mut parent, "child", link, 2 * BYTES - page).unwrap_err();
    assert_eq!(refused, RefusalCode::RangeTaken);
    let mut before = rig.clone_at(&mut parent, "before", 0).unwrap();
    clone_in(&mut parent, "after", link, 2 * BYTES).unwrap();
    // A range that was given stays with its clone, filled or not.
    flush(&mut before).unwrap();
    for offset in [BYTES - page, 2 * BYTES, 3 * BYTES - page] {
        assert_eq!(rig.create("other", offset).map(|_| ()), Err(RefusalCode::RangeTaken));
    }
    assert_eq!(parent.resize(PAGES + 1).map(|_| ()), Err(RefusalCode::RangeTaken));
    assert_eq!(before.resize(PAGES + 1).map(|_| ()), Err(RefusalCode::RangeTaken));
    Raw::opened(&rig.server, "after").unwrap().delete().unwrap();
    parent.resize(PAGES + 1).unwrap();
    rig.create("other", 3 * BYTES).unwrap();
}

/// What only reads a range sees what is written there: such a range is not given away.
#[test]
fn cap_22_a_range_that_a_copy_is_still_made_from_is_not_given_away() {
    let rig = rig(3);
    let mut parent = rig.create("parent", 0).unwrap();
    let mut child = rig.clone_at(&mut parent, "child", BYTES).unwrap();
    parent.delete().unwrap();
    let refused = rig.clone_at(&mut child, "grandchild", 0).map(|_| ());
    assert_eq!(refused, Err(RefusalCode::RangeTaken));
    assert_eq!(rig.create("parent", 0).map(|_| ()), Err(RefusalCode::RangeTaken));
    flush(&mut child).unwrap();
    let mut grandchild = rig.clone_at(&mut child, "grandchild", 0).unwrap();
    grandchild.write(&[(7, 1, 207)]).unwrap();
    flush(&mut grandchild).unwrap();
    let expected: Vec<u8> = (0..PAGES as u8).collect();
    assert_eq!(read_all(&mut child), expected);
    assert_eq!(rig.pages()[6..9], [6, 207, 8]);
}

#[test]
fn cap_22_a_range_that_no_region_could_be_made_from_is_refused() {
    let rig = rig(2);
    let mut parent = rig.create("parent", 0).unwrap();
    let outside = rig.path.parent().unwrap().with_file_name("outside");
    fs::copy(&rig.path, &outside).unwrap();
    let file = rig.path.to_str().unwrap();
    for (path, offset, code) in [
        (outside.to_str().unwrap(), 0, RefusalCode::NoFile),
        ("file", 0, RefusalCode::NoFile),
        (file, BYTES + 4096, RefusalCode::NoFile),
        (file, u64::MAX - 4095, RefusalCode::NoFile),
        (file, BYTES + 512, RefusalCode::Malformed),
        ("", BYTES + 4095, RefusalCode::Malformed),
    ] {
        let refused = clone_in(&mut parent, "child", path, offset).unwrap_err();
        assert_eq!(refused, code, "{path} from {offset}");
    }
    let copy = Copy {
        on_access: false,
        name: "child",
        range: Some(FileRange { path: "", offset: BYTES }),
    };
    assert_eq!(parent.copy_to(Action::Snapshot, &copy), Err(RefusalCode::Malformed));
    Raw::greeted(&rig.server).create("zeros", BYTES, 4096, Source::Fill(0)).unwrap();
    let mut zeros = Raw::opened(&rig.server, "zeros").unwrap();
    assert_eq!(clone_in(&mut zeros, "child", file, BYTES).unwrap_err(), RefusalCode::NoFile);
    assert_eq!(fs::metadata(&rig.path).unwrap().len(), 2 * BYTES, "it is not made longer");
    // Another file than the parent's is as good, and so is a snapshot as what it is cloned from.
    let other = rig.path.with_file_name("other");
    fs::write(&other, vec![9; BYTES as usize]).unwrap();
    parent.copy(Action::Snapshot, "then", false).unwrap();
    let mut then = Raw::opened(&rig.server, "then").unwrap();
    let info = clone_in(&mut then, "child", other.to_str().unwrap(), 0).unwrap();
    assert_eq!(info.source, other.to_str().unwrap());
    flush(&mut Raw::opened(&rig.server, "child").unwrap()).unwrap();
    let expected = &fs::read(&rig.path).unwrap()[..BYTES as usize];
    assert!(fs::read(&other).unwrap() == expected);
}

#[test]
fn cap_22_a_clone_becomes_larger_once_its_range_is_filled_and_smaller_at_any_time() {
    let rig = rig(3);
    let mut parent = rig.create("parent", 0).unwrap();
    let mut child = rig.clone_at(&mut parent, "child", BYTES).unwrap();
    assert_eq!(child.resize(PAGES + 1).map(|_| ()), Err(RefusalCode::Unfilled));
    child.write(&[(1, 1, 201), (40, 1, 240)]).unwrap();
    child.resize(32).unwrap();
    assert_eq!(child.over(Action::Flush, 0, 32), Ok(32));
    let file = rig.pages();
    assert_eq!(file[PAGES as usize..][..4], [0, 201, 2, 3]);
    assert_eq!(file[PAGES as usize + 32..][..2], [96, 97], "beyond its end nothing is written");
    // As a region that is made from there.
    child.resize(PAGES).unwrap();
    assert_eq!(child.read(&[(1, 0), (31, 0), (32, 0), (40, 0)]), Ok(vec![201, 31, 96, 104]));
}

/// The file is cut: nothing of it is written beyond its end.
#[test]
fn cap_22_a_flush_that_fails_midway_loses_nothing_and_the_next_one_completes_it() {
    let rig = rig(2);
    let mut parent = rig.create("parent", 0).unwrap();
    let mut child = rig.clone_at(&mut parent, "child", BYTES).unwrap();
    child.write(&[(1, 1, 201), (63, 1, 163)]).unwrap();
    let mut expected: Vec<u8> = (0..PAGES as u8).collect();
    (expected[1], expected[63]) = (201, 163);
    let file = OpenOptions::new().write(true).open(&rig.path).unwrap();
    file.set_len(BYTES + BYTES / 2).unwrap();
    parent.write(&[(2, 1, 202), (62, 1, 162)]).unwrap();
    flush(&mut parent).unwrap();
    assert_eq!(flush(&mut child), Err(RefusalCode::FileFailed));
    assert!(child.show().is_unfilled);
    assert_eq!(read_all(&mut child), expected);
    file.set_len(2 * BYTES).unwrap();
    assert!(child.show().is_unfilled);
    assert_eq!(flush(&mut child).map(|pages| pages > 0), Ok(true));
    assert_eq!(rig.pages()[PAGES as usize..], expected);
    child.over(Action::Invalidate, 0, PAGES).unwrap();
    assert_eq!(read_all(&mut child), expected);
}

/// The clone's range is a hole in the file, and the disk has room for a part of it.
#[test]
fn cap_22_a_first_flush_to_a_full_disk_loses_nothing_and_is_completed_once_there_is_room() {
    const ROOM: u64 = 20;
    let place = in_memory();
    let directory = place.path().canonicalize().unwrap().join("disk");
    fs::create_dir(&directory).unwrap();
    let Some(_disk) = SmallDisk::mount_at(&directory, 3 * BYTES) else { return };
    let path = directory.join("file");
    let first: Vec<u8> = (0..PAGES as u8).flat_map(|page| [page; PAGE_SIZE]).collect();
    fs::write(&path, &first).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(2 * BYTES).unwrap();
    let server = TestServer::spawn(in_a_process(place.path().to_owned()));
    let rig = Rig { server, path, _directory: place };
    let mut parent = rig.create("parent", 0).unwrap();
    let mut child = rig.clone_at(&mut parent, "child", BYTES).unwrap();
    child.write(&[(1, 1, 201), (63, 1, 163)]).unwrap();
    parent.write(&[(2, 1, 202)]).unwrap();
    let mut expected: Vec<u8> = (0..PAGES as u8).collect();
    let mut of_parent = expected.clone();
    (expected[1], expected[63], of_parent[2]) = (201, 163, 202);
    let ballast = directory.join("ballast");
    let mut full = fs::File::create(&ballast).unwrap();
    let page = [1; PAGE_SIZE];
    while full.write_all(&page).is_ok() {}
    full.set_len(full.metadata().unwrap().len() - ROOM * PAGE_SIZE as u64).unwrap();
    let there = || rig.pages()[..PAGES as usize].to_vec();
    for round in 0..3 {
        assert_eq!(flush(&mut child), Err(RefusalCode::DiskFull), "round {round}");
        let info = child.show();
        assert!(info.is_unfilled && info.dirty.get() > 0);
        assert_eq!(there()[2], if round == 0 { 2 } else { 202 }, "nobody else's is written");
        assert_eq!(
            (read_all(&mut child), read_all(&mut parent)),
            (expected.clone(), of_parent.clone())
        );
        if round == 0 {
            // What has blocks already is written: the child has read it by then.
            assert_eq!(flush(&mut parent), Ok(1));
        } else {
            rig.server.restart();
            parent = Raw::opened(&rig.server, "parent").unwrap();
            child = Raw::opened(&rig.server, "child").unwrap();
        }
        assert_eq!(there(), of_parent);
    }
    let blocks = file.metadata().unwrap().blocks() * 512;
    assert_eq!(blocks, BYTES + ROOM * PAGE_SIZE as u64, "some of it was written");
    fs::remove_file(&ballast).unwrap();
    drop(full);
    assert_eq!(flush(&mut child), Ok(PAGES));
    let whole = [of_parent.clone(), expected.clone()].concat();
    assert_eq!(rig.pages(), whole);
    rig.server.restart();
    for (name, expected) in [("parent", &of_parent), ("child", &expected)] {
        let mut region = Raw::opened(&rig.server, name).unwrap();
        let info = region.show();
        assert!(!info.is_unfilled && info.dirty.get() == 0);
        // As it is in memory, and as it is in the file.
        assert_eq!(&read_all(&mut region), expected, "{name}");
        let dropped = patiently(|| region.over(Action::Invalidate, 0, PAGES));
        assert!(dropped.is_ok(), "{dropped:?}");
        assert_eq!(&read_all(&mut region), expected, "{name}");
    }
}

const MANY: u64 = 20_000;

/// A region of more pages than memory has and than one request flushes, and a clone of it that has the other
/// half of the file, which was longer before; and what the region holds.
fn large() -> (Rig, Raw, Raw, Vec<u8>) {
    let directory = tempfile::tempdir().unwrap();
    let allowed = directory.path().canonicalize().unwrap();
    let path = allowed.join("file");
    let server = TestServer::start(512, move |config| {
        config.promise_percent = 100_000;
        config.directories = vec![allowed];
    });
    let bytes: Vec<u8> = (0..MANY).flat_map(|page| [page as u8; PAGE_SIZE]).collect();
    fs::write(&path, &bytes).unwrap();
    let size = bytes.len() as u64;
    OpenOptions::new().write(true).open(&path).unwrap().set_len(2 * size).unwrap();
    let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
    Raw::greeted(&server).create("parent", size, 4096, source).unwrap();
    let mut parent = Raw::opened(&server, "parent").unwrap();
    clone_in(&mut parent, "child", "", size).unwrap();
    let child = Raw::opened(&server, "child").unwrap();
    (Rig { server, path, _directory: directory }, parent, child, bytes)
}

/// What is absent goes from file to file, and is no more in memory than before.
#[test]
fn cap_22_a_clone_that_is_larger_than_memory_is_filled() {
    let (rig, _, mut child, mut bytes) = large();
    child.write(&[(3, 1, 200), (19_000, 1, 201)]).unwrap();
    let slots = rig.server.stat().slots;
    assert_eq!(child.over(Action::Flush, 0, MANY), Ok(MANY), "in several requests");
    assert_eq!(rig.server.stat().slots, slots);
    bytes[3 * PAGE_SIZE..][..PAGE_SIZE].fill(200);
    bytes[19_000 * PAGE_SIZE..][..PAGE_SIZE].fill(201);
    assert!(fs::read(&rig.path).unwrap()[bytes.len()..] == bytes);
    assert!(!child.show().is_unfilled);
}

/// Between two requests of one flush a part of the range is held already: it is not read yet, and what is
/// written or forgotten there meanwhile goes there again.
#[test]
fn cap_22_what_changes_between_two_requests_of_the_first_flush_is_in_the_range_at_its_end() {
    let (rig, mut parent, mut child, mut bytes) = large();
    child.write(&[(3, 1, 200), (4, 1, 201), (5, 1, 202)]).unwrap();
    let range = PageRange { start: PageIndex::new(7), count: PageCount::new(2) };
    let header = Header { entries: 1, ..child.request(Action::Flush) };
    let (reply, body) = child.call(header, |out| RangeEntry(range).encode(out));
    assert_eq!(reply.refusal, None);
    let progress = Progress::decode(&body).unwrap();
    assert_eq!(
        progress.next,
        Some((0, range.start)),
        "whatever was asked for, all of it comes first"
    );
    let info = child.show();
    assert!(info.is_unfilled);
    assert_eq!(info.dirty.get() + progress.changed.get(), MANY);
    assert_eq!(child.read(&[(3, 0), (19_999, 0)]), Ok(vec![200, 31]), "not from the range");
    child.write(&[(4, 2, 211), (6, 1, 203)]).unwrap();
    child.free(3, 1).unwrap();
    parent.write(&[(8, 1, 250), (19_999, 1, 251)]).unwrap();
    parent.over(Action::Flush, 0, MANY).unwrap();
    child.over(Action::Flush, 0, MANY).unwrap();
    assert!(!child.show().is_unfilled);
    for (page, byte) in [(4, 211), (5, 202), (6, 203)] {
        bytes[page * PAGE_SIZE..][..PAGE_SIZE].fill(byte);
    }
    assert!(fs::read(&rig.path).unwrap()[bytes.len()..] == bytes);
    assert_eq!(child.read(&[(3, 0), (4, 0), (8, 0), (19_999, 0)]), Ok(vec![3, 211, 8, 31]));
}

#[test]
fn cap_22_a_backup_of_a_clone_is_whole_before_its_range_is() {
    let rig = rig(2);
    let mut parent = rig.create("parent", 0).unwrap();
    parent.write(&[(1, 1, 201)]).unwrap();
    let mut child = rig.clone_at(&mut parent, "child", BYTES).unwrap();
    child.write(&[(2, 1, 202)]).unwrap();
    let backup = rig.path.with_file_name("backup");
    let backup = backup.to_str().unwrap();
    let mut expected: Vec<u8> = (0..PAGES as u8).collect();
    (expected[1], expected[2]) = (201, 202);
    for name in ["unfilled", "filled"] {
        patiently(|| child.back_up(backup, false)).unwrap();
        patiently(|| Raw::restore(&rig.server, backup, name, false)).unwrap();
        let mut restored = Raw::opened(&rig.server, name).unwrap();
        assert_eq!(read_all(&mut restored), expected);
        flush(&mut child).unwrap();
    }
}

/// Whatever the order in which parent and child write the file, and others read it.
#[test]
fn cap_22_a_clone_is_filled_while_its_parent_is_written_and_flushed() {
    let rig = rig(2);
    let mut parent = rig.create("parent", 0).unwrap();
    for round in 1..30 {
        let mut child = rig.clone_at(&mut parent, "child", BYTES).unwrap();
        let mut expected = read_all(&mut parent);
        child.write(&[(round, 1000, 255)]).unwrap();
        expected[round as usize] = 255;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for page in 0..PAGES {
                    patiently(|| parent.write(&[(page, round, round as u8)])).unwrap();
                    if page % 4 == 3 {
                        flush(&mut parent).unwrap();
                    }
                }
                // Most of it is absent again, and read from the file.
                parent.over(Action::Invalidate, 0, PAGES - 2).unwrap();
            });
            flush(&mut child).unwrap();
        });
        assert_eq!(rig.pages()[PAGES as usize..], expected, "round {round}");
        assert_eq!(read_all(&mut child), expected);
        assert_eq!(read_all(&mut parent), vec![round as u8; PAGES as usize]);
        child.delete().unwrap();
    }
}

/// What is flushed by two at the same time is what was written last.
#[test]
fn flushes_of_one_region_take_turns() {
    let rig = rig(1);
    let mut writer = rig.create("region", 0).unwrap();
    let join = || writer.attach(&rig.server, AttachMode::Join, 0).unwrap();
    let mut others = [join(), join()];
    for round in 1..100 {
        let pages: Vec<_> = (0..PAGES).map(|page| (page, round, round as u8)).collect();
        writer.write(&pages).unwrap();
        std::thread::scope(|scope| {
            for other in &mut others {
                scope.spawn(|| flush(other).unwrap());
            }
            patiently(|| writer.write(&[(round % PAGES, round + 1000, 200)])).unwrap();
            flush(&mut writer).unwrap();
        });
        let mut expected = vec![round as u8; PAGES as usize];
        expected[(round % PAGES) as usize] = 200;
        assert_eq!(rig.pages(), expected, "round {round}");
        writer.over(Action::Invalidate, 0, PAGES).unwrap();
    }
}
