//! The pager on the real kernel: a thread pages a range of this process against a store in memory
//! while other threads use the range.
//!
//! These tests need userfaultfd with fork events (root, or CAP_SYS_PTRACE); without it they say so
//! and count as skipped.

#![expect(unsafe_code, reason = "the tests map and touch raw memory as a program does")]

mod forks;
mod harness;
mod locked;

use harness::{Harness, Words, check_or_skip};

pub(crate) const MIB: usize = 1 << 20;

/// R1: random reads and writes of four times the limit return what was stored last.
#[test]
fn what_was_stored_comes_back() {
    check_or_skip(|| {
        let harness = Harness::new(64 * MIB, 16 * MIB);
        let words = Words::new(harness.range());
        let mut model = vec![0u64; words.pages()];
        let mut state = 1u64;
        for round in 1..400_000u64 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let page = (state >> 33) as usize % words.pages();
            assert_eq!(words.load(page), model[page], "page {page} in round {round}");
            if state >> 20 & 3 == 0 {
                words.store(page, round);
                model[page] = round;
            }
        }
        let counts = harness.finish();
        assert!(counts.evicted_pages > 10_000, "{counts:?}");
        assert!(counts.fetched_pages > 10_000, "{counts:?}");
        assert!(counts.local_pages_peak <= ((18 * MIB) >> 12) as u64, "{counts:?}");
    });
}

/// Sequential passes are read ahead, and the pages that were not written are not sent again.
#[test]
fn sequences_are_read_ahead_and_clean_pages_not_sent() {
    check_or_skip(|| {
        let harness = Harness::new(64 * MIB, 16 * MIB);
        let words = Words::new(harness.range());
        for page in 0..words.pages() {
            words.store(page, page as u64 + 1);
        }
        for _ in 0..5 {
            for page in 0..words.pages() {
                assert_eq!(words.load(page), page as u64 + 1);
            }
        }
        let counts = harness.finish();
        assert!(counts.readahead_pages > 40_000, "{counts:?}");
        assert!(counts.faults < 40_000, "{counts:?}");
        assert!(counts.written_pages < 20_000, "{counts:?}");
        assert!(counts.clean_drops > 40_000, "{counts:?}");
    });
}

/// Cap 34, trap U11: increments are not lost while pages are moved out on another processor.
#[test]
fn cap_34_no_increment_is_lost_on_two_processors() {
    check_or_skip(|| {
        let harness = Harness::new(32 * MIB, 8 * MIB);
        let words = Words::new(harness.range());
        let threads = 2;
        let rounds = 12;
        std::thread::scope(|scope| {
            for thread in 0..threads {
                scope.spawn(move || {
                    for _ in 0..rounds {
                        for page in (thread..words.pages()).step_by(threads) {
                            for _ in 0..20 {
                                words.store(page, words.load(page) + 1);
                            }
                        }
                    }
                });
            }
        });
        for page in 0..words.pages() {
            assert_eq!(words.load(page), rounds * 20, "page {page}");
        }
        assert!(harness.finish().evicted_pages > 10_000);
    });
}

/// Traps U6, U7: after MADV_DONTNEED a page reads as zero, also if it was out; four threads.
#[test]
fn u6_u7_dropped_pages_read_as_zero() {
    check_or_skip(|| {
        let harness = Harness::new(64 * MIB, 12 * MIB);
        let words = Words::new(harness.range());
        let threads = 4;
        std::thread::scope(|scope| {
            for thread in 0..threads {
                scope.spawn(move || {
                    let part = words.part(thread, threads);
                    let mut state = thread as u64 + 1;
                    let mut model = vec![0u64; part.pages()];
                    for round in 1..30_000u64 {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let page = (state >> 33) as usize % part.pages();
                        if state >> 20 & 15 == 0 {
                            let count = (1 + (state >> 50) as usize % 40).min(part.pages() - page);
                            part.drop_pages(page, count);
                            model[page..page + count].fill(0);
                        }
                        assert_eq!(part.load(page), model[page], "page {page} in round {round}");
                        part.store(page, round);
                        model[page] = round;
                    }
                });
            }
        });
        assert!(harness.finish().evicted_pages > 1_000);
    });
}

/// Trap U5: contents follow mremap, also what is out.
#[test]
fn u5_contents_follow_mremap() {
    check_or_skip(|| {
        let harness = Harness::new(32 * MIB, 8 * MIB);
        let words = Words::new(harness.range());
        for page in 0..words.pages() {
            words.store(page, page as u64 + 7);
        }
        let mut moved = words;
        for _ in 0..20 {
            moved = moved.remap();
            for page in (0..moved.pages()).step_by(3) {
                assert_eq!(moved.load(page), page as u64 + 7, "page {page}");
            }
        }
        let counts = harness.finish();
        assert!(counts.evicted_pages > 10_000 && counts.events >= 20, "{counts:?}");
    });
}

/// Trap U3, cap 21: parent and forked child go on independently with what was out.
#[test]
fn u3_a_forked_child_has_what_the_parent_had() {
    check_or_skip(|| {
        let harness = Harness::new(16 * MIB, 4 * MIB);
        let words = Words::new(harness.range());
        for page in 0..words.pages() {
            words.store(page, page as u64 + 1);
        }
        for round in 0..10u64 {
            let child = harness::fork(|| {
                (0..words.pages()).all(|page| words.load(page) == page as u64 + 1 + round)
            });
            for page in 0..words.pages() {
                words.store(page, page as u64 + 2 + round);
            }
            assert!(child.succeeded(), "round {round}");
        }
        let counts = harness.finish();
        assert!(counts.forks == 10 && counts.evicted_pages > 10_000, "{counts:?}");
    });
}

/// Trap U16 and kernel-mode faults: read(2) and write(2) on pages that are out.
#[test]
fn system_calls_reach_pages_that_are_out() {
    check_or_skip(|| {
        let harness = Harness::new(16 * MIB, 4 * MIB);
        let words = Words::new(harness.range());
        for round in 0..4u64 {
            for page in 0..words.pages() {
                words.write_through_pipe(page, page as u64 ^ round);
            }
            for page in 0..words.pages() {
                assert_eq!(words.read_through_pipe(page), page as u64 ^ round, "page {page}");
            }
        }
        assert!(harness.finish().evicted_pages > 10_000);
    });
}
