//! What is changed of named regions beside their pages: sizes, preferences; and what is not freed.

use std::time::{Duration, Instant};

use farmem_region::{ByteCount, PAGE_SIZE, PageCount, PageIndex, PageRange};
use farmem_wire::{Action, Header, Prefer, RangeEntry, RefusalCode, RegionInfo, Source, Tier};

use crate::raw::{Raw, TestServer};
use crate::tiers::content;

const ZEROS: Source<'static> = Source::Fill(0);

fn bytes(pages: u64) -> ByteCount {
    PageCount::new(pages).bytes()
}

/// A server with all tiers and hardly any use for them.
fn with_tiers(directory: &tempfile::TempDir) -> TestServer {
    let directory = directory.path().to_owned();
    TestServer::start(4096, move |config| {
        config.promise_percent = 1000;
        config.tiers.compressed = bytes(16384);
        let size = bytes(16384);
        config.tiers.file = Some(farmem_memserver::FileTierConfig { directory, size });
    })
}

#[test]
fn cap_72_a_region_is_made_larger_and_smaller() {
    let server = TestServer::start(2048, |config| config.promise_percent = 200);
    let mut client = Raw::greeted(&server);
    client.create("r", 1024 * 4096, 4096, Source::Fill(7)).unwrap();
    let reserved = server.stat().reserved_bytes;
    let mut region = Raw::opened(&server, "r").unwrap();
    region.write(&[(0, 1, 1), (500, 1, 2), (1023, 1, 3)]).unwrap();
    assert_eq!(region.read(&[(1024, 0)]), Err(RefusalCode::OutOfBounds));
    assert_eq!(region.resize(4096).unwrap().pages.get(), 4096);
    assert_eq!(region.read(&[(1023, 1), (1024, 0), (4095, 0)]).unwrap(), [3, 7, 7]);
    region.write(&[(4095, 1, 4)]).unwrap();
    assert_eq!(server.stat().reserved_bytes, reserved + bytes(3072).get());
    assert_eq!(region.resize(4097), Err(RefusalCode::Full), "more than is promised");
    assert_eq!(region.resize(u64::MAX >> 12), Err(RefusalCode::Full));
    for wrong in [0, u64::MAX] {
        assert_eq!(region.resize(wrong), Err(RefusalCode::Malformed));
    }
    assert_eq!(region.resize(501).unwrap().pages.get(), 501);
    assert_eq!(server.stat().reserved_bytes, reserved - bytes(523).get());
    assert_eq!(server.stat().pages, 2, "what is beyond is freed");
    assert_eq!(region.read(&[(0, 1), (500, 1)]).unwrap(), [1, 2]);
    assert_eq!(region.read(&[(501, 0)]), Err(RefusalCode::OutOfBounds));
    assert_eq!(region.write(&[(501, 1, 1)]), Err(RefusalCode::OutOfBounds));
    // What was beyond is as if it had never been written.
    region.resize(1024).unwrap();
    assert_eq!(region.read(&[(501, 0), (1023, 0)]).unwrap(), [7, 7]);
    region.delete().unwrap();
    drop((client, region));
    server.wait_until_empty();
}

#[test]
fn cap_72_a_copy_keeps_what_its_original_gives_up_and_pins_and_snapshots_stay() {
    let server = TestServer::start(2048, |config| config.promise_percent = 1000);
    let mut client = Raw::greeted(&server);
    client.create("r", 1024 * 4096, 4096, ZEROS).unwrap();
    let mut region = Raw::opened(&server, "r").unwrap();
    region.write(&[(0, 1, 1), (1000, 1, 9)]).unwrap();
    region.copy(Action::Clone, "copy", false).unwrap();
    region.copy(Action::Snapshot, "frozen", false).unwrap();
    let mut copy = Raw::opened(&server, "copy").unwrap();
    let mut frozen = Raw::opened(&server, "frozen").unwrap();
    assert_eq!(frozen.resize(10), Err(RefusalCode::Frozen));
    region.over(Action::Pin, 1000, 1).unwrap();
    assert_eq!(region.resize(1000), Err(RefusalCode::Pinned));
    assert!(server.logs("pinned"), "it is told in the log");
    region.over(Action::Unpin, 1000, 1).unwrap();
    region.resize(1000).unwrap();
    assert_eq!(copy.read(&[(0, 1), (1000, 1)]).unwrap(), [1, 9]);
    assert_eq!(frozen.read(&[(1000, 1)]).unwrap(), [9]);
    copy.resize(2000).unwrap();
    assert_eq!(copy.read(&[(1000, 1), (1999, 0)]).unwrap(), [9, 0]);
    // Only whole pages of the page size.
    client.create("large", 4 << 20, 2 << 20, ZEROS).unwrap();
    let mut large = Raw::opened(&server, "large").unwrap();
    assert_eq!(large.resize(513), Err(RefusalCode::Malformed));
    large.resize(512).unwrap();
    let mut session = Raw::with_region(&server, 4);
    assert_eq!(session.resize(8), Err(RefusalCode::Malformed), "that grows by malloc");
}

#[test]
fn what_is_free_already_is_not_freed_again() {
    let server = TestServer::start(256, |config| config.promise_percent = 1000);
    let mut client = Raw::greeted(&server);
    client.create("r", 1 << 20, 4096, ZEROS).unwrap();
    let mut region = Raw::opened(&server, "r").unwrap();
    assert_eq!(region.over(Action::Invalidate, 0, 256), Err(RefusalCode::AlreadyFree));
    region.write(&[(3, 1, 3), (9, 1, 9)]).unwrap();
    assert_eq!(region.over(Action::Invalidate, 0, 8).unwrap(), 1);
    assert_eq!(region.over(Action::Invalidate, 0, 8), Err(RefusalCode::AlreadyFree));
    assert!(server.logs("free already"));
    assert_eq!(region.read(&[(9, 1)]).unwrap(), [9], "nothing else is disturbed");
    let mut session = Raw::with_region(&server, 8);
    session.write(&[(1, 1, 1)]).unwrap();
    session.free(0, 8).unwrap();
    assert_eq!(session.free(0, 8), Err(RefusalCode::AlreadyFree));
    region.delete().unwrap();
    assert_eq!(region.delete(), Err(RefusalCode::NoSession));
    assert_eq!(Raw::opened(&server, "r").err(), Some(RefusalCode::NoRegion));
}

#[test]
fn cap_17_a_region_with_copies_is_deleted_only_if_they_keep_what_they_share() {
    let server = TestServer::start(256, |config| config.promise_percent = 1000);
    let mut client = Raw::greeted(&server);
    client.create("r", 1 << 20, 4096, ZEROS).unwrap();
    let mut region = Raw::opened(&server, "r").unwrap();
    region.write(&[(3, 1, 3)]).unwrap();
    region.copy(Action::Clone, "copy", false).unwrap();
    assert_eq!(region.delete_uncopied(), Err(RefusalCode::Copied));
    assert!(server.logs("it has copies"));
    let mut copy = Raw::opened(&server, "copy").unwrap();
    copy.copy(Action::Snapshot, "grandchild", false).unwrap();
    assert_eq!(copy.delete_uncopied(), Err(RefusalCode::Copied));
    Raw::opened(&server, "grandchild").unwrap().delete_uncopied().unwrap();
    copy.delete_uncopied().unwrap();
    region.copy(Action::Clone, "copy", false).unwrap();
    region.delete().unwrap();
    copy = Raw::opened(&server, "copy").unwrap();
    assert_eq!(copy.read(&[(3, 1)]).unwrap(), [3]);
    copy.delete_uncopied().unwrap();
    drop((client, region, copy));
    server.wait_until_empty();
}

/// Waits until a region is as it should be.
fn wait(region: &mut Raw, is_so: impl Fn(&RegionInfo) -> bool) -> RegionInfo {
    let began = Instant::now();
    loop {
        let info = region.show();
        if is_so(&info) {
            return info;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{info:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn write_all(region: &mut Raw, pages: std::ops::Range<u64>, version: u64, is_compressible: bool) {
    for start in pages.clone().step_by(64) {
        let message: Vec<_> = (start..pages.end.min(start + 64))
            .map(|page| (page, version, content(page, version, is_compressible)))
            .collect();
        region.write_pages(&message).unwrap();
    }
}

#[test]
fn cap_94_pages_lie_in_the_tier_that_they_are_to_be_kept_in() {
    let directory = tempfile::tempdir().unwrap();
    let server = with_tiers(&directory);
    let mut client = Raw::greeted(&server);
    let tiers = [None, Some(Tier::Dram), Some(Tier::Compressed), Some(Tier::File)];
    for tier in tiers {
        let name = tier.map_or("none", Tier::name);
        client.create_preferring(name, 256 * 4096, 4096, ZEROS, tier).unwrap();
        let mut region = Raw::opened(&server, name).unwrap();
        write_all(&mut region, 0..256, 1, true);
    }
    for tier in tiers {
        let mut region = Raw::opened(&server, tier.map_or("none", Tier::name)).unwrap();
        let all = PageCount::new(256);
        let info = wait(&mut region, |info| match tier {
            None | Some(Tier::Dram) => info.dram == all,
            Some(Tier::Compressed) => info.compressed == all,
            Some(Tier::File) => info.file == all,
        });
        let preferred = Tier::ALL.map(|other| PageCount::new(256 * u64::from(tier == Some(other))));
        assert_eq!(info.preferred, preferred);
        // However often they are asked for, they stay there, and hold what was written.
        for _ in 0..3 {
            for page in 0..256 {
                assert!(region.read_page(page).unwrap().1 == content(page, 1, true));
            }
        }
        let again = region.show();
        assert_eq!(
            (again.dram, again.compressed, again.file),
            (info.dram, info.compressed, info.file)
        );
    }
}

#[test]
fn cap_14_a_preference_is_changed_later_and_for_ranges_and_pins_win() {
    let directory = tempfile::tempdir().unwrap();
    let server = with_tiers(&directory);
    let mut client = Raw::greeted(&server);
    client.create("r", 512 * 4096, 4096, ZEROS).unwrap();
    let mut region = Raw::opened(&server, "r").unwrap();
    write_all(&mut region, 0..512, 1, true);
    region.over(Action::Pin, 0, 16).unwrap();
    assert_eq!(region.prefer(Some(Tier::File), 0, 256).unwrap(), 256);
    assert_eq!(region.prefer(Some(Tier::Compressed), 256, 128).unwrap(), 128);
    let info = wait(&mut region, |info| info.file.get() == 240 && info.compressed.get() == 128);
    assert_eq!(info.dram.get(), 16 + 128, "pinned pages stay, and those without a preference");
    // The other way: what prefers dram comes when it is asked for.
    region.prefer(Some(Tier::Dram), 0, 512).unwrap();
    for page in 0..512 {
        assert!(region.read_page(page).unwrap().1 == content(page, 1, true));
    }
    assert_eq!(region.show().dram.get(), 512);
    region.prefer(None, 0, 512).unwrap();
    assert_eq!(region.show().preferred, [PageCount::new(0); 3]);
    // A copy is kept as its original, and what is added as what was there.
    region.prefer(Some(Tier::File), 500, 12).unwrap();
    let copy = region.copy(Action::Clone, "copy", false).unwrap();
    assert_eq!(copy.preferred[2].get(), 12);
    assert_eq!(region.resize(600).unwrap().preferred[2].get(), 100);
    assert_eq!(region.resize(505).unwrap().preferred[2].get(), 5);
    assert_eq!(region.prefer(Some(Tier::File), 505, 1), Err(RefusalCode::OutOfBounds));
}

#[test]
fn cap_14_when_memory_is_short_what_prefers_dram_leaves_last() {
    let server = TestServer::start(1024, |config| {
        config.promise_percent = 1000;
        config.tiers.compressed = bytes(8192);
    });
    let mut client = Raw::greeted(&server);
    client.create_preferring("fast", 256 * 4096, 4096, ZEROS, Some(Tier::Dram)).unwrap();
    client.create("slow", 2048 * 4096, 4096, ZEROS).unwrap();
    let mut fast = Raw::opened(&server, "fast").unwrap();
    let mut slow = Raw::opened(&server, "slow").unwrap();
    write_all(&mut fast, 0..256, 1, true);
    write_all(&mut slow, 0..2048, 1, true);
    let info = slow.show();
    assert!(info.compressed.get() > 512, "{info:?}");
    assert_eq!(fast.show().dram.get(), 256);
    for page in 0..2048 {
        assert!(slow.read_page(page).unwrap().1 == content(page, 1, true));
    }
}

#[test]
fn cap_14_a_tier_that_is_not_there_cannot_be_preferred() {
    let server = TestServer::start(64, |_| ());
    let mut client = Raw::greeted(&server);
    for tier in [Tier::Compressed, Tier::File] {
        let made = client.create_preferring("x", 4096, 4096, ZEROS, Some(tier));
        assert_eq!(made.err(), Some(RefusalCode::NoTier));
    }
    client.create_preferring("x", 4096, 4096, ZEROS, Some(Tier::Dram)).unwrap();
    let mut region = Raw::opened(&server, "x").unwrap();
    assert_eq!(region.prefer(Some(Tier::File), 0, 1), Err(RefusalCode::NoTier));
    let range = PageRange { start: PageIndex::new(0), count: PageCount::new(1) };
    let header = Header { entries: 1, ..region.request(Action::Prefer) };
    let (reply, _) = region.call(header, |out| {
        RangeEntry(range).encode(out);
        Prefer { tier: None }.encode(out);
        let at = out.len() - 2;
        out[at] = 9;
    });
    assert_eq!(reply.refusal, Some(RefusalCode::Malformed));
    assert_eq!(PAGE_SIZE, 4096);
}

/// Page by page a client may say what it prefers for so many pages; then neighbours must agree.
#[test]
fn preferences_are_bounded_for_each_region() {
    const RANGES_MAX: u64 = 1024;
    let directory = tempfile::tempdir().unwrap();
    let server = with_tiers(&directory);
    Raw::greeted(&server).create("r", 4096 * PAGE_SIZE as u64, 4096, ZEROS).unwrap();
    let mut region = Raw::opened(&server, "r").unwrap();
    for at in 0..RANGES_MAX {
        assert_eq!(region.prefer(Some(Tier::Dram), at * 2, 1), Ok(1));
    }
    let preferred = |region: &mut Raw| region.show().preferred.map(PageCount::get);
    let too_many = Err(RefusalCode::TooManyRanges);
    assert_eq!(region.prefer(Some(Tier::Dram), RANGES_MAX * 2, 1), too_many);
    assert_eq!(region.prefer(Some(Tier::File), 1, 1), too_many);
    assert_eq!(preferred(&mut region), [RANGES_MAX, 0, 0], "nothing has changed");
    // What does not make them more is done, and what makes them fewer leaves room.
    assert_eq!(region.prefer(Some(Tier::File), 2, 1), Ok(1));
    assert_eq!(region.prefer(Some(Tier::Dram), 5, 1), Ok(1));
    assert_eq!(region.prefer(Some(Tier::Dram), RANGES_MAX * 2, 1), Ok(1));
    assert_eq!(region.prefer(Some(Tier::Dram), RANGES_MAX * 2 + 2, 1), too_many);
    assert_eq!(preferred(&mut region), [RANGES_MAX + 1, 0, 1]);
    // Other regions have as many of their own.
    Raw::greeted(&server).create("s", 4096, 4096, ZEROS).unwrap();
    assert_eq!(Raw::opened(&server, "s").unwrap().prefer(Some(Tier::Dram), 0, 1), Ok(1));
}
