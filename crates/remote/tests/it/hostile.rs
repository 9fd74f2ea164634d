//! A scripted server that lies: nothing wrong ever reaches the caller as a page.

use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use farmem_region::{
    ByteCount, Epoch, ExternalAddress, FetchPage, FrameId, Incarnation, Nanos, PAGE_SIZE,
    PageCount, PageIndex, PageRange, PageStore, RegionId, Request, SessionId, StoreError,
    StorePage, Version,
};
use farmem_remote::named::{NamedRegion, RangeAction};
use farmem_remote::{RegionMap, RemoteStore};
use farmem_transport::Endpoint;
use farmem_wire::{
    Absent, Action, AskMap, GrantedSetup, HEADER_BYTES, Header, HelloReply, MapReply,
    PAGES_PER_MESSAGE_MAX, PageEntry, Progress, RefusalCode, RegionInfo, page_checksum, seal,
};

use crate::client::{Client, config, fetch_pages, store_pages};

/// Pages of a region that is opened by its name.
const MAPPED_PAGES: u64 = 150_000;

/// How the server answers a read or a write.
type Answer = fn(&Header, &[PageEntry], &mut UnixStream);

/// How it tells a part of a map, from a page on.
type Tell = fn(&Header, u64, &mut UnixStream);

/// A server that says hello and sets up, and answers reads and writes as the script says.
fn serve(answer: Answer) -> (Endpoint, tempfile::TempDir) {
    serve_map(answer, |header, from, stream| tell(header, from..from, stream))
}

/// One whose regions may hold something.
fn serve_map(answer: Answer, tell: Tell) -> (Endpoint, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("server");
    let listener = UnixListener::bind(&path).unwrap();
    // Ends with the process.
    thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            thread::spawn(move || serve_one(stream, answer, tell));
        }
    });
    (Endpoint::Unix(path), directory)
}

fn serve_one(mut stream: UnixStream, answer: Answer, tell: Tell) {
    let mut head = [0; HEADER_BYTES];
    while stream.read_exact(&mut head).is_ok() {
        let header = Header::decode(&head).unwrap();
        let mut rest = vec![0; header.entry_bytes() + header.payload_bytes()];
        stream.read_exact(&mut rest).unwrap();
        let entries: Vec<_> = PageEntry::decode_all(&rest[..header.entry_bytes()]).collect();
        let reply = Header { incarnation: Incarnation::new(7), ..header.granted() };
        match header.action {
            Action::Hello => {
                let hello = HelloReply {
                    version: 1,
                    arena_shared: false,
                    lasts: false,
                    clones_have_ranges: false,
                    session_timeout_ms: 10_000,
                    connection: 1,
                    actions: u64::MAX,
                    arena_slots: 0,
                };
                send(&mut stream, reply, |out| hello.encode(out));
            }
            Action::Setup | Action::Attach | Action::Open => {
                let pages = if header.action == Action::Open { MAPPED_PAGES } else { 256 };
                let granted = GrantedSetup {
                    granted: ByteCount::new(1 << 20),
                    region: RegionId::new(1),
                    pages: PageCount::new(pages),
                };
                let reply = Header {
                    session: SessionId::new(1),
                    region: RegionId::new(1),
                    epoch: Epoch::new(1),
                    token: 9,
                    ..reply
                };
                send(&mut stream, reply, |out| granted.encode(out));
            }
            Action::Read | Action::Write | Action::Free | Action::Prefetch => {
                answer(&header, &entries, &mut stream);
            }
            Action::Map => tell(&header, asked_from(&rest), &mut stream),
            Action::Show => send(&mut stream, reply, |out| shown().encode(out)),
            _ => send(&mut stream, reply, |_| ()),
        }
    }
}

fn asked_from(body: &[u8]) -> u64 {
    AskMap::decode(body).unwrap().from.get()
}

/// Tells of pages that are stored, page n in version n + 1, as many as a message may tell of.
fn tell(asked: &Header, stored: Range<u64>, stream: &mut UnixStream) {
    let end = stored.end.min(stored.start + PAGES_PER_MESSAGE_MAX as u64);
    let map = MapReply {
        stamp: 0,
        next: (end < stored.end).then(|| PageIndex::new(end)),
        address: ExternalAddress::from_raw(1 << 40),
        absent: Absent::Fill(0),
        is_all: true,
        is_outdated: false,
    };
    let entries = (end - stored.start) as u32;
    let incarnation = Incarnation::new(7);
    send(stream, Header { entries, leased: true, incarnation, ..asked.granted() }, |out| {
        for page in stored.start..end {
            let (page, version) = (PageIndex::new(page), Version::new(page + 1));
            PageEntry { page, version, ..PageEntry::default() }.encode(out);
        }
        map.encode(out);
    });
}

/// Tells of a region in which each page is stored, to all that has been asked when nothing more was for
/// a while; not at all after so many times.
fn tell_late(header: &Header, from: u64, stream: &mut UnixStream, times: &AtomicU32) {
    let mut asked = vec![(*header, from)];
    stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let (mut head, mut body) = ([0; HEADER_BYTES], Vec::new());
    while stream.read_exact(&mut head).is_ok() {
        let header = Header::decode(&head).unwrap();
        body.resize(header.payload_bytes(), 0);
        stream.read_exact(&mut body).unwrap();
        asked.push((header, asked_from(&body)));
    }
    stream.set_read_timeout(None).unwrap();
    if times.fetch_sub(1, Ordering::Relaxed) == 0 {
        times.store(0, Ordering::Relaxed);
        return;
    }
    for (header, from) in asked {
        tell(&header, from..MAPPED_PAGES, stream);
    }
}

/// What a server that tells its map late is borne for.
fn open_late(tell: Tell) -> Result<RegionMap, StoreError> {
    let (endpoint, _directory) = serve_map(|_, _, _| (), tell);
    let mut config = config(&endpoint, 1);
    config.timeouts.connect_us = 300_000;
    RemoteStore::open(config, "r", Nanos::new(0)).map(|(_, _, map)| map)
}

#[test]
fn a_large_region_is_opened_though_its_map_takes_longer_than_a_reply_may() {
    static TIMES: AtomicU32 = AtomicU32::new(200);
    let map = open_late(|header, from, stream| tell_late(header, from, stream, &TIMES)).unwrap();
    assert_eq!(map.stored.len() as u64, MAPPED_PAGES);
    assert!(map.stored.iter().all(|(page, version)| version.get() == page + 1));
    // With one request at a time there would be 586.
    let times = 200 - TIMES.load(Ordering::Relaxed);
    assert!((30..60).contains(&times), "asked {times} times");
}

#[test]
fn a_server_that_stops_telling_its_map_is_given_up_in_time() {
    static TIMES: AtomicU32 = AtomicU32::new(5);
    let began = Instant::now();
    let opened = open_late(|header, from, stream| tell_late(header, from, stream, &TIMES));
    let (error, took) = (opened.unwrap_err().to_string(), began.elapsed());
    assert!(error.contains("did not answer in time"), "{error}");
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(2), "{took:?}");
}

/// A region of whole pages.
fn shown() -> RegionInfo {
    let none = PageCount::new(0);
    RegionInfo {
        region: RegionId::new(1),
        pages: PageCount::new(256),
        page_bytes: 4096,
        is_frozen: false,
        is_file: false,
        is_server: false,
        writes_back: false,
        is_unfilled: false,
        stored: none,
        dirty: none,
        changed: none,
        pinned: none,
        dram: none,
        compressed: none,
        file: none,
        preferred: [none; 3],
        name: "r".to_owned(),
        source: String::new(),
    }
}

fn send(stream: &mut UnixStream, header: Header, rest: impl FnOnce(&mut Vec<u8>)) {
    let mut message = vec![0; HEADER_BYTES];
    rest(&mut message);
    seal(header, &mut message);
    let _ = stream.write_all(&message);
}

/// The right reply for pages that are filled with 1, after `change` has had its way with it.
fn pages(
    header: &Header,
    entries: &[PageEntry],
    change: impl FnOnce(&mut Vec<PageEntry>, &mut Vec<u8>),
) -> Vec<u8> {
    let mut found: Vec<_> = entries
        .iter()
        .map(|entry| PageEntry {
            checksum: page_checksum(header.region, entry.page, entry.version, &[1; PAGE_SIZE]),
            ..*entry
        })
        .collect();
    let mut content = vec![1; entries.len() * PAGE_SIZE];
    change(&mut found, &mut content);
    let mut message = vec![0; HEADER_BYTES];
    found.iter().for_each(|entry| entry.encode(&mut message));
    let (entries, payload) = (found.len() as u32, content.len() as u32);
    let reply = Header { entries, payload, ..header.granted() };
    seal(reply, &mut message);
    message.extend(content);
    message
}

fn fetch(answer: Answer) -> Result<(), StoreError> {
    let (endpoint, _directory) = serve(answer);
    let mut config = config(&endpoint, 1);
    config.timeouts.silence_us = 200_000;
    config.timeouts.reconnect_us = 1_000_000;
    let mut client = Client::connect(config, 8).unwrap();
    client.fetch(0, 8, 5)?;
    for frame in &client.frames.0 {
        assert_eq!(*frame, [1; PAGE_SIZE], "a wrong page was handed out");
    }
    Ok(())
}

fn wrong_page(answer: Answer, reason: &str) {
    let error = fetch(answer).unwrap_err();
    assert!(matches!(error, StoreError::WrongPage { .. }), "{error}");
    assert!(error.to_string().contains(reason), "{error}");
}

fn lost(answer: Answer, reason: &str) {
    let error = fetch(answer).unwrap_err();
    assert!(matches!(error, StoreError::Lost { .. }), "{error}");
    assert!(error.to_string().contains(reason), "{error}");
}

#[test]
fn the_right_pages_are_taken() {
    fetch(|header, entries, stream| {
        stream.write_all(&pages(header, entries, |_, _| ())).unwrap();
    })
    .unwrap();
}

#[test]
fn in_pieces_of_any_size() {
    for piece in [1, 79, 81, 4095, 10_000] {
        // A function pointer takes no surroundings: the size goes by a thread's own variable.
        PIECE.store(piece, Ordering::Relaxed);
        fetch(|header, entries, stream| {
            let message = pages(header, entries, |_, _| ());
            let piece = PIECE.load(Ordering::Relaxed);
            // Single bytes for the head only: there are 32 KiB of pages.
            let (head, rest) = message.split_at(HEADER_BYTES + 300);
            for chunk in head.chunks(piece).chain(rest.chunks(piece.max(500))) {
                stream.write_all(chunk).unwrap();
                thread::sleep(Duration::from_micros(20));
            }
        })
        .unwrap();
    }
}

static PIECE: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

#[test]
fn a_guess_that_is_wrong() {
    // First an answer to something else, in one piece with the pages.
    fetch(|header, entries, stream| {
        let mut message = vec![0; HEADER_BYTES];
        let busy = header.refused(RefusalCode::Busy);
        seal(busy, &mut message);
        static ASKED: AtomicU32 = AtomicU32::new(0);
        if ASKED.fetch_add(1, Ordering::Relaxed) == 0 {
            stream.write_all(&message).unwrap();
        } else {
            stream.write_all(&pages(header, entries, |_, _| ())).unwrap();
        }
    })
    .unwrap();
}

#[test]
fn another_content() {
    wrong_page(
        |header, entries, stream| {
            let message = pages(header, entries, |_, content| {
                content[3 * PAGE_SIZE + 17] ^= 4;
            });
            stream.write_all(&message).unwrap();
        },
        "does not match its checksum",
    );
}

#[test]
fn another_version() {
    wrong_page(
        |header, entries, stream| {
            let message = pages(header, entries, |found, _| {
                // An old page, authentic in itself.
                found[7].version = Version::new(4);
                found[7].checksum =
                    page_checksum(header.region, found[7].page, found[7].version, &[1; PAGE_SIZE]);
            });
            stream.write_all(&message).unwrap();
        },
        "version 4 instead",
    );
}

#[test]
fn another_page() {
    wrong_page(
        |header, entries, stream| {
            let message = pages(header, entries, |found, _| {
                found[2].page = PageIndex::new(100);
                found[2].checksum =
                    page_checksum(header.region, found[2].page, found[2].version, &[1; PAGE_SIZE]);
            });
            stream.write_all(&message).unwrap();
        },
        "page 100 instead",
    );
}

#[test]
fn two_pages_in_each_others_place() {
    wrong_page(
        |header, entries, stream| {
            let message = pages(header, entries, |found, content| {
                content[..PAGE_SIZE].fill(2);
                found[0].checksum =
                    page_checksum(header.region, found[1].page, found[0].version, &[2; PAGE_SIZE]);
            });
            stream.write_all(&message).unwrap();
        },
        "does not match its checksum",
    );
}

#[test]
fn fewer_pages_than_asked_for() {
    lost(
        |header, entries, stream| {
            let message = pages(header, entries, |found, content| {
                found.pop();
                content.truncate(7 * PAGE_SIZE);
            });
            stream.write_all(&message).unwrap();
        },
        "another number of pages",
    );
}

/// As one that reads from a slow disk. The silence that is borne here is 200 ms at first.
#[test]
fn pages_that_take_longer_than_a_server_may_be_silent() {
    fetch(|header, entries, stream| {
        thread::sleep(Duration::from_millis(600));
        // It has been taken for broken the first time.
        let _ = stream.write_all(&pages(header, entries, |_, _| ()));
    })
    .unwrap();
}

#[test]
fn a_payload_that_never_ends() {
    lost(
        |header, entries, stream| {
            let message = pages(header, entries, |_, _| ());
            stream.write_all(&message[..message.len() - 100]).unwrap();
        },
        "went silent",
    );
}

#[test]
fn an_answer_to_nothing() {
    lost(
        |header, entries, stream| {
            let other = Header { request: header.request + (1 << 16), ..*header };
            stream.write_all(&pages(&other, entries, |_, _| ())).unwrap();
        },
        "never made",
    );
}

#[test]
fn a_flipped_bit_in_the_header() {
    lost(
        |header, entries, stream| {
            let mut message = pages(header, entries, |_, _| ());
            message[60] ^= 1;
            stream.write_all(&message).unwrap();
        },
        "header damaged",
    );
}

#[test]
fn a_flipped_bit_in_an_entry() {
    lost(
        |header, entries, stream| {
            let mut message = pages(header, entries, |_, _| ());
            message[HEADER_BYTES + 8] ^= 1;
            stream.write_all(&message).unwrap();
        },
        "entries or body damaged",
    );
}

#[test]
fn no_page_is_an_error_and_never_zeros() {
    let error = fetch(|header, _, stream| {
        send(stream, header.refused(RefusalCode::NoPage), |_| ());
    })
    .unwrap_err();
    assert!(error.to_string().contains("no such page"), "{error}");
}

#[test]
fn a_stale_epoch_closes_the_store() {
    lost(
        |header, _, stream| send(stream, header.refused(RefusalCode::StaleEpoch), |_| ()),
        "the epoch is over",
    );
}

/// A write that is refused as busy comes again later: a read behind it must not fail meanwhile.
#[test]
fn a_read_waits_for_a_write_that_was_refused_as_busy() {
    static WRITES: AtomicU32 = AtomicU32::new(0);
    fn answer(header: &Header, entries: &[PageEntry], stream: &mut UnixStream) {
        let refuse = |stream: &mut UnixStream, code| {
            let reply = Header { entries: 1, ..header.refused(code) };
            send(stream, reply, |out| entries[0].encode(out));
        };
        let is_write = header.action == Action::Write;
        let writes = WRITES.fetch_add(u32::from(is_write), Ordering::Relaxed);
        match (is_write, writes) {
            (true, 0) => refuse(stream, RefusalCode::Busy),
            (true, _) => send(stream, header.granted(), |_| ()),
            (false, 0..2) => refuse(stream, RefusalCode::NoPage),
            (false, _) => {
                let _ = stream.write_all(&pages(header, entries, |_, _| ()));
            }
        }
    }
    let (endpoint, _directory) = serve(answer);
    let mut client = Client::connect(config(&endpoint, 1), 2).unwrap();
    client.frames.0[0].fill(1);
    let stored = client.submit(Request::Store(&store_pages(0, 1, 5))).unwrap();
    let wanted = FetchPage { frame: FrameId::new(1), ..fetch_pages(0, 1, 5)[0] };
    let fetched = client.submit(Request::Fetch(&[wanted])).unwrap();
    client.finish(stored).unwrap();
    client.finish(fetched).unwrap();
    assert_eq!(client.frames.0[1], [1; PAGE_SIZE]);
}

/// A free that is refused as busy, because another client's lease is not over, comes again later: what is
/// written to the page after it must still be there then.
#[test]
fn a_write_waits_for_a_free_that_was_refused_as_busy() {
    static FREES: AtomicU32 = AtomicU32::new(0);
    static WRITES: AtomicU32 = AtomicU32::new(0);
    fn answer(header: &Header, entries: &[PageEntry], stream: &mut UnixStream) {
        match header.action {
            Action::Free if FREES.fetch_add(1, Ordering::Relaxed) < 3 => {
                send(stream, header.refused(RefusalCode::Busy), |_| ());
            }
            Action::Free => {
                assert_eq!(WRITES.load(Ordering::Relaxed), 0, "the page is written already");
                send(stream, header.granted(), |_| ());
            }
            _ => {
                WRITES.fetch_add(1, Ordering::Relaxed);
                assert_eq!((entries.len(), FREES.load(Ordering::Relaxed)), (1, 4));
                send(stream, header.granted(), |_| ());
            }
        }
    }
    let (endpoint, _directory) = serve(answer);
    let mut config = config(&endpoint, 1);
    // A server that found a wrong order has ended.
    config.timeouts.silence_us = 200_000;
    config.timeouts.reconnect_us = 1_000_000;
    let mut client = Client::open(config, "name", 2).unwrap();
    let range = PageRange { start: PageIndex::new(0), count: PageCount::new(8) };
    let freed = client.submit(Request::Release(&[range])).unwrap();
    let stored = client.submit(Request::Store(&store_pages(3, 1, 5))).unwrap();
    client.finish(freed).unwrap();
    client.finish(stored).unwrap();
    assert_eq!(WRITES.load(Ordering::Relaxed), 1);
}

/// So it is with a write in a region without a name, where the server is nearly full: it must not be there
/// when the page has been freed.
#[test]
fn a_free_waits_for_a_write_that_was_refused_as_busy() {
    static WRITES: AtomicU32 = AtomicU32::new(0);
    static STORED: AtomicU32 = AtomicU32::new(0);
    fn answer(header: &Header, _: &[PageEntry], stream: &mut UnixStream) {
        match header.action {
            Action::Write if WRITES.fetch_add(1, Ordering::Relaxed) == 0 => {
                return send(stream, header.refused(RefusalCode::Busy), |_| ());
            }
            Action::Write => STORED.store(1, Ordering::Relaxed),
            _ => STORED.store(0, Ordering::Relaxed),
        }
        send(stream, header.granted(), |_| ());
    }
    let (endpoint, _directory) = serve(answer);
    let mut client = Client::connect(config(&endpoint, 1), 2).unwrap();
    let stored = client.submit(Request::Store(&store_pages(3, 1, 5))).unwrap();
    let range = PageRange { start: PageIndex::new(0), count: PageCount::new(8) };
    let freed = client.submit(Request::Release(&[range])).unwrap();
    client.finish(stored).unwrap();
    client.finish(freed).unwrap();
    let (writes, stored) = (WRITES.load(Ordering::Relaxed), STORED.load(Ordering::Relaxed));
    assert_eq!((writes, stored), (2, 0), "the page is there though nobody wants it");
}

fn opened(answer: Answer) -> (NamedRegion, tempfile::TempDir) {
    let (endpoint, directory) = serve(answer);
    (NamedRegion::open(&endpoint, "r", true, Duration::from_secs(5)).unwrap(), directory)
}

/// The rest of a reply that is late is never taken for another one.
#[test]
fn a_region_is_read_again_after_a_reply_that_came_too_late() {
    static READS: AtomicU32 = AtomicU32::new(0);
    fn answer(header: &Header, entries: &[PageEntry], stream: &mut UnixStream) {
        let message = pages(header, entries, |_, _| ());
        let (first, rest) = message.split_at(1000);
        let _ = stream.write_all(first);
        if READS.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
            thread::sleep(Duration::from_millis(200));
        }
        let _ = stream.write_all(rest);
    }
    let (endpoint, _directory) = serve(answer);
    for takes_over in [false, true] {
        let patience = Duration::from_millis(100);
        let mut region = NamedRegion::open(&endpoint, "r", takes_over, patience).unwrap();
        let error = region.read(0..4096).unwrap_err();
        assert!(error.to_string().contains("did not answer in time"), "{error}");
        assert_eq!(region.read(0..8192).unwrap(), [1; 8192]);
    }
}

#[test]
fn a_server_that_goes_on_at_the_same_page_for_ever() {
    let (mut region, _directory) = opened(|header, _, stream| {
        let progress = Progress { changed: PageCount::new(0), next: Some((0, PageIndex::new(3))) };
        send(stream, header.granted(), |out| progress.encode(out));
    });
    let range = PageRange { start: PageIndex::new(0), count: PageCount::new(8) };
    let error = region.over(RangeAction::Prefetch, range).unwrap_err();
    assert!(error.to_string().contains("it goes on at page 3"), "{error}");
}

#[test]
fn a_page_of_the_last_version_is_not_written_over() {
    let (mut region, _directory) = opened(|header, entries, stream| {
        let last = |found: &mut Vec<PageEntry>, _: &mut Vec<u8>| {
            for entry in found {
                entry.version = Version::new(u64::MAX);
                let content = &[1; PAGE_SIZE];
                entry.checksum = page_checksum(header.region, entry.page, entry.version, content);
            }
        };
        stream.write_all(&pages(header, entries, last)).unwrap();
    });
    let error = region.write(0, &[2; PAGE_SIZE]).unwrap_err();
    assert!(error.to_string().contains("the last of all versions"), "{error}");
}

/// A flush that writes the page has to end first, which may take as long as a disk does.
#[test]
fn a_free_that_is_refused_as_busy_is_repeated_for_longer_than_a_write() {
    /// What time it is for the store.
    static SECONDS: AtomicU32 = AtomicU32::new(0);
    let answer: Answer = |header, _, stream| {
        let is_late = header.action == Action::Free && SECONDS.load(Ordering::Relaxed) >= 50;
        let reply = if is_late { header.granted() } else { header.refused(RefusalCode::Busy) };
        send(stream, reply, |_| ());
    };
    let (endpoint, _directory) = serve(answer);
    let ends = |request: Request<'_>| {
        let mut client = Client::connect(config(&endpoint, 1), 1).unwrap();
        let ticket = client.submit(request).unwrap();
        for step in 0..1000 {
            SECONDS.store(step / 5, Ordering::Relaxed);
            let now = Nanos::new(u64::from(step) * 200_000_000);
            client.store.advance(now, &mut client.frames, &mut client.done).unwrap();
            client.wait_for_reply(now);
            client.store.advance(now, &mut client.frames, &mut client.done).unwrap();
            if let Some(done) = client.done.iter().find(|done| done.ticket == ticket) {
                return (step / 5, done.result.clone());
            }
        }
        panic!("it is repeated for ever");
    };
    let (page, version, frame) = (PageIndex::new(3), Version::new(1), FrameId::new(0));
    let (second, result) = ends(Request::Store(&[StorePage { page, version, frame }]));
    assert!((5..10).contains(&second) && result.is_err(), "{second}: {result:?}");
    let range = PageRange { start: page, count: PageCount::new(1) };
    let (second, result) = ends(Request::Release(&[range]));
    assert!((50..60).contains(&second) && result.is_ok(), "{second}: {result:?}");
}
