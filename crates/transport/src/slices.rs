//! Lists of buffers for vectored input and output.

use std::io::{IoSlice, IoSliceMut};

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

#[cfg(test)]
mod tests {
    use super::*;

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
