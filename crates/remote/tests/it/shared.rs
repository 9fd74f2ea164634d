//! The memory of a server on the same machine, reached without the server.

use std::time::{Duration, Instant};

use farmem_region::{FrameId, PageCount, PageIndex, PageRange, Request, StoreError};
use farmem_remote::{RemoteConfig, SessionKey, admin};
use farmem_wire::SLOTS_ASSIGNED_MAX;

use crate::client::{Client, config, store_pages};
use crate::server::{Over, TestServer};

fn start(mebibytes: u64) -> TestServer {
    TestServer::start(Over::Unix, mebibytes, |config| config.share_arena = true)
}

#[test]
fn pages_go_there_and_come_back_without_the_server() {
    let server = start(64);
    let mut client = Client::connect(config(&server.endpoint, 16), 1000).unwrap();
    client.grow(4096).unwrap();
    for (first, count, version) in [(0, 1, 1), (1, 64, 1), (100, 1000, 1), (100, 1000, 2)] {
        client.stamp(first, count, version);
        client.store(first, count, version).unwrap();
        client.frames.0.fill([0; 4096]);
        client.fetch(first, count, version).unwrap();
        client.check(first, count, version);
    }
    let stat = server.stat();
    assert_eq!((stat.reads, stat.pages_read), (0, 0), "the server was asked for pages");
    assert_eq!((stat.pages, stat.pages_written), (1065, 2065));
    // 4 KiB a page would have come over the socket.
    assert!(stat.bytes_in < 1_500_000, "{} bytes came over the socket", stat.bytes_in);
    client.store.disconnect().unwrap();
    server.wait_until_empty();
}

#[test]
fn who_does_not_share_is_served_beside_who_does() {
    let server = start(64);
    let mut shares = Client::connect(config(&server.endpoint, 16), 64).unwrap();
    let mut asks =
        Client::connect(RemoteConfig { share_arena: false, ..config(&server.endpoint, 16) }, 64)
            .unwrap();
    for client in [&mut shares, &mut asks] {
        client.grow(64).unwrap();
    }
    for version in 1..20 {
        for (client, first) in [(&mut shares, 0), (&mut asks, 7)] {
            client.stamp(first, 50, version);
            client.store(first, 50, version).unwrap();
            client.frames.0.fill([0; 4096]);
            client.fetch(first, 50, version).unwrap();
            client.check(first, 50, version);
        }
    }
    assert_eq!(server.stat().reads, 19);
}

/// The copy has never stored anything, and is told where its original has. What the original has stored
/// since, what the copy stores itself, and what has left memory are told apart.
#[test]
fn cap_21_a_copy_finds_what_its_original_stored_without_the_server() {
    let server = start(64);
    let mut original = Client::connect(config(&server.endpoint, 16), 1000).unwrap();
    original.grow(4096).unwrap();
    original.stamp(50, 1000, 1);
    original.store(50, 1000, 1).unwrap();
    let of = original.session();
    let (session, token, epoch, incarnation) = (of.session, of.token, of.epoch, of.incarnation);
    let copy_of = Some(SessionKey { session, token, epoch, incarnation });
    let config = RemoteConfig { copy_of, ..config(&server.endpoint, 16) };
    let mut copy = Client::connect(config, 1000).unwrap();
    assert_eq!(copy.session().pages, PageCount::new(4096));
    original.stamp(50, 1000, 2);
    original.store(50, 1000, 2).unwrap();
    copy.stamp(300, 20, 3);
    copy.store(300, 20, 3).unwrap();
    copy.frames.0.fill([0; 4096]);
    for at in 0..1000 {
        let page = 50 + at * 7 % 1000;
        let version = if (300..320).contains(&page) { 3 } else { 1 };
        copy.fetch(page, 1, version).unwrap();
        copy.check(page, 1, version);
    }
    // One for each stretch that a reply tells of, and what was asked for before that reply came.
    let reads = server.stat().reads;
    assert!(reads <= 50, "the server was asked for {reads} of 1000 pages");
    original.fetch(50, 1000, 2).unwrap();
    original.check(50, 1000, 2);
}

/// The slots that a commit's reply names are named by nothing else: not when the commit is repeated.
#[test]
fn slots_that_lost_replies_named_are_used_again() {
    let server = start(64);
    let mut client = Client::connect(config(&server.endpoint, 16), 64).unwrap();
    client.grow(4096).unwrap();
    for round in 0..SLOTS_ASSIGNED_MAX as u64 / 64 {
        client.stamp(round * 64, 64, 1);
        let ticket = client.submit(Request::Store(&store_pages(round * 64, 64, 1))).unwrap();
        // What it asks arrives, and no reply does.
        let descriptor = client.store.descriptor().unwrap();
        rustix::net::shutdown(descriptor, rustix::net::Shutdown::Read).unwrap();
        client.advance().unwrap();
        server.wait_until(|stat| stat.pages == (round + 1) * 64);
        client.finish(ticket).unwrap();
    }
    let before = server.stat().bytes_in;
    client.stamp(1000, 64, 1);
    client.store(1000, 64, 1).unwrap();
    let sent = server.stat().bytes_in - before;
    assert!(sent < 16_384, "{sent} bytes came over the socket");
    for first in [0, 64, 128, 192, 1000] {
        client.fetch(first, 64, 1).unwrap();
        client.check(first, 64, 1);
    }
}

#[test]
fn a_server_that_does_not_share_is_asked() {
    for over in crate::server::BOTH {
        let server = TestServer::start(over, 64, |config| {
            config.share_arena = matches!(over, Over::Tcp);
        });
        let mut client = Client::connect(config(&server.endpoint, 16), 16).unwrap();
        client.grow(16).unwrap();
        client.store(0, 16, 1).unwrap();
        client.fetch(0, 16, 1).unwrap();
        assert_eq!(server.stat().reads, 1);
    }
}

#[test]
fn a_released_page_and_an_old_version_are_errors_here_too() {
    let server = start(64);
    let mut client = Client::connect(config(&server.endpoint, 16), 16).unwrap();
    client.grow(16).unwrap();
    client.store(0, 16, 1).unwrap();
    client.store(0, 16, 2).unwrap();
    assert!(matches!(client.fetch(0, 1, 1), Err(StoreError::Refused { .. })));
    assert!(matches!(client.fetch(0, 1, 3), Err(StoreError::Refused { .. })));
    let range = PageRange { start: PageIndex::new(4), count: PageCount::new(8) };
    client.run(Request::Release(&[range])).unwrap();
    let error = client.fetch(4, 1, 2).unwrap_err();
    assert!(error.to_string().contains("no such page"), "{error}");
    client.fetch(0, 4, 2).unwrap();
    client.stamp(4, 8, 3);
    client.store(4, 8, 3).unwrap();
    client.fetch(4, 8, 3).unwrap();
    client.check(4, 8, 3);
}

#[test]
fn a_full_server_takes_overwrites_still() {
    let server = TestServer::start(Over::Unix, 4, |config| {
        config.share_arena = true;
        config.limits.inflight_bytes = farmem_region::ByteCount::new(1 << 20);
    });
    let mut client = Client::connect(config(&server.endpoint, 4), 1024).unwrap();
    client.grow(1024).unwrap();
    for version in 1..6 {
        client.stamp(0, 1024, version);
        client.store(0, 1024, version).unwrap();
    }
    client.frames.0.fill([0; 4096]);
    client.fetch(0, 1024, 5).unwrap();
    client.check(0, 1024, 5);
    client.store.disconnect().unwrap();
    server.wait_until_empty();
}

#[test]
fn a_dead_server_is_reported_though_its_memory_lives_on() {
    let mut server = start(64);
    let mut client = Client::connect(config(&server.endpoint, 16), 16).unwrap();
    client.grow(32).unwrap();
    client.stamp(0, 16, 1);
    client.store(0, 16, 1).unwrap();
    server.stop();
    let began = Instant::now();
    let error = loop {
        // What is fetched meanwhile is right, or an error.
        match client.fetch(0, 16, 1) {
            Ok(_) => client.check(0, 16, 1),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, StoreError::Lost { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
}

#[test]
fn many_clients_share_one_arena() {
    let server = start(256);
    std::thread::scope(|scope| {
        for seed in 0..6u64 {
            let endpoint = &server.endpoint;
            scope.spawn(move || {
                let mut client = Client::connect(config(endpoint, 16), 256).unwrap();
                client.grow(2000).unwrap();
                for version in 1..30 {
                    let first = seed * 100 + version * 7;
                    let count = (version * 37 % 256) as u32 + 1;
                    client.stamp(first, count, version);
                    client.store(first, count, version).unwrap();
                    client.frames.0.fill([0; 4096]);
                    client.fetch(first, count, version).unwrap();
                    client.check(first, count, version);
                }
                let session = client.session();
                drop(client);
                admin::disconnect_session(endpoint, &session, Duration::from_secs(1)).unwrap();
            });
        }
    });
    server.wait_until_empty();
}

#[test]
fn slots_of_a_client_that_may_be_asleep_are_not_used_again() {
    let server = TestServer::start(Over::Unix, 64, |config| {
        config.share_arena = true;
        config.limits.session_timeout = Duration::from_millis(50);
    });
    let mut client = Client::connect(config(&server.endpoint, 16), 16).unwrap();
    client.grow(16).unwrap();
    client.store(0, 16, 1).unwrap();
    drop(client);
    let stat = server.wait_until(|stat| stat.sessions == 0);
    assert_eq!((stat.pages, stat.slots), (0, 256));
}

/// Of the pages that are written another thread copies some, others not, and all of them are more than
/// there are slots for at once; and what was written is read ahead.
#[test]
fn what_another_thread_carries_arrives_in_order() {
    const PAGES: u32 = 40;
    const REQUESTS: u64 = 100;
    let server = start(64);
    let mut client = Client::connect(config(&server.endpoint, 32), 4000).unwrap();
    client.frames.1.works = true;
    // No descriptor tells what that thread has done.
    client.polls = true;
    client.grow(4001).unwrap();
    // Slots come with the first reply.
    client.store(4000, 1, 1).unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    for (version, at_once) in [(1, REQUESTS), (2, 5), (3, 20)] {
        client.stamp(0, 4000, version);
        for begin in (0..REQUESTS).step_by(at_once as usize) {
            for at in begin..begin + at_once {
                let mut pages = store_pages(at * u64::from(PAGES), PAGES, version);
                for page in &mut pages {
                    page.frame = FrameId::new(page.page.get() as u32);
                }
                client.submit(Request::Store(&pages)).unwrap();
            }
            while (client.done.len() as u64) < at_once {
                client.advance().unwrap();
                let stored = client.done.len();
                assert!(Instant::now() < until, "{stored} of {at_once} are stored");
            }
            assert!(client.done.drain(..).all(|done| done.result.is_ok()));
        }
    }
    let placed = client.frames.1.errands;
    assert!(placed > 20, "{placed} were copied by another thread");
    client.frames.0.fill([0; 4096]);
    for first in (0..4000).step_by(500) {
        let mut pages = crate::client::fetch_pages(first, 500, 3);
        for page in &mut pages {
            page.frame = FrameId::new(page.page.get() as u32);
        }
        client.run(Request::FetchAhead(&pages)).unwrap();
    }
    client.check(0, 4000, 3);
    assert!(client.frames.1.errands > placed + 10, "some were read by another thread");
    assert_eq!(server.stat().reads, 0, "the server was asked for pages");
}
