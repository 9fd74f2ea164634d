//! Lists of buffers for vectored input and output.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::AsFd;

use rustix::io::Errno;

/// Buffers that one system call takes (the kernel's `UIO_MAXIOV`). Longer lists are moved in
/// several calls.
pub const SLICES_MAX: usize = 1024;

/// Empties a list and gives its memory to one of another lifetime: on the path of a fault nothing
/// may be allocated, and a list cannot be kept beside the buffers that it borrows.
#[must_use]
pub fn recycle<'new>(mut slices: Vec<IoSlice<'_>>) -> Vec<IoSlice<'new>> {
    slices.clear();
    // Collecting a vector's own iterator reuses its memory.
    slices.into_iter().map(|_| unreachable!("the list is empty")).collect()
}

/// As [`recycle`], for buffers to fill.
#[must_use]
pub fn recycle_mut<'new>(mut slices: Vec<IoSliceMut<'_>>) -> Vec<IoSliceMut<'new>> {
    slices.clear();
    slices.into_iter().map(|_| unreachable!("the list is empty")).collect()
}

/// The list without its first `count` bytes.
pub fn skip_bytes<'list, 'a>(
    mut slices: &'list mut [IoSlice<'a>],
    count: usize,
) -> &'list mut [IoSlice<'a>] {
    IoSlice::advance_slices(&mut slices, count);
    slices
}

/// As [`skip_bytes`], for buffers to fill.
pub fn skip_bytes_mut<'list, 'a>(
    mut slices: &'list mut [IoSliceMut<'a>],
    count: usize,
) -> &'list mut [IoSliceMut<'a>] {
    IoSliceMut::advance_slices(&mut slices, count);
    slices
}

/// Fills all buffers from a place of a file on, in bytes.
///
/// # Errors
/// If the file is shorter, or the kernel does not read.
pub fn read_at(file: impl AsFd, slices: &mut [IoSliceMut<'_>], at: u64) -> io::Result<()> {
    let total: usize = slices.iter().map(|slice| slice.len()).sum();
    let (mut rest, mut done) = (slices, 0);
    while done < total {
        match rustix::io::preadv(&file, rest, at + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(bytes) => {
                done += bytes;
                rest = skip_bytes_mut(rest, bytes);
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Writes all buffers to a place of a file, in bytes.
///
/// # Errors
/// If the kernel does not write; a part may be written then.
pub fn write_at(file: impl AsFd, slices: &mut [IoSlice<'_>], at: u64) -> io::Result<()> {
    let total: usize = slices.iter().map(|slice| slice.len()).sum();
    let (mut rest, mut done) = (slices, 0);
    while done < total {
        match rustix::io::pwritev(&file, rest, at + done as u64) {
            Ok(bytes) => {
                done += bytes;
                rest = skip_bytes(rest, bytes);
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_buffers_are_written_and_read_back_and_a_short_file_is_told() {
        let file = rustix::fs::memfd_create("slices", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        // More buffers than one call takes would be refused; so many take one.
        let bytes: Vec<u8> = (0..=255).cycle().take(SLICES_MAX * 3).collect();
        let mut parts: Vec<_> = bytes.chunks(3).map(IoSlice::new).collect();
        write_at(&file, &mut parts, 7).unwrap();
        let mut back = vec![0; bytes.len()];
        let mut parts: Vec<_> = back.chunks_mut(3).map(IoSliceMut::new).collect();
        read_at(&file, &mut parts, 7).unwrap();
        assert_eq!(back, bytes);
        let mut parts = [IoSliceMut::new(&mut back)];
        let short = read_at(&file, &mut parts, 8).unwrap_err();
        assert_eq!(short.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn recycling_keeps_the_memory() {
        let bytes = [0u8; 8];
        let mut slices = Vec::with_capacity(100);
        slices.extend(bytes.iter().map(|byte| IoSlice::new(std::slice::from_ref(byte))));
        let (address, capacity) = (slices.as_ptr().addr(), slices.capacity());
        let again: Vec<IoSlice<'static>> = recycle(slices);
        assert!(again.is_empty());
        assert_eq!((again.as_ptr().addr(), again.capacity()), (address, capacity));
    }
}
