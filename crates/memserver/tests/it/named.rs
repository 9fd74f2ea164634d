//! Named regions: thin, of any page size, copied, pinned, made from files and written back.

use std::fs;
use std::time::{Duration, Instant};

use farmem_memserver::ServerConfig;
use farmem_region::{ByteCount, PAGE_SIZE, PageCount, PageIndex, PageRange, RegionId};
use farmem_wire::{
    Absent, Action, AskMap, Copy, Create, Delete, Free, Header, List, MapReply, Open, PAGE_SIZES,
    PageEntry, Prefer, Progress, RangeEntry, RefusalCode, RegionInfo, Resize, Source, Tier,
};

use crate::raw::{Raw, TestServer, patiently};

const ZEROS: Source<'static> = Source::Fill(0);

impl Raw {
    pub(crate) fn create(
        &mut self,
        name: &str,
        size: u64,
        page_bytes: u32,
        source: Source<'_>,
    ) -> Result<RegionInfo, RefusalCode> {
        self.create_preferring(name, size, page_bytes, source, None)
    }

    pub(crate) fn create_preferring(
        &mut self,
        name: &str,
        size: u64,
        page_bytes: u32,
        source: Source<'_>,
        prefers: Option<Tier>,
    ) -> Result<RegionInfo, RefusalCode> {
        let create = Create { name, size: ByteCount::new(size), page_bytes, source, prefers };
        let header = self.request(Action::Create);
        let (reply, body) = self.call(header, |out| create.encode(out));
        reply.refusal.map_or_else(|| Ok(RegionInfo::decode(&body).unwrap().0), Err)
    }

    pub(crate) fn resize(&mut self, pages: u64) -> Result<RegionInfo, RefusalCode> {
        let resize = Resize { size: PageCount::new(pages).bytes() };
        let header = self.request(Action::Resize);
        let (reply, body) = self.call(header, |out| resize.encode(out));
        reply.refusal.map_or_else(|| Ok(RegionInfo::decode(&body).unwrap().0), Err)
    }

    pub(crate) fn prefer(
        &mut self,
        tier: Option<Tier>,
        start: u64,
        count: u64,
    ) -> Result<u64, RefusalCode> {
        let range = PageRange { start: PageIndex::new(start), count: PageCount::new(count) };
        let header = Header { entries: 1, ..self.request(Action::Prefer) };
        let (reply, body) = self.call(header, |out| {
            RangeEntry(range).encode(out);
            Prefer { tier }.encode(out);
        });
        let progress = || Ok(Progress::decode(&body).unwrap().changed.get());
        reply.refusal.map_or_else(progress, Err)
    }

    /// A connection that is attached to a named region, as its only writer.
    pub(crate) fn opened(server: &TestServer, name: &str) -> Result<Self, RefusalCode> {
        let mut client = Self::greeted(server);
        let open = Open { take_over: true, name };
        let (reply, _) = client.call(Header::request(Action::Open, 0), |out| open.encode(out));
        if let Some(code) = reply.refusal {
            return Err(code);
        }
        client.session = reply;
        Ok(client)
    }

    pub(crate) fn show(&mut self) -> RegionInfo {
        let (reply, body) = self.call(self.request(Action::Show), |_| ());
        assert_eq!(reply.refusal, None);
        RegionInfo::decode(&body).unwrap().0
    }

    pub(crate) fn copy(
        &mut self,
        action: Action,
        name: &str,
        on_access: bool,
    ) -> Result<RegionInfo, RefusalCode> {
        self.copy_to(action, &Copy { on_access, name, range: None })
    }

    pub(crate) fn copy_to(
        &mut self,
        action: Action,
        copy: &Copy<'_>,
    ) -> Result<RegionInfo, RefusalCode> {
        let (reply, body) = self.call(self.request(action), |out| copy.encode(out));
        reply.refusal.map_or_else(|| Ok(RegionInfo::decode(&body).unwrap().0), Err)
    }

    /// An operation on one range; asks until all of it is done. Returns the pages changed.
    pub(crate) fn over(
        &mut self,
        action: Action,
        mut start: u64,
        count: u64,
    ) -> Result<u64, RefusalCode> {
        let (end, mut changed) = (start.saturating_add(count), 0);
        loop {
            let count = PageCount::new(end - start);
            let range = PageRange { start: PageIndex::new(start), count };
            let header = Header { entries: 1, ..self.request(action) };
            let body = patiently(|| {
                let (reply, body) = self.call(header, |out| RangeEntry(range).encode(out));
                reply.refusal.map_or(Ok(body), Err)
            })?;
            let progress = Progress::decode(&body).unwrap();
            changed += progress.changed.get();
            match progress.next {
                None => return Ok(changed),
                Some((0, page)) => start = page.get(),
                Some(other) => panic!("{other:?}"),
            }
        }
    }

    /// Greater than all before.
    fn next_version(&self) -> u64 {
        use std::sync::atomic::{AtomicU64, Ordering};
        static VERSION: AtomicU64 = AtomicU64::new(1);
        VERSION.fetch_add(1, Ordering::Relaxed)
    }

    /// Deletes the region, whether it was copied or not.
    pub(crate) fn delete(&mut self) -> Result<(), RefusalCode> {
        let delete = Delete { keeps_copies: true };
        let (reply, _) = self.call(self.request(Action::Delete), |out| delete.encode(out));
        reply.refusal.map_or(Ok(()), Err)
    }

    /// Deletes the region unless it was copied.
    pub(crate) fn delete_uncopied(&mut self) -> Result<(), RefusalCode> {
        let (reply, _) = self.call(self.request(Action::Delete), |_| ());
        reply.refusal.map_or(Ok(()), Err)
    }
}

/// A server that promises a thousand times what it has.
fn start(pages: u64) -> TestServer {
    TestServer::start(pages, |config| config.promise_percent = 2_000_000_000)
}

fn in_directory(directory: &tempfile::TempDir) -> impl FnOnce(&mut ServerConfig) {
    let path = directory.path().to_owned();
    move |config| {
        config.promise_percent = 100_000;
        config.directories = vec![path];
    }
}

#[test]
fn cap_5_a_tebibyte_is_created_and_copied_at_once_and_costs_nothing_before_it_is_used() {
    let server = start(256);
    let mut client = Raw::greeted(&server);
    // How fast that is is for `cargo xtask bench server` to say; here it is what it takes.
    let before = server.stat();
    for at in 0..5 {
        client.create(&format!("big {at}"), 1 << 40, 4096, ZEROS).unwrap();
    }
    let made = server.stat();
    assert_eq!((made.table_bytes, made.slots), (before.table_bytes, 0), "nothing is there yet");
    let mut big = Raw::opened(&server, "big 0").unwrap();
    assert_eq!(big.read(&[(0, 0), ((1 << 28) - 1, 0)]).unwrap(), [0, 0]);
    big.write(&[(7, 1, 7), ((1 << 28) - 1, 1, 8)]).unwrap();
    let before = server.stat();
    for at in 0..5 {
        big.copy(Action::Clone, &format!("copy {at}"), false).unwrap();
    }
    let copied = server.stat();
    assert_eq!(copied.table_bytes, before.table_bytes, "all of it is shared");
    // Each of them was one message, beside those of a look at the server.
    let look = server.stat().requests - copied.requests;
    assert_eq!(copied.requests - before.requests, 5 + look);
    assert_eq!(server.stat().slots, 3, "two pages, and one that all absent pages look like");
    for at in 0..5 {
        for name in ["big", "copy"] {
            Raw::opened(&server, &format!("{name} {at}")).unwrap().delete().unwrap();
        }
    }
    assert_eq!(big.read(&[(7, 0)]), Err(RefusalCode::NoSession));
    drop((client, big));
    server.wait_until_empty();
}

/// However long a range is: one message, and time for what is stored in it.
#[test]
fn cap_12_cap_13_an_operation_on_a_tebibyte_is_one_message() {
    const PAGES: u64 = 1 << 28;
    let directory = tempfile::tempdir().unwrap();
    let server = TestServer::start(4096, |config| {
        in_directory(&directory)(config);
        config.promise_percent = 2_000_000_000;
    });
    let path = directory.path().join("sparse");
    fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let file = Source::File { path: path.to_str().unwrap(), offset: 0 };
    let mut client = Raw::greeted(&server);
    for (name, source) in [("nothing", Source::Nothing), ("zeros", ZEROS), ("file", file)] {
        client.create(name, 1 << 40, 4096, source).unwrap();
        let mut region = Raw::opened(&server, name).unwrap();
        let actions: &[Action] = match name {
            "nothing" => &[Action::Initialise, Action::Prefetch, Action::Unpin, Action::Invalidate],
            "zeros" => &[Action::Prefetch, Action::Unpin, Action::Invalidate],
            _ => &[Action::Flush, Action::Unpin, Action::Invalidate],
        };
        for action in actions {
            let mut took = Duration::MAX;
            for _ in 0..10 {
                // Far apart, so that the table has a part of each gibibyte.
                let version = region.next_version();
                region.write(&[(0, version, 1), (PAGES - 1, version, 2)]).unwrap();
                let before = server.stat().requests;
                let began = Instant::now();
                region.over(*action, 0, PAGES).unwrap();
                took = took.min(began.elapsed());
                let requests = server.stat().requests - before;
                assert_eq!(requests, 3, "{name}: {action:?}, and a hello and a stat to ask");
            }
            // A flush waits for the disk.
            let most = if *action == Action::Flush { 1_000 } else { 5 };
            assert!(took < Duration::from_millis(most), "{name}: {action:?} took {took:?}");
        }
        let began = Instant::now();
        region.prefer(Some(Tier::Dram), 0, PAGES).unwrap();
        assert!(began.elapsed() < Duration::from_secs(1));
    }
}

#[test]
fn cap_90_the_promise_is_kept_to() {
    let server = TestServer::start(1024, |config| config.promise_percent = 200);
    let mut client = Raw::greeted(&server);
    let size = 1024 * PAGE_SIZE as u64;
    client.create("one", size, 4096, ZEROS).unwrap();
    client.create("two", size, 4096, ZEROS).unwrap();
    assert_eq!(client.create("three", 4096, 4096, ZEROS), Err(RefusalCode::Full));
    Raw::opened(&server, "one").unwrap().delete().unwrap();
    client.create("three", size, 4096, ZEROS).unwrap();
    assert_eq!(server.stat().promise_bytes, 2 * size);
}

#[test]
fn cap_90_when_more_is_written_than_there_is_the_write_is_refused_and_nothing_else() {
    let server = TestServer::start(64, |config| {
        config.promise_percent = 1000;
        config.limits.inflight_bytes = ByteCount::new(64 * PAGE_SIZE as u64);
    });
    let mut client = Raw::greeted(&server);
    client.create("much", 640 * PAGE_SIZE as u64, 4096, ZEROS).unwrap();
    let mut client = Raw::opened(&server, "much").unwrap();
    // The arena has whole chunks: what is beyond the memory is for pages on their way.
    let refused = (0..640).find(|page| client.write(&[(*page, 1, 1)]).is_err()).unwrap();
    assert_eq!(client.write(&[(refused, 1, 1)]), Err(RefusalCode::Full));
    for page in 0..refused {
        assert_eq!(client.read(&[(page, 1)]).unwrap(), [1]);
    }
    client.over(Action::Invalidate, 0, 1).unwrap();
    client.write(&[(refused, 1, 1)]).unwrap();
}

#[test]
fn cap_7_every_fill_and_page_size() {
    let server = start(4096);
    let mut client = Raw::greeted(&server);
    for (fill, page_bytes) in [(0, 512), (0xff, 1024), (7, 4096), (1, 64 << 10), (200, 2 << 20)] {
        let name = format!("{page_bytes}");
        let created = client.create(&name, 4 << 20, page_bytes, Source::Fill(fill)).unwrap();
        assert_eq!((created.pages.get(), created.page_bytes), (1024, page_bytes));
        let mut region = Raw::opened(&server, &name).unwrap();
        assert_eq!(region.read(&[(3, 0), (1023, 0)]).unwrap(), [fill, fill]);
        assert_eq!(region.show().stored.get(), 0, "reading costs nothing");
        assert_eq!(region.over(Action::Initialise, 0, 512).unwrap(), 512);
        assert_eq!(region.over(Action::Initialise, 0, 512).unwrap(), 0, "they are initialised");
        region.write(&[(0, 1, fill ^ 1)]).unwrap();
        assert_eq!(region.read(&[(0, 1), (1, 0)]).unwrap(), [fill ^ 1, fill]);
        assert_eq!(region.over(Action::Invalidate, 0, 1024).unwrap(), 512);
        assert_eq!(region.read(&[(0, 0)]).unwrap(), [fill]);
        if page_bytes > 4096 {
            let unit = u64::from(page_bytes) / 4096;
            assert_eq!(region.over(Action::Invalidate, 1, unit), Err(RefusalCode::Malformed));
            assert_eq!(region.over(Action::Invalidate, 0, unit - 1), Err(RefusalCode::Malformed));
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let server = start(256);
    let mut client = Raw::greeted(&server);
    let mut create = |name: &str, size, page_bytes| client.create(name, size, page_bytes, ZEROS);
    for (size, page_bytes) in [
        (0, 4096),
        (4096, 0),
        (4096, 8192),
        (4097, 4096),
        (512, 512),
        (4096, 64 << 10),
        (3 << 20, 2 << 20),
        (u64::MAX, 4096),
    ] {
        assert_eq!(
            create("x", size, page_bytes),
            Err(RefusalCode::Malformed),
            "{size} {page_bytes}"
        );
    }
    assert_eq!(create("", 4096, 4096), Err(RefusalCode::Malformed));
    assert_eq!(create("a\nb", 4096, 4096), Err(RefusalCode::Malformed));
    assert_eq!(create("x", u64::MAX / 4096 * 4096, 4096), Err(RefusalCode::Full));
    create("x", 8192, 4096).unwrap();
    assert_eq!(create("x", 8192, 4096), Err(RefusalCode::NameTaken));
    assert_eq!(Raw::opened(&server, "y").err(), Some(RefusalCode::NoRegion));
    let mut region = Raw::opened(&server, "x").unwrap();
    for (start, count) in [(0, 3), (2, 1), (u64::MAX, 1), (1, u64::MAX)] {
        for action in [Action::Pin, Action::Invalidate, Action::Prefetch, Action::Initialise] {
            let range = PageRange { start: PageIndex::new(start), count: PageCount::new(count) };
            let header = Header { entries: 1, ..region.request(action) };
            let (reply, _) = region.call(header, |out| RangeEntry(range).encode(out));
            assert_eq!(reply.refusal, Some(RefusalCode::OutOfBounds));
        }
    }
    region.delete().unwrap();
    assert_eq!(region.delete(), Err(RefusalCode::NoSession), "once is enough");
    let mut session = Raw::with_region(&server, 4);
    assert_eq!(session.delete(), Err(RefusalCode::Malformed), "it goes with its session");
}

#[test]
fn cap_11_pinned_pages_are_not_given_up_and_cannot_be_more_than_fit() {
    let server = start(1024);
    let mut client = Raw::greeted(&server);
    client.create("pinned", 8 << 20, 4096, Source::Fill(5)).unwrap();
    let mut region = Raw::opened(&server, "pinned").unwrap();
    assert_eq!(region.over(Action::Pin, 0, 512).unwrap(), 512, "pages are made ahead");
    assert_eq!((region.show().pinned.get(), region.show().dram.get()), (512, 512));
    assert_eq!(region.over(Action::Invalidate, 511, 2), Err(RefusalCode::Pinned));
    assert_eq!(region.delete(), Err(RefusalCode::Pinned));
    assert_eq!(region.over(Action::Pin, 1024, 1024), Err(RefusalCode::Full));
    assert_eq!(server.stat().pinned_pages, 512);
    // What was pinned before stays so when more is refused.
    assert_eq!(region.over(Action::Unpin, 300, 212).unwrap(), 212);
    let rest = 1024 * 3 / 4 - 310;
    assert_eq!(region.over(Action::Pin, 512, rest).unwrap(), rest);
    assert_eq!(region.over(Action::Pin, 290, 90), Err(RefusalCode::Full));
    assert_eq!(server.stat().pinned_pages, 300 + rest);
    assert_eq!(region.over(Action::Unpin, 0, 2048).unwrap(), 300 + rest);
    region.delete().unwrap();
    assert_eq!(server.stat().pinned_pages, 0);
}

/// Whose memory it is may drop it, and whoever pinned it keeps what comes next.
#[test]
fn cap_11_a_pinned_page_is_freed_by_who_asks_for_that_and_stays_pinned() {
    let server = start(1024);
    let mut client = Raw::greeted(&server);
    for page_bytes in [4096, 64 << 10] {
        client.create("pinned", 1 << 20, page_bytes, Source::Fill(5)).unwrap();
        let mut region = Raw::opened(&server, "pinned").unwrap();
        region.write(&[(3, 1, 9), (4, 1, 9)]).unwrap();
        region.over(Action::Pin, 0, 256).unwrap();
        assert_eq!(region.free(3, 1), Err(RefusalCode::Pinned));
        assert_eq!(region.read(&[(3, 1)]), Ok(vec![9]));
        let header = Header { entries: 1, ..region.request(Action::Free) };
        let range = PageRange { start: PageIndex::new(3), count: PageCount::new(1) };
        let (reply, _) = region.call(header, |out| {
            RangeEntry(range).encode(out);
            Free { also_pinned: true }.encode(out);
        });
        assert_eq!(reply.refusal, None);
        assert_eq!(region.read(&[(3, 0), (4, 1)]), Ok(vec![5, 9]));
        region.write(&[(3, 2, 7)]).unwrap();
        let info = region.show();
        assert_eq!((info.pinned.get(), info.dram.get()), (256, 256), "{page_bytes}");
        region.over(Action::Unpin, 0, 256).unwrap();
        region.delete().unwrap();
    }
}

#[test]
fn cap_17_chains_of_copies_and_the_memory_they_share() {
    let server = start(4096);
    let mut client = Raw::greeted(&server);
    client.create("0", 8 << 20, 4096, ZEROS).unwrap();
    let mut base = Raw::opened(&server, "0").unwrap();
    for page in 0..1000 {
        base.write(&[(page, 1, 1)]).unwrap();
    }
    for at in 1..=40_u64 {
        let mut from = Raw::opened(&server, &(at - 1).to_string()).unwrap();
        from.copy(Action::Clone, &at.to_string(), false).unwrap();
        let mut copy = Raw::opened(&server, &at.to_string()).unwrap();
        copy.write(&[(at, 2, at as u8)]).unwrap();
    }
    assert_eq!(server.stat().slots, 1000 + 40);
    for at in [0, 1, 17, 40_u64] {
        let mut copy = Raw::opened(&server, &at.to_string()).unwrap();
        for page in [1, 16, 17, 18, 40, 999] {
            let expected = if (1..=at).contains(&page) { page as u8 } else { 1 };
            assert_eq!(copy.read(&[(page, 0)]).unwrap(), [expected], "copy {at}, page {page}");
        }
    }
    // From the middle outwards: what is left is whole, and at the end nothing is left.
    for at in (20..=40).chain(0..20) {
        Raw::opened(&server, &at.to_string()).unwrap().delete().unwrap();
        if at == 40 {
            let mut copy = Raw::opened(&server, "19").unwrap();
            assert_eq!(copy.read(&[(19, 0), (20, 0)]).unwrap(), [19, 1]);
        }
    }
    drop((client, base));
    server.wait_until_empty();
}

#[test]
fn cap_100_a_snapshot_never_changes() {
    let server = start(1024);
    let mut client = Raw::greeted(&server);
    client.create("live", 1 << 20, 4096, ZEROS).unwrap();
    let mut live = Raw::opened(&server, "live").unwrap();
    live.write(&[(0, 1, 1)]).unwrap();
    let frozen = live.copy(Action::Snapshot, "then", false).unwrap();
    assert!(frozen.is_frozen);
    assert_eq!(live.copy(Action::Snapshot, "then", false), Err(RefusalCode::NameTaken));
    live.write(&[(0, 2, 2), (1, 1, 3)]).unwrap();
    let mut then = Raw::opened(&server, "then").unwrap();
    assert_eq!(then.read(&[(0, 0), (1, 0)]).unwrap(), [1, 0]);
    assert_eq!(then.write(&[(0, 9, 9)]), Err(RefusalCode::Frozen));
    assert_eq!(then.over(Action::Invalidate, 0, 1), Err(RefusalCode::Frozen));
    // Back to then: a copy of the snapshot can be written again.
    then.copy(Action::Clone, "again", false).unwrap();
    let mut again = Raw::opened(&server, "again").unwrap();
    again.write(&[(0, 9, 9)]).unwrap();
    assert_eq!(again.read(&[(0, 9), (1, 0)]).unwrap(), [9, 0]);
    assert_eq!(then.read(&[(0, 0)]).unwrap(), [1]);
}

#[test]
fn cap_20_copy_on_access_makes_what_is_read_the_copys_own() {
    let server = start(1024);
    let mut client = Raw::greeted(&server);
    client.create("original", 1 << 20, 4096, ZEROS).unwrap();
    let mut original = Raw::opened(&server, "original").unwrap();
    original.write(&[(0, 1, 1), (1, 1, 2)]).unwrap();
    original.copy(Action::Clone, "on write", false).unwrap();
    original.copy(Action::Clone, "on access", true).unwrap();
    let before = server.stat().slots;
    Raw::opened(&server, "on write").unwrap().read(&[(0, 1)]).unwrap();
    assert_eq!(server.stat().slots, before);
    let mut copy = Raw::opened(&server, "on access").unwrap();
    for _ in 0..2 {
        assert_eq!(copy.read(&[(0, 1)]).unwrap(), [1]);
        assert_eq!(server.stat().slots, before + 1, "once");
    }
    // Several in one message.
    original.copy(Action::Clone, "both", true).unwrap();
    let mut copy = Raw::opened(&server, "both").unwrap();
    assert_eq!(copy.read(&[(0, 1), (1, 1)]).unwrap(), [1, 2]);
    assert_eq!(server.stat().slots, before + 3);
    assert_eq!(original.read(&[(0, 1), (1, 1)]).unwrap(), [1, 2]);
}

#[test]
fn names_are_listed_and_an_old_writer_is_shut_out() {
    let server = start(64);
    let mut client = Raw::greeted(&server);
    for at in 0..40 {
        client.create(&format!("region {at:02}"), 4096, 4096, ZEROS).unwrap();
    }
    let (mut names, mut after) = (Vec::new(), RegionId::new(0));
    loop {
        let header = client.request(Action::List);
        let (_, body) = client.call(header, |out| List { after }.encode(out));
        let infos = RegionInfo::decode_all(&body).unwrap();
        let Some(last) = infos.last() else { break };
        after = last.region;
        names.extend(infos.into_iter().map(|info| info.name));
    }
    let expected: Vec<_> = (0..40).map(|at| format!("region {at:02}")).collect();
    assert_eq!(names, expected);
    let mut former = Raw::opened(&server, "region 00").unwrap();
    let mut latter = Raw::opened(&server, "region 00").unwrap();
    assert_eq!(former.write(&[(0, 1, 1)]), Err(RefusalCode::StaleEpoch));
    latter.write(&[(0, 1, 1)]).unwrap();
    drop((former, latter));
    // A region outlives who used it.
    let stat = server.wait_until(|stat| stat.connections == 2);
    assert_eq!((stat.regions, stat.pages, stat.sessions), (40, 1, 0));
}

#[test]
fn cap_8_cap_15_a_file_is_lent_and_only_what_changed_is_written_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    let mut model = vec![0; 1 << 20];
    for (page, chunk) in model.chunks_mut(PAGE_SIZE).enumerate() {
        chunk.fill(page as u8);
    }
    fs::write(&path, &model).unwrap();
    let server = TestServer::start(1024, in_directory(&directory));
    let mut client = Raw::greeted(&server);
    let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
    for page_bytes in [512, 4096, 64 << 10] {
        let name = format!("file {page_bytes}");
        client.create(&name, 1 << 20, page_bytes, source).unwrap();
        let mut region = Raw::opened(&server, &name).unwrap();
        assert_eq!(region.read(&[(3, 0), (255, 0)]).unwrap(), [model[3 * PAGE_SIZE], 255]);
        assert!(region.over(Action::Prefetch, 0, 64).unwrap() > 0);
        region.write(&[(9, 1, 0xaa), (10, 1, 0xbb)]).unwrap();
        // Both are in one portion of 64 KiB.
        let dirty = if page_bytes > 4096 { 16 } else { 2 };
        assert_eq!(region.show().dirty.get(), dirty);
        assert_eq!(fs::read(&path).unwrap(), model, "nothing is written before the flush");
        // What another program changed in the file meanwhile is not overwritten.
        model[20 * PAGE_SIZE..21 * PAGE_SIZE].fill(page_bytes as u8 | 1);
        fs::write(&path, &model).unwrap();
        assert_eq!(region.over(Action::Flush, 0, 256).unwrap(), dirty);
        model[9 * PAGE_SIZE..10 * PAGE_SIZE].fill(0xaa);
        model[10 * PAGE_SIZE..11 * PAGE_SIZE].fill(0xbb);
        assert_eq!(fs::read(&path).unwrap(), model);
        assert_eq!((region.show().dirty.get(), region.over(Action::Flush, 0, 256)), (0, Ok(0)));
        region.delete().unwrap();
        model[9 * PAGE_SIZE..10 * PAGE_SIZE].fill(1);
        fs::write(&path, &model).unwrap();
    }
}

#[test]
fn cap_17_a_copy_of_a_file_keeps_what_the_file_held() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    fs::write(&path, vec![1; 64 * PAGE_SIZE]).unwrap();
    let server = TestServer::start(1024, in_directory(&directory));
    let mut client = Raw::greeted(&server);
    let source = Source::File { path: path.to_str().unwrap(), offset: PAGE_SIZE as u64 };
    client.create("file", 63 * PAGE_SIZE as u64, 4096, source).unwrap();
    let mut region = Raw::opened(&server, "file").unwrap();
    region.copy(Action::Snapshot, "then", false).unwrap();
    // Neither has read the page: the snapshot must, before the file changes.
    region.write(&[(5, 1, 9)]).unwrap();
    region.over(Action::Flush, 0, 63).unwrap();
    assert_eq!(fs::read(&path).unwrap()[6 * PAGE_SIZE], 9);
    let mut then = Raw::opened(&server, "then").unwrap();
    assert_eq!(then.read(&[(5, 0), (6, 0)]).unwrap(), [1, 1]);
    assert_eq!(then.over(Action::Flush, 0, 63), Err(RefusalCode::NoFile), "a copy has no file");
}

#[test]
fn cap_11_a_pin_that_is_refused_pins_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    fs::write(&path, vec![1; 1024 * PAGE_SIZE]).unwrap();
    let server = TestServer::start(2048, in_directory(&directory));
    let mut client = Raw::greeted(&server);
    let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
    client.create("file", 1024 * PAGE_SIZE as u64, 4096, source).unwrap();
    let mut region = Raw::opened(&server, "file").unwrap();
    region.over(Action::Pin, 8, 8).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(600 * PAGE_SIZE as u64).unwrap();
    assert_eq!(region.over(Action::Pin, 0, 1024), Err(RefusalCode::FileFailed));
    assert_eq!(region.show().pinned.get(), 8, "what was pinned before");
    assert_eq!(region.over(Action::Unpin, 8, 8), Ok(8));
    assert_eq!(server.stat().pinned_pages, 0);
    region.over(Action::Pin, 0, 512).unwrap();
    assert_eq!(region.show().pinned.get(), 512);
}

#[test]
fn cap_11_more_ranges_pinned_apart_than_there_may_be_are_refused() {
    const RANGES: u64 = 16_384;
    let server = start(2 * RANGES);
    let mut client = Raw::greeted(&server);
    client.create("r", (2 * RANGES + 8) << 12, 4096, Source::Fill(7)).unwrap();
    let mut region = Raw::opened(&server, "r").unwrap();
    for page in 0..RANGES {
        assert_eq!(region.over(Action::Pin, 2 * page, 1), Ok(1));
    }
    let pinned = |region: &mut Raw| region.show().pinned.get();
    assert_eq!(region.over(Action::Pin, 2 * RANGES, 1), Err(RefusalCode::TooManyRanges));
    assert_eq!(pinned(&mut region), RANGES);
    // What fills a gap makes them fewer; then one is made more by one that is unpinned.
    assert_eq!(region.over(Action::Pin, 0, 3), Ok(1));
    assert_eq!(region.over(Action::Pin, 2 * RANGES, 1), Ok(1));
    assert_eq!(region.over(Action::Unpin, 1, 1), Err(RefusalCode::TooManyRanges));
    assert_eq!(pinned(&mut region), RANGES + 2);
    assert_eq!(region.over(Action::Unpin, 0, 2 * RANGES), Ok(RANGES + 1));
    assert_eq!(pinned(&mut region), 1);
}

/// However many regions are made from the file, in whatever parts of it.
#[test]
fn cap_17_a_copy_of_a_file_keeps_what_the_file_held_whoever_writes_there() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    fs::write(&path, vec![1; 64 * PAGE_SIZE]).unwrap();
    let server = TestServer::start(1024, in_directory(&directory));
    let mut client = Raw::greeted(&server);
    let link = directory.path().join("link");
    fs::hard_link(&path, &link).unwrap();
    let mut create = |name: &str, path: &std::path::Path, offset: u64, pages: u64| {
        let source = Source::File { path: path.to_str().unwrap(), offset };
        client.create(name, pages * PAGE_SIZE as u64, 512, source).unwrap();
        Raw::opened(&server, name).unwrap()
    };
    let mut first = create("first", &path, PAGE_SIZE as u64, 32);
    let mut beside = create("beside", &path, 1536, 48);
    first.copy(Action::Snapshot, "then", false).unwrap();
    let write = |region: &mut Raw, page, byte| {
        region.write(&[(page, 1, byte)]).unwrap();
        region.over(Action::Flush, 0, 32).unwrap();
    };
    // One that was there with it, one that is made with it, and one that is made after it.
    write(&mut beside, 3, 9);
    let mut second = create("second", &link, PAGE_SIZE as u64, 32);
    write(&mut second, 7, 9);
    first.delete().unwrap();
    let mut third = create("third", &path, PAGE_SIZE as u64, 32);
    write(&mut third, 11, 9);
    let file = fs::read(&path).unwrap();
    let written = [1536 + 3 * PAGE_SIZE, 8 * PAGE_SIZE, 12 * PAGE_SIZE];
    assert!(written.iter().all(|at| file[*at..at + PAGE_SIZE] == [9; PAGE_SIZE]));
    let mut then = Raw::opened(&server, "then").unwrap();
    let all: Vec<_> = (0..32).map(|page| (page, 0)).collect();
    assert_eq!(then.read(&all).unwrap(), [1; 32]);
    // A region that may be written back is no copy: it sees what others write where it has not read it yet.
    assert_eq!(third.read(&[(7, 0), (8, 0)]), Ok(vec![9, 1]));
}

#[test]
fn a_file_that_is_cut_or_removed_is_told_and_harms_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    fs::write(&path, vec![1; 64 * PAGE_SIZE]).unwrap();
    let server = TestServer::start(1024, in_directory(&directory));
    let mut client = Raw::greeted(&server);
    let name = path.to_str().unwrap();
    let size = 64 * PAGE_SIZE as u64;
    let at = |offset| Source::File { path: name, offset };
    let outside = Source::File { path: "/etc/hostname", offset: 0 };
    assert_eq!(client.create("etc", 4096, 4096, outside), Err(RefusalCode::NoFile));
    assert_eq!(client.create("far", size, 4096, at(4096)), Err(RefusalCode::NoFile));
    assert_eq!(client.create("odd", 4096, 4096, at(5)), Err(RefusalCode::Malformed));
    client.create("file", size, 4096, at(0)).unwrap();
    let mut region = Raw::opened(&server, "file").unwrap();
    region.write(&[(2, 1, 2), (40, 1, 4)]).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(32 * PAGE_SIZE as u64).unwrap();
    assert_eq!(region.read(&[(50, 0)]), Err(RefusalCode::FileFailed));
    assert!(server.logs("cannot read the backing file"));
    assert_eq!(region.over(Action::Flush, 32, 32), Err(RefusalCode::FileFailed));
    assert_eq!(region.read(&[(2, 1), (40, 1), (3, 0)]).unwrap(), [2, 4, 1]);
    assert_eq!(region.over(Action::Flush, 0, 32).unwrap(), 1);
    assert_eq!(fs::read(&path).unwrap().len(), 32 * PAGE_SIZE, "it is not made longer");
    fs::remove_file(&path).unwrap();
    region.write(&[(3, 1, 3)]).unwrap();
    assert_eq!(region.over(Action::Flush, 0, 32), Err(RefusalCode::FileFailed));
    assert_eq!(region.read(&[(3, 1)]).unwrap(), [3], "nothing is lost by that");
    region.delete().unwrap();
    drop((client, region));
    server.wait_until_empty();
}

impl Raw {
    /// The pages and versions that a map tells of, and its end.
    fn map(&mut self, since: u64) -> (Vec<(u64, u64)>, MapReply) {
        let (mut pages, mut from, mut stamp) = (Vec::new(), PageIndex::new(0), None);
        loop {
            let ask = AskMap { from, since, leases: false, news: false };
            let header = self.request(Action::Map);
            let (reply, entries, body) = self.call_all(header, |out| ask.encode(out));
            assert_eq!(reply.refusal, None);
            pages.extend(
                PageEntry::decode_all(&entries)
                    .map(|entry| (entry.page.get(), entry.version.get())),
            );
            let end = MapReply::decode(&body).unwrap();
            let stamp = *stamp.get_or_insert(end.stamp);
            match end.next {
                Some(next) => from = next,
                None => return (pages, MapReply { stamp, ..end }),
            }
        }
    }
}

#[test]
fn cap_93_a_map_tells_what_has_changed() {
    let server = start(4096);
    Raw::greeted(&server).create("map", 8 << 20, 4096, Source::Fill(3)).unwrap();
    let mut region = Raw::opened(&server, "map").unwrap();
    let (pages, first) = region.map(0);
    assert_eq!((pages.len(), first.absent, first.is_all), (0, Absent::Fill(3), false));
    for page in 0..700 {
        region.write(&[(page, page + 1, 1)]).unwrap();
    }
    let (pages, second) = region.map(first.stamp);
    assert_eq!(pages, (0..700).map(|page| (page, page + 1)).collect::<Vec<_>>());
    assert_eq!(region.map(second.stamp).0, [], "nothing has changed");
    region.write(&[(1024, 1, 1)]).unwrap();
    let (pages, third) = region.map(second.stamp);
    assert_eq!(pages, [(1024, 1)], "the leaf in which something has changed");
    // What is forgotten is told by telling all that is there.
    region.over(Action::Invalidate, 0, 512).unwrap();
    let (pages, fourth) = region.map(third.stamp);
    assert!(fourth.is_all && pages.len() == 700 - 512 + 1, "{fourth:?}");
    // Tiers and readers change nothing of it; a copy has a map of its own.
    region.read(&[(600, 601), (5, 0)]).unwrap();
    region.copy(Action::Clone, "copy", false).unwrap();
    let mut copy = Raw::opened(&server, "copy").unwrap();
    copy.write(&[(2000, 1, 1)]).unwrap();
    assert_eq!(copy.map(fourth.stamp).0, [(2000, 1)]);
    assert_eq!(region.map(fourth.stamp).0, []);
    let unknown = region.map(u64::MAX);
    assert!(unknown.1.is_all && unknown.0 == pages);
}

#[test]
fn concurrent_first_accesses_initialise_once() {
    for page_bytes in PAGE_SIZES {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("data");
        fs::write(&path, vec![7; 512 * PAGE_SIZE]).unwrap();
        let server = TestServer::start(4096, |config| {
            in_directory(&directory)(config);
            config.workers = 3;
        });
        let mut client = Raw::greeted(&server);
        let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
        client.create("file", 2 << 20, page_bytes, source).unwrap();
        let mut first = Raw::opened(&server, "file").unwrap();
        let session = first.session;
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let server = &server;
                scope.spawn(move || {
                    let mut reader = Raw::greeted(server);
                    reader.session = session;
                    let mode = farmem_wire::AttachMode::Join;
                    let join = farmem_wire::Attach { mode, replaces: 0 };
                    reader.call(reader.request(Action::Attach), |out| join.encode(out));
                    for page in 0..512 {
                        // Two from the one end, two from the other.
                        let page = if thread < 2 { page } else { 511 - page };
                        assert_eq!(reader.read(&[(page, 0)]).unwrap(), [7]);
                    }
                });
            }
        });
        assert_eq!((first.show().stored.get(), server.stat().pages), (512, 512));
        assert_eq!(server.wait_until(|stat| stat.slots == 512).slots, 512);
    }
}

#[test]
fn cap_6_the_first_access_makes_a_portion_as_a_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    let mut held = vec![0; 4 << 20];
    (0..).zip(held.chunks_mut(PAGE_SIZE)).for_each(|(page, chunk)| chunk.fill(page as u8));
    fs::write(&path, &held).unwrap();
    let server = TestServer::start(8192, in_directory(&directory));
    let mut client = Raw::greeted(&server);
    let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
    for page_bytes in PAGE_SIZES {
        let unit = u64::from(page_bytes).div_ceil(PAGE_SIZE as u64);
        let name = format!("file {page_bytes}");
        client.create(&name, 4 << 20, page_bytes, source).unwrap();
        let mut region = Raw::opened(&server, &name).unwrap();
        // Whether it is read or written in part.
        assert_eq!(region.read(&[(600, 0)]).unwrap(), [600_u64 as u8]);
        assert_eq!(region.show().stored.get(), unit);
        region.write(&[(5, 1, 99)]).unwrap();
        let info = region.show();
        let read = if unit > 1 { unit } else { 0 };
        assert_eq!(info.stored.get(), unit + read.max(1), "{page_bytes}");
        assert_eq!(info.dirty.get(), read.max(1), "all of what is written in part is dirty");
        // What is written as a whole is not read before: the file may be gone.
        if unit == 16 {
            fs::rename(&path, directory.path().join("away")).unwrap();
            fs::OpenOptions::new()
                .write(true)
                .open(directory.path().join("away"))
                .unwrap()
                .set_len(1 << 20)
                .unwrap();
            let whole: Vec<_> = (512..528).map(|page| (page, 1, 8)).collect();
            region.write(&whole).unwrap();
            assert_eq!(region.write(&[(1000, 1, 8)]), Err(RefusalCode::FileFailed));
            assert_eq!(region.read(&[(520, 1)]).unwrap(), [8]);
            fs::remove_file(directory.path().join("away")).unwrap();
            fs::write(&path, &held).unwrap();
        }
        region.delete().unwrap();
    }
}

#[test]
fn cap_5_tables_of_large_portions_take_less_memory() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    fs::write(&path, vec![7; 16 << 20]).unwrap();
    let server = TestServer::start(8192, in_directory(&directory));
    let mut client = Raw::greeted(&server);
    let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
    let bytes = PAGE_SIZES.map(|page_bytes| {
        let name = format!("file {page_bytes}");
        client.create(&name, 16 << 20, page_bytes, source).unwrap();
        let mut region = Raw::opened(&server, &name).unwrap();
        region.over(Action::Initialise, 0, 4096).unwrap();
        let stat = server.stat();
        assert_eq!(stat.pages, 4096);
        // A copy shares its original's table.
        region.copy(Action::Clone, "copy", false).unwrap();
        assert_eq!(server.stat().table_bytes, stat.table_bytes);
        Raw::opened(&server, "copy").unwrap().delete().unwrap();
        region.delete().unwrap();
        assert_eq!(server.stat().table_bytes, 0);
        // The branch is the same for all.
        (stat.table_bytes - 4096) / 4096
    });
    assert!(bytes[..3].iter().all(|bytes| *bytes <= 27), "{bytes:?} bytes a page of 4 KiB");
    assert!(bytes[3] <= 16 && bytes[4] <= 9, "{bytes:?} bytes a page of 4 KiB");
}

#[test]
fn cap_5_a_fill_takes_no_memory_however_it_is_touched() {
    for page_bytes in PAGE_SIZES {
        let server = start(256);
        let mut client = Raw::greeted(&server);
        client.create("fill", 64 << 20, page_bytes, Source::Fill(5)).unwrap();
        let mut region = Raw::opened(&server, "fill").unwrap();
        let pages = 64 << 8;
        for page in (0..pages).step_by(97) {
            assert_eq!(region.read(&[(page, 0)]).unwrap(), [5]);
        }
        assert_eq!(server.wait_until(|stat| stat.slots <= 1).pages, 0, "nothing is made");
        // All at once, in a server with a 64th of that memory.
        assert_eq!(region.over(Action::Initialise, 0, pages).unwrap(), pages);
        let stat = server.wait_until(|stat| stat.slots <= 1);
        assert_eq!((stat.pages, stat.slots), (pages, 1));
        // Who writes gets a page of his own.
        region.write(&[(9, 1, 1)]).unwrap();
        assert_eq!(region.read(&[(8, 0), (9, 1), (10, 0)]).unwrap(), [5, 1, 5]);
        region.copy(Action::Clone, "copy", false).unwrap();
        region.delete().unwrap();
        let mut copy = Raw::opened(&server, "copy").unwrap();
        assert_eq!(copy.read(&[(8, 0), (9, 1)]).unwrap(), [5, 1]);
        assert_eq!(server.wait_until(|stat| stat.slots == 2).slots, 2);
        copy.delete().unwrap();
        assert_eq!(server.wait_until(|stat| stat.slots == 0).table_bytes, 0);
    }
}
