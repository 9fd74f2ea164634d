//! One request after another to a store that does not wait.

use std::os::fd::BorrowedFd;
use std::sync::OnceLock;

use farmem_pager::Pager;
use farmem_region::{
    Completion, ExternalAddress, Frames, Nanos, Outcome, PageStore, Readiness, Request, StoreError,
    Ticket,
};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Pid;

use crate::keeper::Keeper;
use crate::{ProgramStore, RegionError};

/// A store and what is needed to wait for it.
#[derive(Debug)]
pub(crate) struct Exchange {
    keeper: Keeper,
    last: u64,
    done: Vec<Completion>,
    /// The server is lost.
    lost: Option<StoreError>,
}

/// The process that made a region. A forked child has a copy of the value, and a connection in common
/// with it: whatever it sends would be taken for its parent's.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Maker(Pid);

impl Maker {
    /// The calling process.
    pub(crate) fn here() -> Self {
        Self(rustix::process::getpid())
    }

    /// Whether that is the calling process.
    pub(crate) fn is_here(self) -> bool {
        self.0 == rustix::process::getpid()
    }

    pub(crate) fn check(self) -> Result<(), RegionError> {
        if self.is_here() {
            return Ok(());
        }
        Err(RegionError::Forked { maker: self.0.as_raw_nonzero().get() })
    }
}

/// The first number of our tickets: those of a pager that used the store before are far below.
const TICKETS_FROM: u64 = 1 << 62;

impl Exchange {
    pub(crate) fn new(keeper: Keeper, store: ProgramStore) -> Self {
        keeper.hold(store);
        Self { keeper, last: TICKETS_FROM, done: Vec::new(), lost: None }
    }

    /// The store, for who may give it back.
    pub(crate) fn lend_store(&mut self) -> ProgramStore {
        match self.keeper.lend() {
            Some(store) => store,
            None => unreachable!("it is lent once"),
        }
    }

    /// What was lent.
    pub(crate) fn give_back(&mut self, store: ProgramStore) {
        self.keeper.hold(store);
    }

    /// The store, for whoever goes on with it.
    pub(crate) fn into_store(mut self) -> ProgramStore {
        match self.keeper.end() {
            Some(store) => store,
            None => unreachable!("the keeper has it until now"),
        }
    }

    /// Where the region's first block is on the server, and the bytes of the region that lie there.
    pub(crate) fn place(&self) -> Option<(ExternalAddress, u64)> {
        let mut turn = self.keeper.turn();
        let store = turn.store();
        store.base().map(|base| (base, store.kept_inside().bytes().get()))
    }

    /// Says so if the server was found lost, also to those who need not ask it.
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        self.lost.clone().map_or(Ok(()), Err)
    }

    /// Sends a request and waits for its end.
    pub(crate) fn ask(
        &mut self,
        request: Request<'_>,
        frames: &mut dyn Frames,
    ) -> Result<Outcome, StoreError> {
        self.last += 1;
        let mut turn = self.keeper.turn();
        let mut waiting = Waiting { done: &mut self.done, moved: false };
        let result = waiting.ask(turn.store(), Ticket(self.last), request, frames);
        let moved = waiting.moved;
        drop(turn);
        if moved {
            self.keeper.ring();
        }
        if let Err(error @ StoreError::Lost { .. }) = &result {
            self.lost = Some(error.clone());
        }
        result
    }

    /// Makes sure that nobody else has changed a named region up to this call. Costs a round trip if the
    /// server has said nothing for a while.
    pub(crate) fn confirm(&mut self, frames: &mut dyn Frames) -> Result<(), StoreError> {
        if self.keeper.turn().store().is_own(now()) {
            return Ok(());
        }
        // Changes nothing, and is refused if another client has taken over.
        self.ask(Request::Release(&[]), frames).map(|_| ())
    }
}

/// One request under way.
struct Waiting<'a> {
    done: &'a mut Vec<Completion>,
    /// The store has no connection any more, or another one.
    moved: bool,
}

impl Waiting<'_> {
    fn ask(
        &mut self,
        store: &mut ProgramStore,
        ticket: Ticket,
        request: Request<'_>,
        frames: &mut dyn Frames,
    ) -> Result<Outcome, StoreError> {
        loop {
            match store.submit(ticket, request) {
                Err(StoreError::Busy { .. }) => {
                    self.advance(store, frames)?;
                    wait(store);
                }
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        loop {
            self.advance(store, frames)?;
            if let Some(at) = self.done.iter().position(|done| done.ticket == ticket) {
                return self.done.swap_remove(at).result;
            }
            wait(store);
        }
    }

    fn advance(
        &mut self,
        store: &mut ProgramStore,
        frames: &mut dyn Frames,
    ) -> Result<(), StoreError> {
        self.done.clear();
        store.advance(now(), frames, self.done)?;
        self.moved |= store.descriptor().is_none();
        Ok(())
    }
}

fn wait(store: &ProgramStore) {
    let readiness = store.readiness();
    let nanos = readiness.deadline.map(|deadline| deadline.since(now()));
    wait_for(&mut poll_store(store.descriptor(), readiness), nanos);
}

/// The pager's clock, for a store goes from one to the other with the times that it has noted; but it goes on while
/// the machine sleeps: what the server has promised for a time must not be believed for longer.
pub(crate) fn now() -> Nanos {
    static ZERO: OnceLock<u64> = OnceLock::new();
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanos = seconds * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0);
    let pagers = || nanos.saturating_sub(Pager::<ProgramStore>::now().get());
    Nanos::new(nanos.saturating_sub(*ZERO.get_or_init(pagers)))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_changes_hands_does_not_see_another_time() {
        let (ours, pagers) = (now(), Pager::<ProgramStore>::now());
        std::thread::sleep(std::time::Duration::from_millis(5));
        let passed = (now().since(ours), Pager::<ProgramStore>::now().since(pagers));
        assert!(ours.since(pagers).max(pagers.since(ours)) < 1_000_000_000, "{ours:?}, {pagers:?}");
        assert!(passed.0 > 4_000_000 && passed.1 > 4_000_000);
    }
}
