//! Regions that are made from regions of another memory server, which a test plays.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use farmem_memserver::{DistantRegion, Neighbours, Use};
use farmem_region::{Incarnation, RegionId};
use farmem_wire::{Action, AttachMode, RefusalCode, Source};

use crate::raw::{Raw, TestServer, patiently};

/// What the other server holds, and how it behaves.
#[derive(Default)]
struct Other {
    content: Mutex<Vec<u8>>,
    is_away: AtomicBool,
    /// Whether reads take a while.
    is_slow: AtomicBool,
    read_pages: AtomicU64,
    written: Mutex<Vec<Range<u64>>>,
    flushes: AtomicU64,
    /// What tells its region from a former one under the same name.
    incarnation: AtomicU64,
    region: AtomicU64,
    /// Writes after which it is killed, and made anew with nothing.
    lives_for: AtomicU64,
}

impl Other {
    fn identity(&self) -> (Incarnation, RegionId) {
        let numbers = [&self.incarnation, &self.region];
        let [incarnation, region] = numbers.map(|number| 7 + number.load(Ordering::Relaxed));
        (Incarnation::new(incarnation), RegionId::new(region))
    }

    /// It has ended; another one comes, where the region is made again.
    fn is_killed(&self) {
        self.incarnation.fetch_add(1, Ordering::Relaxed);
        self.content.lock().unwrap().fill(0);
    }
}

/// With what tells it from another one under its name.
struct Connection(Arc<Other>, (Incarnation, RegionId));

impl Connection {
    fn answer(&self) -> io::Result<()> {
        if self.0.is_away.load(Ordering::Relaxed) || self.0.identity() != self.1 {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        Ok(())
    }
}

impl DistantRegion for Connection {
    fn identity(&self) -> (Incarnation, RegionId) {
        self.1
    }

    fn size(&mut self) -> io::Result<u64> {
        self.answer()?;
        Ok(self.0.content.lock().unwrap().len() as u64)
    }

    fn read(&mut self, bytes: Range<u64>) -> io::Result<Vec<u8>> {
        if self.0.is_slow.load(Ordering::Relaxed) {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        self.answer()?;
        self.0.read_pages.fetch_add((bytes.end - bytes.start) / 4096, Ordering::Relaxed);
        let content = self.0.content.lock().unwrap();
        let range = bytes.start as usize..bytes.end as usize;
        content.get(range).map(<[u8]>::to_vec).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.answer()?;
        if self.0.lives_for.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.is_killed();
            return self.answer();
        }
        self.0.written.lock().unwrap().push(at..at + bytes.len() as u64);
        self.0.content.lock().unwrap()[at as usize..at as usize + bytes.len()]
            .copy_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.answer()?;
        self.0.flushes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// Another server with so many pages, page n full of n, and this one.
fn start(pages: u64) -> (Arc<Other>, TestServer) {
    let other = Arc::new(Other::default());
    *other.content.lock().unwrap() =
        (0..pages).flat_map(|page| [(page % 251) as u8; 4096]).collect();
    let played = Arc::clone(&other);
    let server = TestServer::start(4096, |config| {
        config.promise_percent = 1000;
        config.neighbours = Some(Neighbours::new(move |address, region, _: Use| {
            let connection = Connection(Arc::clone(&played), played.identity());
            connection.answer()?;
            if (address, region) != ("other:1", "there") {
                return Err(io::ErrorKind::NotFound.into());
            }
            Ok(Box::new(connection))
        }));
    });
    (other, server)
}

const fn there(offset: u64, writes_back: bool) -> Source<'static> {
    Source::Server { address: "other:1", region: "there", offset, writes_back }
}

#[test]
fn cap_9_absent_portions_come_from_another_server_once() {
    let (other, server) = start(512);
    let mut client = Raw::greeted(&server);
    let info = client.create("here", 256 * 4096, 4096, there(4096, false)).unwrap();
    assert!(info.is_server && !info.is_file && !info.writes_back);
    assert_eq!(info.source, "server:other:1/there");
    let mut here = Raw::opened(&server, "here").unwrap();
    assert_eq!(other.read_pages.load(Ordering::Relaxed), 0, "nothing before it is touched");
    for _ in 0..2 {
        assert_eq!(here.read(&[(0, 0), (9, 0)]).unwrap(), [1, 10]);
    }
    assert_eq!(other.read_pages.load(Ordering::Relaxed), 2, "once");
    assert_eq!(here.show().stored.get(), 2);
    // What the other server changes is seen where a page has not been touched yet.
    other.content.lock().unwrap()[..20 * 4096].fill(77);
    assert_eq!(here.read(&[(0, 0), (1, 0)]).unwrap(), [1, 77]);
    here.write(&[(2, 1, 99)]).unwrap();
    assert_eq!(here.read(&[(2, 1)]).unwrap(), [99]);
    assert_eq!(here.over(Action::Flush, 0, 256), Err(RefusalCode::NoFile), "nothing goes back");
    // Ahead, by prefetch.
    assert_eq!(here.over(Action::Prefetch, 0, 256).unwrap(), 252);
    other.is_away.store(true, Ordering::Relaxed);
    assert_eq!(here.read(&[(255, 0), (100, 0)]).unwrap(), [5, 101]);
    // A copy has what the original has; what neither touched comes for each.
    here.copy(Action::Clone, "copy", false).unwrap();
    let mut copy = Raw::opened(&server, "copy").unwrap();
    assert_eq!(copy.read(&[(2, 1), (255, 0)]).unwrap(), [99, 5]);
}

#[test]
fn cap_9_concurrent_first_accesses_fetch_once() {
    let (other, server) = start(256);
    let mut client = Raw::greeted(&server);
    client.create("here", 256 * 4096, 64 << 10, there(0, false)).unwrap();
    other.is_slow.store(true, Ordering::Relaxed);
    let first = Raw::opened(&server, "here").unwrap();
    std::thread::scope(|scope| {
        for at in 0..6 {
            let (server, first) = (&server, &first);
            scope.spawn(move || {
                let mut client = first.attach(server, AttachMode::Join, 0).unwrap();
                for page in 0..48 {
                    let page = (page + at * 8) % 48;
                    assert_eq!(client.read(&[(page, 0)]).unwrap(), [page as u8]);
                }
            });
        }
    });
    assert_eq!(other.read_pages.load(Ordering::Relaxed), 48, "each page once");
}

#[test]
fn cap_9_a_server_that_is_away_is_told_and_never_taken_for_zeros() {
    let (other, server) = start(256);
    let mut client = Raw::greeted(&server);
    client.create("here", 256 * 4096, 4096, there(0, true)).unwrap();
    client.create("safe", 1 << 20, 4096, Source::Fill(3)).unwrap();
    let mut here = Raw::opened(&server, "here").unwrap();
    here.write(&[(7, 1, 70)]).unwrap();
    other.is_away.store(true, Ordering::Relaxed);
    assert_eq!(here.read(&[(8, 0)]), Err(RefusalCode::SourceAway));
    assert!(server.logs("server:other:1/there"), "it is told in the log");
    assert_eq!(here.over(Action::Prefetch, 0, 256), Err(RefusalCode::SourceAway));
    assert_eq!(here.over(Action::Pin, 0, 8), Err(RefusalCode::SourceAway));
    assert_eq!(here.over(Action::Flush, 0, 256), Err(RefusalCode::SourceAway));
    assert_eq!(here.resize(300), Err(RefusalCode::SourceAway));
    for source in [there(0, false), there(0, true)] {
        let made = client.create("x", 4096, 4096, source);
        assert_eq!(made.err(), Some(RefusalCode::SourceAway));
    }
    // Nothing is lost, and nothing else disturbed.
    assert_eq!(here.read(&[(7, 1)]).unwrap(), [70]);
    assert_eq!(here.show().dirty.get(), 1);
    assert_eq!(Raw::opened(&server, "safe").unwrap().read(&[(9, 0)]).unwrap(), [3]);
    other.is_away.store(false, Ordering::Relaxed);
    let began = std::time::Instant::now();
    while here.read(&[(8, 0)]) != Ok(vec![8]) {
        assert!(began.elapsed().as_secs() < 20, "it is asked again");
    }
    while here.over(Action::Flush, 0, 256).is_err() {
        assert!(began.elapsed().as_secs() < 20, "it is asked again");
    }
    assert_eq!(other.content.lock().unwrap()[7 * 4096], 70);
    // A region that is not there, one that ends before, and addresses that are none.
    let strange = Source::Server { address: "other:1", region: "x", offset: 0, writes_back: false };
    assert_eq!(client.create("x", 4096, 4096, strange).err(), Some(RefusalCode::SourceAway));
    let long = client.create("x", 257 * 4096, 4096, there(0, false));
    assert_eq!(long.err(), Some(RefusalCode::SourceAway));
    let odd = client.create("x", 4096, 4096, there(100, false));
    assert_eq!(odd.err(), Some(RefusalCode::Malformed));
    let lines = Source::Server { address: "a\nb", region: "x", offset: 0, writes_back: false };
    assert_eq!(client.create("x", 4096, 4096, lines).err(), Some(RefusalCode::Malformed));
}

/// Its server was killed, and the region made again under its name: pages of both are never mixed, and what the
/// former one took with it is dirty again.
#[test]
fn cap_9_cap_16_a_region_that_was_made_again_is_not_taken_for_its_former_self() {
    let (other, server) = start(256);
    let mut client = Raw::greeted(&server);
    client.create("here", 128 * 4096, 4096, there(0, true)).unwrap();
    client.create("again", 128 * 4096, 4096, there(128 * 4096, false)).unwrap();
    let [mut here, mut again] = ["here", "again"].map(|name| Raw::opened(&server, name).unwrap());
    assert_eq!([&mut here, &mut again].map(|region| region.read(&[(3, 0)]).unwrap()[0]), [3, 131]);
    // Apart, so that each is a write of its own.
    for page in (0..20).step_by(2) {
        here.write(&[(page, 1, 100 + page as u8)]).unwrap();
    }
    other.lives_for.store(4, Ordering::Relaxed);
    let flushed = patiently(|| here.over(Action::Flush, 0, 128));
    assert_eq!(flushed, Err(RefusalCode::SourceAway));
    assert!(server.logs_all(&["server:other:1/there", "another one than it was"]));
    assert_eq!(here.show().dirty.get(), 10, "also what it had acknowledged");
    let writes = other.written.lock().unwrap().len();
    std::thread::sleep(std::time::Duration::from_millis(600));
    for region in [&mut here, &mut again] {
        assert_eq!(region.read(&[(3, 0)]).unwrap().len(), 1, "what is here is served");
        assert_eq!(region.read(&[(90, 0)]), Err(RefusalCode::SourceAway), "and never its zeros");
    }
    std::thread::sleep(std::time::Duration::from_millis(600));
    assert_eq!(here.over(Action::Flush, 0, 128), Err(RefusalCode::SourceAway));
    assert_eq!(
        (other.written.lock().unwrap().len(), other.flushes.load(Ordering::Relaxed)),
        (writes, 0)
    );
    // Under the same incarnation too, if it was deleted and made again.
    client.create("new", 128 * 4096, 4096, there(0, true)).unwrap();
    let mut new = Raw::opened(&server, "new").unwrap();
    assert_eq!(new.read(&[(90, 0)]), Ok(vec![0]));
    other.region.fetch_add(1, Ordering::Relaxed);
    assert_eq!(new.read(&[(91, 0)]), Err(RefusalCode::SourceAway));
}

#[test]
fn cap_16_only_what_changed_is_written_back_to_another_server() {
    let (other, server) = start(256);
    let mut client = Raw::greeted(&server);
    let info = client.create("here", 128 * 4096, 512, there(64 * 4096, true)).unwrap();
    assert!(info.is_server && info.writes_back);
    let mut here = Raw::opened(&server, "here").unwrap();
    here.copy(Action::Clone, "before", false).unwrap();
    here.write(&[(0, 1, 1), (1, 1, 2), (100, 1, 3)]).unwrap();
    assert_eq!(here.over(Action::Flush, 0, 128).unwrap(), 3);
    assert_eq!(other.flushes.load(Ordering::Relaxed), 1);
    let mut written = other.written.lock().unwrap().clone();
    written.sort_by_key(|range| range.start);
    assert_eq!(written, [64 * 4096..66 * 4096, 164 * 4096..165 * 4096]);
    assert_eq!(here.over(Action::Flush, 0, 128).unwrap(), 0, "once is enough");
    // The copy holds what was there when it was made.
    let mut before = Raw::opened(&server, "before").unwrap();
    assert_eq!(before.read(&[(0, 0), (1, 0), (100, 0)]).unwrap(), [64, 65, 164]);
    let content = other.content.lock().unwrap();
    assert_eq!([content[64 * 4096], content[65 * 4096], content[66 * 4096]], [1, 2, 66]);
}
