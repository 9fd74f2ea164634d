//! Several tenants on one server: what one of them does is not the others' trouble.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use farmem_region::{ByteCount, PageIndex};
use farmem_wire::{Action, AttachMode, HEADER_BYTES, Header, PageEntry, RefusalCode, seal};

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
            let message = other.write_message(&[(0, 9, 9); 64]);
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
    let source = farmem_wire::Source::Fill(3);
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
    let source = farmem_wire::Source::Fill(3);
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

/// Requests that take long, for disks or for their size, are served beside those of others: one
/// worker serves all.
#[test]
fn requests_that_take_long_do_not_keep_others_waiting() {
    const PAGES: u64 = 12 << 10;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    std::fs::write(&path, vec![7; PAGES as usize * 4096]).unwrap();
    let server = TestServer::start(2 * PAGES, |config| {
        config.directories = vec![directory.path().to_owned()];
    });
    let source = farmem_wire::Source::File { path: path.to_str().unwrap(), offset: 0 };
    Raw::greeted(&server).create("file", PAGES * 4096, 4096, source).unwrap();
    let mut long = Raw::opened(&server, "file").unwrap();
    let mut other = Raw::with_region(&server, 1);
    other.write(&[(0, 1, 5)]).unwrap();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let (mut longs, mut shorts) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..8 {
                let began = Instant::now();
                assert_eq!(long.over(Action::Prefetch, 0, PAGES), Ok(PAGES));
                longs.push(began.elapsed());
                long.over(Action::Invalidate, 0, PAGES).unwrap();
            }
            is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
            let began = Instant::now();
            assert_eq!(other.read(&[(0, 1)]).unwrap(), [5]);
            shorts.push(began.elapsed());
        }
    });
    longs.sort();
    shorts.sort();
    // If they had to wait for each other there would be about two for each long one.
    assert!(shorts.len() > 60, "{}", shorts.len());
    let (long, short) = (longs[longs.len() / 2], shorts[shorts.len() / 2]);
    assert!(short < long / 8, "{short:?} beside {long:?}");
}
