//! Frames in one piece of ordinary memory.

use std::io::{IoSlice, IoSliceMut};

use farmem_region::{FrameId, Frames, PAGE_SIZE};

/// Frames numbered from 0, one behind the other.
#[derive(Debug)]
pub(crate) struct HeapFrames(Box<[u8]>);

impl HeapFrames {
    /// That many frames of zeros, which take memory once they are used: the allocator has bytes that are zero,
    /// pages it would fill.
    pub(crate) fn new(count: usize) -> Self {
        Self(vec![0; count.saturating_mul(PAGE_SIZE)].into_boxed_slice())
    }

    const fn pages(&self) -> &[[u8; PAGE_SIZE]] {
        self.0.as_chunks().0
    }

    const fn pages_mut(&mut self) -> &mut [[u8; PAGE_SIZE]] {
        self.0.as_chunks_mut().0
    }
}

const fn at(frame: FrameId) -> usize {
    frame.get() as usize
}

/// Runs of frames that lie side by side.
fn runs(frames: &[FrameId]) -> impl Iterator<Item = std::ops::Range<usize>> + '_ {
    frames.chunk_by(|one, next| next.get() == one.get() + 1).map(|run| {
        let first = at(run[0]);
        first..first + run.len()
    })
}

impl Frames for HeapFrames {
    fn bytes(&self, frame: FrameId) -> &[u8; PAGE_SIZE] {
        &self.pages()[at(frame)]
    }

    fn bytes_mut(&mut self, frame: FrameId) -> &mut [u8; PAGE_SIZE] {
        &mut self.pages_mut()[at(frame)]
    }

    fn gather_mut<'a>(&'a mut self, frames: &[FrameId], slices: &mut Vec<IoSliceMut<'a>>) {
        let mut order: Vec<usize> = (0..frames.len()).collect();
        order.sort_unstable_by_key(|&index| frames[index].get());
        let mut parts: Vec<Option<&mut [u8; PAGE_SIZE]>> = Vec::new();
        parts.resize_with(frames.len(), || None);
        let (mut rest, mut passed) = (self.pages_mut(), 0);
        for index in order {
            let number = at(frames[index]);
            assert!(number >= passed, "a frame is named once");
            let (before, after) = rest.split_at_mut(number + 1 - passed);
            parts[index] = before.last_mut();
            (rest, passed) = (after, number + 1);
        }
        slices.extend(parts.into_iter().flatten().map(|part| IoSliceMut::new(part)));
    }

    fn gather<'a>(&'a self, frames: &[FrameId], slices: &mut Vec<IoSlice<'a>>) {
        slices.extend(runs(frames).map(|run| IoSlice::new(self.pages()[run].as_flattened())));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gathered_slices_come_in_the_order_asked_for() {
        let mut frames = HeapFrames::new(8);
        let order = [5, 0, 1, 7, 3].map(FrameId::new);
        let mut slices = Vec::new();
        frames.gather_mut(&order, &mut slices);
        for (number, slice) in (1..).zip(&mut slices) {
            slice.fill(number);
        }
        let numbers = order.map(|frame| frames.bytes(frame)[77]);
        assert_eq!(numbers, [1, 2, 3, 4, 5]);
        let mut slices = Vec::new();
        frames.gather(&order, &mut slices);
        let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
        let firsts: Vec<u8> = bytes.chunks(PAGE_SIZE).map(|page| page[0]).collect();
        assert_eq!(firsts, [1, 2, 3, 4, 5]);
    }
}
