//! A set of pages that consists of a few ranges: those that are pinned, or that a file holds already.

use std::ops::Range;

use farmem_region::{PageCount, PageIndex, PageRange};

/// Ranges of one region that are pinned apart from each other, or that a clone's own range holds: 256 KiB, and
/// some microseconds to add one.
pub(crate) const RANGES_MAX: usize = 16_384;

/// Pages as ranges of them: apart, in order, with room between them.
#[derive(Debug, Default, Clone)]
pub(crate) struct PageSet {
    ranges: Vec<(u64, u64)>,
    pages: u64,
}

impl PageSet {
    pub(crate) fn contains(&self, page: PageIndex) -> bool {
        let after = self.ranges.partition_point(|(start, _)| *start <= page.get());
        after > 0 && page.get() < self.ranges[after - 1].1
    }

    /// Whether any page of a range is in it.
    pub(crate) fn overlaps(&self, range: PageRange) -> bool {
        let end = range.start.get().saturating_add(range.count.get());
        self.first_from(range.start.get()).is_some_and(|first| first < end)
    }

    pub(crate) fn ranges(&self) -> impl Iterator<Item = PageRange> {
        self.ranges.iter().map(|(start, end)| PageRange {
            start: PageIndex::new(*start),
            count: PageCount::new(end - start),
        })
    }

    /// How many there are.
    pub(crate) fn pages(&self) -> PageCount {
        PageCount::new(self.pages)
    }

    /// In how many ranges.
    pub(crate) const fn count(&self) -> usize {
        self.ranges.len()
    }

    /// The first page from one on that is not in it.
    pub(crate) fn first_missing(&self, from: u64) -> u64 {
        let after = self.ranges.partition_point(|(start, _)| *start <= from);
        if after > 0 { self.ranges[after - 1].1.max(from) } else { from }
    }

    /// The first page from one on that is in it, if there is one.
    pub(crate) fn first_from(&self, from: u64) -> Option<u64> {
        let after = self.ranges.partition_point(|(_, end)| *end <= from);
        self.ranges.get(after).map(|(start, _)| (*start).max(from))
    }

    /// What of a range is not in it.
    pub(crate) fn gaps(&self, range: PageRange) -> Vec<PageRange> {
        let end = range.start.get().saturating_add(range.count.get());
        let (mut at, mut gaps) = (self.first_missing(range.start.get()), Vec::new());
        while at < end {
            let stop = self.first_from(at).unwrap_or(end).min(end);
            let count = PageCount::new(stop - at);
            gaps.push(PageRange { start: PageIndex::new(at), count });
            at = self.first_missing(stop);
        }
        gaps
    }

    pub(crate) fn insert(&mut self, range: PageRange) {
        let (mut start, mut end) = bounds(range);
        if start == end {
            return;
        }
        let first = self.ranges.partition_point(|(_, last)| *last < start);
        let after = self.ranges.partition_point(|(first, _)| *first <= end);
        if let Some(touched) = self.ranges.get(first..after).filter(|touched| !touched.is_empty()) {
            start = start.min(touched[0].0);
            end = end.max(touched[touched.len() - 1].1);
        }
        self.replace(first..after, &[(start, end)]);
    }

    pub(crate) fn remove(&mut self, range: PageRange) {
        let (start, end) = bounds(range);
        let first = self.ranges.partition_point(|(_, last)| *last <= start);
        let after = self.ranges.partition_point(|(first, _)| *first < end);
        if start == end || first >= after {
            return;
        }
        let before = (self.ranges[first].0, start);
        let behind = (end, self.ranges[after - 1].1);
        match (before.0 < before.1, behind.0 < behind.1) {
            (true, true) => self.replace(first..after, &[before, behind]),
            (true, false) => self.replace(first..after, &[before]),
            (false, true) => self.replace(first..after, &[behind]),
            (false, false) => self.replace(first..after, &[]),
        }
    }

    /// Forgets what is beyond so many ranges.
    pub(crate) fn keep_first(&mut self, ranges: usize) {
        let end = self.ranges.len();
        self.replace(ranges.min(end)..end, &[]);
    }

    fn replace(&mut self, which: Range<usize>, by: &[(u64, u64)]) {
        let pages = |ranges: &[(u64, u64)]| ranges.iter().map(|(start, end)| end - start).sum();
        let (gone, come): (u64, u64) = (pages(&self.ranges[which.clone()]), pages(by));
        self.ranges.splice(which, by.iter().copied());
        self.pages = self.pages - gone + come;
    }
}

fn bounds(range: PageRange) -> (u64, u64) {
    (range.start.get(), range.start.get().saturating_add(range.count.get()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cap_11_sets_of_pages_agree_with_one_flag_for_each_page() {
        let mut seed = 42_u64;
        let mut next = |limit: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % limit
        };
        for _ in 0..200 {
            let (mut set, mut model) = (PageSet::default(), [false; 100]);
            for _ in 0..30 {
                let (start, count) = (next(100), next(30));
                let count = count.min(100 - start);
                let range =
                    PageRange { start: PageIndex::new(start), count: PageCount::new(count) };
                let is_in = next(2) == 0;
                if is_in {
                    set.insert(range);
                } else {
                    set.remove(range);
                }
                model[start as usize..(start + count) as usize].fill(is_in);
                let found: Vec<_> =
                    (0..100).map(|page| set.contains(PageIndex::new(page))).collect();
                assert_eq!(found, model);
                let count = model.iter().filter(|is_in| **is_in).count();
                assert_eq!(set.pages().get(), count as u64);
                for from in 0..100 {
                    let next = |is_in| (from..100).find(|at| model[*at] == is_in);
                    let missing = next(false).unwrap_or(100) as u64;
                    assert_eq!(set.first_missing(from as u64), missing);
                    assert_eq!(set.first_from(from as u64), next(true).map(|at| at as u64));
                }
                let asked = PageRange {
                    start: PageIndex::new(next(100)),
                    count: PageCount::new(1 + next(9)),
                };
                let (start, end) = bounds(asked);
                let is_there = model[start as usize..end.min(100) as usize].contains(&true);
                assert_eq!(set.overlaps(asked), is_there);
                assert!(set.ranges.is_sorted() && set.ranges.len() <= count);
            }
        }
    }

    #[test]
    fn a_set_of_too_many_ranges_forgets_the_last() {
        let mut set = PageSet::default();
        for start in [10, 20, 30] {
            set.insert(PageRange { start: PageIndex::new(start), count: PageCount::new(3) });
        }
        set.keep_first(3);
        assert_eq!((set.count(), set.pages().get()), (3, 9));
        set.keep_first(2);
        assert_eq!((set.count(), set.pages().get()), (2, 6));
        assert!(set.contains(PageIndex::new(22)) && !set.contains(PageIndex::new(30)));
    }
}
