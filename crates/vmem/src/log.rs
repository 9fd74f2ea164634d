//! A file that is only appended to, through memory: what was appended is there after the process
//! was killed at any instruction, without a system call for each piece.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use rustix::fs::FallocateFlags;
use rustix::mm::{MapFlags, ProtFlags};

/// Addresses that are set aside: the longest a log can become. They cost nothing.
const REACH: usize = 64 << 30;
/// The file grows by so much at a time, beyond what is used: running out of room is seen while
/// there is still room for what is under way.
const STEP: usize = 4 << 20;

/// A log in a file, mapped.
#[derive(Debug)]
pub struct MappedLog {
    base: NonNull<u8>,
    file: OwnedFd,
    /// Bytes that have been appended.
    end: usize,
    /// Bytes that the file has room for.
    room: usize,
}

// SAFETY: the mapping belongs to the log and is not bound to a thread; it is changed by `&mut`.
unsafe impl Send for MappedLog {}

impl MappedLog {
    /// Goes on after the first `end` bytes of a file. Nobody else may shorten it.
    ///
    /// # Errors
    /// If the file cannot be mapped, or there is no room for it to grow.
    pub fn new(file: OwnedFd, end: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let base =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), REACH, protection, flags, &file, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut log = Self { base, file, end, room: 0 };
        if log.grow() { Ok(log) } else { Err(io::ErrorKind::StorageFull.into()) }
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Bytes that have been appended.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.end
    }

    /// Whether nothing has been appended.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.end == 0
    }

    /// Whether the file cannot grow: what is still appended goes to the last of its room.
    #[must_use]
    pub const fn is_short(&self) -> bool {
        self.room - self.end < STEP
    }

    /// Appends bytes; false if there is no room at all any more.
    #[must_use]
    pub fn append(&mut self, bytes: &[u8]) -> bool {
        if self.room - self.end < STEP + bytes.len() {
            self.grow();
        }
        if self.room - self.end < bytes.len() {
            return false;
        }
        // SAFETY: the bytes from `end` to `room` lie in the mapping, the file has blocks for them, and
        // nobody else writes there.
        unsafe {
            let to = self.base.as_ptr().add(self.end);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
        self.end += bytes.len();
        true
    }

    /// Gets the file two steps of room; returns whether it has them.
    fn grow(&mut self) -> bool {
        let wanted = (self.end / STEP + 3) * STEP;
        if wanted > REACH {
            return false;
        }
        // Blocks now, or a write to memory would end the process when the disk is full.
        let (from, flags) = (self.room as u64, FallocateFlags::empty());
        let grown = rustix::fs::fallocate(self.file.as_fd(), flags, from, wanted as u64 - from);
        if grown.is_ok() {
            self.room = wanted;
        }
        grown.is_ok()
    }
}

impl Drop for MappedLog {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing borrows from it.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), REACH) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_appended_is_in_the_file() {
        let memory = || rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = memory();
        let mut log = MappedLog::new(file.try_clone().unwrap(), 0).unwrap();
        let mut expected = Vec::new();
        for piece in 0..3000_u32 {
            let bytes = vec![piece as u8 | 1; piece as usize * 3];
            assert!(log.append(&bytes));
            expected.extend_from_slice(&bytes);
        }
        assert_eq!((log.len(), log.is_short()), (expected.len(), false));
        drop(log);
        let mut found = vec![0; expected.len() + 100];
        rustix::io::pread(&file, &mut found, 0).unwrap();
        assert!(found[..expected.len()] == expected && found[expected.len()..] == [0; 100]);
        let mut log = MappedLog::new(file.try_clone().unwrap(), expected.len()).unwrap();
        assert!(log.append(&[9]));
        let mut last = [0; 2];
        rustix::io::pread(&file, &mut last, expected.len() as u64).unwrap();
        assert_eq!(last, [9, 0]);
    }
}
