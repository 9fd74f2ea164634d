//! A set of addresses as disjoint ranges: what is adopted, what must stay.

use std::collections::BTreeMap;

use farmem_vmem::AddressRange;

/// Disjoint ranges; neighbours are merged.
#[derive(Debug, Clone, Default)]
pub(crate) struct RangeSet {
    /// Start to end.
    ranges: BTreeMap<usize, usize>,
}

impl RangeSet {
    /// Adds a range.
    pub(crate) fn insert(&mut self, range: AddressRange) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start(), range.end());
        while let Some((&s, &e)) = self.ranges.range(..=end).next_back() {
            if e < start {
                break;
            }
            start = start.min(s);
            end = end.max(e);
            self.ranges.remove(&s);
        }
        self.ranges.insert(start, end);
    }

    /// Takes a range out.
    pub(crate) fn remove(&mut self, range: AddressRange) {
        for part in self.overlapping(range) {
            self.ranges.remove(&part.start());
            for rest in part.without(range) {
                if !rest.is_empty() {
                    self.ranges.insert(rest.start(), rest.end());
                }
            }
        }
    }

    /// The range that has the address.
    #[must_use]
    pub(crate) fn find(&self, address: usize) -> Option<AddressRange> {
        let (&start, &end) = self.ranges.range(..=address).next_back()?;
        (address < end).then(|| AddressRange::new(start, end))
    }

    /// The first range that ends after `address`.
    #[must_use]
    pub(crate) fn next_from(&self, address: usize) -> Option<AddressRange> {
        self.find(address).or_else(|| {
            let (&start, &end) = self.ranges.range(address..).next()?;
            Some(AddressRange::new(start, end))
        })
    }

    /// The whole ranges that have a part in common with `range`.
    #[must_use]
    pub(crate) fn overlapping(&self, range: AddressRange) -> Vec<AddressRange> {
        let mut found = Vec::new();
        let mut at = range.start();
        while let Some(part) = self.next_from(at) {
            if part.start() >= range.end() {
                break;
            }
            found.push(part);
            at = part.end();
        }
        found
    }

    /// What the set has of `range`.
    #[must_use]
    pub(crate) fn inside(&self, range: AddressRange) -> Vec<AddressRange> {
        self.overlapping(range).into_iter().map(|part| part.intersect(range)).collect()
    }

    /// All ranges, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = AddressRange> + '_ {
        self.ranges.iter().map(|(&start, &end)| AddressRange::new(start, end))
    }

    /// The parts of `range` that are not in the set.
    #[must_use]
    pub(crate) fn gaps(&self, range: AddressRange) -> Vec<AddressRange> {
        let mut gaps = Vec::new();
        let mut at = range.start();
        for part in self.overlapping(range) {
            if part.start() > at {
                gaps.push(AddressRange::new(at, part.start()));
            }
            at = part.end();
        }
        if at < range.end() {
            gaps.push(AddressRange::new(at, range.end()));
        }
        gaps
    }

    /// Whether it is empty.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn behaves_like_a_set_of_pages() {
        const PAGES: usize = 40;
        let mut set = RangeSet::default();
        let mut model = [false; PAGES];
        let mut state = 1u64;
        for _ in 0..5000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let number = (state >> 33) as usize;
            let (start, len) = (number % PAGES, number / PAGES % 9);
            let len = len.min(PAGES - start);
            let range = AddressRange::pages_from(start << 12, len);
            let add = (number / 1000).is_multiple_of(2);
            if add {
                set.insert(range);
            } else {
                set.remove(range);
            }
            model[start..start + len].fill(add);
            for (page, &inside) in model.iter().enumerate() {
                assert_eq!(set.find(page << 12).is_some(), inside, "page {page}");
            }
            let gaps: usize =
                set.gaps(AddressRange::new(0, PAGES << 12)).iter().map(|g| g.pages()).sum();
            assert_eq!(gaps, model.iter().filter(|&&b| !b).count());
        }
    }
}
