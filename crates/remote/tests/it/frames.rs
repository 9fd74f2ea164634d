//! Frames in one piece of memory, for tests and measurements.

use std::cell::Cell;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;

use farmem_region::{Errand, FrameId, Frames, Lent, Loan, PAGE_SIZE};

/// Frames numbered from 0, and who runs errands on them.
#[derive(Debug)]
pub(crate) struct PlainFrames(pub(crate) Vec<[u8; PAGE_SIZE]>, pub(crate) Porter);

/// Runs two of three errands that it is asked to, at once.
#[derive(Debug, Default)]
pub(crate) struct Porter {
    pub(crate) works: bool,
    asked: Cell<usize>,
    pub(crate) errands: usize,
}

/// Frames that are lent.
struct Borrowed<'a> {
    frames: &'a mut PlainFrames,
    ids: &'a [FrameId],
}

impl Lent for Borrowed<'_> {
    fn bytes(&self, at: usize) -> &[u8; PAGE_SIZE] {
        self.frames.bytes(self.ids[at])
    }

    fn gather<'a>(&'a self, range: Range<usize>, slices: &mut Vec<IoSlice<'a>>) {
        self.frames.gather(&self.ids[range], slices);
    }

    fn gather_mut<'a>(&'a mut self, range: Range<usize>, slices: &mut Vec<IoSliceMut<'a>>) {
        self.frames.gather_mut(&self.ids[range], slices);
    }
}

impl PlainFrames {
    /// That many frames of zeros.
    pub(crate) fn new(count: usize) -> Self {
        Self(vec![[0; PAGE_SIZE]; count], Porter::default())
    }
}

fn at(frame: FrameId) -> usize {
    usize::try_from(frame.get()).unwrap()
}

/// Runs of frames that lie side by side.
fn runs(frames: &[FrameId]) -> impl Iterator<Item = Range<usize>> + '_ {
    frames.chunk_by(|one, next| next.get() == one.get() + 1).map(|run| {
        let first = at(run[0]);
        first..first + run.len()
    })
}

impl Frames for PlainFrames {
    fn bytes(&self, frame: FrameId) -> &[u8; PAGE_SIZE] {
        &self.0[at(frame)]
    }

    fn bytes_mut(&mut self, frame: FrameId) -> &mut [u8; PAGE_SIZE] {
        &mut self.0[at(frame)]
    }

    fn gather_mut<'a>(&'a mut self, frames: &[FrameId], slices: &mut Vec<IoSliceMut<'a>>) {
        if frames.is_sorted() {
            let (mut rest, mut passed) = (&mut self.0[..], 0);
            for run in runs(frames) {
                let (this, after) = rest.split_at_mut(run.end - passed);
                slices.push(IoSliceMut::new(this[run.start - passed..].as_flattened_mut()));
                (rest, passed) = (after, run.end);
            }
            return;
        }
        let mut all: Vec<_> = self.0.iter_mut().map(Some).collect();
        slices.extend(frames.iter().map(|frame| {
            IoSliceMut::new(all[at(*frame)].take().expect("a frame is named once").as_mut_slice())
        }));
    }

    fn gather<'a>(&'a self, frames: &[FrameId], slices: &mut Vec<IoSlice<'a>>) {
        slices.extend(runs(frames).map(|run| IoSlice::new(self.0[run].as_flattened())));
    }

    fn would_lend(&self, _loan: Loan) -> bool {
        let porter = &self.1;
        porter.asked.set(porter.asked.get() + 1);
        porter.works && !porter.asked.get().is_multiple_of(3)
    }

    fn lend(
        &mut self,
        frames: &[FrameId],
        _loan: Loan,
        mut errand: Box<dyn Errand>,
    ) -> Result<(), Box<dyn Errand>> {
        self.1.errands += 1;
        errand.run(&mut Borrowed { frames: self, ids: frames });
        errand.deliver();
        Ok(())
    }
}
