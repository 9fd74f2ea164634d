//! Pages go there and come back, over both transports.

use farmem_region::{PageCount, PageIndex, PageRange, Request, StoreError};

use crate::client::{Client, config};
use crate::server::{BOTH, TestServer};

#[test]
fn pages_go_there_and_come_back() {
    for over in BOTH {
        let server = TestServer::start(over, 256, |_| ());
        let mut client = Client::connect(config(&server.endpoint, 64), 1000).unwrap();
        assert!(client.grow(16384).unwrap().get() >= 16384);
        for (first, count, version) in [(0, 1, 1), (1, 64, 1), (100, 1000, 1), (100, 1000, 2)] {
            client.stamp(first, count, version);
            client.store(first, count, version).unwrap();
            client.frames.0.fill([0; 4096]);
            client.fetch(first, count, version).unwrap();
            client.check(first, count, version);
        }
        let stat = server.stat();
        assert_eq!((stat.pages, stat.slots, stat.sessions), (1065, 1065, 1));
        assert_eq!(stat.reserved_bytes, 64 << 20);
        client.store.disconnect().unwrap();
        server.wait_until_empty();
    }
}

#[test]
fn a_released_page_is_no_page_of_zeros() {
    for over in BOTH {
        let server = TestServer::start(over, 64, |_| ());
        let mut client = Client::connect(config(&server.endpoint, 16), 16).unwrap();
        client.grow(4096).unwrap();
        client.store(0, 16, 1).unwrap();
        let range = PageRange { start: PageIndex::new(4), count: PageCount::new(8) };
        client.run(Request::Release(&[range])).unwrap();
        client.fetch(0, 4, 1).unwrap();
        client.fetch(12, 4, 1).unwrap();
        for first in [4, 11, 16] {
            let error = client.fetch(first, 1, 1).unwrap_err();
            let StoreError::Refused { reason, .. } = &error else { panic!("{error}") };
            assert!(reason.contains("no such page"), "{reason}");
        }
        assert_eq!(server.stat().pages, 8);
        // Fetching by another version than is stored is an error too.
        assert!(matches!(client.fetch(0, 1, 2), Err(StoreError::Refused { .. })));
        assert!(matches!(client.fetch(4096, 1, 1), Err(StoreError::Refused { .. })));
    }
}
