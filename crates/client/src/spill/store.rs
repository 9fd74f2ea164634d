//! [`SpillStore`]: sends each part of a request to where its pages are.

use std::collections::{HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::path::Path;

use farmem_region::{
    Completion, ExternalAddress, FetchPage, Frames, Nanos, Outcome, PAGE_SIZE, PageCount,
    PageIndex, PageRange, PageStore, Readiness, Request, StoreError, StorePage, Ticket,
};
use farmem_remote::{RegionMap, RemoteConfig, RemoteStore, SessionInfo};

use super::file::SpillFile;

/// A store with a file beside it for what the store has no room for. Without a file it is the
/// store alone, which grows by what it has left where it has less than was asked for.
#[derive(Debug)]
pub struct SpillStore<S> {
    pub(super) inner: S,
    pub(super) file: Option<SpillFile>,
    /// Pages of the region in `inner`. Does not change any more once the file has pages.
    boundary: u64,
    /// Pages that the server granted at the start: some may lie beyond the boundary still.
    granted: PageCount,
    /// Growth asked of `inner`.
    growing: Option<(Ticket, PageCount)>,
    /// What the file has to do, in the order in which it was asked.
    local: VecDeque<(Ticket, Local)>,
    /// Requests of which both sides have a part; the result of the side that is done.
    halves: HashMap<Ticket, Option<Result<Outcome, StoreError>>>,
    /// The inner part of a request, kept for the next one.
    inner_fetch: Vec<FetchPage>,
    inner_store: Vec<StorePage>,
    inner_release: Vec<PageRange>,
}

/// A request to the file.
#[derive(Debug)]
enum Local {
    Fetch(Vec<FetchPage>),
    Store(Vec<StorePage>),
    Release(Vec<PageRange>),
    Grow(PageCount),
}

/// The store of one program: a memory server, with a file if it was given a directory.
pub type ProgramStore = SpillStore<RemoteStore>;

impl ProgramStore {
    /// Connects to the memory server, and makes a file in `spill` if that is given. Waits, at
    /// most for the configured time-out.
    ///
    /// # Errors
    /// Those of [`RemoteStore::connect`], and [`StoreError::Disk`] if the directory cannot be
    /// used.
    pub fn connect(
        config: RemoteConfig,
        spill: Option<&Path>,
        now: Nanos,
    ) -> Result<(Self, SessionInfo), StoreError> {
        let file = spill.map(SpillFile::create).transpose()?;
        let (remote, session) = RemoteStore::connect(config, now)?;
        let granted = session.granted.pages_rounded_up();
        Ok((Self { granted, ..Self::new(remote, session.pages, file) }, session))
    }

    /// Attaches to a named region of a memory server: see [`RemoteStore::open`].
    ///
    /// # Errors
    /// Those of [`RemoteStore::open`].
    pub fn open(
        config: RemoteConfig,
        name: &str,
        now: Nanos,
    ) -> Result<(Self, SessionInfo, RegionMap), StoreError> {
        let (remote, session, map) = RemoteStore::open(config, name, now)?;
        Ok((Self::new(remote, session.pages, None), session, map))
    }

    /// The descriptor that [`PageStore::readiness`] names.
    #[must_use]
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.inner.descriptor()
    }

    /// Where the region's first block is on the memory server: see [`RemoteStore::base`].
    #[must_use]
    pub const fn base(&self) -> Option<ExternalAddress> {
        self.inner.base()
    }

    /// Whether nobody else can have changed the region: see [`RemoteStore::is_own`].
    #[must_use]
    pub const fn is_own(&self, now: Nanos) -> bool {
        self.inner.is_own(now)
    }

    /// The session on the memory server.
    #[must_use]
    pub const fn session(&self) -> &SessionInfo {
        self.inner.session()
    }

    /// Ends the session, which frees the region; the file goes too. Waits, at most for one
    /// attempt's time-out.
    ///
    /// # Errors
    /// Those of [`RemoteStore::disconnect`].
    pub fn disconnect(self) -> Result<(), StoreError> {
        self.inner.disconnect()
    }
}

impl<S: PageStore> SpillStore<S> {
    /// Puts a file beside a store in which the region has `pages` pages so far.
    #[must_use]
    pub fn new(inner: S, pages: PageCount, file: Option<SpillFile>) -> Self {
        Self {
            inner,
            file,
            boundary: pages.get(),
            granted: pages,
            growing: None,
            local: VecDeque::new(),
            halves: HashMap::new(),
            inner_fetch: Vec::new(),
            inner_store: Vec::new(),
            inner_release: Vec::new(),
        }
    }

    /// Pages of the region that lie in the inner store.
    #[must_use]
    pub const fn kept_inside(&self) -> PageCount {
        PageCount::new(self.boundary)
    }

    /// Pages of the region that lie in the file, used or not.
    #[must_use]
    pub fn spilled(&self) -> PageCount {
        self.file.as_ref().map_or(PageCount::new(0), SpillFile::pages)
    }

    fn has_spilled(&self) -> bool {
        self.spilled() > PageCount::new(0)
    }

    /// Sends the two parts of a request off; `inner` is the one for the server, if it has any.
    fn submit_parts(
        &mut self,
        ticket: Ticket,
        inner: Option<Request<'_>>,
        local: Option<Local>,
    ) -> Result<(), StoreError> {
        if let Some(request) = inner {
            self.inner.submit(ticket, request)?;
            if local.is_some() {
                self.halves.insert(ticket, None);
            }
        }
        self.local.extend(local.map(|local| (ticket, local)));
        Ok(())
    }

    fn submit_fetch(&mut self, ticket: Ticket, pages: &[FetchPage]) -> Result<(), StoreError> {
        let inside = |page: PageIndex| page.get() < self.boundary;
        let mut ours = std::mem::take(&mut self.inner_fetch);
        ours.clear();
        ours.extend(pages.iter().filter(|fetch| inside(fetch.page)));
        let spilled: Vec<_> = pages.iter().filter(|fetch| !inside(fetch.page)).copied().collect();
        let whole = spilled.is_empty();
        let inner = (whole || !ours.is_empty()).then_some(Request::Fetch(&ours));
        let local = (!whole).then_some(Local::Fetch(spilled));
        let result = self.submit_parts(ticket, inner, local);
        self.inner_fetch = ours;
        result
    }

    fn submit_store(&mut self, ticket: Ticket, pages: &[StorePage]) -> Result<(), StoreError> {
        let inside = |page: PageIndex| page.get() < self.boundary;
        let mut ours = std::mem::take(&mut self.inner_store);
        ours.clear();
        ours.extend(pages.iter().filter(|store| inside(store.page)));
        let spilled: Vec<_> = pages.iter().filter(|store| !inside(store.page)).copied().collect();
        let whole = spilled.is_empty();
        let inner = (whole || !ours.is_empty()).then_some(Request::Store(&ours));
        let local = (!whole).then_some(Local::Store(spilled));
        let result = self.submit_parts(ticket, inner, local);
        self.inner_store = ours;
        result
    }

    fn submit_release(&mut self, ticket: Ticket, ranges: &[PageRange]) -> Result<(), StoreError> {
        let mut ours = std::mem::take(&mut self.inner_release);
        ours.clear();
        let mut spilled = Vec::new();
        for range in ranges {
            let start = range.start.get();
            let before = self.boundary.saturating_sub(start).min(range.count.get());
            let after = range.count.get() - before;
            if before > 0 {
                ours.push(PageRange { start: range.start, count: PageCount::new(before) });
            }
            if after > 0 {
                let start = PageIndex::new(start + before);
                spilled.push(PageRange { start, count: PageCount::new(after) });
            }
        }
        let whole = spilled.is_empty();
        let inner = (whole || !ours.is_empty()).then_some(Request::Release(&ours));
        let local = (!whole).then_some(Local::Release(spilled));
        let result = self.submit_parts(ticket, inner, local);
        self.inner_release = ours;
        result
    }

    fn submit_grow(&mut self, ticket: Ticket, count: PageCount) -> Result<(), StoreError> {
        if self.has_spilled() {
            self.local.push_back((ticket, Local::Grow(count)));
            return Ok(());
        }
        if self.growing.is_some() {
            // The boundary must be known before more is asked for.
            return Err(StoreError::Busy { limit: 1 });
        }
        self.inner.submit(ticket, Request::Grow(count))?;
        self.growing = Some((ticket, count));
        Ok(())
    }

    /// What the inner store has finished: takes out what only half finishes a request, and turns
    /// a refused growth into a smaller one, or one of the file.
    fn sort_completions(&mut self, done: &mut Vec<Completion>, from: usize) {
        if self.growing.is_none() && self.halves.is_empty() {
            return;
        }
        let arrived: Vec<_> = done.drain(from..).collect();
        for completion in arrived {
            let ticket = completion.ticket;
            if let Some((_, count)) = self.growing.take_if(|growing| growing.0 == ticket) {
                match &completion.result {
                    Ok(Outcome::Grown { pages }) => self.boundary = pages.get(),
                    Err(StoreError::Full { free, .. })
                        if self.grow_by_what_is_left(ticket, count, *free) =>
                    {
                        continue;
                    }
                    _ => {}
                }
            }
            self.finish(ticket, completion.result, done);
        }
    }

    /// The inner store has no room for a growth: it gives what it has, or the file all of it. False if
    /// neither has any.
    fn grow_by_what_is_left(&mut self, ticket: Ticket, count: PageCount, free_bytes: u64) -> bool {
        let granted = self.granted.get().saturating_sub(self.boundary);
        let left = PageCount::new(free_bytes / PAGE_SIZE as u64 + granted);
        // Less each time, or it would be asked for ever.
        let worth = left > PageCount::new(0) && left < count;
        if worth && self.inner.submit(ticket, Request::Grow(left)).is_ok() {
            self.growing = Some((ticket, left));
            return true;
        }
        if self.file.is_some() {
            self.local.push_back((ticket, Local::Grow(count)));
        }
        self.file.is_some()
    }

    /// One side is done; the request is if it has no other side, or that is done too.
    fn finish(
        &mut self,
        ticket: Ticket,
        result: Result<Outcome, StoreError>,
        done: &mut Vec<Completion>,
    ) {
        let result = match self.halves.get_mut(&ticket) {
            None => result,
            Some(first @ None) => {
                *first = Some(result);
                return;
            }
            Some(Some(_)) => match self.halves.remove(&ticket).flatten() {
                Some(first) => first.and_then(|one| result.map(|other| join(one, other))),
                None => result,
            },
        };
        done.push(Completion { ticket, result });
    }

    fn work_on_file(&mut self, frames: &mut dyn Frames, done: &mut Vec<Completion>) {
        while let Some((ticket, local)) = self.local.pop_front() {
            let Some(file) = &mut self.file else { return };
            let boundary = self.boundary;
            let result = match local {
                Local::Fetch(pages) => file
                    .fetch(boundary, &pages, frames)
                    .map(|()| Outcome::Fetched { server_nanos: 0 }),
                Local::Store(pages) => {
                    file.store(boundary, &pages, frames).map(|()| Outcome::Stored)
                }
                Local::Release(ranges) => ranges
                    .into_iter()
                    .try_for_each(|range| file.release(boundary, range))
                    .map(|()| Outcome::Released),
                Local::Grow(count) => file.grow(count).map(|()| {
                    let pages = PageCount::new(boundary + file.pages().get());
                    Outcome::Grown { pages }
                }),
            };
            self.finish(ticket, result, done);
        }
    }
}

/// The outcome of a request from those of its two parts.
fn join(one: Outcome, other: Outcome) -> Outcome {
    match (one, other) {
        (Outcome::Fetched { server_nanos: a }, Outcome::Fetched { server_nanos: b }) => {
            Outcome::Fetched { server_nanos: a + b }
        }
        (outcome, _) => outcome,
    }
}

impl<S: PageStore> PageStore for SpillStore<S> {
    fn submit(&mut self, ticket: Ticket, request: Request<'_>) -> Result<(), StoreError> {
        match request {
            Request::Grow(count) => self.submit_grow(ticket, count),
            _ if !self.has_spilled() => self.inner.submit(ticket, request),
            Request::Fetch(pages) | Request::FetchAhead(pages) => self.submit_fetch(ticket, pages),
            Request::Store(pages) => self.submit_store(ticket, pages),
            Request::Release(ranges) => self.submit_release(ticket, ranges),
        }
    }

    fn advance(
        &mut self,
        now: Nanos,
        frames: &mut dyn Frames,
        done: &mut Vec<Completion>,
    ) -> Result<(), StoreError> {
        let from = done.len();
        self.inner.advance(now, frames, done)?;
        self.sort_completions(done, from);
        self.work_on_file(frames, done);
        Ok(())
    }

    fn readiness(&self) -> Readiness {
        let mut readiness = self.inner.readiness();
        if !self.local.is_empty() {
            readiness.deadline = Some(Nanos::new(0));
        }
        readiness
    }
}
