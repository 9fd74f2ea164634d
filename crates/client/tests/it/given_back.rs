//! What a program gives back of a mapping, with `madvise`.
#![expect(unsafe_code, reason = "madvise")]

use std::ops::Range;

use farmem_client::{MappedRegion, Region};
use farmem_region::{PageCount, PageIndex, PageRange};
use farmem_remote::named::{NamedRegion, RangeAction};

use crate::mapped::may_page;
use crate::named::{SIZE, TIMEOUT, of_file};

const PAGE: usize = 4096;

fn give_back(mapped: &mut MappedRegion, pages: Range<usize>) {
    let bytes = &mut mapped.as_mut_slice()[pages.start * PAGE..pages.end * PAGE];
    // SAFETY: the memory is this slice's, and zeros are bytes.
    let given =
        unsafe { libc::madvise(bytes.as_mut_ptr().cast(), bytes.len(), libc::MADV_DONTNEED) };
    assert_eq!(given, 0, "{}", std::io::Error::last_os_error());
}

/// Cap 8: single pages too where the region's are larger, and of an aligned range those that are stored.
#[test]
fn cap_8_what_a_mapping_gives_back_is_as_the_file_has_it() {
    if !may_page() {
        return;
    }
    for page_bytes in [4096, 64 << 10, 2 << 20] {
        let (_server, _directory, _path, mut content, options) = of_file(page_bytes);
        let mut mapped = Region::open("file", options.clone()).unwrap().map().unwrap();
        let given = [5, 512, 513, 700, 1023];
        for page in given.into_iter().chain([4, 6, 511, 1024]) {
            mapped.as_mut_slice()[page * PAGE..(page + 1) * PAGE].fill(0xee);
        }
        mapped.flush().unwrap();
        give_back(&mut mapped, 5..6);
        give_back(&mut mapped, 512..1024);
        mapped.flush().unwrap();
        drop(mapped.unmap().unwrap());
        for page in [4, 6, 511, 1024] {
            content[page * PAGE..(page + 1) * PAGE].fill(0xee);
        }
        let mut region = Region::open("file", options).unwrap();
        let mut found = vec![0; content.len()];
        region.read(0, &mut found).unwrap();
        assert!(found == content, "{page_bytes}");
    }
}

/// Cap 11: what a program drops it has dropped, whoever keeps it in the server's memory.
#[test]
fn cap_11_a_mapping_gives_back_what_another_client_has_pinned() {
    if !may_page() {
        return;
    }
    let (_server, _directory, _path, mut content, options) = of_file(4096);
    let mut other = NamedRegion::open(&options.server, "file", false, TIMEOUT).unwrap();
    let mut mapped = Region::open("file", options.clone()).unwrap().map().unwrap();
    mapped.as_mut_slice()[..8 * PAGE].fill(0xee);
    mapped.flush().unwrap();
    let all = PageRange { start: PageIndex::new(0), count: PageCount::new(SIZE / PAGE as u64) };
    other.over(RangeAction::Pin, all).unwrap();
    give_back(&mut mapped, 3..5);
    assert!(mapped.as_slice()[2 * PAGE..3 * PAGE].iter().all(|byte| *byte == 0xee));
    drop(mapped.unmap().unwrap());
    content[..3 * PAGE].fill(0xee);
    content[5 * PAGE..8 * PAGE].fill(0xee);
    let mut region = Region::open("file", options).unwrap();
    let mut found = vec![0; content.len()];
    region.read(0, &mut found).unwrap();
    assert!(found == content);
    assert_eq!(other.show().unwrap().pinned, all.count, "they stay pinned");
}
