//! The waist: [`PageStore`].
//!
//! A store is an engine with a non-blocking driver folded in: `submit` queues a request and
//! returns at once, `advance` moves bytes as far as they go without waiting and reports what
//! finished. The caller waits on [`Readiness`]. Page contents never pass through the trait:
//! requests name frames, and the store reads or writes the frames' bytes through [`Frames`].

use std::io::IoSliceMut;
use std::ops::Range;
use std::os::fd::RawFd;

use crate::{FrameId, Nanos, PAGE_SIZE, PageCount, PageIndex, PageRange, Version};

/// Local memory that holds pages on their way in or out.
///
/// A frame named in a request belongs to the store until that request's completion: the caller
/// may read it meanwhile, and must not change, move or reuse it.
pub trait Frames {
    /// The bytes of a frame.
    fn bytes(&self, frame: FrameId) -> &[u8; PAGE_SIZE];

    /// The bytes of a frame, to fill.
    fn bytes_mut(&mut self, frame: FrameId) -> &mut [u8; PAGE_SIZE];

    /// Appends to `slices` buffers that together cover `frames` in their order; frames that lie
    /// side by side in memory share one slice. Panics if a frame is named twice.
    fn gather_mut<'a>(&'a mut self, frames: &[FrameId], slices: &mut Vec<IoSliceMut<'a>>);

    /// Appends to `slices` buffers that together cover `frames` in their order, to send.
    fn gather<'a>(&'a self, frames: &[FrameId], slices: &mut Vec<std::io::IoSlice<'a>>);

    /// Whether [`Frames::lend`] would find somebody for an errand now.
    fn would_lend(&self, _loan: Loan) -> bool {
        false
    }

    /// Lends frames, no two the same, to another thread that runs an errand on them, if there is
    /// one. Until the errand is delivered, frames lent to be filled may not be used at all, those
    /// lent to be read may be read.
    ///
    /// # Errors
    /// The errand, if nobody takes it: the caller runs it itself, on [`Frames::bytes`].
    fn lend(
        &mut self,
        _frames: &[FrameId],
        _loan: Loan,
        errand: Box<dyn Errand>,
    ) -> Result<(), Box<dyn Errand>> {
        Err(errand)
    }
}

/// What frames are lent for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loan {
    /// To be filled. Somebody may come to wait for it: it goes before what is read.
    Fill,
    /// To be read.
    Read,
}

/// Frames that were lent, in the order in which they were named.
pub trait Lent {
    /// The bytes of one.
    fn bytes(&self, at: usize) -> &[u8; PAGE_SIZE];

    /// Appends to `slices` buffers that together cover some of them in their order, to read.
    fn gather<'a>(&'a self, range: Range<usize>, slices: &mut Vec<std::io::IoSlice<'a>>);

    /// Appends to `slices` buffers that together cover some of them in their order, to fill. Panics
    /// if they were lent to be read.
    fn gather_mut<'a>(&'a mut self, range: Range<usize>, slices: &mut Vec<IoSliceMut<'a>>);
}

/// Work on the content of frames that need not be done by the thread that answers faults.
pub trait Errand: Send {
    /// Does it. Must not wait for anything that the lender does.
    fn run(&mut self, frames: &mut dyn Lent);

    /// Gives the result back to whoever waits for it; the frames are the lender's again.
    fn deliver(self: Box<Self>);
}

/// Names a request in its completion. Chosen by the caller; the store only repeats it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// One page to fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchPage {
    /// Which page of the region.
    pub page: PageIndex,
    /// The version that the caller stored last; any other one is an error.
    pub version: Version,
    /// Where the content goes.
    pub frame: FrameId,
}

/// One page to store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StorePage {
    /// Which page of the region.
    pub page: PageIndex,
    /// Greater than the page's version so far.
    pub version: Version,
    /// Where the content is.
    pub frame: FrameId,
}

/// What a caller asks of a store.
#[derive(Debug, Clone, Copy)]
pub enum Request<'a> {
    /// Bring pages into frames. On success every frame holds exactly the version asked for,
    /// checked against its checksum.
    Fetch(&'a [FetchPage]),
    /// As [`Request::Fetch`], of pages that no thread waits for yet.
    FetchAhead(&'a [FetchPage]),
    /// Keep pages. On success every current member of each page's resiliency set has acknowledged
    /// it: only now may the local copy be dropped (the commit point).
    Store(&'a [StorePage]),
    /// Forget pages; reading them later is an error. Ranges that hold nothing are fine.
    Release(&'a [PageRange]),
    /// Make the region this many pages larger. Completes with [`Outcome::Grown`].
    Grow(PageCount),
}

/// How a request that succeeded ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The frames hold the pages. `server_nanos` is the time the server itself reports for the
    /// request, 0 if it does not.
    Fetched {
        /// Time spent in the server, as it reports it.
        server_nanos: u64,
    },
    /// The pages are kept.
    Stored,
    /// The pages are forgotten.
    Released,
    /// The region has now this many pages.
    Grown {
        /// Pages of the region that may be used: indices `0..pages`.
        pages: PageCount,
    },
}

/// The end of one request.
#[derive(Debug)]
pub struct Completion {
    /// The request.
    pub ticket: Ticket,
    /// How it ended. After an error the contents of the request's frames are undefined for a
    /// fetch, and unchanged for a store.
    pub result: Result<Outcome, StoreError>,
}

/// What a store waits for, to be given to poll or epoll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readiness {
    /// Descriptor whose readiness calls for `advance`; `None` while there is none (reconnecting).
    pub descriptor: Option<RawFd>,
    /// Whether the store has bytes that did not fit in the descriptor: wait for writable too.
    pub wants_write: bool,
    /// When `advance` must be called even if nothing became ready (heartbeats, time-outs).
    pub deadline: Option<Nanos>,
}

/// Keeps the pages of one region.
pub trait PageStore {
    /// Queues a request. Requests on the same page take effect in the order of their submission.
    /// Fails if the store is closed (see [`StoreError`]) or a named limit of it is reached
    /// ([`StoreError::Busy`]: advance, then try again).
    fn submit(&mut self, ticket: Ticket, request: Request<'_>) -> Result<(), StoreError>;

    /// Sends and receives as much as goes without waiting, and appends what finished to `done`.
    /// An error here is final: the store has failed closed and every later call repeats it.
    fn advance(
        &mut self,
        now: Nanos,
        frames: &mut dyn Frames,
        done: &mut Vec<Completion>,
    ) -> Result<(), StoreError>;

    /// What to wait for before the next `advance`.
    fn readiness(&self) -> Readiness;
}

/// Why a store cannot do what was asked. Every message says what happened and where; the ones a
/// person must act on say what to do.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum StoreError {
    /// The named limit on queued requests is reached.
    #[error("the store's queue is full ({limit} requests)")]
    Busy {
        /// The limit.
        limit: usize,
    },
    /// The server has no room for what was asked.
    #[error(
        "memory server {server} is full: asked for {asked} bytes, {free} bytes are free; start it \
         with more --memory, name another server, or give --spill DIR"
    )]
    Full {
        /// The server, as the user named it.
        server: String,
        /// Bytes asked for.
        asked: u64,
        /// Bytes that the server could still grant.
        free: u64,
    },
    /// The server is gone (closed, silent or restarted) and with it the region.
    #[error("lost memory server {server} and with it {region}: {reason}")]
    Lost {
        /// The server, as the user named it.
        server: String,
        /// What was lost, for example `region 7 (262144 pages)`.
        region: String,
        /// What was seen.
        reason: String,
    },
    /// The server returned a page that is not the one that was stored.
    #[error(
        "memory server {server} returned a wrong page: page {page} version {version}: {reason}; \
         it was not used"
    )]
    WrongPage {
        /// The server, as the user named it.
        server: String,
        /// Page of the region.
        page: u64,
        /// Version that was expected.
        version: u64,
        /// What did not match.
        reason: String,
    },
    /// The disk that takes what the server has no room for has none either.
    #[error(
        "no room on the disk of the spill directory {directory}: {reason} (asked for {asked} \
         bytes); free some there, name a directory on a larger disk with --spill DIR, or start \
         the memory server with more --memory"
    )]
    DiskFull {
        /// The directory.
        directory: String,
        /// Bytes asked for.
        asked: u64,
        /// What the system said.
        reason: String,
    },
    /// The disk that takes what the server has no room for fails, or returned something else
    /// than was stored there.
    #[error("the spill directory {directory} fails: {reason}")]
    Disk {
        /// The directory.
        directory: String,
        /// What was seen.
        reason: String,
    },
    /// The server refused the request.
    #[error("memory server {server} refused: {reason}")]
    Refused {
        /// The server, as the user named it.
        server: String,
        /// The refusal's code and text.
        reason: String,
    },
}
