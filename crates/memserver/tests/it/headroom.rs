//! A control group that leaves less than the server lends.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use farmem_memserver::{MemoryLeft, ServerConfig};
use farmem_region::{ByteCount, PageCount};
use farmem_wire::RefusalCode;

use crate::raw::{Raw, TestServer};
use crate::tiers::content;

/// What the server is told that its group leaves.
#[derive(Clone)]
struct Group(Arc<AtomicU64>);

impl Group {
    fn leaving(bytes: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes)))
    }

    fn leaves(&self, bytes: u64) {
        self.0.store(bytes, Ordering::Relaxed);
    }

    fn of(&self, config: &mut ServerConfig) {
        let left = Arc::clone(&self.0);
        let look = move || {
            // The server takes so much at a time, if there is as much beside what it leaves.
            let take = |left: u64| left.checked_sub(CHUNK).filter(|rest| *rest >= RESERVE);
            let before = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take);
            Some(ByteCount::new(before.unwrap_or_else(|left| left)))
        };
        config.memory_left = Some(MemoryLeft::new(look));
    }
}

const CHUNK: u64 = 2 << 20;
const RESERVE: u64 = 16 << 20;
const PAGES: u64 = 4096;

#[test]
fn a_server_whose_group_is_full_refuses_what_is_new_and_loses_nothing() {
    let group = Group::leaving(17 << 20);
    let server = TestServer::start(PAGES, |config| group.of(config));
    let mut client = Raw::with_region(&server, PAGES);
    assert_eq!(fill(&mut client, 0), 0, "of what is left 16 MiB are for other things");
    assert!(server.logs("the control group leaves 17408 KiB"));
    group.leaves(19 << 20);
    let written = fill(&mut client, 0);
    assert_eq!(written, 512);
    for page in 0..written {
        assert_eq!(client.read(&[(page, 1)]), Ok(vec![page as u8]));
    }
    // What was freed has memory still.
    client.free(0, 64).unwrap();
    for page in 0..64 {
        client.write(&[(page, 2, 9)]).unwrap();
    }
    assert_eq!(fill(&mut client, written), written);
    group.leaves(1 << 30);
    assert_eq!(fill(&mut client, written), PAGES, "the limit was raised");
    assert_eq!(client.read(&[(0, 2), (511, 1), (PAGES - 1, 1)]), Ok(vec![9, 255, 255]));
}

#[test]
fn a_server_whose_group_is_full_compresses_before_it_refuses() {
    let group = Group::leaving(RESERVE + 3 * CHUNK);
    let server = TestServer::start(PAGES, |config| {
        group.of(config);
        config.tiers.compressed = PageCount::new(4 * PAGES).bytes();
    });
    let mut client = Raw::with_region(&server, PAGES);
    for page in 0..PAGES {
        let written = client.write_pages(&[(page, 1, content(page, 1, true))]);
        assert_eq!(written, Ok(()), "page {page}: {:?}", server.stat());
    }
    let stat = server.stat();
    assert!(stat.slots <= 2048 && stat.compressed_pages > PAGES / 2, "{stat:?}");
    for page in 0..PAGES {
        assert!(client.read_page(page).unwrap().1 == content(page, 1, true), "page {page}");
    }
}

/// Writes pages until one is refused as busy; returns how many there are then.
fn fill(client: &mut Raw, from: u64) -> u64 {
    for page in from..PAGES {
        match client.write(&[(page, 1, page as u8)]) {
            Ok(()) => {}
            Err(code) => {
                assert_eq!(code, RefusalCode::Busy);
                return page;
            }
        }
    }
    PAGES
}
