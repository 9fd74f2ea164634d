//! The pager's second thread, which takes fingerprints: it runs when chance says so.

use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;

use farmem_region::{Errand, FrameId, Lent, PAGE_SIZE};

/// Errands that were taken and not run.
#[derive(Default)]
pub(crate) struct SimPorter {
    loads: VecDeque<Load>,
}

struct Load {
    errand: Box<dyn Errand>,
    frames: Vec<FrameId>,
    pages: Pages,
}

/// The content of frames when they were lent: nobody may change it meanwhile.
struct Pages(Vec<Box<[u8; PAGE_SIZE]>>);

impl std::fmt::Debug for SimPorter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimPorter").field("waiting", &self.loads.len()).finish_non_exhaustive()
    }
}

impl Lent for Pages {
    fn bytes(&self, at: usize) -> &[u8; PAGE_SIZE] {
        &self.0[at]
    }

    fn gather<'a>(&'a self, _range: Range<usize>, _slices: &mut Vec<IoSlice<'a>>) {
        unreachable!("the simulated store takes pages one by one")
    }

    fn gather_mut<'a>(&'a mut self, _range: Range<usize>, _slices: &mut Vec<IoSliceMut<'a>>) {
        unreachable!("the simulated store lends no frames to be filled")
    }
}

impl SimPorter {
    pub(crate) fn take(
        &mut self,
        errand: Box<dyn Errand>,
        frames: &[FrameId],
        pages: Vec<Box<[u8; PAGE_SIZE]>>,
    ) {
        self.loads.push_back(Load { errand, frames: frames.to_vec(), pages: Pages(pages) });
    }

    /// Runs the first errand; false if there is none.
    pub(crate) fn run_one(&mut self) -> bool {
        let Some(Load { mut errand, mut pages, .. }) = self.loads.pop_front() else {
            return false;
        };
        errand.run(&mut pages);
        errand.deliver();
        true
    }

    /// Whether a frame is lent.
    pub(crate) fn has(&self, frame: FrameId) -> bool {
        self.loads.iter().any(|load| load.frames.contains(&frame))
    }

    /// Forgets everything: the pager is gone.
    pub(crate) fn clear(&mut self) {
        self.loads.clear();
    }
}
