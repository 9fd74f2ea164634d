//! A store with its frames and a clock, driven to the end of each request.

use std::time::{Duration, Instant};

use farmem_region::{
    ByteCount, Completion, FetchPage, FrameId, Nanos, Outcome, PageCount, PageIndex, PageStore,
    Request, StoreError, StorePage, Ticket, Version,
};
use farmem_remote::{RemoteConfig, RemoteStore, SessionInfo};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::frames::PlainFrames;

/// A store and all that its caller has.
pub(crate) struct Client {
    pub(crate) store: RemoteStore,
    pub(crate) frames: PlainFrames,
    pub(crate) done: Vec<Completion>,
    began: Instant,
    next_ticket: u64,
    /// Whether to wait by polling the store instead of the descriptor.
    pub(crate) polls: bool,
}

impl Client {
    pub(crate) fn connect(config: RemoteConfig, frames: usize) -> Result<Self, StoreError> {
        let (store, _) = RemoteStore::connect(config, Nanos::new(0))?;
        Ok(Self::of(store, frames))
    }

    /// A store of a region with a name.
    pub(crate) fn open(
        config: RemoteConfig,
        name: &str,
        frames: usize,
    ) -> Result<Self, StoreError> {
        let (store, _, _) = RemoteStore::open(config, name, Nanos::new(0))?;
        Ok(Self::of(store, frames))
    }

    fn of(store: RemoteStore, frames: usize) -> Self {
        Self {
            store,
            frames: PlainFrames::new(frames),
            done: Vec::new(),
            began: Instant::now(),
            next_ticket: 0,
            polls: false,
        }
    }

    pub(crate) fn session(&self) -> SessionInfo {
        self.store.session().clone()
    }

    pub(crate) fn now(&self) -> Nanos {
        Nanos::new(u64::try_from(self.began.elapsed().as_nanos()).unwrap())
    }

    pub(crate) fn submit(&mut self, request: Request<'_>) -> Result<Ticket, StoreError> {
        self.next_ticket += 1;
        let ticket = Ticket(self.next_ticket);
        self.store.submit(ticket, request).map(|()| ticket)
    }

    pub(crate) fn advance(&mut self) -> Result<(), StoreError> {
        let now = self.now();
        self.store.advance(now, &mut self.frames, &mut self.done)
    }

    /// Waits until something is ready or the store's own deadline.
    pub(crate) fn wait(&self) {
        if self.polls {
            std::thread::yield_now();
            return;
        }
        let readiness = self.store.readiness();
        let nanos = readiness.deadline.map_or(1_000_000_000, |due| due.since(self.now()));
        let wait = Duration::from_nanos(nanos.min(1_000_000_000));
        let timeout =
            Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
        let interest =
            if readiness.wants_write { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        match readiness.descriptor {
            None => std::thread::sleep(wait),
            Some(raw) => {
                let fd = self.store.descriptor().expect("the readiness names one");
                assert_eq!(std::os::fd::AsRawFd::as_raw_fd(&fd), raw);
                let _ = poll(&mut [PollFd::from_borrowed_fd(fd, interest)], Some(&timeout));
            }
        }
    }

    /// Waits for something from the server, if the store waits for that, for which it is `now`.
    pub(crate) fn wait_for_reply(&self, now: Nanos) {
        let deadline = self.store.readiness().deadline;
        if deadline.is_none_or(|deadline| deadline.since(now) < 10_000_000) {
            return;
        }
        let fd = self.store.descriptor().expect("it is connected");
        let timeout = Timespec { tv_sec: 1, tv_nsec: 0 };
        let _ = poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], Some(&timeout));
    }

    /// Drives the store until a request has ended.
    pub(crate) fn finish(&mut self, ticket: Ticket) -> Result<Outcome, StoreError> {
        loop {
            if let Some(at) = self.done.iter().position(|done| done.ticket == ticket) {
                return self.done.swap_remove(at).result;
            }
            if let Err(error) = self.advance() {
                let at = self.done.iter().position(|done| done.ticket == ticket);
                return at.map_or(Err(error), |at| self.done.swap_remove(at).result);
            }
            if self.done.is_empty() {
                self.wait();
            }
        }
    }

    pub(crate) fn run(&mut self, request: Request<'_>) -> Result<Outcome, StoreError> {
        let ticket = self.submit(request)?;
        self.finish(ticket)
    }

    pub(crate) fn grow(&mut self, pages: u64) -> Result<PageCount, StoreError> {
        match self.run(Request::Grow(PageCount::new(pages)))? {
            Outcome::Grown { pages } => Ok(pages),
            other => panic!("{other:?}"),
        }
    }

    /// Stores pages `first..` from frames `0..count`.
    pub(crate) fn store(
        &mut self,
        first: u64,
        count: u32,
        version: u64,
    ) -> Result<Outcome, StoreError> {
        self.run(Request::Store(&store_pages(first, count, version)))
    }

    /// Fetches pages `first..` into frames `0..count`.
    pub(crate) fn fetch(
        &mut self,
        first: u64,
        count: u32,
        version: u64,
    ) -> Result<Outcome, StoreError> {
        self.run(Request::Fetch(&fetch_pages(first, count, version)))
    }

    /// Fills frames `0..count` with stamps of pages `first..`.
    pub(crate) fn stamp(&mut self, first: u64, count: u32, version: u64) {
        for (frame, page) in self.frames.0.iter_mut().zip(first..first + u64::from(count)) {
            frame.fill((page * 31 + version) as u8);
            frame[..8].copy_from_slice(&page.to_le_bytes());
            frame[8..16].copy_from_slice(&version.to_le_bytes());
        }
    }

    /// Panics unless frames `0..count` hold the stamps of pages `first..`.
    pub(crate) fn check(&self, first: u64, count: u32, version: u64) {
        for (frame, page) in self.frames.0.iter().zip(first..first + u64::from(count)) {
            assert_eq!(frame[..8], page.to_le_bytes());
            assert_eq!(frame[8..16], version.to_le_bytes());
            assert!(frame[16..].iter().all(|byte| *byte == (page * 31 + version) as u8));
        }
    }
}

pub(crate) fn store_pages(first: u64, count: u32, version: u64) -> Vec<StorePage> {
    let version = Version::new(version);
    (0..count)
        .map(|at| StorePage {
            page: PageIndex::new(first + u64::from(at)),
            version,
            frame: FrameId::new(at),
        })
        .collect()
}

pub(crate) fn fetch_pages(first: u64, count: u32, version: u64) -> Vec<FetchPage> {
    let version = Version::new(version);
    (0..count)
        .map(|at| FetchPage {
            page: PageIndex::new(first + u64::from(at)),
            version,
            frame: FrameId::new(at),
        })
        .collect()
}

/// A configuration that asks for that many mebibytes.
pub(crate) fn config(server: &farmem_transport::Endpoint, mebibytes: u64) -> RemoteConfig {
    RemoteConfig::new(server.clone(), "test", ByteCount::new(mebibytes << 20))
}
