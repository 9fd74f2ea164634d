//! Named regions, opened by their name.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use farmem_client::{Region, RegionError, RegionOptions, WritePolicy};
use farmem_region::ByteCount;
use farmem_remote::named;
use farmem_wire::{Create, MAP_LEASE, Source};

use crate::mapped::may_page;
use crate::server::TestServer;

pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);
pub(crate) const SIZE: u64 = 8 << 20;

fn create(server: &TestServer, name: &str, source: Source<'_>) -> RegionOptions {
    let options = server.options(0);
    let size = ByteCount::new(SIZE);
    let create = Create { name, size, page_bytes: 4096, source, prefers: None };
    named::create(&options.server, &create, TIMEOUT).unwrap();
    options
}

/// Caps 54, 78: what one process wrote another one reads, by offset and by external address.
#[test]
fn cap_54_a_named_region_is_there_for_who_opens_it_next() {
    let server = TestServer::start(64);
    for write in [WritePolicy::WriteThrough, WritePolicy::WriteBack] {
        let name = format!("{write:?}");
        let options = RegionOptions { write, ..create(&server, &name, Source::Fill(0)) };
        let mut first = Region::open(&name, options.clone()).unwrap();
        assert_eq!(first.size(), SIZE);
        first.write(5_000, b"left here").unwrap();
        first.write(SIZE - 5, b"at it").unwrap();
        let address = first.address(5_000).unwrap();
        first.flush().unwrap();
        first.close().unwrap();
        let mut second = Region::open(&name, options.clone()).unwrap();
        let mut bytes = [9; 12];
        second.read_address(address, &mut bytes).unwrap();
        assert_eq!(&bytes, b"left here\0\0\0");
        second.write(5_005, b"there").unwrap();
        second.flush().unwrap();
        // One writer at a time.
        let mut third = Region::open(&name, options).unwrap();
        let lost = second.write(0, b"x").and_then(|()| second.flush());
        assert!(matches!(lost, Err(RegionError::Store(_))), "{lost:?}");
        third.read(5_000, &mut bytes).unwrap();
        assert_eq!(&bytes, b"left there\0\0");
    }
    let absent = Region::open("no such region", server.options(0));
    assert!(absent.unwrap_err().to_string().contains("no such region"));
}

/// Cap 93: who has the map asks for nothing that is not there.
#[test]
fn cap_93_an_absent_page_costs_no_message() {
    let server = TestServer::start(64);
    for (name, source, byte) in
        [("zeros", Source::Fill(0), 0), ("fives", Source::Fill(5), 5), ("none", Source::Nothing, 0)]
    {
        let options = create(&server, name, source);
        let mut region = Region::open(name, options.clone()).unwrap();
        for page in (0..SIZE / 4096).step_by(2) {
            region.write(page * 4096 + 100, &[7]).unwrap();
        }
        drop(region);
        let mut region = Region::open(name, options).unwrap();
        let mut content = [1; 4096];
        // The lease goes on.
        region.read(4096, &mut content).unwrap();
        let (before, began) = (server.stat(), Instant::now());
        for page in (1..SIZE / 4096).step_by(2) {
            region.read(page * 4096, &mut content).unwrap();
            assert_eq!(content, [byte; 4096]);
        }
        let after = server.stat();
        // The second question for the counts is one of them, with its hello; one more renews the lease
        // whenever it has run out.
        let renewals = began.elapsed().as_nanos() / MAP_LEASE.as_nanos() + 1;
        assert_eq!(after.reads, before.reads);
        let asked = after.requests - before.requests;
        assert!(u128::from(asked) <= 2 + renewals, "{asked} requests, {renewals} renewals");
        for page in (0..SIZE / 4096).step_by(2) {
            region.read(page * 4096, &mut content).unwrap();
            assert_eq!((content[99], content[100], content[101]), (byte, 7, byte));
        }
        assert!(server.stat().pages_read >= after.pages_read + SIZE / 8192);
    }
}

/// Cap 93: what a client believes to be absent, or has in its cache, never hides what another client has
/// written and been acknowledged. The former writer either finds it or is told that it is shut out.
#[test]
fn cap_93_a_stale_map_never_hides_what_another_client_has_written() {
    let server = TestServer::start(64);
    for round in 0..4 {
        let name = format!("shared{round}");
        let options = create(&server, &name, Source::Fill(0));
        let mut first = Region::open(&name, options.clone()).unwrap();
        let mut byte = [1];
        first.read(4096, &mut byte).unwrap();
        assert_eq!(byte, [0]);
        let is_written = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                // Absent pages, of which one is in the cache and the others not, all the time.
                for page in (0..SIZE / 4096).cycle() {
                    let was_written = is_written.load(Ordering::SeqCst);
                    if first.read(page * 4096, &mut byte).is_err() {
                        return;
                    }
                    assert!(!was_written || byte == [9], "page {page} is as it was before");
                }
            });
            let mut second = Region::open(&name, options.clone()).unwrap();
            second.write(0, &vec![9; SIZE as usize]).unwrap();
            is_written.store(true, Ordering::SeqCst);
            reader.join().unwrap();
            let mut all = vec![0; SIZE as usize];
            second.read(0, &mut all).unwrap();
            assert!(all.iter().all(|byte| *byte == 9));
        });
        let refused = first.read(0, &mut byte).unwrap_err().to_string();
        assert!(refused.contains("another client"), "{refused}");
    }
}

/// What a file holds is read from it, whether or not the server has read it before; the whole
/// region can be used as memory.
#[test]
fn cap_8_a_region_made_from_a_file_is_opened_and_mapped() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    let content: Vec<u8> = (0..SIZE).map(|at| (at / 4096 * 7 + at % 251) as u8).collect();
    std::fs::write(&path, &content).unwrap();
    let server = TestServer::start_with(64, |config| {
        config.directories = vec![directory.path().to_owned()];
    });
    let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
    let options = create(&server, "file", source);
    let mut region = Region::open("file", options.clone()).unwrap();
    let mut found = vec![0; SIZE as usize];
    region.read(0, &mut found[..100_000]).unwrap();
    region.write(70_000, b"new").unwrap();
    drop(region);
    let mut expected = content;
    expected[70_000..70_003].copy_from_slice(b"new");
    let mut region = Region::open("file", options.clone()).unwrap();
    region.read(0, &mut found).unwrap();
    assert!(found == expected);
    if !may_page() {
        return;
    }
    let mut mapped = region.map().unwrap();
    assert!(mapped.as_slice() == expected);
    mapped.as_mut_slice()[4096 * 5..4096 * 6].fill(0xee);
    expected[4096 * 5..4096 * 6].fill(0xee);
    mapped.flush().unwrap();
    drop(mapped);
    let mut region = Region::open("file", options).unwrap();
    region.read(0, &mut found).unwrap();
    assert!(found == expected);
}

/// A region of a file, with pages of `page_bytes`, and the file and what it holds.
pub(crate) fn of_file(
    page_bytes: u32,
) -> (TestServer, tempfile::TempDir, std::path::PathBuf, Vec<u8>, RegionOptions) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    let content: Vec<u8> = (0..SIZE).map(|at| (at / 4096 * 7 + at % 251) as u8 | 1).collect();
    std::fs::write(&path, &content).unwrap();
    let server = TestServer::start_with(64, |config| {
        config.directories = vec![directory.path().to_owned()];
    });
    let options = server.options(0);
    let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
    let size = ByteCount::new(SIZE);
    let create = Create { name: "file", size, page_bytes, source, prefers: None };
    named::create(&options.server, &create, TIMEOUT).unwrap();
    (server, directory, path, content, options)
}

/// Caps 8, 23: what a mapping of a region of a file makes zero is zero for who opens it next, and not what
/// the file holds, whatever its pages' size. To read zeros of the file is no change.
#[test]
fn cap_8_zeros_that_a_mapping_writes_stay_zeros() {
    if !may_page() {
        return;
    }
    for page_bytes in [4096, 64 << 10, 2 << 20] {
        let (_server, _directory, path, mut content, options) = of_file(page_bytes);
        let zeros = 4096 * 700..4096 * 710;
        content[zeros.clone()].fill(0);
        std::fs::write(&path, &content).unwrap();
        let mut mapped = Region::open("file", options.clone()).unwrap().map().unwrap();
        assert!(mapped.as_slice()[zeros].iter().all(|byte| *byte == 0));
        let made = 4096 * 5..4096 * 16;
        mapped.as_mut_slice()[made.clone()].fill(0);
        content[made].fill(0);
        mapped.flush().unwrap();
        let mut region = mapped.unmap().unwrap();
        let mut found = vec![0xee; SIZE as usize];
        region.read(0, &mut found).unwrap();
        assert!(found == content, "{page_bytes}: as it goes on");
        drop(region);
        let mut region = Region::open("file", options).unwrap();
        found.fill(0xee);
        region.read(0, &mut found).unwrap();
        assert!(found == content, "{page_bytes}: opened again");
    }
}

/// R1: a write that fails, as a page of which it changes a part cannot be had, leaves nothing that a later
/// read would take for contents; and may fail as often as it likes.
#[test]
fn a_failed_write_leaves_no_zeros_behind() {
    let (_server, _directory, path, content, options) = of_file(4096);
    let options = RegionOptions { write: WritePolicy::WriteBack, ..options };
    let mut region = Region::open("file", options).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    for at in 0..60 {
        let offset = 100 + at * 128 * 1024;
        region.write(offset, &vec![9; 64 << 10]).unwrap_err();
    }
    std::fs::write(&path, &content).unwrap();
    let mut found = vec![0xee; SIZE as usize];
    region.read(0, &mut found).unwrap();
    assert!(found == content);
}

/// Cap 77: a page that nobody asked for fails nobody's read: of a file that was cut all is read up to its end.
#[test]
fn cap_77_read_ahead_over_the_end_of_a_file_fails_no_read() {
    let (_server, _directory, path, content, options) = of_file(4096);
    let mut region = Region::open("file", options).unwrap();
    std::fs::File::options().write(true).open(&path).unwrap().set_len(60 * 4096).unwrap();
    let mut found = [0; 4096];
    for (page, expected) in content.chunks(4096).take(60).enumerate() {
        region.read(page as u64 * 4096, &mut found).unwrap();
        assert!(found == expected, "page {page}");
    }
    assert!(region.counts().misses < 30, "{:?}", region.counts());
    for page in [60, 61, 99] {
        region.read(page * 4096, &mut found).unwrap_err();
    }
    std::fs::write(&path, &content).unwrap();
    for (page, expected) in content.chunks(4096).enumerate().take(100).rev() {
        region.read(page as u64 * 4096, &mut found).unwrap();
        assert!(found == expected, "page {page} of the whole file");
    }
}

/// Cap 10: a snapshot is read like any region, and not mapped: nothing of it is written.
#[test]
fn cap_10_a_snapshot_is_read_and_not_mapped() {
    let (_server, _directory, _path, content, options) = of_file(4096);
    let server = &options.server;
    let mut original = named::NamedRegion::open(server, "file", false, TIMEOUT).unwrap();
    original.copy("frozen", true, false).unwrap();
    let mut region = Region::open("frozen", options).unwrap();
    let mut found = vec![0xee; SIZE as usize];
    region.read(0, &mut found).unwrap();
    assert!(found == content);
    let refused = region.map().unwrap_err();
    assert!(
        matches!(&refused.error, RegionError::Frozen { name } if name == "frozen"),
        "{refused}"
    );
    let mut region = *refused.region;
    found.fill(0xee);
    region.read(0, &mut found).unwrap();
    assert!(found == content);
}

/// A region that is too large to be mapped, as all of its pages must be fetched, is read at offsets.
#[test]
fn cap_23_what_would_take_a_table_of_gibibytes_is_not_mapped() {
    let server = TestServer::start_with(64, |config| config.promise_percent = 1_000_000);
    let size = ByteCount::new((256 << 30) + 4096);
    for (name, byte) in [("fives", 5), ("zeros", 0)] {
        let source = Source::Fill(byte);
        let create = Create { name, size, page_bytes: 4096, source, prefers: None };
        let options = server.options(0);
        named::create(&options.server, &create, TIMEOUT).unwrap();
        let mut region = Region::open(name, options).unwrap();
        if byte == 5 {
            let refused = region.map().unwrap_err();
            assert!(matches!(refused.error, RegionError::TooLarge { .. }), "{refused}");
            region = *refused.region;
        } else if may_page() {
            region = region.map().unwrap().unmap().unwrap();
        }
        let mut found = [1; 100];
        region.read(size.get() - 100, &mut found).unwrap();
        assert_eq!(found, [byte; 100]);
    }
}

#[test]
fn a_named_region_has_no_spill_directory() {
    let server = TestServer::start(64);
    let mut options = server.options(8);
    options.spill = Some(std::env::temp_dir());
    let refused = Region::open("a", options).unwrap_err();
    assert!(matches!(refused, RegionError::NoSpill { .. }), "{refused}");
}
