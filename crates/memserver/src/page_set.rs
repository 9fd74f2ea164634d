//! A set of pages that consists of a few ranges: those that are pinned, or that a file holds already.

use farmem_region::{PageCount, PageIndex, PageRange};

/// Pages as ranges of them: apart, in order, with room between them.
#[derive(Debug, Default)]
pub(crate) struct PageSet {
    ranges: Vec<(u64, u64)>,
}

impl PageSet {
    pub(crate) fn contains(&self, page: PageIndex) -> bool {
        let after = self.ranges.partition_point(|(start, _)| *start <= page.get());
        after > 0 && page.get() < self.ranges[after - 1].1
    }

    /// Whether any page of a range is in it.
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

    /// How many there are.
    pub(crate) fn pages(&self) -> PageCount {
        PageCount::new(self.ranges.iter().map(|(start, end)| end - start).sum())
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

    pub(crate) fn remove(&mut self, range: PageRange) {
        let (start, end) = bounds(range);
        if start == end {
            return;
        }
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
                assert!(set.ranges.is_sorted() && set.ranges.len() <= count);
            }
        }
    }
}
