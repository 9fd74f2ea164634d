//! A program that locks its memory locks the pager's scratch area with it.

use crate::MIB;
use crate::harness::{Harness, Words, check_or_skip, fork_idle};

/// Traps U22, U35: mlockall touches every hole of the scratch area, and locked memory is not given
/// back by MADV_DONTNEED. What such a frame held must not come back as another page.
#[test]
fn u22_u35_what_was_stored_comes_back_under_mlockall() {
    check_or_skip(|| {
        let harness = Harness::new(32 * MIB, 8 * MIB);
        let words = Words::new(harness.range());
        for page in 0..words.pages() {
            words.store(page, page as u64 + 1);
        }
        // SAFETY: locks memory, which changes no content.
        let locked = unsafe { libc::mlockall(libc::MCL_CURRENT) };
        if locked != 0 {
            eprintln!("skipped: this process may not lock its memory");
            return;
        }
        for round in 0..4u64 {
            for page in 0..words.pages() {
                assert_eq!(words.load(page), page as u64 + 1 + round, "page {page}");
                words.store(page, page as u64 + 2 + round);
            }
        }
        let local = pages_here(&harness);
        assert!(local << 12 <= 12 * MIB, "{local} pages are held locally");
        // SAFETY: as above.
        unsafe { libc::munlockall() };
        for page in 0..words.pages() {
            assert_eq!(words.load(page), page as u64 + 5, "page {page}");
            words.store(page, page as u64 + 6);
        }
        let local = pages_here(&harness);
        assert!(local << 12 <= 12 * MIB, "{local} pages are held after munlockall");
        assert!(harness.finish().evicted_pages > 10_000);
    });
}

fn pages_here(harness: &Harness) -> usize {
    let mut pages = 0;
    let pagemap = farmem_vmem::Pagemap::open().expect("/proc is mounted");
    pagemap.present(harness.range(), &mut |run| pages += run.range.pages());
    pages
}

/// Trap U37: a page that the kernel may take back, that could not be moved out as a child shared it,
/// reads as zero if the kernel then takes it back, or as it was. Which of the two, and whether the
/// pager came by while the child lived, depends on the kernel's lists of pages: it is tried a few
/// times.
#[test]
fn u37_a_freed_page_that_was_busy_reads_as_zero() {
    check_or_skip(|| {
        let mut taken_back = 0;
        for _ in 0..4 {
            taken_back += usize::from(a_freed_page_that_was_busy_is_taken_back());
        }
        eprintln!("{taken_back} of 4 pages were taken back");
    });
}

fn a_freed_page_that_was_busy_is_taken_back() -> bool {
    let harness = Harness::new(16 * MIB, 4 * MIB);
    let words = Words::new(harness.range());
    // The kernel takes MADV_FREE for a page only once it is on its list of pages, onto which it puts
    // them by the batch.
    (0..128).for_each(|page| words.store(page, 7));
    words.advise(0, rustix::mm::Advice::LinuxFree);
    let (child, writer) = fork_idle();
    // Until the removal is over, and the pager has found the page busy.
    for round in 1..20 {
        (1..words.pages()).for_each(|page| words.store(page, round));
    }
    drop(writer);
    assert!(child.succeeded());
    let until = std::time::Instant::now() + std::time::Duration::from_millis(500);
    while words.is_here(0) && std::time::Instant::now() < until {
        words.advise(0, rustix::mm::Advice::LinuxPageOut);
    }
    let found = words.load(0);
    assert!(found == 0 || found == 7, "found {found}");
    assert!(harness.finish().evicted_pages > 0);
    found == 0
}
