//! Several tenants on one server: what one of them does is not the others' trouble.

use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use farmem_memserver::{DistantRegion, Neighbours, Use};
use farmem_region::{ByteCount, PageCount, PageIndex, PageRange};
use farmem_wire::{
    Action, AttachMode, HEADER_BYTES, Header, PageEntry, RangeEntry, RefusalCode, Source, seal,
};

use crate::raw::{Raw, TestServer};

/// Pages of each tenant's region; together they fill the server.
const REGION: u64 = 2048;
/// Slots beyond that, for pages on their way.
const INFLIGHT: u64 = 2048;

/// A server that two tenants have filled.
fn full_server(change: impl FnOnce(&mut farmem_memserver::ServerConfig)) -> (TestServer, [Raw; 2]) {
    let server = TestServer::start(2 * REGION, |config| {
        config.limits.inflight_bytes = ByteCount::new(INFLIGHT * 4096);
        config.limits.message_timeout = Duration::from_secs(60);
        change(config);
    });
    let tenants = [(); 2].map(|()| {
        let mut tenant = Raw::with_region(&server, REGION);
        write_all(&mut tenant, 1).unwrap();
        tenant
    });
    assert_eq!(server.stat().slots, 2 * REGION);
    (server, tenants)
}

fn write_all(tenant: &mut Raw, version: u64) -> Result<(), RefusalCode> {
    (0..REGION).step_by(128).try_for_each(|first| {
        let pages: Vec<_> = (first..first + 128).map(|page| (page, version, 7)).collect();
        tenant.write(&pages)
    })
}

fn read_message(client: &Raw, pages: std::ops::Range<u64>) -> Vec<u8> {
    let header =
        Header { entries: (pages.end - pages.start) as u32, ..client.request(Action::Read) };
    let mut message = vec![0; HEADER_BYTES];
    for page in pages {
        PageEntry { page: PageIndex::new(page), ..PageEntry::default() }.encode(&mut message);
    }
    seal(header, &mut message);
    message
}

#[test]
fn half_sent_writes_of_one_tenant_leave_room_for_the_others() {
    let (server, [mut victim, mut hostile]) = full_server(|_| ());
    let others: Vec<_> = (0..60)
        .map(|_| {
            let mut other = hostile.attach(&server, AttachMode::Join, 0).unwrap();
            let message =
                other.write_message(&std::array::from_fn::<_, 64, _>(|at| (at as u64, 9, 9)));
            other.stream.write_all(&message[..10_000]).unwrap();
            other
        })
        .collect();
    // Its share is 256 slots: four such writes. The server skips the others as they come.
    server.wait_until(|stat| stat.slots == 2 * REGION + 256);
    assert_eq!(hostile.write(&[(0, 2, 2)]), Err(RefusalCode::Busy));
    for version in 2..6 {
        write_all(&mut victim, version).unwrap();
    }
    drop(others);
    server.wait_until(|stat| stat.slots == 2 * REGION);
    hostile.write(&[(0, 2, 2)]).unwrap();
}

#[test]
fn replies_that_one_tenant_does_not_take_leave_room_for_the_others() {
    let (server, [mut victim, hostile]) = full_server(|config| {
        config.limits.output_bytes_max = 1 << 20;
        config.limits.output_timeout = Duration::from_secs(60);
    });
    // What does not fit in a socket is left out: nobody takes the replies.
    let attach = || {
        let other = hostile.attach(&server, AttachMode::Join, 0).unwrap();
        other.stream.set_write_timeout(Some(Duration::from_millis(2))).unwrap();
        other
    };
    let mut writer = Some(attach());
    let others: Vec<_> = (0..48)
        .map(|at| {
            let mut other = attach();
            let first = at * 128 % REGION;
            let message = read_message(&hostile, first..first + 128);
            for _ in 0..8 {
                let _ = other.stream.write_all(&message);
            }
            // The pages are written anew, so that replies alone hold what they were.
            let pages: Vec<_> = (first..first + 128).map(|page| (page, 2 + at, 7)).collect();
            writer = writer.take().and_then(|mut writer| {
                let message = writer.write_message(&pages);
                writer.stream.write_all(&message).ok().map(|()| writer)
            });
            other
        })
        .collect();
    for version in 2..6 {
        write_all(&mut victim, version).unwrap();
    }
    assert_eq!(server.stat().slow_readers, 0, "they are there all the time");
    drop((others, writer));
    server.wait_until(|stat| stat.slots == 2 * REGION);
}

#[test]
fn requests_beyond_a_sessions_share_are_served_once_its_replies_have_gone() {
    let server = TestServer::start(1024, |config| {
        config.limits.output_bytes_max = 1 << 20;
        config.limits.inflight_bytes = ByteCount::new(1 << 20);
    });
    let mut client = Raw::with_region(&server, 256);
    let pages: Vec<_> = (0..256).map(|page| (page, 1, 3)).collect();
    client.write(&pages).unwrap();
    let mut other = client.attach(&server, AttachMode::Join, 0).unwrap();
    let message = read_message(&client, 0..256);
    for _ in 0..3 {
        other.stream.write_all(&message).unwrap();
    }
    // Whether or not this one has to wait for the other one's replies to go, it is answered.
    client.stream.write_all(&message).unwrap();
    for _ in 0..3 {
        assert_eq!(other.receive().1, vec![3; 256 * 4096]);
    }
    assert_eq!(client.receive().1, vec![3; 256 * 4096]);
}

/// The clients of a named region know nothing of each other.
#[test]
fn a_client_of_a_named_region_that_takes_no_replies_keeps_no_other_waiting() {
    let server = TestServer::start(2048, |config| {
        config.limits.output_timeout = Duration::from_secs(60);
        config.limits.crowded_output_timeout = Duration::from_secs(60);
    });
    let source = Source::Fill(3);
    Raw::greeted(&server).create("shared", 256 * 4096, 4096, source).unwrap();
    let mut idle = Raw::joined(&server, "shared");
    let before = server.stat().reads;
    let message = read_message(&idle, 0..256);
    for _ in 0..8 {
        idle.stream.write_all(&message).unwrap();
    }
    server.wait_until(|stat| stat.reads >= before + 3);
    // Were it to wait for the other one it would be for a minute, and the test gives up before.
    let mut other = Raw::joined(&server, "shared");
    for _ in 0..20 {
        let message = read_message(&other, 0..256);
        other.stream.write_all(&message).unwrap();
        other.stream.write_all(&message).unwrap();
        for _ in 0..2 {
            assert_eq!(other.receive().1, vec![3; 256 * 4096]);
        }
    }
    assert_eq!(server.stat().slow_readers, 0);
    for _ in 0..8 {
        assert_eq!(idle.receive().1, vec![3; 256 * 4096]);
    }
}

#[test]
fn clients_of_a_named_region_that_use_up_its_share_are_dropped_sooner() {
    let server = TestServer::start(2048, |config| {
        config.limits.output_bytes_max = 64 << 10;
        config.limits.inflight_bytes = ByteCount::new(1 << 20);
        config.limits.output_timeout = Duration::from_secs(60);
        config.limits.crowded_output_timeout = Duration::from_millis(200);
    });
    let source = Source::Fill(3);
    Raw::greeted(&server).create("shared", 256 * 4096, 4096, source).unwrap();
    // What one of them has asked for is more than twice what may wait for all.
    let mut idle = Raw::joined(&server, "shared");
    let message = read_message(&idle, 0..256);
    for _ in 0..8 {
        idle.stream.write_all(&message).unwrap();
    }
    let mut other = Raw::joined(&server, "shared");
    for _ in 0..8 {
        let message = read_message(&other, 0..256);
        other.stream.write_all(&message).unwrap();
        assert_eq!(other.receive().1, vec![3; 256 * 4096]);
    }
    server.wait_until(|stat| stat.slow_readers == 1);
    drop(idle);
}

#[test]
fn a_reply_that_is_taken_a_byte_at_a_time_is_late_as_a_whole() {
    let server = TestServer::start(1024, |config| {
        config.limits.output_timeout = Duration::from_millis(300);
    });
    let mut client = Raw::with_region(&server, 256);
    let pages: Vec<_> = (0..256).map(|page| (page, 1, 3)).collect();
    client.write(&pages).unwrap();
    let message = read_message(&client, 0..256);
    for _ in 0..4 {
        client.stream.write_all(&message).unwrap();
    }
    let began = Instant::now();
    let mut bytes = [0; 64];
    while client.stream.read(&mut bytes).is_ok_and(|bytes| bytes > 0) {
        if server.stat().slow_readers == 1 {
            return;
        }
        assert!(began.elapsed() < Duration::from_secs(5), "it is waited for");
    }
    assert_eq!(server.stat().slow_readers, 1);
}

/// Another server's regions, which answer nothing while the gate is closed.
#[derive(Default)]
struct Gate {
    /// Whether it is closed, and how many wait at it.
    state: Mutex<(bool, u32)>,
    changed: Condvar,
}

impl Gate {
    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        if state.0 {
            state.1 += 1;
            self.changed.notify_all();
        }
        drop(self.changed.wait_while(state, |state| state.0).unwrap());
    }

    fn close(&self) {
        *self.state.lock().unwrap() = (true, 0);
    }

    fn open(&self) {
        self.state.lock().unwrap().0 = false;
        self.changed.notify_all();
    }

    /// Returns once so many wait; gives up after 8 s.
    fn await_waiting(&self, count: u32) {
        let state = self.state.lock().unwrap();
        let patience = Duration::from_secs(8);
        let waited = self.changed.wait_timeout_while(state, patience, |state| state.1 < count);
        assert!(!waited.unwrap().1.timed_out(), "not all of them are served");
    }
}

/// Opens it at the latest when the test has failed.
struct Opens<'a>(&'a Gate);

impl Drop for Opens<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

struct Held(Arc<Gate>);

impl DistantRegion for Held {
    fn identity(&self) -> (farmem_region::Incarnation, farmem_region::RegionId) {
        Default::default()
    }

    fn size(&mut self) -> io::Result<u64> {
        self.0.pass();
        Ok(1 << 20)
    }

    fn read(&mut self, bytes: std::ops::Range<u64>) -> io::Result<Vec<u8>> {
        self.0.pass();
        Ok(vec![7; (bytes.end - bytes.start) as usize])
    }

    fn write(&mut self, _at: u64, _bytes: &[u8]) -> io::Result<()> {
        self.0.pass();
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.pass();
        Ok(())
    }
}

const THERE: Source<'static> =
    Source::Server { address: "other:1", region: "there", offset: 0, writes_back: true };

/// A server with one worker whose regions from [`THERE`] wait at the gate.
fn beside_a_gate() -> (Arc<Gate>, TestServer) {
    let gate = Arc::new(Gate::default());
    let held = Arc::clone(&gate);
    let server = TestServer::start(1024, |config| {
        config.workers = 1;
        config.promise_percent = 1000;
        config.neighbours =
            Some(Neighbours::new(move |_, _, _: Use| Ok(Box::new(Held(Arc::clone(&held))))));
    });
    (gate, server)
}

/// Requests that wait for something else are served beside those of others: one worker serves all, and
/// each of these waits for as long as it takes to serve another client.
#[test]
fn requests_that_take_long_do_not_keep_others_waiting() {
    let (gate, server) = beside_a_gate();
    let there = THERE;
    let regions = ["fetched", "read", "flushed", "resized"].map(|name| {
        Raw::greeted(&server).create(name, 64 * 4096, 4096, there).unwrap();
        Raw::opened(&server, name).unwrap()
    });
    let [mut fetched, mut read, mut flushed, mut resized] = regions;
    flushed.write(&[(0, 1, 9)]).unwrap();
    let mut other = Raw::with_region(&server, 1);
    other.write(&[(0, 1, 5)]).unwrap();
    let mut admin = Raw::greeted(&server);
    gate.close();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(fetched.over(Action::Prefetch, 0, 64), Ok(64)));
        scope.spawn(|| assert_eq!(read.read(&[(3, 0)]), Ok(vec![7])));
        scope.spawn(|| assert_eq!(flushed.over(Action::Flush, 0, 64), Ok(1)));
        scope.spawn(|| assert_eq!(resized.resize(32).map(|info| info.pages.get()), Ok(32)));
        scope.spawn(|| admin.create("created", 64 * 4096, 4096, there).unwrap());
        let opens = Opens(&gate);
        gate.await_waiting(5);
        for _ in 0..100 {
            assert_eq!(other.read(&[(0, 1)]), Ok(vec![5]), "while all of them wait");
        }
        drop(opens);
    });
}

/// Two flushes at a time could write what is older over what is newer.
#[test]
fn while_a_region_is_flushed_nobody_else_flushes_resizes_or_deletes_it() {
    let (gate, server) = beside_a_gate();
    Raw::greeted(&server).create("flushed", 64 * 4096, 4096, THERE).unwrap();
    let mut writer = Raw::opened(&server, "flushed").unwrap();
    assert_eq!(writer.read(&[(5, 0)]), Ok(vec![7]));
    writer.write(&[(0, 1, 9), (7, 1, 9)]).unwrap();
    let mut other = writer.attach(&server, AttachMode::Join, 0).unwrap();
    gate.close();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(other.over(Action::Flush, 0, 64), Ok(2)));
        let opens = Opens(&gate);
        gate.await_waiting(1);
        let all = PageRange { start: PageIndex::new(0), count: PageCount::new(64) };
        let header = Header { entries: 1, ..writer.request(Action::Flush) };
        let (reply, _) = writer.call(header, |out| RangeEntry(all).encode(out));
        assert_eq!(reply.refusal, Some(RefusalCode::Busy), "flushed by another client");
        assert_eq!(writer.resize(32).map(|_| ()), Err(RefusalCode::Busy));
        assert_eq!(writer.delete(), Err(RefusalCode::Busy));
        // Of its pages those are not given back that are being written; who asks for nothing is answered.
        assert_eq!(writer.free_nothing(), Ok(()));
        for (start, count) in [(0, 1), (7, 1), (0, 64)] {
            assert_eq!(writer.free(start, count), Err(RefusalCode::Busy));
        }
        assert_eq!(writer.free(1, 6), Ok(()));
        drop(opens);
    });
    assert_eq!(other.over(Action::Flush, 0, 64), Ok(0), "nothing is left");
    assert_eq!(writer.free(0, 8), Ok(()));
    assert_eq!(writer.resize(32).map(|info| info.pages.get()), Ok(32));
}

/// Once all is written nobody waits for the disk but who flushes.
#[test]
fn while_the_disk_is_waited_for_pages_are_given_back() {
    let (gate, server) = beside_a_gate();
    Raw::greeted(&server).create("flushed", 64 * 4096, 4096, THERE).unwrap();
    let mut writer = Raw::opened(&server, "flushed").unwrap();
    writer.write(&[(0, 1, 9), (1, 1, 9)]).unwrap();
    let mut other = writer.attach(&server, AttachMode::Join, 0).unwrap();
    assert_eq!(other.over(Action::Flush, 0, 64), Ok(2));
    gate.close();
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(other.over(Action::Flush, 0, 64), Ok(0)));
        let opens = Opens(&gate);
        gate.await_waiting(1);
        assert_eq!(writer.free_nothing(), Ok(()));
        assert_eq!(writer.free(0, 1), Ok(()));
        assert_eq!(writer.resize(32).map(|_| ()), Err(RefusalCode::Busy));
        drop(opens);
    });
    assert_eq!(writer.read(&[(0, 0), (1, 1)]), Ok(vec![7, 9]));
}
