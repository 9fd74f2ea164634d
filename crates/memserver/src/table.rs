//! From a region's pages to where they lie: a tree that copies share until one of them changes.
//!
//! ```text
//! table -> root -> branch (1 GiB of region) -> leaf (2 MiB of region) -> up to 512 portions
//!
//! table of a copy ---> root        the first change in a copy makes root, branch and leaf its own;
//!                                  the places in that leaf are then held by two
//! ```
//!
//! To copy a table is to take its root once more. Whoever changes what a table *says* (a page is
//! written, or forgotten) first makes the leaf its own. Whoever changes only where a page *lies*
//! (another tier) does so in place, under the leaf's lock, for all tables that share the leaf.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use farmem_region::{Checksum, PageCount, PageIndex, PageRange, RegionId, Version};
use farmem_vmem::Slot;

use crate::journal::{PageRecord, Record};
use crate::leaf::Portions;
use crate::tiers::{Charge, Place, Tiers};

/// Pages of a leaf: 2 MiB of region.
pub(crate) const LEAF_PAGES: usize = 512;
/// Leaves of a branch: with it a branch is 1 GiB of region, and the root of 1 TiB is 8 KiB.
const BRANCH_LEAVES: usize = 512;

/// What counts the holders of a part of a table.
const COUNTS_BYTES: usize = 16;

/// A page as the server keeps it. It is packed in its leaf.
#[derive(Debug)]
pub(crate) struct Portion {
    pub(crate) place: Place,
    /// The eighths of the page that differ from the backing file.
    pub(crate) dirty: u8,
    /// How often it was asked for lately; halved each time the hand passes.
    pub(crate) heat: u8,
    /// The eighths of the page that are not there: they are as the region's source has them, and zeros
    /// in the place. Only in regions with a page size below 4 KiB.
    pub(crate) absent: u8,
    /// The region's generation when it was last written.
    pub(crate) generation: u16,
    /// 0: never written, made from the region's source.
    pub(crate) version: Version,
    /// As the writing client's, but bound to no region: copies share it. See `Region::bind`.
    pub(crate) checksum: Checksum,
}

/// 512 pages side by side.
#[derive(Debug)]
pub(crate) struct Leaf {
    pub(crate) portions: Portions,
    stored: u64,
    /// The table's count of changes when a page was stored here last.
    pub(crate) changed: u64,
    charge: Charge,
}

pub(crate) type SharedLeaf = Arc<Mutex<Leaf>>;

#[derive(Debug, Clone)]
struct Branch {
    leaves: [Option<SharedLeaf>; BRANCH_LEAVES],
    _charge: Charge,
}

/// The pages of one region that are stored. Goes by [`Table::clear`]: a table that is dropped
/// would keep its pages' memory for ever.
#[derive(Debug, Default)]
pub(crate) struct Table {
    /// By which the journal knows it.
    region: RegionId,
    /// Bytes of a portion.
    page_bytes: u32,
    root: Arc<Vec<Option<Arc<Branch>>>>,
    stored: u64,
    /// Counts what was stored and forgotten.
    changes: u64,
    /// The count when something was forgotten last.
    forgot: u64,
}

impl Table {
    pub(crate) fn new(region: RegionId, page_bytes: u32) -> Self {
        Self { region, page_bytes, ..Self::default() }
    }

    /// Pages stored.
    pub(crate) const fn stored(&self) -> PageCount {
        PageCount::new(self.stored)
    }

    /// The same pages once more, in constant time.
    pub(crate) fn copy(&self, region: RegionId) -> Self {
        Self { region, root: Arc::clone(&self.root), ..*self }
    }

    /// How often pages were stored or forgotten, and how often they had been when some were
    /// forgotten last.
    pub(crate) const fn changes(&self) -> (u64, u64) {
        (self.changes, self.forgot)
    }

    /// Counts on from a number that nobody has been told of, as if something had been forgotten: what
    /// a former process has told of its count means nothing here.
    pub(crate) const fn count_from(&mut self, number: u64) {
        self.changes = number;
        self.forgot = number;
    }

    /// Looks at a page, if it is stored. Only its place, heat and dirt may be changed here.
    pub(crate) fn with<T>(
        &self,
        page: PageIndex,
        look: impl FnOnce(&mut Portion) -> T,
    ) -> Option<T> {
        let (branch, leaf, at) = split(page);
        let leaf = self.root.get(branch)?.as_ref()?.leaves[leaf].as_ref()?;
        lock(leaf).portions.with(at, look)
    }

    /// Whether another table holds the same leaf.
    pub(crate) fn is_shared(&self, page: PageIndex) -> bool {
        let (branch, leaf, _) = split(page);
        let Some(branch) = self.root.get(branch).and_then(Option::as_ref) else {
            return false;
        };
        let leaf = branch.leaves[leaf].as_ref().map_or(1, Arc::strong_count);
        Arc::strong_count(&self.root) > 1 || Arc::strong_count(branch) > 1 || leaf > 1
    }

    /// The first leaf that holds the page or a later one, with its first page.
    pub(crate) fn leaf_from(&self, page: PageIndex) -> Option<(PageIndex, &Mutex<Leaf>)> {
        let (first, mut at, _) = split(page);
        for (number, branch) in self.root.iter().enumerate().skip(first) {
            let leaves = branch.iter().flat_map(|branch| branch.leaves.iter().enumerate());
            for (leaf, shared) in leaves.skip(at) {
                if let Some(shared) = shared {
                    let page = (number * BRANCH_LEAVES + leaf) * LEAF_PAGES;
                    return Some((PageIndex::new(page as u64), shared));
                }
            }
            at = 0;
        }
        None
    }

    /// Whether the page or any later one is stored.
    pub(crate) fn holds_from(&self, page: PageIndex) -> bool {
        let Some((first, leaf)) = self.leaf_from(page) else {
            return false;
        };
        let is_in = |at: usize| first.get() + at as u64 >= page.get();
        lock(leaf).portions.iter().any(|(at, _)| is_in(at))
            || self.leaf_from(PageIndex::new(first.get() + LEAF_PAGES as u64)).is_some()
    }

    /// Notes that a page has moved. To be called within [`Table::with`], before its former place can
    /// be used again.
    pub(crate) fn note_move(&self, tiers: &Tiers, page: PageIndex, to: &Place) {
        tiers.note(|| Record::Move { region: self.region, page, spot: to.spot() });
    }

    /// Notes that a page is as its file has it, as [`Table::note_move`].
    pub(crate) fn note_clean(&self, tiers: &Tiers, page: PageIndex) {
        tiers.note(|| Record::Clean { region: self.region, page });
    }

    /// What was written of the pages of a leaf, which is the table's own, is dirty again.
    pub(crate) fn mark_dirty(&self, tiers: &Tiers, first: PageIndex) {
        for page in (first.get()..first.get() + LEAF_PAGES as u64).map(PageIndex::new) {
            self.with(page, |portion| {
                let all = !portion.absent;
                if portion.version.get() > 0 && portion.dirty != all {
                    portion.dirty = all;
                    tiers.note(|| Record::Put(portion.record(self.region, page)));
                }
            });
        }
    }

    /// The leaf of a page, to be shared.
    pub(crate) fn leaf_of(&self, page: PageIndex) -> Option<SharedLeaf> {
        let (branch, leaf, _) = split(page);
        self.root.get(branch)?.as_ref()?.leaves[leaf].clone()
    }

    /// Takes over the leaf of a page of which nothing is stored here.
    pub(crate) fn share_leaf(&mut self, tiers: &Tiers, page: PageIndex, leaf: SharedLeaf) {
        let (branch, at, _) = split(page);
        let root = Arc::make_mut(&mut self.root);
        if branch >= root.len() {
            root.resize_with(branch + 1, || None);
        }
        self.stored += lock(&leaf).stored;
        let branch = Arc::make_mut(root[branch].get_or_insert_with(|| Branch::empty(tiers)));
        branch.leaves[at] = Some(leaf);
    }

    /// Makes the leaf of a page the table's own, if it is shared.
    pub(crate) fn make_own(&mut self, tiers: &Tiers, page: PageIndex) {
        self.own(tiers, page);
    }

    /// Puts a stored page elsewhere, for this table alone: the leaf becomes its own. Returns where the
    /// page lay before; or where it should have gone, if it is not stored.
    pub(crate) fn move_own(&mut self, tiers: &Tiers, page: PageIndex, to: Place) -> Place {
        if self.with(page, |_| ()).is_none() {
            return to;
        }
        self.make_own(tiers, page);
        self.note_move(tiers, page, &to);
        let mut to = Some(to);
        let former = self
            .with(page, |portion| to.take().map(|to| std::mem::replace(&mut portion.place, to)));
        former.flatten().or(to).expect("the place is either there or here")
    }

    /// Stores a page; returns where it lay before. The caller has checked that the page lies in
    /// the region: the table grows to hold it.
    pub(crate) fn put(
        &mut self,
        tiers: &Tiers,
        page: PageIndex,
        portion: &Portion,
    ) -> Option<Place> {
        let (at, region) = (split(page).2, self.region);
        self.changes += 1;
        let changes = self.changes;
        let leaf = self.own(tiers, page);
        let mut leaf = lock(leaf);
        leaf.changed = changes;
        tiers.note(|| Record::Put(portion.record(region, page)));
        let before = leaf.portions.replace(at, portion);
        let added = u64::from(before.is_none());
        leaf.stored += added;
        leaf.settle();
        drop(leaf);
        self.stored += added;
        before.map(|portion| portion.place)
    }

    /// Makes the leaves of a range the table's own, so that nobody else moves its pages.
    pub(crate) fn unshare(&mut self, tiers: &Tiers, range: PageRange) {
        let end = range.start.get().saturating_add(range.count.get());
        let mut page = range.start;
        while let Some((first, _)) = self.leaf_from(page).filter(|(first, _)| first.get() < end) {
            self.own(tiers, first);
            page = PageIndex::new(first.get() + LEAF_PAGES as u64);
        }
    }

    /// Forgets the pages of a range and appends their slots to `slots`. Costs time for what is
    /// stored, not for the length of the range.
    pub(crate) fn remove(&mut self, tiers: &Tiers, range: PageRange, slots: &mut Vec<Slot>) {
        let end = range.start.get().saturating_add(range.count.get());
        let mut from = range.start;
        self.changes += 1;
        self.forgot = self.changes;
        while let Some((first, _)) = self.leaf_from(from).filter(|(first, _)| first.get() < end) {
            let start = range.start.get().saturating_sub(first.get());
            let stop = (end - first.get()).min(LEAF_PAGES as u64);
            self.remove_in_leaf(tiers, first, start as usize..stop as usize, slots);
            from = PageIndex::new(first.get() + LEAF_PAGES as u64);
        }
    }

    fn remove_in_leaf(
        &mut self,
        tiers: &Tiers,
        first: PageIndex,
        within: std::ops::Range<usize>,
        slots: &mut Vec<Slot>,
    ) {
        let start = PageIndex::new(first.get() + within.start as u64);
        let range = PageRange { start, count: PageCount::new(within.len() as u64) };
        let region = self.region;
        let note = || tiers.note(|| Record::Remove { region, range });
        if within == (0..LEAF_PAGES) {
            note();
            if let Some(leaf) = self.take_leaf(first) {
                self.stored -= lock(&leaf).stored;
                end_leaf(leaf, tiers, slots);
            }
            return;
        }
        let mut leaf = lock(self.own(tiers, first));
        note();
        let mut removed = 0;
        leaf.portions.take(within, |portion| {
            tiers.give_up(portion.place, slots);
            removed += 1;
        });
        leaf.stored -= removed;
        let is_empty = leaf.stored == 0;
        // A leaf has at most 512.
        let left = leaf.stored as usize;
        leaf.portions.gather(left);
        leaf.settle();
        drop(leaf);
        self.stored -= removed;
        if is_empty {
            self.take_leaf(first);
        }
    }

    fn take_leaf(&mut self, page: PageIndex) -> Option<SharedLeaf> {
        let (branch, leaf, _) = split(page);
        let branch = Arc::make_mut(&mut self.root).get_mut(branch)?.as_mut()?;
        Arc::make_mut(branch).leaves[leaf].take()
    }

    /// Forgets everything, a leaf at a time, handing each leaf's slots to `release`. What copies
    /// still hold stays.
    pub(crate) fn clear(&mut self, tiers: &Tiers, mut release: impl FnMut(&mut Vec<Slot>)) {
        let mut slots = Vec::with_capacity(LEAF_PAGES);
        self.stored = 0;
        // Of all who let go of a node at the same time exactly one gets it and goes on below.
        let Some(root) = Arc::into_inner(std::mem::take(&mut self.root)) else {
            return;
        };
        for branch in root.into_iter().flatten().filter_map(Arc::into_inner) {
            for leaf in branch.leaves.into_iter().flatten() {
                end_leaf(leaf, tiers, &mut slots);
                release(&mut slots);
                slots.clear();
            }
        }
    }

    /// The leaf of a page, which no other table holds. Made if there is none.
    fn own(&mut self, tiers: &Tiers, page: PageIndex) -> &Mutex<Leaf> {
        let (branch, leaf, _) = split(page);
        let (region, page_bytes) = (self.region, self.page_bytes);
        let root = Arc::make_mut(&mut self.root);
        if branch >= root.len() {
            root.resize_with(branch + 1, || None);
        }
        let branch = Arc::make_mut(root[branch].get_or_insert_with(|| Branch::empty(tiers)));
        let empty = || Leaf::empty(tiers, page_bytes);
        let shared = branch.leaves[leaf].get_or_insert_with(empty);
        if Arc::get_mut(shared).is_none() {
            let own = {
                let leaf = lock(shared);
                tiers.note(|| Record::Own { region, page });
                leaf.copy(tiers)
            };
            let former = std::mem::replace(shared, Arc::new(Mutex::new(own)));
            // The other holders may have let go meanwhile.
            let mut slots = Vec::new();
            end_leaf(former, tiers, &mut slots);
            tiers.arena.release(slots);
        }
        shared
    }
}

impl Portion {
    /// What the journal says of it.
    pub(crate) fn record(&self, region: RegionId, page: PageIndex) -> PageRecord {
        let Self { generation, dirty, absent, version, checksum, .. } = *self;
        let spot = self.place.spot();
        PageRecord { region, page, version, checksum, spot, generation, dirty, absent }
    }
}

impl Branch {
    fn empty(tiers: &Tiers) -> Arc<Self> {
        let mut charge = tiers.charge();
        charge.set(COUNTS_BYTES + size_of::<Self>());
        Arc::new(Self { leaves: [const { None }; BRANCH_LEAVES], _charge: charge })
    }
}

impl Leaf {
    fn empty(tiers: &Tiers, page_bytes: u32) -> SharedLeaf {
        let portions = Portions::new(page_bytes, &tiers.arena);
        let mut leaf = Self { portions, stored: 0, changed: 0, charge: tiers.charge() };
        leaf.settle();
        Arc::new(Mutex::new(leaf))
    }

    /// The same portions, each place held once more.
    fn copy(&self, tiers: &Tiers) -> Self {
        let copy = |portion: &Portion| Portion { place: tiers.share(&portion.place), ..*portion };
        let portions = self.portions.map(copy);
        let Self { stored, changed, .. } = *self;
        let mut leaf = Self { portions, stored, changed, charge: tiers.charge() };
        leaf.settle();
        leaf
    }

    /// Counts the memory that it takes.
    fn settle(&mut self) {
        self.charge.set(COUNTS_BYTES + size_of::<Mutex<Self>>() + self.portions.bytes());
    }
}

pub(crate) fn lock(leaf: &Mutex<Leaf>) -> MutexGuard<'_, Leaf> {
    leaf.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets go of a leaf; if nobody else holds it, of its places too.
fn end_leaf(leaf: SharedLeaf, tiers: &Tiers, slots: &mut Vec<Slot>) {
    if let Some(leaf) = Arc::into_inner(leaf) {
        let leaf = leaf.into_inner().unwrap_or_else(PoisonError::into_inner);
        for portion in leaf.portions {
            tiers.give_up(portion.place, slots);
        }
    }
}

/// Which branch, which leaf of it, and where in that. A page past what can be addressed falls past
/// every branch.
fn split(page: PageIndex) -> (usize, usize, usize) {
    let page = usize::try_from(page.get()).unwrap_or(usize::MAX);
    let leaf = page / LEAF_PAGES;
    (leaf / BRANCH_LEAVES, leaf % BRANCH_LEAVES, page % LEAF_PAGES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn portion(tiers: &Tiers, version: u64) -> Portion {
        let mut slots = Vec::new();
        assert!(tiers.arena.take(1, &mut slots));
        let place = Place::Dram(slots.pop().unwrap());
        let (version, checksum) = (Version::new(version), Checksum::new(version));
        Portion { place, dirty: 0, heat: 0, absent: 0, generation: 0, version, checksum }
    }

    fn range(start: u64, count: u64) -> PageRange {
        PageRange { start: PageIndex::new(start), count: PageCount::new(count) }
    }

    fn version(table: &Table, page: u64) -> Option<u64> {
        table.with(PageIndex::new(page), |portion| portion.version.get())
    }

    fn put(table: &mut Table, tiers: &Tiers, page: u64, version: u64) {
        if let Some(place) = table.put(tiers, PageIndex::new(page), &portion(tiers, version)) {
            let mut slots = Vec::new();
            tiers.give_up(place, &mut slots);
            tiers.arena.release(slots);
        }
    }

    fn clear(table: &mut Table, tiers: &Tiers) {
        table.clear(tiers, |slots| tiers.arena.release(slots.drain(..)));
    }

    /// Bytes that a table takes, but for what the allocator adds.
    fn bytes(table: &Table) -> usize {
        let leaf = |leaf: &SharedLeaf| 16 + size_of::<Mutex<Leaf>>() + lock(leaf).portions.bytes();
        let branch = |branch: &Arc<Branch>| {
            size_of::<Branch>() + branch.leaves.iter().flatten().map(leaf).sum::<usize>()
        };
        table.root.capacity() * size_of::<Option<Arc<Branch>>>()
            + table.root.iter().flatten().map(branch).sum::<usize>()
    }

    #[test]
    fn put_look_remove() {
        let tiers = Tiers::dram_only(4096).unwrap();
        let mut table = Table::new(RegionId::new(1), 4096);
        for page in [0, 511, 512, 5_000, 600_000] {
            put(&mut table, &tiers, page, page + 1);
        }
        assert_eq!(table.stored().get(), 5);
        put(&mut table, &tiers, 512, 9);
        assert_eq!((version(&table, 512), version(&table, 513)), (Some(9), None));
        let mut slots = Vec::new();
        table.remove(&tiers, range(511, 2), &mut slots);
        assert_eq!((slots.len(), table.stored().get()), (2, 3));
        table.remove(&tiers, range(0, u64::MAX), &mut slots);
        assert_eq!((slots.len(), table.stored().get()), (5, 0));
        assert!(table.leaf_from(PageIndex::new(0)).is_none());
        tiers.arena.release(slots);
        assert_eq!(tiers.arena.taken(), 0);
    }

    #[test]
    fn cap_17_a_copy_and_its_original_change_apart() {
        let tiers = Tiers::dram_only(4096).unwrap();
        let mut original = Table::new(RegionId::new(1), 4096);
        (0..1500).for_each(|page| put(&mut original, &tiers, page, 1));
        let mut copy = original.copy(RegionId::new(2));
        let mut grandchild = copy.copy(RegionId::new(3));
        assert_eq!(tiers.arena.taken(), 1500, "a copy costs no page");
        put(&mut copy, &tiers, 3, 2);
        put(&mut original, &tiers, 600, 3);
        let mut slots = Vec::new();
        original.remove(&tiers, range(1024, 100), &mut slots);
        tiers.arena.release(slots.drain(..));
        assert_eq!(tiers.arena.taken(), 1502);
        let all = |table: &Table| [3, 600, 1024].map(|page| version(table, page));
        assert_eq!(all(&original), [Some(1), Some(3), None]);
        assert_eq!(all(&copy), [Some(2), Some(1), Some(1)]);
        assert_eq!(all(&grandchild), [Some(1), Some(1), Some(1)]);
        // Memory is free when the last holder goes, in whatever order.
        clear(&mut original, &tiers);
        assert_eq!(all(&grandchild), [Some(1), Some(1), Some(1)]);
        clear(&mut grandchild, &tiers);
        assert_eq!(all(&copy), [Some(2), Some(1), Some(1)]);
        assert_eq!(tiers.arena.taken(), 1500);
        clear(&mut copy, &tiers);
        assert_eq!(tiers.arena.taken(), 0);
    }

    #[test]
    fn holders_that_go_at_the_same_time_free_everything_once() {
        let tiers = Tiers::dram_only(4096).unwrap();
        for _ in 0..20 {
            let mut original = Table::new(RegionId::new(1), 4096);
            (0..1500).for_each(|page| put(&mut original, &tiers, page, 1));
            let mut copies: Vec<_> = (0..4).map(|_| original.copy(RegionId::new(2))).collect();
            std::thread::scope(|scope| {
                for (at, copy) in copies.iter_mut().enumerate() {
                    let tiers = &tiers;
                    scope.spawn(move || {
                        put(copy, tiers, at as u64 * 300, 2);
                        clear(copy, tiers);
                    });
                }
                clear(&mut original, &tiers);
            });
            assert_eq!(tiers.arena.taken(), 0);
        }
    }

    #[test]
    fn cap_5_a_tebibyte_costs_little_before_it_is_used_and_little_more_than_what_is_used() {
        let tiers = Tiers::dram_only(20_000).unwrap();
        let mut table = Table::new(RegionId::new(1), 4096);
        assert_eq!(bytes(&table), 0);
        put(&mut table, &tiers, (1 << 28) - 1, 1);
        assert!(bytes(&table) <= 16 << 10, "{}", bytes(&table));
        clear(&mut table, &tiers);
        // Single pages all over it: nothing but their leaves, which are small, and the tree.
        (0..10_000).for_each(|at| put(&mut table, &tiers, at * 26_843, 1));
        let tree = (1 << 10) * (size_of::<Branch>() + size_of::<Option<Arc<Branch>>>());
        assert!(bytes(&table) <= tree + 10_000 * 150, "{}", bytes(&table));
        clear(&mut table, &tiers);
        // All pages of a part: 26 bytes each, and some for each 2 MiB.
        (0..20_000).for_each(|page| put(&mut table, &tiers, page, 1));
        let leaves = 40 * size_of::<Mutex<Leaf>>();
        assert!(bytes(&table) <= 40 * 512 * 26 + leaves + 8192, "{}", bytes(&table));
        clear(&mut table, &tiers);
        assert_eq!((table.stored().get(), tiers.arena.taken()), (0, 0));
    }

    #[test]
    fn pages_past_every_table_are_absent() {
        let tiers = Tiers::dram_only(1).unwrap();
        let mut table = Table::new(RegionId::new(1), 4096);
        assert_eq!(version(&table, u64::MAX), None);
        table.remove(&tiers, range(u64::MAX - 1, u64::MAX), &mut Vec::new());
    }
}
