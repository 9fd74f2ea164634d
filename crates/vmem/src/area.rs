//! Memory that a library lends to its program and pages itself.

use std::io;
use std::ptr::NonNull;

use farmem_region::PAGE_SIZE;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use rustix::process::Pid;

use crate::AddressRange;

/// A private anonymous mapping that is used as a slice of bytes. A forked child does not have it:
/// a pager thread of this process cannot answer for the child while `fork` holds the locks of the
/// C library.
#[derive(Debug)]
pub struct Area {
    base: NonNull<u8>,
    bytes: usize,
    maker: Pid,
}

// SAFETY: the mapping belongs to this value alone, wherever it is.
unsafe impl Send for Area {}
// SAFETY: `&Area` only gives shared slices.
unsafe impl Sync for Area {}

impl Area {
    /// Maps that many bytes, rounded up to whole pages; they read as zero.
    ///
    /// # Errors
    /// What the system says: no address range of that size, or a limit.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let bytes = bytes.max(1).next_multiple_of(PAGE_SIZE);
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }?;
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let area = Self { base, bytes, maker: rustix::process::getpid() };
        // SAFETY: this advice changes no contents, and the range is ours.
        unsafe { rustix::mm::madvise(base.as_ptr().cast(), bytes, Advice::LinuxDontFork) }?;
        // SAFETY: as above. Kernels built without huge pages refuse it, which is as good.
        let _ =
            unsafe { rustix::mm::madvise(base.as_ptr().cast(), bytes, Advice::LinuxNoHugepage) };
        Ok(area)
    }

    /// Where it is.
    #[must_use]
    pub fn range(&self) -> AddressRange {
        AddressRange::new(self.base.as_ptr() as usize, self.base.as_ptr() as usize + self.bytes)
    }

    /// Its first byte.
    #[must_use]
    pub const fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Its bytes.
    #[must_use]
    pub const fn as_slice(&self) -> &[u8] {
        // SAFETY: the range is mapped, readable and initialised (zero at first) as long as `self`
        // lives. A pager that moves pages out and in changes no byte, and writers need `&mut`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr(), self.bytes) }
    }

    /// Its bytes, to change.
    #[must_use]
    pub const fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is the only way in.
        unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr(), self.bytes) }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        if self.maker != rustix::process::getpid() {
            // A forked child has no such mapping, and may have another one there.
            return;
        }
        // SAFETY: the range is ours, and no slice of it outlives `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_area_is_zero_at_first_and_keeps_what_is_written() {
        let mut area = Area::new(3 * PAGE_SIZE + 1).unwrap();
        assert_eq!((area.range().pages(), area.as_slice().len()), (4, 4 * PAGE_SIZE));
        assert!(area.as_slice().iter().all(|&byte| byte == 0));
        area.as_mut_slice()[4 * PAGE_SIZE - 1] = 7;
        assert_eq!(area.as_slice()[4 * PAGE_SIZE - 1], 7);
    }
}
