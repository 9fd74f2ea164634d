//! Which pages of a region are read first, and in which order: what is worth being near before it is
//! asked for again, after a restart or on another server.
//!
//! What is read from one beginning on, of a writer or of the server, is a spell. The order that is kept
//! is that of the last spell, then what of those before it was not read in it.

use std::collections::HashSet;
use std::sync::Arc;

use farmem_region::PageIndex;

/// Pages that are remembered of a region, 128 MiB: what a program reads while it starts. Each takes
/// up to 40 bytes.
pub(crate) const PAGES_MAX: usize = 32 << 10;

/// What was read of a region, in order.
#[derive(Debug, Default)]
pub(crate) struct WorkingSet {
    /// Since the spell began, none twice.
    spell: Vec<PageIndex>,
    seen: HashSet<PageIndex>,
    /// Before, none twice. Copies of the region share it.
    before: Arc<Vec<PageIndex>>,
}

impl WorkingSet {
    /// One that was kept with a region.
    pub(crate) fn of(pages: Vec<PageIndex>) -> Self {
        Self { before: Arc::new(pages), ..Self::default() }
    }

    /// Whether a page is not known to have been read in this spell, and there is room to remember it.
    pub(crate) fn is_news(&self, page: PageIndex) -> bool {
        self.spell.len() < PAGES_MAX && !self.seen.contains(&page)
    }

    /// Remembers a page. Returns whether the spell begins with it; nothing if it was remembered before,
    /// or there is no room.
    pub(crate) fn touch(&mut self, page: PageIndex) -> Option<bool> {
        if self.spell.len() >= PAGES_MAX || !self.seen.insert(page) {
            return None;
        }
        self.spell.push(page);
        Some(self.spell.len() == 1)
    }

    /// As [`WorkingSet::touch`], as a journal tells it.
    pub(crate) fn touch_again(&mut self, page: PageIndex, begins: bool) {
        if begins {
            self.begin_spell();
        }
        self.touch(page);
    }

    /// What is read from now on comes first.
    pub(crate) fn begin_spell(&mut self) {
        if self.spell.is_empty() {
            return;
        }
        self.before = Arc::new(self.order());
        self.spell = Vec::new();
        self.seen = HashSet::new();
    }

    /// A set for a copy of the region, with what is known now. Takes time for what was remembered
    /// since the last copy, and no memory.
    pub(crate) fn copy(&mut self) -> Self {
        self.begin_spell();
        Self { before: Arc::clone(&self.before), ..Self::default() }
    }

    /// All pages that are remembered, in order.
    pub(crate) fn order(&self) -> Vec<PageIndex> {
        let before = self.before.iter().filter(|page| !self.seen.contains(page));
        self.spell.iter().chain(before).copied().take(PAGES_MAX).collect()
    }

    /// The same as what a journal says of it: each page, and whether a spell begins with it.
    pub(crate) fn records(&self) -> impl Iterator<Item = (PageIndex, bool)> {
        let begins = |pages: &[PageIndex]| {
            let pages = pages.to_vec();
            pages.into_iter().enumerate().map(|(at, page)| (page, at == 0))
        };
        begins(&self.before).chain(begins(&self.spell))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(numbers: &[u64]) -> Vec<PageIndex> {
        numbers.iter().copied().map(PageIndex::new).collect()
    }

    fn touch(set: &mut WorkingSet, numbers: &[u64]) {
        for page in pages(numbers) {
            let _ = set.touch(page);
        }
    }

    #[test]
    fn cap_101_the_last_spell_comes_first_and_no_page_twice() {
        let mut set = WorkingSet::default();
        touch(&mut set, &[5, 3, 5, 9]);
        assert_eq!(set.order(), pages(&[5, 3, 9]));
        set.begin_spell();
        touch(&mut set, &[9, 1]);
        assert_eq!(set.order(), pages(&[9, 1, 5, 3]));
        let copy = set.copy();
        touch(&mut set, &[7]);
        assert_eq!((copy.order(), set.order()), (pages(&[9, 1, 5, 3]), pages(&[7, 9, 1, 5, 3])));
        let mut told = WorkingSet::default();
        set.records().for_each(|(page, begins)| told.touch_again(page, begins));
        assert_eq!(told.order(), set.order());
        assert!(!told.is_news(PageIndex::new(7)) && told.is_news(PageIndex::new(9)));
    }

    #[test]
    fn a_working_set_is_bounded() {
        let mut set = WorkingSet::default();
        for page in 0..3 * PAGES_MAX as u64 {
            set.touch(PageIndex::new(page));
        }
        assert_eq!(set.order().len(), PAGES_MAX);
        set.begin_spell();
        touch(&mut set, &[1 << 40]);
        let order = set.order();
        assert_eq!((order.len(), order[0].get(), order[1].get()), (PAGES_MAX, 1 << 40, 0));
    }
}
