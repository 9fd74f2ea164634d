//! From a region's pages to slots of the arena.
//!
//! ```text
//! leaves:   [ leaf 0 | none | leaf 2 | ... ]    one pointer for 2 MiB of region
//!              |
//!              +-> 512 portions of 24 bytes, made when the first of them is written
//! ```

use farmem_region::{Checksum, PageCount, PageIndex, PageRange, Version};
use farmem_vmem::Slot;

const LEAF_PAGES: usize = 512;

/// What a region costs the server for each page that is stored, pages themselves apart.
const _: () = assert!(size_of::<Portion>() <= 32);

/// A page as the server keeps it.
#[derive(Debug)]
pub(crate) struct Portion {
    pub(crate) slot: Slot,
    pub(crate) version: Version,
    pub(crate) checksum: Checksum,
}

#[derive(Debug)]
struct Leaf {
    portions: [Option<Portion>; LEAF_PAGES],
    stored: usize,
}

/// The pages of one region that are stored.
#[derive(Debug, Default)]
pub(crate) struct Table {
    leaves: Vec<Option<Box<Leaf>>>,
    stored: u64,
}

impl Table {
    /// Pages stored.
    pub(crate) const fn stored(&self) -> PageCount {
        PageCount::new(self.stored)
    }

    /// The page, if it is stored.
    pub(crate) fn get(&self, page: PageIndex) -> Option<&Portion> {
        let (leaf, at) = place(page);
        self.leaves.get(leaf)?.as_ref()?.portions[at].as_ref()
    }

    /// Stores a page; returns the slot that held it before. The caller has checked that the page
    /// lies in the region: the table grows to hold it.
    pub(crate) fn put(&mut self, page: PageIndex, portion: Portion) -> Option<Slot> {
        let (leaf, at) = place(page);
        if leaf >= self.leaves.len() {
            self.leaves.resize_with(leaf + 1, || None);
        }
        let leaf = self.leaves[leaf].get_or_insert_with(Leaf::empty);
        let before = leaf.portions[at].replace(portion);
        if before.is_none() {
            leaf.stored += 1;
            self.stored += 1;
        }
        before.map(|portion| portion.slot)
    }

    /// Forgets the pages of a range and appends their slots to `slots`. Costs time for what is
    /// stored, not for the length of the range.
    pub(crate) fn remove(&mut self, range: PageRange, slots: &mut Vec<Slot>) {
        let end = range.start.get().saturating_add(range.count.get());
        let mut page = range.start.get();
        while page < end {
            let (leaf, at) = place(PageIndex::new(page));
            let Some(entry) = self.leaves.get_mut(leaf) else {
                return;
            };
            let in_leaf = (LEAF_PAGES - at).min(usize::try_from(end - page).unwrap_or(usize::MAX));
            if let Some(leaf) = entry {
                let before = slots.len();
                let portions = leaf.portions[at..at + in_leaf].iter_mut();
                slots.extend(portions.filter_map(Option::take).map(|portion| portion.slot));
                leaf.stored -= slots.len() - before;
                self.stored -= (slots.len() - before) as u64;
                if leaf.stored == 0 {
                    *entry = None;
                }
            }
            page += in_leaf as u64;
        }
    }

    /// Forgets everything, a leaf at a time, handing each leaf's slots to `release`.
    pub(crate) fn clear(&mut self, mut release: impl FnMut(&mut Vec<Slot>)) {
        let mut slots = Vec::with_capacity(LEAF_PAGES);
        for leaf in std::mem::take(&mut self.leaves).into_iter().flatten() {
            slots.extend(leaf.portions.into_iter().flatten().map(|portion| portion.slot));
            release(&mut slots);
            slots.clear();
        }
        self.stored = 0;
    }
}

impl Leaf {
    fn empty() -> Box<Self> {
        Box::new(Self { portions: [const { None }; LEAF_PAGES], stored: 0 })
    }
}

/// Which leaf, and where in it. A page past what can be addressed falls past every leaf.
fn place(page: PageIndex) -> (usize, usize) {
    let page = usize::try_from(page.get()).unwrap_or(usize::MAX);
    (page / LEAF_PAGES, page % LEAF_PAGES)
}

#[cfg(test)]
mod tests {
    use farmem_vmem::Arena;

    use super::*;

    fn portion(arena: &Arena, version: u64) -> Portion {
        let mut slots = Vec::new();
        assert!(arena.take(1, &mut slots));
        let slot = slots.pop().unwrap();
        Portion { slot, version: Version::new(version), checksum: Checksum::new(version) }
    }

    fn range(start: u64, count: u64) -> PageRange {
        PageRange { start: PageIndex::new(start), count: PageCount::new(count) }
    }

    #[test]
    fn put_get_remove() {
        let arena = Arena::new(4096).unwrap();
        let mut table = Table::default();
        for page in [0, 511, 512, 5_000] {
            assert!(table.put(PageIndex::new(page), portion(&arena, page + 1)).is_none());
        }
        assert_eq!(table.stored().get(), 4);
        let old = table.put(PageIndex::new(512), portion(&arena, 9)).unwrap();
        arena.release([old]);
        assert_eq!(table.get(PageIndex::new(512)).unwrap().version.get(), 9);
        assert!(table.get(PageIndex::new(513)).is_none());
        let mut slots = Vec::new();
        table.remove(range(511, 2), &mut slots);
        assert_eq!((slots.len(), table.stored().get()), (2, 2));
        table.remove(range(0, u64::MAX), &mut slots);
        assert_eq!((slots.len(), table.stored().get()), (4, 0));
        assert!(table.leaves.iter().all(Option::is_none));
        arena.release(slots);
        assert_eq!(arena.taken(), 0);
    }

    #[test]
    fn a_gibibyte_costs_little_before_it_is_used() {
        let arena = Arena::new(1).unwrap();
        let mut table = Table::default();
        let _ = table.put(PageIndex::new((1 << 18) - 1), portion(&arena, 1));
        assert!(table.leaves.len() * size_of::<Option<Box<Leaf>>>() <= 4096);
        table.clear(|slots| arena.release(slots.drain(..)));
        assert_eq!((table.stored().get(), arena.taken()), (0, 0));
    }

    #[test]
    fn pages_past_every_table_are_absent() {
        let mut table = Table::default();
        assert!(table.get(PageIndex::new(u64::MAX)).is_none());
        table.remove(range(u64::MAX - 1, u64::MAX), &mut Vec::new());
    }
}
