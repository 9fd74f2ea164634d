//! Pages of a region in local memory, for access without mapping: which are there, which are
//! dirty, which make room. Decides; asks the store through [`Exchange`].

use std::collections::HashMap;

use farmem_region::{
    FetchPage, FrameId, Frames, PAGE_SIZE, PageIndex, Request, StoreError, StorePage, Version,
};
use farmem_remote::Absent;

use crate::exchange::Exchange;
use crate::frames::HeapFrames;

/// Pages that one access takes on at a time, and that are stored with one request: 1 MiB.
const CHUNK_PAGES: u64 = 256;
/// The smallest cache: a chunk must fit with room to spare.
const FRAMES_MIN: usize = 16;

/// What the cache has seen so far, in pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheCounts {
    /// Pages accessed that were there.
    pub hits: u64,
    /// Pages accessed that were not.
    pub misses: u64,
    /// Pages fetched from the server, read-ahead included.
    pub fetched_pages: u64,
    /// Pages that the server has acknowledged.
    pub stored_pages: u64,
}

/// A frame of the cache.
#[derive(Debug, Clone, Copy)]
struct Cached {
    page: u64,
    /// Newer than the server's copy.
    dirty: bool,
    /// Used since the hand passed last.
    used: bool,
    /// Part of the access under way.
    held: bool,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Cache {
    frames: HeapFrames,
    cached: Vec<Option<Cached>>,
    pages: HashMap<u64, u32>,
    free: Vec<u32>,
    hand: usize,
    dirty: usize,
    /// Pages that the server has, and the version of its copy.
    versions: HashMap<u64, Version>,
    /// What all others hold.
    absent: Absent,
    next_version: u64,
    /// Where the last read ended, and how many pages were fetched ahead of it.
    sequence: (u64, u64),
    pub(crate) counts: CacheCounts,
}

impl Cache {
    /// A cache of `bytes`, in front of pages that the server has already.
    pub(crate) fn new(
        bytes: u64,
        versions: HashMap<u64, Version>,
        next: Version,
        absent: Absent,
    ) -> Self {
        let count = usize::try_from(bytes / PAGE_SIZE as u64).unwrap_or(usize::MAX);
        let count = count.clamp(FRAMES_MIN, u32::MAX as usize);
        Self {
            frames: HeapFrames::new(count),
            cached: vec![None; count],
            pages: HashMap::new(),
            free: (0..u32::try_from(count).unwrap_or(u32::MAX)).rev().collect(),
            hand: 0,
            dirty: 0,
            versions,
            absent,
            next_version: next.get().max(1),
            sequence: (0, 0),
            counts: CacheCounts::default(),
        }
    }

    /// The pages that the server has and their versions, and the next one to use.
    pub(crate) const fn versions(&self) -> (&HashMap<u64, Version>, Version) {
        (&self.versions, Version::new(self.next_version))
    }

    pub(crate) fn frames(&mut self) -> &mut HeapFrames {
        &mut self.frames
    }

    /// Reads bytes; the caller has checked that they are in the region of `pages` pages.
    pub(crate) fn read(
        &mut self,
        exchange: &mut Exchange,
        offset: u64,
        target: &mut [u8],
        ahead: (u64, u64),
    ) -> Result<(), StoreError> {
        let mut rest = target;
        for part in parts(offset, rest.len(), self.chunk_pages()) {
            let ahead = self.plan_ahead(&part, ahead);
            self.bring(exchange, part.first, part.last, ahead, |_| true)?;
            let (mut now, later) = rest.split_at_mut(part.bytes);
            let mut at = part.start;
            while !now.is_empty() {
                let page = at / PAGE_SIZE as u64;
                let from = (at % PAGE_SIZE as u64) as usize;
                let count = now.len().min(PAGE_SIZE - from);
                let frame = FrameId::new(self.pages[&page]);
                now[..count].copy_from_slice(&self.frames.bytes(frame)[from..from + count]);
                now = &mut now[count..];
                at += count as u64;
            }
            self.let_go(part.first, part.last);
            rest = later;
        }
        Ok(())
    }

    /// Writes bytes. With `through`, the server has them when this returns.
    pub(crate) fn write(
        &mut self,
        exchange: &mut Exchange,
        offset: u64,
        source: &[u8],
        through: bool,
    ) -> Result<(), StoreError> {
        let mut rest = source;
        for part in parts(offset, rest.len(), self.chunk_pages()) {
            let end = part.start + part.bytes as u64;
            // What is overwritten as a whole need not be fetched.
            let whole = |page: u64| {
                let start = page * PAGE_SIZE as u64;
                part.start <= start && start + PAGE_SIZE as u64 <= end
            };
            self.bring(exchange, part.first, part.last, 0, |page| !whole(page))?;
            let (mut now, later) = rest.split_at(part.bytes);
            let mut at = part.start;
            while !now.is_empty() {
                let page = at / PAGE_SIZE as u64;
                let from = (at % PAGE_SIZE as u64) as usize;
                let count = now.len().min(PAGE_SIZE - from);
                let number = self.pages[&page];
                let frame = self.frames.bytes_mut(FrameId::new(number));
                frame[from..from + count].copy_from_slice(&now[..count]);
                self.mark_dirty(number);
                now = &now[count..];
                at += count as u64;
            }
            self.let_go(part.first, part.last);
            rest = later;
            if through || self.dirty > self.cached.len() / 4 {
                self.flush(exchange)?;
            }
        }
        Ok(())
    }

    /// Stores every dirty page.
    pub(crate) fn flush(&mut self, exchange: &mut Exchange) -> Result<(), StoreError> {
        if self.dirty == 0 {
            return Ok(());
        }
        let is_dirty = |cached: &Option<Cached>| cached.is_some_and(|cached| cached.dirty);
        let all = 0..self.cached.len();
        let mut dirty: Vec<u32> =
            all.filter(|&at| is_dirty(&self.cached[at])).map(|at| at as u32).collect();
        dirty.sort_unstable_by_key(|&at| self.cached[at as usize].map(|cached| cached.page));
        dirty.chunks(CHUNK_PAGES as usize).try_for_each(|chunk| self.store(exchange, chunk))
    }

    fn chunk_pages(&self) -> u64 {
        (self.cached.len() as u64 / 4).clamp(1, CHUNK_PAGES)
    }

    /// How many pages to fetch behind a part of a read: doubling as a sequence goes on.
    fn plan_ahead(&mut self, part: &Part, (most, pages): (u64, u64)) -> u64 {
        let (end, window) = self.sequence;
        let goes_on = part.first == end || part.first + 1 == end;
        let window = if goes_on { (window * 2).clamp(1, most.max(1)) } else { 0 };
        self.sequence = (part.last + 1, window);
        window.min(most).min(self.chunk_pages()).min(pages - (part.last + 1).min(pages))
    }

    /// Makes pages `first..=last` be there and holds them, fetching those that `needed` says, and
    /// up to `ahead` more behind them if something is fetched at all. What goes wrong with those alone is
    /// nobody's error. After an error nothing is held, and nothing is there that was not before: what was not
    /// fetched does not pass for contents.
    fn bring(
        &mut self,
        exchange: &mut Exchange,
        first: u64,
        last: u64,
        ahead: u64,
        needed: impl Fn(u64) -> bool,
    ) -> Result<(), StoreError> {
        let mut made = Vec::new();
        let seen = (self.counts.hits, self.counts.misses);
        let mut result = self.try_to_bring(exchange, (first, last, ahead), &needed, &mut made);
        if matches!(&result, Err(error) if !matches!(error, StoreError::Lost { .. }))
            && made.iter().any(|&number| self.lies_behind(number, last))
        {
            made.drain(..).for_each(|number| self.drop_frame(number));
            (self.counts.hits, self.counts.misses) = seen;
            self.sequence.1 = 0;
            result = self.try_to_bring(exchange, (first, last, 0), &needed, &mut made);
        }
        if result.is_err() {
            made.iter().for_each(|&number| self.drop_frame(number));
            self.let_go(first, last);
        }
        result
    }

    fn lies_behind(&self, number: u32, last: u64) -> bool {
        self.cached[number as usize].is_some_and(|cached| cached.page > last)
    }

    /// As [`Cache::bring`], which undoes what was `made`, in frames, after an error.
    fn try_to_bring(
        &mut self,
        exchange: &mut Exchange,
        (first, last, ahead): (u64, u64, u64),
        needed: &impl Fn(u64) -> bool,
        made: &mut Vec<u32>,
    ) -> Result<(), StoreError> {
        let mut missing = Vec::new();
        for page in first..=last {
            match self.pages.get(&page) {
                Some(&number) => {
                    self.counts.hits += 1;
                    if let Some(cached) = &mut self.cached[number as usize] {
                        (cached.used, cached.held) = (true, true);
                    }
                }
                None => missing.push(page),
            }
        }
        self.counts.misses += missing.len() as u64;
        if missing.iter().any(|page| self.remote(*page).is_some()) {
            let more = last + 1..=last + ahead;
            let known = |page: &u64| self.remote(*page).is_some() && !self.pages.contains_key(page);
            missing.extend(more.filter(known));
        }
        self.make_room(exchange, missing.len())?;
        let mut fetch = Vec::new();
        for &page in &missing {
            // `make_room` has made sure of it.
            let Some(number) = self.free.pop() else { break };
            let frame = FrameId::new(number);
            match self.remote(page) {
                Some(version) if page > last || needed(page) => {
                    fetch.push(FetchPage { page: PageIndex::new(page), version, frame });
                }
                _ => self.frames.bytes_mut(frame).fill(match self.absent {
                    Absent::Fill(byte) => byte,
                    Absent::Nothing | Absent::Unknown => 0,
                }),
            }
            self.pages.insert(page, number);
            made.push(number);
            let held = page <= last;
            self.cached[number as usize] = Some(Cached { page, dirty: false, used: held, held });
        }
        if fetch.is_empty() {
            return Ok(());
        }
        exchange.ask(Request::Fetch(&fetch), &mut self.frames)?;
        self.counts.fetched_pages += fetch.len() as u64;
        Ok(())
    }

    /// The version in which a page is to be fetched; `None` if that is not needed to know it.
    fn remote(&self, page: u64) -> Option<Version> {
        let made = (self.absent == Absent::Unknown).then_some(Version::new(0));
        self.versions.get(&page).copied().or(made)
    }

    /// Frees frames until `count` are free: those that were not used of late; dirty ones are
    /// stored first.
    fn make_room(&mut self, exchange: &mut Exchange, count: usize) -> Result<(), StoreError> {
        let mut passed = 0;
        while self.free.len() < count {
            let at = self.hand;
            self.hand = (at + 1) % self.cached.len();
            passed += 1;
            // Two passes clear every mark of use; a third finds only what is held.
            assert!(passed <= 3 * self.cached.len(), "an access holds a part of the cache only");
            let Some(cached) = &mut self.cached[at] else {
                continue;
            };
            if cached.held || std::mem::take(&mut cached.used) {
                continue;
            }
            if cached.dirty {
                self.flush(exchange)?;
            }
            self.drop_frame(at as u32);
        }
        Ok(())
    }

    fn drop_frame(&mut self, number: u32) {
        if let Some(cached) = self.cached[number as usize].take() {
            self.pages.remove(&cached.page);
            self.free.push(number);
        }
    }

    fn let_go(&mut self, first: u64, last: u64) {
        for page in first..=last {
            if let Some(&number) = self.pages.get(&page)
                && let Some(cached) = &mut self.cached[number as usize]
            {
                cached.held = false;
            }
        }
    }

    fn mark_dirty(&mut self, number: u32) {
        if let Some(cached) = &mut self.cached[number as usize]
            && !std::mem::replace(&mut cached.dirty, true)
        {
            self.dirty += 1;
        }
    }

    fn store(&mut self, exchange: &mut Exchange, numbers: &[u32]) -> Result<(), StoreError> {
        let mut request = Vec::with_capacity(numbers.len());
        for &number in numbers {
            let Some(cached) = self.cached[number as usize] else {
                continue;
            };
            let version = Version::new(self.next_version);
            self.next_version += 1;
            let (page, frame) = (PageIndex::new(cached.page), FrameId::new(number));
            request.push(StorePage { page, version, frame });
        }
        exchange.ask(Request::Store(&request), &mut self.frames)?;
        for stored in &request {
            self.versions.insert(stored.page.get(), stored.version);
            if let Some(cached) = &mut self.cached[stored.frame.get() as usize] {
                cached.dirty = false;
            }
        }
        self.dirty -= request.len();
        self.counts.stored_pages += request.len() as u64;
        Ok(())
    }
}

/// Bytes of an access that are taken on at a time.
#[derive(Debug)]
struct Part {
    start: u64,
    bytes: usize,
    first: u64,
    last: u64,
}

/// Divides an access so that no part touches more than `pages` pages.
fn parts(offset: u64, bytes: usize, pages: u64) -> impl Iterator<Item = Part> {
    let end = offset + bytes as u64;
    let span = pages * PAGE_SIZE as u64;
    let mut start = offset;
    std::iter::from_fn(move || {
        let stop = (start / span + 1).saturating_mul(span).min(end);
        let bytes = usize::try_from(stop - start).ok().filter(|&bytes| bytes > 0)?;
        let part = Part {
            start,
            bytes,
            first: start / PAGE_SIZE as u64,
            last: (stop - 1) / PAGE_SIZE as u64,
        };
        start = stop;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_an_access_without_overlap() {
        for (offset, bytes) in [(0, 0), (0, 1), (4095, 2), (5, 100_000), (8192, 4096 * 7)] {
            let mut at = offset;
            for part in parts(offset, bytes, 3) {
                assert_eq!(part.start, at);
                assert!(part.bytes > 0 && part.last - part.first < 3);
                assert_eq!(part.first, part.start / 4096);
                at += part.bytes as u64;
            }
            assert_eq!(at, offset + bytes as u64);
        }
    }
}
