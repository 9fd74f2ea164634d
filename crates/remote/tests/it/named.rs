//! A named region that one client writes and another one reads with a copy of its map.

use std::time::Duration;

use farmem_region::{ByteCount, PageCount, PageIndex, PageRange};
use farmem_remote::named::{self, NamedRegion, RangeAction};
use farmem_wire::{Create, FileRange, Source};

use crate::proxy::Proxy;
use crate::server::{BOTH, Over, TestServer};

const TIMEOUT: Duration = Duration::from_secs(10);
const PAGE: u64 = 4096;

#[test]
fn cap_93_a_reader_with_a_map_asks_for_nothing_that_is_absent_and_misses_no_change() {
    for over in BOTH {
        let server = TestServer::start(over, 64, |_| ());
        let (size, source) = (ByteCount::new(32 << 20), Source::Fill(7));
        let create = Create { name: "r", size, page_bytes: 4096, source, prefers: None };
        named::create(&server.endpoint, &create, TIMEOUT).unwrap();
        let mut writer = NamedRegion::open(&server.endpoint, "r", true, TIMEOUT).unwrap();
        let mut reader = NamedRegion::open(&server.endpoint, "r", false, TIMEOUT).unwrap();
        writer.write(5 * PAGE, &[1; PAGE as usize]).unwrap();
        reader.keep_map().unwrap();
        let before = server.stat().requests;
        for page in 10..1010 {
            assert!(reader.read(page * PAGE..page * PAGE + 9).unwrap() == [7; 9]);
        }
        let asked = server.stat().requests - before;
        assert!(asked < 100, "{asked} requests to read 1000 absent pages");
        assert_eq!(reader.read(5 * PAGE..5 * PAGE + 1).unwrap(), [1]);
        // Whatever the writer has been told is done is what the reader finds.
        for round in 0..6 {
            let (page, byte) = (20 + round % 3, 100 + round as u8);
            writer.write(page * PAGE, &[byte; PAGE as usize]).unwrap();
            assert_eq!(reader.read(page * PAGE..page * PAGE + 2).unwrap(), [byte; 2]);
            assert_eq!(reader.read(100 * PAGE..100 * PAGE + 1).unwrap(), [7]);
            let range = PageRange { start: PageIndex::new(page), count: PageCount::new(1) };
            writer.over(RangeAction::Invalidate, range).unwrap();
            assert_eq!(reader.read(page * PAGE..page * PAGE + 2).unwrap(), [7; 2]);
        }
        // More than news tell.
        for page in (2000..3000).step_by(2) {
            writer.write(page * PAGE, &[9; PAGE as usize]).unwrap();
        }
        for page in 2000..3000 {
            let expected = if page % 2 == 0 { 9 } else { 7 };
            assert_eq!(reader.read(page * PAGE..page * PAGE + 1).unwrap(), [expected]);
        }
        writer.resize(ByteCount::new(1 << 20)).unwrap();
        assert!(reader.read(2 << 20..3 << 20).is_err(), "it ends before");
    }
}

/// Each writer that takes over begins another epoch, of which a reader was told nothing.
#[test]
fn cap_62_readers_go_on_when_another_writer_takes_over() {
    for over in BOTH {
        let server = TestServer::start(over, 64, |_| ());
        let (size, source) = (ByteCount::new(1 << 20), Source::Fill(7));
        let create = Create { name: "r", size, page_bytes: 4096, source, prefers: None };
        named::create(&server.endpoint, &create, TIMEOUT).unwrap();
        let open = |take_over| NamedRegion::open(&server.endpoint, "r", take_over, TIMEOUT);
        let mut readers = [open(false).unwrap(), open(false).unwrap()];
        readers[1].keep_map().unwrap();
        let mut former: Option<NamedRegion> = None;
        for round in 0..4 {
            let mut writer = open(true).unwrap();
            writer.write(round * PAGE, &[round as u8; 2]).unwrap();
            for reader in &mut readers {
                let byte = |at: u64| if at <= round { at as u8 } else { 7 };
                for at in 0..4 {
                    let found = reader.read(at * PAGE..at * PAGE + 2).unwrap();
                    assert_eq!(found, [byte(at); 2], "page {at} in round {round}");
                }
                assert_eq!(reader.show().unwrap().stored.get(), round + 1);
                assert!(reader.write(0, &[9]).is_err(), "who has joined does not write");
            }
            if let Some(mut former) = former.replace(writer) {
                assert!(former.write(0, &[9]).is_err() && former.read(0..1).is_err());
            }
        }
        // Another region under the same name is none that they have opened.
        former.unwrap().delete(false).unwrap();
        named::create(&server.endpoint, &create, TIMEOUT).unwrap();
        let mut writer = open(true).unwrap();
        writer.write(0, &[9]).unwrap();
        assert!(readers.iter_mut().all(|reader| reader.read(0..1).is_err()));
    }
}

/// Bytes anywhere in a region of small pages, against a plain vector and the file.
#[test]
fn cap_1_cap_72_small_pages_are_read_and_written_by_themselves() {
    for (over, unit) in [(BOTH[0], 512), (BOTH[1], 1024)] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().canonicalize().unwrap().join("file");
        let mut model: Vec<u8> = (0..64 << 10_u32).map(|at| (at / 512) as u8).collect();
        std::fs::write(&path, &model).unwrap();
        let server = TestServer::start(over, 256, |config| {
            config.directories = vec![path.parent().unwrap().to_owned()];
        });
        let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
        let size = ByteCount::new(model.len() as u64);
        let create = Create { name: "r", size, page_bytes: unit, source, prefers: None };
        named::create(&server.endpoint, &create, TIMEOUT).unwrap();
        let mut region = NamedRegion::open(&server.endpoint, "r", true, TIMEOUT).unwrap();
        region.keep_map().unwrap();
        assert_eq!(region.read(700..701).unwrap(), [1]);
        let (stored, before) = (region.show().unwrap().stored.get(), server.stat().bytes_out);
        assert_eq!(stored, 1);
        assert_eq!(region.read(701..702).unwrap(), [1]);
        let look = server.stat().bytes_out;
        let told = look - before;
        assert!(told < 4096, "{told} bytes for one, and for a look at the server");
        let mut seed = 42_u64;
        let mut next = |limit: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize % limit
        };
        for step in 0..400 {
            let start = next(model.len());
            let end = model.len().min(start + 1 + [next(600), next(10_000)][step % 2]);
            if next(2) == 0 {
                let bytes: Vec<u8> = (start..end).map(|at| (at + step) as u8).collect();
                region.write(start as u64, &bytes).unwrap();
                model[start..end].copy_from_slice(&bytes);
            }
            let found = region.read(start as u64..end as u64).unwrap();
            assert!(found == model[start..end], "{start} to {end}");
            if step % 100 == 99 {
                let pages = PageCount::new(model.len() as u64 / PAGE);
                let all = PageRange { start: PageIndex::new(0), count: pages };
                region.over(RangeAction::Flush, all).unwrap();
                assert!(std::fs::read(&path).unwrap() == model);
            }
        }
        assert!(region.read(0..model.len() as u64).unwrap() == model);
    }
}

#[test]
fn bytes_past_the_region_are_refused_wherever_they_are() {
    let server = TestServer::start(BOTH[0], 256, |_| ());
    let source = Source::Fill(0);
    for (name, page_bytes) in [("small", 512), ("usual", 4096)] {
        let size = ByteCount::new(64 << 10);
        let create = Create { name, size, page_bytes, source, prefers: None };
        named::create(&server.endpoint, &create, TIMEOUT).unwrap();
        let mut region = NamedRegion::open(&server.endpoint, name, true, TIMEOUT).unwrap();
        let end = size.get();
        for start in [0, end - 1, end, end + 513, 1 << 60, u64::MAX - 4096, u64::MAX - 1] {
            let read = region.read(start..start.max(end) + 1).unwrap_err();
            assert!(read.to_string().contains("outside of the region"), "{start}: {read}");
            let bytes = vec![1; end.saturating_sub(start) as usize + 1];
            let written = region.write(start, &bytes).unwrap_err();
            assert!(written.to_string().contains("outside of the region"), "{start}: {written}");
        }
        assert!(region.read(0..u64::MAX).is_err());
        #[expect(clippy::reversed_empty_ranges, reason = "it is what a caller may give")]
        let none = region.read(9..3).unwrap();
        assert_eq!((none, region.read(end..end).unwrap()), (Vec::new(), Vec::new()));
        region.write(end, &[]).unwrap();
        assert_eq!(region.read(0..2).unwrap(), [0, 0], "nothing was written");
    }
}

#[test]
fn reader_and_writer_go_on_with_another_connection_and_who_was_followed_does_not() {
    let server = TestServer::start(Over::Tcp, 64, |_| ());
    let proxy = Proxy::start(&server.endpoint);
    let (size, source) = (ByteCount::new(1 << 20), Source::Fill(7));
    let create = Create { name: "r", size, page_bytes: 4096, source, prefers: None };
    named::create(&server.endpoint, &create, TIMEOUT).unwrap();
    let mut writer = NamedRegion::open(&proxy.endpoint, "r", true, TIMEOUT).unwrap();
    let mut reader = NamedRegion::open(&proxy.endpoint, "r", false, TIMEOUT).unwrap();
    for region in [&mut writer, &mut reader] {
        region.keep_map().unwrap();
    }
    for byte in 1..4 {
        proxy.cut();
        assert!(writer.write(0, &[byte; 9]).is_err(), "it was cut");
        writer.write(PAGE, &[byte; 9]).unwrap();
        assert_eq!(writer.read(PAGE..PAGE + 9).unwrap(), [byte; 9]);
        assert!(reader.show().is_err(), "it was cut");
        assert_eq!(reader.read(PAGE..PAGE + 9).unwrap(), [byte; 9]);
        assert_eq!(reader.read(0..9).unwrap(), [7; 9]);
    }
    let mut next = NamedRegion::open(&server.endpoint, "r", true, TIMEOUT).unwrap();
    next.write(0, &[9]).unwrap();
    proxy.cut();
    assert!(writer.show().is_err(), "it was cut");
    let error = writer.write(0, &[1]).unwrap_err();
    assert!(error.to_string().contains("the epoch is over"), "{error}");
    assert_eq!(next.read(0..2).unwrap(), [9, 7]);
}

/// Requests have room for so much. What is cut names something else: another region would be deleted, or
/// another file written back to.
#[test]
fn a_name_that_would_be_cut_is_refused() {
    let server = TestServer::start(BOTH[0], 64, |_| ());
    let name = "n".repeat(255);
    let longer = format!("{name}n");
    let (size, source) = (ByteCount::new(64 << 10), Source::Fill(0));
    let create = Create { name: &name, size, page_bytes: 4096, source, prefers: None };
    named::create(&server.endpoint, &create, TIMEOUT).unwrap();
    let mut region = NamedRegion::open(&server.endpoint, &name, true, TIMEOUT).unwrap();
    let (file, path) = ("f".repeat(641), "p".repeat(641));
    let refusals = [
        NamedRegion::open(&server.endpoint, &longer, true, TIMEOUT).map(|_| ()),
        region.copy(&longer, false, false).map(|_| ()),
        region.back_up(&path, false).map(|_| ()),
        named::restore(&server.endpoint, &path, "r", false, TIMEOUT).map(|_| ()),
        named::restore(&server.endpoint, "/p", &longer, true, TIMEOUT).map(|_| ()),
        region.copy_with_range("c", false, FileRange { path: &file, offset: 0 }).map(|_| ()),
    ];
    let sources = [
        Source::File { path: &file, offset: 0 },
        Source::Server { address: &path, region: "r", offset: 0, writes_back: true },
        Source::Server { address: "a", region: &longer, offset: 0, writes_back: true },
    ];
    let made = sources.map(|source| {
        let create = Create { name: "r", source, ..create };
        named::create(&server.endpoint, &create, TIMEOUT).map(|_| ())
    });
    for (at, refusal) in refusals.into_iter().chain(made).enumerate() {
        let error = refusal.unwrap_err().to_string();
        assert!(error.contains("; choose a shorter one"), "{at}: {error}");
    }
    assert_eq!(named::list(&server.endpoint, TIMEOUT).unwrap().len(), 1);
}
