//! A second thread that works on the content of frames: reads them from a server's memory, takes
//! their fingerprints. None of it changes an address space, and none of it waits for the pager; so
//! the pager may wait for it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use farmem_region::{Errand, FrameId, Loan};
use rustix::event::EventfdFlags;
use rustix::process::Pid;

use crate::Scratch;
use crate::anchor::hurry;
use crate::scratch::LentFrames;

/// Errands that wait at most: beyond it the pager does the work itself rather than fall behind.
const ERRANDS_MAX: usize = 64;
/// And when one is not urgent: two processors get more done together.
const ERRANDS_TO_READ_MAX: usize = 6;

/// Takes errands of the pager; a second thread of it calls [`Porter::run`].
#[derive(Debug)]
pub struct Porter {
    /// A thread runs them.
    runs: AtomicBool,
    /// It.
    thread: OnceLock<Pid>,
    lists: Mutex<Lists>,
    /// An errand has been taken, or the porter is closed.
    news: Condvar,
    /// An errand has been delivered.
    delivered: Condvar,
    /// Counts deliveries.
    bell: OwnedFd,
}

#[derive(Default)]
struct Lists {
    to_fill: VecDeque<Load>,
    to_read: VecDeque<Load>,
    /// The thread is at one.
    at_work: bool,
    closed: bool,
}

struct Load {
    errand: Box<dyn Errand>,
    frames: LentFrames,
}

impl std::fmt::Debug for Lists {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let waiting = (self.to_fill.len(), self.to_read.len());
        f.debug_struct("Lists").field("waiting", &waiting).finish_non_exhaustive()
    }
}

impl Lists {
    fn pop(&mut self) -> Option<Load> {
        self.to_fill.pop_front().or_else(|| self.to_read.pop_front())
    }
}

impl Load {
    fn carry(mut self) {
        self.errand.run(&mut self.frames);
        // The frames are the pager's before it hears of them.
        drop(self.frames);
        self.errand.deliver();
    }
}

impl Porter {
    /// Nothing to do yet, and nobody who does it.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub fn new() -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            runs: AtomicBool::new(false),
            thread: OnceLock::new(),
            lists: Mutex::default(),
            news: Condvar::new(),
            delivered: Condvar::new(),
            bell: rustix::event::eventfd(0, flags)?,
        })
    }

    /// Whether [`Self::take`] would take an errand now.
    #[must_use]
    pub fn would_take(&self, loan: Loan) -> bool {
        let most = match loan {
            Loan::Fill => ERRANDS_MAX,
            Loan::Read => ERRANDS_TO_READ_MAX,
        };
        self.runs.load(Ordering::Relaxed) && {
            let lists = self.lists();
            !lists.closed && lists.to_fill.len() + lists.to_read.len() < most
        }
    }

    /// Takes an errand on frames of the scratch area.
    ///
    /// # Errors
    /// The errand, if nobody runs it, or not soon.
    pub fn take(
        &self,
        scratch: &mut Scratch,
        frames: &[FrameId],
        loan: Loan,
        errand: Box<dyn Errand>,
    ) -> Result<(), Box<dyn Errand>> {
        if !self.would_take(loan) {
            return Err(errand);
        }
        let mut lists = self.lists();
        let load = Load { errand, frames: scratch.lend(frames, loan) };
        match loan {
            Loan::Fill => lists.to_fill.push_back(load),
            Loan::Read => lists.to_read.push_back(load),
        }
        let sleeps = !lists.at_work;
        drop(lists);
        if sleeps {
            self.news.notify_one();
        }
        Ok(())
    }

    /// Runs errands until [`Self::close`] is called.
    pub fn run(&self) {
        let _ = self.thread.set(rustix::thread::gettid());
        self.runs.store(true, Ordering::Relaxed);
        while let Some(load) = self.next() {
            load.carry();
            self.lists().at_work = false;
            self.delivered.notify_all();
            self.ring();
        }
        self.runs.store(false, Ordering::Relaxed);
    }

    /// Runs an errand that the thread has not begun; false if there is none.
    pub fn help(&self) -> bool {
        let load = self.lists().pop();
        load.map(Load::carry).is_some()
    }

    /// Returns when an errand has been delivered that had been taken, if there was one.
    pub fn await_one(&self) {
        if self.help() {
            // It may be one that the caller does not ask for now.
            self.ring();
            return;
        }
        let mut lists = self.lists();
        if !lists.at_work {
            return;
        }
        // It may be waiting for a processor behind whoever computes: that would be milliseconds.
        let thread = self.thread.get().copied();
        thread.inspect(|thread| hurry(*thread, true));
        while lists.at_work {
            lists = self.delivered.wait(lists).unwrap_or_else(PoisonError::into_inner);
        }
        drop(lists);
        thread.inspect(|thread| hurry(*thread, false));
    }

    /// Finishes everything, and lets [`Self::run`] return.
    pub fn close(&self) {
        self.lists().closed = true;
        self.news.notify_all();
        while self.help() {}
        self.await_one();
    }

    /// Becomes readable anew with each errand that is delivered: to be watched for edges, or read
    /// by [`Self::heard`].
    #[must_use]
    pub fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }

    /// Stills the bell.
    pub fn heard(&self) {
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
    }

    /// Rings the bell: there is something for the pager to take.
    pub fn ring(&self) {
        // Fails only when it has counted to 2^64.
        let _ = rustix::io::write(&self.bell, &1u64.to_le_bytes());
    }

    fn next(&self) -> Option<Load> {
        let mut lists = self.lists();
        loop {
            if lists.closed {
                return None;
            }
            if let Some(load) = lists.pop() {
                lists.at_work = true;
                return Some(load);
            }
            lists = self.news.wait(lists).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lists(&self) -> MutexGuard<'_, Lists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, Sender, channel};

    use farmem_region::{Frames, Lent};

    use super::*;
    use crate::{Features, Uffd};

    /// Adds a page's first bytes, or counts it up.
    struct Sum {
        pages: usize,
        fills: bool,
        /// Told that it has begun, and waited for then.
        gate: Option<(Sender<()>, Receiver<()>)>,
        sum: u64,
        result: Sender<u64>,
    }

    impl Errand for Sum {
        fn run(&mut self, frames: &mut dyn Lent) {
            if let Some((begun, gate)) = self.gate.take() {
                begun.send(()).unwrap();
                gate.recv().unwrap();
            }
            if self.fills {
                let mut slices = Vec::new();
                frames.gather_mut(0..self.pages, &mut slices);
                slices.iter_mut().for_each(|slice| slice.fill(3));
            }
            self.sum = (0..self.pages).map(|at| u64::from(frames.bytes(at)[9])).sum();
        }

        fn deliver(self: Box<Self>) {
            self.result.send(self.sum).unwrap();
        }
    }

    fn errand(pages: usize, fills: bool) -> (Box<Sum>, Receiver<u64>) {
        let (result, results) = channel();
        (Box::new(Sum { pages, fills, gate: None, sum: 0, result }), results)
    }

    fn ids(range: std::ops::Range<u32>) -> Vec<FrameId> {
        range.map(FrameId::new).collect()
    }

    /// A scratch area of one window with 16 pages.
    fn scratch() -> Option<(Uffd, Scratch)> {
        let uffd = Uffd::new(Features::FaultsOnly).ok()?;
        let mut scratch = Scratch::new(&uffd, 1).unwrap();
        assert_eq!(scratch.populate(&uffd, FrameId::new(0), 16), 16);
        Some((uffd, scratch))
    }

    fn panics(what: impl FnOnce()) -> bool {
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(what)).is_err()
    }

    #[test]
    fn without_a_thread_nothing_is_taken() {
        let Some((uffd, mut scratch)) = scratch() else { return };
        let porter = Porter::new().unwrap();
        let (sum, _results) = errand(4, false);
        assert!(porter.take(&mut scratch, &ids(0..4), Loan::Read, sum).is_err());
        porter.await_one();
        scratch.bytes_mut(FrameId::new(0))[9] = 1;
        scratch.release(&uffd);
    }

    #[test]
    fn errands_are_run_and_the_frames_come_back() {
        let Some((uffd, mut scratch)) = scratch() else { return };
        let porter = Arc::new(Porter::new().unwrap());
        let worker = Arc::clone(&porter);
        let thread = std::thread::spawn(move || worker.run());
        while !porter.runs.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        let (fill, filled) = errand(8, true);
        assert!(porter.take(&mut scratch, &ids(0..8), Loan::Fill, fill).is_ok());
        assert_eq!(filled.recv().unwrap(), 24);
        scratch.bytes_mut(FrameId::new(7))[9] = 4;
        // The first holds the thread up; the second is done by whoever cannot wait for it.
        let (mut slow, slow_result) = errand(8, false);
        let (begin, begun) = channel();
        let (open, gate) = channel();
        slow.gate = Some((begin, gate));
        let (quick, quick_result) = errand(2, false);
        assert!(porter.take(&mut scratch, &ids(0..8), Loan::Read, slow).is_ok());
        begun.recv().unwrap();
        assert!(porter.take(&mut scratch, &ids(8..10), Loan::Read, quick).is_ok());
        let opener = std::thread::spawn(move || {
            assert_eq!(quick_result.recv().unwrap(), 0);
            open.send(()).unwrap();
        });
        porter.await_one();
        porter.await_one();
        assert_eq!(slow_result.try_recv().unwrap(), 25);
        opener.join().unwrap();
        porter.close();
        thread.join().unwrap();
        let (late, _results) = errand(1, false);
        assert!(porter.take(&mut scratch, &ids(0..1), Loan::Read, late).is_err());
        scratch.release(&uffd);
    }

    #[test]
    fn what_is_lent_is_nobody_elses() {
        let Some((uffd, mut scratch)) = scratch() else { return };
        let (read, fill) = (FrameId::new(0), FrameId::new(1));
        let to_read = scratch.lend(&[read], Loan::Read);
        let mut to_fill = scratch.lend(&[fill], Loan::Fill);
        assert_eq!(scratch.bytes(read)[0], 0);
        assert!(panics(|| _ = scratch.bytes(fill)));
        assert!(panics(|| scratch.gather(&[fill], &mut Vec::new())));
        for frame in [read, fill] {
            assert!(panics(|| _ = scratch.bytes_mut(frame)));
            assert!(panics(|| scratch.gather_mut(&[frame], &mut Vec::new())));
            assert!(panics(|| _ = scratch.lend(&[frame], Loan::Read)));
            assert!(panics(|| _ = scratch.move_in(&uffd, 0x1000, frame, 1)));
        }
        assert!(panics(|| scratch.release(&uffd)), "the area is in use");
        to_fill.gather_mut(0..1, &mut Vec::new());
        let mut to_read = to_read;
        assert!(panics(|| to_read.gather_mut(0..1, &mut Vec::new())));
        drop((to_read, to_fill));
        scratch.bytes_mut(fill)[0] = 1;
        scratch.release(&uffd);
    }
}
