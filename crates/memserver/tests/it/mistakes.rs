//! What makes no sense, or would lose something: each refused with a code and a line in the log, and
//! nothing else is disturbed.

use farmem_region::{ByteCount, PageCount, PageIndex, PageRange};
use farmem_wire::{
    Action, Create, Delete, Header, Malloc, RangeEntry, RefusalCode, Resize, Source, Tier,
};

use crate::raw::{Raw, TestServer};

/// A server with a region and a session that nothing may disturb.
struct Bystanders {
    server: TestServer,
    session: Raw,
}

impl Bystanders {
    fn new() -> Self {
        let server = TestServer::start(256, |config| config.promise_percent = 1000);
        Raw::greeted(&server).create("bystander", 1 << 20, 4096, Source::Fill(3)).unwrap();
        let mut region = Raw::opened(&server, "bystander").unwrap();
        region.write(&[(0, 1, 10), (255, 1, 11)]).unwrap();
        let mut session = Raw::with_region(&server, 16);
        session.write(&[(15, 1, 12)]).unwrap();
        Self { server, session }
    }

    /// Whether each of `mistakes` is refused with its code and told, and all is as before.
    fn see<M: std::fmt::Debug>(
        &mut self,
        mistakes: impl IntoIterator<Item = M>,
        mut make: impl FnMut(&TestServer, &M) -> (Action, Option<RefusalCode>, RefusalCode),
    ) {
        let gauges = |server: &TestServer| {
            let stat = server.stat();
            (stat.pages, stat.slots, stat.reserved_bytes, stat.regions, stat.sessions)
        };
        for mistake in mistakes {
            let before = gauges(&self.server);
            let (action, found, code) = make(&self.server, &mistake);
            assert_eq!(found, Some(code), "{action:?} {mistake:?}");
            let told = [format!("refused {}", action.name()), code.text().to_owned()];
            // Each kind has one: more than some a second are counted only.
            assert!(self.server.logs_all(&told), "{told:?} of {mistake:?}");
            assert_eq!(gauges(&self.server), before, "{action:?} {mistake:?}");
            let mut region = Raw::opened(&self.server, "bystander").unwrap();
            let found = region.read(&[(0, 1), (1, 0), (255, 1)]);
            assert_eq!(found, Ok(vec![10, 3, 11]), "{mistake:?}");
            assert_eq!(self.session.read(&[(15, 1)]), Ok(vec![12]), "{mistake:?}");
        }
    }
}

#[test]
fn sizes_that_are_no_multiples_are_refused_and_told() {
    let mut all = Bystanders::new();
    let sizes = [
        (0, 4096),
        (1 << 20, 0),
        (1 << 20, 513),
        (1 << 20, 8192),
        (1 << 20, u32::MAX),
        (4097, 4096),
        (512, 512),
        ((64 << 10) - 4096, 64 << 10),
        (3 << 20, 2 << 20),
        (u64::MAX, 4096),
    ];
    all.see(sizes, |server, (size, page_bytes)| {
        let source = Source::Nothing;
        let size = ByteCount::new(*size);
        let create = Create { name: "odd", size, page_bytes: *page_bytes, source, prefers: None };
        let mut client = Raw::greeted(server);
        let (reply, _) = client.call(client.request(Action::Create), |out| create.encode(out));
        (Action::Create, reply.refusal, RefusalCode::Malformed)
    });
    all.see([0, 1, 4095, 4097, (1 << 20) + 512, u64::MAX], |server, size| {
        let mut region = Raw::opened(server, "bystander").unwrap();
        let resize = Resize { size: ByteCount::new(*size) };
        let (reply, _) = region.call(region.request(Action::Resize), |out| resize.encode(out));
        (Action::Resize, reply.refusal, RefusalCode::Malformed)
    });
}

#[test]
fn ranges_past_the_end_and_sums_that_overflow_are_refused_and_told() {
    const ACTIONS: [Action; 8] = [
        Action::Initialise,
        Action::Prefetch,
        Action::Pin,
        Action::Unpin,
        Action::Invalidate,
        Action::Free,
        Action::Flush,
        Action::Prefer,
    ];
    for action in ACTIONS {
        let mut all = Bystanders::new();
        let (first, most) = (1 << 63, u64::MAX);
        let ranges =
            [(0, 257), (256, 1), (255, 2), (most, 1), (1, most), (most, most), (first, first)];
        all.see(ranges, |server, (start, count)| {
            let mut client = Raw::opened(server, "bystander").unwrap();
            let header = Header { entries: 1, ..client.request(action) };
            let (start, count) = (PageIndex::new(*start), PageCount::new(*count));
            let range = RangeEntry(PageRange { start, count });
            let (reply, _) = client.call(header, |out| {
                range.encode(out);
                if action == Action::Prefer {
                    farmem_wire::Prefer { tier: Some(Tier::Dram) }.encode(out);
                }
            });
            (action, reply.refusal, RefusalCode::OutOfBounds)
        });
    }
    let mut all = Bystanders::new();
    all.see([256, 1 << 52, u64::MAX], |server, page| {
        let mut client = Raw::opened(server, "bystander").unwrap();
        (Action::Read, client.read(&[(0, 1), (*page, 0)]).err(), RefusalCode::OutOfBounds)
    });
    all.see([256, 1 << 52, u64::MAX], |server, page| {
        let mut client = Raw::opened(server, "bystander").unwrap();
        let written = client.write(&[(1, 1, 1), (*page, 1, 1)]);
        (Action::Write, written.err(), RefusalCode::OutOfBounds)
    });
    all.see([(17, 1), (u64::MAX, 1), (16, u64::MAX), (1 << 63, 1 << 63)], |server, (from, add)| {
        let mut client = Raw::greeted(server);
        client.setup(16, false, true).unwrap();
        client.malloc(0, 16).unwrap();
        let malloc = Malloc { from: PageCount::new(*from), add: PageCount::new(*add) };
        let (reply, _) = client.call(client.request(Action::Malloc), |out| malloc.encode(out));
        drop(client.call(client.request(Action::Disconnect), |_| ()));
        (Action::Malloc, reply.refusal, RefusalCode::Malformed)
    });
}

/// What is pinned is not freed, what was copied is not deleted, what is free is not freed again; and a
/// snapshot is not written.
#[test]
fn what_would_lose_something_is_refused_and_told() {
    let all = Bystanders::new();
    Raw::greeted(&all.server).create("r", 1 << 20, 4096, Source::Fill(0)).unwrap();
    let mut region = Raw::opened(&all.server, "r").unwrap();
    region.write(&[(3, 1, 3), (4, 1, 4)]).unwrap();
    region.over(Action::Pin, 3, 1).unwrap();
    for action in [Action::Invalidate, Action::Free] {
        let header = Header { entries: 1, ..region.request(action) };
        let range = PageRange { start: PageIndex::new(0), count: PageCount::new(256) };
        let (reply, _) = region.call(header, |out| RangeEntry(range).encode(out));
        assert_eq!(reply.refusal, Some(RefusalCode::Pinned));
    }
    assert!(all.server.logs("r frees pages that are pinned"));
    assert_eq!(region.read(&[(3, 1), (4, 1)]), Ok(vec![3, 4]), "the unpinned one too");
    for keeps_copies in [false, true] {
        let delete = Delete { keeps_copies };
        let (reply, _) = region.call(region.request(Action::Delete), |out| delete.encode(out));
        assert_eq!(reply.refusal, Some(RefusalCode::Pinned));
    }
    assert!(all.server.logs("region r is not deleted: pages are pinned"));
    assert_eq!(region.resize(3), Err(RefusalCode::Pinned));
    assert!(all.server.logs("region r is not cut: pages are pinned"));
    region.over(Action::Unpin, 0, 256).unwrap();
    region.copy(Action::Snapshot, "monday", false).unwrap();
    assert_eq!(region.delete_uncopied(), Err(RefusalCode::Copied));
    assert!(all.server.logs("region r is not deleted: it has copies"));
    let mut monday = Raw::opened(&all.server, "monday").unwrap();
    assert_eq!(monday.write(&[(3, 2, 9)]), Err(RefusalCode::Frozen));
    assert!(all.server.logs_all(&["refused write in monday", RefusalCode::Frozen.text()]));
    assert_eq!(region.over(Action::Invalidate, 0, 256), Ok(2));
    assert_eq!(region.over(Action::Invalidate, 0, 256), Err(RefusalCode::AlreadyFree));
    assert!(all.server.logs("r frees pages that are free already"));
    assert_eq!(monday.read(&[(3, 1), (4, 1)]), Ok(vec![3, 4]), "the copy has what was freed");
}

/// Guessing is told, and does not keep out what else is to be told.
#[test]
fn guessed_tokens_are_told_and_do_not_keep_other_lines_out() {
    let mut all = Bystanders::new();
    let directory = tempfile::tempdir().unwrap();
    for guess in 0..100 {
        let mut other = Raw::greeted(&all.server);
        other.session = Header { token: guess, ..all.session.session };
        let (reply, _) = other.call(other.request(Action::Disconnect), |_| ());
        assert_eq!(reply.refusal, Some(RefusalCode::WrongToken));
    }
    assert!(all.server.logs_all(&["refused disconnect", RefusalCode::WrongToken.text()]));
    let path = directory.path().join("none").to_str().unwrap().to_owned();
    let file = Source::File { path: &path, offset: 0 };
    let made = Raw::greeted(&all.server).create("file", 4096, 4096, file);
    assert_eq!(made.err(), Some(RefusalCode::NoFile));
    assert!(all.server.logs(&format!("refused to open {path}")));
    assert_eq!(all.session.read(&[(15, 1)]), Ok(vec![12]));
}
