//! Which pages of a range are there: the PAGEMAP_SCAN call (Linux 6.7, see
//! Documentation/admin-guide/mm/pagemap.rst). A page that the kernel has swapped out, or that it
//! is migrating, is there too: touching it is no fault for userfaultfd, and UFFDIO_MOVE moves it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use farmem_region::PAGE_SIZE;
use linux_raw_sys::general as sys;

use crate::AddressRange;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u32 = 0xC060_6610;
const _: () = assert!(size_of::<sys::pm_scan_arg>() == 0x60);
const PAGE_IS_PRESENT: u64 = 1 << 3;
/// In swap, or on its way to another place in memory: it has content all the same.
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// Linux 6.15; older kernels refuse the bit. To them a guard looks like a page in swap.
const PAGE_IS_GUARD: u64 = 1 << 8;
/// Runs taken by one call; more need further calls.
const RUNS_PER_CALL: usize = 128;

/// Neighbouring pages that are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PresentRun {
    /// Where.
    pub range: AddressRange,
    /// What they are.
    pub kind: PageKind,
}

/// What is at a place where something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageKind {
    /// Memory of its own.
    Page,
    /// The kernel's shared zero page, which costs no memory.
    Zero,
    /// No page, and none may come there: the program has set a guard (MADV_GUARD_INSTALL, see
    /// madvise(2)), of which userfaultfd says nothing.
    Guard,
}

impl PresentRun {
    /// Pages that take memory.
    #[must_use]
    pub const fn pages_with_memory(&self) -> usize {
        match self.kind {
            PageKind::Page => self.range.pages(),
            PageKind::Zero | PageKind::Guard => 0,
        }
    }
}

/// /proc/self/pagemap, opened once.
#[derive(Debug)]
pub struct Pagemap {
    file: OwnedFd,
    /// `PAGE_IS_GUARD` where the kernel knows it, or nothing.
    guard: u64,
}

impl Pagemap {
    /// Opens the pagemap of the calling process's address space.
    ///
    /// # Errors
    /// If /proc is not mounted or not readable.
    pub fn open() -> io::Result<Self> {
        use rustix::fs::{Mode, OFlags};
        let file = rustix::fs::open(
            "/proc/self/pagemap",
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let mut pagemap = Self { file, guard: PAGE_IS_GUARD };
        let nothing = AddressRange::new(0, 0);
        if pagemap.scan(nothing, &mut [NO_RUN; 1], 0, Guards::Reported).is_none() {
            pagemap.guard = 0;
        }
        Ok(pagemap)
    }

    /// Calls `each` for the runs of present pages and of guards in `range`, in the order of
    /// addresses. A range that is not mapped has none.
    pub fn present(&self, range: AddressRange, each: &mut dyn FnMut(PresentRun)) {
        let mut runs = [NO_RUN; RUNS_PER_CALL];
        let mut at = range.start();
        while at < range.end() {
            let rest = AddressRange::new(at, range.end());
            let Some((count, walked)) = self.scan(rest, &mut runs, 0, Guards::Reported) else {
                return;
            };
            for run in &runs[..count] {
                let kind = match run.categories {
                    is if is & PAGE_IS_GUARD != 0 => PageKind::Guard,
                    is if is & PAGE_IS_PFNZERO != 0 => PageKind::Zero,
                    _ => PageKind::Page,
                };
                each(PresentRun { range: range_of(run), kind });
            }
            if walked <= at {
                return;
            }
            at = walked;
        }
    }

    /// The first present page of a range.
    #[must_use]
    pub fn first_present(&self, range: AddressRange) -> Option<usize> {
        self.first(range, Guards::PassedOver)
    }

    /// The first place of a range where a page or a guard is.
    #[must_use]
    pub fn first_taken(&self, range: AddressRange) -> Option<usize> {
        self.first(range, Guards::Reported)
    }

    /// The start of a range up to the first place, after its first page, where a page or a guard is.
    #[must_use]
    pub fn up_to_taken(&self, range: AddressRange) -> AddressRange {
        let rest = AddressRange::new(range.start() + PAGE_SIZE, range.end());
        let end = if rest.pages() == 0 { None } else { self.first_taken(rest) };
        AddressRange::new(range.start(), end.unwrap_or(range.end()))
    }

    fn first(&self, range: AddressRange, guards: Guards) -> Option<usize> {
        let mut runs = [NO_RUN; 1];
        let (count, _) = self.scan(range, &mut runs, 1, guards)?;
        (count == 1).then(|| range_of(&runs[0]).start())
    }

    /// One call: the number of runs found and the address up to which was looked. At most
    /// `pages_max` pages are reported, any number if that is 0.
    fn scan(
        &self,
        range: AddressRange,
        runs: &mut [sys::page_region],
        pages_max: u64,
        guards: Guards,
    ) -> Option<(usize, usize)> {
        // What must not be is asked for as what is, inverted.
        let excluded = if guards == Guards::PassedOver { self.guard } else { 0 };
        let mut argument = sys::pm_scan_arg {
            size: size_of::<sys::pm_scan_arg>() as u64,
            flags: 0,
            start: range.start() as u64,
            end: range.end() as u64,
            walk_end: 0,
            vec: runs.as_mut_ptr() as u64,
            vec_len: runs.len() as u64,
            max_pages: pages_max,
            category_inverted: excluded,
            category_mask: excluded,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO | self.guard,
        };
        let fd = self.file.as_raw_fd();
        // SAFETY: the request takes this structure; `vec` points to `vec_len` elements that
        // outlive the call.
        let count = unsafe { libc::ioctl(fd, libc::Ioctl::from(PAGEMAP_SCAN), &raw mut argument) };
        let count = usize::try_from(count).ok()?;
        Some((count, usize::try_from(argument.walk_end).unwrap_or(range.end())))
    }
}

/// What a scan does with guards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guards {
    Reported,
    PassedOver,
}

const NO_RUN: sys::page_region = sys::page_region { start: 0, end: 0, categories: 0 };

fn range_of(run: &sys::page_region) -> AddressRange {
    let address = |raw: u64| usize::try_from(raw).unwrap_or(0);
    AddressRange::new(address(run.start), address(run.end))
}

#[cfg(test)]
mod tests {
    use rustix::mm::{Advice, MapFlags, ProtFlags};

    use super::*;

    /// Trap U27. Without swap on this machine the page stays, and the test says little.
    #[test]
    fn a_page_in_swap_is_there() {
        const BYTES: usize = 4 << 12;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping, its third page written, then offered to swap.
        let base = unsafe {
            let base = rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                BYTES,
                protection,
                MapFlags::PRIVATE,
            )
            .unwrap();
            base.cast::<u8>().add(2 << 12).write(7);
            let _ = rustix::mm::madvise(base, BYTES, Advice::LinuxPageOut);
            base
        };
        let range = AddressRange::new(base as usize, base as usize + BYTES);
        let pagemap = Pagemap::open().unwrap();
        let third = range.start() + (2 << 12);
        assert_eq!(pagemap.first_present(range), Some(third));
        let mut found = Vec::new();
        pagemap.present(range, &mut |run| found.push(run));
        let page = AddressRange::pages_from(third, 1);
        assert_eq!(found, [PresentRun { range: page, kind: PageKind::Page }]);
    }

    /// A kernel without guards refuses them, one before 6.15 does not tell of them.
    #[test]
    fn a_guard_is_no_page_and_takes_a_place() {
        const GUARD_INSTALL: libc::c_int = 102;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a fresh mapping; its second page is written, and its third is given a guard.
        let (base, refused) = unsafe {
            let base = rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                4 << 12,
                protection,
                MapFlags::PRIVATE,
            )
            .unwrap();
            base.cast::<u8>().add(1 << 12).write(7);
            let third = base.byte_add(2 << 12);
            (base, libc::madvise(third, 1 << 12, GUARD_INSTALL) != 0)
        };
        let pagemap = Pagemap::open().unwrap();
        if refused || pagemap.guard == 0 {
            return;
        }
        let page = |index: usize| AddressRange::pages_from(base as usize + (index << 12), 1);
        let mut found = Vec::new();
        pagemap.present(AddressRange::pages_from(base as usize, 4), &mut |run| found.push(run));
        let expected = [
            PresentRun { range: page(1), kind: PageKind::Page },
            PresentRun { range: page(2), kind: PageKind::Guard },
        ];
        assert_eq!(found, expected);
        let rest = AddressRange::pages_from(base as usize + (2 << 12), 2);
        assert_eq!(pagemap.first_present(rest), None);
        assert_eq!(pagemap.first_taken(rest), Some(rest.start()));
    }
}
