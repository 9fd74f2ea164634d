//! A region of this server: what it holds where it was never written, which pages are stored, and
//! which stay in dram.

use std::sync::Arc;

use farmem_region::{
    BlockId, Checksum, Epoch, ExternalAddress, PAGE_SIZE, PageCount, PageIndex, PageRange,
    RegionId, Version,
};
use farmem_vmem::Slot;
use farmem_wire::{Binding, MapChange, page_checksum};

use crate::backing::BackingFile;
use crate::config::ServerConfig;
use crate::news::News;
use crate::prefer::Preferences;
use crate::session::ConnectionId;
use crate::table::Table;
use crate::working_set::WorkingSet;

/// What pages hold that were never written.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    /// Nothing: reading them is refused.
    Nothing,
    /// One byte, over and over. Such a page takes no memory until it is written.
    Fill(u8),
    /// Part of a file, or of a region of another server.
    File(Arc<BackingFile>),
}

impl Source {
    /// The file, or the region of another server; empty if there is none.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::File(file) => file.path().display().to_string(),
            Self::Nothing | Self::Fill(_) => String::new(),
        }
    }
}

/// A region.
#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) id: RegionId,
    pub(crate) epoch: Epoch,
    /// Pages that may be used.
    pub(crate) pages: PageCount,
    /// One for each run of pages that an address's offset can reach.
    pub(crate) blocks: Vec<BlockId>,
    pub(crate) table: Table,
    pub(crate) source: Source,
    /// The unit in which pages are initialised, found dirty and written back.
    page_bytes: u32,
    /// A snapshot never changes.
    pub(crate) is_frozen: bool,
    /// Whether a page that is read becomes the region's own, as one that is written does.
    pub(crate) copies_on_access: bool,
    /// Whether what is written goes to the file of `source`. Never so in a copy.
    pub(crate) writes_back: bool,
    /// Counts the copies that were made of it: what was written since has a greater one.
    pub(crate) generation: u16,
    pub(crate) pins: Pins,
    pub(crate) prefers: Preferences,
    /// Shared with each copy that was made of it by name, and still is.
    progeny: Arc<()>,
    /// The region that it is such a copy of, and what it shares with that.
    parent: Option<(RegionId, Arc<()>)>,
    pub(crate) working_set: WorkingSet,
    /// How often pages were removed: what was read from the source before may be out of date.
    pub(crate) removals: u64,
    binding: Binding,
    /// What has changed, as long as a client wants to be told.
    pub(crate) news: Option<Box<News>>,
    /// The page that all pages of a fill source look like, once one of them was read.
    pub(crate) fill_page: Option<Slot>,
}

impl Region {
    /// An empty region, as pagers use it.
    pub(crate) fn new(id: RegionId) -> Self {
        Self {
            id,
            epoch: Epoch::new(1),
            pages: PageCount::new(0),
            blocks: Vec::new(),
            table: Table::new(id, PAGE_SIZE as u32),
            source: Source::Nothing,
            page_bytes: PAGE_SIZE as u32,
            is_frozen: false,
            copies_on_access: false,
            writes_back: false,
            generation: 0,
            pins: Pins::default(),
            prefers: Preferences::default(),
            progeny: Arc::default(),
            parent: None,
            working_set: WorkingSet::default(),
            removals: 0,
            binding: Binding::of(id),
            news: None,
            fill_page: None,
        }
    }

    /// The unit in which pages are initialised, found dirty and written back, in bytes.
    pub(crate) const fn page_bytes(&self) -> u32 {
        self.page_bytes
    }

    /// Sets it, as long as nothing is stored.
    pub(crate) fn set_page_bytes(&mut self, page_bytes: u32) {
        assert!(self.table.stored().get() == 0, "its table is made for another page size");
        self.table = Table::new(self.id, page_bytes);
        self.page_bytes = page_bytes;
    }

    /// Makes an empty region, which keeps its own name and blocks, hold what another one holds. Takes
    /// constant time.
    pub(crate) fn begin_as_copy(&mut self, original: &mut Self) {
        self.table = original.table.copy(self.id);
        self.source = original.source.clone();
        self.page_bytes = original.page_bytes;
        self.prefers = original.prefers.clone();
        self.working_set = original.working_set.copy();
        // What is written from now on, in either of them, is newer than what they share.
        original.generation = original.generation.saturating_add(1);
        self.generation = original.generation;
    }

    /// Remembers for who wants to be told that pages have changed just now.
    pub(crate) fn note_change(&mut self, range: PageRange, version: Option<Version>) {
        if let Some(news) = &mut self.news {
            news.note(self.table.changes().0, MapChange { range, version });
        }
    }

    /// Whoever wants to be told of changes is to look at the whole region again.
    pub(crate) fn outdate_news(&mut self) {
        if let Some(news) = &mut self.news {
            news.outdate(self.table.changes().0);
        }
    }

    /// Whether a client has been told of all changes: then it need not be told of its own next ones.
    pub(crate) fn is_told(&self, connection: ConnectionId) -> bool {
        self.news.as_ref().is_some_and(|news| news.is_told(connection))
    }

    /// A client that was told of all changes has made those since.
    pub(crate) fn skip_news(&mut self, connection: ConnectionId, was_told: bool) {
        if let Some(news) = self.news.as_mut().filter(|_| was_told) {
            news.skip(connection, self.table.changes().0);
        }
    }

    /// Counts as a copy of another region from now on.
    pub(crate) fn descend_from(&mut self, original: &Self) {
        self.parent = Some((original.id, Arc::clone(&original.progeny)));
    }

    /// Counts as no copy any more.
    pub(crate) fn orphan(&mut self) {
        self.parent = None;
    }

    /// What it counts as a copy of.
    pub(crate) fn parent(&self) -> Option<RegionId> {
        self.parent.as_ref().map(|(parent, _)| *parent)
    }

    /// Whether there are copies of it.
    pub(crate) fn has_copies(&self) -> bool {
        Arc::strong_count(&self.progeny) > 1
    }

    pub(crate) const fn contains(&self, page: PageIndex) -> bool {
        page.get() < self.pages.get()
    }

    pub(crate) fn contains_range(&self, range: PageRange) -> bool {
        range.end().is_some_and(|end| end.get() <= self.pages.get())
    }

    /// Whether a range consists of whole pages of the region's page size.
    pub(crate) fn is_aligned(&self, range: PageRange) -> bool {
        let unit = self.unit_pages();
        range.start.get().is_multiple_of(unit) && range.count.get().is_multiple_of(unit)
    }

    /// How many pages of 4 KiB are initialised and written back together.
    pub(crate) fn unit_pages(&self) -> u64 {
        (u64::from(self.page_bytes) / PAGE_SIZE as u64).max(1)
    }

    /// Whether pages of 4 KiB may be there in part only.
    pub(crate) const fn has_parts(&self) -> bool {
        (self.page_bytes as usize) < PAGE_SIZE
    }

    /// The pages that are initialised together with one.
    pub(crate) fn unit_of(&self, page: PageIndex) -> std::ops::Range<u64> {
        let unit = self.unit_pages();
        let start = page.get() / unit * unit;
        start..(start + unit).min(self.pages.get())
    }

    /// Between a checksum as clients of this region know it and as the table keeps it.
    pub(crate) const fn bind(&self, checksum: Checksum) -> Checksum {
        self.binding.turn(checksum)
    }

    /// The checksum that the table keeps for a page.
    pub(crate) fn neutral(
        page: PageIndex,
        version: Version,
        content: &[u8; PAGE_SIZE],
    ) -> Checksum {
        page_checksum(RegionId::new(0), page, version, content)
    }

    /// Where a page of the region is, for a client that keeps addresses.
    pub(crate) fn address(&self, page: PageIndex, config: &ServerConfig) -> ExternalAddress {
        let per_block = block_pages(config);
        let block = usize::try_from(page.get() / per_block).unwrap_or(usize::MAX);
        let offset = page.get() % per_block * PAGE_SIZE as u64;
        let block = self.blocks.get(block).copied().unwrap_or_default();
        config
            .widths
            .join(config.server, block, offset)
            .expect("server and block ids were checked when they were given")
    }
}

/// Pages of the largest block: as many as an address's offset reaches.
pub(crate) const fn block_pages(config: &ServerConfig) -> u64 {
    config.widths.block_bytes() / PAGE_SIZE as u64
}

/// Ranges of pages that stay in dram: apart, in order, with room between them.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    ranges: Vec<(u64, u64)>,
}

impl Pins {
    pub(crate) fn contains(&self, page: PageIndex) -> bool {
        let after = self.ranges.partition_point(|(start, _)| *start <= page.get());
        after > 0 && page.get() < self.ranges[after - 1].1
    }

    /// Whether any page of a range is pinned.
    pub(crate) fn overlaps(&self, range: PageRange) -> bool {
        let end = range.start.get().saturating_add(range.count.get());
        self.ranges.iter().any(|(first, last)| *first < end && range.start.get() < *last)
    }

    pub(crate) fn ranges(&self) -> impl Iterator<Item = PageRange> {
        self.ranges.iter().map(|(start, end)| PageRange {
            start: PageIndex::new(*start),
            count: PageCount::new(end - start),
        })
    }

    pub(crate) fn pages(&self) -> PageCount {
        PageCount::new(self.ranges.iter().map(|(start, end)| end - start).sum())
    }

    pub(crate) fn pin(&mut self, range: PageRange) {
        let (mut start, mut end) = bounds(range);
        if start == end {
            return;
        }
        self.ranges.retain(|(first, last)| {
            let touches = *first <= end && start <= *last;
            if touches {
                (start, end) = (start.min(*first), end.max(*last));
            }
            !touches
        });
        let at = self.ranges.partition_point(|(first, _)| *first < start);
        self.ranges.insert(at, (start, end));
    }

    pub(crate) fn unpin(&mut self, range: PageRange) {
        let (start, end) = bounds(range);
        let parts = |(first, last): (u64, u64)| {
            let (before, after) = ((first, last.min(start)), (first.max(end), last));
            [before, after].into_iter().filter(|(first, last)| first < last)
        };
        self.ranges = std::mem::take(&mut self.ranges).into_iter().flat_map(parts).collect();
    }
}

fn bounds(range: PageRange) -> (u64, u64) {
    (range.start.get(), range.start.get().saturating_add(range.count.get()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cap_11_pins_agree_with_one_flag_for_each_page() {
        let mut seed = 42_u64;
        let mut next = |limit: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % limit
        };
        for _ in 0..200 {
            let (mut pins, mut model) = (Pins::default(), [false; 100]);
            for _ in 0..30 {
                let (start, count) = (next(100), next(30));
                let count = count.min(100 - start);
                let range =
                    PageRange { start: PageIndex::new(start), count: PageCount::new(count) };
                let is_pinned = next(2) == 0;
                if is_pinned {
                    pins.pin(range);
                } else {
                    pins.unpin(range);
                }
                model[start as usize..(start + count) as usize].fill(is_pinned);
                let found: Vec<_> =
                    (0..100).map(|page| pins.contains(PageIndex::new(page))).collect();
                assert_eq!(found, model);
                let pinned = model.iter().filter(|pinned| **pinned).count();
                assert_eq!(pins.pages().get(), pinned as u64);
                assert!(pins.ranges.is_sorted() && pins.ranges.len() <= pinned);
            }
        }
    }
}
