//! How fast pages move between tiers, beside the bare compressor on the same pages: measured by
//! `cargo xtask bench server`.

use std::time::Duration;

use farmem_region::{ByteCount, PAGE_SIZE, PageCount, PageIndex, PageRange, Version};
use farmem_wire::{Action, Create, Header, Open, RangeEntry, Source};

use super::{Bring, Engine};
use crate::config::{ServerConfig, TierConfig};
use crate::region::Region;
use crate::table::Portion;
use crate::tiers::Place;

/// Set for a measurement; otherwise it is only seen that all pages move.
const MEASURE: &str = "FARMEM_MEASURE_TIERS";
/// Pages that are moved each time when measured: 128 MiB, more than processors keep in their caches.
const PAGES: u64 = 32 << 10;
/// Pages otherwise.
const PAGES_UNMEASURED: u64 = 2 << 10;
const ROUNDS: usize = 5;

/// Text-like content that compresses to a third or so.
fn content(page: u64) -> [u8; PAGE_SIZE] {
    let mut word = page.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut content = [0; PAGE_SIZE];
    for chunk in content.chunks_mut(8) {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        let known = [b"the page", b" memory ", b"\0\0\0\0\0\0\0\0", b" server "];
        match word % 5 {
            4 => chunk.copy_from_slice(&word.to_le_bytes()),
            at => chunk.copy_from_slice(known[at as usize]),
        }
    }
    content
}

fn engine(pages: u64) -> Engine {
    let memory = PageCount::new(2 * pages).bytes();
    let mut config = ServerConfig::new(Vec::new(), memory);
    config.tiers = TierConfig { compressed: memory, file: None };
    Engine::new(config).unwrap()
}

/// An engine with a region whose pages are all in dram, and a caller of it.
fn filled(engine: &Engine, pages: u64) -> (super::Caller, Header) {
    let size = PageCount::new(pages).bytes();
    let source = Source::Fill(0);
    let create = Create { name: "speed", size, page_bytes: 4096, source, prefers: None };
    engine.create(&create).unwrap();
    let mut caller = engine.caller();
    caller.may_wait = true;
    let (session, _) = engine.open(&mut caller, &Open { take_over: true, name: "speed" }).unwrap();
    let header = Header { action: Action::Prefetch, ..session };
    let mut session = engine.enter(&caller, &header).unwrap();
    for page in (0..pages).map(PageIndex::new) {
        let mut slots = Vec::new();
        assert!(engine.arena.take(1, &mut slots));
        let mut slot = slots.pop().unwrap();
        *engine.arena.bytes_mut(&mut slot) = content(page.get());
        let version = Version::new(1);
        let checksum = Region::neutral(page, version, engine.arena.bytes(&slot));
        let place = Place::Dram(slot);
        let portion =
            Portion { place, dirty: 0, heat: 0, absent: 0, generation: 0, version, checksum };
        assert!(session.region.table.put(&engine.tiers, page, &portion).is_none());
    }
    drop(session);
    (caller, header)
}

/// What this thread has used: others of the machine do not count.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec as u32)
}

/// Compresses and decompresses all pages as they lie in memory, with nothing around it.
fn bare(pages: u64) -> (Duration, Duration) {
    let pages: Vec<[u8; PAGE_SIZE]> = (0..pages).map(content).collect();
    let most = lz4_flex::block::get_maximum_output_size(PAGE_SIZE);
    let (mut packed, mut ends) = (vec![1; pages.len() * most], Vec::new());
    let began = processor_time();
    for (page, room) in pages.iter().zip(packed.chunks_mut(most)) {
        ends.push(lz4_flex::block::compress_into(page, room).unwrap());
    }
    let compressing = processor_time() - began;
    let mut out = pages;
    let began = processor_time();
    for ((page, room), end) in out.iter_mut().zip(packed.chunks(most)).zip(&ends) {
        lz4_flex::block::decompress_into(&room[..*end], page).unwrap();
    }
    (compressing, processor_time() - began)
}

#[test]
fn all_pages_leave_dram_and_come_back_measured_beside_the_bare_compressor() {
    let is_measured = std::env::var_os(MEASURE).is_some();
    let (pages, rounds) = if is_measured { (PAGES, ROUNDS) } else { (PAGES_UNMEASURED, 1) };
    let mut shares = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        let (compressing, decompressing) = bare(pages);
        let engine = engine(pages);
        let (caller, header) = filled(&engine, pages);
        let began = processor_time();
        assert_eq!(engine.demote(pages as usize) as u64, pages);
        let demoting = processor_time() - began;
        let all = PageRange { start: PageIndex::new(0), count: PageCount::new(pages) };
        let began = processor_time();
        let (mut start, mut brought) = (all.start, 0);
        while start.get() < pages {
            let count = PageCount::new(pages - start.get());
            let ranges = std::iter::once(RangeEntry(PageRange { start, count }));
            let done = engine.bring(&caller, &header, ranges, Bring::Prefetch).unwrap();
            brought += done.changed.get();
            start = done.next.map_or(PageIndex::new(pages), |(_, page)| page);
        }
        let promoting = processor_time() - began;
        assert_eq!(brought, pages);
        let rate =
            |time: Duration| ByteCount::new(pages << 12).get() as f64 / time.as_secs_f64() / 1e9;
        eprintln!(
            "demotion {:.2} GB/s, bare {:.2}; promotion {:.2} GB/s, bare {:.2}",
            rate(demoting),
            rate(compressing),
            rate(promoting),
            rate(decompressing)
        );
        shares[0].push(rate(demoting) / rate(compressing));
        shares[1].push(rate(promoting) / rate(decompressing));
    }
    for (what, mut shares) in ["demotion", "promotion"].into_iter().zip(shares) {
        shares.sort_by(f64::total_cmp);
        let share = shares[rounds / 2];
        eprintln!("{what}: {share:.2} of the bare compressor");
    }
}
