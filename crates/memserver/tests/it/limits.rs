//! Named limits, tested at their edges.

use std::io::Write;
use std::time::Duration;

use farmem_region::PageIndex;
use farmem_wire::{Action, AttachMode, HEADER_BYTES, Header, PageEntry, RefusalCode, Source, seal};

use crate::raw::{Raw, TestServer};

#[test]
fn a_thousand_connections() {
    let server = TestServer::start(4096, |config| config.workers = 2);
    let mut clients: Vec<_> = (0..1000).map(|_| Raw::with_region(&server, 2)).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        client.write(&[(0, 1, number as u8), (1, 1, 7)]).unwrap();
    }
    for (number, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.read(&[(0, 1)]).unwrap(), [number as u8]);
    }
    let stat = server.stat();
    assert_eq!((stat.sessions, stat.connections, stat.pages), (1000, 1001, 2000));
    for client in &mut clients {
        client.call(client.request(Action::Disconnect), |_| ());
    }
    drop(clients);
    server.wait_until_empty();
}

#[test]
fn one_connection_too_many() {
    let server = TestServer::start(64, |config| config.limits.connections_max = 3);
    let held: Vec<_> = (0..3).map(|_| Raw::greeted(&server)).collect();
    assert!(Raw::silent(&server).is_dropped());
    assert!(server.logs("3 are connected"));
    drop(held);
    let stat = server.wait_until_served();
    assert!(stat.connections_refused >= 1);
}

#[test]
fn one_session_too_many() {
    let server = TestServer::start(64, |config| config.limits.sessions_max = 2);
    let held: Vec<_> = (0..2).map(|_| Raw::with_region(&server, 1)).collect();
    let mut third = Raw::greeted(&server);
    assert_eq!(third.setup(1, false, false), Err(RefusalCode::Busy));
    third.call(held[0].request(Action::Disconnect), |_| ());
    third.setup(1, false, false).unwrap();
    // One connection, one session.
    assert_eq!(third.setup(1, false, false), Err(RefusalCode::Malformed));
}

#[test]
fn one_attached_connection_too_many() {
    let server = TestServer::start(64, |config| config.limits.connections_per_session_max = 2);
    let client = Raw::with_region(&server, 1);
    let second = client.attach(&server, AttachMode::Join, 0).unwrap();
    let third = client.attach(&server, AttachMode::Join, 0).err();
    assert_eq!(third, Some(RefusalCode::Busy));
    // In the place of another one it may.
    client.attach(&server, AttachMode::Join, second.connection).unwrap();
}

#[test]
fn writes_in_flight() {
    // Arenas come in chunks of 512 slots: 500 pages to lend leave 12 for pages on their way.
    let server = TestServer::start(500, |config| {
        config.limits.inflight_bytes = farmem_region::ByteCount::new(12 * 4096);
        config.limits.message_timeout = Duration::from_secs(60);
    });
    let mut client = Raw::with_region(&server, 500);
    for first in (0..500).step_by(10) {
        let pages: Vec<_> = (first..first + 10).map(|page| (page, 1, 1)).collect();
        client.write(&pages).unwrap();
    }
    // All pages are stored, and each can still be written anew, at most 12 at a time.
    let pages: Vec<_> = (0..12).map(|page| (page, 2, 2)).collect();
    client.write(&pages).unwrap();
    let pages: Vec<_> = (0..13).map(|page| (page, 3, 3)).collect();
    assert_eq!(client.write(&pages), Err(RefusalCode::Busy));
    let mut half = client.attach(&server, AttachMode::Join, 0).unwrap();
    let message = half.write_message(&std::array::from_fn::<_, 12, _>(|at| (at as u64, 3, 3)));
    half.stream.write_all(&message[..2000]).unwrap();
    server.wait_until(|stat| stat.slots == 512);
    assert_eq!(client.write(&[(0, 4, 4)]), Err(RefusalCode::Busy));
    assert_eq!(client.read(&[(0, 2)]).unwrap(), [2]);
    drop(half);
    server.wait_until(|stat| stat.slots == 500);
    client.write(&[(0, 4, 4)]).unwrap();
}

#[test]
fn requests_that_wait_behind_many_replies_are_all_answered() {
    const REQUESTS: u64 = 200;
    // Two pages of replies may wait, so that the server stops in the middle again and again.
    let server = TestServer::start(64, |config| config.limits.output_bytes_max = 8192);
    let mut client = Raw::with_region(&server, 8);
    let pages: Vec<_> = (0..8).map(|page| (page, 1, page as u8)).collect();
    client.write(&pages).unwrap();
    let mut requests = Vec::new();
    for number in 0..REQUESTS {
        let header = Header { entries: 1, request: number + 1000, ..client.request(Action::Read) };
        let start = requests.len();
        requests.resize(start + HEADER_BYTES, 0);
        PageEntry { page: PageIndex::new(number % 8), ..PageEntry::default() }
            .encode(&mut requests);
        seal(header, &mut requests[start..]);
    }
    client.stream.write_all(&requests).unwrap();
    for number in 0..REQUESTS {
        let (reply, page) = client.receive();
        assert_eq!((reply.request, reply.refusal), (number + 1000, None));
        assert!(page.len() == 4096 && page.iter().all(|byte| u64::from(*byte) == number % 8));
    }
}

/// 16 portions of 2 MiB are read in for one write, which touches each in part.
#[test]
fn cap_6_a_write_that_touches_many_large_portions_has_them_read_in_parts() {
    const UNIT: u64 = 512;
    const UNITS: u64 = 36;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    std::fs::write(&path, vec![7; (UNITS * UNIT * 4096) as usize]).unwrap();
    let server = TestServer::start(20 << 10, |config| {
        config.directories = vec![directory.path().to_owned()];
    });
    let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
    Raw::greeted(&server).create("r", UNITS * UNIT * 4096, 2 << 20, source).unwrap();
    let mut region = Raw::opened(&server, "r").unwrap();
    let touch = |units: std::ops::Range<u64>| -> Vec<_> {
        units.map(|unit| (unit * UNIT + unit, 1, unit as u8)).collect()
    };
    region.write(&touch(0..16)).unwrap();
    assert_eq!(server.stat().pages, 16 * UNIT);
    // One more than that: the first 16 of them are there now, and stay.
    assert_eq!(region.write(&touch(16..33)), Err(RefusalCode::Busy));
    assert_eq!(server.stat().pages, 32 * UNIT);
    assert_eq!(region.read(&[(16 * UNIT + 16, 0)]).unwrap(), [7], "nothing was written");
    region.write(&touch(16..33)).unwrap();
    assert_eq!(server.stat().pages, 33 * UNIT);
    let written: Vec<_> = (0..33).map(|unit| (unit * UNIT + unit, 1)).collect();
    assert_eq!(region.read(&written).unwrap(), (0..33).collect::<Vec<u8>>());
    assert_eq!(region.read(&[(UNIT, 0), (33 * UNIT - 1, 0), (33 * UNIT, 0)]).unwrap(), [7; 3]);
}

/// As many for one read; the rest is read when it comes again.
#[test]
fn cap_6_a_read_that_touches_many_large_portions_has_them_read_in_parts() {
    const UNIT: u64 = 512;
    const UNITS: u64 = 40;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    std::fs::write(&path, vec![7; (UNITS * UNIT * 4096) as usize]).unwrap();
    let server = TestServer::start(24 << 10, |config| {
        config.directories = vec![directory.path().to_owned()];
    });
    let source = Source::File { path: path.to_str().unwrap(), offset: 0 };
    Raw::greeted(&server).create("r", UNITS * UNIT * 4096, 2 << 20, source).unwrap();
    let mut region = Raw::opened(&server, "r").unwrap();
    let touched: Vec<_> = (0..UNITS).map(|unit| (unit * UNIT + unit, 0)).collect();
    for units in [16, 32] {
        assert_eq!(region.read(&touched), Err(RefusalCode::Busy));
        assert_eq!(server.stat().pages, units * UNIT);
    }
    assert_eq!(region.read(&touched).unwrap(), [7; UNITS as usize]);
    assert_eq!(server.stat().pages, UNITS * UNIT);
}

#[test]
fn a_page_far_beyond_a_region_is_refused_whatever_the_region_is_made_from() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("data");
    std::fs::write(&path, vec![7; 2 << 20]).unwrap();
    let server = TestServer::start(2048, |config| {
        config.directories = vec![directory.path().to_owned()];
    });
    let file = Source::File { path: path.to_str().unwrap(), offset: 0 };
    for (name, page_bytes, source) in
        [("fill", 4096, Source::Fill(7)), ("file", 4096, file), ("large", 64 << 10, file)]
    {
        Raw::greeted(&server).create(name, 2 << 20, page_bytes, source).unwrap();
        let mut region = Raw::opened(&server, name).unwrap();
        for page in [u64::MAX, u64::MAX - 15, u64::MAX - 16] {
            assert_eq!(region.read(&[(0, 0), (page, 0)]), Err(RefusalCode::OutOfBounds), "{name}");
            region.over(Action::Invalidate, 0, 16).unwrap_or_default();
            let write = region.write(&[(page, 1, 1)]);
            assert_eq!(write, Err(RefusalCode::OutOfBounds), "{name}");
        }
    }
}
