//! The arena of a memory server on the same machine, reached by its file.
//!
//! Read and written by system calls rather than mapped: a mapping would count as resident memory
//! of the program that is to hold its limit, and a first touch costs as much as a call.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;

use farmem_region::PAGE_SIZE;
use rustix::fs::SealFlags;
use rustix::io::Errno;

/// Pages of a server's memory, by the number of their slot. The server may change any of them at
/// any time: what was read must be checked before it is believed.
#[derive(Debug)]
pub struct ArenaFile {
    file: OwnedFd,
}

impl ArenaFile {
    /// Takes the file that a server has passed.
    ///
    /// # Errors
    /// If it is no memory: reading from anything else might wait for ever.
    pub fn adopt(file: OwnedFd) -> io::Result<Self> {
        // Only a memfd has seals.
        let seals = rustix::fs::fcntl_get_seals(&file)?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the arena may shrink"));
        }
        Ok(Self { file })
    }

    /// Reads slots that lie side by side, from the first on. False if there are no such slots.
    ///
    /// # Errors
    /// If the kernel does not read.
    pub fn read(&self, first: u32, slices: &mut [IoSliceMut<'_>]) -> io::Result<bool> {
        let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
        loop {
            match rustix::io::preadv(&self.file, slices, offset(first)) {
                Ok(bytes) => return Ok(bytes == wanted),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Writes slots that lie side by side, from the first on. False if there are no such slots.
    ///
    /// # Errors
    /// If the kernel does not write.
    pub fn write(&self, first: u32, slices: &[IoSlice<'_>]) -> io::Result<bool> {
        let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
        loop {
            match rustix::io::pwritev(&self.file, slices, offset(first)) {
                Ok(bytes) => return Ok(bytes == wanted),
                Err(Errno::INTR) => {}
                // It cannot grow.
                Err(Errno::PERM | Errno::FBIG | Errno::NOSPC) => return Ok(false),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn offset(slot: u32) -> u64 {
    u64::from(slot) * PAGE_SIZE as u64
}
