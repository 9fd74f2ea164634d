//! What every frame of the scratch area is used for.
//!
//! Pages that are moved out arrive in an empty *window* (see [`Scratch::WINDOW_FRAMES`]), which
//! then waits in the victim queue. The oldest window is *retired* when the servers have all its
//! pages: its frames go to the pool, from which fetches take them, or back to the system.
//!
//! ```text
//!           move out              acknowledged, retired           fetch
//!   Hole ------------> Victim/Writing -------------> Pooled --------------> Receiving
//!    ^                    |  page hit again: Spent     ^                        |
//!    +--------------------+----- discarded ------------+------ copied in -------+
//!    +---------------------------------------------------------moved in --------+
//! ```

use std::collections::VecDeque;

use farmem_region::FrameId;
use farmem_vmem::Scratch;

/// Frames of one window.
pub(crate) const WINDOW_FRAMES: usize = Scratch::WINDOW_FRAMES;

/// Runs of the pool that are looked at for one that fits.
const RUNS_LOOKED_AT: usize = 64;

/// What a frame is used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FrameUse {
    /// It has no memory.
    Hole,
    /// It has memory whose content is nobody's, ready for a fetch.
    Pooled,
    /// It has memory whose content is nobody's, in a window of the victim queue.
    Spent,
    /// It holds the page of this address, and the servers have the same content.
    Victim(usize),
    /// It holds the page of this address, and a store of it is under way.
    Writing(usize),
    /// A store of it is under way, but the page has meanwhile gone back or away.
    Abandoned,
    /// A fetch fills it.
    Receiving,
}

impl FrameUse {
    const fn is_busy(self) -> bool {
        matches!(self, Self::Writing(_) | Self::Abandoned)
    }
    const fn has_memory(self) -> bool {
        !matches!(self, Self::Hole)
    }
}

/// A window's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WindowId(u32);

impl WindowId {
    /// The window's frames.
    pub(crate) fn frames(self) -> impl Iterator<Item = FrameId> {
        let first = self.first().get();
        (first..first + WINDOW_FRAMES as u32).map(FrameId::new)
    }

    /// The window's first frame.
    #[must_use]
    pub(crate) const fn first(self) -> FrameId {
        FrameId::new(self.0 * WINDOW_FRAMES as u32)
    }

    const fn of(frame: FrameId) -> Self {
        Self(frame.get() / WINDOW_FRAMES as u32)
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Window {
    with_memory: u16,
    busy: u16,
    queued: bool,
}

/// A run of pooled frames.
#[derive(Debug, Clone, Copy)]
struct Run {
    first: u32,
    count: u32,
}

/// The uses of all frames.
#[derive(Debug)]
pub(crate) struct FramePool {
    uses: Box<[FrameUse]>,
    windows: Box<[Window]>,
    empty: Vec<WindowId>,
    victims: VecDeque<WindowId>,
    pooled: Vec<Run>,
    pooled_count: usize,
    victim_frames: usize,
    busy_frames: usize,
}

impl FramePool {
    /// All holes.
    #[must_use]
    pub(crate) fn new(windows: usize) -> Self {
        let count = u32::try_from(windows).unwrap_or(u32::MAX);
        Self {
            uses: vec![FrameUse::Hole; windows * WINDOW_FRAMES].into_boxed_slice(),
            windows: vec![Window::default(); windows].into_boxed_slice(),
            empty: (0..count).rev().map(WindowId).collect(),
            victims: VecDeque::with_capacity(windows),
            pooled: Vec::with_capacity(windows * 4),
            pooled_count: 0,
            victim_frames: 0,
            busy_frames: 0,
        }
    }

    /// The use of a frame.
    #[must_use]
    pub(crate) fn frame(&self, frame: FrameId) -> FrameUse {
        self.uses[frame.get() as usize]
    }

    /// Changes the use of a frame. Pooling goes through [`FramePool::pool`].
    pub(crate) fn set(&mut self, frame: FrameId, next: FrameUse) {
        let id = WindowId::of(frame);
        let before = std::mem::replace(&mut self.uses[frame.get() as usize], next);
        let window = &mut self.windows[id.0 as usize];
        let counted = |on: bool| u16::from(on);
        window.busy = window.busy + counted(next.is_busy()) - counted(before.is_busy());
        window.with_memory =
            window.with_memory + counted(next.has_memory()) - counted(before.has_memory());
        self.busy_frames =
            self.busy_frames + usize::from(next.is_busy()) - usize::from(before.is_busy());
        let in_queue = |one: FrameUse| usize::from(window.queued && one.has_memory());
        self.victim_frames = self.victim_frames + in_queue(next) - in_queue(before);
        if window.with_memory == 0 && before.has_memory() && !window.queued {
            self.empty.push(id);
        }
    }

    /// Takes an empty window for pages that are moved out; give it back with
    /// [`FramePool::queue`] or [`FramePool::put_back`].
    pub(crate) fn take_empty(&mut self) -> Option<WindowId> {
        self.empty.pop()
    }

    /// Gives back a window that stayed empty.
    pub(crate) fn put_back(&mut self, window: WindowId) {
        self.empty.push(window);
    }

    /// Puts a window at the end of the victim queue. Its frames are set afterwards.
    pub(crate) fn queue(&mut self, window: WindowId) {
        self.windows[window.0 as usize].queued = true;
        self.victims.push_back(window);
    }

    /// Takes the oldest window out of the victim queue, unless stores of it are under way.
    pub(crate) fn take_oldest(&mut self) -> Option<WindowId> {
        let &oldest = self.victims.front()?;
        if self.windows[oldest.0 as usize].busy > 0 {
            return None;
        }
        self.victims.pop_front();
        let window = &mut self.windows[oldest.0 as usize];
        window.queued = false;
        self.victim_frames -= usize::from(window.with_memory);
        if window.with_memory == 0 {
            self.empty.push(oldest);
        }
        Some(oldest)
    }

    /// Takes the window queued last out again: nothing came into it.
    pub(crate) fn unqueue_newest(&mut self) {
        let Some(newest) = self.victims.pop_back() else {
            return;
        };
        self.windows[newest.0 as usize].queued = false;
        self.empty.push(newest);
    }

    /// A hole got memory without our doing: it joins the pool, or what is spent of its window.
    pub(crate) fn hole_filled(&mut self, frame: FrameId) {
        if self.frame(frame) != FrameUse::Hole {
            return;
        }
        let id = WindowId::of(frame);
        self.empty.retain(|&empty| empty != id);
        if self.is_queued(frame) {
            self.set(frame, FrameUse::Spent);
        } else {
            self.pool(frame);
        }
    }

    /// Whether the frame's window waits in the victim queue.
    #[must_use]
    pub(crate) fn is_queued(&self, frame: FrameId) -> bool {
        self.windows[WindowId::of(frame).0 as usize].queued
    }

    /// Frames with memory in the victim queue.
    #[must_use]
    pub(crate) const fn victim_frames(&self) -> usize {
        self.victim_frames
    }

    /// Frames with memory, whatever for.
    pub(crate) fn with_memory(&self) -> usize {
        self.windows.iter().map(|window| usize::from(window.with_memory)).sum()
    }

    /// Frames whose store is under way.
    #[must_use]
    pub(crate) const fn busy_frames(&self) -> usize {
        self.busy_frames
    }

    /// Puts a frame with memory into the pool.
    pub(crate) fn pool(&mut self, frame: FrameId) {
        self.set(frame, FrameUse::Pooled);
        self.pooled_count += 1;
        let number = frame.get();
        match self.pooled.last_mut() {
            Some(run) if run.first + run.count == number => run.count += 1,
            _ => self.pooled.push(Run { first: number, count: 1 }),
        }
    }

    /// Frames in the pool.
    #[must_use]
    pub(crate) const fn pooled(&self) -> usize {
        self.pooled_count
    }

    /// Takes `count` neighbours from the pool, if there are, and appends them to `frames`; they are
    /// [`FrameUse::Receiving`] then.
    pub(crate) fn take_neighbours(&mut self, count: usize, frames: &mut Vec<FrameId>) -> bool {
        let want = u32::try_from(count).unwrap_or(u32::MAX);
        let newest = self.pooled.iter().rev().take(RUNS_LOOKED_AT);
        let Some(back) = newest.enumerate().find(|(_, run)| run.count >= want).map(|(at, _)| at)
        else {
            return false;
        };
        let at = self.pooled.len() - 1 - back;
        self.take_from(at, want, frames);
        true
    }

    /// Takes up to `count` frames from the pool, wherever they are. Returns how many.
    pub(crate) fn take_pooled(&mut self, count: usize, frames: &mut Vec<FrameId>) -> usize {
        let mut taken = 0;
        while taken < count {
            // The shortest of the newest runs: long ones are for those who need neighbours.
            let length = self.pooled.len();
            let newest = self.pooled.iter().enumerate().skip(length.saturating_sub(RUNS_LOOKED_AT));
            let Some((at, run)) = newest.min_by_key(|(_, run)| run.count) else {
                break;
            };
            let want = u32::try_from(count - taken).unwrap_or(u32::MAX).min(run.count);
            self.take_from(at, want, frames);
            taken += want as usize;
        }
        taken
    }

    fn take_from(&mut self, at: usize, want: u32, frames: &mut Vec<FrameId>) {
        let run = &mut self.pooled[at];
        let first = run.first;
        run.first += want;
        run.count -= want;
        if run.count == 0 {
            self.pooled.remove(at);
        }
        self.pooled_count -= want as usize;
        for number in first..first + want {
            frames.push(FrameId::new(number));
            self.set(FrameId::new(number), FrameUse::Receiving);
        }
    }

    /// Takes frames that lie together out of the pool to give their memory back: a long run of
    /// neighbours, or all pooled frames of a window in which nothing else has memory. They are holes
    /// then.
    pub(crate) fn take_to_discard(&mut self) -> Option<Discard> {
        let oldest = self.pooled.iter().enumerate().take(RUNS_LOOKED_AT);
        let (at, &run) = oldest.max_by_key(|(_, run)| run.count)?;
        let id = WindowId::of(FrameId::new(run.first));
        let first = id.first().get();
        let inside =
            |run: &Run| run.first >= first && run.first + run.count <= first + WINDOW_FRAMES as u32;
        let pages: u32 = self.pooled.iter().filter(|run| inside(run)).map(|run| run.count).sum();
        if pages > run.count && pages == u32::from(self.windows[id.0 as usize].with_memory) {
            self.pooled.retain(|run| !inside(run));
            self.pooled_count -= pages as usize;
            for frame in id.frames() {
                self.set(frame, FrameUse::Hole);
            }
            return Some(Discard { first: id.first(), span: WINDOW_FRAMES, pages: pages as usize });
        }
        let want = run.count.min(WINDOW_FRAMES as u32);
        if want == run.count {
            self.pooled.remove(at);
        } else {
            self.pooled[at] = Run { first: run.first + want, count: run.count - want };
        }
        self.pooled_count -= want as usize;
        for number in run.first..run.first + want {
            self.set(FrameId::new(number), FrameUse::Hole);
        }
        let pages = want as usize;
        Some(Discard { first: FrameId::new(run.first), span: pages, pages })
    }
}

/// Frames that are holes from now on, whose memory is still to be given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Discard {
    /// The first one.
    pub(crate) first: FrameId,
    /// From the first to the last one; those between without memory are holes already.
    pub(crate) span: usize,
    /// How many have memory.
    pub(crate) pages: usize,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_goes_round() {
        let mut pool = FramePool::new(2);
        let window = pool.take_empty().unwrap();
        pool.queue(window);
        for (at, frame) in window.frames().enumerate().filter(|(at, _)| at % 2 == 0) {
            pool.set(frame, if at == 4 { FrameUse::Writing(at) } else { FrameUse::Victim(at) });
        }
        assert_eq!((pool.victim_frames(), pool.busy_frames()), (128, 1));
        assert_eq!(pool.take_oldest(), None, "a store is under way");
        pool.set(FrameId::new(window.first().get() + 4), FrameUse::Spent);
        assert_eq!(pool.take_oldest(), Some(window));
        assert_eq!((pool.victim_frames(), pool.busy_frames()), (0, 0));
        for frame in window.frames().filter(|f| f.get() % 2 == 0) {
            pool.pool(frame);
        }
        let mut frames = Vec::new();
        assert_eq!(pool.take_pooled(100, &mut frames), 100);
        assert_eq!(pool.pooled(), 28);
        for frame in frames {
            pool.set(frame, FrameUse::Hole);
        }
        while pool.take_to_discard().is_some() {}
        assert_eq!(pool.pooled(), 0);
        let ids = [pool.take_empty().unwrap(), pool.take_empty().unwrap()];
        assert_ne!(ids[0], ids[1], "each empty window is given once");
        assert_eq!(pool.take_empty(), None);
    }

    #[test]
    fn a_window_of_scattered_frames_is_discarded_at_once() {
        let mut pool = FramePool::new(2);
        let window = pool.take_empty().unwrap();
        for frame in window.frames().filter(|frame| frame.get() % 5 == 0) {
            pool.pool(frame);
        }
        let mut taken = Vec::new();
        pool.take_pooled(1, &mut taken);
        let one = pool.take_to_discard().unwrap();
        assert_eq!((one.span, one.pages), (1, 1), "one of the window's frames is in use");
        pool.pool(taken[0]);
        let rest = pool.take_to_discard().unwrap();
        assert_eq!((rest.first, rest.span), (window.first(), WINDOW_FRAMES));
        assert_eq!(rest.pages, WINDOW_FRAMES.div_ceil(5) - 1);
        assert_eq!((pool.pooled(), pool.with_memory()), (0, 0));
        assert_eq!(pool.take_to_discard(), None);
    }

    #[test]
    fn neighbours_stay_together() {
        let mut pool = FramePool::new(1);
        let window = pool.take_empty().unwrap();
        for frame in window.frames() {
            pool.pool(frame);
        }
        let mut frames = Vec::new();
        pool.take_pooled(64, &mut frames);
        assert!(frames.windows(2).all(|w| w[0].get() + 1 == w[1].get()));
    }
}
