//! Regions that are mapped. These tests need userfaultfd; without it they say so and count as
//! skipped.

use farmem_client::{Region, RegionError, WritePolicy};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::server::{Numbers, TestServer, alone};

/// Runs a test, or says why it cannot be run here. In CI that is a failure.
fn check_or_skip(test: impl FnOnce()) {
    if may_page() {
        test();
    }
}

/// Whether this process may page memory; says why not.
pub(crate) fn may_page() -> bool {
    match farmem_vmem::Uffd::new(farmem_vmem::Features::Events) {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "not possible in CI: {error}");
            eprintln!("skipped: {error}");
            false
        }
    }
}

/// R1, cap 23: a mapping four times as large as its local memory keeps what is stored in it.
#[test]
fn cap_23_a_mapping_is_memory() {
    check_or_skip(|| {
        let server = TestServer::start(64);
        let mut options = server.options(32);
        options.cache_size = 8 << 20;
        let mut mapped = Region::create(options).unwrap().map().unwrap();
        let bytes = mapped.as_mut_slice();
        let mut model = vec![0u64; bytes.len() / 4096];
        let mut numbers = Numbers(5);
        for round in 1..60_000u64 {
            let page = numbers.below(model.len());
            let at = page * 4096 + page % 500 * 8;
            let word: &mut [u8; 8] = (&mut bytes[at..at + 8]).try_into().unwrap();
            assert_eq!(u64::from_le_bytes(*word), model[page], "page {page} in round {round}");
            if numbers.below(3) == 0 {
                *word = round.to_le_bytes();
                model[page] = round;
            }
        }
    });
}

/// Contents written before, during and after a mapping are the same contents.
#[test]
fn mapped_and_unmapped_access_see_the_same_contents() {
    check_or_skip(|| {
        let server = TestServer::start(64);
        let mut options = server.options(16);
        options.cache_size = 4 << 20;
        options.write = WritePolicy::WriteBack;
        let mut region = Region::create(options).unwrap();
        let mut model = vec![0u8; 16 << 20];
        let mut numbers = Numbers(11);
        for round in 0..4u8 {
            for _ in 0..200 {
                let (offset, bytes) = (numbers.below(15 << 20), numbers.below(20_000));
                region.write(offset as u64, &vec![round * 2 + 1; bytes]).unwrap();
                model[offset..offset + bytes].fill(round * 2 + 1);
            }
            let mut mapped = region.map().unwrap();
            assert!(mapped.as_slice() == model, "round {round}");
            for _ in 0..200 {
                let (offset, bytes) = (numbers.below(15 << 20), numbers.below(20_000));
                mapped.as_mut_slice()[offset..offset + bytes].fill(round * 2 + 2);
                model[offset..offset + bytes].fill(round * 2 + 2);
            }
            // Pages that become zero again are forgotten by the server.
            let zeros = numbers.below(10 << 20);
            mapped.as_mut_slice()[zeros..zeros + (1 << 20)].fill(0);
            model[zeros..zeros + (1 << 20)].fill(0);
            region = mapped.unmap().unwrap();
            let mut read = vec![0xee; 16 << 20];
            region.read(0, &mut read).unwrap();
            assert!(read == model, "round {round}");
        }
    });
}

/// A flush returns, again and again, while the mapping is in use, and loses nothing.
#[test]
fn flushes_return_and_lose_nothing() {
    check_or_skip(|| {
        let server = TestServer::start(64);
        let mut options = server.options(8);
        options.cache_size = 4 << 20;
        let mut mapped = Region::create(options).unwrap().map().unwrap();
        for round in 1..20u8 {
            for page in mapped.as_mut_slice().chunks_mut(4096).step_by(usize::from(round)) {
                page[usize::from(round)] = round;
            }
            mapped.flush().unwrap();
            let first = &mapped.as_slice()[..4096];
            assert!((1..=round).all(|at| first[usize::from(at)] == at));
        }
    });
}

/// The end of a mapping ends its session.
#[test]
fn the_end_of_a_mapping_frees_the_region() {
    check_or_skip(|| {
        let server = TestServer::start(64);
        let mut mapped = Region::create(server.options(8)).unwrap().map().unwrap();
        mapped.as_mut_slice().fill(3);
        assert!(server.reserved() > 0);
        drop(mapped);
        assert_eq!(server.reserved(), 0);
    });
}

/// R1: answers to a mapping's read-ahead that come after its end do not reach the cache.
#[test]
fn what_a_mapping_reads_ahead_does_not_reach_the_cache_after_its_end() {
    check_or_skip(|| {
        let server = TestServer::start(64);
        let mut options = server.options(16);
        options.cache_size = 2 << 20;
        options.readahead_pages = 256;
        options.write = WritePolicy::WriteBack;
        let mut region = Region::create(options).unwrap();
        let content: Vec<u8> = (0..16 << 20).map(|at: u32| (at / 4096 % 250) as u8 + 1).collect();
        region.write(0, &content).unwrap();
        let mut numbers = Numbers(3);
        for round in 0..40 {
            let mapped = region.map().unwrap();
            let start = numbers.below(3000) * 4096;
            let pages = 8 + numbers.below(300);
            let all = mapped.as_slice()[start..].chunks(4096).take(pages);
            assert!(all.clone().all(|page| page[0] == page[4095]), "round {round}");
            region = mapped.unmap().unwrap();
            let mut found = vec![0; 1 << 20];
            let offset = numbers.below(15 << 20);
            region.read(offset as u64, &mut found).unwrap();
            assert!(found == content[offset..offset + (1 << 20)], "round {round}");
        }
    });
}

/// Callers of a flush that come at the same time wait for each other.
#[test]
fn two_flushes_at_a_time_both_return() {
    check_or_skip(|| {
        let server = TestServer::start(64);
        let mut options = server.options(16);
        options.cache_size = 4 << 20;
        let mut mapped = Region::create(options).unwrap().map().unwrap();
        mapped.as_mut_slice().fill(7);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..5 {
                        mapped.flush().unwrap();
                    }
                });
            }
        });
    });
}

/// R1: the first pages of a mapping may lie beside a thread's stack, whose end is not moved out in programs
/// that are paged as a whole. It was taken for flushed in a region.
#[test]
fn what_lies_beside_a_stack_is_flushed() {
    check_or_skip(|| {
        let server = TestServer::start(64);
        for round in 1..=10 {
            let mut mapped = Region::create(server.options(8)).unwrap().map().unwrap();
            let last = mapped.as_slice().len() - 1;
            (mapped.as_mut_slice()[0], mapped.as_mut_slice()[last]) = (round, round + 100);
            mapped.flush().unwrap();
            assert_eq!((mapped.as_slice()[0], mapped.as_slice()[last]), (round, round + 100));
            let mut region = mapped.unmap().unwrap();
            for (offset, expected) in [(0, round), (last, round + 100)] {
                let mut byte = [0];
                region.read(offset as u64, &mut byte).unwrap();
                assert_eq!(byte, [expected], "at {offset}");
            }
        }
    });
}

/// A region that cannot be mapped, for whatever descriptor or address there is none left, is read and written at
/// offsets as before; and can be mapped once there are.
#[test]
fn a_region_that_cannot_be_mapped_goes_on_at_offsets() {
    if !may_page() || !alone("mapped::a_region_that_cannot_be_mapped_goes_on_at_offsets") {
        return;
    }
    let server = TestServer::start(64);
    let mut region = Region::create(server.options(8)).unwrap();
    let mut content: Vec<u8> = (0..8 << 20).map(|at: u32| (at / 4096 * 3 + at % 7) as u8).collect();
    region.write(0, &content).unwrap();
    let mut found = vec![0; content.len()];
    let mut check = |region: &mut Region, content: &[u8]| {
        found.fill(0xee);
        region.read(0, &mut found).unwrap();
        assert!(found == content);
    };
    let limited = |resource, most, region: Region| {
        let before = getrlimit(resource);
        setrlimit(resource, Rlimit { current: Some(most), maximum: before.maximum }).unwrap();
        let mapped = region.map();
        setrlimit(resource, before).unwrap();
        mapped
    };
    let refused = limited(Resource::As, 1 << 20, region).unwrap_err();
    assert!(matches!(refused.error, RegionError::Map { .. }), "{refused}");
    region = *refused.region;
    let mut refusals = 0;
    let mapped = loop {
        check(&mut region, &content);
        content[refusals * 100_000] ^= 0xff;
        region.write(refusals as u64 * 100_000, &content[refusals * 100_000..][..1]).unwrap();
        match limited(Resource::Nofile, refusals as u64, region) {
            Ok(mapped) => break mapped,
            Err(refused) => region = *refused.region,
        }
        refusals += 1;
    };
    assert!(refusals > 10, "{refusals}");
    assert!(mapped.as_slice() == content);
    check(&mut mapped.unmap().unwrap(), &content);
}
