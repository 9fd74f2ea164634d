//! [`Keeper`]: a store and a thread that looks after its connection while no operation does. A server that hands
//! over, or goes on where it was killed, frees what nobody asks for within the time-out of a session.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use farmem_region::PageStore;
use rustix::event::{EventfdFlags, PollFd, PollFlags};

use crate::exchange::{now, wait_for};
use crate::frames::HeapFrames;
use crate::spill::ProgramStore;

/// Without a descriptor to spare the connection is looked at this often.
const LOOK_NANOS: u64 = 1_000_000_000;
/// A store does not look twice within this time at a connection from which it expects nothing.
const PAUSE_NANOS: u64 = 1_000_000;

/// A store that operations and the thread take turns at. The thread ends with this.
#[derive(Debug)]
pub(crate) struct Keeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    kept: Mutex<Kept>,
    /// Calls the thread to look anew.
    bell: OwnedFd,
}

#[derive(Debug, Default)]
struct Kept {
    store: Option<ProgramStore>,
    ends: bool,
}

/// The store, for one operation; it is not lent. Whoever has it leaves nothing under way.
#[derive(Debug)]
pub(crate) struct Turn<'a>(MutexGuard<'a, Kept>);

impl Turn<'_> {
    pub(crate) fn store(&mut self) -> &mut ProgramStore {
        match &mut self.0.store {
            Some(store) => store,
            None => unreachable!("no operation goes on while it is lent"),
        }
    }
}

impl Keeper {
    /// The thread alone: what can fail goes before there is a store.
    pub(crate) fn start() -> io::Result<Self> {
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { kept: Mutex::default(), bell });
        let ours = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("farmem-keeper".to_owned())
            .spawn(move || keep(&ours))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub(crate) fn hold(&self, store: ProgramStore) {
        self.shared.kept().store = Some(store);
        self.ring();
    }

    pub(crate) fn turn(&self) -> Turn<'_> {
        Turn(self.shared.kept())
    }

    /// Has the thread look anew: another connection was made.
    pub(crate) fn ring(&self) {
        // Any number but zero rings; refused only if it rings already.
        let _ = rustix::io::write(&self.shared.bell, &1u64.to_le_bytes());
    }

    /// Gives the store away, until it is held again.
    pub(crate) fn lend(&self) -> Option<ProgramStore> {
        self.shared.kept().store.take()
    }

    /// Ends the thread and gives the store back.
    pub(crate) fn end(&mut self) -> Option<ProgramStore> {
        let store = {
            let mut kept = self.shared.kept();
            kept.ends = true;
            kept.store.take()
        };
        self.ring();
        if let Some(thread) = self.thread.take() {
            // One that has failed has said so.
            let _ = thread.join();
        }
        store
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread, until the keeper or its store is at its end.
fn keep(shared: &Shared) {
    let (mut nobodys, mut done) = (HeapFrames::new(0), Vec::new());
    loop {
        let watch = {
            let mut kept = shared.kept();
            if kept.ends {
                return;
            }
            match &mut kept.store {
                None => Watch { descriptor: None, flags: PollFlags::empty(), nanos: None },
                Some(store) => {
                    // The next operation is told.
                    if store.advance(now(), &mut nobodys, &mut done).is_err() {
                        return;
                    }
                    Watch::of(store)
                }
            }
        };
        watch.wait(&shared.bell);
    }
}

/// What the thread waits for while operations have the store.
#[derive(Debug)]
struct Watch {
    /// The store may close its own meanwhile.
    descriptor: Option<OwnedFd>,
    flags: PollFlags,
    nanos: Option<u64>,
}

impl Watch {
    /// Of a connection from which nothing is expected only the end counts: replies are for operations, and
    /// wake nobody else.
    fn of(store: &ProgramStore) -> Self {
        let readiness = store.readiness();
        let flags = match (readiness.deadline, readiness.wants_write) {
            (None, _) => PollFlags::RDHUP,
            (Some(_), false) => PollFlags::IN,
            (Some(_), true) => PollFlags::IN | PollFlags::OUT,
        };
        let descriptor =
            store.descriptor().and_then(|fd| rustix::io::fcntl_dupfd_cloexec(fd, 0).ok());
        let look = descriptor.is_none().then_some(LOOK_NANOS);
        let due = readiness.deadline.map(|deadline| deadline.since(now()));
        Self { descriptor, flags, nanos: due.into_iter().chain(look).min() }
    }

    fn wait(&self, bell: &OwnedFd) {
        let ring = PollFd::new(bell, PollFlags::IN);
        let mut fds = vec![ring.clone()];
        fds.extend(
            self.descriptor.as_ref().map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), self.flags)),
        );
        wait_for(&mut fds, self.nanos);
        let has_ended = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        if has_ended && self.flags == PollFlags::RDHUP {
            wait_for(&mut [ring], Some(PAUSE_NANOS));
        }
        let mut number = [0; 8];
        // Empty unless it rang.
        let _ = rustix::io::read(bell, &mut number);
    }
}
