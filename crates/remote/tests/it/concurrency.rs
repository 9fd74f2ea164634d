//! Many requests at once, many clients at once.

use std::collections::HashMap;
use std::thread;

use farmem_region::{FetchPage, FrameId, PageIndex, Request, StoreError, StorePage, Version};

use crate::client::{Client, config};
use crate::server::{BOTH, TestServer};

/// A walk that is the same in every run.
fn walk(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed >> 33
}

/// Stores and fetches at random, many at a time, and checks every page that comes back.
fn shuffle(client: &mut Client, seed: u64, rounds: u32) {
    const PAGES: u64 = 2000;
    const GROUPS: u32 = 16;
    const GROUP: u32 = 16;
    let mut seed = seed;
    let mut versions: HashMap<u64, u64> = HashMap::new();
    for _ in 0..rounds {
        let mut tickets = Vec::new();
        let mut used = std::collections::HashSet::new();
        for group in 0..GROUPS {
            let first = walk(&mut seed) % (PAGES - u64::from(GROUP));
            let count = walk(&mut seed) as u32 % GROUP + 1;
            let pages: Vec<u64> = (first..first + u64::from(count)).collect();
            // A frame belongs to one request, and a page that is being stored is not fetched.
            if pages.iter().any(|page| !used.insert(*page)) {
                continue;
            }
            let frame = |at: usize| FrameId::new(group * GROUP + at as u32);
            if walk(&mut seed).is_multiple_of(2) {
                let mut stores = Vec::new();
                for (at, page) in pages.iter().enumerate() {
                    let version = versions.entry(*page).or_default();
                    *version += 1;
                    let bytes = &mut client.frames.0[frame(at).get() as usize];
                    bytes.fill((page * 7 + *version) as u8);
                    bytes[..8].copy_from_slice(&page.to_le_bytes());
                    let (page, version) = (PageIndex::new(*page), Version::new(*version));
                    stores.push(StorePage { page, version, frame: frame(at) });
                }
                tickets.push((client.submit(Request::Store(&stores)).unwrap(), vec![]));
            } else {
                let known: Vec<_> = pages
                    .iter()
                    .filter_map(|page| versions.get(page).map(|version| (*page, *version)))
                    .enumerate()
                    .map(|(at, (page, version))| FetchPage {
                        page: PageIndex::new(page),
                        version: Version::new(version),
                        frame: frame(at),
                    })
                    .collect();
                if !known.is_empty() {
                    tickets.push((client.submit(Request::Fetch(&known)).unwrap(), known));
                }
            }
        }
        for (ticket, fetched) in tickets {
            client.finish(ticket).unwrap();
            for FetchPage { page, version, frame } in fetched {
                let bytes = &client.frames.0[frame.get() as usize];
                assert_eq!(bytes[..8], page.get().to_le_bytes());
                let fill = (page.get() * 7 + version.get()) as u8;
                assert!(bytes[8..].iter().all(|byte| *byte == fill));
            }
        }
    }
}

#[test]
fn reads_and_writes_in_flight_together() {
    for over in BOTH {
        let server = TestServer::start(over, 64, |_| ());
        let mut client = Client::connect(config(&server.endpoint, 16), 256).unwrap();
        client.grow(2000).unwrap();
        shuffle(&mut client, 1, 300);
        client.store.disconnect().unwrap();
        server.wait_until_empty();
    }
}

#[test]
fn clients_do_not_disturb_each_other() {
    for over in BOTH {
        let server = TestServer::start(over, 256, |_| ());
        thread::scope(|scope| {
            for seed in 0..8 {
                let endpoint = &server.endpoint;
                scope.spawn(move || {
                    let mut client = Client::connect(config(endpoint, 16), 256).unwrap();
                    client.grow(2000).unwrap();
                    shuffle(&mut client, seed, 60);
                    client.store.disconnect().unwrap();
                });
            }
        });
        server.wait_until_empty();
    }
}

#[test]
fn requests_on_one_page_keep_their_order() {
    let server = TestServer::start(crate::server::Over::Unix, 64, |_| ());
    let mut client = Client::connect(config(&server.endpoint, 16), 200).unwrap();
    client.grow(16).unwrap();
    let mut last = None;
    for version in 1..=100 {
        let frame = FrameId::new(version);
        client.frames.0[version as usize].fill(version as u8);
        let version = Version::new(u64::from(version));
        let store = [StorePage { page: PageIndex::new(3), version, frame }];
        client.submit(Request::Store(&store)).unwrap();
        let frame = FrameId::new(100 + frame.get() % 100);
        if version.get() == 100 {
            let fetch = [FetchPage { page: PageIndex::new(3), version, frame }];
            last = Some(client.submit(Request::Fetch(&fetch)).unwrap());
        }
    }
    client.finish(last.unwrap()).unwrap();
    assert_eq!(client.frames.0[100], [100; 4096]);
}

#[test]
fn a_queue_that_is_full_says_busy_and_recovers() {
    let server = TestServer::start(crate::server::Over::Unix, 64, |_| ());
    let mut client = Client::connect(config(&server.endpoint, 16), 16).unwrap();
    client.grow(16).unwrap();
    client.store(0, 1, 1).unwrap();
    let (page, version) = (PageIndex::new(0), Version::new(1));
    let fetch = [FetchPage { page, version, frame: FrameId::new(0) }];
    let mut tickets = Vec::new();
    let limit = loop {
        match client.submit(Request::Fetch(&fetch)) {
            Ok(ticket) => tickets.push(ticket),
            Err(StoreError::Busy { limit }) => break limit,
            Err(other) => panic!("{other}"),
        }
    };
    assert_eq!(tickets.len(), limit);
    for ticket in tickets {
        client.finish(ticket).unwrap();
    }
    client.fetch(0, 1, 1).unwrap();
}
