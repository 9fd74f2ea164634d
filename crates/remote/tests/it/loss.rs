//! Connections that break, servers that die, restart, stall or are full.

use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use farmem_memserver::{DistantRegion, Neighbours};
use farmem_region::{ByteCount, Incarnation, RegionId, Request, StoreError};
use farmem_remote::named::{self, NamedRegion};
use farmem_remote::{RemoteConfig, admin};
use farmem_transport::Endpoint;
use farmem_wire::{Create, Source};

use crate::client::{Client, config, fetch_pages, store_pages};
use crate::proxy::Proxy;
use crate::server::{BOTH, Over, TestServer};

#[test]
fn a_cut_connection_is_made_anew() {
    let server = TestServer::start(Over::Tcp, 64, |_| ());
    let proxy = Proxy::start(&server.endpoint);
    let mut client = Client::connect(config(&proxy.endpoint, 16), 512).unwrap();
    client.grow(4096).unwrap();
    client.stamp(0, 512, 1);
    client.store(0, 512, 1).unwrap();
    for round in 0..5 {
        // While nothing is on its way, and while something is.
        proxy.cut();
        let ticket = client.submit(Request::Store(&store_pages(1000, 512, 1 + round))).unwrap();
        if round % 2 == 0 {
            client.advance().unwrap();
            proxy.cut();
        }
        client.finish(ticket).unwrap();
        proxy.cut();
        client.fetch(0, 512, 1).unwrap();
        client.check(0, 512, 1);
    }
    assert_eq!(server.stat().sessions, 1);
}

#[test]
fn a_connection_that_is_cut_again_and_again_makes_progress() {
    let server = TestServer::start(Over::Tcp, 64, |_| ());
    let proxy = Proxy::start(&server.endpoint);
    let mut client = Client::connect(config(&proxy.endpoint, 16), 64).unwrap();
    client.grow(4096).unwrap();
    proxy.cut();
    // Cut in the middle of heads, of pages and of acknowledgements, at ever other places.
    for round in 1..40u64 {
        proxy.cut_after(70_000 + round * 1_237);
        client.stamp(0, 16, round);
        client.store(0, 16, round).unwrap();
        client.frames.0.fill([0; 4096]);
        client.fetch(0, 16, round).unwrap();
        client.check(0, 16, round);
    }
    assert!(proxy.cuts() > 10, "only {} cuts", proxy.cuts());
    assert_eq!(server.stat().slots, 16);
}

#[test]
fn a_dead_server_is_reported_within_a_second() {
    for over in BOTH {
        let mut server = TestServer::start(over, 64, |_| ());
        let mut client = Client::connect(config(&server.endpoint, 16), 16).unwrap();
        client.grow(16).unwrap();
        client.store(0, 16, 1).unwrap();
        server.stop();
        let began = Instant::now();
        let error = client.fetch(0, 16, 1).unwrap_err();
        assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
        let text = error.to_string();
        assert!(matches!(error, StoreError::Lost { .. }), "{text}");
        assert!(text.contains(&server.endpoint.to_string()) && text.contains("region 1"), "{text}");
        // For good.
        assert_eq!(client.advance().unwrap_err(), error);
        assert_eq!(client.submit(Request::Release(&[])).unwrap_err(), error);
    }
}

#[test]
fn an_idle_store_notices_that_its_server_died() {
    let mut server = TestServer::start(Over::Unix, 64, |_| ());
    let mut client = Client::connect(config(&server.endpoint, 16), 16).unwrap();
    client.grow(16).unwrap();
    server.stop();
    let began = Instant::now();
    let error = loop {
        client.wait();
        if let Err(error) = client.advance() {
            break error;
        }
    };
    assert!(matches!(error, StoreError::Lost { .. }));
    assert!(began.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_server_that_restarted_empty_is_not_taken_for_its_former_self() {
    for over in BOTH {
        let mut server = TestServer::start(over, 64, |_| ());
        let mut client = Client::connect(config(&server.endpoint, 16), 16).unwrap();
        client.grow(16).unwrap();
        client.store(0, 16, 1).unwrap();
        server.stop();
        let again = TestServer::start_at(server.endpoint.clone(), 64, |_| ());
        let error = client.fetch(0, 16, 1).unwrap_err();
        assert!(matches!(error, StoreError::Lost { .. }));
        assert!(error.to_string().contains("restarted and is empty"), "{error}");
        assert_eq!(again.stat().sessions, 0);
    }
}

#[test]
fn a_session_that_timed_out_is_lost() {
    let server = TestServer::start(Over::Tcp, 64, |config| {
        config.limits.session_timeout = Duration::from_millis(100);
    });
    let proxy = Proxy::start(&server.endpoint);
    let mut client = Client::connect(config(&proxy.endpoint, 16), 16).unwrap();
    client.grow(16).unwrap();
    client.store(0, 16, 1).unwrap();
    proxy.refuse(true);
    proxy.cut();
    server.wait_until_empty();
    proxy.refuse(false);
    let error = client.fetch(0, 16, 1).unwrap_err();
    assert!(error.to_string().contains("no such session"), "{error}");
}

#[test]
fn a_network_that_stays_away_is_given_up_in_time() {
    let server = TestServer::start(Over::Tcp, 64, |_| ());
    let proxy = Proxy::start(&server.endpoint);
    let mut config = config(&proxy.endpoint, 16);
    config.timeouts.reconnect_us = 700_000;
    let mut client = Client::connect(config, 16).unwrap();
    client.grow(16).unwrap();
    client.store(0, 16, 1).unwrap();
    proxy.refuse(true);
    proxy.cut();
    let began = Instant::now();
    assert!(matches!(client.fetch(0, 16, 1), Err(StoreError::Lost { .. })));
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(600) && took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn a_silent_connection_is_replaced() {
    let server = TestServer::start(Over::Tcp, 64, |_| ());
    let proxy = Proxy::start(&server.endpoint);
    let mut config = config(&proxy.endpoint, 16);
    config.timeouts.silence_us = 300_000;
    config.timeouts.attempt_us = 300_000;
    let mut client = Client::connect(config, 16).unwrap();
    client.grow(16).unwrap();
    client.stamp(0, 16, 1);
    client.store(0, 16, 1).unwrap();
    // Half open: the connection stays, and nothing moves.
    proxy.hold(true);
    let ticket = client.submit(Request::Store(&store_pages(0, 16, 2))).unwrap();
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(500) {
        client.advance().unwrap();
        client.wait();
    }
    proxy.cut();
    proxy.hold(false);
    client.finish(ticket).unwrap();
    client.fetch(0, 16, 2).unwrap();
}

#[test]
fn a_slow_server_is_not_taken_for_dead() {
    let server = TestServer::start(Over::Tcp, 64, |_| ());
    let proxy = Proxy::start(&server.endpoint);
    let mut client = Client::connect(config(&proxy.endpoint, 16), 16).unwrap();
    client.grow(16).unwrap();
    proxy.hold(true);
    client.polls = true;
    let ticket = client.submit(Request::Store(&store_pages(0, 16, 1))).unwrap();
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(400) {
        client.advance().unwrap();
        client.wait();
    }
    proxy.hold(false);
    client.finish(ticket).unwrap();
    assert_eq!(server.stat().connections_accepted, 2, "one for the store, one for stat");
}

#[test]
fn a_caller_that_was_stopped_for_long_goes_on() {
    let server = TestServer::start(Over::Unix, 64, |_| ());
    let mut config = config(&server.endpoint, 16);
    config.timeouts.silence_us = 50_000;
    let mut client = Client::connect(config, 16).unwrap();
    client.grow(16).unwrap();
    let ticket = client.submit(Request::Store(&store_pages(0, 16, 1))).unwrap();
    client.advance().unwrap();
    // The reply is there long before it is looked at.
    server.wait_until(|stat| stat.pages == 16);
    std::thread::sleep(Duration::from_millis(100));
    client.finish(ticket).unwrap();
    assert_eq!(server.stat().connections, 2);
}

#[test]
fn cap_81_full_servers_and_partial_grants() {
    let server = TestServer::start(Over::Unix, 64, |_| ());
    let refused = Client::connect(config(&server.endpoint, 65), 16).err().unwrap();
    let (asked, free) = (65 << 20, 64 << 20);
    assert_eq!(refused, StoreError::Full { server: server.endpoint.to_string(), asked, free });
    let mut partial =
        Client::connect(RemoteConfig { accept_partial: true, ..config(&server.endpoint, 65) }, 16)
            .unwrap();
    assert_eq!(partial.session().granted.get(), free);
    // All that was granted can be had, and not a page more.
    let mut pages = 0;
    while pages < 16384 {
        pages = partial.grow(1).unwrap().get();
    }
    assert_eq!(pages, 16384);
    let server_name = server.endpoint.to_string();
    let full = StoreError::Full { server: server_name.clone(), asked: 4096, free: 0 };
    assert_eq!(partial.grow(1).unwrap_err(), full);
    // That closes nothing.
    partial.store(16383, 1, 1).unwrap();
    partial.store.disconnect().unwrap();
    let mut dynamic =
        Client::connect(RemoteConfig { dynamic: true, ..config(&server.endpoint, 1) }, 16).unwrap();
    assert_eq!(dynamic.grow(16000).unwrap().get(), 16000);
    let full = StoreError::Full { server: server_name, asked: 1000 * 4096, free: 384 * 4096 };
    assert_eq!(dynamic.grow(1000).unwrap_err(), full);
    assert_eq!(dynamic.grow(384).unwrap().get(), 16384);
}

#[test]
fn a_supervisor_ends_the_session_of_a_program_that_died() {
    for over in BOTH {
        let server = TestServer::start(over, 64, |_| ());
        let mut client = Client::connect(config(&server.endpoint, 16), 16).unwrap();
        client.grow(16).unwrap();
        client.store(0, 16, 1).unwrap();
        let session = client.session();
        drop(client);
        let timeout = Duration::from_secs(1);
        admin::disconnect_session(&server.endpoint, &session, timeout).unwrap();
        server.wait_until_empty();
        // Once more is fine.
        admin::disconnect_session(&server.endpoint, &session, timeout).unwrap();
        admin::ping(&server.endpoint, timeout).unwrap();
    }
}

/// A region of another server, over a connection of its own.
struct Distant(NamedRegion);

impl DistantRegion for Distant {
    fn identity(&self) -> (Incarnation, RegionId) {
        self.0.identity()
    }

    fn size(&mut self) -> io::Result<u64> {
        Ok(self.0.size().get())
    }

    fn read(&mut self, bytes: Range<u64>) -> io::Result<Vec<u8>> {
        self.0.read(bytes).map_err(io::Error::other)
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write(at, bytes).map_err(io::Error::other)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_source_that_was_away_for_a_while_is_read_when_it_is_back() {
    const PATIENCE: Duration = Duration::from_millis(700);
    let back = TestServer::start(Over::Tcp, 64, |_| ());
    let proxy = Proxy::start(&back.endpoint);
    let make = |endpoint: &Endpoint, name, source| {
        let size = ByteCount::new(256 << 10);
        let create = Create { name, size, page_bytes: 4096, source, prefers: None };
        named::create(endpoint, &create, Duration::from_secs(5)).unwrap();
    };
    make(&back.endpoint, "far", Source::Fill(7));
    let through = proxy.endpoint.clone();
    let front = TestServer::start(Over::Tcp, 64, |config| {
        config.neighbours = Some(Neighbours::new(move |_, region, _| {
            let region = NamedRegion::open(&through, region, false, PATIENCE);
            Ok(Box::new(Distant(region.map_err(io::Error::other)?)))
        }));
    });
    let address = "there";
    let source = Source::Server { address, region: "far", offset: 0, writes_back: false };
    make(&front.endpoint, "near", source);
    let mut config = config(&front.endpoint, 1);
    config.timeouts.reconnect_us = 2_000_000;
    let mut client = Client::open(config, "near", 64).unwrap();
    client.fetch(0, 4, 0).unwrap();
    assert_eq!(client.frames.0[3], [7; 4096]);
    let away = |proxy: &Proxy| {
        proxy.refuse(true);
        proxy.cut();
    };
    away(&proxy);
    let fetched = client.submit(Request::Fetch(&fetch_pages(32, 4, 0))).unwrap();
    let began = Instant::now();
    while began.elapsed() < Duration::from_millis(1_200) {
        client.advance().unwrap();
        client.wait();
    }
    assert!(client.done.is_empty(), "{:?}", client.done);
    // What needs nothing of the source is not kept waiting.
    client.fetch(0, 4, 0).unwrap();
    proxy.refuse(false);
    client.finish(fetched).unwrap();
    assert_eq!(client.frames.0[3], [7; 4096]);
    // Not for ever.
    away(&proxy);
    let began = Instant::now();
    let error = client.fetch(60, 4, 0).unwrap_err();
    assert!(began.elapsed() >= Duration::from_millis(1_900), "{:?}", began.elapsed());
    assert!(error.to_string().contains("does not give what it holds"), "{error}");
}

#[test]
fn a_server_that_cannot_be_reached_is_named() {
    let nowhere = Endpoint::Unix("/nonexistent/server".into());
    let error = Client::connect(config(&nowhere, 1), 1).err().unwrap();
    assert!(error.to_string().contains("unix:/nonexistent/server"), "{error}");
    assert!(admin::stat(&nowhere, Duration::from_secs(1)).is_err());
}
