//! Regions that are read and written at offsets.

use std::time::Duration;

use farmem_client::{ExternalAddress, Region, RegionError, StoreError, WritePolicy};
use farmem_region::{ByteCount, Nanos};
use farmem_remote::{RemoteConfig, RemoteStore};

use crate::server::{Numbers, TestServer, alone};

/// R1, caps 54, 77, 78: random accesses of any alignment against a plain array, with a cache of
/// an eighth of the region.
#[test]
fn what_was_written_is_read() {
    let server = TestServer::start(64);
    for write in [WritePolicy::WriteThrough, WritePolicy::WriteBack] {
        let mut options = server.options(8);
        options.write = write;
        let mut region = Region::create(options).unwrap();
        let mut model = vec![0u8; 8 << 20];
        let mut numbers = Numbers(3);
        for round in 0..1_500 {
            let bytes = match round % 3 {
                0 => numbers.below(100),
                1 => numbers.below(3 * 4096),
                _ => numbers.below(400_000),
            };
            let offset = numbers.below(model.len() - bytes);
            if numbers.below(2) == 0 {
                let content: Vec<u8> = (0..bytes).map(|at| (at * 7 + round) as u8).collect();
                region.write(offset as u64, &content).unwrap();
                model[offset..offset + bytes].copy_from_slice(&content);
            } else {
                let mut content = vec![0xaa; bytes];
                region.read(offset as u64, &mut content).unwrap();
                assert!(content == model[offset..offset + bytes], "round {round}");
            }
        }
        let counts = region.counts();
        assert!(counts.hits > 1_000 && counts.fetched_pages > 1_000, "{counts:?}");
        region.close().unwrap();
    }
}

/// Cap 78: written through, every page is acknowledged when the call returns; written back, only
/// a quarter of the cache ever waits, and nothing after a flush.
#[test]
fn cap_78_writes_wait_as_the_policy_says() {
    let server = TestServer::start(64);
    let mut options = server.options(8);
    let mut region = Region::create(options.clone()).unwrap();
    region.write(0, &[1; 10 * 4096]).unwrap();
    assert_eq!(region.counts().stored_pages, 10);
    options.write = WritePolicy::WriteBack;
    let mut region = Region::create(options).unwrap();
    region.write(0, &[1; 10 * 4096]).unwrap();
    assert_eq!(region.counts().stored_pages, 0);
    for page in 10..1000 {
        region.write(page * 4096, &[2; 4096]).unwrap();
        assert!(page + 1 - region.counts().stored_pages <= 64, "after page {page}");
    }
    region.flush().unwrap();
    assert_eq!(region.counts().stored_pages, 1000);
}

/// Cap 77: what is in the cache is not fetched again; a sequence is fetched ahead.
#[test]
fn cap_77_hits_cost_no_fetch_and_sequences_are_fetched_ahead() {
    let server = TestServer::start(64);
    let mut region = Region::create(server.options(8)).unwrap();
    region.write(0, &vec![5; 8 << 20]).unwrap();
    let before = region.counts();
    let mut byte = [0];
    for page in 0..512 {
        region.read(page * 4096, &mut byte).unwrap();
        assert_eq!(byte, [5]);
    }
    let after = region.counts();
    assert!(after.misses - before.misses < 40, "{after:?}");
    for page in (500..512).rev() {
        region.read(page * 4096 + 7, &mut byte).unwrap();
    }
    assert_eq!(region.counts().fetched_pages, after.fetched_pages);
}

/// A cache takes memory as it is used, not when it is made.
#[test]
fn cap_77_an_unused_cache_takes_no_memory() {
    if !alone("unmapped::cap_77_an_unused_cache_takes_no_memory") {
        return;
    }
    let server = TestServer::start(64);
    let mut options = server.options(8);
    options.cache_size = 1 << 30;
    let mut region = Region::create(options).unwrap();
    region.write(4096, &[7; 4096]).unwrap();
    let mut page = [0; 4096];
    region.read(4096, &mut page).unwrap();
    assert_eq!(page, [7; 4096]);
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kibibytes: u64 = resident.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    assert!(kibibytes < 64 << 10, "{kibibytes} KiB");
}

/// Cap 54: by external address.
#[test]
fn cap_54_external_addresses_name_the_same_bytes() {
    let server = TestServer::start(64);
    let _other = Region::create(server.options(4)).unwrap();
    let mut region = Region::create(server.options(8)).unwrap();
    let address = region.address(70_000).unwrap();
    assert_eq!(region.offset(address), Some(70_000));
    region.write_address(address, b"here").unwrap();
    let mut bytes = [0; 4];
    region.read(70_000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"here");
    assert_eq!(region.address(8 << 20), None);
    let elsewhere = ExternalAddress::from_raw(address.raw() ^ 1 << 40);
    let error = region.read_address(elsewhere, &mut bytes).unwrap_err();
    assert!(matches!(error, RegionError::NotHere { .. }), "{error}");
}

#[test]
fn accesses_outside_of_the_region_are_refused() {
    let server = TestServer::start(64);
    let mut region = Region::create(server.options(1)).unwrap();
    for (offset, bytes) in [(1 << 20, 1), ((1 << 20) - 3, 4), (u64::MAX, 2)] {
        let error = region.read(offset, &mut vec![0; bytes]).unwrap_err();
        assert!(matches!(error, RegionError::OutOfBounds { .. }), "{error}");
        assert!(region.write(offset, &vec![0; bytes]).is_err());
    }
    region.read((1 << 20) - 4, &mut [0; 4]).unwrap();
}

#[test]
fn a_region_that_does_not_fit_is_refused_or_spilled() {
    let server = TestServer::start(4);
    let mut options = server.options(16);
    let error = Region::create(options.clone()).unwrap_err();
    let asked = 16 << 20;
    assert!(
        matches!(error, RegionError::Store(StoreError::Full { asked: a, .. }) if a == asked),
        "{error}"
    );
    let directory = tempfile::tempdir().unwrap();
    options.spill = Some(directory.path().to_owned());
    let mut region = Region::create(options).unwrap();
    let content: Vec<u8> = (0..16 << 20).map(|at: u32| (at / 4096 * 3) as u8).collect();
    region.write(0, &content).unwrap();
    let mut read = vec![0; 16 << 20];
    region.read(0, &mut read).unwrap();
    assert!(read == content);
    assert!(region.address(0).is_some() && region.address(15 << 20).is_none());
}

#[test]
fn the_end_of_a_region_frees_it() {
    let server = TestServer::start(64);
    let region = Region::create(server.options(8)).unwrap();
    assert!(server.reserved() >= 8 << 20);
    region.close().unwrap();
    assert_eq!(server.reserved(), 0);
    drop(Region::create(server.options(8)).unwrap());
    assert_eq!(server.reserved(), 0);
}

/// A region that the server and the disk beside it have no room for leaves nothing reserved.
#[test]
fn a_region_that_cannot_be_made_is_freed_at_once() {
    let server = TestServer::start(64);
    let directory = tempfile::tempdir().unwrap();
    let mut options = server.options(1 << 30);
    options.spill = Some(directory.path().to_owned());
    let error = Region::create(options).unwrap_err();
    assert!(matches!(error, RegionError::Store(StoreError::DiskFull { .. })), "{error}");
    assert_eq!(server.reserved(), 0);
}

/// A server that is gone is an error in every call from then on, never wrong bytes.
#[test]
fn a_lost_server_is_told_by_every_call() {
    let mut server = TestServer::start(64);
    let mut region = Region::create(server.options(8)).unwrap();
    region.write(0, &vec![1; 4 << 20]).unwrap();
    server.stop();
    let mut bytes = [0; 4096];
    for _ in 0..2 {
        let error = region.read(0, &mut bytes).unwrap_err();
        assert!(matches!(error, RegionError::Store(StoreError::Lost { .. })), "{error}");
    }
    assert!(region.write(4096, &bytes).is_err());
    // Also those that would find what they want in the cache.
    assert!(region.read((4 << 20) - 4096, &mut bytes).is_err());
    assert!(region.flush().is_err());
}

/// Cap 95: a region of which nothing is asked goes on with a server that is started again, and is not freed
/// like a session without a connection.
#[test]
fn cap_95_an_idle_region_outlives_a_server_that_is_started_again() {
    let data = tempfile::tempdir().unwrap();
    let mut server = TestServer::start_with(64, |config| {
        config.data = Some(data.path().join("data"));
        config.limits.session_timeout = Duration::from_secs(1);
    });
    let mut region = Region::create(server.options(8)).unwrap();
    let content: Vec<u8> = (0..8 << 20).map(|at: u32| (at / 4096 * 3 + at % 7) as u8).collect();
    region.write(0, &content).unwrap();
    let kept = server.reserved();
    let config = RemoteConfig::new(server.options(1).server, "idle", ByteCount::new(1 << 20));
    let (_unkept, _) = RemoteStore::connect(config, Nanos::new(0)).unwrap();
    assert!(server.reserved() > kept);
    for _ in 0..2 {
        server.restart();
        while server.reserved() > kept {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let mut found = vec![0; content.len()];
    region.read(0, &mut found).unwrap();
    assert!(found == content);
}
