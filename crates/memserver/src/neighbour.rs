//! Regions of other memory servers that regions of this one are made from, and written back to. The
//! server does not speak to others itself: who starts it says how that is done.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use farmem_region::{Incarnation, RegionId};

/// A server that did not answer is not asked again for so long: whoever waits for it meanwhile is
/// refused at once, and keeps no thread.
const AWAY_PAUSE: Duration = Duration::from_millis(500);

/// Who finds that somebody else fetches the page waits for so long; then it looks again. What is
/// fetched is stored at once, so nobody waits that long unless a thread is held up.
const CLAIM_PATIENCE: Duration = Duration::from_millis(200);

/// A named region of another memory server, over a connection of its own.
pub trait DistantRegion: Send {
    /// What tells it from a later region of the same name: the incarnation of its server, and the region's number.
    fn identity(&self) -> (Incarnation, RegionId);

    /// How many bytes it has.
    ///
    /// # Errors
    /// If the other server does not answer in time, or refuses.
    fn size(&mut self) -> io::Result<u64>;

    /// Its bytes, as they are now and as their checksums say.
    ///
    /// # Errors
    /// As [`DistantRegion::size`].
    fn read(&mut self, bytes: Range<u64>) -> io::Result<Vec<u8>>;

    /// Writes bytes: the other server has them once this returns.
    ///
    /// # Errors
    /// As [`DistantRegion::size`].
    fn write(&mut self, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// Makes what was written as durable as the region is there.
    ///
    /// # Errors
    /// As [`DistantRegion::size`].
    fn flush(&mut self) -> io::Result<()>;
}

/// What a connection to a distant region is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Reading what a client waits for.
    Read,
    /// Writing, as its only writer.
    Write,
}

type Connect =
    dyn Fn(&str, &str, Use) -> io::Result<Box<dyn DistantRegion>> + Send + Sync + 'static;

/// How other memory servers are reached.
#[derive(Clone)]
pub struct Neighbours(Arc<Connect>);

impl Neighbours {
    /// By `connect`, which is handed a server's address, a region's name, and what for.
    pub fn new(
        connect: impl Fn(&str, &str, Use) -> io::Result<Box<dyn DistantRegion>> + Send + Sync + 'static,
    ) -> Self {
        Self(Arc::new(connect))
    }
}

impl fmt::Debug for Neighbours {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Neighbours")
    }
}

/// A region of another server.
#[derive(Debug)]
pub(crate) struct Neighbour {
    neighbours: Option<Neighbours>,
    address: String,
    region: String,
    /// Apart, so that who reads does not wait for who writes.
    reads: Mutex<Line>,
    writes: Mutex<Line>,
    /// As it was when it was first open: pages of another one must not be mixed with its.
    first: Mutex<Option<(Incarnation, RegionId)>>,
    /// Whether another one was found in its place.
    is_gone: AtomicBool,
    claims: Arc<Claims>,
}

/// A connection, once it is needed.
#[derive(Default)]
struct Line {
    open: Option<Box<dyn DistantRegion>>,
    /// When the other server did not do what it was asked.
    failed: Option<(Instant, io::ErrorKind, String)>,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Line").field("failed", &self.failed).finish_non_exhaustive()
    }
}

/// Pages that are being fetched, so that who wants one of them too waits instead of asking the other
/// server once more.
#[derive(Debug, Default)]
struct Claims {
    pages: Mutex<HashSet<(RegionId, u64)>>,
    released: Condvar,
}

/// Pages of a region that somebody fetches; until it is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    claims: Arc<Claims>,
    region: RegionId,
    pages: Vec<u64>,
}

impl Claims {
    fn pages(&self) -> MutexGuard<'_, HashSet<(RegionId, u64)>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claimed = self.claims.pages();
        for page in &self.pages {
            claimed.remove(&(self.region, *page));
        }
        self.claims.released.notify_all();
    }
}

impl Neighbour {
    /// Claims pages that are to be fetched for a region; `None` if somebody else fetches one of them.
    pub(crate) fn claim(&self, region: RegionId, pages: &[u64]) -> Option<Claim> {
        let mut claimed = self.claims.pages();
        if pages.iter().any(|page| claimed.contains(&(region, *page))) {
            return None;
        }
        claimed.extend(pages.iter().map(|page| (region, *page)));
        let claims = Arc::clone(&self.claims);
        Some(Claim { claims, region, pages: pages.to_vec() })
    }

    /// Waits until nobody fetches any of these pages, but not for ever. Who waits must not hold a claim,
    /// or two might wait for each other.
    pub(crate) fn wait(&self, region: RegionId, pages: &[u64]) {
        let is_claimed = |claimed: &mut HashSet<(RegionId, u64)>| {
            pages.iter().any(|page| claimed.contains(&(region, *page)))
        };
        let claimed = self.claims.pages();
        drop(self.claims.released.wait_timeout_while(claimed, CLAIM_PATIENCE, is_claimed));
    }

    /// A region of another server; which one, if that is known from before.
    pub(crate) fn new(
        neighbours: Option<Neighbours>,
        address: &str,
        region: &str,
        first: Option<(Incarnation, RegionId)>,
    ) -> Self {
        let (reads, writes) = (Mutex::default(), Mutex::default());
        let (address, region) = (address.to_owned(), region.to_owned());
        let (first, is_gone) = (Mutex::new(first), AtomicBool::new(false));
        Self { neighbours, address, region, reads, writes, first, is_gone, claims: Arc::default() }
    }

    /// Which one it is, once it was open.
    pub(crate) fn identity(&self) -> Option<(Incarnation, RegionId)> {
        *self.first.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is gone for good: another one was found in its place. What was written to it may be, too.
    pub(crate) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Relaxed)
    }

    /// # Errors
    /// If it is another region than the first time.
    fn check(&self, found: (Incarnation, RegionId)) -> io::Result<()> {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if *first.get_or_insert(found) == found {
            return Ok(());
        }
        self.is_gone.store(true, Ordering::Relaxed);
        Err(io::Error::other(
            "it is another one than it was, as its server has lost it or it was made anew: what is not in memory of it \
             is refused; delete the region here, and make it again",
        ))
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn region(&self) -> &str {
        &self.region
    }

    /// Does something with the region over there.
    pub(crate) fn with<T>(
        &self,
        for_what: Use,
        mut then: impl FnMut(&mut dyn DistantRegion) -> io::Result<T>,
    ) -> io::Result<T> {
        let line = match for_what {
            Use::Read => &self.reads,
            Use::Write => &self.writes,
        };
        let mut line = line.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((when, kind, what)) = &line.failed
            && when.elapsed() < AWAY_PAUSE
        {
            return Err(io::Error::new(*kind, what.clone()));
        }
        // A connection that was idle may have been cut, or its epoch be over.
        if let Some(open) = &mut line.open
            && let Ok(done) = then(&mut **open)
        {
            return Ok(done);
        }
        line.open = None;
        let connected = match &self.neighbours {
            Some(Neighbours(connect)) => connect(&self.address, &self.region, for_what),
            None => Err(io::Error::other("this server is told of no other servers")),
        };
        let result = connected.and_then(|mut open| {
            self.check(open.identity())?;
            let done = then(&mut *open)?;
            Ok((open, done))
        });
        match result {
            Ok((open, done)) => {
                *line = Line { open: Some(open), failed: None };
                Ok(done)
            }
            Err(error) => {
                line.failed = Some((Instant::now(), error.kind(), error.to_string()));
                Err(error)
            }
        }
    }
}
