//! [`Region`]: external memory that is read and written at offsets.

use std::collections::HashMap;
use std::time::Duration;

use farmem_region::{
    AddressWidths, ByteCount, ExternalAddress, PAGE_SIZE, PageCount, Request, StoreError, Version,
};
use farmem_remote::{Absent, RemoteConfig, named};

use crate::cache::{Cache, CacheCounts};
use crate::exchange::{Exchange, Maker, now};
use crate::keeper::Keeper;
use crate::mapped::{MappedRegion, Prepared};
use crate::options::{RegionError, RegionOptions, WritePolicy};
use crate::spill::ProgramStore;

/// How long the server may take to say what a region is like.
const SHOW_TIMEOUT: Duration = Duration::from_secs(10);

/// A region on a memory server. It lives as long as this value (or the [`MappedRegion`] that it
/// becomes): its end frees the region. In a forked child the value is good for nothing, and its end
/// changes nothing. What was never written reads as zero. A [named
/// region](Region::open) lives until it is deleted, and reads as it was made to read.
#[derive(Debug)]
pub struct Region {
    options: RegionOptions,
    /// `None` once the region has been handed on.
    parts: Option<(Exchange, Cache)>,
    /// Where its first block is on the server, and the bytes of the region that lie there.
    place: Option<(ExternalAddress, u64)>,
    kind: Kind,
    /// As it was opened by.
    name: Option<String>,
    maker: Maker,
}

/// A region that could not be mapped. It goes on at offsets.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct MapError {
    /// The region, as it was.
    pub region: Box<Region>,
    /// Why.
    #[source]
    pub error: RegionError,
}

/// An anonymous region ends with this.
impl From<MapError> for RegionError {
    fn from(error: MapError) -> Self {
        error.error
    }
}

/// What a region is like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    /// What pages hold that the server does not have.
    pub(crate) absent: Absent,
    /// It was made with a name, by others: with a file, a page size, a fill value that matter when a page is
    /// given back.
    pub(crate) is_named: bool,
}

impl Kind {
    /// Whether to give a page back is to make it zero.
    pub(crate) const fn zeros_are_absent(self) -> bool {
        !self.is_named
    }
}

impl Region {
    /// Makes a region on the server. Waits for the server, a few seconds at most.
    ///
    /// # Errors
    /// [`RegionError::Store`] if the server cannot be reached or has not got that much memory, or
    /// the spill directory cannot be used.
    pub fn create(options: RegionOptions) -> Result<Self, RegionError> {
        let size = ByteCount::new(options.size);
        let mut config = RemoteConfig::new(options.server.clone(), options.name.clone(), size);
        config.accept_partial = options.spill.is_some();
        let keeper = start_keeper()?;
        let (store, session) = ProgramStore::connect(config, options.spill.as_deref(), now())?;
        let mut exchange = Exchange::new(keeper, store);
        let (absent, cache_size) = (Absent::Fill(0), options.cache_size);
        let mut cache = Cache::new(cache_size, HashMap::new(), Version::new(1), absent);
        // As much on the server as it granted; a file has the rest.
        let granted = PageCount::new(session.granted.get() / PAGE_SIZE as u64);
        let wanted = size.pages_rounded_up();
        let goals = [granted.get().min(wanted.get()), wanted.get()];
        if let Err(error) = grow(&mut exchange, &mut cache, session.pages.get(), goals) {
            // The server frees the region by itself if it cannot be told.
            let _: Result<(), StoreError> = exchange.into_store().disconnect();
            return Err(error.into());
        }
        Ok(Self::resume(options, exchange, cache, Kind { absent, is_named: false }))
    }

    /// Opens a region that was made with a name (`farmem region create`), as its only writer:
    /// whoever wrote before is refused from then on. It has the size that it was made with, whatever
    /// `options` says, and outlives this value; only what was flushed is kept.
    ///
    /// The client downloads which pages are stored, so that a page that is not, and is known to hold
    /// one byte over and over, costs no question.
    ///
    /// # Errors
    /// [`RegionError::Store`] if there is no such region, or the server cannot be reached;
    /// [`RegionError::NoSpill`].
    pub fn open(name: &str, mut options: RegionOptions) -> Result<Self, RegionError> {
        if options.spill.is_some() {
            return Err(RegionError::NoSpill { name: name.to_owned() });
        }
        let amount = ByteCount::new(0);
        let config = RemoteConfig::new(options.server.clone(), options.name.clone(), amount);
        let keeper = start_keeper()?;
        let (store, session, map) = ProgramStore::open(config, name, now())?;
        options.size = session.pages.bytes().get();
        let (next, absent) = (map.next_version(), map.absent);
        let cache = Cache::new(options.cache_size, map.stored, next, absent);
        let kind = Kind { absent, is_named: true };
        let mut region = Self::resume(options, Exchange::new(keeper, store), cache, kind);
        region.name = Some(name.to_owned());
        Ok(region)
    }

    pub(crate) fn resume(
        options: RegionOptions,
        exchange: Exchange,
        cache: Cache,
        kind: Kind,
    ) -> Self {
        let place = exchange.place();
        let (parts, maker) = (Some((exchange, cache)), Maker::here());
        Self { options, parts, place, kind, name: None, maker }
    }

    /// Bytes of the region.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.options.size
    }

    /// Reads the bytes from `offset` on, from the cache if they are there.
    ///
    /// # Errors
    /// [`RegionError::OutOfBounds`], or [`RegionError::Store`] if the server is lost; then every
    /// later call says so too.
    pub fn read(&mut self, offset: u64, target: &mut [u8]) -> Result<(), RegionError> {
        self.check(offset, target.len())?;
        let pages = ByteCount::new(self.options.size).pages_rounded_up().get();
        let ahead = (u64::from(self.options.readahead_pages), pages);
        let (exchange, cache) = self.parts();
        exchange.check()?;
        exchange.confirm(cache.frames())?;
        Ok(cache.read(exchange, offset, target, ahead)?)
    }

    /// Writes the bytes from `offset` on. With [`WritePolicy::WriteThrough`] the server has
    /// acknowledged them when this returns.
    ///
    /// # Errors
    /// As [`Region::read`]. After an error some of the bytes may have been written.
    pub fn write(&mut self, offset: u64, source: &[u8]) -> Result<(), RegionError> {
        self.check(offset, source.len())?;
        let through = self.options.write == WritePolicy::WriteThrough;
        let (exchange, cache) = self.parts();
        exchange.check()?;
        Ok(cache.write(exchange, offset, source, through)?)
    }

    /// The external address of an offset; `None` outside of the region's first block on the
    /// server (4 GiB with the default widths), or where the spill file has the page.
    #[must_use]
    pub fn address(&self, offset: u64) -> Option<ExternalAddress> {
        let (base, kept) = self.place?;
        let inside = kept.min(self.options.size);
        let widths = AddressWidths::DEFAULT;
        let (server, block, start) = widths.split(base);
        if offset >= inside {
            return None;
        }
        widths.join(server, block, start.checked_add(offset)?).ok()
    }

    /// The offset of an external address; `None` if it does not lie in this region.
    #[must_use]
    pub fn offset(&self, address: ExternalAddress) -> Option<u64> {
        let offset = address.raw().checked_sub(self.place?.0.raw())?;
        (self.address(offset)? == address).then_some(offset)
    }

    /// [`Region::read`] by external address.
    ///
    /// # Errors
    /// [`RegionError::NotHere`], and those of [`Region::read`].
    pub fn read_address(
        &mut self,
        address: ExternalAddress,
        target: &mut [u8],
    ) -> Result<(), RegionError> {
        let not_here = RegionError::NotHere { address: address.raw() };
        let offset = self.offset(address).ok_or(not_here)?;
        self.read(offset, target)
    }

    /// [`Region::write`] by external address.
    ///
    /// # Errors
    /// [`RegionError::NotHere`], and those of [`Region::write`].
    pub fn write_address(
        &mut self,
        address: ExternalAddress,
        source: &[u8],
    ) -> Result<(), RegionError> {
        let not_here = RegionError::NotHere { address: address.raw() };
        let offset = self.offset(address).ok_or(not_here)?;
        self.write(offset, source)
    }

    /// Returns when everything written so far has been acknowledged.
    ///
    /// # Errors
    /// [`RegionError::Store`].
    pub fn flush(&mut self) -> Result<(), RegionError> {
        self.maker.check()?;
        let (exchange, cache) = self.parts();
        exchange.check()?;
        Ok(cache.flush(exchange)?)
    }

    /// What the cache has seen so far.
    #[must_use]
    pub fn counts(&self) -> CacheCounts {
        self.parts.as_ref().map_or_else(CacheCounts::default, |(_, cache)| cache.counts)
    }

    /// Maps the region: its contents become ordinary memory of this process, of which as much as
    /// the cache's size is local at a time.
    ///
    /// # Errors
    /// [`MapError`] with the region, which goes on at offsets, and why: [`RegionError::Memory`] if this process may
    /// not page memory, [`RegionError::Map`], [`RegionError::Frozen`], or one of those of [`Region::flush`].
    pub fn map(mut self) -> Result<MappedRegion, MapError> {
        match self.try_to_map() {
            Ok(mapped) => Ok(mapped),
            Err(error) => Err(MapError { region: Box::new(self), error }),
        }
    }

    /// As [`Region::map`]; has no parts any more if it succeeds.
    fn try_to_map(&mut self) -> Result<MappedRegion, RegionError> {
        self.flush()?;
        if let Some(name) = &self.name {
            let regions = named::list(&self.options.server, SHOW_TIMEOUT)?;
            if regions.iter().any(|region| region.name == *name && region.is_frozen) {
                return Err(RegionError::Frozen { name: name.clone() });
            }
        }
        let prepared = Prepared::new(&self.options, self.kind)?;
        let (exchange, cache) = self.parts();
        match prepared.start(exchange.lend_store(), cache.versions()) {
            Ok(mapped) => {
                self.parts = None;
                Ok(mapped)
            }
            Err(refused) => {
                let (store, error) = *refused;
                exchange.give_back(store);
                Err(error)
            }
        }
    }

    /// Ends the region and frees it on the server. A named region stays there; flush before.
    ///
    /// # Errors
    /// [`RegionError::Store`] if the server could not be told; it frees the region by itself
    /// after some seconds.
    pub fn close(mut self) -> Result<(), RegionError> {
        self.maker.check()?;
        match self.parts.take() {
            Some((exchange, _)) => Ok(exchange.into_store().disconnect()?),
            None => Ok(()),
        }
    }

    fn parts(&mut self) -> (&mut Exchange, &mut Cache) {
        match &mut self.parts {
            Some((exchange, cache)) => (exchange, cache),
            None => unreachable!("only `map`, `close` and `drop` take the parts"),
        }
    }

    fn check(&self, offset: u64, bytes: usize) -> Result<(), RegionError> {
        self.maker.check()?;
        let (bytes, size) = (bytes as u64, self.options.size);
        if offset.checked_add(bytes).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(RegionError::OutOfBounds { offset, bytes, size })
    }
}

/// Makes a region of `pages` as large as one goal after the other.
fn grow(
    exchange: &mut Exchange,
    cache: &mut Cache,
    pages: u64,
    goals: [u64; 2],
) -> Result<(), StoreError> {
    let mut pages = pages;
    for goal in goals {
        if pages < goal {
            let grow = Request::Grow(PageCount::new(goal - pages));
            exchange.ask(grow, cache.frames())?;
            pages = goal;
        }
    }
    Ok(())
}

/// What keeps a region's connection while nothing is asked of it.
pub(crate) fn start_keeper() -> Result<Keeper, RegionError> {
    Keeper::start().map_err(|source| RegionError::Keeper { source })
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Some((exchange, _)) = self.parts.take() {
            if !self.maker.is_here() {
                // It goes on in the parent.
                std::mem::forget(exchange);
                return;
            }
            // The server frees the region by itself if it cannot be told.
            let _: Result<(), StoreError> = exchange.into_store().disconnect();
        }
    }
}
