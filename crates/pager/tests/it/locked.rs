//! A program that locks its memory locks the pager's scratch area with it.

use crate::MIB;
use crate::harness::{Harness, Words, check_or_skip};

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
        let mut local = 0;
        let pagemap = farmem_vmem::Pagemap::open().expect("/proc is mounted");
        pagemap.present(harness.range(), &mut |run| local += run.range.pages());
        // SAFETY: as above.
        unsafe { libc::munlockall() };
        assert!(local << 12 <= 12 * MIB, "{local} pages are held locally");
        assert!(harness.finish().evicted_pages > 10_000);
    });
}
