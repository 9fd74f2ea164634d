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
use crate::page_set::{PageSet, RANGES_MAX};
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

/// The range of a file that a clone was given, as long as it does not hold all that the clone does.
#[derive(Debug)]
pub(crate) struct OwnRange {
    pub(crate) file: Arc<BackingFile>,
    /// Pages that are in the file as they were when they were written there last; since then they were
    /// changed only where they are dirty, and none of them was forgotten.
    pub(crate) held: PageSet,
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
    /// Whether what is written goes to a file: that of `source`, or of `own`. In a copy only if it was
    /// given a range of its own.
    pub(crate) writes_back: bool,
    /// The range that was given to it as a clone, until that holds all pages. Until then what is absent is
    /// made from `source`, as in other copies, and what `Portion::dirty` says of a leaf that is shared with
    /// the original is about the original's file.
    pub(crate) own: Option<OwnRange>,
    /// Whether it was given such a range, filled or not: no other region is given a part of it.
    pub(crate) has_own_range: bool,
    /// Counts the copies that were made of it: what was written since has a greater one.
    pub(crate) generation: u16,
    pub(crate) pins: PageSet,
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
            own: None,
            has_own_range: false,
            generation: 0,
            pins: PageSet::default(),
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

    /// The file that it is written back to, or, if it is not, that it is made from.
    pub(crate) fn file(&self) -> Option<&Arc<BackingFile>> {
        match (&self.own, &self.source) {
            (Some(own), _) => Some(&own.file),
            (None, Source::File(file)) => Some(file),
            (None, Source::Nothing | Source::Fill(_)) => None,
        }
    }

    /// The file that it is written back to.
    pub(crate) fn written_file(&self) -> Option<&Arc<BackingFile>> {
        self.file().filter(|_| self.writes_back)
    }

    /// The pages that are made from what a page of a region made from a file holds there, if they are absent.
    pub(crate) fn made_from(&self, file: &BackingFile, page: PageIndex) -> std::ops::Range<u64> {
        let Source::File(source) = &self.source else { return 0..0 };
        let pages = source.pages_with(file, page);
        pages.start..pages.end.min(self.pages.get())
    }

    /// Whether it is a copy that what its file holds must be kept for, before that changes.
    pub(crate) fn depends_on_original(&self) -> bool {
        !self.writes_back || self.own.is_some()
    }

    /// Pages were forgotten: they are as the source has them, and not as they are in a range of its own.
    pub(crate) fn note_forgotten(&mut self, range: PageRange) {
        // What was read from the file before may be out of date.
        self.removals += 1;
        if let Some(own) = &mut self.own {
            own.held.remove(range);
            // What is not held is written again.
            own.held.keep_first(RANGES_MAX);
        }
    }

    /// Once its own range holds all pages, they are made from there. Returns whether that is so now.
    pub(crate) fn complete_own(&mut self) -> bool {
        let pages = self.pages;
        match self.own.take_if(|own| own.held.pages() == pages) {
            Some(own) => {
                self.source = Source::File(own.file);
                // What was read for it from the original's file may be out of date from now on.
                self.removals += 1;
                true
            }
            None => false,
        }
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

    /// The pages that are initialised together with one; none where that is far beyond the region.
    pub(crate) fn unit_of(&self, page: PageIndex) -> std::ops::Range<u64> {
        let unit = self.unit_pages();
        let start = page.get() / unit * unit;
        start..start.saturating_add(unit).min(self.pages.get())
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

    /// All of it that outlives the process, a line each, but for whose copy it is. Whoever adds a field
    /// decides here whether it does.
    #[cfg(test)]
    pub(crate) fn lasting(&self) -> Vec<String> {
        let Self { id, epoch, pages, blocks, table, source, page_bytes, .. } = self;
        let Self { is_frozen, copies_on_access, writes_back, own, has_own_range, .. } = self;
        let Self { generation, pins, prefers, progeny: _, parent: _, working_set, .. } = self;
        // Nobody remembers these.
        let Self { removals: _, binding: _, news: _, fill_page: _, .. } = self;
        let file = |file: &BackingFile| format!("{} at {}", file.path().display(), file.offset());
        let source = match source {
            Source::Nothing => "nothing".to_owned(),
            Source::Fill(byte) => format!("fill {byte}"),
            Source::File(source) => file(source),
        };
        // What of it is held is written again.
        let own = own.as_ref().map(|own| file(&own.file));
        let mut lines = vec![
            format!("{id:?}, {epoch:?}, {pages:?}, {blocks:?}, page size {page_bytes}"),
            format!("made from {source}, own range: {own:?}, {has_own_range}"),
            format!("frozen {is_frozen}, on access {copies_on_access}, written {writes_back}"),
            format!("generation {generation}, copies {}", self.has_copies()),
            format!("pins {:?}", pins.ranges().collect::<Vec<_>>()),
            format!("prefers {prefers:?}"),
            format!("working set {:?}", working_set.order()),
            format!("{:?} stored", table.stored()),
        ];
        let mut from = PageIndex::new(0);
        while let Some((first, leaf)) = table.leaf_from(from) {
            for (at, portion) in crate::table::lock(leaf).portions.iter() {
                let page = PageIndex::new(first.get() + at as u64);
                lines.push(format!("{:?}", portion.record(*id, page)));
            }
            from = PageIndex::new(first.get() + crate::table::LEAF_PAGES as u64);
        }
        lines
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
