//! A fork beside other threads that change mappings.

use std::sync::atomic::{AtomicU64, Ordering};

use farmem_vmem::{AddressRange, Event, Features, Uffd};

use crate::MIB;
use crate::harness::{Harness, Words, check_or_skip, fork, fork_idle};

/// What the other thread is about, in memory that is not paged: all pages hold their stamps, are
/// being dropped, or are gone. Odd rounds drop, even ones move.
static PHASE: AtomicU64 = AtomicU64::new(0);
const STAMPED: u64 = 1;
const CHANGING: u64 = 2;
const GONE: u64 = 3;

/// Traps U3, U32: a child has the memory of the instant of its fork, whatever another thread drops
/// or moves while the fork is reported.
#[test]
fn u32_a_fork_beside_changes_is_one_instant() {
    check_or_skip(|| {
        let harness = Harness::new(8 * MIB, 2 * MIB);
        let mut words = Words::new(harness.range());
        let mut checked = 0;
        for round in 0..24 {
            for page in 0..words.pages() {
                words.store(page, page as u64 + 1);
            }
            PHASE.store(STAMPED, Ordering::SeqCst);
            let old = words;
            let mover = std::thread::spawn(move || change(old, round));
            // Neither before nor after, but about the same time.
            for _ in 0..round * 100 {
                std::hint::spin_loop();
            }
            let child = fork(|| match PHASE.load(Ordering::SeqCst) {
                STAMPED => (0..old.pages()).rev().all(|page| old.load(page) == page as u64 + 1),
                GONE if round % 2 == 1 => (0..old.pages()).all(|page| old.load(page) == 0),
                _ => true,
            });
            assert!(child.succeeded(), "round {round}");
            words = mover.join().expect("memory changes");
            checked += 1;
        }
        let counts = harness.finish();
        assert!(counts.forks == checked && counts.evicted_pages > 5_000, "{counts:?}");
    });
}

fn change(words: Words, round: u64) -> Words {
    PHASE.store(CHANGING, Ordering::SeqCst);
    let words = if round % 2 == 1 {
        words.drop_pages(0, words.pages());
        words
    } else {
        words.remap()
    };
    PHASE.store(GONE, Ordering::SeqCst);
    words
}

/// Trap U13, cap 33: pages that a child shares, or has shared, are moved out all the same.
#[test]
fn u13_the_limit_holds_beside_children_that_share_everything() {
    check_or_skip(|| {
        let harness = Harness::new(64 * MIB, 16 * MIB);
        let words = Words::new(harness.range());
        (0..words.pages()).for_each(|page| words.store(page, page as u64));
        for round in 0..3 {
            let (child, writer) = fork_idle();
            for page in 0..words.pages() {
                assert_eq!(words.load(page), page as u64 + round, "page {page}");
            }
            // The second half when the child has ended, while what it has shared still is so.
            let half = words.pages() / 2;
            (0..half).for_each(|page| words.store(page, page as u64 + round + 1));
            drop(writer);
            assert!(child.succeeded());
            (half..words.pages()).for_each(|page| words.store(page, page as u64 + round + 1));
        }
        let counts = harness.finish();
        assert!(counts.forks == 3 && counts.unshared_windows >= 3 * 8, "{counts:?}");
        assert!(counts.local_pages_peak <= ((18 * MIB) >> 12) as u64, "{counts:?}");
    });
}

/// A child's own pager finds out by this which of its parent's children it is.
#[test]
fn a_userfaultfd_knows_whose_memory_it_is_of() {
    check_or_skip(|| {
        let uffd = Uffd::new(Features::Events).expect("userfaultfd works");
        assert!(uffd.is_own());
        let page = std::alloc::Layout::from_size_align(1 << 12, 1 << 12).expect("a page");
        // SAFETY: a page of its own, never freed.
        let page = unsafe { std::alloc::alloc(page) } as usize;
        uffd.register(AddressRange::pages_from(page, 1)).expect("a heap can be registered");
        let reader = std::thread::spawn(move || {
            let mut events = Vec::new();
            while events.is_empty() {
                uffd.read_events(&mut events).expect("events can be read");
            }
            let child = events.into_iter().find_map(|event| match event {
                Event::Fork(child) => Some(child),
                _ => None,
            });
            child.is_some_and(|child| !child.is_own() && uffd.is_own())
        });
        assert!(fork(|| true).succeeded());
        assert!(reader.join().expect("the reader ends"));
    });
}
