//! Which pages of a range are there: the PAGEMAP_SCAN call (Linux 6.7, see
//! Documentation/admin-guide/mm/pagemap.rst).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use linux_raw_sys::general as sys;

use crate::AddressRange;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u32 = 0xC060_6610;
const _: () = assert!(size_of::<sys::pm_scan_arg>() == 0x60);
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
/// Runs taken by one call; more need further calls.
const RUNS_PER_CALL: usize = 128;

/// Neighbouring pages that are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PresentRun {
    /// Where.
    pub range: AddressRange,
    /// Whether they are the kernel's shared zero page, which costs no memory.
    pub zero: bool,
}

/// /proc/self/pagemap, opened once.
#[derive(Debug)]
pub struct Pagemap {
    file: OwnedFd,
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
        Ok(Self { file })
    }

    /// Calls `each` for the runs of present pages in `range`, in the order of addresses. A range
    /// that is not mapped has none.
    pub fn present(&self, range: AddressRange, each: &mut dyn FnMut(PresentRun)) {
        let mut runs =
            [sys::page_region { start: 0, end: 0, categories: 0 }; RUNS_PER_CALL];
        let mut at = range.start();
        while at < range.end() {
            let mut argument = sys::pm_scan_arg {
                size: size_of::<sys::pm_scan_arg>() as u64,
                flags: 0,
                start: at as u64,
                end: range.end() as u64,
                walk_end: 0,
                vec: runs.as_mut_ptr() as u64,
                vec_len: RUNS_PER_CALL as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: PAGE_IS_PRESENT,
                category_anyof_mask: 0,
                return_mask: PAGE_IS_PRESENT | PAGE_IS_PFNZERO,
            };
            // SAFETY: the request takes this structure; `vec` points to `vec_len` elements that
            // outlive the call.
            let count = unsafe {
                libc::ioctl(
                    self.file.as_raw_fd(),
                    libc::Ioctl::from(PAGEMAP_SCAN),
                    &raw mut argument,
                )
            };
            let Ok(count) = usize::try_from(count) else { return };
            for run in &runs[..count] {
                let start = usize::try_from(run.start).unwrap_or(0);
                let end = usize::try_from(run.end).unwrap_or(0);
                each(PresentRun {
                    range: AddressRange::new(start, end),
                    zero: run.categories & PAGE_IS_PFNZERO != 0,
                });
            }
            let walked = usize::try_from(argument.walk_end).unwrap_or(range.end());
            if walked <= at {
                return;
            }
            at = walked;
        }
    }
}
