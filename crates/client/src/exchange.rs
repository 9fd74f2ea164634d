//! One request after another to a store that does not wait.

use std::os::fd::BorrowedFd;
use std::time::Instant;

use farmem_region::{
    Completion, Frames, Nanos, Outcome, PageStore, Readiness, Request, StoreError, Ticket,
};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::ProgramStore;

/// A store and what is needed to wait for it.
#[derive(Debug)]
pub(crate) struct Exchange {
    pub(crate) store: ProgramStore,
    started: Instant,
    last: u64,
    done: Vec<Completion>,
}

/// The first number of our tickets: those of a pager that used the store before are far below.
const TICKETS_FROM: u64 = 1 << 62;

impl Exchange {
    pub(crate) fn new(store: ProgramStore) -> Self {
        Self { store, started: Instant::now(), last: TICKETS_FROM, done: Vec::new() }
    }

    /// Sends a request and waits for its end.
    pub(crate) fn ask(
        &mut self,
        request: Request<'_>,
        frames: &mut dyn Frames,
    ) -> Result<Outcome, StoreError> {
        self.last += 1;
        let ticket = Ticket(self.last);
        loop {
            match self.store.submit(ticket, request) {
                Err(StoreError::Busy { .. }) => self.advance(frames)?,
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        loop {
            self.done.clear();
            self.store.advance(self.now(), frames, &mut self.done)?;
            if let Some(at) = self.done.iter().position(|done| done.ticket == ticket) {
                return self.done.swap_remove(at).result;
            }
            self.wait();
        }
    }

    fn advance(&mut self, frames: &mut dyn Frames) -> Result<(), StoreError> {
        self.done.clear();
        self.store.advance(self.now(), frames, &mut self.done)?;
        self.wait();
        Ok(())
    }

    fn now(&self) -> Nanos {
        Nanos::new(u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }

    fn wait(&self) {
        let readiness = self.store.readiness();
        let nanos = readiness.deadline.map(|deadline| deadline.since(self.now()));
        wait_for(&mut poll_store(self.store.descriptor(), readiness), nanos);
    }
}

/// What to poll of a store.
pub(crate) fn poll_store(
    descriptor: Option<BorrowedFd<'_>>,
    readiness: Readiness,
) -> Vec<PollFd<'_>> {
    let mut flags = PollFlags::IN;
    if readiness.wants_write {
        flags |= PollFlags::OUT;
    }
    descriptor.map(|fd| PollFd::from_borrowed_fd(fd, flags)).into_iter().collect()
}

/// Waits until one is ready, or the time is over; a signal ends it too.
pub(crate) fn wait_for(fds: &mut [PollFd<'_>], nanos: Option<u64>) {
    let timeout = nanos.map(|nanos| Timespec {
        tv_sec: i64::try_from(nanos / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: (nanos % 1_000_000_000).cast_signed(),
    });
    let _ = rustix::event::poll(fds, timeout.as_ref());
}
