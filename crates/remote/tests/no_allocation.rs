//! On the path of a fault nothing is allocated once buffers have grown: the allocator's memory
//! might itself be out.

#![expect(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use crate::client::{Client, config, fetch_pages, store_pages};
use crate::server::{Over, TestServer};
use farmem_region::Request;

#[path = "it/client.rs"]
#[expect(dead_code, reason = "written for the other tests, which use more of it")]
mod client;
#[path = "it/frames.rs"]
mod frames;
#[path = "it/server.rs"]
#[expect(dead_code, reason = "written for the other tests, which use more of it")]
mod server;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// Counts what each thread allocates.
struct Counting;

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn fetches_and_stores_allocate_nothing_in_the_steady_state() {
    for (over, shares) in [(Over::Tcp, false), (Over::Unix, false), (Over::Unix, true)] {
        let server = TestServer::start(over, 64, |config| config.share_arena = shares);
        let mut client = Client::connect(config(&server.endpoint, 16), 64).unwrap();
        client.grow(4096).unwrap();
        let fetches = [fetch_pages(0, 64, 0), fetch_pages(7, 1, 0)];
        let mut versions = 1..;
        let mut round = |client: &mut Client, counted: bool| {
            let version = versions.next().unwrap();
            let stores = store_pages(0, 64, version);
            let mut fetches = fetches.clone();
            for fetch in fetches.iter_mut().flatten() {
                fetch.version = stores[0].version;
            }
            client.done.reserve(16);
            let before = ALLOCATIONS.get();
            let ticket = client.submit(Request::Store(&stores)).unwrap();
            client.finish(ticket).unwrap();
            for fetch in &fetches {
                let ticket = client.submit(Request::Fetch(fetch)).unwrap();
                client.finish(ticket).unwrap();
            }
            let made = ALLOCATIONS.get() - before;
            assert!(!counted || made == 0, "{made} allocations over {over:?}, shares: {shares}");
        };
        (0..20).for_each(|_| round(&mut client, false));
        (0..20).for_each(|_| round(&mut client, true));
    }
}
