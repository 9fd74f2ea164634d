//! What is read of a region first is remembered, and brought near the next time.

use std::path::Path;

use farmem_memserver::{FileTierConfig, ServerConfig};
use farmem_region::{ByteCount, PageCount};
use farmem_wire::{Action, RefusalCode, Source};

use crate::raw::{Raw, TestServer};
use crate::restart::{in_memory, started};
use crate::tiers::content;

const PAGES: u64 = 1500;
/// Half of the memory: what is brought in at most.
const BROUGHT: usize = 128;

fn pages(count: u64) -> ByteCount {
    PageCount::new(count).bytes()
}

fn with_a_file_only(config: &mut ServerConfig, place: &Path) {
    config.tiers.compressed = pages(0);
    let directory = place.to_owned();
    config.tiers.file = Some(FileTierConfig { directory, size: pages(8000) });
}

/// A region most of which lies in the file, and the order in which some of that was read.
fn filled(server: &TestServer) -> (Raw, Vec<u64>) {
    let mut admin = Raw::greeted(server);
    admin.create("region", PAGES * 4096, 4096, Source::Fill(0)).unwrap();
    let mut client = Raw::opened(server, "region").unwrap();
    for page in 0..PAGES {
        client.write_pages(&[(page, 1, content(page, 1, false))]).unwrap();
    }
    let order: Vec<u64> = (0..300).map(|at| at * 233 % 601).collect();
    for page in &order {
        assert_eq!(client.read_page(*page).unwrap().0, 1);
    }
    (client, order)
}

/// Which of these pages lie in dram. They are gone afterwards.
fn lie_in_dram(client: &mut Raw, pages: &[u64]) -> Vec<bool> {
    let is_there = |page: &u64| {
        let before = client.show();
        client.over(Action::Invalidate, *page, 1).unwrap();
        let after = client.show();
        assert_eq!(before.stored.get(), after.stored.get() + 1);
        before.file == after.file
    };
    pages.iter().map(is_there).collect()
}

/// What was read first is in memory again soon after a restart, and no more than there is room for:
/// so it was brought in that order.
#[test]
fn cap_101_what_was_read_first_is_in_memory_soon_after_a_restart() {
    let place = in_memory();
    let start = || started(place.path(), |config| with_a_file_only(config, place.path()));
    let server = start();
    let (_, order) = filled(&server);
    drop(server);
    let server = start();
    assert!(server.logs("that are read first"));
    let mut client = Raw::opened(&server, "region").unwrap();
    let found = lie_in_dram(&mut client, &order);
    let first = found[..BROUGHT].iter().filter(|is_there| **is_there).count();
    let later = found[BROUGHT..].iter().filter(|is_there| **is_there).count();
    assert!(first >= BROUGHT / 2 && later == 0, "{first} of the first, {later} of the others");
}

/// The same on request, in a server that keeps nothing.
#[test]
fn cap_101_a_working_set_is_prefetched_on_request() {
    let place = in_memory();
    let server = TestServer::start(256, |config| {
        with_a_file_only(config, place.path());
        config.limits.inflight_bytes = pages(64);
    });
    let (mut client, order) = filled(&server);
    let header = client.request(Action::Prefetch);
    let (reply, _) = client.call(header, |_| ());
    assert_eq!(reply.refusal, None);
    let found = lie_in_dram(&mut client, &order);
    let first = found[..BROUGHT].iter().filter(|is_there| **is_there).count();
    assert!(first >= BROUGHT / 2, "{first}");
    assert!(found[BROUGHT..].iter().filter(|is_there| **is_there).count() <= BROUGHT / 8);
    assert_eq!(client.read_page(order[0]).unwrap().0, 0, "it was forgotten");
    let (reply, _) = client.call(client.request(Action::Prefetch), |_| ());
    assert_eq!(reply.refusal, None, "what is not stored any more is left out");
    assert!(client.read(&[(order[1], 1)]) == Err(RefusalCode::NoPage));
}

/// It goes to a backup with the region, and comes back.
#[test]
fn cap_101_a_working_set_is_in_the_backup() {
    let place = in_memory();
    let root = place.path().canonicalize().unwrap();
    let server = started(place.path(), |config| with_a_file_only(config, place.path()));
    let (mut client, order) = filled(&server);
    let table = |name: &str| std::fs::read(root.join(name).join("manifest")).unwrap();
    // Behind the pages are the numbers of those that are read first, and a checksum.
    let reads = |table: &[u8]| {
        let end = table.len() - 4;
        let reads = table[end - order.len() * 8..end].as_chunks::<8>().0;
        reads.iter().map(|read| u64::from_le_bytes(*read)).collect::<Vec<_>>()
    };
    let path = |name: &str| root.join(name).to_str().unwrap().to_owned();
    client.back_up(&path("first"), false).unwrap();
    assert_eq!(reads(&table("first")), order);
    drop((client, server));
    let server = started(place.path(), |config| with_a_file_only(config, place.path()));
    Raw::restore(&server, &path("first"), "again", false).unwrap();
    drop(server);
    let server = started(place.path(), |config| with_a_file_only(config, place.path()));
    let mut again = Raw::opened(&server, "again").unwrap();
    again.back_up(&path("second"), false).unwrap();
    assert_eq!(reads(&table("second")), order);
}

/// Set to see what it gains; the first test above shows that it is done.
const MEASURE: &str = "FARMEM_MEASURE_WORKING_SETS";

/// Pages on a disk, read one after the other: for the first time, and after a restart that has
/// brought them near.
#[test]
fn cap_101_what_a_working_set_gains_when_measured() {
    if std::env::var_os(MEASURE).is_none() {
        return;
    }
    let (place, disk) = (in_memory(), tempfile::tempdir_in("/var/tmp").unwrap());
    let start = || {
        started(place.path(), |config| {
            with_a_file_only(config, disk.path());
            config.tiers.file.as_mut().unwrap().size = pages(80_000);
            config.memory = pages(16 << 10);
            config.limits.journal_bytes = ByteCount::new(64 << 20);
        })
    };
    let server = start();
    let mut admin = Raw::greeted(&server);
    admin.create("region", 48_000 * 4096, 4096, Source::Fill(0)).unwrap();
    let mut client = Raw::opened(&server, "region").unwrap();
    for page in 0..48_000 {
        client.write_pages(&[(page, 1, content(page, 1, false))]).unwrap();
    }
    let order: Vec<u64> = (0..8000).map(|at| at * 7919 % 30_011).collect();
    let read = |client: &mut Raw| {
        let began = std::time::Instant::now();
        for page in &order {
            assert_eq!(client.read_page(*page).unwrap().0, 1);
        }
        began.elapsed()
    };
    let first = read(&mut client);
    drop((client, server));
    let began = std::time::Instant::now();
    let server = start();
    assert!(server.logs("that are read first"));
    let prefetched = began.elapsed();
    let mut client = Raw::opened(&server, "region").unwrap();
    let again = read(&mut client);
    eprintln!("8000 pages: {first:?} from the file, {again:?} after {prefetched:?} of prefetching");
}
